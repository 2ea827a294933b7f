"""Pictures of what peers see and who would teach whom."""

from __future__ import annotations

import io
import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from detectron2.data import MetadataCatalog
from matplotlib import colormaps
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from torch import Tensor

from common.distributed import World, gather_over_team
from common.peers import PeerGroup
from common.report.plots import color_of
from common.roles import assign_roles
from segmentation.data import TestMapper, check_labels, load_datasets, read_labels
from segmentation.errors import DataError
from segmentation.evaluation import evaluating
from segmentation.peer import Batch, SegmentorPeer, at_grid, dense_score, make_batch
from segmentation.scenes import palette

_INCH = 1.5


def teaching_pictures(
    peers: PeerGroup, dataset: str, world: World, count: int = 4
) -> tuple[bytes, str]:
    """Draw a few images: the truth, each peer's prediction, and who does best where.

    Args:
        peers: On one device; their modes are put back.
        dataset: A registered name; its first images that can be read are taken.
        world: Where this process stands; those that lead the peers' seats must all call it.
        count: How many.

    Returns:
        A PNG, and a caption.
    """
    records = load_datasets([dataset])
    ignore = int(MetadataCatalog.get(dataset).ignore_label)
    own = peers.here[0].cfg.INPUT
    sizes = gather_over_team([(own.MIN_SIZE_TEST, own.MAX_SIZE_TEST)], world)[0]  # the first peer's
    readable = _readable(records, peers.here, ignore, sizes)
    batches = list(itertools.islice(readable, count))
    colors = _palette(dataset, ignore)
    columns = ["image", "truth", *peers.names, "best at each pixel"]
    figure = Figure(
        figsize=(_INCH * len(columns), _INCH * len(batches) + 0.4), layout="constrained"
    )
    axes = figure.subplots(len(batches), len(columns), squeeze=False)
    for row, batch in zip(axes, batches, strict=True):
        with torch.no_grad(), evaluating(peers.here):
            mine = [peer.predict(batch).cpu() for peer in peers.here]
        logits = gather_over_team(mine, world)
        teacher, of_image = _lessons(peers.names, logits, batch)
        shown = [
            batch.samples[0]["image"].permute(1, 2, 0).cpu().numpy(),
            colors[batch.target[0].cpu().numpy()],
            *(colors[z[0].argmax(dim=0).numpy()] for z in logits),
            _teacher_map(teacher, len(peers)),
        ]
        for axis, picture in zip(row, shown, strict=True):
            axis.imshow(picture, interpolation="nearest")
            axis.set_xticks([])
            axis.set_yticks([])
        row[-1].set_xlabel(f"image: {of_image}", fontsize=8)
    for axis, title in zip(axes[0], columns, strict=True):
        axis.set_title(title, fontsize=8)
    handles = [Patch(color=color_of(i), label=name) for i, name in enumerate(peers.names)]
    figure.legend(handles=handles, loc="outside lower right", ncols=len(peers), fontsize=8)
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=110)
    caption = (
        f"The first images of {dataset}. Predictions are on the common grid, a quarter of the "
        "image. Last column: which peer's cross entropy is lowest at each pixel; below it, whose "
        "mean over the image is. White: ignored, or nobody is better than all others."
    )
    return file.getvalue(), caption


def _readable(
    records: Iterable[dict[str, Any]],
    peers: Sequence[SegmentorPeer],
    ignore: int,
    sizes: tuple[int, int],
) -> Iterator[Batch]:
    """Yield one image after another; what is broken was told by the evaluation.

    Raises:
        DataError: None of them can be read.
    """
    fault, some = None, False
    for record in records:
        try:
            batch = _batch(record, peers, ignore, sizes)
        except DataError as error:
            fault = error
            continue
        some = True
        yield batch
    if fault is not None and not some:
        raise fault


def _batch(
    record: dict[str, Any], peers: Sequence[SegmentorPeer], ignore: int, sizes: tuple[int, int]
) -> Batch:
    sample = TestMapper(*sizes)(record)
    path, classes = record["sem_seg_file_name"], peers[0].cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES
    array = read_labels(path, dtype=np.int64)
    check_labels(array, classes, ignore, path)
    sample["sem_seg"] = at_grid(torch.from_numpy(array)[None], sample["image"].shape[-2:])[0]
    device = next(peers[0].module.parameters()).device
    return make_batch([sample], device, ignore)


def _lessons(peers: Sequence[str], logits: Sequence[Tensor], batch: Batch) -> tuple[Tensor, str]:
    """Return the best peer at each pixel [h, w] or -1, and the name of the image's."""
    labels = batch.labels.cpu()
    scores = [dense_score(z, labels, batch.ignore, "pixel") for z in logits]
    valid = scores[0][1]
    pixel = torch.stack([score for score, _ in scores])
    image = torch.stack([dense_score(z, labels, batch.ignore)[0] for z in logits])
    names = [*peers, "nobody"]
    best = torch.where(valid, _best(pixel), -1)[0]
    return best, names[int(_best(image)[0])]


def _best(score: Tensor) -> Tensor:
    """Return which peer teaches [B, (S*)] under the rule ``best``; -1: nobody."""
    if len(score) < 2:
        return torch.full_like(score[0], -1, dtype=torch.long)
    teaches = assign_roles(score, "best").amax(dim=1) > 0
    return torch.where(teaches.any(dim=0), teaches.int().argmax(dim=0), -1)


def _teacher_map(teacher: Tensor, peers: int) -> np.ndarray:
    colors = np.array([*(to_rgb(color_of(i)) for i in range(peers)), (1.0, 1.0, 1.0)])
    return colors[teacher.cpu().numpy()]


def _palette(dataset: str, ignore: int) -> np.ndarray:
    """Return a colour for every label [256, 3] uint8: the dataset's own where it has some."""
    own = MetadataCatalog.get(dataset).get("stuff_colors")
    if own:
        return palette(own, ignore)
    tab = np.uint8(255 * np.array(colormaps["tab20"].colors))
    return palette([(40, 40, 40), *tab[np.arange(255) % len(tab)]], ignore)
