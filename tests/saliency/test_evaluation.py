from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image

from common.distributed import World
from common.options import OptionError
from saliency import evaluation
from saliency.data import EvalLoader
from saliency.evaluate import evaluate
from saliency.evaluation import (
    OTHERS,
    OtherFixations,
    SaliencyEvaluator,
    flatten,
    metrics_for,
    over_sum,
)
from saliency.images import read_fixations
from saliency.layouts import open_dataset
from saliency.metrics import METRICS, resize_and_blur
from tests.saliency.folders import looks, write_dataset, write_fixations
from tests.saliency.toy import Deep, Flat

WORLD = World(0, 1, 0, torch.device("cpu"))


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    root = tmp_path_factory.mktemp("eval")
    write_dataset(root, {"annotation/0001": 3, "val/0601": 5, "val/0602": 7}, fixations="png")
    return open_dataset("dhf1k", root, "val")


@pytest.fixture
def models():
    torch.manual_seed(0)
    return [Deep(), Flat()]


def evaluator(videos, models, metrics=("cc", "kldiv", "nss"), batch=2, workers=0, **rest):
    views = [model.view for model in models]
    loader = EvalLoader(videos, views, WORLD, batch_size=batch, workers=workers)
    return SaliencyEvaluator(loader, WORLD, metrics, **rest)


def test_scores_are_those_of_each_frame_by_itself(videos, models):
    found = evaluator(videos, models).score(models, [m.view for m in models], ["deep", "flat"])
    sums = {"deep": 0.0, "flat": 0.0, "ensemble": 0.0}
    loader = EvalLoader(videos, [m.view for m in models], WORLD, batch_size=1, workers=0)
    with torch.no_grad():
        for batch in loader:
            maps = {
                name: resize_and_blur(model.eval()(batch.clips(model.view)), (36, 64))
                for name, model in zip(("deep", "flat"), models, strict=True)
            }
            maps["ensemble"] = over_sum(maps["deep"]) + over_sum(maps["flat"])
            for name, map_ in maps.items():
                sums[name] += METRICS["cc"].function(map_, batch.maps).item()
    for name, total in sums.items():
        assert found[name].mean["cc"] == pytest.approx(total / 12, rel=1e-5)
    assert found["deep"].frames == 12 and list(found["deep"].videos) == ["0601", "0602"]


def test_fixations_of_another_size_are_scored_at_their_own(tmp_path, models):
    write_dataset(tmp_path, {"annotation/0001": 1, "val/0601": 4}, size=(24, 40))
    video = tmp_path / "val" / "0601"
    for k in (0, 2, 3):  # frame 1 has none
        write_fixations(video, f"{k + 1:04d}", looks(0, k, (36, 64)), "png")
    videos = open_dataset("dhf1k", tmp_path, "val")
    views = [model.view for model in models]
    asked = ("cc", "kldiv", "nss", "auc_judd", "auc_shuffled")
    found = evaluator(videos, models, asked, batch=4).score(models, views, ["deep", "flat"])
    loader = EvalLoader(videos, views, WORLD, batch_size=4, workers=0)
    (batch,) = list(loader)
    assert batch.maps.shape == (4, 24, 40) and batch.fixations.shape == (4, 36, 64)
    with torch.no_grad():
        raw = [model.eval()(batch.clips(model.view)) for model in models]
    for name, chosen in (("deep", raw[:1]), ("flat", raw[1:]), ("ensemble", raw)):
        small, large = (
            torch.stack([over_sum(resize_and_blur(x, size)) for x in chosen]).sum(0)
            for size in ((24, 40), (36, 64))
        )
        cc = METRICS["cc"].function(small, batch.maps).mean().item()
        nss = METRICS["nss"].function(large, batch.fixations).nanmean().item()
        assert found[name].mean["cc"] == pytest.approx(cc, rel=1e-5)
        assert found[name].mean["nss"] == pytest.approx(nss, rel=1e-5)
        assert found[name].undefined == {metric: int(metric in asked[2:]) for metric in asked}


def test_a_map_is_resized_once_a_size(videos, models, monkeypatch):
    sizes = []
    monkeypatch.setattr(
        evaluation,
        "resize_and_blur",
        lambda maps, size, *a, **k: sizes.append(size) or resize_and_blur(maps, size, *a, **k),
    )
    evaluator(videos, models[:1], batch=7).score(models[:1], [models[0].view], ["a"])
    assert sizes == [(36, 64)] * 2


def test_modes_are_put_back_and_batches_do_not_matter(videos, models):
    models[0].train()
    models[1].eval()
    views = [m.view for m in models]
    one = evaluator(videos, models).score(models, views, ["a", "b"])
    two = evaluator(videos, models, batch=5).score(models, views, ["a", "b"])
    assert models[0].training and not models[1].training
    assert flatten(one) == pytest.approx(flatten(two), rel=1e-6)
    assert flatten(one)["a/loss"] == one["a"].mean["kldiv"] - one["a"].mean["cc"]


def test_drawn_scores_depend_neither_on_batches_nor_on_ranks(videos, models):
    views = [models[0].view]
    asked = ("auc_shuffled", "cc", "kldiv")
    whole = evaluator(videos, models[:1], asked, batch=1).score(models[:1], views, ["a"])["a"]
    four = evaluator(videos, models[:1], asked, batch=4).score(models[:1], views, ["a"])["a"]
    # the forwards themselves differ in their last digits
    drawn = pytest.approx(whole.mean["auc_shuffled"], abs=1e-4)
    assert four.mean["auc_shuffled"] == drawn
    parts = []
    for rank in range(2):
        world = World(rank, 2, rank, torch.device("cpu"))
        loader = EvalLoader(videos, views, world, batch_size=1, workers=0)
        part = SaliencyEvaluator(loader, world, asked).score(models[:1], views, ["a"])["a"]
        parts.append(part.mean["auc_shuffled"] * part.frames)
    assert sum(parts) / 12 == drawn


def test_workers_change_neither_scores_nor_the_order_of_videos(videos, models):
    views = [m.view for m in models]
    seen = {}
    for workers in (0, 2):
        maps = seen.setdefault(workers, {})
        asked = {
            "workers": workers,
            "on_maps": lambda name, targets, found, to=maps: to.update(
                {(name, *target): row for target, row in zip(targets, found, strict=True)}
            ),
        }
        seen[workers, "scores"] = evaluator(videos, models, batch=1, **asked).score(
            models, views, ["a", "b"]
        )
    assert flatten(seen[0, "scores"]) == pytest.approx(flatten(seen[2, "scores"]), rel=1e-9)
    for scores in (seen[0, "scores"], seen[2, "scores"]):
        assert list(scores["a"].videos) == ["0601", "0602"]
    assert len(seen[0]) == 36 and seen[0].keys() == seen[2].keys()
    assert all(torch.equal(seen[2][key], map_) for key, map_ in seen[0].items())


def test_one_model_has_no_ensemble(videos, models):
    found = evaluator(videos, models[:1]).score(models[:1], [models[0].view], ["a"])
    assert list(found) == ["a"]


def test_metrics_are_those_that_the_data_allows(videos, tmp_path):
    assert metrics_for(videos, None) == ["auc_judd", "similarity", "cc", "nss", "kldiv"]
    assert "auc_shuffled" in metrics_for(videos, None, shuffled=True)
    assert metrics_for(videos, ["nss"]) == ["nss", "cc", "kldiv"]
    root = write_dataset(tmp_path, {"annotation/0001": 3, "val/0601": 3})
    blind = open_dataset("dhf1k", root, "val")
    assert metrics_for(blind, None) == ["similarity", "cc", "kldiv"]
    with pytest.raises(ValueError, match="has no fixations"):
        metrics_for(blind, ["auc_judd"])


def test_other_fixations_are_those_of_ten_drawn_frames(videos):
    others = OtherFixations(videos, seed=3)
    found = others.around([(0, 1), (1, 4)], (36, 64))
    assert found.shape == (2, 36, 64)
    for row, target in zip(found, [(0, 1), (1, 4)], strict=True):
        drawn = others.drawn(target)
        assert len(set(drawn)) == OTHERS == 10 and target not in drawn
        expected = np.zeros((36, 64), bool)
        for video, frame in drawn:
            its = videos.videos[video]
            expected |= read_fixations(its.path(its.fixations[frame])) > 0
        assert np.array_equal(row.numpy(), expected)
    assert torch.equal(others.around([(1, 4)], (36, 64))[0], found[1])
    smaller = others.around([(0, 1)], (18, 32))
    assert smaller.shape == (1, 18, 32) and smaller.any()


def test_every_other_frame_is_drawn_equally_often(videos):
    counts = Counter(
        place for seed in range(2000) for place in OtherFixations(videos, seed).drawn((0, 2))
    )
    assert set(counts) == {(0, 0), (0, 1), (0, 3), (0, 4), *((1, k) for k in range(7))}
    assert all(abs(count - 2000 * 10 / 11) < 80 for count in counts.values())


def test_of_few_other_frames_all_are_taken(tmp_path):
    write_dataset(tmp_path, {"val/0601": 3}, fixations="png")
    (tmp_path / "val" / "0601" / "fixation" / "0003.png").unlink()
    others = OtherFixations(open_dataset("dhf1k", tmp_path, "val"))
    assert others.drawn((0, 0)) == [(0, 1)] and others.drawn((0, 1)) == [(0, 0)]
    assert sorted(others.drawn((0, 2))) == [(0, 0), (0, 1)], "it has no fixations itself"
    (tmp_path / "val" / "0601" / "fixation" / "0002.png").unlink()
    alone = OtherFixations(open_dataset("dhf1k", tmp_path, "val"))
    assert alone.drawn((0, 0)) == [] and not alone.around([(0, 0)], (36, 64)).any()


def test_maps_are_handed_over_with_their_targets(videos, models):
    seen = []
    evaluator(
        videos, models[:1], on_maps=lambda name, targets, maps: seen.append((name, targets, maps))
    ).score(models[:1], [models[0].view], ["a"])
    targets = [target for _, batch, _ in seen for target in batch]
    assert targets == [(0, k) for k in range(5)] + [(1, k) for k in range(7)]
    assert all(maps.shape[1:] == (36, 64) and len(maps) == len(batch) for _, batch, maps in seen)


def run(videos, folder, *rest):
    """Evaluate the same model each time, into a new folder."""
    torch.manual_seed(0)
    output = folder / str(len(list(folder.iterdir())))
    given = ["--dataset", "dhf1k", "--data-root", videos.root, "--output", str(output)]
    given += ["--peer", "tests.saliency.toy:Flat", "--workers", "0", "--device", "cpu"]
    return evaluate([*given, "--check-depth", "listing", *rest], bars=False)["Flat"]


def test_frames_can_be_capped(videos, tmp_path):
    whole = run(videos, tmp_path, "--metrics", "cc")
    some, again, other = (
        run(videos, tmp_path, "--metrics", "cc", "--max-frames", "5", "--seed", seed)
        for seed in "001"
    )
    assert whole.frames == 12 and some.frames == 5
    assert some.mean == again.mean != whole.mean and other.mean != some.mean
    assert run(videos, tmp_path, "--metrics", "cc", "--max-frames", "99").mean == whole.mean
    with pytest.raises(OptionError, match="--max-frames is 0; expected 1 or more"):
        run(videos, tmp_path, "--max-frames", "0")


def test_bicubic_is_the_official_resize_within_the_maps_limits(videos, tmp_path):
    asked = ("--metrics", "cc", "--blur", "0")
    bilinear = run(videos, tmp_path, *asked)
    bicubic = run(videos, tmp_path, *asked, "--interpolation", "bicubic")
    assert bicubic.mean["cc"] != bilinear.mean["cc"]
    assert bicubic.mean["cc"] == pytest.approx(bilinear.mean["cc"], abs=0.05)


@pytest.mark.parametrize("size", [(36, 64), (8, 10)])
def test_bicubic_maps_are_pillows_cut_at_their_limits(videos, models, size):
    maps = (torch.rand(2, 16, 24, generator=torch.Generator().manual_seed(0)) > 0.7).float()
    found = evaluator(videos, models, blur=0, interpolation="bicubic")._resize(maps, size)
    for ours, map_ in zip(found, maps.numpy(), strict=True):
        theirs = np.asarray(Image.fromarray(map_).resize(size[::-1], Image.BICUBIC))
        assert theirs.min() < -0.01 and ours.min() == 0
        np.testing.assert_allclose(ours, theirs.clip(0, 1), atol=1e-5)
