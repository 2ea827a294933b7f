"""Pickles of others: what they would build, found out before anything large is built."""

from __future__ import annotations

import io
import itertools
import pickle
import pickletools
import struct
import tarfile
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import torch

_OPCODES = {code.code.encode("latin1"): code for code in pickletools.opcodes}
_MEMO = ("PUT", "BINPUT", "LONG_BINPUT")
_LENGTHS = {
    pickletools.TAKEN_FROM_ARGUMENT1: "<B",
    pickletools.TAKEN_FROM_ARGUMENT4: "<i",
    pickletools.TAKEN_FROM_ARGUMENT4U: "<I",
    pickletools.TAKEN_FROM_ARGUMENT8U: "<Q",
}
LATIN = ("latin1", "latin-1")  # what plain bytes are written with under protocol 2
_MAGIC = 0x1950A86A20F9469CFC6C  # that torch's files began with before they were zips


class TooMuch(pickle.UnpicklingError):
    """A pickle that would build more than its file holds; says of what."""


class Names(OrderedDict[Any, Any]):
    """An ordered dict out of a pickle; attributes that are set on it are dropped."""

    charge: Callable[..., None]

    def __setstate__(self, state: Any) -> None:
        self.charge(*_states(state))


def _states(state: Any) -> tuple[Any, ...]:
    """Tell what is copied when a state is set: attributes, and those of slots beside them."""
    return state if isinstance(state, tuple) and len(state) == 2 else (state,)


class BoundedUnpickler(pickle.Unpickler):
    """Builds plain containers, copies in sum no more than the pickle's size, refuses the rest.

    A pickle may name one container many times, and ask for a copy each time: a file of one megabyte
    could fill the memory.

    Args:
        stream: At the pickle's beginning; read to its end twice.
        encoding: Of strings that Python 2 wrote.

    Raises:
        TooMuch: It would build more.
        pickle.UnpicklingError: Something is named that is not in ``made``, or it is no pickle.
    """

    def __init__(self, stream: IO[bytes], encoding: str) -> None:
        begin = stream.tell()
        _check_opcodes(stream)
        self.end = stream.tell()
        stream.seek(begin)
        super().__init__(stream, encoding=encoding)
        self.left = self.size = self.end - begin  # elements and bytes that may be copied
        self.made: dict[str, Any] = {
            "collections.OrderedDict": self._names,
            "builtins.set": self._set,
            "_codecs.encode": self._encoded,
        }

    def find_class(self, module: str, name: str) -> Any:
        whole = f"{'builtins' if module == '__builtin__' else module}.{name}"  # Python 2's name
        if whole not in self.made:
            raise pickle.UnpicklingError(f"GLOBAL {whole.removeprefix('builtins.')}")
        return self.made[whole]

    def load(self) -> Any:
        try:
            return super().load()
        finally:
            self.memo.clear()  # both hold this object's methods, and so itself and what was read
            self.made.clear()

    def charge(self, *copied: Any) -> None:
        """Count what is copied."""
        self.left -= sum(len(part) for part in copied if part is not None)
        if self.left < 0:
            raise TooMuch(f"its pickle of {self.size} bytes copies more than it holds")

    def _names(self, *given: Any) -> Names:
        if not all(isinstance(pairs, (Mapping, list)) for pairs in given):
            raise pickle.UnpicklingError("a dict of neither names nor pairs")
        self.charge(*given)
        names = Names(*given)
        names.charge = self.charge
        return names

    def _set(self, given: Any = ()) -> set[Any]:
        if not isinstance(given, (list, tuple, set)):
            raise pickle.UnpicklingError(f"a set of a {type(given).__name__}")
        self.charge(given)
        return set(given)

    def _encoded(self, text: str, encoding: str) -> bytes:
        if encoding not in LATIN:
            raise TooMuch(
                f"it asks for '_codecs.encode' with {str(encoding)[:40]!r}, which can take more "
                "memory than the file holds"
            )
        self.charge(text)
        return text.encode(encoding)


def _check_opcodes(stream: IO[bytes]) -> None:
    """Go to a pickle's end, and refuse what the reader makes room for before it has it.

    Lengths behind the end of the file, and places in the memo that no earlier ones lead up to.
    """
    here = stream.tell()
    end = stream.seek(0, io.SEEK_END)
    stream.seek(here)
    for count in itertools.count(1):
        code = _OPCODES.get(key := stream.read(1))
        if code is None:
            raise pickle.UnpicklingError(f"invalid load key, {key!r}") if key else EOFError
        value = _argument(stream, code, end)
        if value is not None and code.name in _MEMO and value > count:
            raise TooMuch(f"its pickle asks for a memo of {value} places")
        if code.name == "STOP":
            return


def _argument(stream: IO[bytes], code: pickletools.OpcodeInfo, end: int) -> int | None:
    """Go behind an opcode's argument; return it where it is a place in the memo."""
    if code.arg is None:
        return None
    if code.arg.n == pickletools.UP_TO_NEWLINE:
        line = stream.readline()
        if code.name in ("GLOBAL", "INST"):
            stream.readline()
        return int(line) if code.name in _MEMO else None
    if code.arg.n < 0:
        form = _LENGTHS[code.arg.n]
        (length,) = struct.unpack(form, stream.read(struct.calcsize(form)))
        if not 0 <= length <= end - stream.tell():
            raise EOFError(f"{length} bytes of its pickle are not there")
        stream.seek(length, io.SEEK_CUR)
        return None
    return int.from_bytes(stream.read(code.arg.n), "little")


class _Inert:
    """Stands for a tensor, a storage or a class: cannot be called, and takes no state."""

    def __setstate__(self, state: Any) -> None:
        raise pickle.UnpicklingError("state for a tensor")


class _EarlyParameter(_Inert):
    """A parameter as torch wrote it before 1.0: called with its tensor, given three flags later."""

    def __setstate__(self, state: Any) -> None:
        if not isinstance(state, tuple) or len(state) != 3 or state[2]:
            raise pickle.UnpicklingError("a parameter with hooks, or with a state of another kind")


class _Kind(_Inert):
    def __init__(self, itemsize: int) -> None:
        self.itemsize = itemsize


class _Storage(_Inert):
    def __init__(self, nbytes: int, itemsize: int) -> None:
        self.nbytes, self.itemsize = nbytes, itemsize


def _require_counts(*counts: Any) -> None:
    if not all(type(count) is int and count >= 0 for count in counts):
        raise pickle.UnpicklingError("a size, stride or offset that is no natural number")


class _Trial(BoundedUnpickler):
    """Goes through a torch file's pickle with stand-ins for its tensors.

    Knows what a state dict and an optimizer's are made of. What torch would build besides (sparse,
    quantized, nested tensors, copies to another type or device) can take more than the file holds.

    Args:
        stream: At the pickle's beginning.
        parts: Bytes of each storage that the file has; None: they follow later in the file, and
            claim together no more than ``room``.
        room: The file's bytes.
    """

    def __init__(self, stream: IO[bytes], parts: Mapping[str, int] | None, room: int) -> None:
        super().__init__(stream, "utf-8")
        self.parts, self.room = parts, room
        self.storages: dict[str, _Storage] = {}
        self.later: set[str] = set()
        self.tensor_class = _Inert()
        attributes = {"__setstate__": lambda _, state: self.charge(*_states(state))}
        self.made |= {
            "collections.Counter": self._names,
            "builtins.complex": complex,
            "argparse.Namespace": type("Namespace", (), attributes),
            "torch.Size": self._size,
            "torch.device": self._device,
            "torch.Tensor": self.tensor_class,
            "torch.storage.UntypedStorage": _Kind(1),
            "torch._utils._rebuild_tensor": self._tensor,
            "torch._utils._rebuild_tensor_v2": self._tensor,
            "torch._utils._rebuild_tensor_v3": self._tensor_of_dtype,
            "torch.nn.parameter.Parameter": self._early_parameter,
            "torch._utils._rebuild_parameter": self._parameter,
            "torch._utils._rebuild_parameter_with_state": self._parameter,
            "torch._tensor._rebuild_from_type_v2": self._tensor_with_state,
        }

    def find_class(self, module: str, name: str) -> Any:
        if module in ("torch", "torch.cuda") and name.endswith("Storage"):
            try:
                return _Kind(torch.serialization.StorageType(name).dtype.itemsize)
            except KeyError as error:
                raise pickle.UnpicklingError(f"GLOBAL {module}.{name}") from error
        if module == "torch" and isinstance(vars(torch).get(name), torch.dtype):
            return vars(torch)[name]
        return super().find_class(module, name)

    def persistent_load(self, pid: Any) -> _Storage:
        name, kind, key, _, count, *view = pid
        if name not in ("storage", b"storage") or not isinstance(kind, _Kind):
            raise pickle.UnpicklingError("something else than a storage is kept outside the pickle")
        _require_counts(count)
        if type(key) is not str:
            raise pickle.UnpicklingError(f"a storage named by a {type(key).__name__}")
        if key not in self.storages:  # later ones get this, whatever they claim; torch does so too
            self._check_room(key, count * kind.itemsize)
            self.storages[key] = _Storage(count * kind.itemsize, kind.itemsize)
        storage = self.storages[key]
        if not view or view[0] is None:
            return storage
        key, start, count = view[0]
        _require_counts(start, count)
        if type(key) is not str or (start + count) * kind.itemsize > storage.nbytes:
            raise TooMuch("a part of a storage claims more than the storage")
        return self.storages.setdefault(key, _Storage(count * kind.itemsize, kind.itemsize))

    def _check_room(self, key: str, nbytes: int) -> None:
        if self.parts is None:
            self.later.add(key)
            self.room -= nbytes
            if self.room < 0:
                raise TooMuch(f"storage {key[:40]!r} claims {nbytes} bytes, more than the file has")
        elif key not in self.parts:
            raise LookupError(f"no part data/{key[:40]}")
        elif nbytes > self.parts[key]:
            raise TooMuch(
                f"storage {key[:40]!r} claims {nbytes} bytes, and the file has {self.parts[key]}"
            )

    def _tensor(self, storage: _Storage, offset: int, size: Any, stride: Any, *_: Any) -> _Inert:
        return self._checked(storage, storage.itemsize, offset, size, stride)

    def _tensor_of_dtype(
        self, storage: _Storage, offset: int, size: Any, stride: Any, *rest: Any
    ) -> _Inert:
        return self._checked(storage, rest[2].itemsize, offset, size, stride)

    def _checked(
        self, storage: _Storage, itemsize: int, offset: int, size: Any, stride: Any
    ) -> _Inert:
        """Refuse a tensor that reaches behind its storage, which torch would make larger."""
        if not isinstance(storage, _Storage):
            raise pickle.UnpicklingError("a tensor without a storage")
        self.charge(size, stride)
        _require_counts(offset, *size, *stride)
        end = offset + 1 + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
        if all(size) and end * itemsize > storage.nbytes:
            raise TooMuch(
                f"a tensor claims {end * itemsize} bytes of a storage of {storage.nbytes}"
            )
        return _Inert()

    def _parameter(self, data: Any, requires_grad: Any, hooks: Any, state: Any = None) -> _Inert:
        if type(data) is not _Inert:
            raise pickle.UnpicklingError("a parameter without a tensor")
        self.charge(*_states(state))
        return _Inert()

    def _early_parameter(self, data: Any) -> _EarlyParameter:
        self._parameter(data, None, None)
        return _EarlyParameter()

    def _tensor_with_state(self, make: Any, kind: Any, given: Any, state: Any) -> _Inert:
        if make not in (self._tensor, self._tensor_of_dtype) or kind is not self.tensor_class:
            raise pickle.UnpicklingError("GLOBAL torch._tensor._rebuild_from_type_v2")
        self.charge(*_states(state))
        return make(*given)

    def _size(self, given: Any = ()) -> tuple[Any, ...]:
        self.charge(given)
        return tuple(given)

    def _device(self, *_: Any) -> _Inert:
        return _Inert()


def try_torch_file(path: Path, is_zip: bool) -> None:
    """Go through a torch file's pickles before torch does, and build none of its tensors.

    Raises:
        TooMuch: It would build more than the file holds.
        pickle.UnpicklingError: It names something that no plain checkpoint needs, or is no pickle.
        LookupError, TypeError, ValueError, AttributeError, EOFError: Its pickle is broken.
    """
    if is_zip:
        _try_zip(path)
        return
    room = path.stat().st_size
    with path.open("rb") as stream:
        trials = _trials(stream, room)
        if tarfile.is_tarfile(stream):
            return  # torch refuses it by that
        stream.seek(0)
        if next(trials)[0] != _MAGIC:
            return  # torch refuses it, and reads no further
        for _ in range(2):  # the protocol, and of what machine
            next(trials)
        _, claimed = next(trials)
        keys, _ = next(trials)
    without = sorted(claimed - set(keys))
    if without:
        raise TooMuch(f"storage {without[0][:40]!r} claims bytes that the file does not have")


def _trials(stream: IO[bytes], room: int) -> Iterator[tuple[Any, set[str]]]:
    """Go through one pickle after the other: what each gives, and the storages it claims."""
    while True:
        trial = _Trial(stream, None, room)
        content = trial.load()
        stream.seek(trial.end)
        yield content, trial.later


def _try_zip(path: Path) -> None:
    with zipfile.ZipFile(path) as archive:
        parts = archive.infolist()
        names = {part.filename.lower() for part in parts}
        odd = any(part.filename != part.orig_filename for part in parts)
        # torch looks names up in any case, and offsets from the file's beginning
        if odd or len(names) < len(parts) or min(part.header_offset for part in parts) > 0:
            raise pickle.UnpicklingError("parts that share a name, or do not begin at the file's")
        top = parts[0].filename.partition("/")[0]
        found = [part for part in parts if part.filename.lower() == f"{top}/data.pkl".lower()]
        if not found:
            return  # torch says so
        stream = io.BytesIO(archive.read(found[0]))
    data = f"{top}/data/"
    sizes = {
        part.filename.removeprefix(data): part.file_size
        for part in parts
        if part.filename.startswith(data)
    }
    _Trial(stream, sizes, path.stat().st_size).load()
