"""Paired comparisons over seeds: what they show, and what they do not."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import stats

from common.significance import holm, sign_flip_test, smallest_p

# fewer seeds than this show nothing, whatever their interval
ENOUGH_SEEDS = 5
TARGETS = ("mean", "strongest", "weakest", "ensemble")
# named before any result is seen: headline claims are of this one alone
PRIMARY = "mean"
FLIPS = ("fixed", "broken")
UNITS = ("epoch", "iteration")

Result = Mapping[str, Any]
Table = dict[str, dict[int, Result]]


@dataclass(frozen=True)
class Interval:
    """A mean and its confidence interval.

    Attributes:
        mean: Of the differences.
        low: Lower end; NaN where one difference cannot tell.
        high: Upper end; NaN as ``low``.
        count: Differences.
    """

    mean: float
    low: float
    high: float
    count: int

    @property
    def excludes_zero(self) -> bool:
        """Whether all of the interval lies on one side of zero; False where its ends are NaN."""
        return self.low > 0 or self.high < 0


def paired_interval(differences: Sequence[float], level: float = 0.95) -> Interval:
    """Estimate the mean of paired differences, with Student's t.

    Args:
        differences: One a pair (for instance a seed), finite.
        level: Of confidence, in (0, 1).

    Returns:
        Mean and ends; the ends of a single difference are NaN.

    Raises:
        ValueError: No difference, one that is not finite, or a level outside (0, 1).
    """
    values = np.asarray(differences, dtype=np.float64)
    if values.ndim != 1 or not len(values):
        raise ValueError(f"expected a sequence of differences, got shape {values.shape}")
    if not np.isfinite(values).all():
        raise ValueError(f"differences must be finite, got {values.tolist()}")
    if not 0 < level < 1:
        raise ValueError(f"level must be between 0 and 1, got {level}")
    mean, count = float(values.mean()), len(values)
    if count == 1:
        return Interval(mean, math.nan, math.nan, count)
    error = float(values.std(ddof=1)) / math.sqrt(count)
    reach = float(stats.t.ppf((1 + level) / 2, count - 1)) * error
    return Interval(mean, mean - reach, mean + reach, count)


def summarise(
    results: Sequence[Result],
    names: Sequence[str],
    control: str,
    *,
    arms: Sequence[str] | None = None,
    metric: str = "top1",
    lower_is_better: bool = False,
    chosen: str = "best",
    chance: str = "random",
    pairs: Sequence[tuple[str, str]] = (),
    level: float = 0.95,
) -> dict[str, Any]:
    """Compare arms over seeds with a control that had the same seeds.

    Args:
        results: One an arm and seed: ``arm``, ``seed``, ``before`` and ``after`` (values by peer);
            where there are such ``fixed`` and ``broken`` (counts by peer), ``ensemble_before``,
            ``ensemble_after``, ``oracle_before``, ``oracle_after``, ``lessons`` (rows by
            epoch or iteration).
        names: The peers'.
        control: The arm that the others are compared with.
        arms: Which, in order; None: as they come in the results.
        metric: What the values are called.
        lower_is_better: Of the metric. Gains are turned so that positive is better.
        chosen: The arm that is compared with every other one, if it is there.
        chance: The arm that differs from ``chosen`` only in drawing its teachers.
        pairs: Arms to compare with one another, first minus second.
        level: Of the intervals.

    Returns:
        Plain containers; None where a number is not known. ``arms`` has for each arm its ``peers``
        (before, after, fixed, broken), ``before`` and ``after`` of the group, and ``lessons`` (mean
        over seeds). ``gains`` and ``peer_gains`` are over the control, ``versus`` is ``chosen``
        minus each other arm, ``pairs`` has a list of ``first``, ``second`` and ``effects``. Every
        effect has the p-value of ``common.significance.sign_flip_test``, uncorrected. The strongest
        and the weakest peer are those at the start of a seed.

    Raises:
        ValueError: No result; an arm, seed or peer that is missing, twice or not finite.
    """
    table = _by_arm_and_seed(results, names)
    arms = list(table) if arms is None else list(arms)
    for arm in [control, *arms, *(arm for pair in pairs for arm in pair)]:
        if arm not in table or arm not in arms:
            raise ValueError(f"no results of arm {arm!r}; there are: {', '.join(table)}")
    table = {arm: table[arm] for arm in arms}
    ranked = _rank_at_start(table, names, lower_is_better)
    peers = {arm: {seed: row["after"] for seed, row in table[arm].items()} for arm in arms}
    group = {arm: _group_values(table[arm], ranked, "after") for arm in arms}
    targets = _targets(names, group)
    sign = -1 if lower_is_better else 1
    others = [arm for arm in arms if arm != control]
    rest = [arm for arm in arms if arm != chosen] if chosen in arms else []
    return {
        "names": list(names),
        "metric": metric,
        "lower_is_better": lower_is_better,
        "control": control,
        "chosen": chosen if chosen in arms else None,
        "chance": chance if chance in arms else None,
        "level": level,
        "seeds": sorted(ranked),
        "targets": targets,
        "strongest": {str(seed): order[0] for seed, order in ranked.items()},
        "weakest": {str(seed): order[-1] for seed, order in ranked.items()},
        "arms": {arm: _describe_arm(table[arm], names, ranked) for arm in arms},
        "gains": {
            arm: _effects(group[arm], group[control], targets, sign, level) for arm in others
        },
        "peer_gains": {
            arm: _effects(peers[arm], peers[control], names, sign, level) for arm in others
        },
        "versus": {arm: _effects(group[chosen], group[arm], targets, sign, level) for arm in rest},
        "pairs": [
            {
                "first": first,
                "second": second,
                "effects": _effects(group[first], group[second], targets, sign, level)
                | _effects(peers[first], peers[second], names, sign, level),
            }
            for first, second in pairs
        ],
    }


def compared(
    results: Sequence[Result],
    names: Sequence[str],
    control: str,
    *,
    arms: Sequence[str] | None = None,
    chosen: str = "best",
    chance: str = "random",
    **rest: Any,
) -> dict[str, Any]:
    """Compare arms with a control, and correct as experiments do.

    Args:
        results, names, control, arms, chosen, chance, rest: As of ``summarise``. Where ``chosen``
            and ``chance`` are there and neither is the control, they are compared directly too.

    Returns:
        As ``corrected``.

    Raises:
        ValueError: As ``summarise``.
    """
    known = set(arms if arms is not None else (row["arm"] for row in results))
    rest |= {"arms": arms, "chosen": chosen, "chance": chance}
    if len({chosen, chance, control}) == 3 and known.issuperset((chosen, chance)):
        rest["pairs"] = [(chosen, chance)]
    return corrected(summarise(results, names, control, **rest))


def corrected(
    summary: Mapping[str, Any], together: bool = False, counts: bool = True
) -> dict[str, Any]:
    """Correct a summary's effects for their number, and call shown only what then still is.

    The families: all arms against the control, and all ``pairs``; each for every target (a peer,
    the mean, the ensemble) by itself, or for all targets together. One of them is primary: the
    arms against the control, for ``PRIMARY`` or for all targets together. Where nothing is true,
    it shows something in at most 1 minus the level of all experiments, which is not so of several
    families taken together.

    Args:
        summary: From ``summarise``.
        together: One family over all targets.
        counts: Whether the summary is of the metric and the weights that count; of others, no
            family is primary.

    Returns:
        The summary; effects have ``p_holm``, ``primary`` (whether they are of that family), and
        ``shown`` means that ``p_holm`` is at most 1 minus the level, that the interval leaves
        zero out (one seed that stands apart widens it, and not p), and that enough seeds tell.
        ``families`` lists each family's ``name``, ``size``, whether it is ``primary``, and the
        ``least_seeds`` with which an effect of it can be shown at all; a family that is another
        by another name (see ``distinct_targets``) is left out.
    """
    found = copy.deepcopy(dict(summary))
    alpha = 1 - summary["level"]
    gains = [{**effects, **found["peer_gains"][arm]} for arm, effects in found["gains"].items()]
    found["families"] = []
    distinct = distinct_targets(summary)
    for name, rows, leads in (
        (f"arms against {summary['control']}", gains, counts),
        ("direct comparisons", [row["effects"] for row in found["pairs"]], False),
    ):
        targets = list(dict.fromkeys(what for row in rows for what in row))
        for group in [targets] if together else [[what] for what in targets]:
            members = [row[what] for row in rows for what in group if row.get(what) is not None]
            primary = leads and (together or group == [PRIMARY])
            for effect, p in zip(members, holm([e["p"] for e in members]), strict=True):
                effect["p_holm"], effect["primary"] = p, primary
                effect["shown"] = (
                    effect["shown"] and p <= alpha
                )  # as summarise had it: its interval
            if members and (together or group[0] in distinct):
                told = f"{name}, {'all targets' if together else group[0]}"
                least = _least_seeds(len(members), alpha)
                found["families"].append(
                    {"name": told, "size": len(members), "primary": primary, "least_seeds": least}
                )
    return found


def distinct_targets(summary: Mapping[str, Any]) -> list[str]:
    """List targets and peers, each thing once.

    Left out is the strongest or weakest peer where that is one peer for every seed, whose name
    says more, and a single peer, which is its own mean.
    """
    names = summary["names"]
    same = [what for what in ("strongest", "weakest") if len(set(summary[what].values())) == 1]
    return [
        *(what for what in summary["targets"] if what not in same),
        *(names if len(names) > 1 else ()),
    ]


def headline(summary: Mapping[str, Any]) -> dict[str, dict[str, dict[str, Any]]]:
    """Return by arm and target what the primary family shows: all that may be claimed first.

    Args:
        summary: From ``corrected``.
    """
    found = {}
    for arm, effects in summary["gains"].items():
        every = {**effects, **summary["peer_gains"][arm]}
        told = {what: every[what] for what in distinct_targets(summary) if every[what] is not None}
        shown = {what: e for what, e in told.items() if e["primary"] and e["shown"]}
        if shown:
            found[arm] = shown
    return found


def _least_seeds(size: int, alpha: float) -> int:
    """Return how many seeds can show an effect in a family of that size."""
    count = ENOUGH_SEEDS
    while size * smallest_p(count) > alpha:
        count += 1
    return count


def _by_arm_and_seed(results: Sequence[Result], names: Sequence[str]) -> Table:
    if not results or not names:
        raise ValueError("nothing to compare: no results or no peers")
    table: Table = {}
    for row in results:
        where = f"arm {row['arm']!r}, seed {row['seed']}"
        seeds = table.setdefault(row["arm"], {})
        if row["seed"] in seeds:
            raise ValueError(f"{where}: two results; expected one an arm and seed")
        for when in ("before", "after"):
            for name in names:
                value = row[when].get(name)
                if value is None or not math.isfinite(value):
                    raise ValueError(f"{where}: {when!r} of peer {name!r} is {value}, not a number")
        seeds[row["seed"]] = row
    return table


def _rank_at_start(
    table: Table, names: Sequence[str], lower_is_better: bool
) -> dict[int, list[str]]:
    """Order the peers from strongest to weakest in each seed, by their start's mean over arms."""
    sign = 1 if lower_is_better else -1
    ranked = {}
    for seed in sorted({seed for rows in table.values() for seed in rows}):
        rows = [seeds[seed] for seeds in table.values() if seed in seeds]
        start = {name: float(np.mean([row["before"][name] for row in rows])) for name in names}
        ranked[seed] = sorted(names, key=lambda name: sign * start[name])
    return ranked


def _group_values(
    rows: Mapping[int, Result], ranked: Mapping[int, list[str]], when: str
) -> dict[int, dict[str, Any]]:
    return {
        seed: {
            "mean": float(np.mean([row[when][name] for name in ranked[seed]])),
            "strongest": row[when][ranked[seed][0]],
            "weakest": row[when][ranked[seed][-1]],
            "ensemble": _known(row.get(f"ensemble_{when}")),
            "oracle": _known(row.get(f"oracle_{when}")),
        }
        for seed, row in rows.items()
    }


def _targets(
    names: Sequence[str], group: Mapping[str, Mapping[int, Mapping[str, Any]]]
) -> list[str]:
    """List what can be compared: one peer is its own mean, and not every task has an ensemble."""
    if len(names) == 1:
        return ["mean"]
    rows = [row for by_seed in group.values() for row in by_seed.values()]
    return [what for what in TARGETS if any(row[what] is not None for row in rows)]


def _effects(
    ours: Mapping[int, Mapping[str, Any]],
    theirs: Mapping[int, Mapping[str, Any]],
    targets: Sequence[str],
    sign: int,
    level: float,
) -> dict[str, dict[str, Any] | None]:
    return {what: _effect(ours, theirs, what, sign, level) for what in targets}


def _effect(
    ours: Mapping[int, Mapping[str, Any]],
    theirs: Mapping[int, Mapping[str, Any]],
    what: str,
    sign: int,
    level: float,
) -> dict[str, Any] | None:
    """Compare two arms over the seeds both have; None where there is no such seed."""
    differences = [
        sign * (ours[seed][what] - theirs[seed][what])
        for seed in ours
        if seed in theirs and None not in (ours[seed][what], theirs[seed][what])
    ]
    if not differences:
        return None
    interval, test = paired_interval(differences, level), sign_flip_test(differences)
    # seeds that all give the same difference are one run seen several times
    varies = max(differences) - min(differences) > 1e-9 * max(1.0, abs(interval.mean))
    return {
        **_told(interval),
        "varies": varies,
        "p": test.p,
        "p_error": test.error,
        "shown": interval.excludes_zero and interval.count >= ENOUGH_SEEDS and varies,
    }


def _describe_arm(
    rows: Mapping[int, Result], names: Sequence[str], ranked: Mapping[int, list[str]]
) -> dict[str, Any]:
    group = {when: _group_values(rows, ranked, when) for when in ("before", "after")}
    return {
        "seeds": len(rows),
        **{
            when: {
                what: _spread([row[what] for row in group[when].values()])
                for what in (*TARGETS, "oracle")
            }
            for when in group
        },
        "peers": {name: _describe_peer(list(rows.values()), name) for name in names},
        "lessons": mean_rows([row.get("lessons") or () for row in rows.values()]),
    }


def _describe_peer(rows: Sequence[Result], name: str) -> dict[str, Any]:
    return {
        **{when: _spread([row[when][name] for row in rows]) for when in ("before", "after")},
        **{what: _mean([row.get(what, {}).get(name) for row in rows]) for what in FLIPS},
    }


def _spread(values: Sequence[Any]) -> dict[str, float | None] | None:
    """Return mean and standard deviation over seeds; None where nothing, or one seed, tells."""
    known = [value for value in map(_known, values) if value is not None]
    if not known:
        return None
    deviation = float(np.std(known, ddof=1)) if len(known) > 1 else None
    return {"mean": float(np.mean(known)), "sd": deviation}


def _mean(values: Sequence[Any]) -> float | None:
    known = [value for value in map(_known, values) if value is not None]
    return float(np.mean(known)) if known else None


def mean_rows(runs: Sequence[Sequence[Mapping[str, Any]]]) -> list[dict[str, float | None]]:
    """Average rows of the same epoch over the seeds, number by number."""
    unit = unit_of([row for run in runs for row in run])
    epochs: dict[int, list[Mapping[str, Any]]] = {}
    for run in runs:
        for row in run:
            epochs.setdefault(int(row[unit]), []).append(row)
    return [{unit: epoch, **_mean_row(rows)} for epoch, rows in sorted(epochs.items())]


def unit_of(rows: Sequence[Mapping[str, Any]]) -> str:
    """Say in what the rows count: epochs, or iterations where the host has no epochs."""
    return next((unit for unit in UNITS if rows and unit in rows[0]), UNITS[0])


def interval_rows(
    runs: Sequence[Sequence[Mapping[str, Any]]], keys: Sequence[str], level: float = 0.95
) -> list[dict[str, Any]]:
    """Give each key's ``interval_of`` over the seeds, for rows of the same epoch.

    Args:
        runs: Rows of each seed.
        keys: Which numbers.
        level: Of confidence.

    Returns:
        A row an epoch, in order; a key is None where no seed has a number.
    """
    unit = unit_of([row for run in runs for row in run])
    found = []
    for epoch in sorted({int(row[unit]) for run in runs for row in run}):
        rows = [row for run in runs for row in run if int(row[unit]) == epoch]
        of = {key: interval_of([row.get(key) for row in rows], level) for key in keys}
        found.append({unit: epoch, **of})
    return found


def interval_of(values: Sequence[Any], level: float = 0.95) -> dict[str, Any] | None:
    """Return mean, interval (``paired_interval``) and count of the numbers that are known.

    Args:
        values: Over seeds; differences with the same seed make the interval a paired one.
        level: Of confidence.

    Returns:
        ``mean``, ``low``, ``high``, ``count``; the ends of a single number are None. None where
        nothing is known.
    """
    known = [value for value in map(_known, values) if value is not None]
    return _told(paired_interval(known, level)) if known else None


def _told(interval: Interval) -> dict[str, Any]:
    return {
        "mean": interval.mean,
        "low": _known(interval.low),
        "high": _known(interval.high),
        "count": interval.count,
    }


def _mean_row(rows: Sequence[Mapping[str, Any]]) -> dict[str, float | None]:
    keys = dict.fromkeys(key for row in rows for key in row if key not in UNITS)
    return {key: _mean([row.get(key) for row in rows]) for key in keys}


def _known(value: Any) -> float | None:
    return None if value is None or not math.isfinite(value) else float(value)
