"""Which way of running a peer is faster: tried before training, kept for the run."""

from __future__ import annotations

import argparse
import functools
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import nn

from common import distributed
from common.distributed import World
from common.options import OptionError, amp_dtype
from common.peers import Peer
from common.probe import time_in_turns

_logger = logging.getLogger(__name__)

AUTO = "auto"
BACKEND = "inductor"
MARGIN = 0.03
"""By what share of the time a choice must be faster to be taken."""

Trial = tuple[Peer, Any]
"""A peer of a model's copy, and a batch of noise, on the device."""

_FORMATS = {4: torch.channels_last, 5: torch.channels_last_3d}


class Spec(Protocol):
    """A peer as asked for on a command line."""

    @property
    def name(self) -> str:
        """Unique."""

    @property
    def options(self) -> argparse.Namespace:
        """The peer's own: ``auto_layout``, ``channels_last``, and how it is compiled."""


def choose_ways(
    specs: Sequence[Spec],
    build: Callable[[int, bool], Trial],
    run: argparse.Namespace,
    world: World,
    kept: Mapping[str, Any],
    compile_key: str,
    mode_key: str = "",
) -> None:
    """Settle layout and compilation of the peers that leave them to us; all ranks must call it.

    Args:
        specs: Of the peers; their options are changed.
        build: Given a peer's number and whether in channels_last, what to time.
        run: The run's options; ``layouts`` and ``compiled`` become what was chosen, by name.
        world: Where this process stands.
        kept: The options of a resumed run, where what was chosen before is found.
        compile_key: The option that names the compiler.
        mode_key: The option that names its mode.
    """
    dtype = amp_dtype(run)
    asking = {i: spec.name for i, spec in enumerate(specs) if spec.options.auto_layout}
    run.layouts = choose_layouts(asking, build, world, dtype, kept.get("layouts"))
    for i, name in asking.items():
        specs[i].options.channels_last = run.layouts[name]
    asking = {
        i: spec.name for i, spec in enumerate(specs) if getattr(spec.options, compile_key) == AUTO
    }
    run.compiled = choose_compilation(
        asking,
        lambda i: build(i, specs[i].options.channels_last),
        world,
        dtype,
        kept.get("compiled"),
        lambda i: getattr(specs[i].options, mode_key, None),
    )
    for i, name in asking.items():
        setattr(specs[i].options, compile_key, BACKEND if run.compiled[name] else None)


def choose_layouts(
    asking: Mapping[int, str],
    build: Callable[[int, bool], Trial],
    world: World,
    dtype: torch.dtype | None = None,
    chosen: Mapping[str, bool] | None = None,
) -> dict[str, bool]:
    """Return by name which peers are to be in channels_last; all ranks must call it.

    Forward and backward are timed on copies and on noise, so models and generators stay as they
    are. The first process that holds a peer decides for all.

    Args:
        asking: Names of the peers that ask for the faster layout, by their numbers.
        build: Given a number and whether in channels_last, what to time.
        world: Where this process stands.
        dtype: What forwards are autocast to.
        chosen: What a resumed run had chosen; such peers are not tried again.
    """

    def faster(i: int) -> tuple[bool, str]:
        seconds = time_layouts(functools.partial(build, i), world.device, dtype, world)
        return _is_faster(asking[i], seconds)

    return _decided(asking, faster, world, chosen)


def choose_compilation(
    asking: Mapping[int, str],
    build: Callable[[int], Trial],
    world: World,
    dtype: torch.dtype | None = None,
    chosen: Mapping[str, bool] | None = None,
    mode_of: Callable[[int], str | None] = lambda i: None,
) -> dict[str, bool]:
    """Return by name which peers are to be compiled; all ranks must call it.

    As ``choose_layouts``, after one step that compiles. Where the compiler fails, that is told, and
    the peer stays as it is.

    Args:
        asking, world, dtype, chosen: See ``choose_layouts``.
        build: Given a number, what to time.
        mode_of: Of the compiler, for each number.
    """

    def faster(i: int) -> tuple[bool, str]:
        once = functools.partial(build, i)
        try:
            seconds = time_compiled(once, world.device, dtype, mode_of(i))
        except RuntimeError as error:  # none installed, or a model that it cannot take
            reason = str(error).strip().splitlines()[0]
            _logger.warning("%s: not compiled, the compiler fails here: %s", asking[i], reason)
            return False, ""
        return _is_faster(asking[i], seconds)

    return _decided(asking, faster, world, chosen)


def time_layouts(
    build: Callable[[bool], Trial],
    device: torch.device,
    dtype: torch.dtype | None = None,
    world: World | None = None,
    repeats: int = 5,
) -> dict[str, float]:
    """Return the median seconds of a forward and backward in both layouts, in turns.

    Where several processes hold the peer, all must call it, and all take as many turns.
    """

    def agreed(more: bool) -> bool:
        return more if world is None else all(distributed.gather_objects(more, world.replicas))

    trials = {"contiguous": build(False), "channels_last": build(True)}
    return time_in_turns(trials, device, dtype, repeats=repeats, agreed=agreed)


def time_compiled(
    build: Callable[[], Trial],
    device: torch.device,
    dtype: torch.dtype | None = None,
    mode: str | None = None,
    repeats: int = 5,
) -> dict[str, float]:
    """Return the median seconds of a forward and backward, eager and compiled, in turns.

    Raises:
        RuntimeError: The compiler fails.
    """
    trials = {"eager": build(), "compiled": build()}
    peer = trials["compiled"][0]
    peer.model = torch.compile(peer.module, backend=BACKEND, mode=mode)  # type: ignore[assignment]
    return time_in_turns(trials, device, dtype, repeats=repeats)


def to_layout(module: nn.Module, channels_last: bool) -> None:
    """Lay the weights of 2D and 3D convolutions out so that channels are next to each other.

    Args:
        module: Changed in place; parameters stay the same objects.
        channels_last: False: leave it as it is.
    """
    if not channels_last:
        return
    for x in (*module.parameters(), *module.buffers()):
        if x.dim() in _FORMATS:
            x.data = x.data.contiguous(memory_format=_FORMATS[x.dim()])


def compiled(name: str, module: nn.Module, backend: str, mode: str | None = None) -> nn.Module:
    """Return a peer's module, compiled.

    Raises:
        OptionError: No such backend, or mode of it; names the peer.
    """
    try:
        return torch.compile(module, backend=backend, mode=mode)  # type: ignore[return-value]
    except RuntimeError as error:
        way = backend if mode is None else f"{backend}, mode {mode}"
        raise OptionError(f"peer {name!r}: compile={way}: {str(error).splitlines()[0]}") from error


def with_layout_asked(entry: Mapping[str, Any]) -> dict[str, Any]:
    """Turn ``channels_last=auto`` of a peer's options into the option that asks for a trial."""
    if entry.get("channels_last") != AUTO:
        return dict(entry)
    return {**entry, "channels_last": False, "auto_layout": True}


def _decided(
    asking: Mapping[int, str],
    faster: Callable[[int], tuple[bool, str]],
    world: World,
    chosen: Mapping[str, bool] | None,
) -> dict[str, bool]:
    known = dict(chosen or {})
    mine = {name: faster(i) for i, name in asking.items() if name not in known and world.holds(i)}
    told: dict[str, str] = {}
    for found in reversed(distributed.gather_objects(mine)):
        known |= {name: taken for name, (taken, _) in found.items()}
        told |= {name: why for name, (_, why) in found.items()}
    if distributed.is_first():  # of peers that others hold, too
        for why in filter(None, told.values()):
            _logger.info("%s", why)
    return {name: known[name] for name in asking.values()}


def _is_faster(who: str, seconds: Mapping[str, float]) -> tuple[bool, str]:
    """Whether the second of two ways is faster by the margin, and both in words."""
    (usual, before), (other, now) = seconds.items()
    faster = now < (1 - MARGIN) * before
    return faster, (
        f"{who}: forward and backward {1e3 * before:.1f} ms {usual}, {1e3 * now:.1f} ms {other}: "
        f"{other if faster else usual} is taken"
    )
