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
from common.shapes import (
    BEST_OF_PEER,
    COUNT,
    MAPPING,
    NUMBER,
    OPTIMIZER,
    POSITIVE,
    STATE,
    TEXT,
    TRUTH,
    VALUE,
    WEIGHTS,
    Each,
    Kind,
    fault_of,
    fault_of_parts,
)
from segmentation.peer import SegmentorPeer

_logger = logging.getLogger(__name__)

RECORD = "run.pt"
FORMAT = 1
BEST = "model_best.pth"
START = "model_start.pth"
SOUP = "model_soup.pth"
FINAL = "model_final.pth"
LAST = "last_checkpoint"  # where Detectron2 looks for a file's name
_FILE = re.compile(r"(?:model_(\d{7,})(?:_after)?\.pth|run_(\d{7,})\.pt)")
_MODEL = re.compile(r"model_\d{7,}(?:_after)?\.pth")
_PEER_KEYS = {"model", "optimizer", "scheduler", "iteration"}
_LEARNING = "unaveraged"  # the weights that learn, where "model" is their average
_RECORD = {
    **STATE,
    "format": POSITIVE,
    "iteration": POSITIVE,
    "peers": [TEXT],
    "file": Kind("the name of a checkpoint", lambda x: TEXT.fits(x) and bool(_MODEL.fullmatch(x))),
    "seed": COUNT,
    "best": Each((NUMBER, COUNT)),
    "history": [{"iteration": COUNT, "*": VALUE}],
    "lessons": [{"iteration": COUNT, "*": VALUE}],
    "settings?": Each(TEXT),
    "max_iter?": COUNT,
    "origins?": Each(TEXT),
    "layouts?": Each(TRUTH),
    "due?": TRUTH,
}
_PEER = {
    "model": WEIGHTS,
    f"{_LEARNING}?": WEIGHTS,
    "best?": BEST_OF_PEER,
    "optimizer": OPTIMIZER,
    "scheduler": MAPPING,
    "iteration": COUNT,
}


def save_peers(
    folder: Path,
    peers: Iterable[SegmentorPeer],
    file: str,
    iterations: int,
    kept: Callable[[str], Mapping[str, Any]] = lambda name: {},
) -> None:
    """Write the checkpoints of the peers that are here; they count once the record names them.

    So that a kill costs nothing, no file that a record names is written again: what an evaluation
    changed has a name of its own.

    Args:
        folder: Of the run.
        peers: Frozen ones are not written: they stay what they were.
        file: Their name, from ``file_of``.
        iterations: That are finished.
        kept: Gives by a peer's name what else its file shall hold.
    """
    for peer in peers:
        if peer.optimizer is not None:
            _save_peer(folder / peer.name / file, peer, iterations - 1, kept(peer.name))


def save_record(
    folder: Path, learning: Sequence[str], state: Mapping[str, Any], keep: int, final: bool = False
) -> None:
    """Write the record, once every peer's checkpoint is written; prune what is old.

    Checkpoints of later iterations are removed: those of a run that went on from an older one.

    Args:
        folder: Of the run.
        learning: Names of the peers that have checkpoints.
        state: Tensors and plain containers, with ``peers``, the names of all, ``iteration``, the
            iterations finished, and the peers' ``file``.
        keep: How many resumable checkpoints stay; 0: all.
        final: Also give the peers' files the name that Detectron2 gives a run's last.
    """
    file = state["file"]
    record = {"format": FORMAT, **state}
    for path in (folder / _record_of(file), folder / RECORD):
        atomic_write(path, lambda to: torch.save(record, to))
    if final:
        finish(folder, learning, record)
    else:
        _tag(folder, learning, file)
    for name in learning:
        _prune(folder / name, file, keep)
    _prune(folder, _record_of(file), keep)


def _prune(folder: Path, newest: str, keep: int) -> None:
    """Remove files of other moments than the newest's and those before it, and its other one."""
    moments = _moments(folder, newest.split("_")[0])
    last = moments[folder / newest]
    before = sorted({moment for moment in moments.values() if moment <= last})
    kept = before[-keep:]  # 0: all
    for path, moment in moments.items():
        if moment not in kept or (moment == last and path.name != newest):
            path.unlink(missing_ok=True)


def drop(folder: Path, learning: Sequence[str], file: str) -> None:
    """Remove a checkpoint that is not the newest, with what is there of its moment."""
    (folder / _record_of(file)).unlink(missing_ok=True)
    for name in learning:
        for path, moment in _moments(folder / name).items():
            if moment == _moment(file):
                path.unlink(missing_ok=True)


def finish(folder: Path, learning: Sequence[str], record: Mapping[str, Any]) -> None:
    """Copy the files that a record names to ``model_final.pth``, where that is not done yet."""
    for name in learning:
        source, to = (folder / name / file for file in (record["file"], FINAL))
        if source != to:
            atomic_write(to, functools.partial(shutil.copyfile, source))
    _tag(folder, learning, FINAL)


def file_of(iterations: int, evaluated: bool = False) -> str:
    """Return the name of the checkpoint after so many iterations.

    Args:
        iterations: That are finished.
        evaluated: Of the one that has what the guard did by an evaluation there.
    """
    after = "_after" if evaluated else ""
    return f"model_{iterations - 1:07d}{after}.pth"  # Detectron2 counts from 0


def _moment(file: str) -> int | None:
    """Return Detectron2's number in the name of a checkpoint or record; None: it is neither."""
    found = _FILE.fullmatch(file)
    return None if found is None else int(found[1] or found[2])


def _moments(folder: Path, kind: str = "model") -> dict[Path, int]:
    """List a peer's checkpoints, or with ``run`` the records of single ones, by their numbers."""
    found = ((path, _moment(path.name)) for path in folder.glob(f"{kind}_[0-9]*"))
    known = [(path, moment) for path, moment in found if moment is not None]
    return dict(sorted(known, key=lambda each: (each[1], each[0])))


def _record_of(file: str) -> str:
    return f"run_{_moment(file):07d}.pt"  # one for all of a moment


def _older_records(folder: Path) -> list[Path]:
    """List the records of single checkpoints, oldest first; the newest one is ``RECORD`` too."""
    return list(_moments(folder, "run"))


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
        found = read_file(path, sums=True).get("iteration")
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
    # what the guard took back in the second one was not the best
    files = [file_of(iterations, after) for after in (False, True)] if iterations else [START]
    for file in files:
        try:
            content = read_file(folder / name / file, sums=True)
        except CheckpointError:
            continue
        if content.get("iteration") == iterations - 1:
            return content.get("model")
    return None


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


def find_good(folder: Path, names: Sequence[str], learning: Sequence[str]) -> dict[str, Any] | None:
    """Read the newest record that is good and whose checkpoints are; warn of newer ones.

    Args:
        folder: Of the run.
        names: Of its peers.
        learning: Names of those that have checkpoints.

    Returns:
        The record; None where the folder has none.

    Raises:
        CheckpointError: It has some, and none is good; or it is a run of other peers.
    """
    paths = [path for path in (folder / RECORD,) if path.is_file()] + _older_records(folder)[::-1]
    passed: list[int] = []
    for path in paths:
        try:
            record = _read_record(path)
        except CheckpointError as error:
            _logger.warning("passed over: %s", error)
            continue
        _refuse_other_peers(folder, record, names)
        if record["iteration"] in passed:
            continue  # told already, of the same checkpoint's other record
        passed.append(record["iteration"])
        try:
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
    version = record.get("format")
    if POSITIVE.fits(version) and version > FORMAT:
        raise CheckpointError(
            f"{path}: format {version}, this version reads up to {FORMAT}; update the package"
        )
    fault = fault_of(record, _RECORD) or fault_of_parts(record, record["peers"], record["best"])
    if fault:
        raise CheckpointError(
            f"{path}: not the record of a run, or changed: {fault}; remove it, or resume elsewhere"
        )
    return record


def _refuse_other_peers(folder: Path, record: Mapping[str, Any], names: Sequence[str]) -> None:
    if list(record["peers"]) != list(names):
        raise CheckpointError(
            f"{folder / RECORD}: the run had the peers {', '.join(record['peers'])}, this one has "
            f"{', '.join(names)}; give the same peers in the same order"
        )


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
    _refuse_other_peers(folder, record, names)
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
    names = [old.name for old in _moments(path.parent) if old != path]
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
    fault = fault_of(content, _PEER)
    if fault:
        raise CheckpointError(
            f"{path}: not a checkpoint of a run, or changed: {fault}; it cannot be resumed"
        )
    if content["iteration"] != iteration:
        raise CheckpointError(
            f"{path}: of iteration {content['iteration']}, the run's record is of {iteration}; the "
            "peers' files are not of one moment"
        )
    return content
