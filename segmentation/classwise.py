"""Intersection over union from samples of pixels, and what each class has to gain from others."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from common.survey import LogitSource, Survey

_STRETCH = 2**14  # pixels


def class_iou(answer: Tensor, truth: Tensor, weight: Tensor, classes: int) -> Tensor:
    """Estimate each class's intersection over union from a sample of pixels.

    Args:
        answer: Class told of each pixel [n].
        truth: Its class [n].
        weight: For how many pixels each stands [n].
        classes: C.

    Returns:
        [C] float64, in [0, 1]; NaN for a class that is nowhere true, as Detectron2 leaves it out.
    """
    cells = truth.long() * classes + answer.long()
    confusion = torch.bincount(cells, weights=weight.double(), minlength=classes**2)
    confusion = confusion.view(classes, classes)
    both, true, told = confusion.diagonal(), confusion.sum(dim=1), confusion.sum(dim=0)
    return torch.where(true > 0, both / (true + told - both), torch.nan)


def mean_iou(of_class: Tensor) -> float:
    """Return the mean over the classes that are there."""
    return float(of_class.nanmean())


def flips_by_class(found: Survey, truth: Tensor, classes: int) -> Tensor:
    """Say for every class on what share of its pixels t is right and s is wrong.

    Returns:
        [M(t), M(s), C] float64; NaN for a class that is nowhere true.
    """
    assert found.correct is not None
    models = len(found.correct)
    shares = torch.full((models, models, classes), torch.nan, dtype=torch.float64)
    for k in truth.unique().tolist():
        right = found.correct[:, truth == k].double()
        shares[:, :, k] = right @ (1 - right).T / right.shape[1]
    return shares


def ensemble_answers(source: LogitSource, members: Sequence[int]) -> Tensor:
    """Return the class that the mean of the members' probabilities tells [n]."""
    parts = []
    for start in range(0, source.count, _STRETCH):
        stop = min(start + _STRETCH, source.count)
        p = torch.stack([source.read(i, start, stop).softmax(dim=1) for i in members])
        parts.append(p.sum(dim=0).argmax(dim=1))
    return torch.cat(parts)


def oracle_answers(
    found: Survey, members: Sequence[int], together: Tensor, truth: Tensor
) -> Tensor:
    """Return the truth where at least one member tells it, else what all together say [n]."""
    assert found.correct is not None
    return torch.where(found.correct[list(members)].any(dim=0), truth, together)


def class_rows(
    found: Survey,
    truth: Tensor,
    weight: Tensor,
    names: Sequence[str],
    members: Sequence[int],
    of_class: Sequence[Tensor],
) -> list[dict[str, Any]]:
    """Describe a team class by class, the most frequent first.

    Args:
        found: The survey.
        truth: Class of each pixel [n].
        weight: For how many pixels each stands [n].
        names: Of the classes.
        members: Of the team.
        of_class: Each model's IoU by class [C].

    Returns:
        For each class that is there its ``class``, its ``share`` of all pixels, and by member
        ``iou`` and ``learns``: on what share of the class's pixels it is wrong and another right.
    """
    assert found.correct is not None
    right = found.correct[list(members)]
    others = right.any(dim=0) & ~right
    rows = []
    for k in truth.unique().tolist():
        here = truth == k
        rows.append(
            {
                "class": names[k],
                "share": float(weight[here].sum() / weight.sum()),
                "iou": {found.names[i]: float(of_class[i][k]) for i in members},
                "learns": {
                    found.names[i]: float(row[here].double().mean())
                    for i, row in zip(members, others, strict=True)
                },
            }
        )
    return sorted(rows, key=lambda row: -row["share"])
