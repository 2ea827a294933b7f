"""Weights of segmentors: Detectron2's files without their code, and backbones of other hosts."""

from __future__ import annotations

import io
import logging
import math
import pickle
import re
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import timm
import torch
from detectron2.checkpoint.c2_model_loading import align_and_update_state_dicts
from detectron2.utils.file_io import PathManager
from safetensors import SafetensorError
from torch import Tensor, nn

from common.card import told_sum
from common.checkpoint import WAY_OUT, CheckpointError, load_weights, read_weights
from common.pickles import BoundedUnpickler, TooMuch
from segmentation.mask2former import load_transformers

_logger = logging.getLogger(__name__)

_TYPE = re.compile(r"[<>=|]?[?a-zA-Z]\d{0,9}")
_ENOUGH = 0.9
_WHERE = ("model", "blobs")  # Detectron2's and Caffe2's files have their arrays under these
_CAFFE2 = "conv1_w"  # in every ResNet of the zoo's ImageNetPretrained/MSRA
_OF_INPUT = ("pixel_mean", "pixel_std")  # saved by older versions; the config has them
# What segmentors add to a backbone, or what is computed anew.
_NOT_IN_BACKBONES = re.compile(
    r"\.fpn_|num_batches_tracked|relative_position_index|^backbone\.norm\d\."
)


class _Type:
    """A ``numpy.dtype`` out of a pickle: of numbers or text, not of fields."""

    def __init__(self, name: str, *_: Any) -> None:
        if not isinstance(name, str) or not _TYPE.fullmatch(name):
            raise pickle.UnpicklingError(f"numpy.dtype of {str(name)[:40]!r}")
        self.dtype = np.dtype(name)

    def __setstate__(self, state: Any) -> None:
        if any(part is not None for part in state[2:5]):
            raise pickle.UnpicklingError("numpy.dtype of fields")
        self.dtype = self.dtype.newbyteorder(state[1])


class _Array:
    """A numpy array out of a pickle: the bytes that were read, and what they mean.

    Its bytes are looked at by ``numbers`` alone, so that many arrays of the same bytes are no more.
    """

    def __init__(self) -> None:
        self.state: Any = None
        self.axes: Any = None  # in which they lie in memory, where neither C nor Fortran has it

    def __setstate__(self, state: Any) -> None:
        _, shape, kind, is_fortran, raw = state
        self.state = shape, kind, is_fortran, raw

    @property
    def size(self) -> int:
        raw = self.state[3]
        return len(raw) if isinstance(raw, (bytes, bytearray, str)) else 0

    def numbers(self) -> np.ndarray:
        """Return the numbers, without a copy.

        Raises:
            ValueError, TypeError: It holds none, or fewer or more than its shape.
        """
        shape, kind, is_fortran, raw = self.state
        if not isinstance(kind, _Type) or kind.dtype.kind not in "biufc":
            raise TypeError("not an array of numbers")
        raw = raw.encode("latin1") if isinstance(raw, str) else raw  # of Python 2
        if math.prod(shape) * kind.dtype.itemsize != len(raw):
            raise ValueError(f"an array of shape {shape} has {len(raw)} bytes")
        array = np.ndarray(shape, kind.dtype, raw, order="F" if is_fortran else "C")
        return array if self.axes is None else array.transpose(self.axes)


class _ArrayUnpickler(BoundedUnpickler):
    """Builds containers, keeps the bytes of arrays, and refuses everything else by its name.

    What numpy 1 and 2 pickle arrays with is replaced, so that no file can call numpy.
    """

    def __init__(self, stream: BinaryIO) -> None:
        super().__init__(stream, encoding="latin1")
        self.made |= {"numpy.ndarray": self._array, "numpy.dtype": _Type}
        self.made["builtins.bytes"] = self._no_bytes
        for core in ("core", "_core"):
            self.made[f"numpy.{core}.multiarray._reconstruct"] = self._new
            self.made[f"numpy.{core}.multiarray.scalar"] = self._scalar
            self.made[f"numpy.{core}.numeric._frombuffer"] = self._of_buffer

    def _array(self, *_: Any) -> None:
        """Stand for numpy's class of arrays, which no array of numbers is made by a call of."""
        raise TooMuch("it asks for a 'numpy.ndarray' without its numbers")

    def _new(self, kind: Any, shape: Any, code: Any) -> _Array:
        if kind != self._array or shape != (0,):
            raise TooMuch(f"it asks for an array of shape {str(shape)[:40]} without its numbers")
        return _Array()

    def _of_buffer(self, raw: Any, kind: Any, shape: Any, order: Any, axes: Any = None) -> _Array:
        array = _Array()
        array.axes = axes if order == "K" else None
        array.state = shape, kind, order == "F", raw
        return array

    def _no_bytes(self, *given: Any) -> bytes:
        """Give the empty bytes that protocol 2 has no other way to write."""
        if given:
            raise TooMuch("it asks for bytes without giving them")
        return b""

    def _scalar(self, *_: Any) -> None:
        """Drop a numpy number beside the arrays, of which no weights are made."""


def read_pickle(path: Path) -> dict[str, Any]:
    """Read one of Detectron2's ``.pkl`` files: containers and numpy arrays, nothing that runs.

    Returns:
        What the file holds, with an ``_Array`` for each array.

    Raises:
        CheckpointError: Missing or broken, or it asks for anything else; names it.
    """
    try:
        content = _ArrayUnpickler(io.BytesIO(path.read_bytes())).load()
    except TooMuch as error:
        raise CheckpointError(f"{path}: refused, {error}; {WAY_OUT}") from error
    except pickle.UnpicklingError as error:
        asked = str(error).removeprefix("GLOBAL ")
        raise CheckpointError(
            f"{path}: refused, or no pickle: {asked}. Checkpoints never execute code here; "
            f"{WAY_OUT}"
        ) from error
    except (
        OSError,
        EOFError,
        ValueError,
        LookupError,
        TypeError,
        AttributeError,
        ArithmeticError,
        MemoryError,
        struct.error,
    ) as error:
        raise CheckpointError(
            f"{path}: missing or broken file ({error}); fetch it again"
        ) from error
    if not isinstance(content, Mapping):
        raise CheckpointError(
            f"{path}: holds a {type(content).__name__}, expected names and arrays"
        )
    return dict(content)


def read_segmentor(path: Path) -> dict[str, Tensor]:
    """Read the weights of a ``.pkl``, ``.pth`` or ``.safetensors`` file.

    Raises:
        CheckpointError: As ``read_pickle`` and ``common.checkpoint.read_weights``.
    """
    if not path.is_file():
        raise CheckpointError(
            f"{path}: no such file in the working folder or beside the run file; check "
            "MODEL.WEIGHTS"
        )
    if path.suffix != ".pkl":
        return read_weights(path)
    content: Any = read_pickle(path)
    content = next((content[key] for key in _WHERE if key in content), content)
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{path}: holds no arrays of weights")
    arrays = {
        str(name): value
        for name, value in content.items()
        if isinstance(value, _Array) and not str(name).endswith("_momentum")
    }
    if not arrays or any(array.state is None for array in arrays.values()):
        raise CheckpointError(f"{path}: holds no arrays of weights")
    distinct = {id(array): array for array in arrays.values()}  # one may have several names
    claimed = sum(array.size for array in distinct.values())
    if claimed > path.stat().st_size:
        raise CheckpointError(
            f"{path}: refused, its arrays claim {claimed} bytes, more than the file has; {WAY_OUT}"
        )
    try:
        tensors = {key: _tensor(array.numbers()) for key, array in distinct.items()}
    except (TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{path}: holds no arrays of weights ({error})") from error
    return {name: tensors[id(array)] for name, array in arrays.items()}


def _tensor(numbers: np.ndarray) -> Tensor:
    """Copy numbers out of the file's bytes, in this machine's order."""
    return torch.from_numpy(np.array(numbers, dtype=numbers.dtype.newbyteorder("=")))


def load_peer_weights(module: nn.Module, source: str, who: str) -> None:
    """Load a whole segmentor, or the backbone it shall start from.

    Args:
        module: The segmentor.
        source: A file; ``detectron2://`` or ``https://`` for Detectron2's own download and cache;
            ``hf:NAME`` or ``hf:FOLDER`` for a Mask2Former of transformers; ``timm:NAME`` for a
            backbone of timm's.
        who: Names the peer in errors.

    Raises:
        CheckpointError: Not there, unsafe, or weights of another model.
    """
    own = module.state_dict()
    weights = {name: x for name, x in _read(source).items() if name in own or name not in _OF_INPUT}
    if not set(own) - set(weights):
        load_weights(module, weights, f"{who}: {source}")
        return
    given = sum(name in weights for name in own)
    if given > len(own) / 2:
        load_weights(module, weights, f"{who}: {source}")  # refuses, and says what differs
    _load_backbone(module, to_detectron2(weights), f"{who}: {source}")


def origin_of(weights: str) -> str:
    """Tell in words what a peer starts from; asked at a run's start, when the file is what it was.

    Args:
        weights: MODEL.WEIGHTS.
    """
    if not weights:
        return "no file: random weights"
    path = Path(weights).expanduser()
    return told_sum(path) if path.is_file() else f"published weights `{weights}`"


def _read(source: str) -> dict[str, Tensor]:
    kind, _, name = source.partition(":")
    if kind == "timm":
        return _timm(source, name)
    if kind == "hf":
        return _transformers(source, name)
    return read_segmentor(_local(source))


def _load_backbone(module: nn.Module, weights: Mapping[str, Tensor], source: str) -> None:
    """Load what fits a backbone, by Detectron2's own matching of names."""
    own = {name: x for name, x in module.state_dict().items() if "backbone" in name}
    body = {name for name in own if not _NOT_IN_BACKBONES.search(name)}
    caffe2 = _CAFFE2 in weights
    if caffe2:  # their means and variances are folded into the affine of the norms
        body = {name for name in body if ".running_" not in name}
    try:
        matched = align_and_update_state_dicts(own, dict(weights), c2_conversion=caffe2)
    except ValueError as error:
        raise CheckpointError(
            f"{source}: neither a checkpoint of this {type(module).__name__} nor of its backbone "
            f"({error})"
        ) from error
    fits = {name: x for name, x in matched.items() if name in body and own[name].shape == x.shape}
    if not body or len(fits) < _ENOUGH * len(body):
        missing = sorted(body - set(fits))[:4]
        raise CheckpointError(
            f"{source}: neither a checkpoint of this {type(module).__name__} nor of its backbone; "
            f"{len(fits)} of the backbone's {len(body)} tensors fit, missing {', '.join(missing)}"
        )
    module.load_state_dict({**module.state_dict(), **fits})
    _logger.info("%s: the backbone's %d tensors; the head starts anew", source, len(fits))


_TORCHVISION = (
    (r"^conv1\.", "stem.conv1."),
    (r"^bn1\.", "stem.conv1.norm."),
    (r"^layer(\d)\.", lambda found: f"res{int(found[1]) + 1}."),
    (r"\.bn(\d)\.", r".conv\1.norm."),
    (r"\.downsample\.0\.", ".shortcut."),
    (r"\.downsample\.1\.", ".shortcut.norm."),
)
_TIMM_SWIN = re.compile(r"^layers\.(\d)\.downsample\.")


def to_detectron2(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename a backbone of torchvision's or timm's (ResNet, Swin) as Detectron2's projects do."""
    if "layer1.0.conv1.weight" in weights:
        return {_renamed(name): x for name, x in weights.items() if not name.startswith("fc.")}
    if (
        "layers.1.downsample.norm.weight" in weights
        and "layers.3.downsample.norm.weight" in weights
    ):
        # timm merges patches at a stage's beginning, Swin's authors at the end of the one before
        weights = {
            _TIMM_SWIN.sub(lambda found: f"layers.{int(found[1]) - 1}.downsample.", name): x
            for name, x in weights.items()
        }
    return {
        name: x for name, x in weights.items() if not name.startswith(("head.", "norm.", "fc."))
    }


def _renamed(name: str) -> str:
    for pattern, to in _TORCHVISION:
        name = re.sub(pattern, to, name)
    return name


def _transformers(source: str, name: str) -> dict[str, Tensor]:
    try:
        return load_transformers(name)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"{source}: {error}. Without a network, give a local folder: hf:FOLDER"
        ) from error


def _timm(source: str, name: str) -> dict[str, Tensor]:
    try:
        return timm.create_model(name, pretrained=True).state_dict()
    except Exception as error:
        raise CheckpointError(
            f"{source}: {error}. Without a network, give the path of a local file as WEIGHTS"
        ) from error


def _local(source: str) -> Path:
    if "://" not in source:
        return Path(source).expanduser()
    try:
        return Path(PathManager.get_local_path(source))
    except Exception as error:
        raise CheckpointError(
            f"{source}: cannot be fetched ({error}); without a network, give the path of a local "
            "file"
        ) from error
