"""Whether finished runs began where scouting sees their models."""

from __future__ import annotations

import math
from collections.abc import Sequence
from operator import itemgetter

from torch import Tensor

from common.realised import FinishedRun
from common.report.numbers import difference_unit, number

_POINTS = 2.0  # of a metric in percent; of others so many percent of the value, or of 1
_ERRORS = 3.0  # standard errors that chance may make


def unlike_starts(
    runs: Sequence[FinishedRun],
    names: Sequence[str],
    metric: str,
    scouted: Tensor,
    same_samples: Sequence[bool],
    before: Sequence[Sequence[float]] | None = None,
) -> list[str]:
    """Say which models a run began with at another metric than they are scouted at.

    Other samples alone move it: by chance, of which three standard errors are allowed for.

    Args:
        runs: All, controls too.
        names: Of the models.
        metric: Which one.
        scouted: It for every model, in its unit, on parts of what is scouted on that are
            independent of one another [M, n]; their mean counts.
        same_samples: Of each run, whether it was evaluated on exactly these.
        before: The metric of each run's members at its start; None: ``FinishedRun.before``.

    Returns:
        A sentence a model, about the run that differs most.
    """
    values = scouted.double()
    means = values.mean(dim=1).tolist()
    count = values.shape[1]
    spread = [math.inf] * len(means)  # of one part it is not known
    if count > 1:
        spread = (values.std(dim=1) / count**0.5).tolist()
    found: dict[int, list[tuple[float, float, str]]] = {}
    begun: dict[int, int] = {}
    for k, run in enumerate(runs):
        starts = run.before if before is None else before[k]
        for i, start in zip(run.members, starts, strict=True):
            begun[i] = begun.get(i, 0) + 1
            apart = abs(start - means[i])
            chance = 0.0 if same_samples[k] else _ERRORS * 2**0.5 * spread[i]
            if apart > max(_limit(metric, means[i]), chance):
                found.setdefault(i, []).append((apart, start, run.title))
    digits = 1 if difference_unit(metric) == "points" else 3
    told = []
    for i, several in sorted(found.items()):
        _, start, title = max(several, key=itemgetter(0))
        told.append(
            f"{names[i]} is scouted at {metric} {number(means[i], digits)}, but {title} began "
            f"with it at {number(start, digits)} ({len(several)} of {begun[i]} runs differ): data, "
            "view or preprocessing are not the same, so the comparison is suspect"
        )
    return told


def _limit(metric: str, value: float) -> float:
    if difference_unit(metric) == "points":
        return _POINTS
    return _POINTS / 100 * max(1.0, abs(value))
