"""How large nested values are once they are written out: what is shared counts each time.

A few lines of containers that hold one another ten times each are small in memory and in a file,
and fill the memory as soon as somebody prints, compares or copies them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

MOST = 100_000  # characters and containers; a long config has some thousands
MOST_SETTINGS = 50 * MOST  # of a run file, which holds what YAML without aliases may have held
_DEEPEST = 100  # containers in one another; Python recurses into them


def fault_of(
    root: Any, parts: Callable[[Any], Iterable[Any]], length: Callable[[Any], int], most: int
) -> str:
    """Say why a value is too large to be written out; nothing where it is not.

    Each object is looked at once, however often it is shared.

    Args:
        root: The value; it keeps all that is in it alive.
        parts: Gives what a value holds.
        length: Of a value's own text, in characters.
        most: Characters and values that are let pass.
    """
    known: dict[int, tuple[int, int]] = {}  # size and depth
    begun: set[int] = set()
    left = [(root, False)]
    while left:
        value, is_done = left.pop()
        if id(value) in known:
            continue
        if not is_done and id(value) in begun:
            return "one of its values holds itself"
        inside = list(parts(value))
        if not is_done:
            begun.add(id(value))
            left += [(value, True), *((part, False) for part in inside)]
            continue
        found = [known[id(part)] for part in inside]
        size = 1 + length(value) + sum(size for size, _ in found)
        depth = 1 + max((depth for _, depth in found), default=0)
        if size > most:
            return f"written out it would hold more than {most} characters"
        if depth > _DEEPEST:
            return f"it is nested more than {_DEEPEST} deep"
        known[id(value)] = size, depth
    return ""


def fault_of_plain(value: Any, name: str) -> str:
    """Say why settings are no small plain containers; nothing where they are.

    Args:
        value: The settings.
        name: Of them, in the answer.
    """
    try:
        fault = fault_of(value, _parts, _length, MOST_SETTINGS)
    except TypeError as error:
        return f"{name} holds {error}"
    return f"{name} is too large: {fault}" if fault else ""


def _parts(value: Any) -> Iterable[Any]:
    if isinstance(value, Mapping):
        return (*value, *value.values())
    if isinstance(value, (list, tuple)):
        return value
    if value is None or isinstance(value, (str, int, float)):
        return ()
    raise TypeError(f"a {type(value).__name__}, which is no plain setting")


def _length(value: Any) -> int:
    return len(value) if isinstance(value, str) else 0
