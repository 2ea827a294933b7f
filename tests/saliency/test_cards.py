"""Model cards of saliency models, after a real run."""

import json
import shutil

import pytest
import torch

from common.card import Files, file_sum, told_files
from saliency.cards import files_of, main
from saliency.layouts import open_dataset
from saliency.train import run
from tests.saliency.folders import write_dataset
from tests.saliency.test_train import arguments
from tests.saliency.toy import Flat

TOY = "tests.saliency.toy"


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))  # where the check of the data is kept


def test_a_card_tells_evidence_and_lineage_and_its_code_loads_the_file(tmp_path, caplog):
    videos = {f"annotation/{k:04d}": 5 for k in (1, 2, 3)}
    root = write_dataset(tmp_path / "d", videos, fixations="png")
    torch.manual_seed(3)
    torch.save(Flat(width=3).state_dict(), tmp_path / "start.pth")
    peers = (
        f"{TOY}:Deep,name=a,frozen",
        f"{TOY}:Flat,name=b,kwargs.width=3,model_ema,checkpoint={tmp_path / 'start.pth'}",
    )
    rest = ("--held-out", "0.34", "--eval-metric", "cc")
    trainer = run("dhf1k", "train", arguments(root, tmp_path, *rest, peers=peers), bars=False)
    folder = trainer.folder / "b"
    card, told = (folder / "README.md").read_text(), json.loads((folder / "card.json").read_text())
    assert not (trainer.folder / "a/card.json").exists()
    assert file_sum(trainer.folder / "args.yaml") in card
    assert "The average of the weights after epoch" in card
    assert file_sum(tmp_path / "start.pth") in card and file_sum(folder / "best.pth") in card
    assert "without 0.34 of its videos held out: 2 videos, 10 frames" in card
    assert "one frame in 3 of 1 videos of `dhf1k`, split `held-out` (2 frames)" in card
    measured = trainer.evaluator.videos.videos[0].name
    paths = {"trained": [], "measured": []}
    for path in root.rglob("*.png"):
        paths["measured" if measured in path.parts else "trained"].append(str(path))
    for which, found in paths.items():
        row = told_files(Files(found, str(root)))
        assert told["lineage"][f"files {which} on"] == row and row in card
    assert told["lineage"]["peer `a` (tests.saliency.toy:Deep, frozen), start"] == "random weights"
    history, best = trainer.progress.history, trainer.progress.best["b"]
    evidence = told["evidence"]
    assert evidence["best"]["after"]["CC"] == best.value
    assert evidence["last"]["before"]["CC"] == history[0]["b/cc"]
    assert evidence["last"]["after"]["NSS"] == history[-1]["b/nss"]
    loading = told["loading"].replace("{file}", "best.pth")
    assert "from tests.saliency.toy import Flat" in loading and "Flat(width=3)" in loading

    again = arguments(root, tmp_path, *rest, "--resume", trainer.folder, "--epochs", 3, peers=peers)
    run("dhf1k", "train", again, bars=False)
    assert file_sum(tmp_path / "start.pth") in (folder / "README.md").read_text()
    assert "origins" not in caplog.text

    assert main([str(folder), "--which", "last"]) == 0
    assert file_sum(folder / "last.pth") in (folder / "README.md").read_text()
    assert main([str(folder), "--which", "soup"]) == 1 and "soup.pth: no such file" in caplog.text


def test_the_sum_of_the_files_changes_where_one_is_added(tmp_path):
    videos = {"annotation/0001": 3, "annotation/0002": 2}
    root, copy = write_dataset(tmp_path / "d", videos, fixations="png"), tmp_path / "copy"
    shutil.copytree(root, copy)
    before = told_files(files_of(open_dataset("dhf1k", root, "train")))
    assert ": 15 files," in before
    assert told_files(files_of(open_dataset("dhf1k", copy, "train"))) == before
    told = {before}
    for inner in ("images", "maps", "fixation"):
        first = min((copy / "annotation/0002" / inner).glob("*.png"))
        shutil.copy(first, first.with_name("0003.png"))
        told.add(told_files(files_of(open_dataset("dhf1k", copy, "train"))))
    assert len(told) == 4
