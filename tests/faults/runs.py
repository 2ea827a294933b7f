"""Small runs of every task through its command line's own code, in children that may be killed."""

import json
import os
import signal
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch

import classification.evaluation
import classification.train
import common.trainer
import saliency.evaluation
import saliency.train
from common.checkpoint import list_runs, load_run, read_file, read_weights
from common.engine import JointEngine
from tests.children import in_a_child
from tests.saliency.folders import write_dataset

KILLED = -signal.SIGKILL


@dataclass
class Task:
    """How a task is run, and what it leaves.

    Attributes:
        name: Of its folder.
        data: Of its run.
        points: Where a run can be hit: owner and name of a function.
        batch: What an evaluation calls for every batch and peer.
        environment: Of its children.
    """

    name: str
    data: Path
    points: dict[str, tuple[object, str]]
    batch: tuple[object, str] = ()
    environment: dict[str, str] = field(default_factory=dict)

    def arguments(self, output, *more, resume=False):
        return getattr(self, f"_{self.name}")(output, resume, *more)

    def _classification(self, output, resume, *more):
        small = "kwargs.patch_size=8,kwargs.embed_dim=24,kwargs.depth=1,kwargs.num_heads=2"
        peers = [f"vit_tiny_patch16_224,name={name},{small},img_size=32" for name in "abc"]
        fixed = (
            "--no-pretrained --num-classes 10 --in-chans 1 --opt adamw --lr 1e-3 --warmup-epochs 0 "
            "-b 20 -j 0 --epochs 2 --train-batches-per-epoch 5 --log-interval 2 --rule random "
            "--mixup 0.2 --recovery-interval 2 --drop-path 0.2 --device cpu --experiment run"
        ).split()
        given = [str(self.data), *(word for peer in peers for word in ("--peer", peer)), *fixed]
        given += ["--output", str(output), *more]
        return [*given, "--resume", str(output / "run")] if resume else given

    def _saliency(self, output, resume, *more):
        peers = [f"saliency.standins:{name},kwargs.width=3" for name in ("pair", "around")]
        given = ["--data-root", str(self.data), "--output", str(output), "--experiment", "run"]
        given += [word for peer in peers for word in ("--peer", peer)]
        given += "--epochs 2 -b 2 --lr 1e-2 --workers 0 --val-stride 4 --rule random".split()
        given += "--recovery-interval 1 --log-interval 2 --device cpu".split()
        return [*given, *more, *(["--resume", str(output / "run")] if resume else [])]

    def _segmentation(self, output, resume, *more):
        from tests.segmentation.runs import write_run

        output.mkdir(parents=True, exist_ok=True)
        run = write_run(output, kinds=("fpn", "deeplab"), output="run", RULE="random")
        given = ["--config-file", str(run), *(["--resume"] if resume else [])]
        return [*given, "SOLVER.MAX_ITER", "4", "TEST.EVAL_PERIOD", "2", *more]

    def main(self, output, *more, resume=False):
        """Run the command line here; return its status."""
        os.environ |= {**self.environment, "HOME": str(output.parent)}
        given = self.arguments(output, *more, resume=resume)
        if self.name == "classification":
            return classification.train.main(given)
        if self.name == "saliency":
            return saliency.train.main("dhf1k", "train_dhf1k", given)
        from segmentation.cli import main

        return main(given)

    def run(self, output, *more, resume=False, before=lambda: None):
        """Run in a child; return its status."""
        output.mkdir(parents=True, exist_ok=True)

        def work():
            before()
            return self.main(output, *more, resume=resume)

        return in_a_child(work, output / "log.txt")

    def has_saved(self, output):
        folder = output / "run"
        return (folder / "run.pt").is_file() or bool(list_runs(folder))

    def check_saved(self, output):
        """Read all that a resume could need."""
        folder = output / "run"
        for path in list_runs(folder):
            load_run(path)
        if (folder / "run.pt").is_file():
            record = read_file(folder / "run.pt", sums=True)
            for name in record["peers"]:
                found = read_file(folder / name / record["file"], sums=True)
                assert found["iteration"] == record["iteration"] - 1
        for path in [*folder.glob("*/best.*"), *folder.glob("*/last.*")]:
            read_weights(path)
        for path in folder.glob("*/model_*.pth"):
            read_file(path, sums=True)

    def final(self, output):
        """Return what a run ends with: weights of every peer, evaluations, lessons."""
        folder = output / "run"
        patterns = ("*/best.*", "*/last.*", "*/model_best.pth", "*/model_final.pth")
        files = sorted(path for pattern in patterns for path in folder.glob(pattern))
        if self.name == "segmentation":
            state = told = read_file(folder / "run.pt")
        else:
            state = load_run(folder)
            told = state["progress"]
        return {
            "history": str([told["history"], told["lessons"], sorted(told["best"].items())]),
            "files": {str(path.relative_to(folder)): read_weights(path) for path in files},
        }


def same(one, other):
    """Compare what two runs ended with, bit for bit."""
    assert one["history"] == other["history"]
    assert one["files"].keys() == other["files"].keys() and len(one["files"]) >= 4
    for name, weights in one["files"].items():
        found = other["files"][name]
        assert found.keys() == weights.keys()
        assert all(torch.equal(value, found[key]) for key, value in weights.items()), name
    return True


FILES = {
    "while a file is written": (torch, "save"),
    "before a file takes its place": (os, "replace"),
    "after a file took its place": (os, "replace"),
}


def make_task(name, data):
    """Return a task on data of its own; segmentation where Detectron2 is installed."""
    step = {"in a step": (JointEngine, "step")}
    if name == "classification":
        evaluator = classification.evaluation.PeerEvaluator
        points = {"in an evaluation": (evaluator, "score")}
        points["between the files of an evaluation"] = (common.trainer, "write_csv")
        return Task(name, data, step | points | FILES, (evaluator, "_forward"))
    if name == "saliency":
        videos = {f"annotation/{k:04d}": 6 for k in range(1, 7)} | {"val/0601": 6}
        write_dataset(data, videos, fixations="mat")
        evaluator = saliency.evaluation.SaliencyEvaluator
        points = {"in an evaluation": (evaluator, "evaluate")}
        points["between the files of an evaluation"] = (common.trainer, "write_csv")
        return Task(name, data, step | points | FILES, (evaluator, "_predict"))
    pytest.importorskip("detectron2", reason="Detectron2 is not installed")
    import segmentation.trainer
    from tests.segmentation.runs import make_scenes

    make_scenes(data)
    points = {"in an evaluation": (segmentation.trainer, "evaluate_run")}
    points["between the files of an evaluation"] = (segmentation.trainer, "write_csv")
    environment = {"DETECTRON2_DATASETS": str(data)}
    batch = (segmentation.evaluation, "predict")
    return Task(name, data, step | points | FILES, batch, environment)


def count_calls(task, folder):
    """Run unharmed; return how often each point is passed."""
    told = folder / "calls.json"
    calls = dict.fromkeys(task.points, 0)

    def count(point):
        owner, name = task.points[point]
        function = getattr(owner, name)

        def counted(*given, **named):
            calls[point] += 1
            return function(*given, **named)

        setattr(owner, name, counted)

    def work():
        for point in task.points:
            count(point)
        status = task.main(folder)
        told.write_text(json.dumps(calls))
        return status

    assert in_a_child(work, folder / "log.txt") == 0, (folder / "log.txt").read_text()[-3000:]
    return json.loads(told.read_text())
