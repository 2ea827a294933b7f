"""A guard against a peer that gets worse than it was at the start."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common import distributed
from common.checkpoint import read_weights
from common.peers import Peer, PeerGroup
from common.transfer import KnowledgeTransfer

_logger = logging.getLogger(__name__)

POLICIES = ("off", "warn", "rollback")
FLIPS = "negative_flips"
"""Metric of a peer: percent of all samples that it got right at the start and gets wrong now."""
WARNED = "warned"
UNTAUGHT = "rolled back, taught no more"
STOPPED = "rolled back, frozen"


@dataclass(frozen=True)
class Bounds:
    """What a peer may lose before the guard acts.

    Attributes:
        policy: One of ``POLICIES``.
        drop: By how much the metric may be worse than at the start, in its own units, > 0.
        flips: Most negative flips, in percent of the samples; None: they are not looked at.
        patience: Evaluations in a row beyond a bound until the guard acts.

    Raises:
        ValueError: An attribute out of its range; the message names it.
    """

    policy: str = "off"
    drop: float = 1.0
    flips: float | None = None
    patience: int = 2

    def __post_init__(self) -> None:
        if self.policy not in POLICIES:
            raise ValueError(f"guard is {self.policy!r}; choose from {', '.join(POLICIES)}")
        if not self.drop > 0:
            raise ValueError(f"guard's metric drop is {self.drop}; expected more than 0")
        if self.flips is not None and not self.flips >= 0:
            raise ValueError(f"guard's bound on flips is {self.flips}; expected 0 or more")
        if self.patience < 1:
            raise ValueError(f"guard's patience is {self.patience}; expected 1 or more")


class Guard:
    """Warns of peers that got worse than at the start, or takes them back to their best.

    A peer is beyond its bounds where its metric is worse than at the start by more than
    ``bounds.drop``, is no number any more, or where it has more negative flips than
    ``bounds.flips``. After ``bounds.patience`` such evaluations in a row ``warn`` tells it, and
    ``rollback`` takes the peer back to its best evaluation so far. From then on nobody teaches it;
    it still teaches, and learns from its own task loss. Where that alone takes it beyond the bounds
    again, it goes back once more and learns nothing any more.

    The best weights (the average's too) are kept in host memory and in the run file, not read from
    the peer's best file: that has only what was evaluated, and may be of a later moment than the
    run file that a run goes on from. The optimizer's state is not kept, but begins anew: its
    moments point to where the peer got worse, and would make run files larger by half.

    Args:
        peers: The group.
        transfer: The objective, which is told whom nobody teaches.
        bounds: What a peer may lose.
        metric: Which metric of a peer is looked at.
        lower_is_better: Of the metric.
        unit: What evaluations are numbered by, ``epoch`` or ``iteration``.

    Attributes:
        events: What was told or done, in order: rows for the report and the run file.
    """

    def __init__(
        self,
        peers: PeerGroup,
        transfer: KnowledgeTransfer,
        bounds: Bounds,
        metric: str,
        lower_is_better: bool = False,
        unit: str = "epoch",
    ) -> None:
        self.peers = peers
        self.transfer = transfer
        self.bounds = bounds
        self.metric = metric
        self.lower_is_better = lower_is_better
        self.unit = unit
        self.events: list[dict[str, Any]] = []
        self._beyond = {peer.name: 0 for peer in peers}
        self._due: list[str] = []
        self._best: dict[str, Any] = {}

    def remember(self, names: Iterable[str]) -> None:
        """Keep the weights of peers whose last evaluation is their best."""
        if self.bounds.policy == "rollback":
            for peer in self.peers.here:
                if peer.name in names and not peer.frozen:
                    self._best[peer.name] = peer.snapshot()

    def look(
        self, at: int, metrics: Mapping[str, float], start: Mapping[str, float]
    ) -> dict[str, int]:
        """Compare an evaluation with the start's; those for whom it is enough become due.

        Args:
            at: Epoch or iteration of the evaluation.
            metrics: Of the evaluation; equal on all ranks.
            start: Of the first evaluation.

        Returns:
            ``PEER/beyond``: evaluations in a row beyond the bounds, where there are any.
        """
        self._due = []
        found = {}
        for peer in self.peers:
            if self.bounds.policy == "off" or peer.frozen:
                continue
            reason = self._reason(peer.name, metrics, start)
            self._beyond[peer.name] = self._beyond[peer.name] + 1 if reason else 0
            if reason:
                found[f"{peer.name}/beyond"] = self._beyond[peer.name]
                self._judge(peer.name, at, reason)
        return found

    def roll_back(self) -> list[str]:
        """Take the peers that are due back to their best, and end their lessons.

        Returns:
            Their names; the same on all ranks.
        """
        for name in self._due:
            peer = self._peer(name)
            if name in self._best:
                peer.go_back(self._best[name])
            self._beyond[name] = 0
            self._end_lessons(peer, self._last_event(name)["action"])
        due, self._due = self._due, []
        if due and all(peer.frozen for peer in self.peers) and distributed.is_first():
            _logger.warning("no peer learns any more: the rest of the run is left out")
        return due

    def kept(self, name: str) -> dict[str, Any]:
        """Return a peer's best weights, as its part of a run file."""
        return {"best": self._best[name]} if name in self._best else {}

    def state_dict(self) -> dict[str, Any]:
        """Return the counts and what was done; the weights are the peers' parts (``kept``)."""
        return {"beyond": dict(self._beyond), "events": [dict(event) for event in self.events]}

    def load_state_dict(
        self,
        state: Mapping[str, Any] | None,
        peers: Mapping[str, Mapping[str, Any]],
        files: Mapping[str, Path],
    ) -> None:
        """Take up a saved state, after the peers' own.

        Args:
            state: None: of a run without a guard.
            peers: The peers' parts of the run file.
            files: Each peer's best file, for a run whose guard kept nothing.
        """
        if state is not None:
            self._beyond.update(state["beyond"])
            self.events = [dict(event) for event in state["events"]]
        for event in self.events:
            self._end_lessons(self._peer(event["peer"]), event["action"])
        if self.bounds.policy != "rollback":
            return
        for peer in self.peers.here:
            if "best" in peers[peer.name]:
                self._best[peer.name] = peers[peer.name]["best"]
            elif peer.name in files and not peer.frozen:
                self._best[peer.name] = {"module": read_weights(files[peer.name]), "average": None}

    def _reason(
        self, name: str, metrics: Mapping[str, float], start: Mapping[str, float]
    ) -> dict[str, Any] | None:
        """Return which metric is beyond its bound; None: none is."""
        before, now = (float(row[f"{name}/{self.metric}"]) for row in (start, metrics))
        loss = now - before if self.lower_is_better else before - now
        if math.isfinite(before) and not loss <= self.bounds.drop:
            return {"metric": self.metric, "start": before, "now": now}
        flips = metrics.get(f"{name}/{FLIPS}")
        if self.bounds.flips is not None and flips is not None and flips > self.bounds.flips:
            return {"metric": FLIPS, "start": 0.0, "now": float(flips)}
        return None

    def _judge(self, name: str, at: int, reason: Mapping[str, Any]) -> None:
        count, patience = self._beyond[name], self.bounds.patience
        if count < patience:
            return
        action = WARNED
        if self.bounds.policy == "rollback":
            action = UNTAUGHT if self._is_taught(name) else STOPPED
            self._due.append(name)
        event = {"peer": name, self.unit: at, "action": action, **reason, "evaluations": count}
        if action == WARNED and count > patience and self._last_event(name):
            self._last_event(name).update(event)
        else:
            self.events.append(event)
        if distributed.is_first():  # all ranks find the same
            _logger.warning("%s %d: %s", self.unit, at, event_sentence(event))

    def _peer(self, name: str) -> Peer:
        return next(peer for peer in self.peers if peer.name == name)

    def _is_taught(self, name: str) -> bool:
        return self.peers.names.index(name) not in self.transfer.untaught

    def _last_event(self, name: str) -> dict[str, Any]:
        return next((e for e in reversed(self.events) if e["peer"] == name), {})

    def _end_lessons(self, peer: Peer, action: str) -> None:
        i = self.peers.names.index(peer.name)
        if action != WARNED and i not in self.transfer.untaught:
            self.transfer.untaught.append(i)
        if action == STOPPED and i not in self.transfer.frozen:
            self.transfer.frozen.append(i)
            self._best.pop(peer.name, None)
            peer.stop()


def event_sentence(event: Mapping[str, Any]) -> str:
    """Say what the guard saw and did, in words."""
    seen = (
        f"{event['peer']} got worse: {event['metric']} {event['start']:.3f} at the start, "
        f"{event['now']:.3f} now, beyond its bound in {event['evaluations']} evaluations in a row"
    )
    done = {
        WARNED: "a weaker transfer weight, a lower lr or --guard rollback may help",
        UNTAUGHT: "it goes back to its best weights, and nobody teaches it any more",
        STOPPED: "it goes back to its best weights, and learns nothing any more",
    }
    return f"{seen}; {done[event['action']]}"
