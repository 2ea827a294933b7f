"""The report of several arms over several seeds."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from common.report.claims import counted, secondary, sentences, shown_means, too_many_arms
from common.report.comparison_figures import (
    FLIPS_ARE,
    before_after_figure,
    flips_figure,
    forest,
)
from common.report.effects import (
    SHORT_TARGETS,
    TARGET_NAMES,
    has_flips,
    headline_words,
    interval_text,
    spread_text,
    starred,
    summary_format,
)
from common.report.lessons import anybody_taught, heat_map, pair_lessons, teaching_over_time
from common.report.numbers import (
    MISSING,
    Row,
    aligned,
    as_float,
    as_percent,
    listed,
    number,
)
from common.report.page import (
    Html,
    Section,
    Summary,
    bullets,
    data_table,
    figure_grid,
    long_table,
    picture_section,
    picture_tag,
    section,
    settings_section,
    tag,
    write_page,
)
from common.report.plots import LINE
from common.statistics import ENOUGH_SEEDS, FLIPS, PRIMARY, compared


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
    pictures: Sequence[tuple[bytes, str]] = (),
    chosen: str = "best",
    chance: str = "random",
) -> Path:
    """Write the comparison of several arms, each over several seeds.

    Args:
        path: The HTML file; written whole or not at all.
        title: Of the page.
        names: The peers'.
        arms: In the order they shall have.
        results: One an arm and seed, as ``common.statistics.compared`` takes them.
        control: The arm that the others are compared with.
        metric: What the values are called.
        lower_is_better: Of the metric.
        descriptions: A sentence for an arm.
        settings: Plain values, shown as they are.
        notes: Sentences to add.
        data_examples: A PNG and its caption.
        pictures: PNGs of results, and their captions.
        chosen, chance: As ``common.statistics.compared``.

    Returns:
        Where it lies.

    Raises:
        ValueError: As ``common.statistics.compared``.
    """
    summary = compared(
        results,
        names,
        control,
        arms=arms,
        metric=metric,
        lower_is_better=lower_is_better,
        chosen=chosen,
        chance=chance,
    )
    cautions = _cautions(summary)
    verdict, points = headline_words(summary)
    first = Summary(
        kind="Comparison",
        verdict=[verdict, *secondary([summary]), counted([summary])],
        points=points,
        facts={
            "Peers": len(names),
            "Arms": len(summary["arms"]),
            "Seeds": len(summary["seeds"]),
            "Measured by": metric,
        },
        cautions=cautions,
        about=" ".join([_about(summary), *notes]),
    )
    sections = [
        section("Gains over the control", *forest(summary), _gains_table(summary)),
        section("In words", bullets(comparison_sentences(summary)[len(cautions) :])),
        *_versus_section(summary),
        section("What was compared", arms_table(summary, descriptions), *_examples(data_examples)),
        section(
            "Before and after",
            figure_grid([before_after_figure(summary), *flips_figure(summary)]),
            peers_table(summary),
        ),
        *comparison_teaching(summary),
        *picture_section(pictures),
        settings_section(settings),
    ]
    return write_page(path, title, first, sections)


def comparison_text(summary: Mapping[str, Any]) -> str:
    """Lay out a summary for a terminal: the table of gains, then what it shows in plain words.

    Args:
        summary: From ``common.statistics.compared``.

    Returns:
        Lines of plain text, no trailing newline.
    """
    head, rows = _gains_cells(summary)
    caption = f"{summary['metric']}. {_gains_caption(summary)}"
    lines = [*textwrap.wrap(caption, LINE), "", *aligned([head, *rows]), ""]
    for sentence in comparison_sentences(summary):
        lines += textwrap.wrap(sentence, LINE, initial_indent="- ", subsequent_indent="  ")
    return "\n".join(lines)


def comparison_sentences(summary: Mapping[str, Any]) -> list[str]:
    """Say what a summary shows and what it does not; every claim outlasts its correction.

    Args:
        summary: From ``common.statistics.compared``.

    Returns:
        Sentences, the most important caution first.
    """
    return [
        *_cautions(summary),
        _control_sentence(summary),
        headline_words(summary)[0],
        *sentences([summary]),
        *_choice_of_teacher(summary),
        *_same_in_all_seeds(summary),
    ]


def _cautions(summary: Mapping[str, Any]) -> list[str]:
    count = len(summary["seeds"])
    if count >= ENOUGH_SEEDS:
        return too_many_arms(summary)
    proves = f"{count} seeds prove nothing"
    if count == 1:
        proves = "1 seed proves nothing, and gives no interval"
    return [
        f"{proves}: this is a demonstration. The numbers are given, but none of them counts as "
        f"shown; take at least {ENOUGH_SEEDS} seeds to learn more."
    ]


def _control_sentence(summary: Mapping[str, Any]) -> str:
    show, control = summary_format(summary), summary["control"]
    arm = summary["arms"][control]
    before, after = (show(arm[when]["mean"]["mean"]) for when in ("before", "after"))
    return (
        f"The control {control} took {TARGET_NAMES['mean']} from {before} to {after} "
        f"{summary['metric']}; gains count only what an arm reached beyond the control with the "
        "same seed."
    )


def _choice_of_teacher(summary: Mapping[str, Any]) -> list[str]:
    """Say whether the rule's choice of teacher did better than drawing one, for what counts."""
    return [
        f"{pair['first']} against {pair['second']}: {TARGET_NAMES[PRIMARY]} "
        f"{interval_text(effect, summary)}. So this data "
        f"{'shows' if effect['shown'] else 'does not show'} that the choice of teacher matters for "
        f"{TARGET_NAMES[PRIMARY]}."
        for pair in summary["pairs"]
        if (effect := pair["effects"][PRIMARY]) is not None
    ]


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
        f"Every seed gave the same difference in a comparison of {listed(dict.fromkeys(arms))}: "
        "such seeds are one run seen several times, and it is not called shown; check that the "
        "seed reaches the data and the training."
    ]


def _about(summary: Mapping[str, Any]) -> str:
    seeds = len(summary["seeds"])
    return (
        f"{listed(summary['names'])}: {len(summary['arms'])} ways to train from the same start "
        f"({listed(summary['arms'])}), over {seeds} seed{'s' * (seeds != 1)}. "
        f"{shown_means(summary)}"
    )


def arms_table(summary: Mapping[str, Any], descriptions: Mapping[str, str]) -> Html:
    """Say what each arm does."""
    rows = [
        [
            f"{arm} (control)" if arm == summary["control"] else arm,
            descriptions.get(arm, MISSING),
            values["seeds"],
        ]
        for arm, values in summary["arms"].items()
    ]
    return data_table("The arms.", ["Arm", "What it does", "Seeds"], rows, words=True)


def _examples(data_examples: tuple[bytes, str] | None) -> list[Html]:
    if data_examples is None:
        return []
    image, caption = data_examples
    return [picture_tag(image, caption)]


def _gains_table(summary: Mapping[str, Any]) -> Html:
    head, rows = _gains_cells(summary)
    return data_table(_gains_caption(summary), head, rows)


def _gains_caption(summary: Mapping[str, Any]) -> str:
    turned = "; positive is better" if summary["lower_is_better"] else ""
    return (
        f"Gain over the control with the same seed{turned}, mean over seeds and "
        f"{100 * summary['level']:g} % interval (Student's t, uncorrected). A star: shown, after "
        f"correction. The primary target is {TARGET_NAMES[PRIMARY]}; the others are secondary. The "
        "control's row has its values after training. Strongest and weakest are meant as at the "
        "start of each seed."
    )


def _gains_cells(summary: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    show, targets = summary_format(summary), summary["targets"]
    rows = []
    for arm, values in summary["arms"].items():
        if arm == summary["control"]:
            cells = [spread_text(values["after"][what], show) for what in targets]
            rows.append([f"{arm} (control)", *cells])
        else:
            effects = summary["gains"][arm]
            rows.append([arm, *(starred(summary, effects[what]) for what in targets)])
    return ["Arm", *(SHORT_TARGETS[what] for what in targets)], rows


def _versus_section(summary: Mapping[str, Any]) -> list[Section]:
    chosen = summary["chosen"]
    if chosen is None or not summary["versus"]:
        return []
    targets = [what for what in summary["targets"] if what != "weakest"]
    rows = [
        [f"{chosen} minus {arm}", *(interval_text(effects[what], summary) for what in targets)]
        for arm, effects in summary["versus"].items()
    ]
    caption = (
        f"{summary['metric']} of {chosen} minus that of each other arm with the same seed"
        f"{'; positive is better' if summary['lower_is_better'] else ''}, mean over seeds and "
        f"{100 * summary['level']:g} % interval. Nothing here is corrected, and no claim "
        "rests on it."
    )
    head = ["Difference", *(SHORT_TARGETS[what] for what in targets)]
    return [section(f"{chosen} against the other arms", data_table(caption, head, rows))]


def peers_table(summary: Mapping[str, Any], flips_are: str | None = None) -> Html:
    """Show every peer of every arm before and after.

    Args:
        summary: From ``common.statistics.compared``.
        flips_are: What fixed and broken count; None: samples that turned right, and wrong.
    """
    flips = has_flips(summary)
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
        caption += f" Fixed and broken: {flips_are or FLIPS_ARE}, mean over seeds."
    cut = [row[: len(head)] for row in rows]
    return long_table("Every arm and peer", caption, head, cut, labels=2)


def _peer_row(
    arm: str, who: str, values: Row, gain: Row | None, summary: Mapping[str, Any]
) -> list[object]:
    show = summary_format(summary)
    spreads = [spread_text(values[when], show) for when in ("before", "after")]
    flips = [number(values.get(what), 1) for what in FLIPS]
    return [arm, who, *spreads, interval_text(gain, summary), *flips]


def comparison_teaching(summary: Mapping[str, Any]) -> list[Section]:
    """Show who taught whom in every arm; nothing where nobody did."""
    names = summary["names"]
    lessons = {arm: values["lessons"] for arm, values in summary["arms"].items()}
    lessons = {arm: rows for arm, rows in lessons.items() if anybody_taught(names, rows)}
    if not lessons:
        return []
    parts = []
    if summary["chosen"] in lessons:
        rows = lessons[summary["chosen"]]
        parts.append(tag("p", f"The figures are of the arm {summary['chosen']}, mean over seeds."))
        pairs = pair_lessons(names, rows)
        heat = [heat_map(names, pairs)] if pairs else []
        parts.append(figure_grid([*heat, *teaching_over_time(names, rows)]))
    return [section("Who taught whom", *parts, _teaching_table(names, lessons))]


def _teaching_table(names: Sequence[str], lessons: Mapping[str, Sequence[Row]]) -> Html:
    rows = [
        [
            arm,
            f"{pair.teacher} → {pair.student}",
            as_percent(as_float(found[0].get(f"transfer/{pair.teacher}->{pair.student}/share"))),
            as_percent(as_float(found[-1].get(f"transfer/{pair.teacher}->{pair.student}/share"))),
            as_percent(pair.share),
            number(pair.gap, 3),
            as_percent(pair.teacher_right),
        ]
        for arm, found in lessons.items()
        for pair in pair_lessons(names, found)
    ]
    head = ["Arm", "Teacher to student", "At first", "At last", "All the time", "Gap"]
    caption = (
        "Of all samples, how many a teacher taught a student, mean over seeds. Gap: the teacher's "
        "score minus the student's. Last column: of the samples taught."
    )
    head.append("Teacher right, student wrong")
    return long_table("Every arm and pair", caption, head, rows, labels=2)
