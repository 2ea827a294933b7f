"""Where a run stands: each peer's files in its own folder, and one record that makes them count.

A checkpoint of the run is whole once ``run.pt`` is written, which names the iteration; a run that
was killed before goes on from the one before. Every peer's file is a plain Detectron2 checkpoint.
"""

from __future__ import annotations

import functools
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from common.checkpoint import CheckpointError, atomic_write, load_weights, read_file
from common.peers import Peer
from segmentation.peer import SegmentorPeer

RECORD = "run.pt"
FORMAT = 1
BEST = "model_best.pth"
START = "model_start.pth"
SOUP = "model_soup.pth"
FINAL = "model_final.pth"
LAST = "last_checkpoint"  # where Detectron2 looks for a file's name
_PEER_KEYS = {"model", "optimizer", "scheduler", "iteration"}
_LEARNING = "unaveraged"  # the weights that learn, where "model" is their average
_KEYS = {"format", "iteration", "peers", "seed", "ranks", "scaler", "best", "history", "lessons"}


def save_peers(
    folder: Path,
    peers: Iterable[SegmentorPeer],
    iterations: int,
    kept: Callable[[str], Mapping[str, Any]] = lambda name: {},
) -> None:
    """Write the checkpoints of the peers that are here; they count once the record names them.

    A file that an earlier record names is not written again, so that a kill costs nothing.

    Args:
        folder: Of the run.
        peers: Frozen ones are not written: they stay what they were.
        iterations: That are finished.
        kept: Gives by a peer's name what else its file shall hold.
    """
    for peer in peers:
        if peer.optimizer is not None:
            path = folder / peer.name / file_of(iterations)
            _save_peer(path, peer, iterations - 1, kept(peer.name))


def save_record(
    folder: Path, learning: Sequence[str], state: Mapping[str, Any], keep: int, final: bool = False
) -> None:
    """Write the record, once every peer's checkpoint is written; prune what is old.

    Args:
        folder: Of the run.
        learning: Names of the peers that have checkpoints.
        state: Tensors and plain containers, with ``peers``, the names of all, and ``iteration``,
            the iterations finished.
        keep: How many resumable checkpoints stay; 0: all.
        final: Also give the peers' files the name that Detectron2 gives a run's last.
    """
    file = file_of(state["iteration"])
    record = {"format": FORMAT, "file": file, **state}
    atomic_write(folder / RECORD, lambda to: torch.save(record, to))
    if final:
        finish(folder, learning, record)
    else:
        _tag(folder, learning, file)
    for name in learning:
        files = sorted((folder / name).glob("model_[0-9]*.pth"))
        for old in files[:-keep] if keep else ():
            if old.name != file:
                old.unlink(missing_ok=True)


def drop(folder: Path, learning: Sequence[str], file: str) -> None:
    """Remove a checkpoint's files, which no record names any more."""
    for name in learning:
        (folder / name / file).unlink(missing_ok=True)


def finish(folder: Path, learning: Sequence[str], record: Mapping[str, Any]) -> None:
    """Copy the files that a record names to ``model_final.pth``, where that is not done yet."""
    for name in learning:
        source, to = (folder / name / file for file in (record["file"], FINAL))
        if source != to:
            atomic_write(to, functools.partial(shutil.copyfile, source))
    _tag(folder, learning, FINAL)


def file_of(iterations: int) -> str:
    """Return the name of the checkpoint after so many iterations."""
    return f"model_{iterations - 1:07d}.pth"  # Detectron2 counts from 0


def _save_peer(path: Path, peer: SegmentorPeer, iteration: int, kept: Mapping[str, Any]) -> None:
    own = {} if peer.average is None else {_LEARNING: peer.module.state_dict()}
    content = {
        **kept,
        **own,
        "model": peer.best_module.state_dict(),
        "optimizer": peer.optimizer.state_dict(),  # type: ignore[union-attr]
        "scheduler": peer.scheduler.state_dict(),
        "iteration": iteration,
    }
    atomic_write(path, lambda to: torch.save(content, to))


def _tag(folder: Path, learning: Sequence[str], file: str) -> None:
    for name in learning:
        atomic_write(folder / name / LAST, lambda to: to.write_text(file, encoding="utf-8"))


def save_plain(
    folder: Path, peer: SegmentorPeer, iteration: int, file: str = BEST, **more: Any
) -> None:
    """Write a peer's weights alone, as evaluated; ``last_checkpoint`` stays as it is.

    Args:
        folder: Of the run.
        peer: Whose weights, where ``more`` has no ``model``.
        iteration: Iterations finished.
        file: The file's name.
        more: What else it shall hold.
    """
    content = {"model": peer.best_module.state_dict(), "iteration": iteration - 1, **more}
    atomic_write(folder / peer.name / file, lambda to: torch.save(content, to))


def fault_of_best(folder: Path, name: str, iterations: int) -> str:
    """Say what is wrong with a peer's best file; nothing where it is the one of a record.

    A run that is killed after it wrote a best file and before its record leaves one of a moment
    that is lost. On a CPU that moment comes again, elsewhere it need not.

    Args:
        folder: Of the run.
        name: Of the peer.
        iterations: That were finished at its best evaluation, as the record has it.
    """
    path = folder / name / BEST
    if not path.is_file():
        return "is gone"
    try:
        found = read_file(path).get("iteration")
    except CheckpointError:
        return "cannot be read"
    return "" if found == iterations - 1 else "is of a later moment than the run's record"


def weights_at(folder: Path, name: str, iterations: int) -> Mapping[str, Any] | None:
    """Return a peer's weights after so many iterations, if one of the run's files still has them.

    Args:
        folder: Of the run.
        name: Of the peer.
        iterations: That were finished; 0: the start's.
    """
    path = folder / name / (file_of(iterations) if iterations else START)
    try:
        content = read_file(path, sums=True)
    except CheckpointError:
        return None
    return content.get("model") if content.get("iteration") == iterations - 1 else None


def check_starts(folder: Path, names: Sequence[str]) -> None:
    """Refuse a resume with TRANSFER.SOUP of a run that kept no starts.

    Raises:
        CheckpointError: Names the file.
    """
    for path in (folder / name / START for name in names):
        if not path.is_file():
            raise CheckpointError(
                f"{path}: no such file; a run keeps its start only where it begins with "
                "TRANSFER.SOUP; resume without"
            )


def find(folder: Path) -> dict[str, Any] | None:
    """Read a run's record; None where there is none.

    Raises:
        CheckpointError: A file that is no such record, or of a newer version.
    """
    path = folder / RECORD
    if not path.is_file():
        return None
    record = read_file(path, sums=True)
    if not set(record) >= _KEYS:
        raise CheckpointError(f"{path}: not the record of a run; remove it, or resume elsewhere")
    if record["format"] > FORMAT:
        raise CheckpointError(
            f"{path}: format {record['format']}, this version reads up to {FORMAT}; update the "
            "package"
        )
    return record


def refuse_other_settings(
    folder: Path, record: Mapping[str, Any], settings: Mapping[str, str]
) -> None:
    """Refuse to go on with a run under settings that it cannot change.

    Args:
        folder: Of the run.
        record: From ``find``.
        settings: From ``segmentation.config.lasting_settings``.

    Raises:
        CheckpointError: Names each with both values.
    """
    had = record.get("settings", {})
    differ = [
        f"{key} was {had[key]}, is {value}"
        for key, value in settings.items()
        if had.get(key, value) != value
    ]
    if differ:
        raise CheckpointError(
            f"{folder}: the run cannot be resumed with other settings: {'; '.join(differ)}. Give "
            "the run's own, or start another from its weights in another OUTPUT_DIR"
        )


def load(
    folder: Path, peers: Sequence[Peer], record: Mapping[str, Any]
) -> dict[str, dict[str, Any]]:
    """Bring the peers that are here to where the record stands, optimizers and schedules too.

    Returns:
        What else was kept, by the peers' names.

    Raises:
        CheckpointError: Other peers, peers that disagree on the iteration, or files of another
            model or optimizer.
    """
    names = [peer.name for peer in peers]
    if list(record["peers"]) != names:
        raise CheckpointError(
            f"{folder / RECORD}: the run had the peers {', '.join(record['peers'])}, this one has "
            f"{', '.join(names)}; give the same peers in the same order"
        )
    kept: dict[str, dict[str, Any]] = {name: {} for name in names}
    for peer in peers:
        if peer.optimizer is not None:
            path = folder / peer.name / record["file"]
            try:
                kept[peer.name] = _load_peer(path, peer, record["iteration"] - 1)
            except CheckpointError as error:
                raise CheckpointError(f"{error}{_older(path)}") from error
    return kept


def _older(path: Path) -> str:
    """Tell what else there is to start from; the record is of its newest file alone."""
    names = [old.name for old in sorted(path.parent.glob("model_[0-9]*.pth")) if old != path]
    if not names:
        return ""
    return (
        f". No resume goes back to older checkpoints of {path.parent}; to start another run from "
        f"their weights, give them as its WEIGHTS: {', '.join(names)}"
    )


def _load_peer(path: Path, peer: Any, iteration: int) -> dict[str, Any]:
    content = read_file(path, sums=True)
    if not set(content) >= _PEER_KEYS:
        raise CheckpointError(f"{path}: not a checkpoint of a run; it cannot be resumed")
    if content["iteration"] != iteration:
        raise CheckpointError(
            f"{path}: of iteration {content['iteration']}, the run's record is of {iteration}; the "
            "peers' files are not of one moment"
        )
    load_weights(peer.module, content.get(_LEARNING, content["model"]), path)
    if peer.average is not None:
        load_weights(peer.average.module, content["model"], path)
    try:
        peer.optimizer.load_state_dict(content["optimizer"])  # type: ignore[union-attr]
    except ValueError as error:
        raise CheckpointError(
            f"{path}: {error}; resume with the run's own SOLVER settings"
        ) from error
    peer.scheduler.load_state_dict(content["scheduler"])
    return {k: value for k, value in content.items() if k not in {*_PEER_KEYS, _LEARNING}}
