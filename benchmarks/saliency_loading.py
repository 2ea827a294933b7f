"""Clips for several peers, each frame decoded once, against decoding per peer with PIL.

    PYTHONPATH=. python benchmarks/saliency_loading.py [--peers tmfi_net vinet_a --writer opencv]

Frames are pans over photographs, 640x360, in DHF1K's layout. The other side does what the published
loaders do: every peer opens its own 32 frames with PIL, Resize, ToTensor, Normalize, and the folder
is listed for every frame; torch's default collate. Training targets lie so that no clip is clamped:
48 distinct frames, our worst case. One process that reads, one thread; ``--workers 0``: nothing
beside it. "Normalised here": on this CPU, in the main process; else the bytes are ready for the
device, which does it there. Expected, at pixels equal to 1/255: 2 times faster to the bytes, 20
times with packed frames.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import cv2
import numpy as np
import torch
from measure import alternate, machine
from PIL import Image
from sklearn.datasets import load_sample_images
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from common.distributed import World
from saliency import frames
from saliency.clips import VIEWS, ClipView
from saliency.data import ClipBatch, EvalClips, EvalLoader, collate
from saliency.frames import FrameReader
from saliency.images import read_frame
from saliency.layouts import VideoSet, open_dataset
from saliency.packed import pack_frames
from tests.saliency.folders import write_video

SIZE = (360, 640)
PHOTOGRAPHS = [np.ascontiguousarray(image) for image in load_sample_images().images]
HERE = World(0, 1, 0, torch.device("cpu"))
WRITERS = {
    "opencv": (),  # one filter, fast compression
    "plain": (
        *(cv2.IMWRITE_PNG_FILTER, cv2.IMWRITE_PNG_FILTER_NONE),
        *(cv2.IMWRITE_PNG_STRATEGY, cv2.IMWRITE_PNG_STRATEGY_DEFAULT),
        *(cv2.IMWRITE_PNG_COMPRESSION, 6),
    ),
    "filtered": (
        *(cv2.IMWRITE_PNG_FILTER, cv2.IMWRITE_PNG_ALL_FILTERS),
        *(cv2.IMWRITE_PNG_STRATEGY, cv2.IMWRITE_PNG_STRATEGY_DEFAULT),
        *(cv2.IMWRITE_PNG_COMPRESSION, 6),
    ),
}


def photograph(seed: int, frame: int, size: tuple[int, int]) -> np.ndarray:
    """Pan over a photograph: a frame's compression is a photograph's, not a pattern's."""
    image = PHOTOGRAPHS[seed % 2]
    top = round((image.shape[0] - size[0]) * (0.5 + 0.5 * np.sin(0.3 * frame)))
    return image[top : top + size[0], : size[1]]


class PerPeer(Dataset):
    """What the published loaders do."""

    def __init__(self, videos: VideoSet, views: list[ClipView]) -> None:
        self.videos = videos.videos
        self.views = views
        self.changes = [
            transforms.Compose(
                [
                    transforms.Resize(view.size),
                    transforms.ToTensor(),
                    transforms.Normalize(view.mean, view.std),
                ]
            )
            for view in views
        ]

    def __getitem__(self, index: tuple[int, int]) -> tuple[Tensor, ...]:
        video, target = self.videos[index[0]], index[1]
        clips = []
        for view, change in zip(self.views, self.changes, strict=True):
            clip = []
            for k in range(view.frames):
                folder = video.path("images")
                last = len(os.listdir(folder)) - 1
                number = min(max(target - view.before + k * view.stride, 0), last)
                image = Image.open(os.path.join(folder, f"{number + 1:04d}.png"))
                clip.append(change(image.convert("RGB")))
            clips.append(torch.stack(clip))
        truth = Image.open(video.path(video.maps[target])).convert("L")
        size = self.views[-1].size
        truth = cv2.resize(np.array(truth).astype(float), (size[1], size[0]))
        return *clips, torch.from_numpy(truth / 255 if truth.max() > 1 else truth)


def loader_of(
    dataset: Dataset, targets: list[tuple[int, int]], args: argparse.Namespace, **rest
) -> DataLoader:
    return DataLoader(
        dataset,
        batch_size=args.batch,
        sampler=targets,
        num_workers=args.workers,
        persistent_workers=args.workers > 0,
        worker_init_fn=lambda worker: cv2.setNumThreads(1),
        **rest,
    )


def normalised(loader: Iterable[ClipBatch], views: list[ClipView]) -> Iterator[list[Tensor]]:
    for batch in loader:
        yield [batch.clips(view) for view in views]


def exhaust(batches: Iterable[object]) -> None:
    for _ in batches:
        pass


def largest_difference(theirs: tuple[Tensor, ...], ours: ClipBatch, views: list[ClipView]) -> float:
    """Return the largest difference of pixels, in units of 1/255, and of maps."""
    worst = 0.0
    for view, clip in zip(views, theirs, strict=False):
        std = 255 * torch.tensor(view.std).view(3, 1, 1)
        difference = (ours.clips(view).transpose(1, 2) - clip).abs() * std
        worst = max(worst, float(difference.max()))
    return max(worst, 255 * float((ours.maps - theirs[-1]).abs().max()))


def decoded(run: Callable[[], object]) -> int:
    """Count the frames that ``run`` decodes."""
    seen: list[str] = []
    frames.read_frame = lambda path: seen.append(path) or read_frame(path)
    run()
    frames.read_frame = read_frame
    return len(seen)


def training(
    videos: VideoSet, views: list[ClipView], args: argparse.Namespace, folder: str
) -> None:
    """Print the table of training batches."""
    span = max(view.span for view in views)
    draws = np.random.default_rng(0).integers(span, args.frames - span, args.samples)
    targets = [(k % len(videos.videos), int(target)) for k, target in enumerate(draws)]
    size = views[-1].size
    packed = pack_frames(videos, [view.size for view in views], folder, progress=False)
    plain = EvalClips(videos, views, map_size=size)
    quick = EvalClips(videos, views, map_size=size, reader=FrameReader(packed))
    per_peer = loader_of(PerPeer(videos, views), targets, args)
    once = loader_of(plain, targets, args, collate_fn=collate)
    cached = loader_of(quick, targets, args, collate_fn=collate)
    theirs, ours, fast = (next(iter(loader)) for loader in (per_peer, once, cached))
    print(
        f"largest difference: {largest_difference(theirs, ours, views):.2f}/255; packed "
        f"{largest_difference(theirs, fast, views):.2f}/255; frames decoded a sample: "
        f"{32 * len(views)} per peer, {decoded(lambda: plain[targets[0]])} ours"
    )
    for name, tensors in (("per peer", theirs), ("ours", ours.frames.values())):
        print(f"MB a sample, {name}: {sum(x.nbytes for x in tensors) / args.batch / 1e6:.0f}")
    seconds = alternate(
        {
            "per peer, PIL": lambda: exhaust(per_peer),
            "ours": lambda: exhaust(once),
            "ours, normalised here": lambda: exhaust(normalised(once, views)),
            "packed": lambda: exhaust(cached),
            "packed, normalised here": lambda: exhaust(normalised(cached, views)),
        },
        args.repeats,
        1,
    )
    told(seconds, "per peer, PIL", len(targets), "samples/s")


def evaluation(videos: VideoSet, views: list[ClipView], args: argparse.Namespace) -> None:
    """Print the table of evaluation at every frame of a video."""
    count = len(videos.videos[0])
    targets = [(0, target) for target in range(count)]
    per_peer = loader_of(PerPeer(videos, views), targets, args)

    def ours() -> EvalLoader:  # anew in every turn: it remembers frames
        return EvalLoader(
            videos, views, HERE, batch_size=args.batch, workers=args.workers, fixations=False
        )

    seconds = alternate(
        {
            "per peer, PIL": lambda: exhaust(per_peer),
            "ours": lambda: exhaust(ours()),
            "ours, normalised here": lambda: exhaust(normalised(ours(), views)),
        },
        args.repeats,
        0,
    )
    told(seconds, "per peer, PIL", count, "targets/s")


def told(seconds: dict[str, float], base: str, count: int, unit: str) -> None:
    print(f"{'':26} {unit:>10} {'ratio':>8}")
    for name, value in seconds.items():
        print(f"{name:26} {count / value:10.2f} {seconds[base] / value:8.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--peers", nargs="+", default=["tmfi_net", "vinet_a"], choices=list(VIEWS))
    parser.add_argument("--writer", default="opencv", choices=list(WRITERS))
    parser.add_argument(
        "--frames", type=int, default=160, help="of a video; as many videos as a batch has samples"
    )
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--targets", type=int, default=32, help="of evaluation")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--workers", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    views = [VIEWS[name] for name in args.peers]
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "data"
        counts = {f"{k + 1:04d}": args.frames for k in range(args.batch)} | {"0601": args.targets}
        for seed, (name, count) in enumerate(counts.items()):
            options = WRITERS[args.writer]
            write_video(root / name, count, seed=seed, size=SIZE, paint=photograph, options=options)
        files = list((root / "0001" / "images").iterdir())
        print(
            f"{' + '.join(args.peers)}, PNGs of {SIZE[1]}x{SIZE[0]} ({args.writer}, "
            f"{sum(file.stat().st_size for file in files) / len(files) / 1e3:.0f} kB each), batch "
            f"{args.batch}, {args.workers} workers; {machine()}"
        )
        training(open_dataset("dhf1k", root, "train"), views, args, f"{folder}/packed")
        evaluation(open_dataset("dhf1k", root, "val"), views, args)


if __name__ == "__main__":
    main()
