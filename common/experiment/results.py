"""What came of an experiment: rows, tests, tables in CSV and JSON, the report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from common.demo import write_json
from common.disk import write_csv
from common.experiment.corruptions import CORRUPTED, label_of
from common.experiment.plan import MEASURES, START, Experiment
from common.experiment.sources import merged
from common.experiment.task import CALIBRATION, RECALIBRATED, TEMPERATURE, Task
from common.experiment.work import finished
from common.options import OptionError
from common.report import write_experiment
from common.statistics import FLIPS, corrected, interval_of, interval_rows, mean_rows, summarise

GROUPS = ("ensemble", "oracle")
Found = Mapping[str, Any]


def write_results(experiment: Experiment, task: Task) -> Path:
    """Write ``report.html``, ``runs.csv``, ``comparisons.csv`` and ``analysis.json``.

    Returns:
        The report.

    Raises:
        OptionError: The control or every other arm has no finished run.
    """
    found = gather(experiment)
    analysis = analyse(experiment, task, found)
    output = experiment.output
    write_csv(output / "runs.csv", run_rows(task, found))
    write_csv(output / "comparisons.csv", comparison_rows(analysis))
    write_json(output / "analysis.json", analysis)
    return write_experiment(output / "report.html", experiment.title, analysis)


def gather(experiment: Experiment) -> list[dict[str, Any]]:
    """Return what came of every finished arm and seed, each with its seed's starts.

    Raises:
        OptionError: The control or every other arm has no finished run.
    """
    rows = []
    for arm in experiment.arms:
        for seed in experiment.seeds:
            result, start = (finished(experiment, one, seed) for one in (arm, START))
            if result is not None and start is not None:
                rows.append({**result, START: start})
    if {experiment.control} >= {row["arm"] for row in rows}:
        raise OptionError(
            f"{experiment.output}: nothing to compare yet; the control {experiment.control} and "
            "one more arm must have finished a seed; without --report, jobs are run"
        )
    if experiment.control not in {row["arm"] for row in rows}:
        raise OptionError(f"the control {experiment.control} has not finished any seed yet")
    return rows


def analyse(experiment: Experiment, task: Task, found: Sequence[Found]) -> dict[str, Any]:
    """Compare the arms.

    Args:
        experiment: As it was asked for.
        task: Whose metric counts.
        found: From ``gather``.

    Returns:
        Plain containers. ``test`` and ``other`` are ``common.statistics.corrected`` summaries of
        the primary weights and of the others, ``calibration`` of the calibration error,
        ``recalibrated`` of what is left of it at temperatures fitted on the held-out part, which
        ``temperatures`` has, ``beside`` of the task's other metrics; ``robustness`` has one of the
        mean over all corruptions, with families of its own, by corruption summaries that nothing
        corrects, and the mean calibration errors where they are known.
    """
    names = list(found[0]["epochs"])
    arms = [arm for arm in experiment.arms if any(row["arm"] == arm for row in found)]
    pairs = [pair for pair in experiment.pairs if set(pair) <= set(arms)]

    def uncorrected(which: str, metric: str, lower: bool) -> dict[str, Any]:
        rows = [_result(row, names, which, metric) for row in found]
        return summarise(
            rows,
            names,
            experiment.control,
            arms=arms,
            metric=metric,
            lower_is_better=lower,
            pairs=pairs,
        )

    def compare(which: str, metric: str, lower: bool) -> dict[str, Any]:
        counts = (which, metric) == (primary, task.metric)
        return corrected(uncorrected(which, metric, lower), experiment.together, counts)

    def robustness() -> dict[str, Any]:
        of, lower = f"{task.metric}@", task.lower_is_better
        labels = [label_of(one) for one in experiment.corruptions]
        return {
            "mean": compare(primary, of + CORRUPTED, lower),
            "each": {label: uncorrected(primary, of + label, lower) for label in labels},
            "calibration": error(f"{CALIBRATION}@{CORRUPTED}"),
            "recalibrated": error(f"{RECALIBRATED}@{CORRUPTED}"),
        }

    def error(metric: str) -> dict[str, Any] | None:
        """Compare a calibration error, where all runs tell it."""
        known = all(f"{names[0]}/{metric}" in one["metrics"] for one in told)
        return compare(primary, metric, True) if known else None

    primary = experiment.primary
    histories = {arm: [row["history"] for row in found if row["arm"] == arm] for arm in arms}
    told = [metrics for row in found for metrics in (row[primary], row[START]["test"])]
    recalibrated = error(RECALIBRATED)
    return {
        "names": names,
        "primary": primary,
        "together": experiment.together,
        "test": compare(primary, task.metric, task.lower_is_better),
        "other": {
            which: compare(which, task.metric, task.lower_is_better)
            for which in MEASURES
            if which != primary
        },
        "calibration": error(CALIBRATION),
        "recalibrated": recalibrated,
        "temperatures": _temperatures(found, primary, names) if recalibrated else None,
        "robustness": robustness() if experiment.corruptions else None,
        "beside": {
            metric: compare(primary, metric, lower)
            for metric, lower in getattr(task, "others", {}).items()
            if all(f"{name}/{metric}" in row[primary]["metrics"] for row in found for name in names)
        },
        "flips": getattr(task, "flips", None),
        "classes": _class_gains(experiment, task, found, names),
        "curves": {arm: mean_rows(rows) for arm, rows in histories.items()},
        "bands": {
            arm: interval_rows(rows, [f"{name}/{task.metric}" for name in names])
            for arm, rows in histories.items()
        },
        "epochs": {arm: _mean_by_peer(found, arm, names) for arm in arms},
        "cost": {arm: _cost([row["cost"] for row in found if row["arm"] == arm]) for arm in arms},
        "about": {arm: experiment.arms[arm].about for arm in arms},
        "settings": _settings(experiment),
        "sources": merged(row[START].get("sources", {}) for row in found),
        "versions": merged(one.get("versions", {}) for row in found for one in (row[START], row)),
        "missing": [
            f"{arm}:{seed}"
            for arm in experiment.arms
            for seed in experiment.seeds
            if not any((row["arm"], row["seed"]) == (arm, seed) for row in found)
        ],
    }


def _result(row: Found, names: Sequence[str], which: str, metric: str) -> dict[str, Any]:
    """Return a run as ``common.statistics.summarise`` takes it."""
    before, after = row[START]["test"]["metrics"], row[which]["metrics"]
    result: dict[str, Any] = {
        "arm": row["arm"],
        "seed": row["seed"],
        "before": {name: before[f"{name}/{metric}"] for name in names},
        "after": {name: after[f"{name}/{metric}"] for name in names},
        "lessons": row["lessons"],
    }
    for group in GROUPS:
        if f"{group}/{metric}" in after:
            result[f"{group}_before"] = before.get(f"{group}/{metric}")
            result[f"{group}_after"] = after[f"{group}/{metric}"]
    for flip in FLIPS:
        if f"{names[0]}/{flip}" in after and "@" not in metric:
            result[flip] = {name: after[f"{name}/{flip}"] for name in names}
    return result


def _class_gains(
    experiment: Experiment, task: Task, found: Sequence[Found], names: Sequence[str]
) -> dict[str, Any]:
    """Return each class's gain over the control, by arm and peer: over the seeds both have.

    Nothing corrects for the number of classes.
    """
    primary, control = experiment.primary, experiment.control
    sign = -1 if task.lower_is_better else 1
    table = {(row["arm"], row["seed"]): row[primary]["classes"] for row in found}
    gains: dict[str, Any] = {}
    for (arm, seed), classes in table.items():
        if arm == control or (control, seed) not in table:
            continue
        for name in classes:
            for kind, value in classes[name].items():
                base = table[control, seed][name].get(kind)
                if base is not None:
                    of_peer = gains.setdefault(arm, {}).setdefault(name, {})
                    of_peer.setdefault(kind, []).append(sign * (value - base))
    return {
        arm: {
            name: {kind: interval_of(values) for kind, values in of_peer.items()}
            for name, of_peer in peers.items()
        }
        for arm, peers in gains.items()
    }


def _temperatures(found: Sequence[Found], which: str, names: Sequence[str]) -> dict[str, Any]:
    """Return by arm and peer the mean, the least and the largest temperature over the seeds."""
    values: dict[str, dict[str, list[float]]] = {}
    for row in found:
        of_arm = values.setdefault(row["arm"], {})
        for name in names:
            fitted = row[which]["metrics"][f"{name}/{TEMPERATURE}"]
            of_arm.setdefault(name, []).append(fitted)
    return {
        arm: {
            name: {"mean": float(np.mean(t)), "least": min(t), "largest": max(t)}
            for name, t in peers.items()
        }
        for arm, peers in values.items()
    }


def _mean_by_peer(found: Sequence[Found], arm: str, names: Sequence[str]) -> dict[str, float]:
    rows = [row["epochs"] for row in found if row["arm"] == arm]
    return {name: float(np.mean([row[name] for row in rows])) for name in names}


def _cost(costs: Sequence[Found]) -> dict[str, float | None]:
    """Average the runs that were not interrupted; nothing where there is none."""
    known = [cost for cost in costs if "cpu_seconds" in cost]
    cost: dict[str, float | None] = {"runs": len(costs), "whole_runs": len(known)}
    for key in ("updates", "wall_seconds", "cpu_seconds", "gpu_bytes"):
        values = [one[key] for one in known if key in one]
        cost[key] = float(np.mean(values)) if values else None
    return cost


def _settings(experiment: Experiment) -> dict[str, Any]:
    tried = [str(setting) for setting in experiment.tuned if setting]
    return {
        "peers": [", ".join(f"{k}={v}" for k, v in peer.items()) for peer in experiment.peers],
        "seeds": experiment.seeds,
        **experiment.train,
        "corruptions": [label_of(one) for one in experiment.corruptions] or None,
        "tried settings, chosen by the held-out part": tried or None,
    }


def run_rows(task: Task, found: Sequence[Found]) -> list[dict[str, Any]]:
    """List every run: what was measured at its start, its chosen and its last weights."""
    rows = []
    for row in found:
        flat: dict[str, Any] = {"arm": row["arm"], "seed": row["seed"]}
        for name, epoch in row["epochs"].items():
            flat[f"{name}/chosen_epoch"] = epoch
        for when, metrics in (
            (START, row[START]["test"]["metrics"]),
            *((which, row[which]["metrics"]) for which in MEASURES),
        ):
            flat |= {f"{when}/{key}": value for key, value in metrics.items()}
        rows.append(flat | {f"cost/{key}": value for key, value in row["cost"].items()})
    return rows


def spoilt_errors(robustness: Mapping[str, Any] | None) -> list[dict[str, Any]]:
    """Return the summaries of the calibration errors on the spoilt test set, if there are any."""
    both = [robustness[x] for x in ("calibration", "recalibrated")] if robustness else []
    return [one for one in both if one]


def comparison_rows(analysis: Mapping[str, Any]) -> list[dict[str, Any]]:
    """List every tested difference, with its interval and p-values."""
    rows = []
    robustness = analysis["robustness"]
    for which, summary in (
        (analysis["primary"], analysis["test"]),
        *analysis["other"].items(),
        *(("calibration", analysis[x]) for x in ("calibration", "recalibrated") if analysis[x]),
        *((analysis["primary"], beside) for beside in analysis["beside"].values()),
        *([("robustness", robustness["mean"])] if robustness else []),
        *(("robustness", one) for one in spoilt_errors(robustness)),
        *((("robustness", one) for one in robustness["each"].values()) if robustness else ()),
    ):
        tested = [
            (arm, summary["control"], {**effects, **summary["peer_gains"][arm]})
            for arm, effects in summary["gains"].items()
        ]
        tested += [(pair["first"], pair["second"], pair["effects"]) for pair in summary["pairs"]]
        rows += [
            {"of": which, "metric": summary["metric"], "arm": arm, "against": against, "target": x}
            | {key: x for key, x in effect.items() if key != "shown" or "p_holm" in effect}
            for arm, against, effects in tested
            for x, effect in effects.items()
            if effect is not None
        ]
    return rows
