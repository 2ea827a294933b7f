"""Named sets of defaults for the transfer: what the paper does, and what is known to work best.

Data, not code: one line for each option, with where its value comes from. An option that is given,
on the command line or in a YAML file, overrides a recipe's.
"""

from __future__ import annotations

import argparse
from typing import Any, NamedTuple


class Setting(NamedTuple):
    """A recipe's value for an option.

    Attributes:
        value: As the option holds it.
        source: Where it comes from.
    """

    value: Any
    source: str


PAPER = "Jain, Karthik and Gandhi, TMLR 2025"
SCRIPTS = f"the published scripts of {PAPER}"
NOT_IN_PAPER = "not part of the paper"
DIGITS = "classification/configs/experiments/digits.yaml, see benchmarks/RESULTS.md"
DEFAULT = "the default; nothing better is known"

RECIPES: dict[str, dict[str, Setting]] = {
    # what the method is, rightly implemented: ties teach nobody, every model in its own view
    "paper": {
        "rule": Setting("best", PAPER),
        "score": Setting("loss", f"{PAPER}: probability of the true class, or minus the loss"),
        "temperature": Setting(1.0, PAPER),
        "transfer_weight": Setting(1.0, PAPER),
        "transfer_warmup_steps": Setting(0, PAPER),
        "detach_teacher": Setting(False, f"{SCRIPTS} of classification and saliency"),
        "teachers": Setting("peers", PAPER),
        "transfer_classes": Setting("all", PAPER),
        "margin": Setting(None, NOT_IN_PAPER),
        "gap_power": Setting(0.0, NOT_IN_PAPER),
        "calibrate_scores": Setting("off", NOT_IN_PAPER),
    },
    # averaged copies teach, their own peer too, each as much as the true class speaks for it
    "best-known": {
        "rule": Setting("mixture", DIGITS),
        "score": Setting("loss", DIGITS),
        "temperature": Setting(2.0, DIGITS),
        "transfer_weight": Setting(1.0, DIGITS),
        "transfer_warmup_steps": Setting(0, DEFAULT),
        "detach_teacher": Setting(True, "averages are moved by no gradient"),
        "teachers": Setting("ema+own", DIGITS),
        "model_ema": Setting(True, DIGITS),
        "model_ema_span": Setting(0.25, f"{DIGITS}: a tenth and a half of the run were worse"),
        "transfer_classes": Setting("all", DEFAULT),
        "margin": Setting(None, DEFAULT),
        "gap_power": Setting(0.0, f"{DIGITS}: 1 was worse"),
        "calibrate_scores": Setting("off", DEFAULT),
    },
}


def values_of(recipe: str) -> dict[str, Any]:
    """Return a recipe's values by option.

    Raises:
        ValueError: No such recipe; lists them.
    """
    if recipe not in RECIPES:
        raise ValueError(f"unknown recipe {recipe!r}; choose from {', '.join(RECIPES)}")
    return {name: setting.value for name, setting in RECIPES[recipe].items()}


def told(options: argparse.Namespace) -> str | None:
    """Say which recipe a run has, and in what it differs from it; None: no recipe."""
    if options.recipe is None:
        return None
    other = [
        f"{name} {getattr(options, name)}"
        for name, value in values_of(options.recipe).items()
        if getattr(options, name, value) != value
    ]
    return options.recipe + (f", but {', '.join(other)}" if other else "")


def help_text() -> str:
    """Describe the recipes by their rule and weight, and by what sets them apart."""
    tables = {name: values_of(name) for name in RECIPES}
    shown = [
        key
        for key, value in tables["paper"].items()
        if key in ("rule", "transfer_weight") or any(t[key] != value for t in tables.values())
    ]
    lines = (
        f"{name}: " + ", ".join(f"{key.replace('_', ' ')} {table[key]}" for key in shown)
        for name, table in tables.items()
    )
    return "defaults of the transfer, which options that are given override; " + "; ".join(lines)
