"""Bytes: of tensors, of what autograd keeps for backward, of all that a computation holds."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Yield the tensors that containers and objects hold, at any depth."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, nn.Module):
        yield from value.parameters()
        yield from value.buffers()
    elif isinstance(value, (list, tuple, set, frozenset)):
        for inner in value:
            yield from tensors_in(inner)
    elif isinstance(value, Mapping):
        for inner in value.values():
            yield from tensors_in(inner)
    elif hasattr(value, "__dict__"):
        for inner in vars(value).values():
            yield from tensors_in(inner)


def bytes_of(value: Any, device: torch.device | None = None) -> int:
    """Count the bytes of all tensors in a value, each storage once.

    Args:
        value: See ``tensors_in``.
        device: Count only what lies there; None: all.
    """
    found = {_key(x): x for x in tensors_in(value) if device is None or x.device == device}
    return sum(x.untyped_storage().nbytes() for x in found.values())


def saved_bytes(run: Callable[[], object], known: Iterable[Tensor] = ()) -> int:
    """Count the bytes that autograd keeps for backward while ``run`` computes; each storage once.

    Args:
        run: Does the forward pass.
        known: Tensors whose storages are not counted, such as parameters and inputs.
    """
    kept = _Kept(known)
    with kept:
        run()
    return kept.total


def peak_saved_bytes(run: Callable[[], object], known: Iterable[Tensor] = ()) -> int:
    """Count the most bytes that autograd holds for backward at any one time; each storage once.

    What gradient checkpointing computes again is not seen; see ``peak_bytes``.

    Args:
        run: Does whole steps.
        known: Tensors whose storages are not counted, such as parameters and inputs.
    """
    kept = _Kept(known)
    with kept:
        run()
    return kept.most


def peak_bytes(run: Callable[[], object], known: Iterable[Tensor] = ()) -> int:
    """Count the most bytes of tensors that ``run`` makes and holds at any one time.

    Activations, gradients, temporaries; each storage once. What a kernel allocates and frees
    within one operator is not seen.

    Args:
        run: Computes anything, backward passes too.
        known: Tensors whose storages are not counted.
    """
    alive = _Alive(known)
    with alive:
        run()
    return alive.most


def _key(x: Tensor) -> int:
    return x.untyped_storage()._cdata  # an address, on the meta device and of fake tensors too


class _Kept:
    """Watches what autograd saves.

    Attributes:
        total: Bytes of all storages that were ever saved.
        now: Bytes of those that are held.
        most: The largest ``now``.
    """

    def __init__(self, known: Iterable[Tensor]) -> None:
        self._ignored = {_key(x) for x in known}
        self._held: dict[int, list[int]] = {}
        self.total = self.now = self.most = 0
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda kept: kept.x)

    def __enter__(self) -> None:
        self._hooks.__enter__()

    def __exit__(self, *error: object) -> None:
        self._hooks.__exit__(*error)

    def _pack(self, x: Tensor) -> _Saved:
        key = _key(x)
        saved = _Saved(x)
        if key in self._ignored:
            return saved
        count = self._held.setdefault(key, [0, x.untyped_storage().nbytes()])
        if not count[0]:
            self.now += count[1]
            self.total += count[1]
            self.most = max(self.most, self.now)
        count[0] += 1
        weakref.finalize(saved, self._release, key)
        return saved

    def _release(self, key: int) -> None:
        count = self._held[key]
        count[0] -= 1
        if not count[0]:
            self.now -= count[1]
            del self._held[key]


class _Saved:
    """Holds a saved tensor; the storage cannot go, nor its address be used again, before it."""

    def __init__(self, x: Tensor) -> None:
        self.x = x


class _Alive(TorchDispatchMode):
    """Watches the storages of all that operators give.

    Attributes:
        now: Bytes of those alive.
        most: The largest ``now``.
    """

    def __init__(self, known: Iterable[Tensor]) -> None:
        super().__init__()
        self._seen = {_key(x) for x in known}
        self.now = self.most = 0

    def __torch_dispatch__(
        self,
        function: Any,
        types: Any,
        arguments: tuple[Any, ...] = (),
        named: Mapping[str, Any] | None = None,
    ) -> Any:
        result = function(*arguments, **(named or {}))
        for x in tree_leaves(result):
            if isinstance(x, Tensor):
                self._count(x.untyped_storage())
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if size == 0 or key in self._seen:
            return
        self._seen.add(key)
        self.now += size
        self.most = max(self.most, self.now)
        weakref.finalize(storage, self._release, key, size)

    def _release(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self.now -= size


@contextlib.contextmanager
def buffers_kept(module: nn.Module) -> Iterator[None]:
    """Put a module's buffers back as they were before."""
    buffers = list(module.buffers())
    before = [buffer.clone() for buffer in buffers]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, old in zip(buffers, before, strict=True):
                buffer.copy_(old)
