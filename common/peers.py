"""Peers: models that learn together, each with its own optimizer, schedule and average."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.nn.parallel import DistributedDataParallel

from common.checkpoint import CheckpointError, load_weights
from common.distributed import World, sum_over_ranks
from common.transfer import PeerOutput

_NAMED = 3  # parameters that an error lists


class UnreachedError(RuntimeError):
    """A model has parameters that its outputs do not depend on."""


class Schedule(Protocol):
    """A learning-rate schedule with timm's two hooks."""

    def step(self, epoch: int, metric: float | None = None) -> None:
        """Act on a finished epoch."""

    def step_update(self, num_updates: int, metric: float | None = None) -> None:
        """Act on a finished optimizer step."""

    def state_dict(self) -> dict[str, Any]:
        """Return what an exact resume needs."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up a saved state."""


class Average(Protocol):
    """An average of a model's weights over steps (EMA)."""

    module: nn.Module

    def update(self, model: nn.Module, step: int | None = None) -> None:
        """Move the average towards the model."""


class Peer(ABC):
    """One model of the group. A task says in ``forward`` how a batch becomes a ``PeerOutput``.

    Args:
        name: Unique in the group; used in files, metrics and errors.
        module: The plain model: what is saved and exported.
        frozen: It gives scores and logits, and learns nothing: no optimizer, evaluation mode.
        optimizer: Over the module's parameters; None only for a frozen peer.
        schedule: Of the learning rate.
        average: EMA of the weights; what is evaluated and exported where there is one.
        clip: Called with nothing before each optimizer step, on unscaled gradients.

    Attributes:
        model: What ``forward`` must call: the module, compiled or wrapped for data parallelism.

    Raises:
        ValueError: A peer that shall learn without an optimizer.
    """

    def __init__(
        self,
        name: str,
        module: nn.Module,
        *,
        frozen: bool = False,
        optimizer: torch.optim.Optimizer | None = None,
        schedule: Schedule | None = None,
        average: Average | None = None,
        clip: Callable[[], object] | None = None,
    ) -> None:
        if not frozen and optimizer is None:
            raise ValueError(f"peer {name!r} shall learn but has no optimizer")
        self.name = name
        self.module = module
        self.model: nn.Module = module
        self.frozen = frozen
        self.optimizer = None if frozen else optimizer
        self.schedule = None if frozen else schedule
        self.average = None if frozen else average
        self.clip = clip
        # empty for most; what an optimizer makes at once is needed to begin anew
        self._fresh = {} if optimizer is None else copy.deepcopy(optimizer.state_dict()["state"])
        self._unreached = False  # to be looked for in the first step
        if frozen:
            module.requires_grad_(False)

    @abstractmethod
    def forward(self, batch: Any) -> PeerOutput:
        """Run ``self.model`` on a batch; gradient reaches task_loss and logits."""

    @property
    def best_module(self) -> nn.Module:
        """What is evaluated and exported: the average where there is one, else the module."""
        return self.module if self.average is None else self.average.module

    @property
    def lr(self) -> float:
        """The largest learning rate among the optimizer's groups; 0 for a frozen peer."""
        if self.optimizer is None or self.frozen:
            return 0.0
        return max(float(group["lr"]) for group in self.optimizer.param_groups)

    def distribute(self, world: World, broadcast_buffers: bool = True) -> None:
        """Wrap the model for data parallelism among the processes that hold it.

        What of the model talks to other processes by itself (SyncBatchNorm) is told which: those of
        its ``process_group``.
        """
        for part in self.module.modules():
            if hasattr(part, "process_group"):
                part.process_group = world.replicas  # type: ignore[assignment]
        if world.shards == 1 or self.frozen:
            return
        ids = [world.device.index] if world.device.type == "cuda" else None
        # torch's default is to broadcast, and it deprecates the argument that says so
        rest: dict[str, Any] = {} if broadcast_buffers else {"broadcast_buffers": False}
        self.model = DistributedDataParallel(
            self.model, device_ids=ids, process_group=world.replicas, **rest
        )
        self._unreached = True

    def no_sync(self) -> AbstractContextManager[Any]:
        """Return a context in which gradients stay on this rank."""
        if isinstance(self.model, DistributedDataParallel):
            return self.model.no_sync()
        return nullcontext()

    def train(self) -> None:
        """Enter training mode; a frozen peer stays in evaluation mode."""
        self.model.train(not self.frozen)

    def update(self, scaler: GradScaler, step: int) -> None:
        """Unscale, clip, make one optimizer step, clear the gradients, move the average.

        Args:
            scaler: Shared by the group; the caller updates it once after all peers.
            step: Optimizer steps made so far.

        Raises:
            UnreachedError: In the first step of several processes, some parameters got no gradient.
        """
        if self.optimizer is None or self.frozen:
            return
        if self._unreached:
            self._check_reached()
            self._unreached = False
        if self.clip is not None:
            scaler.unscale_(self.optimizer)
            self.clip()
        scaler.step(self.optimizer)
        self.optimizer.zero_grad(set_to_none=True)
        if self.average is not None:
            self.average.update(self.module, step=step)

    def _check_reached(self) -> None:
        """Data parallelism waits for every gradient, and would not average them all."""
        parameters = self.module.named_parameters()
        idle = [name for name, p in parameters if p.requires_grad and p.grad is None]
        if idle:
            more = f" and {len(idle) - _NAMED} more" if len(idle) > _NAMED else ""
            raise UnreachedError(
                f"peer {self.name!r}: no gradient reaches {', '.join(idle[:_NAMED])}{more}, which "
                "several processes cannot do without; where the model is built, set their "
                "requires_grad to False, or train it in one process"
            )

    def snapshot(self) -> dict[str, Any]:
        """Return a copy of the weights, and of the average's, on the CPU."""
        return {
            "module": _copied(self.module),
            "average": None if self.average is None else _copied(self.average.module),
        }

    def go_back(self, snapshot: Mapping[str, Any]) -> None:
        """Take up the weights of a snapshot; the optimizer begins anew at the rate it has."""
        source = f"best weights of peer {self.name!r}"
        load_weights(self.module, snapshot["module"], source)
        if self.average is not None:
            weights = snapshot["average"] or snapshot["module"]
            load_weights(self.average.module, weights, source)
        if self.optimizer is not None:
            groups = self.optimizer.state_dict()["param_groups"]
            fresh = copy.deepcopy(self._fresh)
            self.optimizer.load_state_dict({"state": fresh, "param_groups": groups})

    def stop(self) -> None:
        """Freeze: what was evaluated, the average where there is one, only teaches from now on."""
        if self.average is not None:
            self.module.load_state_dict(self.average.module.state_dict())
            self.average = None
        if isinstance(self.model, DistributedDataParallel):
            self.model = self.model.module
        self.module.requires_grad_(False)
        self.frozen = True
        self.train()

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Forward on this rank by itself: nothing is exchanged with the others."""
        whole = self.model
        if isinstance(whole, DistributedDataParallel):
            self.model = whole.module
        try:
            yield
        finally:
            self.model = whole

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Forward with the averaged weights, as they are evaluated."""
        whole = self.model
        self.model = self.best_module
        try:
            yield
        finally:
            self.model = whole

    def own_buffers(self) -> dict[str, Tensor]:
        """Return the floating-point buffers, which differ between ranks: statistics of batch norm.

        Those of the average too; nothing in a single process.
        """
        if not isinstance(self.model, DistributedDataParallel):
            return {}
        return {name: buffer.cpu() for name, buffer in self._running_statistics().items()}

    def load_own_buffers(self, buffers: Mapping[str, Tensor]) -> None:
        """Take up this rank's own buffers."""
        for name, buffer in self._running_statistics().items():
            if name in buffers:
                buffer.copy_(buffers[name])

    def _running_statistics(self) -> dict[str, Tensor]:
        parts = {"module": self.module}
        if self.average is not None:
            parts["average"] = self.average.module
        return {
            f"{part}.{name}": buffer
            for part, module in parts.items()
            for name, buffer in module.named_buffers()
            if buffer.is_floating_point()
        }

    def state_dict(self) -> dict[str, Any]:
        """Return all an exact resume needs."""
        return {
            "module": self.module.state_dict(),
            "average": None if self.average is None else self.average.module.state_dict(),
            "kind": type(self.optimizer).__name__,
            "optimizer": None if self.optimizer is None else self.optimizer.state_dict(),
            "schedule": None if self.schedule is None else self.schedule.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any], optimizer: bool = True) -> None:
        """Take up a saved state.

        Args:
            state: From ``state_dict``.
            optimizer: False leaves optimizer and schedule as they are.

        Raises:
            CheckpointError: The state of another model or another optimizer.
        """
        source = f"run file, peer {self.name!r}"
        load_weights(self.module, state["module"], source)
        if self.average is not None:
            load_weights(self.average.module, state["average"] or state["module"], source)
        if not optimizer:
            return
        if self.optimizer is not None and state["optimizer"] is not None:
            self._load_optimizer(state, source)
        if self.schedule is not None and state["schedule"] is not None:
            self.schedule.load_state_dict(state["schedule"])

    def _load_optimizer(self, state: dict[str, Any], source: str) -> None:
        assert self.optimizer is not None
        own = type(self.optimizer).__name__
        advice = "give the run's own optimizer options, or leave its state out (--no-resume-opt)"
        kind = state.get("kind", own)
        if kind != own:
            raise CheckpointError(f"{source}: state of {kind}, not of {own}; {advice}")
        try:
            self.optimizer.load_state_dict(state["optimizer"])
        except ValueError as error:
            raise CheckpointError(f"{source}: {error}; {advice}") from error


def _copied(module: nn.Module) -> dict[str, Tensor]:
    return {name: x.detach().to("cpu", copy=True) for name, x in module.state_dict().items()}


class RemotePeer(Peer):
    """Stands in the group for a peer that another process holds; it has no weights here."""

    def __init__(self, name: str, frozen: bool = False) -> None:
        super().__init__(name, nn.Module(), frozen=True)
        self.frozen = frozen

    def forward(self, batch: Any) -> PeerOutput:
        """Refuse: its process does that."""
        raise RuntimeError(f"peer {self.name!r} is held by another process")


class PeerGroup(Sequence[Peer]):
    """The peers of one run, in order.

    Raises:
        ValueError: No peers, names that repeat or cannot be folder names, or only frozen peers.
    """

    def __init__(self, peers: Sequence[Peer]) -> None:
        check_names([peer.name for peer in peers])
        if all(peer.frozen for peer in peers):
            raise ValueError("every peer is frozen; nothing would be trained")
        self._peers = list(peers)

    def __getitem__(self, index: Any) -> Any:
        return self._peers[index]

    def __len__(self) -> int:
        return len(self._peers)

    def __iter__(self) -> Iterator[Peer]:
        return iter(self._peers)

    @property
    def names(self) -> list[str]:
        """The peers' names, in order."""
        return [peer.name for peer in self._peers]

    @property
    def here(self) -> list[Any]:
        """The peers that this process holds: all of them, but for the engine peer-parallel."""
        return [peer for peer in self._peers if not isinstance(peer, RemotePeer)]

    @property
    def frozen(self) -> list[str]:
        """Names of the peers that learn nothing."""
        return [peer.name for peer in self._peers if peer.frozen]


@torch.no_grad()
def share_statistics(peers: PeerGroup, world: World, average: bool = True) -> None:
    """Give all processes that hold a peer the same statistics of batch norm, its average's too.

    Args:
        peers: The group.
        world: Where this process stands.
        average: Take the mean over the processes; False: the first one's.
    """
    if world.shards == 1:
        return
    share = 1 / world.shards if average else float(world.leads)
    for peer in peers.here:
        learning = [] if peer.frozen else [peer.module]
        averaged = [] if peer.average is None else [peer.average.module]
        for module in learning + averaged:
            for name, buffer in module.named_buffers():
                if name.endswith(("running_mean", "running_var")):
                    mine = buffer.to(world.device) * share  # an average may be kept on the CPU
                    buffer.copy_(sum_over_ranks(mine, world.replicas))


RESERVED_NAMES = ("ensemble", "oracle", "mean", "transfer", "strongest", "weakest")


def check_names(names: Sequence[str]) -> None:
    """Refuse peer names that repeat, are reserved, or cannot be folder and metric names.

    Raises:
        ValueError: Names the value.
    """
    if not names:
        raise ValueError("no peers were given")
    for name in names:
        if not name or name != name.strip(". ") or any(sign in name for sign in "/\\:,="):
            raise ValueError(
                f"{name!r} cannot be a peer's name: it is used for folders and metrics"
            )
        if name in RESERVED_NAMES:
            raise ValueError(f"{name!r} cannot be a peer's name: it is the name of a metric")
        if list(names).count(name) > 1:
            raise ValueError(f"two peers are named {name!r}; give one of them another name")
