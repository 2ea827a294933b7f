"""The report of scouting: models, who knows what the others do not, and the teams to try."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

from common.planner import shown_bytes, whole_memory
from common.report.numbers import MISSING, as_percent, is_finite, listed, number
from common.report.page import (
    Html,
    Panel,
    Section,
    Summary,
    bullets,
    commands,
    data_table,
    figure_grid,
    figure_tag,
    folded,
    long_table,
    section,
    settings_section,
    tag,
    write_page,
)
from common.report.plots import COLORS, HEAT, WIDTH, draw, heat_cells
from common.report.style import PAPER
from common.scout_outcome import teams_by_size

CAUTION = (
    "A prediction, not a result: nothing was trained. What teams are ranked by is a hypothesis "
    "about who gains from whom, and it says nothing of how large a gain will be; test it with "
    "scout.py --realised RUN... on finished runs. On small models of digits it did not order teams "
    "by their mean gain, and partners of one model no better than by their accuracy."
)
CHOSEN_ON_TEST = (
    "Teams are chosen here on the split on which training then measures them, so its numbers "
    "flatter the team that was chosen; to choose on held-out training data, give --held-out SHARE "
    "(segmentation: TRANSFER.HELD_OUT)."
)
Outcome = Mapping[str, Any]
_NUMBERED = 16
_SHOWN = 8


@dataclass(frozen=True)
class Parts:
    """What of the page a task tells in its own words; each is given the outcome.

    Attributes:
        about: What was asked, a sentence.
        best: How good the members of a team are, and what all know together; empty: not known.
        columns: Of the table of teams, by their heads, for some teams.
        legend: Of these columns.
        others: Title of the figures.
        figures: Of pairs of models.
        models: The table of models.
    """

    about: Callable[[Outcome], str]
    best: Callable[[Outcome, Mapping[str, Any]], str]
    columns: Callable[[Outcome, Sequence[Mapping[str, Any]]], dict[str, list[str]]]
    legend: Callable[[Outcome], str]
    others: str
    figures: Callable[[Outcome], list[Html]]
    models: Callable[[Outcome], Html]


def write_scout_report(
    path: Path | str,
    outcome: Outcome,
    top: int = 20,
    extra: Sequence[Section] = (),
    parts: Parts | None = None,
) -> Path:
    """Write the page.

    Args:
        path: The HTML file; written whole or not at all.
        outcome: From ``common.scout_outcome.describe_outcome``, with ``commands`` and ``settings``,
            ``chosen_on_test`` (whether models answered what training evaluates on, and nothing is
            held out), and where they are not those of classifiers ``unit`` of the samples and
            ``caution``.
        top: Teams of each size in the tables.
        extra: Sections of the task's own.
        parts: The task's own words; None: of what answers with classes.

    Returns:
        Where it lies.
    """
    parts = parts or CLASSES
    groups = teams_by_size(outcome, top) or [[]]
    told = scout_sentences(outcome, parts)
    first = Summary(
        kind="Scouting",
        verdict=told[1:],
        facts={
            "Models": len(outcome["names"]),
            outcome.get("unit", "images").capitalize(): outcome["samples"],
            "Teams": outcome["judged"],
            "Ranked by": outcome["predictor"],
        },
        cautions=scout_cautions(outcome),
        about=told[0],
    )
    sections = [
        section(
            "Teams",
            *(_team_table(outcome, teams, parts) for teams in groups),
            folded(
                "Every predictor",
                *(_predictor_table(outcome, teams) for teams in groups),
                _predictor_notes(outcome),
            ),
        ),
        section("To train them", *commands(outcome["commands"])),
        section(parts.others, figure_grid(parts.figures(outcome))),
        section("Models", parts.models(outcome)),
        *extra,
        *_calibration_section(outcome),
        settings_section(outcome["settings"]),
    ]
    return write_page(path, f"Scouting {len(outcome['names'])} models", first, sections)


def scout_cautions(outcome: Outcome) -> list[str]:
    """Say what to beware of."""
    return [outcome.get("caution", CAUTION), *([CHOSEN_ON_TEST] * outcome["chosen_on_test"])]


def scout_lead(outcome: Outcome, parts: Parts | None = None) -> str:
    """Say in plain words what was found."""
    return " ".join(scout_sentences(outcome, parts or CLASSES))


def scout_sentences(outcome: Outcome, parts: Parts) -> list[str]:
    """Say in plain words what was asked, then what was found."""
    told = [parts.about(outcome)]
    first = [teams[0] for teams in teams_by_size(outcome, 1)]
    aim = f"for {outcome['for']}" if outcome["for"] else "for all members"
    for best in first:
        size = len(best["members"])
        among = f"the teams of {size}" if len(first) > 1 else _teams(outcome["judged"])
        told.append(
            f"Of {among} the most is predicted {aim} in {listed(best['members'])} "
            f"({outcome['predictor']} {best['value']:.4f})."
        )
        told += [sentence for sentence in (parts.best(outcome, best),) if sentence]
    if not first:
        told.append("No team fits.")
    if len(first) > 1:
        told.append("Sizes are ranked apart, for in a larger team there are more that may teach.")
    if outcome["judged"] < outcome["possible"]:
        told.append(
            f"{outcome['possible']} teams are possible; the larger ones were grown from the best "
            "smaller ones, which can miss some."
        )
    if outcome["too_large"]:
        told.append(_too_large(outcome))
    return told


def _teams(count: int) -> str:
    return "1 team" if count == 1 else f"{count} teams"


def _too_large(outcome: Outcome) -> str:
    """Say how many teams do not fit, and what it takes that one more does."""
    settings = outcome.get("settings", {})
    budget, least = settings.get("budget_gpu_mem"), outcome.get("least_too_large")
    memory = f"--budget-gpu-mem {shown_bytes(budget)}" if budget else "the memory"
    told = f"{_teams(outcome['too_large'])} left out: too large for {memory}."
    if least is not None:
        told += (
            f" The smallest takes {shown_bytes(whole_memory(least))}, the free share counted in; a "
            "smaller batch, gradient checkpointing or smaller models take less."
        )
    return told


def _about(outcome: Outcome) -> str:
    kind = "labelled" if outcome["labelled"] else "unlabelled"
    unit = outcome.get("unit", "images")
    return (
        f"{len(outcome['names'])} models answered {outcome['samples']} {kind} {unit}, each in its "
        "own view."
    )


def _best(outcome: Outcome, team: Mapping[str, Any]) -> str:
    if team["accuracy"] is None or team["oracle"] is None:
        return ""
    strongest = max(team["accuracy"].values())
    return (
        f"Its strongest member is right on {as_percent(strongest)}; at least one member is on "
        f"{as_percent(team['oracle'])}."
    )


def _predictor_notes(outcome: Outcome) -> Html:
    chosen = outcome["predictor"]
    told = [
        f"{name}{' (ranked by)' * (name == chosen)}: {why}." for name, why in outcome["why"].items()
    ]
    return bullets(told)


def _team_table(outcome: Outcome, teams: Sequence[Mapping[str, Any]], parts: Parts) -> Html:
    costs = _cost_columns(teams)
    columns = {**parts.columns(outcome, teams), **costs}
    rows = [
        [
            k + 1,
            ", ".join(team["members"]),
            number(team["value"], 4),
            _shares(team["taught"]),
            *(column[k] for column in columns.values()),
        ]
        for k, team in enumerate(teams)
    ]
    roles = f"rule {outcome['rule']}" + (f", score {outcome['score']}" if outcome["score"] else "")
    caption = (
        f"The best {_kind(outcome, teams)}; {roles}. Taught: expected share of "
        f"{outcome.get('unit', 'samples')} on which each member is taught, in the order of the "
        f"names.{parts.legend(outcome)}"
        + (f" The ranking is by what {outcome['for']} may gain." if outcome["for"] else "")
        + " Memory and step: as --plan works them out." * bool(costs)
    )
    head = ["#", "Team", outcome["predictor"], "Taught", *columns]
    return data_table(caption, head, rows, labels=2)


def _kind(outcome: Outcome, teams: Sequence[Mapping[str, Any]]) -> str:
    """Say of which teams the ones shown are the best: of one size, where there are several."""
    if len(teams_by_size(outcome, 1)) > 1:
        return f"teams of {len(teams[0]['members'])}"
    return f"of {outcome['judged']} teams"


def _columns(outcome: Outcome, teams: Sequence[Mapping[str, Any]]) -> dict[str, list[str]]:
    return {
        what.capitalize(): [as_percent(team[key]) for team in teams]
        for what, key in (("agree", "agreement"), ("ensemble", "ensemble"), ("oracle", "oracle"))
    }


def _cost_columns(teams: Sequence[Mapping[str, Any]]) -> dict[str, list[str]]:
    if all(team["memory"] is None for team in teams):
        return {}
    return {
        "Engine": [team["engine"] for team in teams],
        "Memory": [_gigabytes(team["memory"]) for team in teams],
        "Step": [_milliseconds(team["step_seconds"]) for team in teams],
    }


def _predictor_table(outcome: Outcome, teams: Sequence[Mapping[str, Any]]) -> Html:
    names = list(outcome["why"])
    rows = [
        [
            k + 1,
            ", ".join(team["members"]),
            *(number(_mean(team["predicted"][n]), 4) for n in names),
        ]
        for k, team in enumerate(teams)
    ]
    caption = f"What every predictor says of the best {_kind(outcome, teams)}, mean over members."
    return data_table(caption, ["#", "Team", *names], rows, labels=2)


def _mean(by_member: Mapping[str, float]) -> float:
    return sum(by_member.values()) / len(by_member)


def _shares(by_member: Mapping[str, float] | None) -> str:
    if by_member is None:
        return MISSING
    return " / ".join(f"{100 * value:.0f}" for value in by_member.values()) + " %"


def _gigabytes(value: Any) -> str:
    return f"{value / 2**30:.2f} GiB" if is_finite(value) else MISSING


def _milliseconds(value: Any) -> str:
    return f"{1e3 * value:.0f} ms" if is_finite(value) else MISSING


def _model_table(outcome: Outcome) -> Html:
    head = ["Model", "Accuracy", "Loss", "Confidence", "Temperature", "ECE", "ECE calibrated"]
    known = any("file" in fact for fact in outcome["models"])
    rows = [
        [
            fact["name"],
            as_percent(fact["accuracy"]),
            number(fact["loss"], 4),
            as_percent(fact["confidence"]),
            number(fact["temperature"]),
            as_percent(fact["ece"]),
            as_percent(fact["ece_calibrated"]),
            *([fact["file"] or fact["model"]] if known else []),
        ]
        for fact in outcome["models"]
    ]
    caption = (
        "Each alone. Confidence: mean largest probability. The temperature is fitted on half of "
        "the labelled samples by their likelihood; both ECE (15 bins) are of the other half."
    )
    return data_table(caption, [*head, *(["From"] * known)], rows)


def _calibration_section(outcome: Outcome) -> list[Section]:
    rows = outcome["calibration"]
    if not rows:
        return []
    table = long_table(
        "Every team",
        "Who would teach under --score confidence, by raw and by calibrated confidences. Right: "
        "share of taught samples whose teacher is right. Same: both choose the same teacher.",
        ["Team", "Right, raw", "Right, calibrated", "Same"],
        [
            [
                ", ".join(row["members"]),
                as_percent(row["right_raw"]),
                as_percent(row["right_calibrated"]),
                as_percent(row["same"]),
            ]
            for row in rows
        ],
    )
    note = (
        "Scouting compares calibrated confidences. Training compares the models' own as they are "
        "(classifiers: unless --calibrate-scores is given): where the two columns differ much, "
        "--score confidence follows the boldest peer."
    )
    return [section("What calibration changes", table, tag("p", note))]


def _figures(outcome: Outcome) -> list[Html]:
    if outcome["labelled"]:
        return [_matrix(outcome, "flips"), _matrix(outcome, "agreement"), _scatter(outcome)]
    return [_matrix(outcome, "agreement"), _matrix(outcome, "kl")]


# by table: scale, names of rows and columns with the unit, caption
_MATRICES = {
    "flips": (
        100,
        "right",
        "wrong (% of samples)",
        "What the row's model could teach the column's: samples, in per cent, on which the row is "
        "right and the column wrong.",
    ),
    "agreement": (
        100,
        "one model",
        "another: same answer (% of samples)",
        "How often two models give the same answer, in per cent.",
    ),
    "kl": (
        1,
        "from",
        "to: mean KL (nats)",
        "KL divergence of the row's probabilities from the column's, mean over samples, in nats.",
    ),
}


def _matrix(outcome: Outcome, what: str) -> Html:
    scale, row, column, caption = _MATRICES[what]
    values = scale * np.asarray(outcome["pairs"][what], dtype=float)
    return matrix_figure(outcome["names"], values, row, column, caption)


def matrix_figure(
    names: Sequence[str], values: np.ndarray, row: str, column: str, caption: str
) -> Html:
    """Draw what is known of every ordered pair; the diagonal is left out.

    Args:
        names: Of the models.
        values: [M, M], the row's model to the column's.
        row: What the rows are.
        column: What the columns are, with the unit.
        caption: Under the figure.
    """
    values = np.array(values, dtype=float)
    np.fill_diagonal(values, np.nan)
    finite = values[np.isfinite(values)]
    numbered = len(names) <= _NUMBERED
    digits = "{:.0f}" if finite.max() >= 10 else "{:.2f}"

    def paint(figure: Figure) -> None:
        axes = figure.subplots()
        heat_cells(axes, values, names, digits if numbered else "")
        axes.set_xlabel(column)
        axes.set_ylabel(row)
        if not numbered:
            colors = matplotlib.colormaps[HEAT].resampled(16)
            figure.colorbar(ScalarMappable(Normalize(0, finite.max()), colors), ax=axes, shrink=0.8)

    span = f"from {finite.min():.3g} to {finite.max():.3g}"
    alt = f"Heat map of {len(names)} models: {row}, {column}, {span}"
    # with many models each needs its line: a wide plot scrolls in its own box
    height = 1.4 + (0.22 if numbered else 0.16) * len(names)
    plot = draw(paint, height, WIDTH if numbered else max(WIDTH, height + 0.4))
    return figure_tag([Panel(plot, alt)], caption)


def _scatter(outcome: Outcome) -> Html:
    accuracy = [100 * fact["accuracy"] for fact in outcome["models"]]
    oracle = [[100 * share for share in row] for row in outcome["pairs"]["oracle"]]
    return pair_scatter(outcome, accuracy, oracle, "accuracy", (" (%)", " (points)"))


def pair_scatter(
    outcome: Outcome,
    alone: Sequence[float],
    oracle: Sequence[Sequence[float]],
    what: str,
    units: tuple[str, str] = ("", ""),
) -> Html:
    """Draw every pair: how good its members are, and how much more both know together.

    Args:
        outcome: Its names and its teams.
        alone: How good each model is [M]; higher is better.
        oracle: Of each pair, where the better one of both is taken on every sample [M, M].
        what: That is measured.
        units: Of it, and of its differences, as they are written behind.
    """
    names = outcome["names"]
    pairs = [(i, j) for i in range(len(names)) for j in range(i)]
    x = [(alone[i] + alone[j]) / 2 for i, j in pairs]
    y = [oracle[i][j] - max(alone[i], alone[j]) for i, j in pairs]
    at = {frozenset((names[i], names[j])): k for k, (i, j) in enumerate(pairs)}
    ranked = enumerate((team["members"] for team in outcome["teams"]), 1)
    best = [(place, members) for place, members in ranked if len(members) == 2][:_SHOWN]

    def paint(figure: Figure) -> None:
        axes = figure.subplots()
        axes.plot(x, y, "o", color=COLORS[0], alpha=0.45, markersize=4)
        for place, members in best:
            where = at[frozenset(members)]
            axes.plot(x[where], y[where], "o", color=COLORS[1], markersize=5)
            axes.annotate(
                str(place),
                (x[where], y[where]),
                xytext=(5, 4),
                textcoords="offset points",
                bbox={"facecolor": PAPER, "edgecolor": "none", "pad": 0.5},
            )
        axes.set_xlabel(f"mean {what} of the pair{units[0]}")
        axes.set_ylabel(f"oracle over its stronger model{units[1]}")

    caption = (
        "Every pair of models: right is stronger, up is more complementary. Numbered: the best "
        "pairs, by their place in the table."
    )
    alt = f"Mean {what} against complementarity of {len(pairs)} pairs"
    return figure_tag([Panel(draw(paint, 3.0), alt)], caption)


CLASSES = Parts(
    about=_about,
    best=_best,
    columns=_columns,
    legend=lambda outcome: "",
    others="Who knows what the others do not",
    figures=_figures,
    models=_model_table,
)
