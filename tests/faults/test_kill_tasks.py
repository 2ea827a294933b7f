"""kill -9 of every task's real run at seeded points: it goes on as if it had never been killed."""

import io
import os
import random
import signal

import pytest
import torch

from tests.faults.runs import KILLED, same

FAST, ALL = 2, 20
torch_save = torch.save


def half_a_file(content, path, *rest):
    written = io.BytesIO()
    torch_save(content, written)
    with open(path, "wb") as file:
        file.write(written.getvalue()[: written.tell() // 2])


def hit(task, point, count):
    """Let the ``count``-th call at a point kill the process."""
    owner, name = task.points[point]
    function, calls = getattr(owner, name), [0]

    def wrapped(*given, **named):
        calls[0] += 1
        if calls[0] == count:
            if point == "while a file is written":
                half_a_file(*given, **named)
            if point == "after a file took its place":
                function(*given, **named)
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*given, **named)

    setattr(owner, name, wrapped)


@pytest.mark.parametrize(
    "number", [*range(FAST), *(pytest.param(k, marks=pytest.mark.slow) for k in range(FAST, ALL))]
)
def test_a_run_killed_anywhere_ends_as_if_unharmed(whole, tmp_path, number):
    task, calls = whole.task, whole.calls
    draw = random.Random(f"{task.name} {number}")
    point = sorted(calls)[number % len(calls)]
    count = draw.randint(1, calls[point])
    status = task.run(tmp_path, before=lambda: hit(task, point, count))
    told = (tmp_path / "log.txt").read_text()[-3000:]
    assert status == KILLED, told
    task.check_saved(tmp_path)
    status = task.run(tmp_path, resume=task.has_saved(tmp_path))
    assert status == 0, (point, count, (tmp_path / "log.txt").read_text()[-3000:])
    assert same(task.final(tmp_path), whole.final)
    assert not list(tmp_path.rglob(".*.tmp"))
