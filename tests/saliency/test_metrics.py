"""Official metrics: golden numbers, the definitions by loops, cases by hand, running means."""

import dataclasses
import itertools
import math

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

from saliency import metrics
from saliency.metrics import (
    DHF1K,
    METRICS,
    SaliencyMetrics,
    Scores,
    auc_judd,
    auc_shuffled,
    cc,
    draw_frames,
    kldiv,
    nss,
    resize_and_blur,
    similarity,
)
from tests.launch import launch
from tests.saliency.maps import golden, make_fixations, make_map, mix, random_maps

OFFICIAL = golden("official_metrics")
REFERENCE = golden("losses")
SHAPE = (4, 360, 640)
NAN = math.nan
EXACT = {"splits": None, "step": None}


@pytest.fixture(scope="module")
def official():
    target = make_map(SHAPE, "gt")
    pred = mix([0.9, 0.5, 0.2, 0.0], target, make_map(SHAPE, "pred1"))
    return {
        "P": pred,
        "T": (8 * pred).round() / 8,
        "density": target,
        "fixations": make_fixations(SHAPE, "fix", 0.002),
        "other": make_fixations(SHAPE, "other", 0.004),
    }


@pytest.fixture(scope="module")
def small():
    shape = (4, 24, 32)
    pred = mix(np.array(REFERENCE["W"])[:, 0], make_map(shape, "gt"), make_map(shape, "pred1"))
    return pred, make_fixations(shape, "fix", 0.03)


def score_all(pred, density, fixations, other, **flags):
    maps = {"density": density, "fixations": fixations, "other": other}
    return {
        name: metric.function(pred, *(maps[need] for need in metric.needs), **flags.get(name, {}))
        for name, metric in METRICS.items()
    }


def close(values, expected, tolerance=1e-9):
    expected = [float(x) for x in expected]
    assert values.tolist() == pytest.approx(expected, rel=0, abs=tolerance, nan_ok=True)


def same(scores, other):
    """Compare Scores; NaN equals itself."""
    assert scores.frames == other.frames and scores.undefined == other.undefined
    assert scores.flags == other.flags and set(scores.videos) == set(other.videos)
    rows = [(scores.videos[video], other.videos[video]) for video in scores.videos]
    for a, b in [*rows, (scores.mean, other.mean), (scores.video_mean, other.video_mean)]:
        assert a == pytest.approx(b, rel=1e-12, nan_ok=True)


def line(*values):
    return torch.tensor([[values]], dtype=torch.float64)


# golden numbers


@pytest.mark.parametrize("name", ["nss", "cc", "similarity", "kldiv", "auc_judd"])
def test_official_numbers(official, name):
    metric = METRICS[name]
    values = metric.function(official["P"], *(official[need] for need in metric.needs))
    assert values.dtype == torch.float64
    close(values, OFFICIAL[f"{name}_P"], 1e-7)


def test_official_auc_of_a_map_with_ties(official):
    close(auc_judd(official["T"], official["fixations"]), OFFICIAL["auc_judd_T"], 1e-7)


@pytest.mark.parametrize("flags", [{}, {"splits": None}], ids=["drawn", "expectation"])
def test_official_shuffled_auc(official, flags):
    values = auc_shuffled(official["P"], official["fixations"], official["other"], **flags)
    # the official number is the mean of 5 runs, which scatter themselves
    close(values, OFFICIAL["auc_shuffled_P"], 0.005)
    away = np.abs(values.numpy() - OFFICIAL["auc_shuffled_P"])
    assert (away < 4 * np.array(OFFICIAL["auc_shuffled_run_std"])).all()


@pytest.mark.parametrize("ties", [False, True])
def test_the_references_false_positives_were_one_too_many(small, ties):
    pred, fixations = small
    pred = (8 * pred).round() / 8 if ties else pred
    n, pixels = fixations.sum((1, 2)).double(), 24 * 32
    # each FP larger by 1 / (M - n), but for the last corner
    theirs = auc_judd(pred, fixations) - (1 - 1 / (2 * n)) / (pixels - n)
    key = "auc_judd_no_jitter_tied_map(round(8*P1)/8)"
    plain = REFERENCE["metrics"]["P1"]["auc_judd_no_jitter_per_sample"]
    close(theirs, REFERENCE[key] if ties else plain, 1e-9)
    assert (auc_judd(pred, fixations) - theirs > 1e-3).all()


# the definitions, by loops


def trapezoids(x, y):
    return sum((b - a) * (c + d) / 2 for a, b, c, d in zip(x, x[1:], y, y[1:], strict=False))


def judd_by_loop(saliency, fixated):
    thresholds = sorted(saliency[fixated], reverse=True)
    n, pixels = len(thresholds), saliency.size
    hits, alarms = [0.0], [0.0]
    for i, threshold in enumerate(thresholds, start=1):
        hits.append(i / n)
        alarms.append((np.sum(saliency >= threshold) - i) / (pixels - n))
    return trapezoids([*alarms, 1.0], [*hits, 1.0])


def shuffled_by_loop(positive, negative, step=0.1):
    thresholds = [k / 10 for k in range(11) if k / 10 <= max(*positive, *negative)][::-1]
    if step is None:
        thresholds = sorted({*positive, *negative}, reverse=True)
    hits = [np.mean(positive >= t) for t in thresholds]
    alarms = [np.mean(negative >= t) for t in thresholds]
    return trapezoids([0.0, *alarms, 1.0], [0.0, *hits, 1.0])


@pytest.mark.parametrize("levels", [None, 2, 3, 8])
def test_auc_judd_is_its_loop(levels):
    pred = random_maps(6, 9, 11)
    pred = pred if levels is None else (levels * pred).floor()
    looked = random_maps(6, 9, 11, seed=1) > torch.tensor([0.1, 0.3, 0.5, 0.9, 0.97, 0.99]).view(
        -1, 1, 1
    )
    expected = [judd_by_loop(p.numpy(), f.numpy()) for p, f in zip(pred, looked, strict=True)]
    close(auc_judd(pred, looked), expected, 1e-12)


@pytest.mark.parametrize("levels", [None, 4])
@pytest.mark.parametrize("step", [0.1, None])
def test_the_expectation_is_the_mean_over_every_draw(step, levels):
    pred = random_maps(1, 5, 6) if levels is None else (levels * random_maps(1, 5, 6)).floor()
    place = torch.randperm(30, generator=torch.Generator().manual_seed(0))
    looked, elsewhere = torch.zeros(2, 1, 5, 6)
    looked.view(-1)[place[:3]] = 1
    elsewhere.view(-1)[place[2:8]] = 1
    scaled = ((pred - pred.min()) / (pred.max() - pred.min())).numpy()
    positive, negative = scaled[looked.numpy() > 0], scaled[elsewhere.numpy() > 0]
    draws = [
        shuffled_by_loop(positive, np.array(draw), step)
        for draw in itertools.combinations(negative, 3)
    ]
    close(auc_shuffled(pred, looked, elsewhere, splits=None, step=step), [np.mean(draws)], 1e-12)
    values = auc_shuffled(pred, looked, elsewhere, splits=4000, step=step)
    close(values, [np.mean(draws)], 5 * np.std(draws) / math.sqrt(4000))
    one = auc_shuffled(pred, looked, elsewhere, splits=1, step=step).item()
    assert min(abs(one - x) for x in draws) < 1e-12


def test_a_draw_takes_as_many_points_as_there_are_fixations():
    pred, looked = random_maps(2, 8, 9), make_fixations((2, 8, 9), "few", 0.2)
    elsewhere = make_fixations((2, 8, 9), "other", 0.1)
    assert (elsewhere.sum((1, 2)) < looked.sum((1, 2))).all()
    exact = auc_shuffled(pred, looked, elsewhere, splits=None)
    # there are fewer points than wanted: every draw has all of them
    close(auc_shuffled(pred, looked, elsewhere, splits=1), exact, 1e-12)
    close(auc_shuffled(pred, looked, elsewhere, splits=3, drawn=50), exact, 1e-12)
    assert not torch.allclose(auc_shuffled(pred, looked, elsewhere, splits=1, drawn=1), exact)


def test_memory_of_the_draws_is_bounded(monkeypatch):
    pred, looked = random_maps(2, 8, 9), make_fixations((2, 8, 9), "few", 0.1)
    elsewhere = make_fixations((2, 8, 9), "other", 0.5)
    monkeypatch.setattr(metrics, "_STRETCH", 200)
    sizes = []
    original = metrics._random
    monkeypatch.setattr(metrics, "_random", lambda *a: sizes.append(original(*a)) or sizes[-1])
    values = auc_shuffled(pred, looked, elsewhere, splits=2000)
    assert sum(x.shape[1] for x in sizes) == 2000 and max(x.numel() for x in sizes) <= 200
    assert torch.cat(sizes, dim=1).unique().numel() == sum(x.numel() for x in sizes)
    close(values, auc_shuffled(pred, looked, elsewhere, splits=None), 0.02)


# by hand


def test_auc_judd_by_hand():
    # corners: (0, 0), (0, 1/2), (1/2, 1), (1, 1)
    close(auc_judd(line(4, 3, 2, 1), line(1, 0, 1, 0)), [0.875])
    # the best map; one fixation with one pixel above it: (0, 0) (1/3, 1) (1, 1)
    close(auc_judd(line(4, 3, 2, 1), line(1, 1, 0, 0)), [1])
    close(auc_judd(line(4, 3, 2, 1), line(0, 1, 0, 0)), [5 / 6])
    close(auc_judd(line(4, 3, 2, 1), line(0, 0, 0, 1)), [0.5])


def test_auc_judd_of_ties_by_hand():
    # the tie comes first: (0, 0) (1/3, 1) (1, 1)
    close(auc_judd(line(1, 1, 0, 0), line(1, 0, 0, 0)), [5 / 6])
    # FP goes back from 1/2 to 0 within the tie: (0, 0) (1/2, 1/2) (0, 1) (1, 1)
    close(auc_judd(line(1, 1, 0, 0), line(1, 1, 0, 0)), [0.75])
    # jitter breaks ties; with one of two fixated the area is 1 or 5/6
    values = auc_judd(line(1, 1, 0, 0).expand(20, -1, -1), line(1, 0, 0, 0).expand(20, -1, -1))
    close(values, [5 / 6] * 20)
    broken = auc_judd(
        line(1, 1, 0, 0).expand(20, -1, -1), line(1, 0, 0, 0).expand(20, -1, -1), jitter=True
    )
    assert {round(x, 6) for x in broken.tolist()} == {1.0, round(5 / 6, 6)}


def test_auc_shuffled_by_hand():
    pred = line(0, 0.25, 0.5, 0.75, 1)
    here, there = line(0, 0, 0, 1, 0), line(0, 1, 1, 0, 1)
    # 0.75 beats two of three
    close(auc_shuffled(pred, here, there, **EXACT), [2 / 3])
    close(auc_shuffled(pred, here, there, splits=None), [2 / 3])
    # between 0.5 and 1 nothing tells apart
    close(auc_shuffled(pred, here, there, splits=None, step=0.5), [0.5])
    close(auc_shuffled(pred, here, here), [0.5])
    close(auc_shuffled(pred, line(0, 0, 0, 0, 1), line(1, 0, 0, 0, 0)), [1])
    close(auc_shuffled(-3 * pred, line(0, 0, 0, 0, 1), line(1, 0, 0, 0, 0)), [0])


def test_thresholds_are_decimal_numbers():
    # 6 * 0.1 is more than 0.6, which would move it below the threshold
    pred = line(0, 0.3, 0.59, 0.6, 1)
    close(auc_shuffled(pred, line(0, 0, 0, 1, 0), line(0, 0, 1, 0, 0), splits=None), [1])
    close(auc_shuffled(pred, line(0, 1, 0, 0, 0), line(0, 0, 0, 1, 0), splits=None), [0])


def test_nss_cc_similarity_kldiv_by_hand():
    close(nss(line(1, 2, 3), line(0, 7, 1)), [0.5])
    close(cc(line(1, 2, 3), line(10, 30, 20)), [0.5])
    close(similarity(line(1, 2, 3), line(6, 5, 4)), [1 / 3])
    close(kldiv(line(1, 1), line(1, 3)), [0.25 * math.log(0.5) + 0.75 * math.log(1.5)])


def test_a_fixation_counts_once_whatever_its_value():
    pred, other = random_maps(2, 8, 9), make_fixations((2, 8, 9), "other", 0.3)
    looked = make_fixations((2, 8, 9), "few", 0.2)
    weighted = looked * random_maps(2, 8, 9, seed=5) * 255
    for values in (looked.bool(), looked.byte(), weighted):
        assert torch.equal(nss(pred, values), nss(pred, looked))
        assert torch.equal(auc_judd(pred, values), auc_judd(pred, looked))
        assert torch.equal(auc_shuffled(pred, values, other), auc_shuffled(pred, looked, other))


# where a score is not defined


def test_frames_without_a_score_are_nan():
    pred, none, all_ = random_maps(1, 4, 5), torch.zeros(1, 4, 5), torch.ones(1, 4, 5)
    one = none.clone()
    one[0, 1, 2] = 1
    for value in (
        auc_judd(pred, none),
        auc_judd(pred, all_),
        auc_judd((3 * pred).floor(), all_),
        nss(pred, none),
        auc_shuffled(pred, none, one),
        auc_shuffled(pred, one, none),
        auc_shuffled(pred, one, none, splits=None),
        kldiv(pred, none),
        kldiv(none, pred),
        cc(pred, none),
    ):
        close(value, [NAN])
    for constant in (none, all_, torch.full_like(pred, 0.1)):
        close(auc_judd(constant, one), [NAN])
        close(auc_shuffled(constant, one, one), [NAN])
        close(nss(constant, one), [NAN])
        close(cc(constant, pred), [NAN])
        close(cc(pred, constant), [NAN])
    # defined: every pixel above the mean and below cancels; the uniform map; zeros share nothing
    close(nss(pred, all_), [0])
    assert kldiv(all_, pred).item() > 0
    close(similarity(all_, pred), [NAN])
    close(similarity(pred, all_), [NAN])
    close(similarity(none, pred), [0])
    close(similarity(pred, none), [0])
    assert auc_judd(all_, one, jitter=True).isfinite().all()


@pytest.mark.parametrize("bad", [NAN, math.inf, -math.inf])
def test_a_prediction_that_is_not_finite_has_no_score(bad):
    pred = random_maps(2, 4, 5)
    pred[0, 3, 3] = bad
    looked, other = torch.zeros(2, 2, 4, 5)
    looked[:, 0, :3] = other[:, 1:3, 1] = 1
    for name, values in score_all(pred, random_maps(2, 4, 5, seed=1), looked, other).items():
        assert values.isnan().tolist() == [True, False], name


def test_a_bad_frame_harms_no_other(official):
    rows = {k: official[k][:2, ::8, ::8].clone() for k in ("density", "fixations", "other")}
    pred = official["P"][:2, ::8, ::8].clone()
    alone = score_all(pred[1:], **{k: v[1:] for k, v in rows.items()}, auc_shuffled=EXACT)
    pred[0] = 0
    for x in rows.values():
        x[0] = 0
    together = score_all(pred, **rows, auc_shuffled=EXACT)
    for name, values in together.items():
        assert values[0].isnan() or (name, values[0].item()) == ("similarity", 0)
        torch.testing.assert_close(values[1:], alone[name])


# batches, dtypes, devices, randomness


@pytest.fixture(scope="module")
def batch():
    shape = (5, 20, 30)
    fixations = make_fixations(shape, "few", 0.02)
    fixations[3] = 0
    fixations[3, 4, 4] = 1
    return {
        "pred": random_maps(*shape),
        "density": make_map(shape, "gt"),
        "fixations": fixations,
        "other": make_fixations(shape, "other", 0.05),
    }


def test_each_sample_stands_alone(batch):
    values = score_all(**batch, auc_shuffled=EXACT)
    order = torch.tensor([3, 0, 4, 2, 1])
    moved = score_all(**{k: v[order] for k, v in batch.items()}, auc_shuffled=EXACT)
    for name, expected in values.items():
        assert expected.shape == (5,) and expected.isfinite().all()
        assert torch.equal(moved[name], expected[order])
        for i in range(5):
            alone = score_all(**{k: v[i : i + 1] for k, v in batch.items()}, auc_shuffled=EXACT)
            torch.testing.assert_close(alone[name], expected[i : i + 1])
    for empty in score_all(**{k: v[:0] for k, v in batch.items()}).values():
        assert empty.shape == (0,)


def test_order_is_all_that_the_aucs_see(batch):
    pred, fixations, other = batch["pred"], batch["fixations"], batch["other"]
    assert torch.equal(auc_judd(pred, fixations), auc_judd(3 * pred.log() + 7, fixations))
    exact = auc_shuffled(pred, fixations, other, **EXACT)
    torch.testing.assert_close(auc_shuffled(pred.log(), fixations, other, **EXACT), exact)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_predictions_of_any_precision_are_scored_in_float64(batch, dtype):
    pred = batch["pred"].to(dtype)
    values = score_all(**{**batch, "pred": pred})
    expected = score_all(**{**batch, "pred": pred.double()})
    for name in METRICS:
        assert values[name].dtype == torch.float64
        assert torch.equal(values[name], expected[name]), name


def test_metrics_carry_no_gradient_and_change_no_map(batch):
    pred = batch["pred"].clone().requires_grad_()
    before = {k: v.clone() for k, v in batch.items()}
    for values in score_all(**{**batch, "pred": pred}).values():
        assert not values.requires_grad
    assert all(torch.equal(batch[k], before[k]) for k in batch)


def test_maps_need_not_be_contiguous(batch):
    turned = {k: v.transpose(1, 2) for k, v in batch.items()}
    values, expected = (score_all(**x, auc_shuffled=EXACT) for x in (turned, batch))
    for name in METRICS:
        torch.testing.assert_close(values[name], expected[name])


def test_accelerators_compute_the_same(batch, monkeypatch):
    expected = score_all(**batch, auc_shuffled=EXACT)
    monkeypatch.setattr(metrics, "_compact", lambda values, chosen: (values, chosen))
    monkeypatch.setattr(metrics, "_sorted", lambda values: values.sort(dim=-1).values)
    for name, values in score_all(**batch, auc_shuffled=EXACT).items():
        assert torch.equal(values, expected[name]), name


@pytest.mark.parametrize("name", METRICS)
def test_nothing_is_read_from_the_device(batch, name):
    # a meta tensor has no values, so whoever asks for one fails
    maps = {k: v.to("meta") for k, v in batch.items()}
    metric = METRICS[name]
    flags = EXACT if name == "auc_shuffled" else {}
    values = metric.function(maps["pred"], *(maps[need] for need in metric.needs), **flags)
    assert values.shape == (5,)


def test_meta_tensors_catch_a_read(batch):
    maps = [batch[k].to("meta") for k in ("pred", "fixations", "other")]
    with pytest.raises((RuntimeError, NotImplementedError)):
        auc_shuffled(*maps)


def test_draws_are_seeded_and_leave_the_global_generators_alone(batch):
    pred, fixations, other = batch["pred"], batch["fixations"], batch["other"]
    torch_state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()
    first = auc_shuffled(pred, fixations, other)
    assert torch.equal(auc_shuffled(pred, fixations, other), first)
    seeded = [
        auc_shuffled(pred, fixations, other, seeds=torch.arange(5) + seed) for seed in (0, 9, 9)
    ]
    assert torch.equal(seeded[0], first) and torch.equal(seeded[1], seeded[2])
    assert not torch.equal(seeded[0], seeded[1])
    assert torch.equal(auc_judd(pred, fixations), auc_judd(pred, fixations))
    flat = (4 * pred).floor()
    jittered = [
        auc_judd(flat, fixations, jitter=True, seeds=torch.arange(5) + seed) for seed in (1, 1, 2)
    ]
    assert torch.equal(jittered[0], jittered[1]) and not torch.equal(jittered[0], jittered[2])
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert (np.random.get_state()[1] == numpy_state).all()


@pytest.mark.parametrize("name", ["auc_shuffled", "auc_judd"])
def test_what_is_drawn_for_a_frame_depends_on_its_seed_alone(batch, name):
    maps = {"pred": (4 * batch["pred"]).floor(), **{k: batch[k] for k in METRICS[name].needs}}
    flags = {"jitter": True} if name == "auc_judd" else {}
    seeds = torch.tensor([7, -(2**62), 3, 2**40, 0])
    function = METRICS[name].function
    whole = function(*maps.values(), **flags, seeds=seeds)
    for i in range(5):
        alone = [x[i : i + 1] for x in maps.values()]
        assert function(*alone, **flags, seeds=seeds[i : i + 1]) == whole[i]


def test_numbers_drawn_are_splitmix64s_and_uniform():
    # the first outputs for the seed 0, which the authors' reference program prints
    found = metrics._scrambled(metrics._GOLDEN * torch.arange(1, 4))
    expected = (0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F)
    assert [x % 2**64 for x in found.tolist()] == list(expected)
    drawn = metrics._random(torch.tensor([0, 1, 99]), range(5, 105), torch.zeros(3, 1000)).numpy()
    assert drawn.shape == (3, 100, 1000) and drawn.min() >= 0 and drawn.max() < 1
    counts = np.histogram(drawn, bins=50, range=(0, 1))[0]
    assert ((counts - 6000) ** 2 / 6000).sum() < 100  # chi square of 49: 1 in 50 000
    flat = drawn.reshape(3, -1)
    beside = [np.corrcoef(flat[0], flat[1])[0, 1], np.corrcoef(flat[0, 1:], flat[0, :-1])[0, 1]]
    below = np.corrcoef(drawn[0, 1:].ravel(), drawn[0, :-1].ravel())[0, 1]
    assert max(abs(x) for x in (*beside, below)) < 0.015


def test_drawn_scores_do_not_depend_on_batches_and_processes():
    maps, videos = frames()
    names = ["auc_shuffled", "auc_judd"]
    numbers = [videos[:i].count(video) for i, video in enumerate(videos)]
    found = []
    for parts in (
        [slice(0, 12)],
        [slice(i, i + 1) for i in range(12)],
        [slice(7, 12), slice(0, 7)],
    ):
        running = SaliencyMetrics(names, flags={"auc_judd": {"jitter": True}}, seed=4)
        for part in parts:
            rest = {"video": videos[part], "numbers": numbers[part]}
            running.update(**{k: v[part] for k, v in maps.items()}, **rest)
        found.append(running.compute())
    same(found[0], found[1])
    same(found[0], found[2])
    with pytest.raises(ValueError, match="1 numbers for 12 frames; expected one a frame"):
        running.update(**maps, numbers=[3])


def test_jitter_moves_only_ties(batch):
    plain = auc_judd(batch["pred"], batch["fixations"])
    close(auc_judd(batch["pred"], batch["fixations"], jitter=True), plain, 1e-12)


@pytest.mark.parametrize("name", METRICS)
def test_shapes_that_differ(batch, name):
    needs = METRICS[name].needs
    maps = [batch[need] for need in needs]
    for i, need in enumerate(needs):
        wrong = [*maps[:i], maps[i][:, :3], *maps[i + 1 :]]
        with pytest.raises(ValueError, match=f"{need} has shape"):
            METRICS[name].function(batch["pred"], *wrong)
    with pytest.raises(ValueError, match="pred has dtype"):
        METRICS[name].function(batch["pred"].long(), *maps)


@pytest.mark.parametrize(
    "flags", [{"splits": 0}, {"step": 0}, {"step": 2}, {"drawn": 0}, {"drawn": 3, "splits": None}]
)
def test_flags_out_of_range(batch, flags):
    with pytest.raises(ValueError, match=next(iter(flags))):
        auc_shuffled(batch["pred"], batch["fixations"], batch["other"], **flags)


# running means


def frames(count=12, shape=(20, 30)):
    """A small data set: predictions, ground truth, and four videos of different length."""
    size = (count, *shape)
    fixations = make_fixations(size, "few", 0.02)
    fixations[2::5] = 0
    pred = random_maps(*size)
    pred[5::12] = 0.5
    maps = {
        "pred": pred,
        "density": make_map(size, "gt"),
        "fixations": fixations,
        "other": make_fixations(size, "other", 0.05),
    }
    return maps, ["0601"] * 5 + ["0602"] * 1 + ["0603"] * 4 + ["0604"] * 2


FLAGS = {"auc_shuffled": {"splits": None}}


def test_running_means_are_the_means_of_the_frames():
    maps, videos = frames()
    values = score_all(**maps, **FLAGS)
    running = SaliencyMetrics(list(METRICS), flags=FLAGS)
    for part in (slice(0, 5), slice(5, 11), slice(11, 12)):
        running.update(**{k: v[part] for k, v in maps.items()}, video=videos[part])
    scores = running.compute()
    assert scores.frames == 12
    assert scores.undefined == {
        "auc_judd": 3,
        "similarity": 1,
        "auc_shuffled": 3,
        "cc": 1,
        "nss": 3,
        "kldiv": 0,
    }
    for name, row in values.items():
        assert scores.mean[name] == pytest.approx(row.nanmean().item())
        by_video = {
            video: row[[v == video for v in videos]].nanmean().item()
            for video in dict.fromkeys(videos)
        }
        ours = {video: means[name] for video, means in scores.videos.items()}
        assert ours == pytest.approx(by_video, nan_ok=True)
        mean = np.nanmean(list(by_video.values()))
        assert scores.video_mean[name] == pytest.approx(mean)
        assert abs(scores.video_mean[name] - scores.mean[name]) > 1e-6
    assert math.isnan(scores.videos["0602"]["cc"])


def test_defaults_are_the_five_of_the_benchmark_by_their_official_definitions():
    maps, _ = frames(2)
    running = SaliencyMetrics()
    running.update(**maps)
    scores = running.compute()
    assert tuple(scores.mean) == DHF1K
    assert scores.flags["auc_shuffled"] == {"splits": 100, "step": 0.1, "drawn": None}
    assert scores.flags["auc_judd"] == {"jitter": False}
    assert scores.videos == {} and math.isnan(scores.video_mean["cc"])
    assert SaliencyMetrics(flags=FLAGS).compute().flags["auc_shuffled"]["splits"] is None


def test_reset_forgets_frames_and_draws_the_same_again():
    maps, videos = frames()
    running = SaliencyMetrics(["auc_shuffled"])
    scores = []
    for _ in range(2):
        running.update(**maps, video=videos)
        scores.append(running.compute())
        running.reset()
    same(*scores)
    empty = running.compute()
    assert empty.frames == 0 and math.isnan(empty.mean["auc_shuffled"])
    other = SaliencyMetrics(["auc_shuffled"], seed=1)
    other.update(**maps)
    assert other.compute().mean != scores[0].mean


def test_compute_changes_nothing():
    maps, videos = frames()
    running = SaliencyMetrics(["cc", "kldiv"])
    running.update(maps["pred"], maps["density"], video=videos)
    same(running.compute(), running.compute())
    running.update(maps["pred"], maps["density"], video=7)
    assert running.compute().frames == 24
    assert list(running.compute().videos) == ["0601", "0602", "0603", "0604", 7]


def test_merging_is_seeing_all_frames():
    maps, videos = frames()
    whole, *parts = (SaliencyMetrics(list(METRICS), flags=FLAGS) for _ in range(3))
    whole.update(**maps, video=videos)
    for part, chosen in zip(parts, (slice(0, 7), slice(7, 12)), strict=True):
        part.update(**{k: v[chosen] for k, v in maps.items()}, video=videos[chosen])
    parts[1].merge(parts[0])
    same(parts[1].compute(), whole.compute())
    with pytest.raises(ValueError, match="expected the same"):
        parts[0].merge(SaliencyMetrics(["cc"]))
    with pytest.raises(ValueError, match="expected the same"):
        parts[0].merge(SaliencyMetrics(list(METRICS)))


def shard(world, path):
    """Score a part of the frames; videos are split over ranks, and come in another order."""
    maps, videos = frames()
    chosen = [[0, 1, 2, 3, 9], [11, 4, 5, 6, 7, 8, 10]][world.rank]
    running = SaliencyMetrics(list(METRICS), flags=FLAGS)
    for i in chosen:
        running.update(**{k: v[i : i + 1] for k, v in maps.items()}, video=videos[i])
    lonely = SaliencyMetrics(["cc"])
    if not world.is_main:
        lonely.update(maps["pred"][:1], maps["density"][:1], video="late")
    first = running.compute()
    found = {"all": running.compute(), "late": lonely.compute()}
    same(first, found["all"])
    torch.save({k: dataclasses.asdict(v) for k, v in found.items()}, path / f"{world.rank}.pt")


def test_two_processes_equal_one(tmp_path):
    launch(shard, 2, tmp_path)
    maps, videos = frames()
    running, late = SaliencyMetrics(list(METRICS), flags=FLAGS), SaliencyMetrics(["cc"])
    running.update(**maps, video=videos)
    late.update(maps["pred"][:1], maps["density"][:1], video="late")
    for rank in range(2):
        two = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        same(Scores(**two["all"]), running.compute())
        same(Scores(**two["late"]), late.compute())


def test_what_the_running_means_refuse():
    maps, videos = frames(3)
    with pytest.raises(ValueError, match=r"\['auc'\].*auc_judd"):
        SaliencyMetrics(["auc", "cc"])
    with pytest.raises(ValueError, match="no metrics"):
        SaliencyMetrics([])
    with pytest.raises(ValueError, match=r"'split'.*splits"):
        SaliencyMetrics(flags={"auc_shuffled": {"split": 3}})
    with pytest.raises(ValueError, match="not among"):
        SaliencyMetrics(["cc"], flags=FLAGS)
    running = SaliencyMetrics()
    with pytest.raises(ValueError, match="auc_shuffled needs the maps other"):
        running.update(maps["pred"], maps["density"], maps["fixations"])
    with pytest.raises(ValueError, match="5 videos for 3 frames"):
        running.update(**maps, video=videos[:5])
    assert running.compute().frames == 0


def test_frames_are_drawn_once_each():
    assert draw_frames(5) == draw_frames(5, None) == draw_frames(5, 5) == [0, 1, 2, 3, 4]
    drawn = draw_frames(60_000)
    assert len(set(drawn)) == 50_000 and drawn == sorted(drawn) and drawn[-1] < 60_000
    assert draw_frames(100, 10) == draw_frames(100, 10)
    assert draw_frames(100, 10) != draw_frames(100, 10, torch.Generator().manual_seed(1))
    with pytest.raises(ValueError, match="count is 0"):
        draw_frames(100, 0)


# resize and blur


def opencv(maps, size, blur=11, interpolation=cv2.INTER_LINEAR):
    rows = [cv2.resize(x.numpy(), size[::-1], interpolation=interpolation) for x in maps]
    if blur:
        rows = [cv2.GaussianBlur(x, (blur, blur), 0) for x in rows]
    return torch.from_numpy(np.stack(rows))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "size", [(360, 640), (224, 384), (112, 192), (100, 300), (37, 51), (1, 5), (3, 2)], ids=str
)
def test_resize_and_blur_are_opencvs(size, dtype):
    maps = make_map((2, 224, 384), "a").to(dtype)
    ours, theirs = resize_and_blur(maps, size), opencv(maps, size)
    assert ours.dtype == dtype
    torch.testing.assert_close(ours, theirs, rtol=1e-5 if dtype == torch.float32 else 1e-12, atol=0)


def test_small_maps_are_enlarged_as_opencv_does():
    maps = random_maps(2, 7, 12)
    torch.testing.assert_close(resize_and_blur(maps, (36, 64)), opencv(maps, (36, 64)))
    for blur in (0, 1, 11, 13, 31):
        ours = resize_and_blur(maps, (36, 64), blur)
        torch.testing.assert_close(ours, opencv(maps, (36, 64), blur))
    ours = resize_and_blur(maps, (36, 64), 9, sigma=3.5)
    rows = [cv2.GaussianBlur(x, (9, 9), 3.5) for x in opencv(maps, (36, 64), 0).numpy()]
    torch.testing.assert_close(ours, torch.from_numpy(np.stack(rows)))


@pytest.mark.parametrize("size", [(90, 60), (20, 31), (9, 7)], ids=str)
def test_bicubic_with_antialias_is_pillows(size):
    maps = random_maps(2, 40, 60, dtype=torch.float32)
    ours = resize_and_blur(maps, size, 0, interpolation="bicubic", antialias=True)
    rows = [Image.fromarray(x.numpy()).resize(size[::-1], Image.BICUBIC) for x in maps]
    theirs = torch.from_numpy(np.stack([np.asarray(x) for x in rows]))
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)


def test_the_evaluation_path_is_the_references():
    key = "eval_path(sample 0 of small: cv2.resize -> GaussianBlur 11x11)"
    expected = REFERENCE[key]
    small, target = make_map((4, 18, 20), "small"), make_map((4, 24, 32), "gt")
    maps = resize_and_blur(small, (24, 32))
    found = {name: METRICS[name].function(maps, target)[0].item() for name in ("kldiv", "cc")}
    assert found["kldiv"] == pytest.approx(expected["kldiv"][0], rel=1e-6)
    assert found["cc"] == pytest.approx(expected["cc"][0], rel=1e-6)
    share = similarity(maps, target)[0].item()
    assert share == pytest.approx(expected["sim"][0], rel=1e-6)


def test_a_blur_keeps_a_constant_map_and_carries_gradient():
    torch.testing.assert_close(
        resize_and_blur(torch.full((1, 5, 6), 0.3), (40, 50)), torch.full((1, 40, 50), 0.3)
    )
    maps = random_maps(2, 5, 6).requires_grad_()
    resize_and_blur(maps, (10, 12)).sum().backward()
    assert maps.grad.sum().item() == pytest.approx(2 * 10 * 12, rel=0.2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_resized_in_float32(dtype):
    maps = random_maps(2, 5, 6).to(dtype)
    ours = resize_and_blur(maps, (10, 12))
    assert ours.dtype == torch.float32
    assert torch.equal(ours, resize_and_blur(maps.float(), (10, 12)))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(resize_and_blur(maps.float(), (10, 12)), ours)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"size": (3, 0)}, "size is"),
        ({"size": (3, 4, 5)}, "size is"),
        ({"blur": 10}, "blur is 10"),
        ({"blur": -1}, "blur is -1"),
        ({"interpolation": "area"}, "'area'"),
        ({"sigma": 0}, "sigma is 0"),
        ({"pred": torch.rand(2, 1, 4, 5)}, "pred has shape"),
    ],
)
def test_what_the_resize_refuses(flags, message):
    with pytest.raises(ValueError, match=message):
        resize_and_blur(**{"pred": torch.rand(2, 4, 5), "size": (4, 5)} | flags)


def test_seeds_can_come_from_a_generator():
    pred, fixations, other = (random_maps(3, 12, 14, seed=i) for i in range(3))
    looked, elsewhere = fixations > 0.9, other > 0.8

    def score(number):
        generator = torch.Generator().manual_seed(number)
        return auc_shuffled(pred, looked, elsewhere, generator)

    assert torch.equal(score(1), score(1)) and not torch.equal(score(1), score(2))
    generator = torch.Generator().manual_seed(0)
    ties = (pred * 3).round()
    one = auc_judd(ties, looked, jitter=True, generator=generator)
    assert not torch.equal(one, auc_judd(ties, looked, jitter=True, generator=generator))
