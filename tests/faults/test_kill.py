"""kill -9 at seeded points of a run: what is on disk is good, and the run ends as if unharmed."""

import io
import os
import random
import signal

import pytest
import torch

import common.checkpoint
import common.trainer
from common.checkpoint import list_runs, load_run, read_weights
from common.engine import JointEngine
from tests.children import in_a_child
from tests.common.toy import ToyEvaluator, make_peers, make_trainer

KILLED = signal.SIGKILL


def die():
    os.kill(os.getpid(), KILLED)


def at_call(count, function, half=None):
    """Wrap a function: its ``count``-th call kills the process, after half of its work if told."""
    calls = [0]

    def wrapped(*given, **named):
        calls[0] += 1
        if calls[0] == count:
            if half is not None:
                half(*given, **named)
            die()
        return function(*given, **named)

    return wrapped


def half_a_file(content, path, *rest):
    whole = io.BytesIO()
    torch_save(content, whole)
    with open(path, "wb") as file:
        file.write(whole.getvalue()[: whole.tell() // 2])


torch_save, replace = torch.save, os.replace
POINTS = {
    "in a step": (JointEngine, "step", None, 18),
    "in an evaluation": (ToyEvaluator, "evaluate", None, 4),
    "while a file is written": (torch, "save", half_a_file, 12),
    "before a file takes its place": (os, "replace", None, 20),
    "after a file took its place": (os, "replace", replace, 20),
    "between the files of an evaluation": (common.trainer, "write_csv", None, 8),
}


def seeded_points(count=20):
    draw = random.Random(5)
    names = list(POINTS)
    return [
        (names[i % len(names)], draw.randint(1, POINTS[names[i % len(names)]][3]))
        for i in range(count)
    ]


def make(folder):
    torch.manual_seed(7)
    return make_trainer(folder, peers=make_peers(3, dropout=0.3), rule="random", save_every=2)


def final(trainer):
    return {
        "progress": str(trainer.progress),
        "files": {
            f"{peer.name}/{which}": read_weights(
                trainer.folder / peer.name / f"{which}.safetensors"
            )
            for peer in trainer.peers
            for which in ("best", "last")
        },
    }


@pytest.fixture(scope="module")
def unharmed(tmp_path_factory):
    trainer = make(tmp_path_factory.mktemp("unharmed"))
    trainer.fit()
    return final(trainer)


def killed_run(folder, point, count):
    """Run in a child process that dies at the point; return how it ended."""

    def work():
        owner, name, half, _ = POINTS[point]
        setattr(owner, name, at_call(count, getattr(owner, name), half))
        make(folder).fit()

    return in_a_child(work)


@pytest.mark.parametrize(("point", "count"), seeded_points())
def test_a_run_killed_anywhere_ends_as_if_unharmed(tmp_path, unharmed, point, count):
    status = killed_run(tmp_path, point, count)
    assert status in (-KILLED, 0)
    for path in list_runs(tmp_path):
        load_run(path)  # whatever is there is whole
    trainer = make(tmp_path)
    if list_runs(tmp_path):
        trainer.resume(load_run(tmp_path))
    trainer.fit()
    found = final(trainer)
    assert found["progress"] == unharmed["progress"]
    for name, weights in unharmed["files"].items():
        assert all(torch.equal(value, found["files"][name][key]) for key, value in weights.items())


def test_nearly_all_points_kill(tmp_path):
    ends = [killed_run(tmp_path / str(i), *point) for i, point in enumerate(seeded_points())]
    assert ends.count(-KILLED) >= 18


def test_a_run_killed_again_and_again_comes_to_its_end(tmp_path, unharmed):
    ends = []
    for count in (3, 5, 4, 6):

        def work(count=count):
            JointEngine.step = at_call(count, JointEngine.step)
            trainer = make(tmp_path)
            if list_runs(tmp_path):
                trainer.resume(load_run(tmp_path))
            trainer.fit()

        ends.append(in_a_child(work))
    assert ends.count(-KILLED) >= 3
    trainer = make(tmp_path)
    trainer.resume(load_run(tmp_path))
    trainer.fit()
    assert final(trainer)["progress"] == unharmed["progress"]
