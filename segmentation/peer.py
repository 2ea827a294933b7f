"""How a Detectron2 segmentor becomes a peer: its dense prediction is caught by a hook."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from detectron2.config import CfgNode
from detectron2.utils.events import get_event_storage, has_event_storage
from torch import Tensor, nn

from common.distributed import World, gather_objects, merge_over_seats
from common.peers import Peer
from common.transfer import PeerOutput, confidence
from segmentation.data import FORMATS, peer_view
from segmentation.errors import SegmentorError

STRIDE = 4
_PREDICTORS = ("sem_seg_head.predictor", "sem_seg_head.coarse_sem_seg_head.predictor")


@dataclass
class Batch:
    """What all peers see of one batch.

    Attributes:
        samples: Detectron2's dicts; ``image`` uint8 RGB [3, H, W] on the device.
        target: Labels [B, H', W'], padded with the ignore label to a multiple of the grid's stride.
        ignore: The ignore label.
    """

    samples: list[dict[str, Any]]
    target: Tensor
    ignore: int

    @property
    def grid(self) -> tuple[int, int]:
        """Height and width of the common grid."""
        height, width = self.target.shape[-2:]
        return height // STRIDE, width // STRIDE

    @functools.cached_property
    def labels(self) -> Tensor:
        """The target on the common grid [B, h, w]; made once for all peers."""
        return at_grid(self.target, self.grid)

    @functools.cached_property
    def valid(self) -> Tensor:
        """Which positions of the grid have a label, bool [B, h, w]; found once for all peers."""
        return self.labels != self.ignore

    @functools.cached_property
    def labelled(self) -> Tensor:
        """Whether any pixel has a label, a bool on the device; found once for all peers."""
        return (self.target != self.ignore).any()


def make_batch(samples: Sequence[dict[str, Any]], device: torch.device, ignore: int) -> Batch:
    """Move samples to the device and pad their labels to one size.

    Args:
        samples: From ``segmentation.data.SharedMapper``; images may differ in size.
        device: Of the peers.
        ignore: The ignore label; padding gets it too.
    """
    sizes = [sample["sem_seg"].shape for sample in samples]
    height, width = (STRIDE * math.ceil(max(size[i] for size in sizes) / STRIDE) for i in (0, 1))
    target = torch.full(
        (len(samples), height, width),
        ignore,
        dtype=torch.long,
        pin_memory=device.type == "cuda",
    )
    for row, sample in zip(target, samples, strict=True):
        h, w = sample["sem_seg"].shape
        row[:h, :w] = sample["sem_seg"]
    moved = [
        {
            key: value.to(device, non_blocking=True) if hasattr(value, "to") else value
            for key, value in sample.items()
        }
        for sample in samples
    ]
    return Batch(moved, target.to(device, non_blocking=True), ignore)


class _CaughtError(Exception):
    """Ends a forward that is only for the prediction, which is caught."""


class SegmentorPeer(Peer):
    """A Detectron2 semantic segmentor in the group.

    Args:
        name: Unique in the group.
        module: From Detectron2's ``build_model``.
        cfg: Its config; INPUT.FORMAT says in which channel order it wants its images.
        granularity: ``image``: one score an image; ``pixel``: one a position of the grid.
        score: ``loss`` or ``confidence``.
        rest: As ``common.peers.Peer`` takes them.

    Attributes:
        cfg: As given.
        scheduler: Detectron2's schedule of the learning rate, set by whoever builds it.
        dense: Whether the module gives logits of its own, rather than masks and their classes.
        multiple: Of which sides its training images must be before the host sees them; 0: any.

    Raises:
        SegmentorError: No dense prediction can be caught in this architecture.
    """

    def __init__(
        self,
        name: str,
        module: nn.Module,
        cfg: CfgNode,
        *,
        granularity: str = "image",
        score: str = "loss",
        **rest: Any,
    ) -> None:
        super().__init__(name, module, **rest)
        if cfg.INPUT.FORMAT not in FORMATS:
            raise SegmentorError(
                f"peer {name!r}: INPUT.FORMAT is {cfg.INPUT.FORMAT!r}; choose from "
                f"{', '.join(FORMATS)}"
            )
        self.cfg = cfg
        self.scheduler: Any = None
        self.granularity = granularity
        self.score = score
        where, self.dense = find_prediction(module, name)
        self.multiple = padding_multiple(module, cfg)
        self._mean = torch.tensor(cfg.MODEL.PIXEL_MEAN).view(-1, 1, 1)
        self._caught: Any = None
        self._ends = False
        for whole in {id(x): x for x in (module, self.best_module)}.values():
            whole.get_submodule(where).register_forward_hook(self._catch)
        self._losses: dict[tuple[str, ...], tuple[Tensor, Tensor]] = {}

    def forward(self, batch: Batch) -> PeerOutput:
        """Run the host's own training forward once; gradient reaches task_loss and logits.

        Of a frozen peer, and of an average that teaches, the evaluation's as far as the prediction.
        """
        losses, logits = self._run(batch)
        score, valid = dense_score(
            logits, batch.labels, batch.ignore, self.granularity, batch.valid
        )
        if losses is None:
            task_loss = -score.mean()  # for the record alone; nothing is learned from it
        else:
            values = self._where_labelled(torch.stack(list(losses.values())), batch)
            task_loss = values.sum()
            self._count(tuple(losses), values.detach())
        return PeerOutput(
            task_loss=task_loss,
            score=score if self.score == "loss" else self._confidence(logits, valid),
            logits=logits,
            mask=valid,
            correct=self._correct(logits, batch),
        )

    def predict(self, batch: Batch) -> Tensor:
        """Return logits [B, C, h, w] on the common grid, as evaluated, in the mode it is in."""
        with self.averaged():
            return self._run(batch)[1]

    def view(self, sample: dict[str, Any]) -> dict[str, Any]:
        """Return a sample as this peer wants it; no output size, so nothing is enlarged in vain."""
        seen = peer_view(sample, self.cfg.INPUT.FORMAT)
        return {key: value for key, value in seen.items() if key not in ("height", "width")}

    def inputs(self, samples: Sequence[dict[str, Any]], ignore: int) -> list[dict[str, Any]]:
        """Return samples as the training forward gets them: this peer's channels and padding.

        Args:
            samples: From ``segmentation.data.SharedMapper``.
            ignore: The label of the padding.
        """
        seen = [self.view(sample) for sample in samples]
        if self.multiple > 1:
            self._mean = self._mean.to(seen[0]["image"].device)  # once; it stays there
            return pad(seen, self.multiple, self._mean, ignore)
        return seen

    def probabilities(self, sem_seg: Tensor) -> Tensor:
        """Turn the module's ``sem_seg`` output [C, H, W] into probabilities over dim 0.

        In place where it is float32: such a map, at a file's resolution, is the largest there is.
        """
        p = sem_seg.detach().float()
        if self.dense:
            p.sub_(p.amax(dim=0, keepdim=True)).exp_()
        return p.div_(p.sum(dim=0, keepdim=True).clamp_min(_tiny(p)))

    def take_losses(self) -> dict[str, Tensor]:
        """Return of each of the host's losses its sum and the batches that had it [2]; begin anew.

        Batches of which a loss is not finite do not count.
        """
        found: dict[str, Tensor] = {}
        for names, (values, batches) in self._losses.items():
            for name, value in zip(names, values.float().unbind(), strict=True):
                told = torch.stack([value, batches.float()])
                found[name] = found[name] + told if name in found else told
        self._losses = {}
        return found

    def _run(self, batch: Batch) -> tuple[Any, Tensor]:
        inputs = self.inputs(batch.samples, batch.ignore)
        output = None
        # the rest of an evaluation is not for this
        self._ends = self.frozen or not self.model.training
        with _scope(self.name), suppress(_CaughtError):
            output = self.model(inputs)
        self._ends = False
        return output, self._logits(padded_size(self.module, inputs), batch.grid)

    def _catch(self, module: nn.Module, inputs: Any, output: Any) -> None:
        self._caught = output
        if self._ends:
            raise _CaughtError

    def _logits(self, padded: tuple[int, int], grid: tuple[int, int]) -> Tensor:
        """Bring what the hook caught to logits [B, C, h, w] on the common grid."""
        caught, self._caught = self._caught, None
        if self.dense:
            return to_grid(caught, padded, grid)
        masks = to_grid(caught["pred_masks"], padded, grid)
        return mask_classification_logits(caught["pred_logits"], masks)

    def _confidence(self, logits: Tensor, valid: Tensor) -> Tensor:
        score = confidence(logits) * valid
        return score if self.granularity == "pixel" else _mean_over(score, valid)

    def _correct(self, logits: Tensor, batch: Batch) -> Tensor | None:
        if self.granularity == "image":
            return None
        return logits.detach().argmax(dim=1) == batch.labels

    def _where_labelled(self, losses: Tensor, batch: Batch) -> Tensor:
        """Let a batch without any label cost nothing: a mean over no pixel is NaN.

        The host's gradient is zero there, and stays so. Nothing waits for the device.
        """
        if not self.dense:
            return losses  # masks and their classes: that there are none is a lesson too
        return torch.where(batch.labelled, losses, torch.zeros_like(losses))

    def _count(self, names: tuple[str, ...], losses: Tensor) -> None:
        """Add a batch's losses; a host may have others in the next batch."""
        finite = losses.isfinite().all()
        losses = torch.where(finite, losses, torch.zeros_like(losses))
        sums, batches = self._losses.get(names, (torch.zeros_like(losses), 0))
        self._losses[names] = sums + losses, batches + finite


def read_losses(peers: Sequence[SegmentorPeer], world: World) -> dict[str, float]:
    """Return the mean of each of the hosts' losses since the last call, over all ranks.

    A loss counts for the batches that had it. All ranks must call it; it waits for the device, once
    for all peers.

    Args:
        peers: That this process holds.
        world: Where it stands.

    Returns:
        ``PEER/LOSS``; a frozen peer has none.
    """
    found = {
        f"{peer.name}/{name}": told for peer in peers for name, told in peer.take_losses().items()
    }
    pairs = torch.stack(list(found.values())).tolist() if found else []
    mine = dict(zip(found, pairs, strict=True))
    sums: dict[str, float] = {}
    batches: dict[str, float] = {}
    for part in gather_objects(mine, world.replicas):  # a loss need not be there on every rank
        for name, (value, count) in part.items():
            sums[name] = sums.get(name, 0.0) + value
            batches[name] = batches.get(name, 0.0) + count
    means = {name: value / max(batches[name], 1) for name, value in sums.items()}
    return merge_over_seats(means, world)


def find_prediction(module: nn.Module, name: str) -> tuple[str, bool]:
    """Say where a segmentor's dense prediction appears.

    Returns:
        The submodule whose output to catch, and whether that is logits [B, C, h, w]; if not, it is
        a dict with ``pred_logits`` and ``pred_masks``.

    Raises:
        SegmentorError: Not known for this architecture.
    """
    kind = type(module).__name__
    if hasattr(module, "proposal_generator"):
        raise SegmentorError(
            f"peer {name!r}: {kind} learns from boxes too; take a semantic architecture, such as "
            "SemanticSegmentor"
        )
    for path in _PREDICTORS:
        try:
            found = module.get_submodule(path)
        except AttributeError:
            continue
        if isinstance(found, nn.Conv2d):
            return path, True
    # MaskFormer's family; their predictor is a transformer
    if hasattr(module, "num_queries") and isinstance(
        getattr(module, "sem_seg_head", None), nn.Module
    ):
        return "sem_seg_head", False
    raise SegmentorError(
        f"peer {name!r}: no dense prediction is known for {kind} with this head; known are "
        "SemanticSegmentor with SemSegFPNHead, PointRendSemSegHead, DeepLabV3Head or "
        "DeepLabV3PlusHead, and the MaskFormer family"
    )


def padding_multiple(module: nn.Module, cfg: CfgNode) -> int:
    """Say to a multiple of what a peer's training images are padded before the host sees them.

    INPUT.SIZE_DIVISIBILITY where the config gives it, as the mapper of Mask2Former pads; else the
    coarsest stride of a backbone that asks for no padding but cannot do without, as DeepLab's.
    """
    if cfg.INPUT.SIZE_DIVISIBILITY > 0:
        return int(cfg.INPUT.SIZE_DIVISIBILITY)
    backbone = getattr(module, "backbone", None)
    pads_itself = getattr(module, "size_divisibility", 0) or getattr(
        backbone, "size_divisibility", 0
    )
    if pads_itself or not hasattr(backbone, "output_shape"):
        return 0
    return max(shape.stride or 1 for shape in backbone.output_shape().values())


def pad(
    inputs: Sequence[dict[str, Any]], multiple: int, mean: Tensor, ignore: int
) -> list[dict[str, Any]]:
    """Pad images and labels at the right and the bottom to one size.

    Args:
        inputs: A peer's view of the samples.
        multiple: Of which both sides shall be.
        mean: Of each channel [3, 1, 1], on the images' device; what the padding is filled with.
        ignore: The label of the padding.
    """
    height, width = (
        multiple * math.ceil(max(int(x["image"].shape[i]) for x in inputs) / multiple)
        for i in (1, 2)
    )
    return [_pad_one(sample, height, width, mean, ignore) for sample in inputs]


def _pad_one(
    sample: dict[str, Any], height: int, width: int, mean: Tensor, ignore: int
) -> dict[str, Any]:
    image, labels = sample["image"], sample["sem_seg"]
    h, w = labels.shape
    if (h, w) == (height, width):
        return sample
    padded = mean.repeat(1, height, width)  # float: exactly 0 to the network
    padded[:, :h, :w] = image
    return {
        **sample,
        "image": padded,
        "sem_seg": F.pad(labels, (0, width - w, 0, height - h), value=ignore),
    }


def padded_size(module: nn.Module, samples: Sequence[dict[str, Any]]) -> tuple[int, int]:
    """Return height and width to which a segmentor pads these images."""
    height, width = (max(int(sample["image"].shape[i]) for sample in samples) for i in (1, 2))
    backbone = getattr(module, "backbone", None)
    constraints = dict(getattr(backbone, "padding_constraints", None) or {})
    multiple = getattr(module, "size_divisibility", None)
    if multiple is None:
        multiple = getattr(backbone, "size_divisibility", 0)
        square = int(constraints.get("square_size", 0))
        multiple = int(constraints.get("size_divisibility", multiple))
        height, width = (square, square) if square else (height, width)
    if multiple > 1:
        height, width = (multiple * math.ceil(side / multiple) for side in (height, width))
    return height, width


def to_grid(dense: Tensor, padded: tuple[int, int], grid: tuple[int, int]) -> Tensor:
    """Bring a dense prediction to the common grid, at 1/4 of the image.

    A prediction of another stride is resized (bilinear); the peer's own padding is cut off.

    Args:
        dense: [B, K, h', w'], over the padded image.
        padded: Height and width of the padded image, in pixels.
        grid: Height and width of the common grid.

    Returns:
        [B, K, h, w]; gradient flows.
    """
    size = tuple(math.ceil(side / STRIDE) for side in padded)
    if dense.shape[-2:] != size:
        dense = F.interpolate(dense, size=size, mode="bilinear", align_corners=False)
    return dense[..., : grid[0], : grid[1]]


def mask_classification_logits(class_logits: Tensor, mask_logits: Tensor) -> Tensor:
    """Turn queries with a class and a mask each into logits over classes.

    ``s[c] = sum_q softmax(class_q)[c] * sigmoid(mask_q)`` without the no-object class; the logits
    are ``log(s)``, whose softmax is s, normalised. In float32 or wider.

    Args:
        class_logits: [B, Q, C + 1]; the last class is no object.
        mask_logits: [B, Q, h, w].

    Returns:
        [B, C, h, w]; gradient reaches both inputs.

    Source: Cheng et al., "Per-Pixel Classification is Not All You Need", 2021 (s).
    """
    with torch.autocast(class_logits.device.type, enabled=False):
        wide = torch.float64 if mask_logits.dtype == torch.float64 else torch.float32
        classes = class_logits.to(wide).softmax(dim=-1)[..., :-1]
        s = torch.einsum("bqc,bqhw->bchw", classes, mask_logits.to(wide).sigmoid())
        return s.clamp_min(_tiny(s)).log()


@torch.no_grad()
def dense_score(
    logits: Tensor,
    target: Tensor,
    ignore_index: int = 255,
    granularity: str = "image",
    valid: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Score a dense prediction by minus its cross entropy, on the prediction's grid.

    Args:
        logits: [B, C, h, w].
        target: Labels [B, H, W]; brought to the grid by nearest neighbour.
        ignore_index: The label of pixels that do not count; padding has it too.
        granularity: ``image``: the mean over each image's valid pixels; ``pixel``: each pixel.
        valid: Which positions of the grid count [B, h, w], bool, where that is known already.

    Returns:
        The score [B] or [B, h, w], in nats, no gradient, float32 or wider, 0 where nothing is
        valid; and which positions are valid [B, h, w], bool.

    Raises:
        ValueError: Another granularity.
    """
    if granularity not in ("image", "pixel"):
        raise ValueError(f"granularity is {granularity!r}; choose from image, pixel")
    labels = at_grid(target, logits.shape[-2:])
    valid = labels != ignore_index if valid is None else valid
    wide = logits if logits.dtype == torch.float64 else logits.float()
    with torch.autocast(logits.device.type, enabled=False):
        score = -F.cross_entropy(wide, labels, ignore_index=ignore_index, reduction="none")
    return (score if granularity == "pixel" else _mean_over(score, valid)), valid


def at_grid(target: Tensor, size: Sequence[int]) -> Tensor:
    """Bring labels [B, H, W] to another size by nearest neighbour, int64."""
    if tuple(target.shape[-2:]) == tuple(size):
        return target.long()
    strides = [side // of for side, of in zip(target.shape[-2:], size, strict=True)]
    if [of * stride for of, stride in zip(size, strides, strict=True)] == list(target.shape[-2:]):
        return target[:, :: strides[0], :: strides[1]].long()  # the same, without a copy in float64
    return F.interpolate(target[:, None].double(), size=tuple(size), mode="nearest")[:, 0].long()


def _mean_over(x: Tensor, valid: Tensor) -> Tensor:
    """Return the mean over each image's valid positions [B]; 0 where there is none."""
    return x.flatten(1).sum(dim=1) / valid.flatten(1).sum(dim=1).clamp(min=1)


def _tiny(x: Tensor) -> float:
    return torch.finfo(x.dtype).tiny


def _scope(name: str) -> AbstractContextManager[Any]:
    """Prefix what the host itself writes to Detectron2's storage, where there is one."""
    return get_event_storage().name_scope(name) if has_event_storage() else nullcontext()
