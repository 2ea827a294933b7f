"""Predictions of scouting, compared with finished runs: files, page and log."""

from __future__ import annotations

import argparse
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from common.checkpoint import atomic_write
from common.options import OptionError
from common.outputs import log_table
from common.realised import FinishedRun, Realised, compare, realised_gains
from common.report.realised import (
    HEAD,
    correlation_rows,
    realised_cautions,
    realised_lead,
    write_realised_report,
)
from common.roles import check_rule
from common.scouting import Judge, default_predictor

_logger = logging.getLogger("scout")

Gains = Mapping[tuple[int, ...], Sequence[float]]


def add_realised_option(add: Callable[..., Any]) -> None:
    """Add ``--realised`` to a parser or a group of it.

    Args:
        add: Its ``add_argument``.
    """
    add(
        "--realised",
        action="extend",
        nargs="+",
        metavar="RUN",
        help="compare predictions with what these finished runs of training gained, over controls "
        "(rule none) among them; models, options and data are the runs' own unless given",
    )


def runs_asked(arguments: Sequence[str]) -> list[str]:
    """Find the runs of ``--realised``, before all else is parsed: the first gives the rest.

    Args:
        arguments: A whole command line.

    Returns:
        As given, with or without ``=``, at all places; empty where there are none.
    """
    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    add_realised_option(early.add_argument)
    return early.parse_known_args(arguments)[0].realised or []


def refuse_unlabelled(folder: object) -> None:
    """Refuse ``--unlabelled`` beside ``--realised``.

    Raises:
        OptionError: It is given.
    """
    if folder:
        raise OptionError(
            f"--unlabelled {folder} with --realised: predictions are tested on labelled data; "
            "leave one of them out"
        )


def refuse_skipping(skip: bool) -> None:
    """Refuse ``--skip-unfit`` beside ``--realised``: gains are of the runs' models, each of them.

    Raises:
        OptionError: It is given.
    """
    if skip:
        raise OptionError(
            "--skip-unfit with --realised: every model of the runs is needed; leave out "
            "--skip-unfit, or the runs with models that cannot be had"
        )


def gains_of(finished: Sequence[FinishedRun], names: Sequence[str]) -> list[Realised]:
    """Measure what runs gained; to be asked before any model is loaded.

    Args:
        finished: The runs, controls among them.
        names: Of their models.

    Returns:
        See ``common.realised.realised_gains``.

    Raises:
        OptionError: No run with transfer, or runs that cannot be compared or judged.
    """
    try:
        gained = realised_gains(finished)
        for one in gained:
            check_rule(one.rule, names)
    except ValueError as error:
        raise OptionError(f"--realised: {error}") from error
    return gained


def check_runs(
    gained: Sequence[Realised],
    judge: Callable[[Realised], Judge],
    ensembles: Callable[[list[tuple[int, ...]]], Gains | None],
    predictor: str | None,
    default: Callable[[Judge], str] = lambda judge: default_predictor(judge.found, judge.rule),
) -> dict[str, Any]:
    """Compare predictions with what runs gained.

    Args:
        gained: From ``gains_of``.
        judge: See ``common.realised.compare``.
        ensembles: Measures for some teams by how much the members' mean is better than each at the
            start; gives None where it cannot be told.
        predictor: What teams are ranked by; None: the default.
        default: Chooses it.

    Returns:
        Plain containers: ``names``, ``predictor``, ``realised`` and ``transfer``, the options that
        predictions were made by, each value that runs had.

    Raises:
        OptionError: Runs or a predictor that do not fit what the models answered.
    """
    try:
        first = judge(gained[0])
        chosen = predictor or default(first)
        if chosen not in first.usable:
            raise ValueError(f"predictor {chosen!r}: choose from {', '.join(first.usable)}")
        told = compare(gained, judge, ensembles(list({one.members for one in gained})))
    except ValueError as error:
        raise OptionError(f"--realised: {error}") from error
    return {
        "names": list(first.found.names),
        "predictor": chosen,
        "realised": told,
        "transfer": _transfer_of(gained),
    }


def _transfer_of(gained: Sequence[Realised]) -> dict[str, Any]:
    values = {name: [getattr(one, name) for one in gained] for name in ("rule", "score", "margin")}
    if any(one.grouped for one in gained):
        values["granularity"] = [one.grouped for one in gained]
    different = {name: list(dict.fromkeys(several)) for name, several in values.items()}
    return {name: v[0] if len(v) == 1 else v for name, v in different.items()}


def write_check(folder: Path, outcome: Mapping[str, Any]) -> dict[str, Any]:
    """Write ``scout.json`` and ``report.html``, and log what was found.

    Args:
        folder: Of the report.
        outcome: See ``common.report.realised.write_realised_report``, and ``transfer``, which goes
            before the settings: those are of the first run, a control perhaps.

    Returns:
        What ``scout.json`` holds.
    """
    outcome = {**outcome, "settings": {**outcome["settings"], **outcome["transfer"]}}
    text = json.dumps(outcome, indent=1)
    atomic_write(folder / "scout.json", lambda to: to.write_text(text, encoding="utf-8"))
    report = write_realised_report(folder / "report.html", outcome)
    _logger.info("%s", realised_lead(outcome))
    log_table([dict(zip(HEAD, row, strict=True)) for row in correlation_rows(outcome)])
    for caution in realised_cautions(outcome):
        level = logging.WARNING if caution in outcome["starts"] else logging.INFO
        _logger.log(level, "%s", caution)
    _logger.info("report: %s", report)
    return outcome
