"""Views, seeded samples, order, positions."""

import io
import json
import random
import shutil
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from classification.data import (
    ToView,
    TrainLoader,
    View,
    common_view,
    eval_loader,
    open_dataset,
    view_of,
)
from classification.models import create_classifier
from classification.options import parse
from classification.train import check_apart, check_same_classes, images_at, open_both
from common.broken import BadSamples
from common.distributed import World
from common.options import OptionError

CPU = torch.device("cpu")
HERE = World(0, 1, 0, CPU)
INCEPTION = View((3, 32, 32), (0.5,) * 3, (0.5,) * 3, "bicubic", 0.9, "center")
IMAGENET = View((3, 24, 24), (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), "bicubic", 1, "center")


def options_of(digits, *more):
    arguments = [str(digits), "--peer", "a", "--peer", "b", "-b", "50", "-j", "0", *more]
    return parse(arguments)[0]


def loader_of(digits, *more, world=HERE, classes=10):
    options = options_of(digits, *more)
    return TrainLoader(open_dataset(options, True, 3), INCEPTION, options, world, classes)


def epoch_of(loader, epoch=0, start=0):
    loader.set_epoch(epoch, start)
    return list(loader)


def same(a, b):
    return len(a) == len(b) and all(
        torch.equal(x, y) and torch.equal(s, t) for (x, s), (y, t) in zip(a, b, strict=True)
    )


@pytest.mark.parametrize("more", [(), ("--aug-repeats", "2")])
def test_a_batch_tells_its_files(digits, more):
    loader = loader_of(digits, "-b", "20", *more, world=World(1, 2, 1, CPU))
    for start in (0, 1):
        loader.set_epoch(1, start)
        told = set()
        for _, target in loader:
            names = loader.names_of(None)()
            assert [int(Path(name).parent.name) for name in names] == target.tolist()
            assert all(Path(name).is_file() for name in names)
            told |= set(names)
        assert len(told) > 15


def test_others_take_the_place_of_broken_images(digits, tmp_path):
    shutil.copytree(digits / "train", tmp_path / "train")
    broken = [tmp_path / "train" / str(k) / "5.png" for k in range(10)]
    for path in broken:
        path.write_bytes(b"no image")

    def loader(*more, world=HERE, batch=20):
        options = options_of(tmp_path, "-b", str(batch), "--max-bad-samples", "10", *more)
        data = open_dataset(options, True, 3)
        return TrainLoader(data, INCEPTION, options, world, 10, BadSamples(10))

    one = loader()
    whole = epoch_of(one, 1)
    assert set(one.bad.found) == set(map(str, broken))
    assert same(whole, epoch_of(loader("-j", "2"), 1))
    assert same(whole[7:], epoch_of(loader(), 1, 7))
    ranks = [epoch_of(loader(world=World(r, 2, r, CPU), batch=10), 1) for r in range(2)]
    for (images, target), *parts in zip(whole, *ranks, strict=True):
        assert all(torch.equal(images[r::2], x) for r, (x, _) in enumerate(parts))
        assert all(torch.equal(target[r::2], y) for r, (_, y) in enumerate(parts))
    one.set_epoch(1)
    for _, target in one:
        names = one.names_of(None)()
        assert [int(Path(name).parent.name) for name in names] == target.tolist()
        assert not set(names) & set(map(str, broken))


def test_a_view_normalises_as_the_peer_itself_would():
    images = torch.rand(2, 3, 32, 32)
    given = (images - 0.5) / 0.5
    own = replace(IMAGENET, size=(3, 32, 32))
    mean, std = (torch.tensor(x).view(1, 3, 1, 1) for x in (own.mean, own.std))
    torch.testing.assert_close(ToView(INCEPTION, own)(given), (images - mean) / std)
    assert ToView(INCEPTION, INCEPTION)(given) is given


def test_a_view_resizes_and_casts():
    out = ToView(INCEPTION, IMAGENET, channels_last=True, dtype=torch.bfloat16)(
        torch.rand(2, 3, 32, 32)
    )
    assert out.shape == (2, 3, 24, 24) and out.dtype == torch.bfloat16
    assert out.is_contiguous(memory_format=torch.channels_last)
    flat = ToView(INCEPTION, IMAGENET)(torch.zeros(1, 3, 32, 32))
    expected = (0.5 - torch.tensor(IMAGENET.mean)) / torch.tensor(IMAGENET.std)
    torch.testing.assert_close(flat[0, :, 5, 5], expected)


def test_the_common_view_is_the_largest_and_keeps_shared_statistics():
    both = common_view([INCEPTION, IMAGENET])
    assert both.size == (3, 32, 32) and both.mean == IMAGENET.mean
    assert common_view([INCEPTION, INCEPTION]).mean == INCEPTION.mean
    gray = View((1, 32, 32), (0.5,), (0.5,), "bicubic", 1, "center")
    with pytest.raises(OptionError, match=r"images of \[1, 3\] channels; set --in-chans"):
        common_view([gray, INCEPTION])


def test_views_come_from_each_models_own_config():
    _, peers = parse(["/data", "--peer", "a,mean=0.1+0.2+0.3,crop_pct=0.7", "--peer", "b"])
    vit = create_classifier("vit_tiny_patch16_224.augreg_in21k_ft_in1k", num_classes=10)
    assert view_of(vit, peers[1].options).mean == (0.5, 0.5, 0.5)
    assert view_of(vit, peers[1].options).crop_pct == 0.9
    own = view_of(vit, peers[0].options)
    assert (own.mean, own.crop_pct) == ((0.1, 0.2, 0.3), 0.7)


def test_every_sample_is_seen_once_an_epoch_in_another_order_each_time(digits):
    loader = loader_of(digits, "--no-aug")
    first, second = epoch_of(loader, 0), epoch_of(loader, 1)
    assert len(first) == len(loader) == 8 and first[0][0].shape == (50, 3, 32, 32)
    count = torch.bincount(torch.cat([y for _, y in first]))
    assert count.tolist() == [40] * 10
    assert not same(first, second)
    assert same(first, epoch_of(loader_of(digits, "--no-aug"), 0))


def test_an_epoch_resumes_in_its_middle(digits):
    loader = loader_of(digits, "--aa", "rand-m5", "--color-jitter", "0.4")
    whole = epoch_of(loader, 3)
    assert same(epoch_of(loader, 3, start=5), whole[5:])
    assert len(epoch_of(loader, 3, start=8)) == 0


def test_samples_do_not_depend_on_workers_or_on_who_draws_beside_them(digits):
    here = epoch_of(loader_of(digits))
    torch.manual_seed(7)
    random.seed(7)
    np.random.seed(7)
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
    again = epoch_of(loader_of(digits))
    assert same(here, again)
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1] == random.getstate() and (before[2] == np.random.get_state()[1]).all()
    workers = loader_of(digits, "-j", "2")
    assert same(here, epoch_of(workers))
    assert not same(here, epoch_of(loader_of(digits, "--seed", "1")))


def test_two_ranks_see_what_one_sees(digits):
    one = epoch_of(loader_of(digits))
    halves = [epoch_of(loader_of(digits, "-b", "25", world=World(r, 2, r, CPU))) for r in range(2)]
    for k, (images, target) in enumerate(one):
        together = torch.empty_like(images)
        together[0::2], together[1::2] = halves[0][k][0], halves[1][k][0]
        assert torch.equal(together, images)
        assert torch.equal(halves[0][k][1], target[0::2])


def test_repeated_augmentation_differs_between_repeats(digits):
    loader = loader_of(digits, "--aug-repeats", "3", "-b", "60")
    images = torch.cat([x for x, _ in epoch_of(loader)])
    targets = torch.cat([y for _, y in epoch_of(loader)])
    assert torch.equal(targets[0:60:3], targets[1:60:3])
    assert not torch.equal(images[0:60:3], images[1:60:3])


def test_mixup_gives_soft_targets_until_its_off_epoch(digits):
    loader = loader_of(digits, "--mixup", "0.8", "--mixup-off-epoch", "1")
    soft = epoch_of(loader, 0)[0][1]
    assert soft.shape == (50, 10)
    torch.testing.assert_close(soft.sum(1), torch.ones(50))
    late = epoch_of(loader, 1)[0][1]
    assert (late > 0.5).sum() == 50


def test_erasing_happens_on_the_device_from_the_steps_generator(digits):
    loader = loader_of(digits, "--reprob", "1", "--remode", "const", "--no-aug")
    plain = epoch_of(loader)
    assert same(plain, epoch_of(loader))
    erased = epoch_of(loader_of(digits, "--reprob", "1", "--remode", "const"))
    assert any((x == 0).any() for x, _ in erased)


def test_validation_shards_hold_every_sample_once(digits):
    options = options_of(digits, "-vb", "64")
    whole = list(eval_loader(open_dataset(options, False, 3), INCEPTION, options, HERE))
    target = torch.cat([y for _, y in whole])
    assert len(target) == 200 and [len(y) for _, y in whole] == [64, 64, 64, 8]
    shards = []
    for r in range(3):
        shard = eval_loader(
            open_dataset(options, False, 3), INCEPTION, options, World(r, 3, r, CPU)
        )
        shards.append(torch.cat([y for _, y in shard]))
    assert [len(s) for s in shards] == [67, 67, 66]
    assert torch.equal(shards[1], target[1::3])


def test_bad_data_is_named(digits, tmp_path):
    with pytest.raises(OptionError, match="no such data folder"):
        open_dataset(options_of(tmp_path / "nowhere"), True, 3)
    (tmp_path / "empty").mkdir()
    for training, split in ((True, "train"), (False, "validation")):
        told = rf"no images of split '{split}' .*expected {tmp_path}/empty/{split}/CLASS/.*-split"
        with pytest.raises(OptionError, match=told):
            open_dataset(options_of(tmp_path / "empty"), training, 3)
    mnist = options_of(tmp_path / "empty", "--dataset", "torch/mnist")
    with pytest.raises(OptionError, match="cannot open split 'train'"):
        open_dataset(mnist, True, 3)
    with pytest.raises(OptionError, match="do not fill one batch of 500; lower --batch-size"):
        loader_of(digits, "-b", "500")


def test_a_missing_split_is_not_read_from_the_others(digits, tmp_path):
    shutil.copytree(digits / "train", tmp_path / "train")
    assert len(open_dataset(options_of(tmp_path), True, 3)) == 400
    with pytest.raises(OptionError, match="no folder for split 'validation', only train; make one"):
        open_dataset(options_of(tmp_path), False, 3)
    with pytest.raises(OptionError, match="no folder for split 'fit'"):
        open_dataset(options_of(tmp_path, "--train-split", "fit"), True, 3)
    assert len(open_dataset(options_of(tmp_path / "train"), False, 3)) == 400


@pytest.mark.parametrize("split", ["flat", "named", "link"])
def test_what_is_trained_on_is_not_measured_on(digits, tmp_path, split):
    data, more = digits, ["--val-split", "train"]
    if split == "flat":  # timm reads the whole folder for both
        data, more = digits / "train", []
    if split == "link":
        data, more = tmp_path, []
        for name in ("train", "validation"):
            (tmp_path / name).symlink_to(digits / "train")
    with pytest.raises(OptionError, match=r"400 of 400 files to train on .* give --held-out SHARE"):
        open_both(options_of(data, *more), 3, 10)
    train, held_out = open_both(options_of(data, *more, "--held-out", "0.2"), 3, 10)
    assert not set(images_at(train)) & set(images_at(held_out))


def test_other_data_are_told_apart_by_their_split(digits):
    options, samples = options_of(digits), [(0, 0)]  # of no files at all
    check_apart(samples, samples, options, "")
    options.val_split = options.train_split
    with pytest.raises(OptionError, match="--train-split and --val-split are both 'train'; do x"):
        check_apart(samples, samples, options, "do x")


def test_a_tar_file_is_not_measured_on_too(digits, tmp_path):
    path = tmp_path / "all.tar"
    with tarfile.open(path, "w") as file:
        file.add(digits / "train", arcname=".")
    with pytest.raises(OptionError, match=r"1 of 1 files .*all\.tar the first"):
        open_both(options_of(path), 3, 10)


def test_a_class_map_that_is_missing_is_named(digits):
    with pytest.raises(OptionError, match=r"/nowhere\.txt"):
        open_dataset(options_of(digits, "--class-map", "/nowhere.txt"), True, 3)


def test_splits_of_other_classes_are_refused(digits, tmp_path):
    shutil.copytree(digits, tmp_path / "data")
    shutil.rmtree(tmp_path / "data" / "validation" / "3")
    train, held_out = (open_dataset(options_of(tmp_path / "data"), x, 3) for x in (True, False))
    check_same_classes(train, train)
    with pytest.raises(OptionError, match="in one of them only: 3; complete the folders"):
        check_same_classes(train, held_out)


def test_steps_an_epoch_can_be_limited(digits):
    loader = loader_of(digits, "--train-batches-per-epoch", "3")
    assert len(loader) == 3
    assert len(epoch_of(loader)) == 3 and len(epoch_of(loader, 0, start=2)) == 1


def test_views_are_modules_without_saved_state():
    assert isinstance(ToView(INCEPTION, IMAGENET), nn.Module)
    assert not ToView(INCEPTION, IMAGENET).state_dict()


def write_shards(digits, root, shards=2):
    """Write the digits as webdataset shards with timm's index."""
    info = {}
    for split in ("train", "validation"):
        files = sorted((digits / split).rglob("*.png"), key=lambda path: path.name)
        names = [f"{split}-{k:04d}.tar" for k in range(shards)]
        for k, name in enumerate(names):
            with tarfile.open(root / name, "w") as tar:
                for i, path in enumerate(files[k::shards]):
                    for suffix, data in (
                        ("png", path.read_bytes()),
                        ("cls", path.parent.name.encode()),
                    ):
                        member = tarfile.TarInfo(f"{i:05d}.{suffix}")
                        member.size = len(data)
                        tar.addfile(member, io.BytesIO(data))
        lengths = [len(files[k::shards]) for k in range(shards)]
        info[split] = {
            "name": split,
            "num_samples": len(files),
            "filenames": names,
            "shard_lengths": lengths,
        }
    (root / "_info.json").write_text(json.dumps({"splits": info}))


def test_an_epoch_that_was_saved_after_its_last_batch_has_none_left(digits):
    loader = loader_of(digits, "--train-batches-per-epoch", "2")
    assert len(epoch_of(loader, 0)) == 2
    loader.set_epoch(0, 2)
    assert list(loader) == []


def test_webdataset_shards_stream_and_resume_at_the_right_batch(digits, tmp_path):
    write_shards(digits, tmp_path)
    options = options_of(tmp_path, "--dataset", "wds/digits", "--no-aug")
    loader = TrainLoader(open_dataset(options, True, 3), INCEPTION, options, HERE, 10)
    whole = epoch_of(loader, 1)
    assert len(whole) == len(loader) == 8 and whole[0][0].shape == (50, 3, 32, 32)
    again = TrainLoader(open_dataset(options, True, 3), INCEPTION, options, HERE, 10)
    assert same(epoch_of(again, 1, start=5), whole[5:])
    held_out = eval_loader(open_dataset(options, False, 3), INCEPTION, options, HERE)
    assert torch.bincount(torch.cat([y for _, y in held_out])).tolist() == [20] * 10
    options.max_bad_samples = 3
    with pytest.raises(OptionError, match="3 with --dataset wds/digits: a stream's own reader"):
        TrainLoader(open_dataset(options, True, 3), INCEPTION, options, HERE, 10)


def test_a_tar_file_is_a_dataset(digits, tmp_path):
    with tarfile.open(tmp_path / "digits.tar", "w") as tar:
        tar.add(digits / "validation", arcname="digits")
    options = options_of(tmp_path / "digits.tar")
    target = torch.cat(
        [y for _, y in eval_loader(open_dataset(options, False, 3), INCEPTION, options, HERE)]
    )
    assert torch.bincount(target).tolist() == [20] * 10
