"""Steps whose device has no values: whatever would wait for one, or copy from the host, fails.

On the meta device tensors have shapes only. ``item``, ``bool``, ``nonzero``, masks as indices and
copies to the host fail there by themselves, as all of them wait for a GPU. ``no_sync`` adds what
the meta device lets pass: tensors made on the device from numbers of the host, and copies to the
device that are not ``non_blocking``. The host's own tensors (a step counter of an optimizer) may be
read.
"""

import sys
from contextlib import contextmanager, nullcontext
from unittest import mock

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from common.distributed import World

META = torch.device("meta")
_MAKERS = (torch.tensor, torch.as_tensor, torch.asarray, torch.Tensor.new_tensor)
_READS = ("aten::nonzero", "aten::masked_select", "aten::equal", "aten::_local_scalar_dense")


class HostSyncError(AssertionError):
    """A step waited for its device."""


def _refuse(told, hosts):
    """Raise, but where the code that waits is a host's that is known for it."""
    frame = sys._getframe(2)
    while any(f"/{place}" in frame.f_code.co_filename for place in ("torch/", "tests/syncs.py")):
        frame = frame.f_back
    if not any(f"/{host}/" in frame.f_code.co_filename for host in hosts):
        raise HostSyncError(f"{told}, in {frame.f_code.co_filename}:{frame.f_lineno}")


class _Makers(TorchFunctionMode):
    def __init__(self, hosts):
        super().__init__()
        self.hosts = hosts

    def __torch_function__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        if function not in _MAKERS:
            return made
        given = args[1] if function is torch.Tensor.new_tensor else args[0]
        if made.device == META and not _is_tensor(given):
            _refuse(f"{function.__name__} copies numbers of the host to the device", self.hosts)
        return made


class _Copies(TorchDispatchMode):
    def __init__(self, hosts):
        super().__init__()
        self.hosts = hosts

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        given = dict(kwargs or {})
        out = function(*args, **given)
        name, *_ = function.name().split(".")
        of_device = any(x.device == META for x in tree_leaves((args, given)) if _is_tensor(x))
        if name in _READS and of_device:
            _refuse(f"{name} reads a value of the device", self.hosts)
        if name == "aten::_to_copy" and out.device == META and args[0].device != META:
            self._check(given.get("non_blocking", False), args[0])
        if name == "aten::copy_" and args[0].device == META and args[1].device != META:
            self._check(len(args) > 2 and args[2], args[1])
        return out

    def _check(self, non_blocking, source):
        if not non_blocking:
            told = f"a copy of {list(source.shape)} to the device that is waited for"
            _refuse(told, self.hosts)


def _is_tensor(x):
    return isinstance(x, torch.Tensor)


def _autocast(kind, *args, **rest):
    """Of the meta device there is none; what is cast makes no difference to who waits."""
    return nullcontext() if kind == META.type else _real_autocast(kind, *args, **rest)


_real_autocast = torch.autocast


def no_autocast():
    """Return a context in which code that asks for the meta device's autocast runs."""
    return mock.patch.object(torch, "autocast", _autocast)


@contextmanager
def no_sync(hosts=()):
    """Return a context in which nothing may wait for the meta device.

    Args:
        hosts: Packages that are known to copy to it, and may.
    """
    with _Makers(hosts), _Copies(hosts), no_autocast():
        yield


def meta_world():
    """Return the place of a single process whose device has no values."""
    return World(0, 1, 0, META)
