"""Reports one can look at: a run, or arms over seeds, each one self-contained HTML file."""

from __future__ import annotations

import base64
import html
import math
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

Row = Mapping[str, Any]
Show = Callable[..., str]

MISSING = "–"
# Okabe and Ito: told apart with colour blindness too
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7f5539", "#6c757d")
MARKERS = "osD^vP*X"
WIDTH = 5.8
RUN_CAUTION = (
    "One run proves nothing about who should teach whom: part of any change comes from training "
    "longer, part from chance. Evidence needs the control, which is the same run without transfer "
    "(--rule none, same seed), and several seeds of both. Each best epoch was chosen on the same "
    "data it is measured on, so its number is optimistic; the last epoch was not chosen."
)
_STYLE: dict[Any, Any] = {
    "font.size": 9.5,
    "axes.titlesize": 10,
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
table { border-collapse: collapse; font-size: .92rem; font-variant-numeric: tabular-nums; }
caption { text-align: left; color: var(--soft); padding-bottom: .4rem; max-width: 46rem; }
th, td { padding: .32rem .7rem; border-bottom: 1px solid var(--line); text-align: right; }
td { white-space: nowrap; }
thead th { color: var(--soft); font-weight: 600; vertical-align: bottom; }
th:first-child { text-align: left; padding-left: 0; }
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
        axes.set_ylim(bottom=0)
        _legend(figure, axes)

    caption = f"{title}, mean over each epoch's training batches."
    return _figure(_draw(paint, 2.6), f"{title} of {_listed(names)} per epoch", caption)


def _teaching_over_time(names: Sequence[str], lessons: Sequence[Row]) -> list[Html]:
    figures = []
    shares = {name: _series(lessons, f"{name}/teaches") for name in names}
    if any(_finite(share) and share > 0 for column in shares.values() for share in column):
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
    if whole.max() > 1.001:
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
    digits = 2 if largest > 2 else 4

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
    caption: str, head: Sequence[str], rows: Iterable[Sequence[object]], words: bool = False
) -> Html:
    """Lay out a table whose first column names the rows; ``words``: cells hold text."""
    top = _tag("tr", *(_tag("th", cell, scope="col") for cell in head))
    body = [
        _tag("tr", _tag("th", row[0], scope="row"), *(_tag("td", cell) for cell in row[1:]))
        for row in rows
    ]
    table = _tag(
        "table",
        _tag("caption", caption),
        _tag("thead", top),
        _tag("tbody", *body),
        class_="words" if words else "numbers",
    )
    return _tag("div", table, class_="scroll")


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
