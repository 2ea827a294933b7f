"""Does it fit, and what does it take: peers that learn together, under every engine."""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from common.costs import Activations, PeerCost, measure_transfer
from common.distributed import World
from common.engine import kept_peer
from common.options import OptionError, transfer_of
from common.peers import PeerGroup, RemotePeer

SAFETY = 0.15
"""Share of the memory that a plan leaves free: fragments that the allocator cannot use, workspaces
of kernels, and what the device's own libraries take."""

_UNITS = {"K": 2**10, "M": 2**20, "G": 2**30}


@dataclass(frozen=True)
class TeamCost:
    """What peers that learn together need.

    Attributes:
        peers: Each by itself, for batches of the same size.
        batch: Samples a process and step.
        inputs: Bytes of a batch.
        transfer: Bytes of the objective.
        accumulate: Batches an optimizer step; with several, gradients outlive a step.
        reduced: Gradients are averaged over processes, in buckets that are as large as they are.
        refused: Engines that the run would refuse, and why.
        skips: A step may be skipped, so two-pass holds all peers' gradients until that is known.
    """

    peers: Sequence[PeerCost]
    batch: int
    inputs: int
    transfer: Activations
    accumulate: int = 1
    reduced: bool = False
    refused: Mapping[str, str] = field(default_factory=dict)
    skips: bool = False


def team_of(
    options: argparse.Namespace,
    costs: Sequence[PeerCost],
    inputs: int,
    world: World,
    refused: Mapping[str, str] | None = None,
) -> TeamCost:
    """Join peers that were measured for the run's batches; measures the objective too.

    Args:
        options: The run's, with those of the transfer.
        costs: Of the peers, in their order.
        inputs: Bytes of a batch.
        world: Of this process.
        refused: Engines that the task refuses, and why.

    Raises:
        OptionError: Names that cannot be peers', only frozen peers, or an option of the transfer.
    """
    try:
        names = PeerGroup([RemotePeer(cost.name, cost.frozen) for cost in costs]).names
    except ValueError as error:
        raise OptionError(str(error)) from error
    transfer = transfer_of(options, names, [cost.name for cost in costs if cost.frozen])
    batch = options.batch_size
    return TeamCost(
        costs,
        batch,
        inputs,
        measure_transfer(transfer, costs, batch),
        options.grad_accum_steps,
        reduced=world.size > 1,
        refused=refused or {},
        skips=options.on_nonfinite == "skip",
    )


@dataclass(frozen=True)
class EngineCost:
    """What one process needs under an engine.

    Attributes:
        engine: One of ``common.engine.ENGINES``.
        processes: How many it needs at least.
        states: Bytes that stay: weights, optimizer, average of the peers that it holds.
        activations: The most bytes that autograd holds for backward at any one time.
        peak: The most bytes in all, without the safety share.
        seconds: Of a step, without data loading and optimizer; None: not timed.
    """

    engine: str
    processes: int
    states: int
    activations: int
    peak: int
    seconds: float | None

    def fits(self, memory: int) -> bool:
        """Whether it leaves the safety share of a memory free."""
        return self.peak <= usable(memory)


def usable(memory: int) -> int:
    """Return what a plan may use of a memory."""
    return int(memory * (1 - SAFETY))


def whole_memory(peak: int) -> int:
    """Return the smallest memory of which a plan may use so much."""
    return math.ceil(peak / (1 - SAFETY))


def engine_costs(team: TeamCost) -> dict[str, EngineCost]:
    """Work out what each engine needs.

    An upper bound by the order of things: while one peer's backward runs, its own peak counts;
    of peers before it the gradients are there, of those after it the activations. Averaged copies
    that teach forward one by one while these are held, and their outputs stay until the objective
    is made.

    Returns:
        By the engine's name, without those that the run would refuse.
    """
    found = [_joint(team)]
    if len(team.peers) > 1:
        found += [_two_pass(team), _peer_parallel(team)]
    return {cost.engine: cost for cost in found if cost.engine not in team.refused}


def _joint(team: TeamCost) -> EngineCost:
    peers = team.peers
    waiting = [_waiting(peer, team) for peer in peers]
    backward = max(
        _own(peer, team) + sum(waiting) - mine for peer, mine in zip(peers, waiting, strict=True)
    )
    taught = _copied_outputs(team)
    backward += team.transfer.peak + taught
    copying = sum(waiting) + taught + max(peer.copy for peer in peers)
    update = sum(peer.gradients for peer in peers) + max(peer.update for peer in peers)
    states = sum(peer.state for peer in peers)
    buckets = sum(_buckets(peer, team) for peer in peers)
    return EngineCost(
        "joint",
        1,
        states,
        sum(peer.step.saved for peer in peers) + team.transfer.saved,
        states + team.inputs + buckets + max(backward, copying, update),
        _sum([*(peer.train for peer in peers), *_copied_forwards(team)]),
    )


def _two_pass(team: TeamCost) -> EngineCost:
    peers = team.peers
    kept = kept_peer([0 if peer.frozen else peer.parameters for peer in peers])
    held = team.accumulate > 1 or team.skips
    persist = sum(peer.gradients for peer in peers) if held else 0
    copying = max(peer.copy for peer in peers)
    first = peers[kept].step.saved + _copied_outputs(team) + max(team.transfer.peak, copying)
    second = max(max(peer.step.peak, peer.gradients + peer.update) for peer in peers)
    states = sum(peer.state for peer in peers)
    buckets = sum(_buckets(peer, team) for peer in peers)
    outputs = 2 * sum(peer.output for peer in peers)  # and the gradients at them
    again = [p.forward for i, p in enumerate(peers) if i != kept and not p.frozen]
    return EngineCost(
        "two-pass",
        1,
        states,
        max(
            peers[kept].step.saved + team.transfer.saved,
            max(peer.step.saved for peer in peers),
        ),
        states + team.inputs + buckets + outputs + persist + max(first, second),
        _sum([*(peer.train for peer in peers), *again, *_copied_forwards(team)]),
    )


def _peer_parallel(team: TeamCost) -> EngineCost:
    peers = team.peers
    sent = 2 if any(peer.copy for peer in peers) else 1
    exchange = sent * len(peers) * max(peer.output for peer in peers)

    def alone(peer: PeerCost) -> int:
        backward = _own(peer, team) + exchange + team.transfer.peak
        copying = _waiting(peer, team) + peer.copy
        rest = peer.state + team.inputs + _buckets(peer, team)
        return rest + max(backward, copying, peer.gradients + peer.update)

    largest = max(peers, key=alone)
    steps = [_sum([peer.train, *([peer.forward] if peer.copy else [])]) for peer in peers]
    times = [seconds for seconds in steps if seconds is not None]
    return EngineCost(
        "peer-parallel",
        len(peers),
        largest.state,
        max(peer.step.saved for peer in peers) + team.transfer.saved,
        alone(largest),
        max(times) if len(times) == len(peers) else None,
    )


def _own(peer: PeerCost, team: TeamCost) -> int:
    """Bytes of a peer while its backward runs."""
    return peer.step.peak + (peer.gradients if team.accumulate > 1 else 0)


def _waiting(peer: PeerCost, team: TeamCost) -> int:
    """Bytes of a peer before its backward, or after it."""
    held = peer.step.saved + peer.output
    return held + peer.gradients if team.accumulate > 1 else max(held, peer.gradients)


def _copied_outputs(team: TeamCost) -> int:
    return sum(peer.output for peer in team.peers if peer.copy)


def _copied_forwards(team: TeamCost) -> list[float | None]:
    """Return the seconds of the copies' forwards; their peers' own last a little longer."""
    return [peer.forward for peer in team.peers if peer.copy]


def _buckets(peer: PeerCost, team: TeamCost) -> int:
    return peer.gradients if team.reduced else 0


def _sum(seconds: Sequence[float | None]) -> float | None:
    known = [x for x in seconds if x is not None]
    return sum(known) if len(known) == len(seconds) else None


def with_checkpointing(team: TeamCost) -> TeamCost:
    """Return a team whose peers checkpoint gradients where they offer it."""
    peers = [
        peer if peer.checkpointed is None else replace(peer, step=peer.checkpointed)
        for peer in team.peers
    ]
    return replace(team, peers=peers)


def with_batch(team: TeamCost, batch: int, accumulate: int) -> TeamCost:
    """Return a team that learns from smaller batches; what is proportional to them is scaled."""
    share = batch / team.batch

    def smaller(peer: PeerCost) -> PeerCost:
        return replace(
            peer,
            step=peer.step.scaled(share, peer.gradients),
            output=math.ceil(peer.output * share),
            copy=math.ceil(peer.copy * share),
            forward=None if peer.forward is None else peer.forward * share,
            train=None if peer.train is None else peer.train * share,
        )

    return replace(
        team,
        peers=[smaller(peer) for peer in team.peers],
        batch=batch,
        inputs=math.ceil(team.inputs * share),
        transfer=team.transfer.scaled(share),
        accumulate=accumulate,
    )


@dataclass(frozen=True)
class Flags:
    """How a task's command line says what a plan advises.

    Attributes:
        engine: With a place for its name.
        checkpointing: Of all peers; empty: not offered.
        batch: With places for the batch and the batches accumulated.
        launch: What starts several processes, with a place for how many.
        processes: By how many the batch of the command line is divided, each with all peers; of
            the engine peer-parallel, each takes as many as there are peers.
    """

    engine: str = "--engine {}"
    checkpointing: str = "--grad-checkpointing"
    batch: str = "-b {} --grad-accum-steps {}"
    launch: str = "torchrun --nproc-per-node={}"
    processes: int = 1


def advise(team: TeamCost, memory: int | None, flags: Flags) -> list[str]:
    """Say which engine to take on GPUs of a memory, and which flags to add.

    Args:
        team: Of the run.
        memory: Bytes of one GPU; None: not known.
        flags: Of the task.
    """
    costs = engine_costs(team)
    joint = costs["joint"]
    if memory is None:
        need = shown_bytes(math.ceil(joint.peak / (1 - SAFETY)))
        return [
            f"Give --gpu-mem SIZE (such as 24G) for a verdict; joint wants a GPU of {need} or more."
        ]
    room = f"{shown_bytes(usable(memory))} usable of {shown_bytes(memory)}"
    if joint.fits(memory):
        return [
            f"Take joint, the default: it needs {shown_bytes(joint.peak)} ({room}), and is the "
            "fastest on the same GPUs. Nothing to add."
        ]
    two_pass = costs.get("two-pass")
    if two_pass is not None and two_pass.fits(memory):
        return [
            f"Take two-pass: it needs {shown_bytes(two_pass.peak)} ({room}), where joint needs "
            f"{shown_bytes(joint.peak)}{_slower(joint, two_pass)}. Add: "
            f"{flags.engine.format('two-pass')}"
        ]
    needed = ", ".join(
        f"{cost.engine} needs {shown_bytes(cost.peak)}" for cost in (joint, two_pass) if cost
    )
    ways = [way for way in _ways_out(team, memory, flags) if way]
    ways = ways or [
        f"Nothing fits: weights and optimizers alone take {shown_bytes(joint.states)}; take fewer "
        "or smaller peers, an optimizer with less state, or a larger GPU."
    ]
    return [f"It does not fit: {needed} ({room}).", *ways]


def _slower(joint: EngineCost, other: EngineCost) -> str:
    if joint.seconds is None or other.seconds is None:
        return ""
    return f"; a step takes {other.seconds / joint.seconds:.2f} times as long"


def _ways_out(team: TeamCost, memory: int, flags: Flags) -> list[str]:
    """Try checkpointing, smaller batches and a process for each peer."""
    return [
        _by_checkpointing(team, memory, flags),
        _by_smaller_batches(team, memory, flags),
        _by_processes(team, memory, flags),
    ]


def _by_checkpointing(team: TeamCost, memory: int, flags: Flags) -> str:
    offering = [peer.name for peer in team.peers if peer.checkpointed is not None]
    if not (offering and flags.checkpointing):
        return ""
    for cost in list(engine_costs(with_checkpointing(team)).values())[:2]:
        if cost.fits(memory):
            given = f"{flags.engine.format(cost.engine)} {flags.checkpointing}"
            return (
                f"With gradient checkpointing of {', '.join(offering)}, {cost.engine} needs "
                f"{shown_bytes(cost.peak)} (about a third more time). Add: {given}"
            )
    return ""


def _by_smaller_batches(team: TeamCost, memory: int, flags: Flags) -> str:
    for parts in range(2, team.batch + 1):
        if team.batch % parts:
            continue  # the optimizer is to see the same number of samples
        batch, accumulate = team.batch // parts, team.accumulate * parts
        for cost in list(engine_costs(with_batch(team, batch, accumulate)).values())[:2]:
            if cost.fits(memory):
                given = flags.batch.format(batch * flags.processes, accumulate)
                return (
                    f"With batches of {batch}, {accumulate} an optimizer step, {cost.engine} needs "
                    f"{shown_bytes(cost.peak)}. Add: {flags.engine.format(cost.engine)} {given}"
                )
    return ""


def _by_processes(team: TeamCost, memory: int, flags: Flags) -> str:
    cost = engine_costs(team).get("peer-parallel")
    if cost is None or not cost.fits(memory):
        return ""
    processes = cost.processes * flags.processes
    return (
        f"On {processes} GPUs, peer-parallel needs {shown_bytes(cost.peak)} on each. Start with "
        f"{flags.launch.format(processes)} and add: {flags.engine.format(cost.engine)}"
    )


def peer_rows(team: TeamCost) -> list[dict[str, str]]:
    """Return the table of peers."""
    return [
        {
            "peer": peer.name + (" (frozen)" if peer.frozen else ""),
            "parameters": f"{peer.parameters / 1e6:.2f} M",
            "weights": shown_bytes(peer.weights),
            "gradients": shown_bytes(peer.gradients),
            "optimizer": shown_bytes(peer.optimizer),
            "EMA": shown_bytes(peer.average),
            "activations": shown_bytes(peer.step.saved),
            "own step": shown_bytes(peer.step.peak),
            "checkpointed": "-"
            if peer.checkpointed is None
            else shown_bytes(peer.checkpointed.peak),
            "forward": _shown_seconds(peer.forward),
            "and backward": _shown_seconds(peer.train),
        }
        for peer in team.peers
    ]


def engine_rows(team: TeamCost, memory: int | None) -> list[dict[str, str]]:
    """Return the table of the engines."""
    return [
        {
            "engine": cost.engine,
            "GPUs": f"{cost.processes}",
            "states": shown_bytes(cost.states),
            "activations": shown_bytes(cost.activations),
            "peak of a GPU": shown_bytes(cost.peak),
            "fits": "?" if memory is None else ("yes" if cost.fits(memory) else "no"),
            "step": _shown_seconds(cost.seconds),
            "samples/s": "-" if cost.seconds is None else f"{team.batch / cost.seconds:.3g}",
        }
        for cost in engine_costs(team).values()
    ]


def notes(team: TeamCost, device: torch.device, dtype: torch.dtype | None) -> list[str]:
    """Return what a reader of the tables must know."""
    told = [
        f"Of one process with batches of {team.batch}"
        + (f", {team.accumulate} an optimizer step" if team.accumulate > 1 else "")
        + f", {'full precision' if dtype is None else f'autocast to {dtype}'.replace('torch.', '')}"
        f", on {device.type}; G is 2^30 bytes. Activations: what autograd keeps for backward. Own "
        "step: with gradients and temporaries. Steps are without data loading and optimizer.",
        f"A plan leaves {SAFETY:.0%} of the memory free, for the allocator's fragments, kernels' "
        "workspaces and the device's libraries; fits means that the peak is below the rest.",
    ]
    scaled = {peer.name: peer.scaled_from for peer in team.peers if peer.scaled_from}
    if scaled:
        told.append(
            "Bytes of a real step on few samples, scaled to the batch, where the forward looks at "
            f"values: {_listed(scaled)}."
        )
    timed = {peer.name: peer.timed_on for peer in team.peers if peer.timed_on}
    if timed:
        told.append(
            "Seconds of few samples, scaled to the batch; of one step only where it takes long: "
            f"{_listed(timed)}."
        )
    if any(peer.copy for peer in team.peers):
        told.append("The forwards of the averaged copies that teach are counted too.")
    told += [f"{engine} is left out: {reason}." for engine, reason in team.refused.items()]
    if team.reduced:
        told.append("With several processes, the gradients' buckets are counted too.")
    if device.type == "cpu" and dtype is torch.float16:
        told.append("Steps were made in bfloat16, which takes as many bytes as float16.")
    if device.type == "cpu":
        told.append("Seconds are those of this CPU: they compare engines, and tell no GPU's time.")
    return told


def _listed(samples: dict[str, int]) -> str:
    return ", ".join(f"{name} ({count})" for name, count in samples.items())


def shown_bytes(count: int) -> str:
    """Return bytes in G or M."""
    return f"{count / 2**30:.2f} G" if count >= 2**30 else f"{count / 2**20:.1f} M"


def _shown_seconds(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    return f"{seconds:.0f} s" if seconds >= 10 else f"{1e3 * seconds:.0f} ms"


def read_size(text: str) -> int:
    """Read a size such as ``24G``, in powers of 1024.

    Raises:
        ArgumentTypeError: It is none.
    """
    number, unit = text[:-1], text[-1:].upper()
    wrong = argparse.ArgumentTypeError(f"{text!r} is no size; expected one such as 24G or 512M")
    if unit not in _UNITS:
        raise wrong
    try:
        size = float(number) * _UNITS[unit]
    except ValueError as error:
        raise wrong from error
    if not (size >= 1 and math.isfinite(size)):
        raise wrong
    return int(size)


def add_plan_options(parser: Any) -> None:
    """Add ``--plan`` and what belongs to it to a parser or a group of it."""
    parser.add_argument(
        "--plan",
        action="store_true",
        default=False,
        help="train nothing: tell the memory and time of every peer and engine, and which to take",
    )
    parser.add_argument(
        "--gpu-mem",
        type=read_size,
        metavar="SIZE",
        help="of one GPU, such as 24G, for --plan (default: of the GPU here, if any)",
    )


def memory_of(device: torch.device) -> int | None:
    """Return a GPU's memory; None for other devices."""
    if device.type != "cuda":
        return None
    return int(torch.cuda.get_device_properties(device).total_memory)
