"""Whether what is read from a run's files has the shape that a resume relies on.

The reader lets any plain containers pass; what is missing in them, or of another kind, would show
as a KeyError or a TypeError, perhaps hours later.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from common import written_out


@dataclass(frozen=True)
class Kind:
    """A value without parts that matter.

    Attributes:
        told: What it is, in errors.
        fits: Whether a value is one.
    """

    told: str
    fits: Callable[[Any], bool]


@dataclass(frozen=True)
class OrNone:
    """A value of a shape, or None."""

    shape: Any


@dataclass(frozen=True)
class Each:
    """A mapping of texts to values of a shape."""

    shape: Any


ANY = Kind("anything", lambda x: True)
NUMBER = Kind("a number", lambda x: isinstance(x, (int, float)) and not isinstance(x, bool))
COUNT = Kind("a count", lambda x: type(x) is int and x >= 0)
POSITIVE = Kind("a count from 1 on", lambda x: type(x) is int and x > 0)
TRUTH = Kind("true or false", lambda x: isinstance(x, bool))
TEXT = Kind("text", lambda x: isinstance(x, str))
TENSOR = Kind("a tensor", lambda x: isinstance(x, Tensor))
LIST = Kind("a list", lambda x: isinstance(x, (list, tuple)))
MAPPING = Kind("a mapping", lambda x: isinstance(x, Mapping))
VALUE = Kind("text or a number", lambda x: x is None or isinstance(x, (str, int, float)))
PEER = Kind("text or a mapping", lambda x: isinstance(x, (str, Mapping)))

WEIGHTS = Each(TENSOR)
OPTIMIZER = {"state": MAPPING, "param_groups": [{"params": LIST}]}
BEST_OF_PEER = {"module": WEIGHTS, "average": OrNone(WEIGHTS)}
GUARD = {"beyond": Each(COUNT), "events": [{"peer": TEXT, "action": TEXT, "*": VALUE}]}
# What every file of a run's state holds, of all tasks; a key with ? may be missing.
STATE = {
    "ranks": [
        {
            "rng": {
                "torch": TENSOR,
                "cuda": OrNone(TENSOR),
                "numpy": (TEXT, TENSOR, COUNT, COUNT, NUMBER),
                "python": (COUNT, [COUNT], OrNone(NUMBER)),
            },
            "ledger": {"interval": TENSOR, "epoch": TENSOR, "tells": TRUTH},
            "transfer": {"generator": OrNone(TENSOR)},
            "buffers": Each(WEIGHTS),
            "scaler?": MAPPING,
        }
    ],
    "seats?": POSITIVE,
    "scaler": MAPPING,
    "guard?": OrNone(GUARD),
    "finite?": {"skipped": Each(COUNT), "total": COUNT, "in_a_row": COUNT},
    "bad?": {"found": Each(TEXT), "left_out": [TEXT]},
}
RUN = {
    **STATE,
    "peers": Each(
        {
            **BEST_OF_PEER,
            "kind?": TEXT,
            "optimizer": OrNone(OPTIMIZER),
            "schedule": OrNone(MAPPING),
            "best?": BEST_OF_PEER,
        }
    ),
    "evaluator": MAPPING,
    "progress": {
        "epoch": COUNT,
        "batch": COUNT,
        "updates": COUNT,
        "cut?": (POSITIVE, POSITIVE),
        "best": Each((NUMBER, COUNT)),
        "history": [{"epoch": COUNT, "*": VALUE}],
        "lessons": [{"epoch": COUNT, "*": VALUE}],
    },
    "config": {
        "epochs?": COUNT,
        "peers?": OrNone([PEER]),
        "origins?": MAPPING,
        "layouts?": OrNone(Each(TRUTH)),
        "compiled?": OrNone(Each(TRUTH)),
    },
}


def fault_of_run(state: Mapping[str, Any]) -> str:
    """Say what is wrong with a run file's content; nothing where a trainer can go on from it."""
    return (
        fault_of(state, RUN)
        or fault_of(state["config"], Each(ANY), "config")
        or fault_of_parts(state, list(state["peers"]), state["progress"]["best"])
        or written_out.fault_of_plain(state["config"], "config")
    )


def fault_of_parts(state: Mapping[str, Any], peers: list[str], best: Mapping[str, Any]) -> str:
    """Say where a state of the shape ``STATE`` does not fit together.

    Args:
        state: The whole.
        peers: Their names.
        best: By the peers' names.
    """
    ranks, seats = len(state["ranks"]), state.get("seats", 1)
    if not ranks or ranks % seats:
        return f"ranks are {ranks}, expected a multiple of seats, {seats}"
    events = (state.get("guard") or {"events": ()})["events"]
    named = [*best, *(event["peer"] for event in events)]
    strange = [name for name in named if name not in peers]
    return f"it tells of {strange[0]!r:.99}, which is none of its peers" if strange else ""


def fault_of(value: Any, shape: Any, name: str = "") -> str:
    """Say where a value is not of a shape; nothing where it is.

    Args:
        value: As read.
        shape: A ``Kind``; a mapping of the keys that must be there (those with a ? may be missing)
            to shapes, and of ``*`` to that of all other values; a list with the shape of all items;
            a tuple with that of each; ``Each`` or ``OrNone``.
        name: Of the value, in the answer.
    """
    if isinstance(shape, OrNone):
        return "" if value is None else fault_of(value, shape.shape, name)
    if isinstance(shape, Kind):
        return "" if shape.fits(value) else _told(name, value, shape.told)
    if isinstance(shape, (list, tuple)):
        if not LIST.fits(value):
            return _told(name, value, LIST.told)
        if isinstance(shape, tuple) and len(value) != len(shape):
            return f"{name} has {len(value)} values, expected {len(shape)}"
        shapes = shape if isinstance(shape, tuple) else shape * len(value)
        inner = [
            (x, own, f"{name}.{i}") for i, (x, own) in enumerate(zip(value, shapes, strict=True))
        ]
    elif not MAPPING.fits(value):
        return _told(name, value, MAPPING.told)
    elif isinstance(shape, Each):
        odd = [key for key in value if not TEXT.fits(key)]
        if odd:
            return _told(f"a key of {name}", odd[0], TEXT.told)
        inner = [(x, shape.shape, _joined(name, key)) for key, x in value.items()]
    else:
        missing = [key for key in shape if key[-1] not in "?*" and key not in value]
        if missing:
            return f"{name or 'it'} has no {missing[0]!r}"
        inner = [
            (value[key], own, _joined(name, key))
            for key, own in ((key.removesuffix("?"), own) for key, own in shape.items())
            if key in value
        ]
        if "*" in shape:
            others = [key for key in value if key not in shape]
            inner += [(value[key], shape["*"], _joined(name, str(key))) for key in others]
    return next((fault for part in inner if (fault := fault_of(*part))), "")


def _joined(name: str, key: str) -> str:
    return f"{name}.{key:.99}" if name else f"{key:.99}"


def _told(name: str, value: Any, expected: str) -> str:
    plain = value is None or isinstance(value, (str, int, float))
    shown = f"{value!r:.99}" if plain else f"of the kind {type(value).__name__}"
    return f"{name} is {shown}, expected {expected}"
