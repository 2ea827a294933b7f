"""The command that trains a team, with the options that scouting was given."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from common.disk import write_text


def flags_of(
    options: argparse.Namespace, actions: Mapping[str, argparse.Action], without: Collection[str]
) -> list[str]:
    """Return the flags that give the options which differ from their defaults.

    Args:
        options: As parsed.
        actions: Of the parser that is to take the flags, by dest.
        without: Dests that are left out.
    """
    words: list[str] = []
    for dest, action in actions.items():
        value = getattr(options, dest, action.default)
        if dest in without or value == action.default:
            continue
        flag = action.option_strings[-1]
        if isinstance(action, argparse.BooleanOptionalAction):
            flag = next(o for o in action.option_strings if o.startswith("--no-") != value)
        if isinstance(value, bool):
            words.append(flag)
        elif isinstance(value, dict):
            words += [flag, *(f"{key}={item}" for key, item in value.items())]
        elif isinstance(value, (list, tuple)):
            words += [flag, *map(str, value)]
        else:
            words += [flag, str(value)]
    return words


def train_command(
    start: Sequence[str],
    peers: Sequence[str | Mapping[str, Any]],
    file: Path,
    dump: Callable[[Any], str],
) -> str:
    """Write the command that trains a team.

    Args:
        start: Its first words: program, data, flags.
        peers: The members as they were asked for.
        file: Is written where a member came from a YAML file itself.
        dump: Writes plain containers as YAML.
    """
    if all(isinstance(peer, str) for peer in peers):
        return shlex.join([*start, *(word for peer in peers for word in ("--peer", str(peer)))])
    write_text(file, dump({"peers": list(peers)}))
    return shlex.join([*start, "-c", str(file)])


def with_engine(options: argparse.Namespace, team: Mapping[str, Any]) -> argparse.Namespace:
    """Return the options with the engine under which a team fits, where that was looked at."""
    return argparse.Namespace(**{**vars(options), "engine": team["engine"] or options.engine})
