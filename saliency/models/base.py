"""What the three models share: their view of a clip, the check of it, the last step, memory."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from saliency.clips import ClipView

Run = Callable[..., Tensor]


class ModelError(ValueError):
    """A model that is unknown, or weights that cannot be had; says the way out."""


class SaliencyModel(nn.Module):
    """A clip in, the saliency map of one of its frames out.

    A subclass has ``backbone`` and ``decoder``, gives its facts below and ``predict``. The names of
    its state dict are those of the published checkpoints.

    Attributes:
        name: What ``create_model`` knows it by.
        view: Which frames it was trained on, and how it wants them.
        multiple: Height and width must be multiples of it.
        grad_checkpointing: Whether backward computes activations again; see
            ``set_grad_checkpointing``.
    """

    name: ClassVar[str]
    view: ClassVar[ClipView]
    multiple: ClassVar[int]

    def __init__(self) -> None:
        super().__init__()
        self.grad_checkpointing = False

    def predict(self, x: Tensor, run: Run) -> Tensor:
        """Compute the map before its sigmoid.

        Args:
            x: A clip that has been checked [B, 3, T, H, W].
            run: ``run(stage, *inputs)`` calls a stage, within memory's limits.

        Returns:
            Logits [B, 1, 1, H, W].
        """
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        """Predict where people look.

        Args:
            x: Normalised RGB clips [B, 3, T, H, W], floating point.

        Returns:
            Maps [B, H, W] in [0, 1], float32 at least, also under autocast.

        Raises:
            ValueError: A clip of another kind, length or size than the model takes.
        """
        self._check(x)
        logits = self.predict(x, self._run)[:, 0, 0]
        # In bfloat16 a sigmoid near 1 has 1/256 as its finest step.
        return torch.sigmoid(logits.to(torch.promote_types(logits.dtype, torch.float32)))

    def set_grad_checkpointing(self, enabled: bool = True) -> None:
        """Trade time for memory: keep a stage's input alone and compute the rest again in backward.

        Outputs, gradients and the running statistics of batch norm are those without it: in the
        second computation batch norm updates nothing.
        """
        self.grad_checkpointing = enabled

    def _run(self, stage: Run, *inputs: Tensor) -> Tensor:
        if not (self.grad_checkpointing and torch.is_grad_enabled()):
            return stage(*inputs)
        if torch.compiler.is_compiling():  # updates statistics once by itself, takes no context
            return checkpoint(stage, *inputs, use_reentrant=False)
        return checkpoint(stage, *inputs, use_reentrant=False, context_fn=self._contexts)

    def _contexts(self) -> tuple[nullcontext[None], _FrozenStatistics]:
        return nullcontext(), _FrozenStatistics(self)

    def _check(self, x: Tensor) -> None:
        if x.ndim != 5 or x.shape[1] != 3:
            raise ValueError(
                f"{self.name}: input {list(x.shape)}, expected clips [B, 3, T, H, W]; a loader's "
                "[B, T, 3, H, W] needs x.transpose(1, 2)"
            )
        if not x.is_floating_point():
            raise ValueError(
                f"{self.name}: input of {x.dtype}, expected floats: RGB in [0, 1], then normalised "
                f"with mean {self.view.mean} and std {self.view.std}"
            )
        frames, height, width = x.shape[2:]
        if frames != self.view.frames:
            raise ValueError(
                f"{self.name}: clips of {frames} frames, but it takes {self.view.frames} alone"
            )
        if height < 1 or width < 1 or height % self.multiple or width % self.multiple:
            raise ValueError(
                f"{self.name}: frames of {height} x {width} pixels, but it takes heights and "
                f"widths that are multiples of {self.multiple}; published weights were trained at "
                f"{self.view.size[0]} x {self.view.size[1]}"
            )


class _FrozenStatistics:
    """While entered, running statistics of batch norm stay as they are; its output is the same.

    A class and not a generator: backward may enter it more than once (retain_graph).
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def __enter__(self) -> None:
        kinds = (nn.BatchNorm3d, nn.SyncBatchNorm)
        norms = [norm for norm in self.module.modules() if isinstance(norm, kinds)]
        self.kept = [(norm, norm.momentum, norm.num_batches_tracked) for norm in norms]
        # The statistics are still handed over: checkpoint wants to see the same tensors again.
        for norm in norms:
            norm.momentum, norm.num_batches_tracked = 0.0, None

    def __exit__(self, *error: object) -> None:
        for norm, momentum, count in self.kept:
            norm.momentum, norm.num_batches_tracked = momentum, count
