"""Show where people would look in a video: a heat map over every frame.

    python saliency/predict.py VIDEO.mp4 --peer vinet_s,checkpoint=vinet_s.pt

writes OUTPUT/VIDEO.mp4. With several ``--peer`` it shows the mean of their maps. A folder of frames
or of videos in the layout of DHF1K (VIDEO/images/0001.png, its test set for instance), gives
OUTPUT/VIDEO/0001.png and so on: the maps themselves, the layout in which DHF1K takes submissions.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from common.options import OptionError, amp_dtype, check_least
from common.outputs import make_writable, run_command, start_world
from saliency.clips import ClipView
from saliency.errors import DataError
from saliency.evaluation import over_sum
from saliency.images import IMAGE_SUFFIXES, read_frame, resize_frame
from saliency.layouts import natural_key
from saliency.metrics import resize_and_blur
from saliency.options import add_machine_options, add_peer_options, read_peers
from saliency.peer import build_modules, check_output, warn_of_random_weights
from saliency.pictures import overlay, to_bytes, write_png
from saliency.train import FAULTS

_logger = logging.getLogger("predict")


def build_parser() -> argparse.ArgumentParser:
    """Build the parser."""
    parser = argparse.ArgumentParser(
        prog="saliency/predict.py",
        description="Predict where people look in videos.",
        allow_abbrev=False,
    )
    parser.add_argument("inputs", nargs="+", metavar="VIDEO", help="files, or folders of frames")
    add_peer_options(parser)
    add_machine_options(parser)
    add = parser.add_argument_group("output").add_argument
    add("--output", default="output/predict", metavar="DIR")
    add("-b", "--batch-size", type=int, default=1, help="frames predicted at a time")
    add("--blur", type=int, default=11, help="pixels across the Gaussian on maps; 0: none")
    add("--strength", type=float, default=0.6, help="of the heat over the frames, 0 to 1")
    add("--maps", action="store_true", help="of a video file too, write maps and not an overlay")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; bad input ends in one line, not in a traceback."""
    return run_command(lambda: predict(arguments), FAULTS)


def predict(arguments: Sequence[str] | None = None) -> list[Path]:
    """Predict every video.

    Returns:
        What was written: a file or a folder for each.

    Raises:
        OptionError, ModelError, DataError, CheckpointError: Bad input.
    """
    parser = build_parser()
    options = parser.parse_args(arguments)
    _check(options)
    sources = [source for given in options.inputs for source in open_sources(Path(given))]
    targets = _targets(sources, Path(options.output), options.maps)
    torch.manual_seed(options.seed)
    specs = read_peers(parser, options)
    modules, views = build_modules(specs)
    warn_of_random_weights(specs)
    world = start_world(options.device)
    for module in modules:
        module.to(world.device).eval()
    predictor = Predictor(modules, views, world.device, options.blur, amp_dtype(options))
    for source, target in targets.items():
        maps = predictor.run(source.read(), options.batch_size)
        shown = tqdm(
            maps,
            desc=source.name,
            total=source.count,
            unit="frame",
            disable=not sys.stderr.isatty(),
        )
        write = _write_overlay if target.suffix == ".mp4" else _write_maps
        write(target, source, shown, options)
        _logger.info("%s", target)
    return list(targets.values())


def _targets(sources: Sequence[Source], output: Path, maps: bool) -> dict[Source, Path]:
    """Choose what is written for each source; nothing may lie on an input or on another target.

    Raises:
        OptionError: Names the two.
    """
    targets = {
        source: output / (source.name if maps or source.rate is None else f"{source.name}.mp4")
        for source in sources
    }
    places = {source: target.resolve() for source, target in targets.items()}
    for source, place in places.items():
        for other in sources:
            given = other.path.resolve()
            if place == given or place in given.parents or given in place.parents:
                raise OptionError(
                    f"--output: {targets[source]} would be written over the input {other.path}; "
                    "give another folder"
                )
            if other is not source and places[other] == place:
                raise OptionError(
                    f"--output: {source.path} and {other.path} would both be written to "
                    f"{targets[source]}; predict them one by one, with an --output each"
                )
    return targets


def _check(options: argparse.Namespace) -> None:
    check_least(options, {"batch_size": 1, "blur": 0, "strength": 0})
    if options.blur and options.blur % 2 == 0:
        raise OptionError(f"--blur is {options.blur}; expected an odd number of pixels, or 0")
    if options.strength > 1:
        raise OptionError(f"--strength is {options.strength}; expected 0 to 1")
    make_writable(Path(options.output))


@dataclass(frozen=True)
class Source:
    """Frames of one video.

    Attributes:
        path: A video file, or a folder of frames.
        name: Of what is written for it.
        files: Of a folder: its frames in order; of a video file: nothing.
        count: Frames, where that is known.
        rate: Frames a second of a video file.
    """

    path: Path
    name: str
    files: tuple[Path, ...] = ()
    count: int | None = None
    rate: Fraction | None = None

    def read(self) -> Iterator[np.ndarray]:
        """Yield the frames, uint8 RGB [H, W, 3].

        Raises:
            DataError: A frame that cannot be read.
        """
        if self.rate is None:
            yield from (read_frame(str(file)) for file in self.files)
            return
        with _opened(self.path) as container:
            for frame in container.decode(video=0):
                yield frame.to_ndarray(format="rgb24")

    def frame_name(self, number: int) -> str:
        """Return the name of a frame's map, without suffix."""
        return self.files[number].stem if self.files else f"{number + 1:04d}"


def open_sources(path: Path) -> list[Source]:
    """Find the videos that a path means.

    Raises:
        DataError: Nothing is there, or it is no video.
    """
    if not path.exists():
        raise DataError(f"{path}: no such file or folder")
    if path.is_file():
        with _opened(path) as container:
            stream = container.streams.video[0]
            rate = Fraction(stream.average_rate or 25)
            return [Source(path, path.stem, count=stream.frames or None, rate=rate)]
    folders = [path / "images", path]
    for folder in folders:
        files = _frames(folder)
        if files:
            return [Source(folder, path.resolve().name, files, len(files))]
    inside = sorted((p for p in path.iterdir() if p.is_dir()), key=lambda p: natural_key(p.name))
    found = [Source(p, p.name, files, len(files)) for p in inside if (files := _frames_in(p))]
    if not found:
        raise DataError(
            f"{path}: holds no frames; expected images in it, in its folder images/, or in VIDEO/"
            "images/ of several videos"
        )
    return found


def _frames_in(video: Path) -> tuple[Path, ...]:
    return _frames(video / "images") or _frames(video)


def _frames(folder: Path) -> tuple[Path, ...]:
    if not folder.is_dir():
        return ()
    files = [
        p
        for p in folder.iterdir()
        if p.suffix.lower() in IMAGE_SUFFIXES and not p.name.startswith(".")
    ]
    return tuple(sorted(files, key=lambda p: natural_key(p.name)))


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """Open a video file by PyAV."""
    try:
        import av
    except ImportError as error:
        raise DataError(f"{path}: video files need PyAV: pip install av") from error
    try:
        with av.open(str(path)) as container:
            if not container.streams.video:
                raise DataError(f"{path}: has no video in it")
            yield container
    except av.error.FFmpegError as error:
        raise DataError(f"{path}: cannot be read as a video ({error})") from error


class Predictor:
    """Runs models over a video from its first frame to its last; memory holds one window of it.

    Args:
        modules: In evaluation mode, on the device.
        views: Of their clips.
        device: Of the models.
        blur: See ``saliency.metrics.resize_and_blur``.
        amp_dtype: Autocast the forwards to it.
    """

    def __init__(
        self,
        modules: Sequence[nn.Module],
        views: Sequence[ClipView],
        device: torch.device,
        blur: int = 11,
        amp_dtype: torch.dtype | None = None,
    ) -> None:
        self.modules = modules
        self.views = views
        self.device = device
        self.blur = blur
        self.amp_dtype = amp_dtype

    def run(
        self, frames: Iterable[np.ndarray], batch_size: int = 1
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yield every frame with its map, float32 [H, W], the mean of the models'."""
        waiting: list[tuple[np.ndarray, dict[ClipView, Tensor]]] = []
        for frame, clips in windows(frames, self.views):
            waiting.append((frame, clips))
            if len(waiting) == batch_size:
                yield from self._predict(waiting)
                waiting = []
        if waiting:
            yield from self._predict(waiting)

    @torch.inference_mode()
    def _predict(
        self, waiting: Sequence[tuple[np.ndarray, dict[ClipView, Tensor]]]
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        size = waiting[0][0].shape[:2]
        mean: Tensor | float = 0.0
        for module, view in zip(self.modules, self.views, strict=True):
            clips = torch.stack([clips[view] for _, clips in waiting]).to(self.device)
            inputs = view.normalise(clips.permute(0, 4, 1, 2, 3))
            enabled = self.amp_dtype is not None
            with torch.autocast(self.device.type, dtype=self.amp_dtype, enabled=enabled):
                maps = check_output(module(inputs), len(waiting), type(module).__name__)
            maps = resize_and_blur(maps, size, self.blur)
            mean = mean + (over_sum(maps) if len(self.modules) > 1 else maps)
        for (frame, _), map_ in zip(waiting, torch.as_tensor(mean).cpu().numpy(), strict=True):
            yield frame, map_


def windows(
    frames: Iterable[np.ndarray], views: Sequence[ClipView]
) -> Iterator[tuple[np.ndarray, dict[ClipView, Tensor]]]:
    """Yield every frame with the clips around it, uint8 [T, h, w, 3]; each is resized once a size.

    At the video's beginning and end its first and last frame are repeated, as in training.
    """
    before = max(view.before for view in views)
    after = max(max(view.span - 1 - view.before for view in views), 0)
    sizes = {view.size for view in views}
    rest, count, ended = iter(frames), 0, False
    whole: dict[int, np.ndarray] = {}
    kept: dict[int, dict[Any, Tensor]] = {}
    target = 0
    while True:
        while not ended and count <= target + after:
            frame = next(rest, None)
            if frame is None:
                ended = True
            else:
                whole[count] = frame
                kept[count] = {size: resize_frame(frame, size) for size in sizes}
                count += 1
        if target >= count:
            return
        yield (
            whole.pop(target),
            {
                view: torch.stack([kept[i][view.size] for i in view.indices(target, count)])
                for view in views
            },
        )
        # the last frame stays: clips that end after the video repeat it
        if 0 <= target - before < count - 1:
            del kept[target - before]
        target += 1


def _write_maps(
    target: Path,
    source: Source,
    maps: Iterable[tuple[np.ndarray, np.ndarray]],
    options: argparse.Namespace,
) -> None:
    for number, (_, map_) in enumerate(maps):
        write_png(target / f"{source.frame_name(number)}.png", to_bytes(map_))


def _write_overlay(
    target: Path,
    source: Source,
    maps: Iterable[tuple[np.ndarray, np.ndarray]],
    options: argparse.Namespace,
) -> None:
    import av

    unfinished = target.with_name(f".{target.name}")
    with av.open(str(unfinished), "w", format="mp4") as container:
        stream = None
        for frame, map_ in maps:
            # H.264 wants even sides
            height, width = (side - side % 2 for side in frame.shape[:2])
            if stream is None:
                stream = container.add_stream("libx264", rate=source.rate)
                stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
            shown = np.ascontiguousarray(overlay(frame, map_, options.strength)[:height, :width])
            container.mux(stream.encode(av.VideoFrame.from_ndarray(shown, format="rgb24")))
        if stream is None:
            raise DataError(f"{source.path}: has no frames")
        container.mux(stream.encode())
    unfinished.replace(target)


if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # see saliency/train.py
    sys.exit(main())
