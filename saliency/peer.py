"""A video saliency model as a peer."""

from __future__ import annotations

import argparse
import copy
import functools
import importlib
import logging
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.average import WeightAverage, chosen_decay
from common.checkpoint import CheckpointError, load_weights, read_weights, require_file
from common.distributed import World
from common.options import OptionError
from common.peers import Peer, RemotePeer
from common.seeding import generators_kept
from common.transfer import PeerOutput, confidence
from common.trials import compiled, to_layout
from saliency.clips import ClipView
from saliency.data import ClipBatch
from saliency.losses import saliency_loss
from saliency.models import MODELS, ModelError, check_name, create_model
from saliency.models.weights import KINETICS
from saliency.options import LOSS_TERMS, PeerSpec, view_of

_logger = logging.getLogger("train")

# What code of a user's own may raise; a TypeError of its options too
_USERS_FAULTS = (
    ArithmeticError, AssertionError, AttributeError, LookupError, OSError, RuntimeError, TypeError,
    ValueError,
)  # fmt: skip
SampleLoss = Callable[[Tensor, Tensor, Tensor | None], Tensor]


class SaliencyPeer(Peer):
    """Sees its own clip of every sample, and tells where people look.

    Args:
        name: Unique.
        module: Clips [B, 3, T, h, w] -> maps [B, h, w], not negative.
        view: Of its clips.
        loss: Prediction, ground truth [B, H, W], fixations or None -> per-sample loss [B].
        score: ``loss`` or ``confidence``.
        channels_last: Memory layout of its clips.
        **rest: See ``common.peers.Peer``.
    """

    def __init__(
        self,
        name: str,
        module: nn.Module,
        view: ClipView,
        loss: SampleLoss,
        score: str = "loss",
        channels_last: bool = False,
        **rest: Any,
    ) -> None:
        super().__init__(name, module, **rest)
        self.view = view
        self.loss = loss
        self.score = score
        self.format = torch.channels_last_3d if channels_last else torch.contiguous_format

    def forward(self, batch: ClipBatch) -> PeerOutput:
        """Run the model on its clips of a batch; loss, score and logits in float32.

        The map is brought to the ground truth's size first, which is common to all peers. Its
        logits are its logarithm, one "class" a pixel: their softmax is the map over its sum.
        """
        clips = batch.clips(self.view).contiguous(memory_format=self.format)
        maps = check_output(self.model(clips), len(batch), self.name)
        with torch.autocast(maps.device.type, enabled=False):
            maps = to_size(maps, batch.maps.shape[-2:])
            per_sample = self.loss(maps, batch.maps, batch.fixations)
            logits = log_map(maps).flatten(1)
            score = -per_sample.detach() if self.score == "loss" else confidence(logits)
            return PeerOutput(task_loss=per_sample.mean(), score=score, logits=logits)


def log_map(maps: Tensor) -> Tensor:
    """Return the logarithm of maps; where a map is zero, that of the smallest normal number.

    Gradient reaches the map where it is larger.
    """
    return maps.clamp(min=torch.finfo(maps.dtype).tiny).log()


def to_size(maps: Tensor, size: Sequence[int]) -> Tensor:
    """Resize maps [B, h, w] to [B, H, W] in float32 or wider, bilinear, corners not aligned."""
    maps = maps.to(torch.promote_types(maps.dtype, torch.float32))
    if maps.shape[-2:] == tuple(size):
        return maps
    return F.interpolate(maps[:, None], size=tuple(size), mode="bilinear")[:, 0]


def check_output(maps: Tensor, batch: int, who: str) -> Tensor:
    """Refuse what is no batch of maps.

    Raises:
        ModelError: Names the model and the shapes.
    """
    if not isinstance(maps, Tensor) or maps.dim() != 3 or len(maps) != batch:
        found = list(maps.shape) if isinstance(maps, Tensor) else type(maps).__name__
        raise ModelError(
            f"{who}: its model gave {found}; expected one map a clip, "
            f"[{batch}, height, width], not negative"
        )
    return maps


def build_modules(specs: Sequence[PeerSpec]) -> tuple[list[nn.Module], list[ClipView]]:
    """Create every peer's model with its weights, and resolve its view.

    Raises:
        ModelError: An unknown model, options that it refuses, or a view that it cannot take.
        CheckpointError: A file that is missing, broken, unsafe or of another model.
        OptionError: A view out of its range.
    """
    modules, views = [], []
    for spec in specs:
        module = _create(spec)
        view = view_of(module.view, spec.options)
        check = check_users_own if ":" in spec.model else check_view
        check(module, view, spec.name)
        modules.append(module)
        views.append(view)
    return modules, views


def check_sources(specs: Sequence[PeerSpec]) -> None:
    """Refuse peers whose model is not known or whose files are not there, without building one.

    Raises:
        OptionError: Names the peer.
    """
    for spec in specs:
        try:
            _refuse_file(spec.model)
            if ":" in spec.model:
                _function_of(spec.model)
            else:
                check_name(spec.model)
            for file in (spec.checkpoint, spec.options.backbone):
                if file is not None and file != KINETICS:
                    require_file(file)
        except (ModelError, CheckpointError) as error:
            raise OptionError(f"peer {spec.name!r}: {error}") from error


def _refuse_file(model: str) -> None:
    if model.endswith((".pth", ".pt", ".safetensors")):
        raise ModelError(
            f"{model} is a file; give it to its model: --peer MODEL,checkpoint={model} with one of "
            f"{', '.join(MODELS)}"
        )


def _create(spec: PeerSpec) -> Any:
    options = spec.options
    where = f"peer {spec.name!r}"
    try:
        _refuse_file(spec.model)
        if ":" not in spec.model:
            module: Any = create_model(
                spec.model, spec.checkpoint, backbone=options.backbone, **options.kwargs
            )
        else:
            module = _users_own(spec)
    except TypeError as error:
        raise ModelError(f"{where}: {spec.model} refuses an option: {error}") from error
    except ModelError as error:
        raise ModelError(f"{where}: {error}") from error
    if getattr(options, "grad_checkpointing", False):
        if not hasattr(module, "set_grad_checkpointing"):
            raise OptionError(f"{where}: {spec.model} has no gradient checkpointing")
        module.set_grad_checkpointing(True)
    return module


def _function_of(model: str) -> Callable[..., Any]:
    """Import the user's own function that MODULE:FUNCTION names."""
    place, _, name = model.partition(":")
    try:
        return getattr(importlib.import_module(place), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ModelError(
            f"{model}: cannot be imported ({error}); expected MODULE:FUNCTION of a Python "
            f"module that is installed or on PYTHONPATH, or one of {', '.join(MODELS)}"
        ) from error


def _users_own(spec: PeerSpec) -> nn.Module:
    """Build a model by the user's own function."""
    function = _function_of(spec.model)
    if spec.options.backbone:
        raise ModelError(f"{spec.model}: takes no backbone=; hand it over as kwargs.NAME=VALUE")
    try:
        module = function(**spec.options.kwargs)
    except _USERS_FAULTS as error:
        raise ModelError(f"{spec.model}: fails: {type(error).__name__}: {error}") from error
    if not isinstance(module, nn.Module) or not isinstance(getattr(module, "view", None), ClipView):
        raise ModelError(
            f"{spec.model}: gave {type(module).__name__} without a ClipView as its `view`; "
            "expected a torch module with one"
        )
    if spec.checkpoint is not None:
        load_weights(module, read_weights(spec.checkpoint), spec.checkpoint)
    return module


def check_view(module: nn.Module, view: ClipView, who: str) -> None:
    """Try a view on one of our models, on the meta device: nothing is computed.

    Raises:
        ModelError: The model does not take such clips.
    """
    clip = torch.empty(2, 3, view.frames, *view.size, device="meta")
    try:
        with torch.no_grad():
            maps = copy.deepcopy(module).eval().to("meta")(clip)
    except (ValueError, RuntimeError) as error:
        raise ModelError(f"peer {who!r}: does not take {view}: {error}") from error
    check_output(maps, 2, who)


def check_users_own(module: nn.Module, view: ClipView, who: str) -> None:
    """Try a view on a model of the user's own, on one clip of noise.

    Raises:
        ModelError: The model fails, or gives no maps, or negative ones.
    """
    clip = torch.randn(1, 3, view.frames, *view.size, generator=torch.Generator().manual_seed(0))
    was = module.training
    module.eval()
    try:
        with torch.no_grad(), generators_kept():
            maps = module(clip)
    except _USERS_FAULTS as error:
        raise ModelError(
            f"peer {who!r}: fails on {view}: {type(error).__name__}: {error}"
        ) from error
    finally:
        module.train(was)
    check_output(maps, 1, who)
    if not bool((maps >= 0).all()):
        raise ModelError(
            f"peer {who!r}: its model gave maps from {float(maps.min()):.3g} to "
            f"{float(maps.max()):.3g} for noise; expected none below 0 (end it in a sigmoid)"
        )


def sample_loss(options: argparse.Namespace) -> SampleLoss:
    """Return the loss whose terms the options weigh."""
    weights = {term: getattr(options, term) for term in LOSS_TERMS}
    return functools.partial(saliency_loss, **weights)


def build_peers(
    specs: Sequence[PeerSpec],
    modules: Sequence[nn.Module],
    views: Sequence[ClipView],
    run: argparse.Namespace,
    world: World,
    updates: int,
) -> list[Peer]:
    """Give every model its optimizer, schedule and average; move it to the device.

    Of models that other processes hold, only the name is left.

    Args:
        specs: As asked for.
        modules: Of the peers.
        views: Of the peers.
        run: The run's options.
        world: Where this process stands.
        updates: Optimizer steps of the whole run, for the schedule.
    """
    peers: list[Peer] = []
    for i, (spec, module, view) in enumerate(zip(specs, modules, views, strict=True)):
        if not world.holds(i):
            peers.append(RemotePeer(spec.name, spec.frozen))
            continue
        options = spec.options
        module.to(world.device)
        to_layout(module, options.channels_last)
        if run.sync_bn and world.shards > 1:
            module = nn.SyncBatchNorm.convert_sync_batchnorm(module)  # ``distribute``: with whom
        rest: dict[str, Any] = {"frozen": spec.frozen}
        if not spec.frozen:
            optimizer = _optimizer(spec, module)
            rest |= {
                "optimizer": optimizer,
                "schedule": _schedule(optimizer, run, updates),
                "clip": _clip(module, options),
                "average": _average(spec, module, updates),
            }
        rest["channels_last"] = options.channels_last
        peer = SaliencyPeer(spec.name, module, view, sample_loss(run), run.score, **rest)
        if options.compile:
            peer.model = compiled(spec.name, module, options.compile)
        peer.distribute(world)
        peers.append(peer)
    return peers


def _optimizer(spec: PeerSpec, module: nn.Module) -> torch.optim.Optimizer:
    options = spec.options
    kinds: dict[str, Callable[..., torch.optim.Optimizer]] = {
        "adam": torch.optim.Adam,
        "adamw": torch.optim.AdamW,
        "sgd": functools.partial(torch.optim.SGD, momentum=0.9),
    }
    learning = [parameter for parameter in module.parameters() if parameter.requires_grad]
    return kinds[options.opt](
        learning, lr=options.lr, weight_decay=options.weight_decay, fused=True
    )


class StepSchedule:
    """A learning rate that is a function of the optimizer steps made; nothing else is remembered.

    Args:
        optimizer: Its groups' ``lr`` at the start is the full rate.
        shape: Steps made -> share of the full rate.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, shape: Callable[[int], float]) -> None:
        self.optimizer = optimizer
        self.shape = shape
        self.full = [group["lr"] for group in optimizer.param_groups]
        self.step_update(0)

    def step(self, epoch: int, metric: float | None = None) -> None:
        """Epochs change nothing."""

    def step_update(self, num_updates: int, metric: float | None = None) -> None:
        """Set the rate for the next optimizer step."""
        for group, full in zip(self.optimizer.param_groups, self.full, strict=True):
            group["lr"] = full * self.shape(num_updates)

    def state_dict(self) -> dict[str, Any]:
        """Return nothing: the position tells all."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up nothing."""


def _schedule(
    optimizer: torch.optim.Optimizer, run: argparse.Namespace, updates: int
) -> StepSchedule | None:
    if run.sched == "none" and not run.warmup_steps:
        return None
    warmup = run.warmup_steps

    def shape(done: int) -> float:
        if done < warmup:
            return (done + 1) / (warmup + 1)
        if run.sched == "none":
            return 1.0
        return 0.5 + 0.5 * math.cos(math.pi * (done - warmup) / max(updates - warmup, 1))

    return StepSchedule(optimizer, shape)


def _clip(module: nn.Module, options: argparse.Namespace) -> Callable[[], object] | None:
    if options.clip_grad is None:
        return None
    return functools.partial(nn.utils.clip_grad_norm_, list(module.parameters()), options.clip_grad)


def _average(spec: PeerSpec, module: nn.Module, updates: int) -> WeightAverage | None:
    options = spec.options
    if not options.model_ema:
        return None
    decay = chosen_decay(options.model_ema_decay, options.model_ema_span, updates)
    try:
        return WeightAverage(module, decay)
    except ValueError as error:
        raise OptionError(f"peer {spec.name!r}: --model-ema-decay: {error}") from error


def warn_of_random_weights(specs: Sequence[PeerSpec]) -> None:
    """Tell which peers have no weights given."""
    for spec in specs:
        if spec.checkpoint is None and not spec.options.backbone and ":" not in spec.model:
            _logger.warning(
                "%s has random weights: give checkpoint=FILE, or backbone=kinetics", spec.name
            )


def describe(spec: PeerSpec, module: nn.Module, view: ClipView) -> dict[str, str]:
    """Return a row of the table of peers."""
    options = spec.options
    weights = spec.checkpoint or (options.backbone and f"backbone {options.backbone}") or "random"
    return {
        "peer": spec.name + (" (frozen)" if spec.frozen else ""),
        "model": spec.model,
        "parameters": f"{sum(p.numel() for p in module.parameters()) / 1e6:.2f} M",
        "weights": weights,
        "optimizer": "-" if spec.frozen else options.opt,
        "lr": "-" if spec.frozen else f"{options.lr:g}",
        "clip": str(view),
    }
