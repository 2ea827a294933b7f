from collections import namedtuple

import pytest

TASKS = ("classification", "saliency", "segmentation")
# A task, the folder of a run to which nothing happened, what it ended with, and how often each of
# its points was passed.
Whole = namedtuple("Whole", "task folder final calls")


@pytest.fixture(scope="session")
def whole_runs(tmp_path_factory, request):
    """Make each task's run once, when it is asked for."""
    from tests.faults.runs import count_calls, make_task

    made = {}

    def make(name):
        if name not in made:
            folder = tmp_path_factory.mktemp(name)
            own = name == "classification"
            data = request.getfixturevalue("digits") if own else folder / "data"
            task = make_task(name, data)
            (folder / "whole").mkdir()
            calls = count_calls(task, folder / "whole")
            made[name] = Whole(task, folder / "whole", task.final(folder / "whole"), calls)
        return made[name]

    return make


@pytest.fixture(params=TASKS)
def whole(request, whole_runs):
    return whole_runs(request.param)
