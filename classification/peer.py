"""A timm model as a peer."""

from __future__ import annotations

import argparse
import functools
import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from timm.layers import convert_sync_batchnorm
from timm.models import model_parameters
from timm.optim import create_optimizer_v2, optimizer_kwargs
from timm.scheduler import (
    PlateauLRScheduler,
    create_scheduler_v2,
    scheduler_kwargs,
)
from timm.scheduler.scheduler import Scheduler
from timm.utils import ModelEmaV3, dispatch_clip_grad
from torch import Tensor, nn

from classification.data import ToView, View, common_view, view_of
from classification.losses import SampleLoss, hard, sample_loss
from classification.models import ModelError, check_source, create_classifier, head_of
from classification.options import PeerSpec
from common.average import chosen_decay
from common.checkpoint import CheckpointError
from common.distributed import World
from common.options import OptionError
from common.peers import Peer, RemotePeer
from common.transfer import PeerOutput, confidence
from common.trials import compiled, to_layout

_logger = logging.getLogger(__name__)

SCHEDULES = "cosine tanh step constant multistep plateau poly wsd rsqrt none".split()


class ClassifierPeer(Peer):
    """Sees the common images in its own view and gives class scores.

    Args:
        name: Unique.
        module: Images [B, C, h, w] of its own view -> logits [B, classes].
        to_view: From the common view to its own.
        loss: Logits and target -> per-sample loss [B].
        score: ``loss`` or ``confidence``.
        **rest: See ``common.peers.Peer``.

    Attributes:
        temperature: What its logits are divided by for the score, a scalar on the device; None:
            they are compared as they are.
    """

    def __init__(
        self,
        name: str,
        module: nn.Module,
        to_view: Callable[[Tensor], Tensor],
        loss: SampleLoss,
        score: str = "loss",
        **rest: Any,
    ) -> None:
        super().__init__(name, module, **rest)
        self.to_view = to_view
        self.loss = loss
        self.score = score
        self.temperature: Tensor | None = None

    def forward(self, batch: tuple[Tensor, Tensor]) -> PeerOutput:
        """Run the model on a batch of the common view; loss and score in float32."""
        images, target = batch
        logits = self.model(self.to_view(images))
        return classify(logits, target, self.loss, self.score, self.temperature)


def classify(
    logits: Tensor,
    target: Tensor,
    loss: SampleLoss,
    score: str,
    temperature: Tensor | None = None,
) -> PeerOutput:
    """Turn logits and target into what the transfer needs.

    Args:
        logits: [B, C], any floating dtype.
        target: [B] int, or [B, C] float.
        loss: Per-sample loss [B].
        score: ``loss``: minus the per-sample loss; ``confidence``: the largest probability.
        temperature: What the logits are divided by for the score, and for nothing else.
    """
    with torch.autocast(logits.device.type, enabled=False):
        logits = logits.float()
        per_sample = loss(logits, target)
        detached = logits.detach()
        if temperature is not None:
            compared = detached / temperature
            judged = -loss(compared, target) if score == "loss" else confidence(compared)
        else:
            judged = -per_sample.detach() if score == "loss" else confidence(detached)
        return PeerOutput(
            task_loss=per_sample.mean(),
            score=judged,
            logits=logits,
            correct=detached.argmax(dim=1) == hard(target),
            target=target if target.dim() == 1 else None,
        )


def build_modules(
    specs: Sequence[PeerSpec], run: argparse.Namespace
) -> tuple[list[nn.Module], list[View]]:
    """Create every peer's model and resolve its view.

    Raises:
        ModelError, CheckpointError: As ``create_classifier``.
        OptionError: Class counts that differ (names both), or options that the model refuses.
    """
    modules = [_create(spec, run) for spec in specs]
    counts = {spec.name: module.num_classes for spec, module in zip(specs, modules, strict=True)}
    if len(set(counts.values())) > 1:
        told = ", ".join(f"{name}: {count}" for name, count in counts.items())
        raise OptionError(
            f"peers must tell the same classes, got {told}; give checkpoints of the same classes, "
            "or --num-classes for new heads"
        )
    views = [view_of(module, spec.options) for spec, module in zip(specs, modules, strict=True)]
    return modules, views


def check_sources(specs: Sequence[PeerSpec]) -> None:
    """Refuse peers whose model is not known or whose files are not there, without building one.

    Raises:
        OptionError: Names the peer.
    """
    for spec in specs:
        try:
            check_source(spec.model, spec.checkpoint, spec.takes_published_weights)
        except (ModelError, CheckpointError) as error:
            raise OptionError(f"peer {spec.name!r}: {error}") from error


def _create(spec: PeerSpec, run: argparse.Namespace) -> nn.Module:
    options = spec.options
    wanted = {
        "in_chans": image_channels(options),
        "img_size": image_size(options),
        "drop_rate": options.drop or None,
        "drop_path_rate": options.drop_path,
        "drop_block_rate": options.drop_block,
        "global_pool": options.gp,
        "bn_momentum": options.bn_momentum,
        "bn_eps": options.bn_eps,
    }
    if options.drop_connect is not None and options.drop_path is None:
        wanted["drop_path_rate"] = options.drop_connect
    try:
        module = create_classifier(
            spec.model,
            spec.checkpoint,
            pretrained=spec.takes_published_weights,
            num_classes=run.num_classes,
            trust_remote_code=options.trust_remote_code and spec.model.startswith("hf:"),
            **{key: value for key, value in wanted.items() if value is not None},
            **options.model_kwargs,
        )
    except TypeError as error:
        raise ModelError(f"peer {spec.name!r}: {spec.model} refuses an option: {error}") from error
    if options.grad_checkpointing:
        if not hasattr(module, "set_grad_checkpointing"):
            raise OptionError(f"peer {spec.name!r}: {spec.model} has no gradient checkpointing")
        module.set_grad_checkpointing(enable=True)
    _scale_head(module, options)
    return module


def image_channels(options: argparse.Namespace) -> int | None:
    """Return the channels asked for."""
    return options.in_chans or (options.input_size[0] if options.input_size else None)


def image_size(options: argparse.Namespace) -> int | tuple[int, int] | None:
    """Return the image size asked for: one number, or height and width where they differ."""
    if options.input_size:
        _, height, width = options.input_size
        return height if height == width else (height, width)
    return options.img_size


def _scale_head(module: nn.Module, options: argparse.Namespace) -> None:
    if options.head_init_scale is None and options.head_init_bias is None:
        return
    with torch.no_grad():
        for name, value in module.named_parameters():
            if not name.startswith(head_of(module)):
                continue
            if options.head_init_scale is not None:
                value.mul_(options.head_init_scale)
            if options.head_init_bias is not None and name.endswith("bias"):
                value.fill_(options.head_init_bias)


def build_peers(
    specs: Sequence[PeerSpec],
    modules: Sequence[nn.Module],
    views: Sequence[View],
    run: argparse.Namespace,
    world: World,
    updates_per_epoch: int,
    common: View | None = None,
) -> tuple[list[Peer], int]:
    """Give every model its optimizer, schedule, average and view; move it to the device.

    Of models that other processes hold, only the name is left.

    Args:
        specs: As asked for.
        modules: Of the peers.
        views: Of the peers.
        run: The run's options.
        world: Where this process stands.
        updates_per_epoch: Optimizer steps.
        common: How images come; None: as ``common_view`` chooses for these peers.

    Returns:
        The peers, and the number of epochs their schedules ask for (warm-up and cool-down
        included).
    """
    common, loss = common or common_view(views), sample_loss(run)
    peers: list[Peer] = []
    epochs = []
    for i, (spec, module, view) in enumerate(zip(specs, modules, views, strict=True)):
        if not world.holds(i):
            peers.append(RemotePeer(spec.name, spec.frozen))
            continue
        options = spec.options
        dtype = getattr(torch, options.model_dtype or "float32")
        module.to(device=world.device, dtype=dtype)
        to_layout(module, options.channels_last)
        if options.sync_bn and world.shards > 1:
            module = convert_sync_batchnorm(module)  # ``distribute`` tells it its processes
        rest: dict[str, Any] = {"frozen": spec.frozen}
        if not spec.frozen:
            optimizer = _optimizer(spec, module, run, world)
            schedule, wants = _schedule(spec, optimizer, run, updates_per_epoch)
            epochs.append(wants)
            rest |= {"optimizer": optimizer, "schedule": schedule, "clip": _clip(module, options)}
            if options.model_ema:
                rest["average"] = ModelEmaV3(
                    module,
                    decay=chosen_decay(
                        options.model_ema_decay,
                        options.model_ema_span,
                        wants * updates_per_epoch,
                    ),
                    use_warmup=options.model_ema_warmup,
                    device="cpu" if options.model_ema_force_cpu else None,
                )
        to_view = ToView(common, view, options.channels_last, dtype).to(world.device)
        peer = ClassifierPeer(spec.name, module, to_view, loss, run.score, **rest)
        if options.torchcompile:
            backend, mode = options.torchcompile, options.torchcompile_mode
            peer.model = compiled(spec.name, module, backend, mode)
        peer.distribute(world, broadcast_buffers=not run.no_ddp_bb)
        peers.append(peer)
    return peers, max(epochs, default=run.epochs)


def _optimizer(
    spec: PeerSpec, module: nn.Module, run: argparse.Namespace, world: World
) -> torch.optim.Optimizer:
    options = spec.options
    if options.lr is None:
        options.lr = scaled_lr(options, run.batch_size * world.shards * run.grad_accum_steps)
    kwargs = {**optimizer_kwargs(options), **options.opt_kwargs}
    try:
        optimizer = create_optimizer_v2(module, **kwargs)
        if "fused" in optimizer.defaults and not {"fused", "foreach"} & set(kwargs):
            optimizer = create_optimizer_v2(module, **kwargs, fused=True)
    except (ValueError, TypeError, AssertionError, IndexError) as error:
        raise OptionError(f"peer {spec.name!r}: optimizer {options.opt!r}: {error}") from error
    return optimizer


class PositionedSchedule:
    """A timm schedule that saves only what its position in the run does not tell.

    timm's schedules are functions of the epoch or the step, so a resumed run follows its own
    options, for instance more epochs. Only plateau remembers, and timm does not save all of that.

    Args:
        schedule: From ``timm.scheduler``.
    """

    def __init__(self, schedule: Scheduler) -> None:
        self.timm = schedule
        self.step = schedule.step
        self.step_update = schedule.step_update

    def state_dict(self) -> dict[str, Any]:
        """Return the memory of a plateau schedule; nothing for others."""
        if not isinstance(self.timm, PlateauLRScheduler):
            return {}
        return {"inner": self.timm.lr_scheduler.state_dict(), "restore_lr": self.timm.restore_lr}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up the memory of a plateau schedule."""
        if isinstance(self.timm, PlateauLRScheduler) and "inner" in state_dict:
            self.timm.lr_scheduler.load_state_dict(state_dict["inner"])
            self.timm.restore_lr = state_dict["restore_lr"]


def _schedule(
    spec: PeerSpec, optimizer: torch.optim.Optimizer, run: argparse.Namespace, updates: int
) -> tuple[PositionedSchedule | None, int]:
    options = {**scheduler_kwargs(spec.options), "num_epochs": run.epochs}
    try:
        schedule, epochs = create_scheduler_v2(optimizer, **options, updates_per_epoch=updates)
    except (ValueError, AssertionError) as error:
        raise OptionError(
            f"peer {spec.name!r}: schedule {spec.options.sched!r}: {error} Choose from "
            f"{', '.join(SCHEDULES)}"
        ) from error
    return None if schedule is None else PositionedSchedule(schedule), epochs


def scaled_lr(options: argparse.Namespace, global_batch: int) -> float:
    """Scale the base learning rate with the global batch, by timm's rule.

    Linear, or by the square root for adaptive optimizers, in units of ``lr_base_size``.
    """
    ratio = global_batch / options.lr_base_size
    adaptive = any(word in options.opt.lower() for word in ("ada", "lamb"))
    scale = options.lr_base_scale or ("sqrt" if adaptive else "linear")
    return options.lr_base * (ratio**0.5 if scale == "sqrt" else ratio)


def _clip(module: nn.Module, options: argparse.Namespace) -> Callable[[], object] | None:
    if options.clip_grad is None:
        return None
    parameters = list(model_parameters(module, exclude_head="agc" in options.clip_mode))
    return functools.partial(
        dispatch_clip_grad, parameters, value=options.clip_grad, mode=options.clip_mode
    )
