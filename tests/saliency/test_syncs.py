"""No step of the command line's own run waits for its device; see ``tests.syncs``."""

import pytest
import torch

from common.trainer import Trainer
from saliency.models import MODELS, create_model
from saliency.train import run
from tests.saliency.folders import write_dataset
from tests.saliency.test_train import TOY
from tests.syncs import META, meta_world, no_sync


class Done(Exception):
    """The epoch was trained."""


@pytest.fixture
def one_epoch(monkeypatch, tmp_path):
    """Let a run train on the device without values, for one epoch and no more."""

    def fit(self):
        with no_sync():
            self._train_epoch()
        raise Done(self.progress.updates)

    def unfused(kind):
        return lambda parameters, fused, **rest: kind(parameters, foreach=True, **rest)

    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr("saliency.train.start_world", lambda device: meta_world())
    monkeypatch.setattr(Trainer, "fit", fit)
    for kind in ("Adam", "AdamW"):  # the fused ones refuse this device
        monkeypatch.setattr(torch.optim, kind, unfused(getattr(torch.optim, kind)))


@pytest.mark.parametrize(
    "more",
    [
        "--model-ema --clip-grad 1 --sched cosine --warmup-steps 2 --nss -0.1".split(),
        "--engine two-pass --rule mutual --opt adamw --similarity -0.5 --l1 0.1".split(),
        "--score confidence --grad-accum-steps 2 --map-size 20 30".split(),
    ],
    ids=["ema-clip-nss", "two-pass-similarity", "confidence-accumulate"],
)
def test_a_run_does_not_wait_between_its_log_lines(tmp_path, one_epoch, more):
    videos = {f"annotation/{k:04d}": 8 for k in range(1, 6)}
    data = write_dataset(tmp_path / "data", videos | {"val/0601": 7}, fixations="mat")
    asked = ["--data-root", str(data), "--output", str(tmp_path), "--experiment", "run"]
    asked += ["--peer", f"{TOY}:Deep", "--peer", f"{TOY}:Flat", "-b", "2", "--workers", "0"]
    with pytest.raises(Done) as done:
        run("dhf1k", "train_dhf1k", [*asked, *more], bars=False)
    assert done.value.args[0] > 1


@pytest.mark.parametrize("name", MODELS)
def test_no_published_model_waits(name):
    model = create_model(name).to(META).train()
    clip = torch.empty(2, 3, model.view.frames, *model.view.size, device=META)
    with no_sync():
        model(clip).mean().backward()
