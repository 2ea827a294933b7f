"""Reports one can look at: a run, or arms over seeds, each one self-contained HTML file."""

from __future__ import annotations

import base64
import html
import math
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from common.checkpoint import atomic_write
from common.statistics import ENOUGH_SEEDS, FLIPS, summarise

Row = Mapping[str, Any]
Show = Callable[..., str]

MISSING = "–"
# Okabe and Ito: told apart with colour blindness too
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7f5539", "#6c757d")
MARKERS = "osD^vP*X"
WIDTH = 5.8
LINE = 100
TARGET_NAMES = {
    "mean": "the mean of the peers",
    "strongest": "the strongest peer",
    "weakest": "the weakest peer",
    "ensemble": "the ensemble",
}
SHORT_TARGETS = {
    "mean": "mean of peers",
    "strongest": "strongest peer",
    "weakest": "weakest peer",
    "ensemble": "ensemble",
}
RUN_CAUTION = (
    "One run proves nothing about who should teach whom: part of any change comes from training "
    "longer, part from chance. Evidence needs the control, which is the same run without transfer "
    "(--rule none, same seed), and several seeds of both. Each best epoch was chosen on the same "
    "data it is measured on, so its number is optimistic; the last epoch was not chosen."
)
_STYLE: dict[Any, Any] = {
    "font.size": 9.5,
    "axes.titlesize": 10,
    "figure.constrained_layout.hspace": 0.08,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#8a919a",
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e6e8eb",
    "legend.frameon": False,
    "lines.linewidth": 1.7,
    "lines.markersize": 4.5,
    "text.usetex": False,
    "text.parse_math": False,
    "svg.fonttype": "path",
    "svg.hashsalt": "report",
}
_CSS = """
:root { color-scheme: light dark; --ink: #1d2329; --soft: #5b6570; --line: #d9dde2;
  --paper: #ffffff; --card: #f5f7f9; --accent: #0b5c8e; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e9ec; --soft: #a3adb7; --line: #3a424a;
  --paper: #171b1f; --card: #20262b; --accent: #7fc0ea; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.5rem 1rem 4rem; max-width: 62rem; background: var(--paper);
  color: var(--ink); font: 1rem/1.55 system-ui, "Segoe UI", Roboto, Helvetica, Arial, sans-serif;
  overflow-wrap: break-word; }
h1 { font-size: 1.7rem; line-height: 1.25; margin: 0 0 1rem; }
h2 { font-size: 1.2rem; margin: 2.4rem 0 .6rem; padding-bottom: .25rem;
  border-bottom: 1px solid var(--line); color: var(--accent); }
p, li { max-width: 46rem; }
.lead { font-size: 1.06rem; }
.caution { background: var(--card); border-left: 4px solid #e69f00; padding: .6rem .9rem; }
.scroll { overflow-x: auto; margin: 1rem 0; }
table { border-collapse: collapse; min-width: min(24rem, 100%);
  font-size: .92rem; font-variant-numeric: tabular-nums; }
caption { text-align: left; color: var(--soft); padding-bottom: .4rem;
  max-width: min(46rem, 92vw); }
th, td { padding: .32rem .7rem; border-bottom: 1px solid var(--line); text-align: right; }
td { white-space: nowrap; }
thead th { color: var(--soft); font-weight: 600; vertical-align: bottom; }
th.label { text-align: left; }
th:first-child { padding-left: 0; }
tbody th { font-weight: 600; }
table.words td, table.words th { text-align: left; white-space: normal; vertical-align: top; }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(26rem, 100%), 1fr));
  gap: 1.2rem; align-items: start; }
figure { margin: 0; }
figure img { display: block; width: 100%; max-width: 40rem; height: auto; background: #ffffff;
  border: 1px solid var(--line); border-radius: 6px; padding: .4rem; }
figcaption { color: var(--soft); font-size: .88rem; margin-top: .35rem; max-width: 40rem; }
footer { margin-top: 3rem; color: var(--soft); font-size: .85rem; }
@media print { :root { color-scheme: light; --ink: #000; --soft: #444; --line: #bbb;
  --paper: #fff; --card: #fff; --accent: #000; } body { max-width: none; padding: 0; }
  figure, tr, .caution { break-inside: avoid; } h2 { break-after: avoid; }
  .scroll { overflow: visible; } }
"""


def write_run_report(
    path: Path | str,
    *,
    names: Sequence[str],
    history: Sequence[Row],
    lessons: Sequence[Row],
    metric: str,
    settings: Mapping[str, Any],
    lower_is_better: bool = False,
    notes: Sequence[str] = (),
) -> Path:
    """Write the report of one run.

    Args:
        path: The HTML file; written whole or not at all.
        names: The peers'.
        history: One row an evaluation, the first of them the start (``Progress.history``):
            ``epoch`` and ``PEER/METRIC``; other metrics are shown where they are there.
        lessons: One row an epoch (``Progress.lessons``); may be empty.
        metric: Which metric of a peer counts.
        settings: Plain values, shown as they are.
        lower_is_better: Of the metric.
        notes: Sentences to add.

    Returns:
        Where it lies.

    Raises:
        ValueError: No peer, no evaluation, or a peer without the metric.
    """
    outcomes = _outcomes(names, history, metric, lower_is_better)
    show = _number_format(row.get(f"{name}/{metric}") for row in history for name in names)
    lead = _run_lead(outcomes, history, lessons, metric, lower_is_better, show)
    body = [
        _section(
            "In short",
            _tag("p", lead, class_="lead"),
            _items(_told(outcomes, show)),
            _tag("p", RUN_CAUTION, class_="caution"),
            *_paragraphs(notes),
        ),
        _section("Peers", _outcome_table(outcomes, metric, show)),
        _section("Over the epochs", _figures(_run_figures(names, history, lessons, metric))),
        *_teaching(names, lessons),
        _section("Settings", _settings_table(settings)),
    ]
    return _write_page(path, f"Run report: {_listed(names)}", body)


# ---------------------------------------------------------------- one run: numbers and words


@dataclass(frozen=True)
class _Outcome:
    """A peer's way through a run; ``gain`` is the last minus the start, positive for better."""

    name: str
    before: float
    best: float
    best_epoch: int
    last: float
    change: float
    gain: float
    fixed: int | None
    broken: int | None


def _outcomes(
    names: Sequence[str], history: Sequence[Row], metric: str, lower_is_better: bool
) -> list[_Outcome]:
    if not names:
        raise ValueError("names is empty; a report needs at least one peer")
    if not history:
        raise ValueError("history is empty; a report needs at least the evaluation of the start")
    return [_outcome(name, history, metric, lower_is_better) for name in names]


def _outcome(name: str, history: Sequence[Row], metric: str, lower_is_better: bool) -> _Outcome:
    key = f"{name}/{metric}"
    rows = [row for row in history if _finite(row.get(key))]
    if not rows:
        raise ValueError(f"history has no finite {key!r}; it has {_listed(sorted(history[0]))}")
    sign = -1 if lower_is_better else 1
    best = max(rows, key=lambda row: sign * row[key])
    before, last = _float(history[0].get(key)), _float(history[-1].get(key))
    return _Outcome(
        name=name,
        before=before,
        best=float(best[key]),
        best_epoch=int(best["epoch"]),
        last=last,
        change=last - before,
        gain=sign * (last - before),
        fixed=history[-1].get(f"{name}/fixed"),
        broken=history[-1].get(f"{name}/broken"),
    )


def _run_lead(
    outcomes: Sequence[_Outcome],
    history: Sequence[Row],
    lessons: Sequence[Row],
    metric: str,
    lower_is_better: bool,
    show: Show,
) -> str:
    """Say the outcome in plain words, from the numbers alone."""
    names = _listed([outcome.name for outcome in outcomes])
    direction = "lower" if lower_is_better else "higher"
    epochs = int(history[-1]["epoch"])
    together = "were trained together" if len(outcomes) > 1 else "was trained alone"
    length = f"for {epochs} epoch{'s' * (epochs != 1)}"
    sentences = [f"{names} {together} {length}; measured by {metric} ({direction} is better)."]
    if len(history) == 1:
        return f"{sentences[0]} Only the start was measured."
    sentences += _who_gained(outcomes, show)
    sentences += _strongest(outcomes, lower_is_better, show)
    sentences += _group(outcomes, history, metric, lower_is_better, show)
    if len(outcomes) > 1:
        sentences += _taught(lessons)
    return " ".join(sentences)


def _who_gained(outcomes: Sequence[_Outcome], show: Show) -> list[str]:
    groups = {
        "Better at the last epoch than at the start": [o for o in outcomes if o.gain > 0],
        "Worse": [o for o in outcomes if o.gain < 0],
        "Unchanged": [o for o in outcomes if o.gain == 0],
    }
    return [
        f"{title}: {_listed([f'{o.name} ({show(o.change, sign=True)})' for o in group])}."
        for title, group in groups.items()
        if group
    ]


def _strongest(outcomes: Sequence[_Outcome], lower_is_better: bool, show: Show) -> list[str]:
    known = [o for o in outcomes if _finite(o.before) and _finite(o.last)]
    if len(outcomes) < 2 or not known:
        return []
    sign = -1 if lower_is_better else 1
    first = max(known, key=lambda o: sign * o.before)
    last = max(known, key=lambda o: sign * o.last)
    if first is last:
        return [
            f"The strongest peer was and is {last.name}, {show(first.before)} before and "
            f"{show(last.last)} now."
        ]
    return [
        f"The strongest peer was {first.name} with {show(first.before)} and is {last.name} with "
        f"{show(last.last)}."
    ]


def _group(
    outcomes: Sequence[_Outcome],
    history: Sequence[Row],
    metric: str,
    lower_is_better: bool,
    show: Show,
) -> list[str]:
    before, last = (_float(history[i].get(f"ensemble/{metric}")) for i in (0, -1))
    if len(outcomes) < 2 or not (_finite(before) and _finite(last)):
        return []
    told = f"The ensemble of all peers went from {show(before)} to {show(last)}"
    known = [o.last for o in outcomes if _finite(o.last)]
    if not known:
        return [f"{told}."]
    strongest = min(known) if lower_is_better else max(known)
    gain = (strongest - last) if lower_is_better else (last - strongest)
    than = "better" if gain >= 0 else "worse"
    return [f"{told}, {show(abs(gain))} {than} than the strongest single peer."]


def _taught(lessons: Sequence[Row]) -> list[str]:
    shares = [share for share in _series(lessons, "transfer/taught") if _finite(share)]
    if not shares:
        return []
    if not any(shares):
        return ["Nobody taught anybody in this run."]
    return [f"Somebody taught on {_percent(float(np.mean(shares)))} of the samples seen."]


def _told(outcomes: Sequence[_Outcome], show: Show) -> list[str]:
    return [
        f"{o.name}: {show(o.before)} before, best {show(o.best)} (epoch {o.best_epoch}), last "
        f"{show(o.last)}."
        for o in outcomes
    ]


def _outcome_table(outcomes: Sequence[_Outcome], metric: str, show: Show) -> Html:
    flips = any(o.fixed is not None or o.broken is not None for o in outcomes)
    head = ["Peer", "Before", "Best", "At epoch", "Last", "Change"]
    rows = [
        [
            o.name,
            show(o.before),
            show(o.best),
            o.best_epoch,
            show(o.last),
            show(o.change, sign=True),
        ]
        + ([_count(o.fixed), _count(o.broken)] if flips else [])
        for o in outcomes
    ]
    caption = f"{metric} of every peer. Change: last minus before."
    if flips:
        head += ["Fixed", "Broken"]
        caption += (
            " Fixed and broken: samples that were wrong before and right at the last epoch, and "
            "the other way round."
        )
    return _table(caption, head, rows)


@dataclass(frozen=True)
class _Lesson:
    """One teacher and one student over all epochs; NaN where nothing was taught or told."""

    teacher: str
    student: str
    share: float
    gap: float
    kl: float
    teacher_right: float
    student_right: float


def _pair_lessons(names: Sequence[str], lessons: Sequence[Row]) -> list[_Lesson]:
    return [
        _pair_lesson(teacher, student, lessons)
        for teacher in names
        for student in names
        if teacher != student and _has(lessons, f"transfer/{teacher}->{student}/share")
    ]


def _pair_lesson(teacher: str, student: str, lessons: Sequence[Row]) -> _Lesson:
    prefix = f"transfer/{teacher}->{student}"
    share = np.array(_series(lessons, f"{prefix}/share"))

    def mean(what: str) -> float:
        """Average over the taught samples of all epochs: an epoch counts by its share."""
        values = np.array(_series(lessons, f"{prefix}/{what}"))
        known = np.isfinite(values) & (share > 0)
        return float(np.average(values[known], weights=share[known])) if known.any() else math.nan

    return _Lesson(
        teacher=teacher,
        student=student,
        share=float(np.nanmean(share)),
        gap=mean("gap"),
        kl=mean("kl"),
        teacher_right=mean("teacher_right"),
        student_right=mean("student_right"),
    )


def _teaching(names: Sequence[str], lessons: Sequence[Row]) -> list[Html]:
    pairs = _pair_lessons(names, lessons)
    if not pairs:
        return []
    return [
        _section(
            "Who taught whom",
            _figures([_heat_map(names, pairs), *_teaching_over_time(names, lessons)]),
            _pair_table(pairs),
        )
    ]


def _pair_table(pairs: Sequence[_Lesson]) -> Html:
    tells = any(_finite(pair.teacher_right) for pair in pairs)
    head = ["Teacher to student", "Share", "Gap", "KL"]
    caption = (
        "Every pair, over all epochs. Share: of all samples, how many this teacher taught this "
        "student. Gap: the teacher's score minus the student's. KL: in nats."
    )
    if tells:
        head += ["Teacher right, student wrong", "Student right"]
        caption += " The last two: of the samples taught."
    rows = [
        [f"{p.teacher} → {p.student}", _percent(p.share), _number(p.gap, 3), _number(p.kl, 3)]
        + ([_percent(p.teacher_right), _percent(p.student_right)] if tells else [])
        for p in pairs
    ]
    return _table(caption, head, rows)


def _settings_table(settings: Mapping[str, Any]) -> Html:
    rows = [[name, _setting(value)] for name, value in settings.items()]
    return _table("As the run was started.", ["Setting", "Value"], rows, words=True)


# ---------------------------------------------------------------- one run: figures


def _run_figures(
    names: Sequence[str], history: Sequence[Row], lessons: Sequence[Row], metric: str
) -> list[Html]:
    figures = [_metric_figure(names, history, metric), _change_figure(names, history, metric)]
    for what, title in (("task_loss", "Task loss"), ("transfer_loss", "Transfer loss")):
        if any(_has(lessons, f"{name}/{what}") for name in names):
            figures.append(_loss_figure(names, lessons, what, title))
    return figures


def _metric_figure(names: Sequence[str], history: Sequence[Row], metric: str) -> Html:
    group = [who for who in ("ensemble", "oracle") if _has(history, f"{who}/{metric}")]
    group = group if len(names) > 1 else []

    def paint(figure: Figure) -> None:
        axes = figure.subplots()
        _lines(axes, names, history, metric)
        for who, style in zip(("ensemble", "oracle"), ("-", "--"), strict=True):
            if who in group:
                values = _series(history, f"{who}/{metric}")
                color = "#222222" if who == "ensemble" else "#8a919a"
                axes.plot(_epochs(history), values, style, color=color, label=who)
        _epoch_axis(axes, metric)
        _legend(figure, axes)

    caption = f"{metric} after each epoch; epoch 0 is the start."
    if "oracle" in group:
        caption += " Oracle: right where at least one peer is right."
    return _figure(_draw(paint, 2.6), f"{metric} of {_listed([*names, *group])}", caption)


def _change_figure(names: Sequence[str], history: Sequence[Row], metric: str) -> Html:
    keys = [f"{name}/{metric}" for name in names]
    start = {key: _float(history[0].get(key)) for key in keys}
    rows = [
        {"epoch": row["epoch"], **{key: _float(row.get(key)) - start[key] for key in keys}}
        for row in history
    ]

    def paint(figure: Figure) -> None:
        axes = figure.subplots()
        axes.axhline(0, color="#8a919a", linewidth=1)
        _lines(axes, names, rows, metric)
        _epoch_axis(axes, f"change of {metric}")
        _legend(figure, axes)

    alt = f"Change of {metric} since the start of {_listed(names)}"
    return _figure(_draw(paint, 2.6), alt, "The same as change since the start.")


def _loss_figure(names: Sequence[str], lessons: Sequence[Row], what: str, title: str) -> Html:
    def paint(figure: Figure) -> None:
        axes = figure.subplots()
        _lines(axes, names, lessons, what)
        _epoch_axis(axes, title)
        if axes.dataLim.y0 >= 0:
            axes.set_ylim(0, 1.08 * max(axes.dataLim.y1, 1e-6))
        _legend(figure, axes)

    caption = f"{title}, mean over each epoch's training batches."
    return _figure(_draw(paint, 2.6), f"{title} of {_listed(names)} per epoch", caption)


def _teaching_over_time(names: Sequence[str], lessons: Sequence[Row]) -> list[Html]:
    figures = []
    if _anybody_taught(names, lessons):
        shares = {name: _series(lessons, f"{name}/teaches") for name in names}
        figures.append(_teaches_figure(_epochs(lessons), shares))
    keys = {"transfer/taught": "samples taught", "transfer/entropy": "entropy of who teaches"}
    known = {title: _series(lessons, key) for key, title in keys.items() if _has(lessons, key)}
    if known:
        figures.append(_entropy_figure(_epochs(lessons), known))
    return figures


def _teaches_figure(epochs: Sequence[int], shares: Mapping[str, Sequence[float]]) -> Html:
    """Stack who taught in each epoch; more than 1 in all where a sample has several teachers."""
    edges = [epochs[0] - 0.5, *(epoch + 0.5 for epoch in epochs)]
    columns = {name: np.nan_to_num(np.array(column)) for name, column in shares.items()}
    whole = np.sum(list(columns.values()), axis=0)

    def paint(figure: Figure) -> None:
        axes = figure.subplots()
        below = np.zeros(len(epochs))
        for i, (name, column) in enumerate(columns.items()):
            axes.stairs(
                below + column,
                edges,
                baseline=below,
                fill=True,
                color=_color(i),
                alpha=0.85,
                label=_short(name, list(columns)),
            )
            below = below + column
        _epoch_axis(axes, "share of the taught samples")
        axes.set_xlim(edges[0], edges[-1])
        axes.set_ylim(0, max(1.0, float(whole.max())))
        _legend(figure, axes)

    caption = "Who taught, as a share of the taught samples in each epoch."
    if whole.max() > 1.02:
        caption += " More than 1 in all: a sample can have several teachers."
    return _figure(_draw(paint, 2.6), f"Share taught by {_listed(shares)} per epoch", caption)


def _entropy_figure(epochs: Sequence[int], known: Mapping[str, Sequence[float]]) -> Html:
    def paint(figure: Figure) -> None:
        axes = figure.subplots()
        for i, (title, values) in enumerate(known.items()):
            axes.plot(
                epochs, values, "-" + MARKERS[i], color=("#555555", "#b07c00")[i], label=title
            )
        _epoch_axis(axes, "")
        axes.set_ylim(-0.03, 1.03)
        _legend(figure, axes)

    caption = (
        "Share of samples on which somebody taught, and the entropy of who teaches: 1 where all "
        "teach equally often, 0 where one peer always does."
    )
    return _figure(_draw(paint, 2.6), f"{_listed(known)} per epoch", caption)


def _heat_map(names: Sequence[str], pairs: Sequence[_Lesson]) -> Html:
    shares = np.full((len(names), len(names)), np.nan)
    for pair in pairs:
        shares[names.index(pair.teacher), names.index(pair.student)] = pair.share

    def paint(figure: Figure) -> None:
        axes = figure.subplots()
        top = max(float(np.nanmax(shares)), 1e-6)
        axes.pcolormesh(shares, cmap="Blues", vmin=0, vmax=top * 1.15, edgecolor="white", lw=2)
        for (t, s), share in np.ndenumerate(shares):
            text, color = _percent(share), "white" if share > 0.6 * top else "#222222"
            axes.text(s + 0.5, t + 0.5, text, ha="center", va="center", color=color)
        labels = [_short(name, names) for name in names]
        ticks = np.arange(len(names)) + 0.5
        tilt = 30 if max(map(len, labels)) * len(names) > 30 else 0
        axes.set_xticks(ticks, labels, rotation=tilt, ha="right" if tilt else "center")
        axes.set_yticks(ticks, labels)
        axes.invert_yaxis()
        axes.grid(False)
        axes.spines[:].set_visible(False)
        axes.tick_params(length=0)
        axes.set_xlabel("student")
        axes.set_ylabel("teacher")

    alt = "; ".join(f"{p.teacher} taught {p.student} {_percent(p.share)}" for p in pairs)
    caption = "Share of all samples that a teacher (row) taught a student (column), all epochs."
    return _figure(_draw(paint, 1.6 + 0.5 * len(names)), alt, caption)


# ---------------------------------------------------------------- arms over seeds


def write_comparison(
    path: Path | str,
    *,
    title: str,
    names: Sequence[str],
    arms: Sequence[str],
    results: Sequence[Row],
    control: str,
    metric: str = "top1",
    lower_is_better: bool = False,
    descriptions: Mapping[str, str],
    settings: Mapping[str, Any],
    notes: Sequence[str] = (),
    data_examples: tuple[bytes, str] | None = None,
) -> Path:
    """Write the comparison of several arms, each over several seeds.

    Args:
        path: The HTML file; written whole or not at all.
        title: Of the page.
        names: The peers'.
        arms: In the order they shall have.
        results: One an arm and seed, as ``common.statistics.summarise`` takes them.
        control: The arm that the others are compared with.
        metric: What the values are called.
        lower_is_better: Of the metric.
        descriptions: A sentence for an arm.
        settings: Plain values, shown as they are.
        notes: Sentences to add.
        data_examples: A PNG and its caption.

    Returns:
        Where it lies.

    Raises:
        ValueError: As ``common.statistics.summarise``.
    """
    summary = summarise(
        results, names, control, arms=arms, metric=metric, lower_is_better=lower_is_better
    )
    body = [
        _section("In short", *_comparison_words(summary), *_paragraphs(notes)),
        _section(
            "What was compared", _arms_table(summary, descriptions), *_examples(data_examples)
        ),
        _section("Gains over the control", _gains_table(summary), _figures(_forest(summary))),
        *_versus_section(summary),
        _section(
            "Before and after",
            _peers_table(summary),
            _figures([_before_after_figure(summary), *_flips_figure(summary)]),
        ),
        *_comparison_teaching(summary),
        _section("Settings", _settings_table(settings)),
    ]
    return _write_page(path, title, body)


def comparison_text(summary: Mapping[str, Any]) -> str:
    """Lay out a summary for a terminal: the table of gains, then what it shows in plain words.

    Args:
        summary: From ``common.statistics.summarise``.

    Returns:
        Lines of plain text, no trailing newline.
    """
    head, rows = _gains_cells(summary)
    caption = f"{summary['metric']}. {_gains_caption(summary)}"
    lines = [*textwrap.wrap(caption, LINE), "", *_aligned([head, *rows]), ""]
    for sentence in comparison_sentences(summary):
        lines += textwrap.wrap(sentence, LINE, initial_indent="- ", subsequent_indent="  ")
    return "\n".join(lines)


def comparison_sentences(summary: Mapping[str, Any]) -> list[str]:
    """Say what a summary shows and what it does not; every claim comes from an interval.

    Args:
        summary: From ``common.statistics.summarise``.

    Returns:
        Sentences, the most important caution first.
    """
    return [
        *_few_seeds(summary),
        _control_sentence(summary),
        *(
            f"{arm} against the control {summary['control']}: {_verdict(effects, summary)}."
            for arm, effects in summary["gains"].items()
        ),
        *_choice_of_teacher(summary),
        *_same_in_all_seeds(summary),
        *_number_of_comparisons(summary),
    ]


# ---------------------------------------------------------------- arms over seeds: words


def _few_seeds(summary: Mapping[str, Any]) -> list[str]:
    count = len(summary["seeds"])
    if count >= ENOUGH_SEEDS:
        return []
    proves = f"{count} seeds prove nothing"
    if count == 1:
        proves = "1 seed proves nothing, and gives no interval"
    return [
        f"{proves}: this is a demonstration. The numbers are given, but none of them counts as "
        f"shown; take at least {ENOUGH_SEEDS} seeds to learn more."
    ]


def _control_sentence(summary: Mapping[str, Any]) -> str:
    show, control = _summary_format(summary), summary["control"]
    arm = summary["arms"][control]
    before, after = (show(arm[when]["mean"]["mean"]) for when in ("before", "after"))
    return (
        f"The control {control} took {TARGET_NAMES['mean']} from {before} to {after} "
        f"{summary['metric']}; gains count only what an arm reached beyond the control with the "
        "same seed."
    )


def _verdict(effects: Mapping[str, Row | None], summary: Mapping[str, Any]) -> str:
    """Sort effects into shown to be better, shown to be worse, and not shown."""
    groups: dict[str, list[str]] = {
        "shown to be better for": [],
        "shown to be worse for": [],
        "not shown to differ for": [],
    }
    better, worse, open_ = groups.values()
    for what, effect in effects.items():
        if effect is None:
            continue
        group = open_ if not effect["shown"] else better if effect["mean"] > 0 else worse
        group.append(f"{TARGET_NAMES[what]} ({_interval(effect, summary)})")
    told = [f"{verdict} {_listed(found)}" for verdict, found in groups.items() if found]
    return "; ".join(told) or "no seed in common, so no comparison"


def _choice_of_teacher(summary: Mapping[str, Any]) -> list[str]:
    """Say whether the rule's choice of teacher did better than drawing one."""
    chosen, chance = summary["chosen"], summary["chance"]
    if chosen is None or chance is None:
        return []
    effects = summary["versus"][chance]
    told = f"{chosen} against {chance}: {_verdict(effects, summary)}."
    shown = [TARGET_NAMES[what] for what, effect in effects.items() if effect and effect["shown"]]
    if shown:
        return [f"{told} So on this data the choice of teacher matters for {_listed(shown)}."]
    return [f"{told} So this data does not show that the choice of teacher matters."]


def _same_in_all_seeds(summary: Mapping[str, Any]) -> list[str]:
    """Explain why an interval without width is not called shown."""
    arms = [
        arm
        for arm, effects in [*summary["gains"].items(), *summary["versus"].items()]
        if any(e and e["count"] > 1 and e["mean"] and not e["varies"] for e in effects.values())
    ]
    if not arms:
        return []
    return [
        f"Every seed gave the same difference in a comparison of {_listed(dict.fromkeys(arms))}: "
        "such seeds are one run seen several times, and it is not called shown; check that the "
        "seed reaches the data and the training."
    ]


def _number_of_comparisons(summary: Mapping[str, Any]) -> list[str]:
    """Count the intervals given; those of ``versus`` over the control are the gains again."""
    again = {arm for arm in summary["versus"] if arm == summary["control"]}
    groups = [
        *summary["gains"].values(),
        *summary["peer_gains"].values(),
        *(effects for arm, effects in summary["versus"].items() if arm not in again),
    ]
    count = sum(
        effect is not None and effect["low"] is not None
        for effects in groups
        for effect in effects.values()
    )
    if not count:
        return []
    return [
        f"{count} comparisons were made without correction for their number. With "
        f"{100 * summary['level']:g} % intervals, about {count * (1 - summary['level']):.1f} of "
        "them would exclude zero by chance if no arm differed from another."
    ]


def _interval(effect: Row | None, summary: Mapping[str, Any]) -> str:
    if effect is None:
        return MISSING
    show = _summary_format(summary)
    mean = show(effect["mean"], sign=True)
    if effect["low"] is None:
        return mean
    return f"{mean} [{show(effect['low'], sign=True)}, {show(effect['high'], sign=True)}]"


def _summary_format(summary: Mapping[str, Any]) -> Show:
    arms = summary["arms"].values()
    return _number_format(arm[when]["mean"]["mean"] for arm in arms for when in ("before", "after"))


def _spread(spread: Row | None, show: Show) -> str:
    if spread is None:
        return MISSING
    return show(spread["mean"]) + ("" if spread["sd"] is None else f" ± {show(spread['sd'])}")


# ---------------------------------------------------------------- arms over seeds: tables


def _comparison_words(summary: Mapping[str, Any]) -> list[Html]:
    few = _few_seeds(summary)
    sentences = comparison_sentences(summary)[len(few) :]
    seeds = len(summary["seeds"])
    lead = (
        f"{_listed(summary['names'])}: {len(summary['arms'])} ways to train from the same start "
        f"({_listed(summary['arms'])}), over {seeds} seed{'s' * (seeds != 1)}. An effect is called "
        f"shown only where its interval excludes zero and at least {ENOUGH_SEEDS} seeds tell."
    )
    caution = [_tag("p", sentence, class_="caution") for sentence in few]
    return [_tag("p", lead, class_="lead"), *caution, _items(sentences)]


def _arms_table(summary: Mapping[str, Any], descriptions: Mapping[str, str]) -> Html:
    rows = [
        [
            f"{arm} (control)" if arm == summary["control"] else arm,
            descriptions.get(arm, MISSING),
            values["seeds"],
        ]
        for arm, values in summary["arms"].items()
    ]
    return _table("The arms.", ["Arm", "What it does", "Seeds"], rows, words=True)


def _examples(data_examples: tuple[bytes, str] | None) -> list[Html]:
    if data_examples is None:
        return []
    image, caption = data_examples
    return [_figure(image, caption, caption, kind="png")]


def _gains_table(summary: Mapping[str, Any]) -> Html:
    head, rows = _gains_cells(summary)
    return _table(_gains_caption(summary), head, rows)


def _gains_caption(summary: Mapping[str, Any]) -> str:
    turned = "; positive is better" if summary["lower_is_better"] else ""
    return (
        f"Gain over the control with the same seed{turned}, mean over seeds and "
        f"{100 * summary['level']:g} % interval (Student's t). The control's row has its values "
        "after training. Strongest and weakest are meant as at the start of each seed."
    )


def _gains_cells(summary: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    show, targets = _summary_format(summary), summary["targets"]
    rows = []
    for arm, values in summary["arms"].items():
        if arm == summary["control"]:
            cells = [_spread(values["after"][what], show) for what in targets]
            rows.append([f"{arm} (control)", *cells])
        else:
            effects = summary["gains"][arm]
            rows.append([arm, *(_interval(effects[what], summary) for what in targets)])
    return ["Arm", *(SHORT_TARGETS[what] for what in targets)], rows


def _versus_section(summary: Mapping[str, Any]) -> list[Html]:
    chosen = summary["chosen"]
    if chosen is None or not summary["versus"]:
        return []
    targets = [what for what in summary["targets"] if what != "weakest"]
    rows = [
        [f"{chosen} minus {arm}", *(_interval(effects[what], summary) for what in targets)]
        for arm, effects in summary["versus"].items()
    ]
    caption = (
        f"{summary['metric']} of {chosen} minus that of each other arm with the same seed"
        f"{'; positive is better' if summary['lower_is_better'] else ''}, mean over seeds and "
        f"{100 * summary['level']:g} % interval."
    )
    head = ["Difference", *(SHORT_TARGETS[what] for what in targets)]
    return [_section(f"{chosen} against the other arms", _table(caption, head, rows))]


def _peers_table(summary: Mapping[str, Any]) -> Html:
    flips = _has_flips(summary)
    rows: list[list[object]] = []
    for arm, values in summary["arms"].items():
        gains = summary["peer_gains"].get(arm, {}), summary["gains"].get(arm, {})
        groups = {
            group: {when: values[when][group] for when in ("before", "after")}
            for group in ("ensemble", "oracle")
            if values["after"][group] is not None and len(summary["names"]) > 1
        }
        for found, gain in zip((values["peers"], groups), gains, strict=True):
            rows += [_peer_row(arm, who, found[who], gain.get(who), summary) for who in found]
    caption = (
        f"{summary['metric']}, mean ± standard deviation over seeds; gain over the control with "
        "the same seed. Oracle, where given: right where at least one peer is right."
    )
    head = ["Arm", "Peer", "Before", "After", "Gain over control"]
    if flips:
        head += ["Fixed", "Broken"]
        caption += " Fixed and broken: samples that turned right, and wrong, mean over seeds."
    return _table(caption, head, [row[: len(head)] for row in rows], labels=2)


def _peer_row(
    arm: str, who: str, values: Row, gain: Row | None, summary: Mapping[str, Any]
) -> list[object]:
    show = _summary_format(summary)
    spreads = [_spread(values[when], show) for when in ("before", "after")]
    flips = [_number(values.get(what), 1) for what in FLIPS]
    return [arm, who, *spreads, _interval(gain, summary), *flips]


def _has_flips(summary: Mapping[str, Any]) -> bool:
    peers = [peer for arm in summary["arms"].values() for peer in arm["peers"].values()]
    return any(peer[what] is not None for peer in peers for what in FLIPS)


def _comparison_teaching(summary: Mapping[str, Any]) -> list[Html]:
    names = summary["names"]
    lessons = {arm: values["lessons"] for arm, values in summary["arms"].items()}
    lessons = {arm: rows for arm, rows in lessons.items() if _anybody_taught(names, rows)}
    if not lessons:
        return []
    parts = []
    if summary["chosen"] in lessons:
        rows = lessons[summary["chosen"]]
        parts.append(_tag("p", f"The figures are of the arm {summary['chosen']}, mean over seeds."))
        pairs = _pair_lessons(names, rows)
        heat = [_heat_map(names, pairs)] if pairs else []
        parts.append(_figures([*heat, *_teaching_over_time(names, rows)]))
    return [_section("Who taught whom", *parts, _teaching_table(names, lessons))]


def _anybody_taught(names: Sequence[str], lessons: Sequence[Row]) -> bool:
    shares = [share for name in names for share in _series(lessons, f"{name}/teaches")]
    return any(_finite(share) and share > 0 for share in shares)


def _teaching_table(names: Sequence[str], lessons: Mapping[str, Sequence[Row]]) -> Html:
    rows = [
        [
            arm,
            f"{pair.teacher} → {pair.student}",
            _percent(_float(found[0].get(f"transfer/{pair.teacher}->{pair.student}/share"))),
            _percent(_float(found[-1].get(f"transfer/{pair.teacher}->{pair.student}/share"))),
            _percent(pair.share),
            _number(pair.gap, 3),
            _percent(pair.teacher_right),
        ]
        for arm, found in lessons.items()
        for pair in _pair_lessons(names, found)
    ]
    head = ["Arm", "Teacher to student", "First epoch", "Last epoch", "All epochs", "Gap"]
    caption = (
        "Of all samples, how many a teacher taught a student, mean over seeds. Gap: the teacher's "
        "score minus the student's. Last column: of the samples taught."
    )
    return _table(caption, [*head, "Teacher right, student wrong"], rows, labels=2)


# ---------------------------------------------------------------- arms over seeds: figures


def _forest(summary: Mapping[str, Any]) -> list[Html]:
    arms, targets = list(summary["gains"]), summary["targets"]
    if not arms:
        return []

    def paint(figure: Figure) -> None:
        panels = _panels(figure, len(targets), sharex=True, sharey=True)
        for axes, what in zip(panels, targets, strict=False):
            axes.axvline(0, color="#8a919a", linewidth=1, linestyle="--")
            for y, arm in enumerate(arms):
                _whisker(axes, y, summary["gains"][arm][what])
            axes.set_title(SHORT_TARGETS[what])
            _arm_axis(axes, arms)
        figure.supxlabel(f"gain of {summary['metric']} over {summary['control']}", fontsize=9.5)

    alt = "; ".join(
        f"{arm}, {SHORT_TARGETS[what]}: {_interval(effect, summary)}"
        for arm in arms
        for what, effect in summary["gains"][arm].items()
    )
    caption = (
        f"Gain over {summary['control']}, right is better; bars are {100 * summary['level']:g} % "
        "intervals. Filled: shown. Hollow: not shown."
    )
    rows = math.ceil(len(targets) / 2)
    return [_figure(_draw(paint, 0.5 + rows * (0.5 + 0.26 * len(arms))), alt, caption)]


def _whisker(axes: Axes, y: int, effect: Row | None) -> None:
    if effect is None:
        return
    if effect["low"] is not None:
        axes.plot([effect["low"], effect["high"]], [y, y], color=COLORS[0], linewidth=1.6)
    face = COLORS[0] if effect["shown"] else "white"
    axes.plot(effect["mean"], y, "o", color=COLORS[0], markerfacecolor=face, markersize=6)


def _before_after_figure(summary: Mapping[str, Any]) -> Html:
    names, arms = summary["names"], list(summary["arms"])

    def paint(figure: Figure) -> None:
        panels = _panels(figure, len(names), sharey=True)
        for axes, name in zip(panels, names, strict=False):
            for y, arm in enumerate(arms):
                _slope(axes, y, summary["arms"][arm]["peers"][name])
            axes.set_title(_short(name, names))
            axes.xaxis.set_major_locator(MaxNLocator(4))
            _arm_axis(axes, arms)
        handles, labels = panels[0].get_legend_handles_labels()
        figure.legend(handles[:2], labels[:2], loc="outside lower center", ncols=2)

    show = _summary_format(summary)
    alt = "; ".join(
        f"{arm}, {name}: {show(peer['before']['mean'])} to {show(peer['after']['mean'])}"
        for arm in arms
        for name, peer in summary["arms"][arm]["peers"].items()
    )
    caption = (
        f"{summary['metric']} before and after training, mean over seeds; the bar is the standard "
        "deviation over seeds. Each peer has its own scale."
    )
    rows = math.ceil(len(names) / 2)
    return _figure(_draw(paint, 0.5 + rows * (0.6 + 0.26 * len(arms))), alt, caption)


def _slope(axes: Axes, y: int, peer: Row) -> None:
    before, after, sd = peer["before"]["mean"], peer["after"]["mean"], peer["after"]["sd"]
    axes.plot([before, after], [y, y], color="#b9c0c7", linewidth=1.4, zorder=1)
    axes.plot(before, y, "o", color="#8a919a", markerfacecolor="white", label="before")
    axes.errorbar(after, y, xerr=sd, fmt="o", color=COLORS[0], capsize=2)
    axes.plot(after, y, "o", color=COLORS[0], label="after")


def _flips_figure(summary: Mapping[str, Any]) -> list[Html]:
    names, arms = summary["names"], list(summary["arms"])
    peers = {arm: summary["arms"][arm]["peers"] for arm in arms}
    if not _has_flips(summary):
        return []

    def paint(figure: Figure) -> None:
        panels = _panels(figure, len(names), sharex=True, sharey=True)
        for axes, name in zip(panels, names, strict=False):
            for what, sign, color in (("fixed", 1, COLORS[2]), ("broken", -1, COLORS[1])):
                counts = [sign * (peers[arm][name][what] or 0) for arm in arms]
                bars = axes.barh(range(len(arms)), counts, color=color, label=what, height=0.7)
                axes.bar_label(bars, [f"{abs(c):.0f}" for c in counts], padding=2, fontsize=8)
            axes.axvline(0, color="#8a919a", linewidth=1)
            axes.margins(x=0.22)
            axes.set_title(_short(name, names))
            axes.xaxis.set_major_formatter(lambda x, _: f"{abs(x):g}")
            _arm_axis(axes, arms)
        handles, labels = panels[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=2)

    alt = "; ".join(
        f"{arm}, {name}: {_count(peer['fixed'])} fixed, {_count(peer['broken'])} broken"
        for arm in arms
        for name, peer in peers[arm].items()
    )
    caption = "Samples that training turned right (fixed) and wrong (broken), mean over seeds."
    rows = math.ceil(len(names) / 2)
    return [_figure(_draw(paint, 0.5 + rows * (0.6 + 0.26 * len(arms))), alt, caption)]


def _panels(figure: Figure, count: int, sharex: bool = False, sharey: bool = False) -> list[Axes]:
    """Lay panels out in two columns and hide what is left over."""
    columns = min(count, 2)
    grid = figure.subplots(
        math.ceil(count / columns), columns, sharex=sharex, sharey=sharey, squeeze=False
    )
    for axes in grid.flat[count:]:
        axes.set_visible(False)
    for axes in grid.flat[:count][-columns:]:
        axes.tick_params(labelbottom=True)
    return list(grid.flat)


def _arm_axis(axes: Axes, arms: Sequence[str]) -> None:
    axes.set_yticks(range(len(arms)), [_short(arm, arms) for arm in arms])
    axes.set_ylim(len(arms) - 0.4, -0.6)
    axes.grid(False, axis="y")


# ---------------------------------------------------------------- figures: the small parts


def _draw(paint: Callable[[Figure], None], height: float, width: float = WIDTH) -> bytes:
    """Return a figure as SVG, without touching pyplot's state."""
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(width, height), layout="constrained")
        paint(figure)
        file = BytesIO()
        figure.savefig(file, format="svg", metadata={"Date": None})
    return file.getvalue()


def _lines(axes: Axes, names: Sequence[str], rows: Sequence[Row], what: str) -> None:
    for i, name in enumerate(names):
        values = _series(rows, f"{name}/{what}")
        label = _short(name, names)
        marker = _marker(i) if len(rows) <= 40 else ""
        axes.plot(_epochs(rows), values, f"-{marker}", color=_color(i), label=label)


def _epoch_axis(axes: Axes, label: str) -> None:
    axes.set_xlabel("epoch")
    axes.set_ylabel(label)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    left, right = axes.get_xlim()
    if right - left < 1:
        axes.set_xlim(left - 0.5, right + 0.5)


def _legend(figure: Figure, axes: Axes) -> None:
    handles, labels = axes.get_legend_handles_labels()
    columns = max(1, min(len(labels), 60 // (max(map(len, labels)) + 6)))
    figure.set_figheight(figure.get_figheight() + 0.2 * math.ceil(len(labels) / columns))
    figure.legend(handles, labels, loc="outside lower center", ncols=columns)


def _color(i: int) -> str:
    return COLORS[i % len(COLORS)]


def _marker(i: int) -> str:
    return MARKERS[i % len(MARKERS)]


def _short(name: str, names: Sequence[str], most: int = 28) -> str:
    """Cut a long name for a figure, if it stays unlike the others; the tables have it whole."""
    cut = [other if len(other) <= most else other[: most - 1] + "…" for other in names]
    short = name if len(name) <= most else name[: most - 1] + "…"
    label = short if cut.count(short) == 1 else name
    # matplotlib leaves labels that start with an underscore out of legends
    return f" {label}" if label.startswith("_") else label


# ---------------------------------------------------------------- rows and numbers


def _epochs(rows: Sequence[Row]) -> list[int]:
    return [int(row["epoch"]) for row in rows]


def _series(rows: Sequence[Row], key: str) -> list[float]:
    return [_float(row.get(key)) for row in rows]


def _has(rows: Sequence[Row], key: str) -> bool:
    return any(_finite(row.get(key)) for row in rows)


def _float(value: Any) -> float:
    return math.nan if value is None else float(value)


def _finite(value: Any) -> bool:
    return value is not None and math.isfinite(value)


def _number(value: Any, digits: int = 2, sign: bool = False) -> str:
    if not _finite(value):
        return MISSING
    return f"{value:{'+' if sign else ''}.{digits}f}"


def _number_format(values: Iterable[Any]) -> Show:
    """Choose the digits for a metric: two for percentages and the like, four for small ones."""
    largest = max((abs(value) for value in values if _finite(value)), default=0.0)
    digits = 2 if largest > 10 else 4

    def show(value: Any, sign: bool = False) -> str:
        return _number(value, digits, sign)

    return show


def _percent(value: Any) -> str:
    return f"{100 * value:.1f} %" if _finite(value) else MISSING


def _count(value: Any) -> str:
    return f"{value:.0f}" if _finite(value) else MISSING


def _setting(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return ", ".join(map(str, value))
    return MISSING if value is None else str(value)


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Set cells in columns for a fixed-width font, the first to the left, the others right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows
    ]


def _listed(words: Iterable[str]) -> str:
    words = list(words)
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


# ---------------------------------------------------------------- HTML: the small parts


class Html(str):
    """Text that is HTML already; every other string is escaped when it becomes a child."""

    __slots__ = ()


def _tag(element: str, *children: object, **attributes: object) -> Html:
    """Build an element; ``class_`` gives ``class``."""
    opened = "".join(
        f' {name.rstrip("_")}="{html.escape(str(value))}"' for name, value in attributes.items()
    )
    return Html(f"<{element}{opened}>{_inside(children)}</{element}>")


def _inside(children: Iterable[object]) -> str:
    return "".join(c if isinstance(c, Html) else html.escape(str(c)) for c in children)


def _section(title: str, *parts: Html) -> Html:
    return _tag("section", _tag("h2", title), *parts)


def _paragraphs(sentences: Iterable[str]) -> list[Html]:
    return [_tag("p", sentence) for sentence in sentences]


def _items(sentences: Iterable[str]) -> Html:
    return _tag("ul", *(_tag("li", sentence) for sentence in sentences))


def _table(
    caption: str,
    head: Sequence[str],
    rows: Iterable[Sequence[object]],
    labels: int = 1,
    words: bool = False,
) -> Html:
    """Lay out a table whose first ``labels`` columns name the rows; ``words``: cells hold text."""
    top = _tag("tr", *(_column_head(i, cell, labels) for i, cell in enumerate(head)))
    body = [_tag("tr", *(_cell(i, c, labels) for i, c in enumerate(row))) for row in rows]
    table = _tag(
        "table",
        _tag("caption", caption),
        _tag("thead", top),
        _tag("tbody", *body),
        class_="words" if words else "numbers",
    )
    return _tag("div", table, class_="scroll")


def _column_head(i: int, cell: object, labels: int) -> Html:
    return _tag("th", cell, scope="col", class_="label" if i < labels else "value")


def _cell(i: int, cell: object, labels: int) -> Html:
    if i < labels:
        return _tag("th", cell, scope="row", class_="label")
    return _tag("td", cell)


def _figure(image: bytes, alt: str, caption: str, kind: str = "svg+xml") -> Html:
    source = f"data:image/{kind};base64,{base64.b64encode(image).decode()}"
    picture = Html(f'<img src="{source}" alt="{html.escape(alt)}">')
    return _tag("figure", picture, _tag("figcaption", caption))


def _figures(figures: Iterable[Html]) -> Html:
    return _tag("div", *figures, class_="figures")


def _write_page(path: Path | str, title: str, body: Iterable[Html]) -> Path:
    head = _tag(
        "head",
        Html('<meta charset="utf-8">'),
        Html('<meta name="viewport" content="width=device-width, initial-scale=1">'),
        _tag("title", title),
        _tag("style", Html(_CSS)),
    )
    main = _tag("body", _tag("main", _tag("h1", title), *body))
    page = f"<!DOCTYPE html>\n{_tag('html', head, main, lang='en')}\n"
    path = Path(path)
    atomic_write(path, lambda to: to.write_text(page, encoding="utf-8"))
    return path
