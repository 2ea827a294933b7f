"""Where a run stands: each peer's files in its own folder, and one record that makes them count.

A checkpoint of the run is whole once ``run.pt`` is written, which names the iteration; a run that
was killed before goes on from the one before. Every peer's file is a plain Detectron2 checkpoint.
Of older checkpoints the records are kept too, for where the newest is broken.
"""

from __future__ import annotations

import functools
import logging
import re
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from common.checkpoint import CheckpointError, atomic_write, load_weights, read_file
from common.peers import Peer
from segmentation.peer import SegmentorPeer

_logger = logging.getLogger(__name__)

RECORD = "run.pt"
FORMAT = 1
BEST = "model_best.pth"
START = "model_start.pth"
SOUP = "model_soup.pth"
FINAL = "model_final.pth"
LAST = "last_checkpoint"  # where Detectron2 looks for a file's name
_RECORD_OF = re.compile(r"run_(\d{7,})\.pt")
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

    Checkpoints of later iterations are removed: those of a run that went on from an older one.

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
    for path in (folder / _record_of(file), folder / RECORD):
        atomic_write(path, lambda to: torch.save(record, to))
    if final:
        finish(folder, learning, record)
    else:
        _tag(folder, learning, file)
    for name in learning:
        _prune(sorted((folder / name).glob("model_[0-9]*.pth")), file, keep)
    _prune(_older_records(folder), _record_of(file), keep)


def _prune(files: Sequence[Path], newest: str, keep: int) -> None:
    """Remove files of other checkpoints, in order, than of the newest and those before it."""
    end = [path.name for path in files].index(newest) + 1
    for path in [*files[end:], *(files[: max(end - keep, 0)] if keep else ())]:
        path.unlink(missing_ok=True)


def drop(folder: Path, learning: Sequence[str], file: str) -> None:
    """Remove a checkpoint that is not the newest."""
    (folder / _record_of(file)).unlink(missing_ok=True)
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


def _record_of(file: str) -> str:
    return file.replace("model_", "run_").replace(".pth", ".pt")


def _older_records(folder: Path) -> list[Path]:
    """List the records of single checkpoints, oldest first; the newest one is ``RECORD`` too."""
    found = (path for path in folder.glob("run_*.pt") if _RECORD_OF.fullmatch(path.name))
    return sorted(found, key=lambda path: int(path.stem.removeprefix("run_")))


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


def is_run(folder: Path) -> bool:
    """Whether a folder holds records of a run, good or not."""
    return (folder / RECORD).exists() or bool(_older_records(folder))


def find(folder: Path) -> dict[str, Any] | None:
    """Read a run's record; None where there is none.

    Raises:
        CheckpointError: A file that is no such record, or of a newer version.
    """
    path = folder / RECORD
    return _read_record(path) if path.is_file() else None


def find_good(folder: Path, learning: Sequence[str]) -> dict[str, Any] | None:
    """Read the newest record that is good and whose checkpoints are; warn of newer ones.

    Args:
        folder: Of the run.
        learning: Names of the peers that have checkpoints.

    Returns:
        The record; None where the folder has none.

    Raises:
        CheckpointError: It has some, and none is good.
    """
    paths = [path for path in (folder / RECORD,) if path.is_file()] + _older_records(folder)[::-1]
    passed: list[int] = []
    for path in paths:
        try:
            record = _read_record(path)
            if record["iteration"] in passed:
                continue  # told already, of the same checkpoint's other record
            passed.append(record["iteration"])
            for name in learning:
                _read_peer(folder / name / record["file"], record["iteration"] - 1)
        except CheckpointError as error:
            _logger.warning("passed over: %s", error)
        else:
            return record
    if paths:
        raise CheckpointError(
            f"{folder}: none of its {len(paths)} records names checkpoints that can all be read; "
            "give another OUTPUT_DIR"
        )
    return None


def _read_record(path: Path) -> dict[str, Any]:
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
    folder: Path, record: Mapping[str, Any], settings: Mapping[str, str], allow: bool
) -> None:
    """Refuse to go on with a run under other settings than it had, or tell them.

    Args:
        folder: Of the run.
        record: From ``find``.
        settings: From ``segmentation.config.lasting_settings``.
        allow: Only tell them.

    Raises:
        CheckpointError: Names each with both values.
    """
    had = record.get("settings", {})
    differ = [
        f"{key} {had[key]} -> {value}"
        for key, value in settings.items()
        if had.get(key, value) != value
    ]
    if differ and not allow:
        raise CheckpointError(
            f"{folder}: the run had other settings: {'; '.join(differ)}. Give its own, or "
            "--allow-changed-options to go on under these, or start a run of its own from the "
            "peers' weights in another OUTPUT_DIR"
        )
    if differ:
        _logger.warning("resuming with other settings than the run had: %s", "; ".join(differ))


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
    """Tell what else there is to go on or to start from."""
    names = [old.name for old in sorted(path.parent.glob("model_[0-9]*.pth")) if old != path]
    if not names:
        return ""
    return (
        f". --resume auto goes back to the newest older checkpoint of {path.parent} that is good; "
        f"to start another run from their weights, give them as its WEIGHTS: {', '.join(names)}"
    )


def _load_peer(path: Path, peer: Any, iteration: int) -> dict[str, Any]:
    content = _read_peer(path, iteration)
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


def _read_peer(path: Path, iteration: int) -> dict[str, Any]:
    content = read_file(path, sums=True)
    if not set(content) >= _PEER_KEYS:
        raise CheckpointError(f"{path}: not a checkpoint of a run; it cannot be resumed")
    if content["iteration"] != iteration:
        raise CheckpointError(
            f"{path}: of iteration {content['iteration']}, the run's record is of {iteration}; the "
            "peers' files are not of one moment"
        )
    return content
