"""No step of the command line's own run waits for its device; see ``tests.syncs``."""

import copy

import pytest
from timm.utils import ModelEmaV3

from classification.train import run
from common.trainer import Trainer
from tests.classification.test_train import arguments_of
from tests.syncs import META, meta_world, no_sync


class Done(Exception):
    """The epoch was trained."""


@pytest.fixture
def one_epoch(monkeypatch):
    """Let a run train on the device without values, for one epoch and no more."""

    def fit(self):
        with no_sync():
            self._train_epoch()
        raise Done(self.progress.updates)

    def average(module, **rest):
        made = ModelEmaV3(copy.deepcopy(module).to_empty(device="cpu"), **rest)
        made.module.to(META)  # where timm cannot make its generator
        return made

    monkeypatch.setattr("classification.peer.ModelEmaV3", average)
    monkeypatch.setattr("classification.train.start", lambda options: meta_world())
    monkeypatch.setattr(Trainer, "fit", fit)


@pytest.mark.parametrize(
    "more",
    [
        "--model-ema --clip-grad 1 --sched-on-updates".split(),
        "--mixup 0.2 --cutmix 0.2 --reprob 0.5 --engine two-pass --rule mutual".split(),
        "--bce-loss --clip-grad 0.1 --clip-mode agc --grad-accum-steps 2 --channels-last".split(),
        "--clip-grad 0.1 --clip-mode value --score confidence --smoothing 0.1 --opt sgd".split(),
        "--calibrate-scores epoch".split(),
    ],
    ids=["ema-norm", "mixup-erasing-two-pass", "bce-agc-accumulate", "value-confidence", "scores"],
)
def test_a_run_does_not_wait_between_its_log_lines(digits, tmp_path, one_epoch, more):
    asked = arguments_of(digits, tmp_path, *more, "--opt-kwargs", "foreach=True", peers=3)
    asked += ["--train-batches-per-epoch", "3"]
    asked[asked.index("--log-interval") + 1] = "1000"
    with pytest.raises(Done) as done:
        run(asked, bars=False)
    assert done.value.args[0] in (2, 3)
