"""What an experiment file asks for."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common import recipes
from common.experiment.corruptions import Corruption, read_corruptions
from common.options import OptionError, near
from common.peers import check_names
from common.roles import compares_scores

START = "start"
ONE_WAY = "one_way:{strongest}"
CONTROLS: dict[str, tuple[dict[str, Any], str]] = {
    "solo": ({"rule": "none"}, "each peer trained alone, in a run of its own"),
    "none": ({"rule": "none"}, "all peers trained side by side, nothing transferred"),
    "one_way": (
        {"rule": ONE_WAY},
        "the peer that starts strongest on the held-out part teaches the others on every sample",
    ),
    "mutual": ({"rule": "mutual"}, "everyone teaches everyone on every sample"),
    "best": ({"rule": "best"}, "on every sample the peer that does best teaches the others"),
    "random": ({"rule": "random"}, "a teacher drawn by lot for every sample"),
}
MEASURES = ("chosen", "last")
FAMILIES = ("target", "all")
KEYS = {
    "title": "A line that says what is asked.",
    "output": "Folder of runs and report.",
    "seeds": "How many, from 0 on, or a list.",
    "held_out": "Share of the training data to choose by.",
    "peers": "As in the training script's YAML.",
    "train": "Options of the training script, for all arms.",
    "tune": "Lists of values of options, to be chosen from by the held-out part.",
    "controls": f"Which of {', '.join(CONTROLS)}.",
    "arms": "Further arms: name: {option: value}.",
    "control": "The arm that the others are compared with.",
    "compare": "Pairs of arms to compare directly.",
    "corruptions": "Measure the weights on a spoilt test set too: a list of `name: severity`.",
    "primary": "chosen or last: which weights the tests are about.",
    "family": "target or all: what p-values are corrected together.",
}


@dataclass(frozen=True)
class Arm:
    """One way to train.

    Attributes:
        options: Of the training script, over those of the experiment.
        alone: Each peer in a run of its own.
        about: What it does.
    """

    options: Mapping[str, Any]
    alone: bool = False
    about: str = ""


@dataclass(frozen=True)
class Experiment:
    """Arms over seeds, from the same starts.

    Attributes:
        title: Of the report.
        output: Folder of runs and report.
        seeds: Each one a split of the held-out part, an order of the data, and starts.
        peers: As the training script takes them.
        train: Its options, for all arms.
        tuned: Settings to choose from by the held-out part; one empty one where none are tried.
        arms: By name, in the report's order.
        control: The arm that the others are compared with.
        pairs: Arms to compare directly.
        primary: ``chosen`` or ``last``.
        together: Correct p-values over all targets at once.
        corruptions: Under which the weights are measured too.
        device: Instead of what ``train`` says; where a job runs is not what it is about.
    """

    title: str
    output: Path
    seeds: list[int]
    peers: list[Mapping[str, Any]]
    train: dict[str, Any]
    tuned: list[dict[str, Any]]
    arms: dict[str, Arm]
    control: str
    pairs: list[tuple[str, str]]
    primary: str
    together: bool
    corruptions: Sequence[Corruption] = ()
    device: str = ""

    def options(
        self,
        arm: str,
        seed: int,
        peers: Sequence[Mapping[str, Any]] | None = None,
        setting: Mapping[str, Any] | None = None,
        ranked: Sequence[str] = (),
    ) -> dict[str, Any]:
        """Return the training script's options for one run.

        Args:
            arm: Of ``arms``, or ``START``.
            seed: Of the run.
            peers: Instead of the experiment's own.
            setting: Of ``tuned``.
            ranked: The peers' names from the strongest at the start to the weakest.
        """
        words = {"{seed}": str(seed)}
        if ranked:
            words |= {"{strongest}": ranked[0], "{weakest}": ranked[-1]}
        own = {"rule": "none"} if arm == START else self.arms[arm].options
        of_recipe = recipes.RECIPES.get(str(own.get("recipe")), {})  # before those of all arms
        shared = {key: value for key, value in self.train.items() if key not in of_recipe}
        asked = {**shared, **(setting or {}), **own}
        if "calibrate_scores" not in own and not _compares(asked):
            asked.pop("calibrate_scores", None)  # given for the arms that can use it
        content = {
            **asked,
            "peers": [dict(peer) for peer in (self.peers if peers is None else peers)],
            "seed": seed,
            **({"device": self.device} if self.device else {}),
        }
        return _filled(content, words)

    def folder(self, arm: str, seed: int) -> Path:
        """Return where a job's runs and result lie."""
        return self.output / f"seed-{seed}" / arm

    def result(self, arm: str, seed: int) -> Path:
        """Return the file that says that a job is finished, and what came of it."""
        return self.folder(arm, seed) / "result.json"


def _compares(options: Mapping[str, Any]) -> bool:
    """Whether a run's rule compares scores."""
    of_recipe = recipes.RECIPES.get(str(options.get("recipe")), {})
    asked = {**{key: setting.value for key, setting in of_recipe.items()}, **options}
    return compares_scores(
        str(asked.get("rule", "best")), asked.get("margin"), asked.get("gap_power") or 0.0
    )


def _filled(value: Any, words: Mapping[str, str]) -> Any:
    """Put the seed's words in the place of ``{seed}`` and the like, in all texts."""
    if isinstance(value, Mapping):
        return {key: _filled(inner, words) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_filled(inner, words) for inner in value]
    if isinstance(value, str):
        for word, text in words.items():
            value = value.replace(word, text)
    return value


def read_experiment(content: Any, path: Path) -> Experiment:
    """Understand an experiment file.

    Args:
        content: Plain containers, as read.
        path: Of the file; names it in errors, and gives the title and folder where it has none.

    Raises:
        OptionError: A key that does not exist, or a value that cannot be used.
    """
    if not isinstance(content, Mapping):
        raise OptionError(f"{path}: expected `key: value` lines; keys: {', '.join(KEYS)}")
    for key in content:
        if key not in KEYS:
            raise OptionError(
                f"{path}: unknown key {key!r}{near(str(key), KEYS)}; keys: {', '.join(KEYS)}"
            )
    peers = content.get("peers")
    if not isinstance(peers, list) or len(peers) < 2 or not all(map(_is_peer, peers)):
        raise OptionError(
            f"{path}: peers is {peers!r}; expected a list of two or more, as the training script "
            "takes them"
        )
    arms = _arms(content, path)
    control = content.get("control", "none")
    if control not in arms:
        raise OptionError(f"{path}: control is {control!r}; arms: {', '.join(arms)}")
    if len(arms) < 2:
        raise OptionError(
            f"{path}: there is no arm to compare with the control {control!r}; add one under "
            "`arms:`, or take out `controls:` for the usual ones"
        )
    return Experiment(
        title=str(content.get("title", path.stem)),
        output=Path(content.get("output", f"output/experiments/{path.stem}")),
        seeds=_seeds(content.get("seeds", 5), path),
        peers=peers,
        train={**_mapping(content, "train", path), "held_out": _share(content, path)},
        tuned=_settings(_mapping(content, "tune", path), path),
        arms=arms,
        control=control,
        pairs=_pairs(content, arms, path),
        primary=_one_of(content, "primary", MEASURES, path),
        together=_one_of(content, "family", FAMILIES, path) == "all",
        corruptions=read_corruptions(content.get("corruptions"), path),
    )


def _is_peer(entry: Any) -> bool:
    return isinstance(entry, Mapping) and bool(entry)


def _mapping(content: Mapping[str, Any], key: str, path: Path) -> dict[str, Any]:
    value = content.get(key) or {}
    if not isinstance(value, Mapping):
        raise OptionError(f"{path}: {key} is {value!r}; expected `option: value` lines")
    return {_option(name): inner for name, inner in value.items()}


def _one_of(content: Mapping[str, Any], key: str, choices: Sequence[str], path: Path) -> str:
    value = content.get(key, choices[0])
    if value not in choices:
        raise OptionError(f"{path}: {key} is {value!r}; choose from {', '.join(choices)}")
    return value


def _share(content: Mapping[str, Any], path: Path) -> float:
    share = content.get("held_out", 0.1)
    if isinstance(share, bool) or not isinstance(share, (int, float)) or not 0 < share < 1:
        raise OptionError(
            f"{path}: held_out is {share!r}; expected a share of the training data, above 0 and "
            "below 1: without it the test set would choose the epoch"
        )
    return float(share)


def _seeds(value: Any, path: Path) -> list[int]:
    found = list(range(value)) if isinstance(value, int) and value > 0 else value
    good = isinstance(found, list) and found and len(set(map(str, found))) == len(found)
    if not good or any(type(seed) is not int or seed < 0 for seed in found):
        raise OptionError(
            f"{path}: seeds is {value!r}; expected a number of them, or a list of different ones, "
            "each 0 or more"
        )
    return found


def _settings(tune: Mapping[str, Any], path: Path) -> list[dict[str, Any]]:
    for option, values in tune.items():
        if not isinstance(values, list) or not values:
            raise OptionError(f"{path}: tune: {option} is {values!r}; expected a list of values")
    return [dict(zip(tune, values, strict=True)) for values in itertools.product(*tune.values())]


def _arms(content: Mapping[str, Any], path: Path) -> dict[str, Arm]:
    controls = content.get("controls", list(CONTROLS))
    if not isinstance(controls, list) or any(name not in CONTROLS for name in controls):
        raise OptionError(
            f"{path}: controls is {controls!r}; expected a list of {', '.join(CONTROLS)}"
        )
    arms: dict[str, Arm] = {}
    for name in controls:
        known, about = CONTROLS[name]
        arms[name] = Arm(known, name == "solo", about)
    for name, options in _named_arms(content, path):
        if name in arms or name == START:
            raise OptionError(f"{path}: arm {name!r} is there already; give it another name")
        said = {*options, *_mapping(content, "train", path)}
        rule = {} if said & {"rule", "recipe"} else {"rule": "best"}
        own = {**rule, **options}
        shown = ", ".join(f"{option} {value}" for option, value in own.items())
        arms[name] = Arm(own, about=shown or "as all arms")
    return arms


def _named_arms(content: Mapping[str, Any], path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    arms = content.get("arms") or {}
    if not isinstance(arms, Mapping):
        raise OptionError(f"{path}: arms is {arms!r}; expected `name: {{option: value}}` lines")
    for name in arms:
        try:
            check_names([str(name)])
        except ValueError as error:
            raise OptionError(f"{path}: arm {name!r}: {error}") from error
        options = arms[name] or {}
        if not isinstance(options, Mapping):
            raise OptionError(f"{path}: arm {name!r} is {options!r}; expected {{option: value}}")
        if "peers" in options or "seed" in options:
            raise OptionError(f"{path}: arm {name!r}: all arms have the same peers and seeds")
        yield str(name), {_option(key): value for key, value in options.items()}


def _option(name: Any) -> str:
    """Write an option as YAML has it; a dotted key may have a peer's name in it."""
    return str(name) if "." in str(name) else str(name).replace("-", "_")


def _pairs(
    content: Mapping[str, Any], arms: Mapping[str, Arm], path: Path
) -> list[tuple[str, str]]:
    default = [["best", "random"]] if {"best", "random"} <= set(arms) else []
    pairs = content.get("compare", default)
    good = isinstance(pairs, list) and all(isinstance(p, list) and len(p) == 2 for p in pairs)
    if not good or any(arm not in arms for pair in pairs for arm in pair):
        raise OptionError(
            f"{path}: compare is {pairs!r}; expected a list of [ARM, ARM]; arms: {', '.join(arms)}"
        )
    if len({frozenset(pair) for pair in pairs}) < len(pairs) or any(a == b for a, b in pairs):
        raise OptionError(
            f"{path}: compare is {pairs!r}; expected two different arms each, and no pair twice, "
            "in either order: each comparison more makes the correction of all stricter"
        )
    return [(first, second) for first, second in pairs]
