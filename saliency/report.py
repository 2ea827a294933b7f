"""The page that an evaluation leaves behind."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from common.report.numbers import number
from common.report.page import (
    Html,
    Summary,
    bullets,
    data_table,
    section,
    settings_section,
    write_page,
)
from saliency.layouts import VideoSet
from saliency.metrics import Scores

_HARDEST = 20
_MEANING = {
    "auc_judd": "area under the curve with thresholds at the fixations (AUC-Judd)",
    "auc_shuffled": "area under the curve against fixations of other frames (s-AUC)",
    "nss": "normalised scanpath saliency, in standard deviations of the map",
    "cc": "Pearson's correlation with the ground-truth map",
    "similarity": "overlap of the two maps as histograms (SIM)",
    "kldiv": "KL divergence from the ground-truth map; lower is better",
}
_HIDDEN = ("config", "kwargs", "check_data")


def write_evaluation_report(
    path: Path, videos: VideoSet, scores: Mapping[str, Scores], settings: Mapping[str, Any]
) -> Path:
    """Write one page: every model's means, and the videos on which the models do worst.

    Args:
        path: The HTML file.
        videos: That were evaluated.
        scores: By model.
        settings: Plain values, shown as they are.

    Returns:
        Where it lies.
    """
    first = next(iter(scores.values()))
    metrics = list(first.mean)
    head = ["Model", *metrics]
    by_frame = [[name, *_cells(its.mean, metrics)] for name, its in scores.items()]
    by_video = [[name, *_cells(its.video_mean, metrics)] for name, its in scores.items()]
    notes = [f"{name}: {_MEANING[name]}." for name in metrics]
    notes += [
        f"{name} is not defined for {count} of {first.frames} frames (no fixations, or a constant "
        "or empty map); they are left out."
        for name, count in first.undefined.items()
        if count
    ]
    notes += [
        f"{name} was computed with {', '.join(f'{k} = {v}' for k, v in flags.items())}."
        for name, flags in first.flags.items()
        if flags
    ]
    shown = {name: value for name, value in settings.items() if name not in _HIDDEN}
    summary = Summary(
        kind="Evaluation",
        verdict=_verdict(scores),
        facts={"Models": len(scores), "Videos": len(first.videos), "Frames": first.frames},
    )
    sections = [
        section(
            "Scores",
            data_table(f"Means over {first.frames} frames of {videos}.", head, by_frame),
            data_table(f"Means over {len(first.videos)} videos.", head, by_video),
            bullets(notes),
        ),
        section("Videos", _hardest(scores)),
        settings_section(shown),
    ]
    return write_page(path, f"{videos.name}, {videos.split}", summary, sections)


def _verdict(scores: Mapping[str, Scores]) -> list[str]:
    """Say which model does best."""
    found = {name: its.mean["cc"] for name, its in scores.items()}
    best = max(found, key=lambda name: found[name])
    if len(found) == 1:
        return [f"{best} reaches a CC of {number(found[best], 4)} in the mean over frames."]
    return [f"{best} does best, with a CC of {number(found[best], 4)} in the mean over frames."]


def _cells(means: Mapping[str, float], metrics: Sequence[str]) -> list[str]:
    return [number(means[name], 4) for name in metrics]


def _hardest(scores: Mapping[str, Scores]) -> Html:
    """Show the videos with the lowest CC, in the mean of all models."""
    names = list(scores)
    rows = []
    for video in next(iter(scores.values())).videos:
        found = [scores[name].videos[video]["cc"] for name in names]
        rows.append((sum(found) / len(found), video, found))
    rows.sort(key=lambda row: (row[0] != row[0], row[0]))  # NaN last
    shown = [[video, *(number(cc, 4) for cc in found)] for _, video, found in rows[:_HARDEST]]
    caption = f"CC on the {len(shown)} videos where it is lowest; videos.csv has all."
    return data_table(caption, ["Video", *names], shown)
