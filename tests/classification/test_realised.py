"""Finished runs of classifiers, read back: which peers are one model."""

import pytest
import yaml

from classification.realised import read_run


def write_run(folder, *options):
    peers = [{"model": "resnet18", "checkpoint": "a.pth", "name": "a", **dict(options)}]
    peers.append({"model": "resnet34", "checkpoint": "b.pth", "name": "b"})
    for name in "ab":
        (folder / name).mkdir(parents=True)
        (folder / name / "last.safetensors").touch()
    content = {"data": "/data", "peers": peers, "rule": "best"}
    (folder / "args.yaml").write_text(yaml.safe_dump(content))
    (folder / "summary.csv").write_text("epoch,a/top1,b/top1\n0,1,2\n1,3,4\n")
    return read_run(folder)


@pytest.mark.parametrize(
    "option", [("lr", 0.5), ("model_ema", True), ("channels_last", True), ("frozen", True)]
)
def test_how_a_peer_is_trained_makes_no_other_model(tmp_path, option):
    base, run = write_run(tmp_path / "x"), write_run(tmp_path / "y", option)
    assert run.models == base.models and len({*run.models}) == 2
    assert run.trained[0] != base.trained[0] and run.trained[1] == base.trained[1]


@pytest.mark.parametrize(
    "option", [("checkpoint", "c.pth"), ("img_size", 64), ("crop_pct", 1.0), ("gp", "max")]
)
def test_other_weights_and_another_view_make_another_model(tmp_path, option):
    base, run = write_run(tmp_path / "x"), write_run(tmp_path / "y", option)
    assert run.models[0] != base.models[0] and run.trained == base.trained
