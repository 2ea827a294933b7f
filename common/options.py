"""What the command lines of the tasks share: options of the transfer, and of single peers."""

from __future__ import annotations

import argparse
import ast
import difflib
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from common import recipes
from common.engine import ENGINES
from common.finite import MOST_SKIPS, ON_NONFINITE
from common.guard import POLICIES, Bounds
from common.peers import check_names
from common.roles import RULES
from common.transfer import CLASSES, SCORES, TEACHERS, KnowledgeTransfer

_SHOWN = 500  # characters of a value in an error


class OptionError(ValueError):
    """An argument that cannot be used; says which, and what to do."""


def add_transfer_options(group: Any) -> None:
    """Add the options of ``KnowledgeTransfer`` to a parser or a group of it."""
    add = group.add_argument
    add("--recipe", choices=tuple(recipes.RECIPES), help=recipes.help_text())
    add("--rule", default="best", help=f"who teaches whom: {', '.join(RULES)}, one_way:NAME, self")
    add("--score", default="loss", choices=SCORES, help="what the rule compares")
    add("--temperature", type=float, default=1.0)
    add("--transfer-weight", type=float, default=1.0, help="lambda of the transfer loss")
    add("--transfer-warmup-steps", type=int, default=0, help="optimizer steps to the full weight")
    add(
        "--detach-teacher",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="no gradient through the teacher (--no-detach-teacher: as in the paper's scripts)",
    )
    add("--margin", type=float, default=None, help="teach only where the score gap exceeds this")
    add(
        "--gap-power",
        type=float,
        default=0.0,
        help="weigh each lesson by (1 - exp(-score gap))^power; 0: all alike",
    )
    add(
        "--transfer-classes",
        default="all",
        choices=CLASSES,
        help="non-target: transfer only how the wrong classes compare (needs hard targets)",
    )
    add(
        "--teachers",
        default="peers",
        choices=TEACHERS,
        help="ema: copies of the peers with averaged weights give scores and targets; ema+own: a "
        "copy that teaches also teaches its own peer; one more forward a peer and step",
    )
    add(
        "--engine",
        default="joint",
        choices=tuple(ENGINES),
        help="joint: all peers' activations at once; two-pass: one peer's at a time, with N - 1 "
        "more forwards a step; peer-parallel: each process of torchrun holds one peer",
    )


def add_guard_options(group: Any, drops: Mapping[str, float], flips: bool = False) -> None:
    """Add the options of ``Bounds`` to a parser or a group of it.

    Args:
        drops: The default bound for every metric.
        flips: Whether the task counts negative flips.
    """
    add = group.add_argument
    told = ", ".join(f"{drop:g} for {metric}" for metric, drop in drops.items())
    add(
        "--guard",
        default="warn",
        choices=POLICIES,
        help="what to do where a peer gets worse than at its start: warn, or take it back to its "
        "best weights and let nobody teach it any more",
    )
    add("--guard-metric-drop", type=float, help=f"bound on that; default: {told}")
    add("--guard-patience", type=int, default=2, help="evaluations in a row beyond a bound")
    if flips:
        add(
            "--guard-flips",
            type=float,
            help="bound on the samples that were right at the start and are wrong now, in percent",
        )


def bounds_of(options: argparse.Namespace, drops: Mapping[str, float]) -> Bounds:
    """Build what ``add_guard_options`` describes.

    Raises:
        OptionError: An option out of its range.
    """
    drop = options.guard_metric_drop
    try:
        return Bounds(
            options.guard,
            drops[options.eval_metric] if drop is None else drop,
            getattr(options, "guard_flips", None),
            options.guard_patience,
        )
    except ValueError as error:
        raise OptionError(str(error)) from error


def add_fault_options(group: Any) -> None:
    """Add what becomes of losses that are not finite; see ``common.finite.FiniteCheck``."""
    add = group.add_argument
    add(
        "--on-nonfinite",
        default="stop",
        choices=ON_NONFINITE,
        help="a loss or gradient that is not finite: stop the run, or skip the optimizer step of "
        "all peers (an accelerator then waits once a step)",
    )
    add(
        "--max-skips-in-a-row",
        type=int,
        default=MOST_SKIPS,
        metavar="N",
        help="optimizer steps that may be skipped in a row before the run stops",
    )


def add_bad_sample_option(group: Any) -> None:
    """Add how many broken files a run may do without; see ``common.broken.BadSamples``."""
    group.add_argument(
        "--max-bad-samples",
        type=int,
        default=0,
        metavar="N",
        help="broken files that may be replaced by others in training, and left out of evaluation "
        "for all peers alike; one more stops the run",
    )


def add_resume_options(group: Any) -> None:
    """Add how a run goes on; see ``common.outputs.read_resumed``."""
    add = group.add_argument
    add("--resume", default="", metavar="PATH", help="a run file, a folder with some, or auto")
    add(
        "--no-resume-opt",
        action="store_true",
        default=False,
        help="resume weights and position, with fresh optimizers",
    )
    add(
        "--allow-changed-options",
        action="store_true",
        default=False,
        help="resume under other options than the run had, and tell them, instead of refusing",
    )


def add_soup_option(group: Any) -> None:
    """Add ``--soup`` to a parser or a group of it."""
    group.add_argument(
        "--soup",
        action="store_true",
        default=False,
        help="at the end, also try averages of each peer's start and best weights; one half of the "
        "validation data chooses, the other half measures",
    )


def transfer_of(
    options: argparse.Namespace, names: Sequence[str], frozen: Sequence[str] = (), rank: int = 0
) -> KnowledgeTransfer:
    """Build the objective that ``add_transfer_options`` describes.

    Raises:
        OptionError: Names that cannot be peers', or an option out of its range.
    """
    try:
        check_names(names)
        return KnowledgeTransfer(
            options.rule,
            options.temperature,
            options.transfer_weight,
            options.detach_teacher,
            margin=options.margin,
            gap_power=options.gap_power,
            classes=options.transfer_classes,
            teachers=options.teachers,
            warmup_steps=options.transfer_warmup_steps,
            names=names,
            frozen=frozen,
            seed=options.seed + rank,
        )
    except ValueError as error:
        raise OptionError(str(error)) from error


def wants_copies(options: argparse.Namespace) -> bool:
    """Whether averaged copies teach; see ``KnowledgeTransfer.wants_copies``."""
    return options.teachers != "peers" and options.rule != "none"


def check_copies(options: argparse.Namespace, bare: Sequence[str], flag: str) -> None:
    """Refuse averaged copies as teachers where there are none.

    Args:
        options: With those of the transfer.
        bare: Names of the peers that learn and have no average, or one that is kept elsewhere.
        flag: What makes an average.

    Raises:
        OptionError: Names the peers, and what to do.
    """
    if wants_copies(options) and bare:
        raise OptionError(
            f"--teachers {options.teachers}: {', '.join(bare)} has no averaged copy beside it; "
            f"give {flag}, on the peer's own device"
        )


def check_least(options: argparse.Namespace, least: Mapping[str, float]) -> None:
    """Refuse options below their least value.

    Args:
        least: By the options' dests; an option that is None is not looked at.

    Raises:
        OptionError: Names the option and its value.
    """
    for name, value in least.items():
        given = getattr(options, name)
        if given is not None and not given >= value:
            raise OptionError(f"--{name.replace('_', '-')} is {given}; expected {value} or more")


def near(word: str, choices: Iterable[str]) -> str:
    """Return a hint at the choices that a word may have meant; nothing where none is near."""
    found = difflib.get_close_matches(word, list(choices), n=3)
    return f"; did you mean {' or '.join(found)}?" if found else ""


def actions_of(parser: argparse.ArgumentParser) -> dict[str, argparse.Action]:
    """Return a parser's options by dest, but for ``config`` and those hidden from its help."""
    return {
        action.dest: action
        for action in parser._actions
        if action.dest not in ("help", "config") and action.help is not argparse.SUPPRESS
    }


def parse_over_file(
    parser: argparse.ArgumentParser,
    arguments: Sequence[str] | None,
    read: Callable[[Path], Any],
) -> argparse.Namespace:
    """Parse flags over the file that ``-c`` names over a recipe over the defaults.

    Args:
        parser: With ``-c``/``--config`` and ``--peer``; its defaults become the file's values.
        arguments: As argparse takes them; None: those of the process.
        read: Gives the file's content in plain containers.

    Returns:
        The options; ``peers`` are the flags', or where there are none the file's.

    Raises:
        OptionError: No such file or recipe, or as ``read_values``.
    """
    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    early.add_argument("-c", "--config", default="")
    early.add_argument("--recipe")
    first = early.parse_known_args(arguments)[0]
    config = first.config
    values: dict[str, Any] = {}
    if config:
        path = Path(config)
        if not path.is_file():
            raise OptionError(f"{path}: no such config file")
        values = read_values(actions_of(parser), read(path), str(path))
    peers_of_file = values.pop("peers", None)
    parser.set_defaults(**_of_recipe(first.recipe or values.get("recipe"), actions_of(parser)))
    parser.set_defaults(**values)
    options = parser.parse_args(arguments)
    options.peers = options.peers or peers_of_file
    return options


def _of_recipe(recipe: str | None, actions: Mapping[str, argparse.Action]) -> dict[str, Any]:
    """Return a recipe's values for the options that this command line has."""
    if recipe is None:
        return {}
    try:
        values = recipes.values_of(recipe)
    except ValueError as error:
        raise OptionError(f"--recipe: {error}") from error
    if values.get("model_ema") and "model_ema" not in actions:
        raise OptionError(
            f"--recipe {recipe} was measured on classifiers alone and is not offered here; its "
            "parts are --rule mixture --temperature 2 --teachers ema+own, with averaged weights"
        )
    return {name: value for name, value in values.items() if name in actions}


def shown(value: Any) -> str:
    """Return a value as errors show it: as Python writes it, and of long ones the beginning."""
    try:
        told = repr(value)
    except ValueError:  # an integer of more digits than Python writes
        told = f"{type(value).__name__} of thousands of digits"
    return told if len(told) <= _SHOWN else f"{told[:_SHOWN]}... ({len(told)} characters)"


def read_values(actions: Mapping[str, argparse.Action], content: Any, where: str) -> dict[str, Any]:
    """Turn a config file's content into what the flags themselves would give.

    Args:
        actions: Of the parser, by dest.
        content: Plain containers, as read.
        where: Names the file in errors.

    Returns:
        Values by dest; ``peers`` as it is.

    Raises:
        OptionError: An option that does not exist (hints at near ones), or a value of another kind.
    """
    if not isinstance(content, dict):
        raise OptionError(f"{where}: expected `option: value` lines")
    values = {}
    for key, value in content.items():
        dest = str(key).replace("-", "_")
        if dest == "peers" and not isinstance(value, list):
            raise OptionError(f"{where}: peers is {shown(value)}; expected a list of them")
        if dest not in actions:
            raise OptionError(f"{where}: unknown option {key!r}{near(dest, actions)}")
        values[dest] = value if dest == "peers" else coerce(actions[dest], value, where)
    return values


def coerce(action: argparse.Action, value: Any, where: str) -> Any:
    """Turn a YAML or peer value into what the flag itself would give.

    Raises:
        OptionError: Names the value and what was expected.
    """
    if value is None:
        return None
    if isinstance(action.default, dict):
        if not isinstance(value, Mapping):
            raise OptionError(
                f"{where}: {action.dest} is {shown(value)}; expected key: value pairs"
            )
        return dict(value)
    if isinstance(action.const, bool) or isinstance(action, argparse.BooleanOptionalAction):
        return truth(value, f"{where}: {action.dest}")
    if isinstance(value, (list, tuple)) != takes_many(action):
        raise OptionError(f"{where}: {action.dest} is {shown(value)}; expected {_kind(action)}")
    if isinstance(action.const, str) and (value is True or value == "true"):
        return action.const
    values = value if isinstance(value, (list, tuple)) else [value]
    if isinstance(action.nargs, int) and len(values) != action.nargs:
        raise OptionError(f"{where}: {action.dest} is {shown(value)}; expected {_kind(action)}")
    try:
        made = [action.type(item) if callable(action.type) else str(item) for item in values]
    except (TypeError, ValueError, OverflowError, argparse.ArgumentTypeError) as error:
        raise OptionError(
            f"{where}: {action.dest} is {shown(value)}; expected {_kind(action)}"
        ) from error
    if action.choices is not None and any(item not in action.choices for item in made):
        raise OptionError(
            f"{where}: {action.dest} is {shown(value)}; choose from {', '.join(action.choices)}"
        )
    return made if isinstance(value, (list, tuple)) else made[0]


def takes_many(action: argparse.Action) -> bool:
    """Whether an option takes a list."""
    return action.nargs == "+" or (isinstance(action.nargs, int) and action.nargs > 0)


def _kind(action: argparse.Action) -> str:
    kind = getattr(action.type, "__name__", "str")
    count = f"{action.nargs} " if isinstance(action.nargs, int) else ""
    return f"a list of {count}{kind}" if takes_many(action) else f"one {kind}"


def truth(value: Any, where: str) -> bool:
    """Read a truth value.

    Raises:
        OptionError: It is none.
    """
    if isinstance(value, bool):
        return value
    known = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
    if str(value).lower() not in known:
        raise OptionError(f"{where} is {shown(value)}; expected true or false")
    return known[str(value).lower()]


def number(value: Any, where: str) -> float | None:
    """Read a number, or nothing.

    Raises:
        OptionError: It is none.
    """
    try:
        return None if value is None else float(value)
    except (TypeError, ValueError, OverflowError) as error:
        raise OptionError(f"{where} is {shown(value)}; expected a number") from error


def peer_mapping(asked: str | Mapping[str, Any], alone: Iterable[str] = ()) -> dict[str, Any]:
    """Turn ``MODEL,key=value`` or a YAML entry into a mapping with ``model``.

    Args:
        asked: ``outer.inner=value`` makes a mapping of its own.
        alone: Keys that mean true where they stand alone.

    Raises:
        OptionError: No model, or something that is no key.
    """
    if isinstance(asked, Mapping):
        if "model" not in asked:
            raise OptionError(f"peer {shown(dict(asked))}: it needs a `model:`")
        return dict(asked)
    model, *pairs = asked.split(",")
    entry: dict[str, Any] = {"model": model.strip()}
    if not entry["model"] or "=" in entry["model"]:
        raise OptionError(f"peer {shown(asked)}: expected MODEL[,key=value...]")
    for pair in pairs:
        key, sign, value = pair.partition("=")
        key = key.strip()
        if not sign and key not in alone:
            raise OptionError(f"peer {shown(asked)}: {pair!r} is not key=value")
        outer, dot, inner = key.partition(".")
        if dot:
            inside = entry.setdefault(outer, {})
            if not isinstance(inside, dict):
                raise OptionError(f"peer {shown(asked)}: {outer} is given as one value and by keys")
            inside[inner] = literal(value)
        else:
            entry[key] = value if sign else True
    return entry


def literal(value: str) -> Any:
    """Read a number, a list or a truth value as Python writes it; else keep the text."""
    try:
        return ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return value


def amp_dtype(options: argparse.Namespace) -> torch.dtype | None:
    """Return what forwards are autocast to."""
    return getattr(torch, options.amp_dtype) if options.amp else None


def own_options(
    options: argparse.Namespace,
    actions: Mapping[str, argparse.Action],
    entry: Mapping[str, Any],
    may_set: Sequence[str],
    aliases: Mapping[str, str],
    reserved: Sequence[str],
) -> argparse.Namespace:
    """Return the run's options with a peer's own values in place.

    Args:
        options: The run's.
        actions: Of the parser, by dest.
        entry: From ``peer_mapping``; lists are written with ``+`` on a command line.
        may_set: Dests that a peer may set.
        aliases: Other names of them.
        reserved: Keys that are no options.

    Raises:
        OptionError: A key that does not exist (lists the choices), or a value of another kind.
    """
    where = f"peer {entry['model']!r}"
    own = argparse.Namespace(**vars(options))
    for key in [key for key in entry if key not in ("model", *reserved)]:
        dest = aliases.get(key.replace("-", "_"), key.replace("-", "_"))
        if dest not in may_set:
            choices = [*reserved, *aliases, *may_set]
            raise OptionError(
                f"{where}: unknown key {key!r}{near(dest, choices)}; keys: {', '.join(choices)}"
            )
        action, value = actions[dest], entry[key]
        if isinstance(value, str) and takes_many(action):
            value = value.split("+")
        value = coerce(action, value, where)
        if isinstance(action.default, dict):
            value = {**getattr(options, dest), **(value or {})}
        setattr(own, dest, value)
    return own


def number_repeats(names: Iterable[tuple[str, str]]) -> list[str]:
    """Give every peer a name of its own.

    Args:
        names: The name that was given or nothing, and the one to fall back on, a peer each.

    Returns:
        Given names as they are; others get a number where they repeat.
    """
    found: list[str] = []
    for given, base in names:
        name, count = given or base, 1
        while not given and name in found:
            count += 1
            name = f"{base}-{count}"
        found.append(name)
    return found
