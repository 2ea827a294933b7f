"""What an experiment rests on, files to start from and data: the same for all its seeds."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from common.experiment.plan import START, Experiment
from common.experiment.task import Task
from common.options import OptionError


def check_sources(experiment: Experiment, task: Task, seeds: Sequence[int]) -> dict[str, str]:
    """Refuse to go on with other files or data than finished seeds had.

    A path with ``{seed}`` in it is a source of that seed alone, and is compared with itself.

    Args:
        experiment: Whose finished starts tell what they had; those of older versions do not.
        task: Looks at files and data.
        seeds: That are to go on.

    Returns:
        What they rest on, see ``Task.sources``.

    Raises:
        OptionError: Names what changed, and the way out.
    """
    known: dict[str, tuple[str, int]] = {}
    for seed in experiment.seeds:
        path = experiment.result(START, seed)
        if path.is_file():
            for what, told in json.loads(path.read_text()).get("sources", {}).items():
                known.setdefault(what, (told, seed))
    now: dict[str, str] = {}
    asked = [experiment.options(START, seed) for seed in seeds]
    # the same for all seeds where no path has the seed in it: then they are looked at once
    for options in {_without_seed(one): one for one in asked}.values():
        now |= task.sources(options)
    for what, told in now.items():
        before, seed = known.get(what, (told, 0))
        if before != told:
            raise OptionError(
                f"{what}: changed since seed {seed} was begun, {before} then, {told} now; seeds of "
                "different starts or data cannot be compared: put it back, or give the experiment "
                f"another `output`, or remove {experiment.output} to run all seeds again"
            )
    return now


def _without_seed(options: Mapping[str, Any]) -> str:
    return json.dumps({**options, "seed": None}, sort_keys=True, default=str)


def merged(told: Iterable[Mapping[str, str]]) -> dict[str, str]:
    """Join what several jobs tell; where they differ, all of it is told."""
    values: dict[str, dict[str, None]] = {}
    for one in told:
        for what, value in one.items():
            values.setdefault(what, {})[value] = None
    return {what: " and ".join(found) for what, found in values.items()}
