"""Checkpoints: atomic writes, reads that never execute code, plain per-peer files."""

from __future__ import annotations

import argparse
import hashlib
import logging
import pickle
import re
import struct
import zipfile
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from common import distributed
from common.disk import atomic_write
from common.pickles import TooMuch, try_torch_file
from common.shapes import fault_of_run

_logger = logging.getLogger(__name__)

RUN_FORMAT = 1
RUN_KEYS = {"peers", "progress", "ranks", "config"}
WEIGHT_KEYS = ("state_dict_ema", "state_dict", "model_ema", "model", "weights", "module")
_RUN_FILE = re.compile(r"run-(\d{5})-(\d{8})\.pt")
_HOLLOW = 2**20  # bytes that a tensor may claim without having them
_PREFIXES = ("module.", "_orig_mod.")
WAY_OUT = "save its state_dict alone (torch.save(model.state_dict(), ...) or safetensors)"
# What torch's reader would build, and may take more memory than the file holds.
_LARGE = re.compile(r"torch\._(utils|tensor)\..*|torch\.\w*Tensor|_codecs\..*|bytearray")


class CheckpointError(ValueError):
    """A checkpoint that is missing, broken, unsafe or of another model; says what to do."""


def save_run(folder: Path, state: Mapping[str, Any], epoch: int, batch: int, keep: int) -> Path:
    """Write one resumable run file; keep it and the newest ones before it.

    Files of a later position are removed: those of a run that went on from an older file, because
    the newer ones are broken or that was asked for. A resume would take them for the newest.

    Args:
        folder: Where run files live.
        state: Tensors and plain Python containers only, so that reading needs no code.
        epoch: Epochs finished.
        batch: Batches finished in the running epoch.
        keep: How many run files stay, >= 1.

    Returns:
        The file's path, ``run-EPOCH-BATCH.pt``.
    """
    path = folder / f"run-{epoch:05d}-{batch:08d}.pt"
    atomic_write(path, lambda to: torch.save({"format": RUN_FORMAT, **state}, to))
    runs = list_runs(folder)
    end = runs.index(path) + 1
    for old in runs[end:] + runs[: max(end - keep, 0)]:
        old.unlink(missing_ok=True)
    return path


def list_runs(folder: Path) -> list[Path]:
    """List a folder's run files, oldest first by epoch and batch."""
    return sorted(path for path in folder.glob("run-*.pt") if _RUN_FILE.fullmatch(path.name))


def load_run(path: Path) -> dict[str, Any]:
    """Read a run file, or the newest one of a folder.

    Raises:
        CheckpointError: No such file, not a run file, of a newer format, or one from which no
            trainer could go on: names what it lacks.
    """
    path = Path(path)
    if path.is_dir():
        runs = list_runs(path)
        if not runs:
            raise CheckpointError(
                f"{path}: no run file (run-*.pt) in this folder; nothing to resume"
            )
        path = runs[-1]
    state = read_file(path, sums=True)
    if not isinstance(state.get("format"), int) or not set(state) >= RUN_KEYS:
        raise CheckpointError(
            f"{path}: not a run file of this project; to start from plain weights, give it as a "
            "peer's checkpoint"
        )
    if state["format"] > RUN_FORMAT:
        raise CheckpointError(
            f"{path}: run file of format {state['format']}, this version reads up to {RUN_FORMAT}; "
            "update the package"
        )
    fault = fault_of_run(state)
    if fault:
        raise CheckpointError(
            f"{path}: a run file that was changed, or none of this project: {fault}; resume from "
            "another one, or start a run of its own from the peers' weights"
        )
    return state


def newest_good_run(folder: Path) -> tuple[Path, dict[str, Any]] | None:
    """Read the newest run file of a folder that can be read; warn of newer ones that cannot.

    Returns:
        The file, and what ``load_run`` gives; None where the folder has no run file.

    Raises:
        CheckpointError: It has some, and none can be read.
    """
    runs = list_runs(folder)
    for path in reversed(runs):
        try:
            return path, load_run(path)
        except CheckpointError as error:
            _logger.warning("passed over: %s", error)
    if runs:
        raise CheckpointError(
            f"{folder}: none of its {len(runs)} run files can be read; give another --experiment"
        )
    return None


def require_file(path: Path | str) -> None:
    """Refuse a file that is not there, without a look at what it holds.

    Raises:
        CheckpointError: Names it.
    """
    if not Path(path).is_file():
        raise CheckpointError(f"{path}: no such file; check the checkpoint's path")


def read_file(path: Path | str, sums: bool = False) -> dict[str, Any]:
    """Read a ``.safetensors`` or a torch file without executing anything in it.

    Torch files may hold tensors, plain containers and an ``argparse.Namespace`` (as training
    checkpoints of MAE and timm do); anything else is refused by its name.

    Args:
        path: Of the file.
        sums: Refuse a torch file with parts of another checksum than it keeps of them. For files of
            our own: not all writers keep true ones, so of other files this is only told.

    Returns:
        What the file holds, on the CPU.

    Raises:
        CheckpointError: Missing, truncated or unsafe file, or one that holds no mapping.
    """
    path = Path(path)
    require_file(path)
    if path.suffix == ".safetensors":
        try:
            return dict(load_file(path))
        except (SafetensorError, OSError) as error:
            reason = "it is empty" if not path.stat().st_size else str(error)
            raise CheckpointError(_damaged(path, reason)) from error
    try:
        _refuse_inflated(path)
        wrong = _wrong_part(path)
        if sums and wrong:
            raise CheckpointError(_damaged(path, wrong))
        try_torch_file(path, _is_zip(path))
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True)
        _refuse_hollow(path, content)
    except CheckpointError:
        raise
    except TooMuch as error:
        raise CheckpointError(f"{path}: refused, {error}; {WAY_OUT}") from error
    except pickle.UnpicklingError as error:
        damage = _damage(path)
        told = _damaged(path, damage) if damage else _unsafe(path, str(error))
        raise CheckpointError(told) from error
    except (
        RuntimeError, EOFError, OSError, ValueError, LookupError, TypeError, AttributeError,
        AssertionError, ArithmeticError, MemoryError, zipfile.BadZipFile, zlib.error, struct.error,
    ) as error:  # fmt: skip
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(_damaged(path, _damage(path) or reason)) from error
    if wrong and distributed.is_first():
        _logger.warning(
            "%s: read, but %s; most likely the file is damaged: copy or download it again (some "
            "writers keep no true checksums)",
            *(path, wrong),
        )
    if not isinstance(content, Mapping):
        raise CheckpointError(
            f"{path}: holds a {type(content).__name__}, expected a mapping of names to tensors"
        )
    return dict(content)


def _refuse_inflated(path: Path) -> None:
    """Refuse a zip whose parts unpack to more than the file: torch stores them as they are.

    Raises:
        CheckpointError: A few kilobytes could fill the memory.
    """
    if not _is_zip(path):
        return
    with zipfile.ZipFile(path) as archive:
        parts = archive.infolist()
    whole = sum(part.file_size for part in parts)
    packed = [part.filename for part in parts if part.compress_type != zipfile.ZIP_STORED]
    if packed or whole > path.stat().st_size:
        raise CheckpointError(
            f"{path}: refused, it would unpack from {path.stat().st_size} to {whole} bytes, and "
            f"torch compresses nothing ({_listed(packed, 3) or 'its parts overlap'}); save the "
            "weights with torch.save or as safetensors"
        )


def _refuse_hollow(path: Path, content: Any) -> None:
    """Refuse tensors that claim more than the file stores of them: expanded, sparse, of no data.

    To copy one, or to compare it, takes the memory that it claims. No model loads its weights into
    such a one; a small one is let pass.

    Raises:
        CheckpointError: Names where in the file it is.
    """
    seen: set[int] = set()
    left: list[tuple[Any, Any]] = [((), content)]  # containers may hold one another
    while left:
        place, value = left.pop()
        if id(value) in seen:
            continue
        if isinstance(value, Tensor):
            claimed = value.numel() * value.element_size()
            if claimed > _HOLLOW and claimed > _stored(value):
                raise CheckpointError(
                    f"{path}: refused, {_named(place)} claims {claimed} bytes, and the file holds "
                    f"{_stored(value)} of them; save its contiguous() dense copy"
                )
        elif isinstance(value, (Mapping, list, tuple, set, argparse.Namespace)):
            seen.add(id(value))
            left += [((place, k), x) for k, x in _items(value)]


def _named(place: Any, most: int = 200) -> str:
    """Write a place, which is the place around it and a key: joined for errors alone, as keys may
    be long and containers deep."""
    name = ""
    while place and len(name) < most:
        place, key = place
        name = f"{str(key)[:most]}.{name}" if name else str(key)[:most]
    return f"... {name}" if place else name


def _items(value: Any) -> Iterable[tuple[Any, Any]]:
    if isinstance(value, argparse.Namespace):
        value = vars(value)
    return value.items() if isinstance(value, Mapping) else enumerate(value)


def _stored(x: Tensor) -> int:
    """Return the bytes behind a tensor; 0 where it is no plain one on the CPU."""
    plain = x.layout is torch.strided and x.device.type == "cpu" and not x.is_nested
    return x.untyped_storage().nbytes() if plain else 0


def _is_zip(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(4) == b"PK\x03\x04"


def _wrong_part(path: Path) -> str:
    """Name a part of a torch file with a wrong checksum, which torch does not compare, if any."""
    if not _is_zip(path):
        return ""
    with zipfile.ZipFile(path) as archive:
        part = archive.testzip()
    if part is None:
        return ""
    inside = part.partition("/")[2] or part  # torch puts all into a folder of the name it wrote to
    return f"the checksum of its part {inside} is wrong"


def _damage(path: Path) -> str:
    """Say what is plainly wrong with the bytes of a torch file that cannot be read, if anything."""
    with path.open("rb") as file:
        head = file.read(512)
    if not any(head):
        return "it begins with zeros" if head else "it is empty"
    if not _is_zip(path):
        return ""
    if not zipfile.is_zipfile(path):
        return "its end is missing"
    try:
        return _wrong_part(path)
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError, struct.error) as error:
        return str(error)


def _damaged(path: Path, reason: str) -> str:
    return f"{path}: truncated or damaged file ({reason}); copy, download or write it again"


def _unsafe(path: Path, message: str) -> str:
    found = re.search(r"(?:Unsupported global: )?GLOBAL ([\w.]+)", message)
    if found is None:
        with path.open("rb") as file:
            head = file.read(24)
        return (
            f"{path}: not a checkpoint that can be read safely (it begins with {head!r}); it is "
            "damaged or something else, a web page for instance: copy or download it again"
        )
    if _LARGE.fullmatch(found.group(1)):
        return (
            f"{path}: refused, it asks for {found.group(1)!r}, which can take more memory than the "
            f"file holds; of plain dense tensors, {WAY_OUT}"
        )
    return (
        f"{path}: refused, it asks to run {found.group(1)!r}, and checkpoints never execute code "
        f"here; {WAY_OUT}"
    )


def read_weights(path: Path | str, key: str | None = None) -> dict[str, Tensor]:
    """Read a model's state dict from a plain file or from a training checkpoint.

    Args:
        path: ``.safetensors`` or a torch file.
        key: Where in a torch file the weights are; None: the first of ``WEIGHT_KEYS`` (averaged
            weights before plain ones, as timm does), else the file itself.

    Returns:
        Names to tensors, with the prefixes of DistributedDataParallel and torch.compile removed.

    Raises:
        CheckpointError: As ``read_file``; or no weights under that key.
    """
    content: Any = read_file(path)
    keys = [key] if key is not None else [k for k in WEIGHT_KEYS if k in content]
    if keys:
        if keys[0] not in content:
            raise CheckpointError(f"{path}: no key {keys[0]!r}; keys: {_listed(content)}")
        content = content[keys[0]]
    if not isinstance(content, Mapping) or not content:
        raise CheckpointError(f"{path}: holds no weights")
    others = [name for name, value in content.items() if not isinstance(value, Tensor)]
    if others:
        raise CheckpointError(
            f"{path}: holds no plain weights; these entries are not tensors: {_listed(others)}"
        )
    return {_without_prefix(name): value for name, value in content.items()}


def _without_prefix(name: str) -> str:
    for prefix in _PREFIXES:
        name = name.removeprefix(prefix)
    return name


def _listed(names: Any, most: int = 6) -> str:
    names = [str(name) for name in names]
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def load_weights(module: nn.Module, weights: Mapping[str, Tensor], source: Path | str) -> None:
    """Load a state dict, all of it and nothing else.

    Raises:
        CheckpointError: Names that are missing, left over or of another shape: a checkpoint of
            another model. The module is unchanged.
    """
    own = module.state_dict()
    shapes = [
        f"{name} {list(weights[name].shape)} (model: {list(own[name].shape)})"
        for name in own
        if name in weights and weights[name].shape != own[name].shape
    ]
    missing = [name for name in own if name not in weights]
    left_over = [name for name in weights if name not in own]
    problems = [
        f"{what}: {_listed(names)}"
        for what, names in (("missing", missing), ("left over", left_over), ("shape", shapes))
        if names
    ]
    if problems:
        raise CheckpointError(
            f"{source}: not a checkpoint of this {type(module).__name__}; {'; '.join(problems)}"
        )
    broken = [
        name for name, x in weights.items() if x.is_floating_point() and not x.isfinite().all()
    ]
    if broken:
        raise CheckpointError(f"{source}: values that are not finite in {_listed(broken)}")
    module.load_state_dict(dict(weights), strict=True)


def save_weights(
    path: Path, weights: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Write one peer's plain weights, atomically.

    Args:
        path: ``.safetensors``, else a torch file with the state dict alone.
        weights: Names to tensors; tensors that share memory are written one by one.
        metadata: Plain text kept in a safetensors file's header.
    """
    cpu = {name: x.detach().to("cpu").contiguous().clone() for name, x in weights.items()}
    if path.suffix == ".safetensors":
        atomic_write(path, lambda to: save_file(cpu, to, metadata=dict(metadata or {})))
    else:
        atomic_write(path, lambda to: torch.save(cpu, to))


def digest_of(weights: Mapping[str, Tensor]) -> str:
    """Return what tells weights from all others, whatever file they are in.

    Args:
        weights: Names to tensors, as they are in a module or as ``read_weights`` gives them.
    """
    digest = hashlib.sha256()
    plain = {_without_prefix(name): x for name, x in weights.items()}
    for name in sorted(plain):
        x = plain[name].detach().to("cpu").contiguous()
        digest.update(f"{name} {x.dtype} {tuple(x.shape)}\n".encode())
        digest.update(x.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def read_metadata(path: Path | str) -> dict[str, str]:
    """Read the text in a safetensors file's header; empty for other files.

    Raises:
        CheckpointError: Missing or truncated file.
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        return {}
    require_file(path)
    try:
        with safe_open(path, framework="pt") as file:
            return dict(file.metadata() or {})
    except (SafetensorError, OSError) as error:
        raise CheckpointError(_damaged(path, str(error))) from error
