"""The transfer as a timm training task, for somebody's own timm loop."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from timm.data import resolve_model_data_config
from timm.task import TrainingTask
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from classification.data import ToView, View
from classification.peer import classify
from common.options import OptionError
from common.peers import check_names
from common.transfer import KnowledgeTransfer


class PeerEnsemble(nn.Module):
    """N classifiers on the same images, as one module.

    In training it returns every peer's logits, a list of N [B, C]; in evaluation the ensemble's
    log-probabilities [B, C], so that it can stand where a classifier stands. A frozen peer stays in
    evaluation mode and gets no gradient.

    Args:
        peers: Models by name.
        to_view: From the images given to each peer's own; none: the same images for all.
        frozen: Names of the peers that learn nothing.
    """

    def __init__(
        self,
        peers: Mapping[str, nn.Module],
        to_view: Mapping[str, nn.Module] | None = None,
        frozen: Sequence[str] = (),
    ) -> None:
        super().__init__()
        for name in peers:
            if "." in name or hasattr(nn.ModuleDict, name):
                raise ValueError(
                    f"peer {name!r}: torch takes no such name for a module; give it another"
                )
        self.peers = nn.ModuleDict(peers)
        self.to_view = nn.ModuleDict(to_view or {})
        self.frozen = list(frozen)
        for name in self.frozen:
            self.peers[name].requires_grad_(False)

    def train(self, mode: bool = True) -> PeerEnsemble:
        """Set the mode; frozen peers stay in evaluation mode."""
        super().train(mode)
        for name in self.frozen:
            self.peers[name].eval()
        return self

    def forward(self, images: Tensor) -> list[Tensor] | Tensor:
        """Return a list of N [B, C] in training, [B, C] in evaluation."""
        logits = []
        for name, peer in self.peers.items():
            view = self.to_view[name](images) if name in self.to_view else images
            logits.append(peer(view))
        return logits if self.training else ensemble(logits)


def ensemble(logits: Sequence[Tensor]) -> Tensor:
    """Return the log of the mean of the peers' probabilities [B, C], in float32."""
    log_p = torch.stack([z.float().log_softmax(dim=1) for z in logits])
    return log_p.logsumexp(dim=0) - math.log(len(logits))


class TransferTask(TrainingTask):
    """Train N classifiers that teach each other, in a stock timm loop.

    Where a loop has ``ClassificationTask(model, criterion)``, put
    ``TransferTask({"a": model_a, "b": model_b})``; ``task(input, target)['loss'].backward()`` and
    the rest stay as they are. The optimizer is built over ``task.trainable_module``. For per-peer
    optimizers, views from one decoding, exact resume and reports use ``classification/train.py``.

    Args:
        peers: Models by name, of the same classes.
        criterion: Per-sample loss (logits [B, C], target) -> [B]; None: cross entropy.
        score: ``loss`` or ``confidence``.
        temperatures: What each peer's logits are divided by for the score alone, by name, so that
            the peers' scores can be compared (``common.calibration.fit_temperature`` finds it on
            held-out data); 1 where a name is missing.
        frozen: Names of the peers that learn nothing.
        data_config: How the loop's images are normalised (``timm.data.resolve_data_config``); where
            given, each peer gets them resized and normalised as its own config asks.
        device: For the task's tensors.
        dtype: For the task's tensors.
        verbose: As in timm.
        **transfer: Of ``common.transfer.KnowledgeTransfer``: rule, temperature, weight, ...;
            ``warmup_steps`` are batches here, for a stock loop does not tell its optimizer steps.

    Raises:
        ValueError: Names, a rule or temperatures that do not fit.
        OptionError: Class counts that differ.
    """

    def __init__(
        self,
        peers: Mapping[str, nn.Module],
        criterion: Callable[[Tensor, Tensor], Tensor] | None = None,
        *,
        score: str = "loss",
        temperatures: Mapping[str, float] | None = None,
        frozen: Sequence[str] = (),
        data_config: Mapping[str, Any] | None = None,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
        verbose: bool = True,
        **transfer: Any,
    ) -> None:
        super().__init__(device=device, dtype=dtype, verbose=verbose)
        self.names = list(peers)
        check_names(self.names)
        counts = {name: getattr(peer, "num_classes", None) for name, peer in peers.items()}
        if len(set(counts.values())) > 1:
            told = ", ".join(f"{name}: {count}" for name, count in counts.items())
            raise OptionError(f"peers must tell the same classes, got {told}")
        self.criterion = criterion or nn.CrossEntropyLoss(reduction="none")
        self.score = score
        self.temperatures = self._temperatures(temperatures or {})
        self.transfer = KnowledgeTransfer(names=self.names, frozen=frozen, **transfer)
        self.batches = 0
        views = _views(peers, data_config) if data_config is not None else None
        self.trainable_module = PeerEnsemble(peers, views, frozen).to(self.device)
        self.trainable_module.train()

    def _temperatures(self, given: Mapping[str, float]) -> list[Tensor | None]:
        wrong = {name: t for name, t in given.items() if name not in self.names or not t > 0}
        if wrong:
            raise ValueError(
                f"temperatures {wrong}: expected numbers above 0, by the names of peers: "
                f"{', '.join(self.names)}"
            )
        on_device = [torch.tensor(given.get(name, 1.0), device=self.device) for name in self.names]
        return [*on_device] if given else [None] * len(self.names)

    def prepare_distributed(
        self, device_ids: list[int] | None = None, **ddp_kwargs: Any
    ) -> TransferTask:
        """Wrap the peers in DistributedDataParallel."""
        self.trainable_module = DistributedDataParallel(
            self.trainable_module, device_ids=device_ids, **ddp_kwargs
        )
        return self

    def forward(self, input: Tensor, target: Tensor) -> dict[str, Tensor]:
        """Compute the objective of a batch; in evaluation the ensemble's own loss.

        Returns:
            ``loss``: what to call backward on. ``output``: the ensemble's log-probabilities
            [B, C], no gradient. In training also ``NAME/task_loss``, ``NAME/transfer_loss`` and
            ``NAME/output`` of each peer, no gradient.
        """
        logits = self.trainable_module(input)
        if isinstance(logits, Tensor):
            return {"loss": self.criterion(logits, target).mean(), "output": logits}
        outputs = [
            classify(z, target, self.criterion, self.score, temperature)
            for z, temperature in zip(logits, self.temperatures, strict=True)
        ]
        result = self.transfer(outputs, self.batches)
        self.batches += 1
        told = {"loss": result.total, "output": ensemble([z.detach() for z in logits])}
        for i, name in enumerate(self.names):
            told[f"{name}/task_loss"] = result.task_loss[i]
            told[f"{name}/transfer_loss"] = result.transfer_loss[i]
            told[f"{name}/output"] = logits[i].detach()
        return told

    def get_task_state(self, module: nn.Module | None = None, ema: bool = False) -> dict[str, Any]:
        """Return what timm's checkpoint keeps beside the weights: batches seen, draws made."""
        return {} if ema else {"batches": self.batches, "transfer": self.transfer.state_dict()}

    def load_task_state(
        self,
        state: dict[str, Any] | None,
        strict: bool = True,
        module: nn.Module | None = None,
        ema: bool = False,
    ) -> None:
        """Take up what ``get_task_state`` gave."""
        if state and not ema:
            self.batches = state["batches"]
            self.transfer.load_state_dict(state["transfer"], self.device)


def _views(peers: Mapping[str, nn.Module], config: Mapping[str, Any]) -> dict[str, nn.Module]:
    given = _view(config)
    return {
        name: ToView(given, _view(resolve_model_data_config(peer))) for name, peer in peers.items()
    }


def _view(config: Mapping[str, Any]) -> View:
    return View(
        size=tuple(config["input_size"]),
        mean=tuple(config["mean"]),
        std=tuple(config["std"]),
        interpolation=config.get("interpolation", "bicubic"),
        crop_pct=config.get("crop_pct", 0.875),
        crop_mode=config.get("crop_mode", "center"),
    )
