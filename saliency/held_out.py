"""A part of the training videos, held out to choose by, so that the test videos choose nothing."""

from __future__ import annotations

import re
from dataclasses import replace

import numpy as np

from common.options import OptionError
from saliency.layouts import VideoSet

HELD_OUT = "held-out"
_SHOT = re.compile(r"(.+)_\d+")


def split_held_out(videos: VideoSet, share: float, seed: int) -> tuple[VideoSet, VideoSet]:
    """Hold a share of the training videos out, whole ones: frames of a video are alike.

    Shots of one film clip (Hollywood-2's ``actioncliptrain00001_1``, ``_2``) stay together.

    Args:
        videos: Of the training split.
        share: Of the videos, in (0, 1); at least one is held out.
        seed: Of the draw, which depends on it and on the names alone.

    Returns:
        The rest, to train on, and the part held out, whose ``split`` is ``held-out``; both in the
        split's order. Faults of the listing stay with the rest.

    Raises:
        OptionError: Nothing would be left to train on.
    """
    films = list(dict.fromkeys(film_of(videos, video.name) for video in videos.videos))
    count = max(1, round(share * len(films)))
    if count >= len(films):
        raise OptionError(
            f"--held-out {share:g}: {videos} has {len(films)} videos; nothing would be left to "
            "train on; take a smaller share"
        )
    order = np.random.default_rng([seed, 2]).permutation(len(films))
    chosen = {films[k] for k in order[:count].tolist()}
    parts: tuple[list, list] = ([], [])
    for video in videos.videos:
        parts[film_of(videos, video.name) in chosen].append(video)
    rest, part = map(tuple, parts)
    return replace(videos, videos=rest), replace(videos, videos=part, split=HELD_OUT, faults=())


def film_of(videos: VideoSet, name: str) -> str:
    """Say what a video was cut from: itself, but for the shots of Hollywood-2."""
    shot = _SHOT.fullmatch(name) if videos.name == "hollywood2" else None
    return shot.group(1) if shot else name
