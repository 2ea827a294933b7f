"""Pictures of what peers predict and who would teach whom."""

from __future__ import annotations

import contextlib
import io
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from matplotlib import colormaps
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from common.distributed import World, gather_over_team
from common.peers import PeerGroup
from common.report.plots import color_of
from common.roles import assign_roles
from saliency.clips import ClipView
from saliency.data import ClipBatch, ClipSample, EvalClips, collate
from saliency.errors import DataError
from saliency.images import read_frame
from saliency.layouts import VideoSet
from saliency.losses import saliency_loss
from saliency.peer import SaliencyPeer, to_size

_INCH = 1.9


def teaching_pictures(
    peers: PeerGroup,
    videos: VideoSet,
    world: World,
    elsewhere: Sequence[ClipView] = (),
    count: int = 4,
) -> tuple[bytes, str]:
    """Draw a few frames under heat maps: the truth, each peer's prediction, and who does best.

    Args:
        peers: Their modes are put back; averaged weights are taken where there are any.
        videos: Of the first ``count`` videos that can be read, the middle frame is shown.
        world: Where this process stands; those that lead the peers' seats must all call it.
        elsewhere: Views of peers in other processes, so that all show the same videos.
        count: How many.

    Returns:
        A PNG, and a caption.
    """
    dataset = EvalClips(videos, [peer.view for peer in peers.here], elsewhere=elsewhere)
    columns = ["frame", "truth", *peers.names]
    shown = list(itertools.islice(_readable(dataset), count))
    figure = Figure(figsize=(_INCH * len(columns), 0.72 * _INCH * len(shown)), layout="constrained")
    axes = figure.subplots(len(shown), len(columns), squeeze=False)
    for row, sample in zip(axes, shown, strict=True):
        video, target = videos.videos[sample.video], sample.target
        batch = collate([sample])
        mine = predict(peers.here, batch.to(world.device))
        maps = gather_over_team([m.cpu() for m in mine], world)
        best = best_of(maps, batch)
        frame = read_frame(video.path(video.frames[target]))
        pictures = [frame, *(overlay(frame, m[0].numpy()) for m in [batch.maps, *maps])]
        for axis, picture in zip(row, pictures, strict=True):
            axis.imshow(picture)
            axis.set_xticks([])
            axis.set_yticks([])
        row[0].set_ylabel(f"{video.name}, {target + 1}", fontsize=7)
        if best is not None:
            for spine in row[2 + best].spines.values():
                spine.set(color=color_of(best), linewidth=3)
            row[2 + best].set_xlabel("teaches", fontsize=8)
    for axis, title in zip(axes[0], columns, strict=True):
        axis.set_title(title, fontsize=8)
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=110)
    caption = (
        f"The middle frame of the first videos of {videos.split}, with heat maps scaled to their "
        "largest value. Framed: the peer whose KL less CC is lowest on that frame, which would "
        "teach the others there."
    )
    return file.getvalue(), caption


def _readable(dataset: EvalClips) -> Iterator[ClipSample]:
    """Yield the middle frame of every video; what is broken was told by the evaluation."""
    for number, video in enumerate(dataset.videos.videos):
        with contextlib.suppress(DataError):
            yield dataset[number, len(video) // 2]


@torch.no_grad()
def predict(peers: Sequence[SaliencyPeer], batch: ClipBatch) -> list[Tensor]:
    """Return each peer's maps [B, H, W]."""
    size = batch.maps.shape[-2:]
    maps = []
    for peer in peers:
        module = peer.best_module
        was = module.training
        maps.append(to_size(module.eval()(batch.clips(peer.view)), size))
        module.train(was)
    return maps


def best_of(maps: Sequence[Tensor], batch: ClipBatch) -> int | None:
    """Return which peer does best on the first sample, if any; all on one device."""
    if len(maps) < 2:
        return None
    score = torch.stack([-saliency_loss(m, batch.maps)[:1] for m in maps])
    teaches = assign_roles(score, "best").amax(dim=1)[:, 0] > 0
    return int(teaches.int().argmax()) if bool(teaches.any()) else None


def overlay(frame: np.ndarray, map_: np.ndarray, strength: float = 0.6) -> np.ndarray:
    """Lay a heat map over a frame.

    Args:
        frame: uint8 RGB [H, W, 3].
        map_: Not negative, [H, W]; scaled to its largest value.
        strength: Of the heat where the map is largest; it fades with the map.

    Returns:
        uint8 RGB [H, W, 3].
    """
    heat = np.clip(map_ / max(float(map_.max()), 1e-12), 0, 1)
    if heat.shape != frame.shape[:2]:
        tensor = torch.from_numpy(np.ascontiguousarray(heat))[None].float()
        heat = to_size(tensor, frame.shape[:2])[0].numpy()
    colors = 255 * colormaps["inferno"](heat)[..., :3]
    weight = strength * heat[..., None] ** 0.5
    return (frame * (1 - weight) + colors * weight).round().astype(np.uint8)


def to_bytes(map_: np.ndarray) -> np.ndarray:
    """Scale a map [H, W] from its smallest to its largest value to 0 to 255; uint8."""
    low, high = float(map_.min()), float(map_.max())
    return np.uint8(np.round(255 * (map_ - low) / max(high - low, 1e-12)))


def write_png(path: Path, image: np.ndarray) -> None:
    """Write uint8 gray [H, W] or RGB [H, W, 3]; folders are made.

    Raises:
        OSError: It cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image).save(path)
