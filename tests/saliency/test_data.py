"""Pixels, decoding, targets, batches, order and positions of the loaders."""

import os
import random
import shutil
from dataclasses import replace
from datetime import timedelta

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.io import savemat
from torchvision import transforms

from common.distributed import PATIENCE, World, start
from saliency import data, frames, packed
from saliency.clips import VIEWS
from saliency.data import EvalLoader, TrainClips, TrainLoader, collate
from saliency.errors import DataError
from saliency.frames import FrameReader
from saliency.images import read_fixations, read_frame, read_map, resize_frame, scale_fixations
from saliency.layouts import open_dataset
from saliency.packed import pack_frames
from tests.launch import launch
from tests.saliency.folders import (
    looks,
    picture,
    write_dataset,
    write_fixations,
    write_image,
    write_video,
)

CPU = torch.device("cpu")
HERE = World(0, 1, 0, CPU)
TMFI = replace(VIEWS["tmfi_net"], size=(14, 24))
VINET_A = replace(VIEWS["vinet_a"], size=(16, 28))
SIZE = (36, 64)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Three videos to train on and two to validate; one of 100 frames."""
    videos = {
        "annotation/0001": 100,
        "annotation/0002": 5,
        "annotation/0003": 33,
        "val/0601": 40,
        "val/0602": 3,
    }
    return write_dataset(tmp_path_factory.mktemp("dhf1k"), videos, fixations="mat", size=SIZE)


@pytest.fixture
def train(root):
    return open_dataset("dhf1k", root, "train")


@pytest.fixture
def val(root):
    return open_dataset("dhf1k", root, "val")


@pytest.fixture
def opened(monkeypatch):
    """Record the files decoded as frames and as maps."""
    found = {"frames": [], "maps": []}
    monkeypatch.setattr(
        frames, "read_frame", lambda path: found["frames"].append(path) or read_frame(path)
    )
    monkeypatch.setattr(data, "read_map", lambda path: found["maps"].append(path) or read_map(path))
    return found


def dataset(videos, views=(TMFI, VINET_A), **rest):
    return TrainClips(videos, views, seed=3, **rest)


def same(a, b):
    return (
        all(torch.equal(a.frames[size], b.frames[size]) for size in a.frames)
        and all(torch.equal(a.rows[view], b.rows[view]) for view in a.rows)
        and all(torch.equal(getattr(a, x), getattr(b, x)) for x in ("maps", "video", "target"))
    )


def epoch_of(loader, epoch=0, start=0):
    loader.set_epoch(epoch, start)
    return list(loader)


def all_same(a, b):
    return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))


def published(videos, target, view):
    """Read a clip as the published loaders do: PIL, Resize, ToTensor, Normalize."""
    video = videos.videos[0]
    change = transforms.Compose(
        [
            transforms.Resize(view.size),
            transforms.ToTensor(),
            transforms.Normalize(view.mean, view.std),
        ]
    )
    numbers = view.indices(target, len(video))
    files = [video.path(video.frames[number]) for number in numbers]
    return torch.stack([change(Image.open(file).convert("RGB")) for file in files])


@pytest.mark.parametrize("target", [0, 50, 99])
@pytest.mark.parametrize("view", [TMFI, VINET_A, replace(TMFI, size=(30, 100))])
def test_pixels_are_those_of_the_published_loaders(train, view, target):
    batch = collate([dataset(train, [view]).sample(0, target)])
    ours = batch.clips(view)[0].transpose(0, 1)
    theirs = published(train, target, view)
    std = torch.tensor(view.std).view(3, 1, 1)
    assert ours.shape == theirs.shape == (32, 3, *view.size)
    assert ((ours - theirs) * std).abs().max() <= 1 / 255 + 1e-6
    assert theirs.std() > 0.3


@pytest.mark.parametrize("size", [(224, 384), (256, 456), (360, 640), (400, 700)])
def test_resizing_equals_pils_at_real_sizes(size):
    image = picture(1, 2, (360, 640))
    theirs = np.asarray(Image.fromarray(image).resize(size[::-1], Image.BILINEAR))
    ours = resize_frame(image, size)
    assert ours.shape == (*size, 3) and ours.is_contiguous()
    assert np.abs(ours.numpy().astype(int) - theirs).max() <= 1


@pytest.mark.parametrize(
    ("target", "count"), [(50, 48), (99, 33), (0, 16), (15, 31)], ids=lambda x: str(x)
)
def test_each_frame_is_decoded_once_and_one_map(train, opened, target, count):
    dataset(train).sample(0, target)
    assert len(opened["frames"]) == len(set(opened["frames"])) == count
    assert [path[-13:] for path in opened["maps"]] == [f"maps/{target + 1:04d}.png"]


def test_folders_are_not_listed_again(train, val, monkeypatch):
    loaders = (
        TrainLoader(train, [TMFI], HERE, batch_size=2, workers=0, fixations=True),
        EvalLoader(val, [TMFI, VINET_A], HERE, batch_size=4, workers=0),
    )
    listed = []
    for name in ("listdir", "scandir", "walk"):
        monkeypatch.setattr(os, name, lambda *a, name=name, **k: listed.append((name, a)))
    assert [len(list(loader)) for loader in loaders] == [2, 11] and listed == []


def test_each_frame_is_resized_once_a_size(train, monkeypatch):
    made = []
    monkeypatch.setattr(
        frames, "resize_frame", lambda image, size: made.append(size) or resize_frame(image, size)
    )
    alike = replace(TMFI, mean=(0.5, 0.5, 0.5))
    sample = dataset(train, [TMFI, alike, TMFI, VINET_A]).sample(0, 50)
    assert made.count(TMFI.size) == 32 and made.count(VINET_A.size) == 32
    batch = collate([sample])
    assert {size: x.shape for size, x in batch.frames.items()} == {
        (14, 24): (32, 14, 24, 3),
        (16, 28): (32, 16, 28, 3),
    }
    assert batch.clips(TMFI) is batch.clips(TMFI)
    assert not torch.equal(batch.clips(TMFI), batch.clips(alike))


def test_a_clip_holds_the_frames_of_its_view(train):
    videos = train.videos
    batch = collate([dataset(train).sample(0, 50), dataset(train).sample(1, 4)])
    for view in (TMFI, VINET_A):
        clips = batch.clips(view)
        assert clips.shape == (2, 3, 32, *view.size) and clips.is_contiguous()
        for k, (video, target) in enumerate([(0, 50), (1, 4)]):
            its = videos[video]
            for t, number in enumerate(view.indices(target, len(its))):
                pixels = resize_frame(read_frame(its.path(its.frames[number])), view.size)
                expected = view.normalise(pixels.permute(2, 0, 1)[None, :, None])[0, :, 0]
                assert torch.equal(clips[k, :, t], expected)
    assert batch.video.tolist() == [0, 1] and batch.target.tolist() == [50, 4]


def test_frames_of_several_samples_are_kept_once(val):
    clips = dataset(val, [TMFI])
    batch = collate([clips.sample(0, target) for target in (35, 36, 37, 37)])
    assert len(batch.frames[TMFI.size]) == 34 and len(batch) == 4
    alone = collate([clips.sample(0, 36)])
    assert torch.equal(batch.clips(TMFI)[1], alone.clips(TMFI)[0])


def test_a_view_unknown_to_the_loader_is_refused(train):
    batch = collate([dataset(train, [TMFI]).sample(0, 0)])
    with pytest.raises(KeyError, match=r"no clips of 32 frames of 16x28.*was told of 32 frames"):
        batch.clips(VINET_A)
    with pytest.raises(DataError, match="no view was given"):
        dataset(train, [])


def test_clips_never_reach_into_another_shot(tmp_path):
    write_dataset(tmp_path, {"training/a_1": 4, "training/a_2": 4, "training/a_10": 4}, size=SIZE)
    videos = open_dataset("hollywood2", tmp_path, "train")
    assert [video.name for video in videos.videos] == ["a_1", "a_2", "a_10"]
    clips = dataset(videos)
    for number, seed in enumerate([0, 1, 2]):
        own = torch.stack([resize_frame(picture(seed, k, SIZE), TMFI.size) for k in range(4)])
        for target in range(4):
            sample = clips.sample(number, target)
            assert set(sample.numbers[VINET_A.size]) <= set(range(4))
            assert torch.equal(sample.frames[TMFI.size], own[sample.numbers[TMFI.size]])


def test_maps_by_type_and_size(tmp_path):
    image = np.random.default_rng(0).integers(0, 256, (9, 12), dtype=np.uint8)
    for name, stored, scale in (
        ("a", image, 255),
        ("b", image.astype(np.uint16) * 257, 65535),
        ("dark", image // 255, 255),
        ("colour", np.repeat(image[..., None], 3, axis=2), 255),
    ):
        path = tmp_path / f"{name}.png"
        write_image(path, stored)
        gray = stored if stored.ndim == 2 else image
        found = read_map(str(path))
        assert found.dtype == np.float32
        np.testing.assert_allclose(found, gray / scale, atol=1e-7)


def test_maps_come_at_the_largest_view_or_as_asked(train, val):
    batch = epoch_of(TrainLoader(train, [TMFI, VINET_A], HERE, batch_size=3, workers=0))[0]
    assert batch.maps.shape == (3, 16, 28) and batch.maps.dtype == torch.float32
    assert 0.5 < batch.maps.amax() <= 1
    loader = TrainLoader(train, [TMFI], HERE, batch_size=3, workers=0, map_size=(20, 30))
    assert epoch_of(loader)[0].maps.shape == (3, 20, 30)
    first = next(iter(EvalLoader(val, [TMFI], HERE, workers=0)))
    video = val.videos[0]
    assert torch.equal(first.maps[0], torch.from_numpy(read_map(video.path(video.maps[0]))))


@pytest.mark.parametrize("kind", ["mat", "png"])
def test_fixations_from_both_sorts_of_files(tmp_path, kind):
    folder = write_video(tmp_path / "0601", 2, fixations=kind, seed=7, size=SIZE)
    suffix = "maps/0002.mat" if kind == "mat" else "0002.png"
    (folder / "fixation" / suffix).unlink()
    batches = list(EvalLoader(open_dataset("dhf1k", tmp_path, "val"), [TMFI], HERE, workers=0))
    points = looks(7, 0, SIZE)
    assert points.sum() > 3
    assert torch.equal(batches[0].fixations[0], torch.from_numpy(points))
    assert batches[1].fixations.dtype == torch.bool and not batches[1].fixations.any()


@pytest.mark.parametrize("size", [(5, 7), (36, 64), (100, 90)])
def test_no_fixation_is_lost_by_scaling(size):
    points = np.random.default_rng(1).random(SIZE) < 0.3
    scaled = scale_fixations(points, size)
    assert scaled.shape == size and scaled.sum() == points.sum()
    if size == SIZE:
        assert (scaled == points).all()
    one = np.zeros((4, 4), bool)
    one[3, 0] = one[0, 3] = True
    assert scale_fixations(one, (2, 2)).tolist() == [[0, 1], [1, 0]]
    assert np.argwhere(scale_fixations(one, (8, 8))).tolist() == [[1, 7], [7, 1]]


def test_training_fixations_are_counted_at_the_maps_size(train):
    loader = TrainLoader(train, [TMFI], HERE, batch_size=3, workers=0, fixations=True)
    batch = epoch_of(loader)[0]
    assert batch.fixations.shape == batch.maps.shape and batch.fixations.dtype == torch.float32
    for k in range(3):
        video, target = int(batch.video[k]), int(batch.target[k])
        assert batch.fixations[k].sum() == looks(video, target, SIZE).sum()


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({"F": np.eye(3)}, "holds F; expected the variable I"),
        ({"I": np.zeros((2, 2, 2))}, r"shape \(2, 2, 2\); expected height, width"),
        (b"", "no MATLAB file"),
        (b"MATLAB 5.0 MAT-file, cut off" * 9, "no MATLAB file"),
        (None, "cannot be read: No such file"),
    ],
)
def test_broken_fixations_are_named(tmp_path, content, said):
    path = tmp_path / "0001.mat"
    if isinstance(content, dict):
        savemat(path, content)
    elif content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError, match=f"0001.mat: .*{said}"):
        read_fixations(str(path))


def test_cut_off_fixations_are_named(tmp_path):
    write_fixations(tmp_path, "a", np.random.default_rng(0).random((50, 50)) < 0.5, "mat")
    path = tmp_path / "fixation" / "maps" / "a.mat"
    for end in (100, 200, -20):
        path.write_bytes(path.read_bytes()[:end])
        with pytest.raises(DataError, match=r"a\.mat"):
            read_fixations(str(path))


def test_an_epoch_has_each_video_once_and_any_frame_can_be_its_target(train):
    loader = TrainLoader(train, [TMFI], HERE, batch_size=2, workers=0, seed=5)
    assert len(loader) == 2
    seen = {0: set(), 1: set(), 2: set()}
    for epoch in range(40):
        batches = epoch_of(loader, epoch)
        assert sorted(torch.cat([b.video for b in batches]).tolist()) == [0, 1, 2]
        for batch in batches:
            for video, target in zip(batch.video.tolist(), batch.target.tolist(), strict=True):
                seen[video].add(target)
    assert seen[1] == set(range(5)), "all frames of a short video"
    assert max(seen[2]) == 32, "the last frame of a video of 33"
    assert len(seen[0]) > 25 and max(seen[0]) > 90


def test_several_clips_a_video(train):
    loader = TrainLoader(train, [TMFI], HERE, batch_size=4, workers=0, clips_per_video=4)
    batches = epoch_of(loader)
    videos = torch.cat([b.video for b in batches])
    assert len(loader) == 3 and torch.bincount(videos).tolist() == [4, 4, 4]
    assert len(set(torch.cat([b.target for b in batches])[videos == 0].tolist())) > 1
    with pytest.raises(DataError, match="clips_per_video is 0"):
        TrainLoader(train, [TMFI], HERE, batch_size=4, clips_per_video=0)


def test_samples_do_not_depend_on_workers_or_on_the_process(train):
    def loader(workers):
        return TrainLoader(
            train, [TMFI, VINET_A], HERE, batch_size=2, workers=workers, fixations=True
        )

    here = epoch_of(loader(0), 1)
    torch.manual_seed(7)
    random.seed(7)
    np.random.seed(7)
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
    workers = loader(2)
    assert all_same(here, epoch_of(workers, 1))
    assert not all_same(here, epoch_of(workers, 2))
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1] == random.getstate() and (before[2] == np.random.get_state()[1]).all()


def test_an_epoch_resumes_in_its_middle(train):
    loader = TrainLoader(train, [TMFI], HERE, batch_size=2, workers=0, clips_per_video=3)
    whole = epoch_of(loader, 4)
    assert len(whole) == 5 and len(whole[-1]) == 1
    assert all_same(epoch_of(loader, 4, start=3), whole[3:])
    assert epoch_of(loader, 4, start=5) == [] and len(loader) == 5
    beside = TrainLoader(train, [TMFI], HERE, batch_size=2, workers=1, clips_per_video=3)
    beside.set_epoch(3)
    next(iter(beside))  # left in its middle
    assert all_same(epoch_of(beside, 4, start=2), whole[2:])


def test_ranks_share_an_epoch(train):
    targets = set()
    for rank in range(2):
        world = World(rank, 2, rank, CPU)
        loader = TrainLoader(train, [TMFI], world, batch_size=3, workers=0, clips_per_video=2)
        for batch in epoch_of(loader, 1):
            targets |= set(zip(batch.video.tolist(), batch.target.tolist(), strict=True))
    alone = TrainLoader(train, [TMFI], HERE, batch_size=3, workers=0, clips_per_video=2)
    both = [
        pair
        for batch in epoch_of(alone, 1)
        for pair in zip(batch.video.tolist(), batch.target.tolist(), strict=True)
    ]
    assert targets == set(both)


def test_empty_maps_are_never_targets(tmp_path):
    folder = write_video(tmp_path / "0001", 6, size=SIZE)
    for k in (1, 2, 3, 5, 6):
        write_image(folder / "maps" / f"000{k}.png", np.zeros(SIZE, np.uint8))
    videos = open_dataset("dhf1k", tmp_path, "train")
    loader = TrainLoader(videos, [TMFI], HERE, batch_size=2, workers=0, clips_per_video=4)
    assert {t for batch in epoch_of(loader) for t in batch.target.tolist()} == {3}
    write_image(folder / "maps" / "0004.png", np.zeros(SIZE, np.uint8))
    with pytest.raises(DataError, match="0001: every map of this video is empty"):
        epoch_of(loader)


@pytest.mark.parametrize(("stride", "batch"), [(1, 1), (1, 7), (32, 2), (4, 8)])
def test_validation_covers_every_video_to_its_end(val, stride, batch):
    loader = EvalLoader(val, [TMFI], HERE, batch_size=batch, stride=stride, workers=0)
    found = [pair for b in loader for pair in zip(b.video.tolist(), b.target.tolist(), strict=True)]
    expected = [(0, t) for t in range(0, 40, stride)] + [(1, t) for t in range(0, 3, stride)]
    assert found == expected
    assert all(len(set(b.video.tolist())) == 1 for b in loader)


@pytest.mark.parametrize("size", [1, 2, 3, 50])
def test_ranks_share_validation_without_duplicates(val, size):
    found = []
    for rank in range(size):
        loader = EvalLoader(val, [TMFI], World(rank, size, rank, CPU), batch_size=5, workers=0)
        assert len(loader) == len(list(loader.batches))
        found += [pair for batch in loader.batches for pair in batch]
    assert found == [(0, t) for t in range(40)] + [(1, t) for t in range(3)]


@pytest.mark.parametrize("size", [1, 3])
def test_chosen_frames_are_shared_by_ranks(val, size):
    found = []
    for rank in range(size):
        loader = EvalLoader(val, [TMFI], World(rank, size, rank, CPU), batch_size=2, workers=0)
        loader.choose(lambda total: [0, 3, total - 4, total - 3, total - 1])
        found += loader.batches
        assert [batch.targets for batch in loader] == loader.batches
    assert found == [[(0, 0), (0, 3)], [(0, 39)], [(1, 0), (1, 2)]]


def test_validation_is_equal_with_workers(val):
    here = list(EvalLoader(val, [TMFI, VINET_A], HERE, batch_size=6, workers=0))
    for workers in (1, 2):
        loader = EvalLoader(val, [TMFI, VINET_A], HERE, batch_size=6, workers=workers)
        found = list(loader)
        assert [batch.targets for batch in found] == loader.batches
        assert all_same(here, sorted(found, key=lambda batch: batch.targets))


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize("workers", [2, 4])
def test_workers_share_the_decoding_of_a_video(tmp_path, monkeypatch, workers):
    write_video(tmp_path / "val" / "0601", 90, size=SIZE)
    log = tmp_path / "log"

    def note(path):
        with log.open("a") as file:
            file.write(f"{os.getpid()} {path}\n")
        return read_frame(path)

    monkeypatch.setattr(frames, "read_frame", note)
    videos = open_dataset("dhf1k", tmp_path, "val")
    loader = EvalLoader(videos, [TMFI], HERE, batch_size=2, workers=workers)
    seen = sorted(target for batch in loader for target in batch.targets)
    assert seen == [(0, k) for k in range(90)]
    lines = log.read_text().splitlines()
    assert len({line.split()[0] for line in lines}) == workers
    # a worker also needs the frames, up to 31 of them, before its first target
    again = sum(min(31, batches[0][1]) for batches in loader.batches[:workers])
    assert len(lines) == len(set(lines)) == 90 + again


@pytest.mark.parametrize("workers", [1, 2, 3, 5])
@pytest.mark.parametrize("count", [0, 1, 4, 9, 10, 11])
def test_batches_are_dealt_so_that_each_worker_has_consecutive_ones(count, workers):
    order = data._in_turns(list(range(count)), workers)
    assert sorted(order) == list(range(count))
    shares = [order[k::workers] for k in range(workers)]
    assert [k for share in shares for k in share] == list(range(count))


@pytest.mark.parametrize("views", [[TMFI], [VINET_A], [TMFI, VINET_A]])
def test_consecutive_targets_decode_each_frame_of_a_video_once(val, opened, views):
    list(EvalLoader(val, views, HERE, batch_size=4, workers=0))
    assert len(opened["frames"]) == len(set(opened["frames"])) == 43


def test_validation_of_videos_of_different_sizes(tmp_path):
    write_video(tmp_path / "0601", 2, size=(36, 64))
    write_video(tmp_path / "0602", 2, size=(30, 40))
    videos = open_dataset("dhf1k", tmp_path, "val")
    shapes = [
        tuple(b.maps.shape) for b in EvalLoader(videos, [TMFI], HERE, batch_size=4, workers=0)
    ]
    assert shapes == [(2, 36, 64), (2, 30, 40)]


@pytest.mark.parametrize("workers", [0, 1])
def test_maps_of_several_sizes_in_a_video_come_in_parts(tmp_path, workers):
    folder = write_video(tmp_path / "0601", 5, size=SIZE)
    for k in (2, 3):
        write_image(folder / "maps" / f"000{k}.png", np.full((10, 20), k, np.uint8))
    videos = open_dataset("dhf1k", tmp_path, "val")
    loader = EvalLoader(videos, [TMFI], HERE, batch_size=4, workers=workers)
    batches = list(loader)
    assert [tuple(b.maps.shape) for b in batches] == [(2, 36, 64), (2, 10, 20), (1, 36, 64)]
    assert [b.targets for b in batches] == [[(0, 0), (0, 3)], [(0, 1), (0, 2)], [(0, 4)]]
    assert torch.equal(batches[1].maps[:, 0, 0] * 255, torch.tensor([2.0, 3.0]))
    for batch in batches:
        alone = [collate([loader.dataset[target]]).clips(TMFI) for target in batch.targets]
        assert torch.equal(batch.clips(TMFI), torch.cat(alone))
    with pytest.raises(DataError, match=r"sizes \[\(10, 20\), \(36, 64\)\] in one batch"):
        collate([loader.dataset[0, 0], loader.dataset[0, 1]])


@pytest.mark.parametrize("option", ["batch_size", "stride"])
def test_numbers_out_of_range_are_refused(val, option):
    with pytest.raises(DataError, match=f"{option} is 0; expected at least 1"):
        EvalLoader(val, [TMFI], HERE, **{option: 0})
    with pytest.raises(DataError, match="batch_size is 0; expected at least 1"):
        TrainLoader(val, [TMFI], HERE, batch_size=0)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_broken_file_is_named_wherever_it_is_read(tmp_path, workers):
    folder = write_video(tmp_path / "0001", 3, size=SIZE)
    videos = open_dataset("dhf1k", tmp_path, "train")
    (folder / "images" / "0001.png").write_bytes(b"no image")
    loader = TrainLoader(videos, [TMFI], HERE, batch_size=1, workers=workers)
    with pytest.raises(DataError, match=r"0001/images/0001\.png: no image that can be decoded"):
        epoch_of(loader)
    (folder / "images" / "0001.png").unlink()
    with pytest.raises(DataError, match=r"images/0001\.png: cannot be read: No such file"):
        epoch_of(loader)


@pytest.mark.parametrize("workers", [0, 1])
def test_an_error_of_a_worker_is_one_line(tmp_path, workers):
    write_dataset(tmp_path, {"annotation/0001": 3, "val/0601": 3}, size=SIZE)
    for path in tmp_path.glob("*/*/images/0002.png"):
        damaged = bytearray(path.read_bytes())
        middle = len(damaged) // 2
        damaged[middle : middle + 40] = bytes(40)
        path.write_bytes(damaged)
    rest = {"batch_size": 2, "workers": workers}
    train, val = (open_dataset("dhf1k", tmp_path, split) for split in ("train", "val"))
    loaders = TrainLoader(train, [TMFI], HERE, **rest), EvalLoader(val, [TMFI], HERE, **rest)
    for loader in loaders:
        with pytest.raises(DataError) as caught:
            list(loader)
        assert "; copy or extract it anew; mend or remove it, or allow" in str(caught.value)
        assert "\n" not in str(caught.value) and "images/0002.png: no image" in str(caught.value)


def test_a_listing_with_faults_is_refused(tmp_path):
    folder = write_video(tmp_path / "0001", 3, size=SIZE)
    (folder / "maps" / "0002.png").unlink()
    with pytest.raises(DataError, match=r"images/0002\.png: frame without a map"):
        TrainLoader(open_dataset("dhf1k", tmp_path, "train"), [TMFI], HERE, batch_size=1)


def test_batches_move_with_all_they_hold(train):
    batch = collate([dataset(train, fixations=True).sample(0, 9)])
    there = batch.to("meta")
    tensors = [*there.frames.values(), *there.rows.values()]
    tensors += [there.maps, there.fixations]
    assert len(tensors) == 6 and all(x.device.type == "meta" for x in tensors)
    assert there.targets == batch.targets == [(0, 9)], "what the host asks for stays there"


def test_packed_frames_are_the_same_pixels(train, tmp_path, opened):
    folder = tmp_path / "packed"
    clips = dataset(train)
    before = collate([clips.sample(0, 50), clips.sample(2, 32)])
    packing = pack_frames(train, [TMFI.size, VINET_A.size], folder, progress=False)
    opened["frames"].clear()
    quick = dataset(train, reader=FrameReader(packing))
    assert same(before, collate([quick.sample(0, 50), quick.sample(2, 32)]))
    assert opened["frames"] == [] and len(list(folder.iterdir())) == 6
    other = dataset(train, [TMFI, replace(TMFI, size=(8, 8))], reader=FrameReader(packing))
    other.sample(0, 50)
    assert len(opened["frames"]) == 32, "a size that is not packed is decoded"


def test_packed_frames_are_made_anew_where_files_changed(tmp_path, monkeypatch):
    folder = write_video(tmp_path / "videos" / "0001", 3, size=SIZE)
    write_video(tmp_path / "videos" / "0002", 2, size=SIZE)
    read = []
    monkeypatch.setattr(packed, "read_frame", lambda path: read.append(path) or read_frame(path))

    def pack():
        read.clear()
        videos = open_dataset("dhf1k", tmp_path / "videos", "train")
        packing = pack_frames(videos, [TMFI.size], tmp_path / "packed", progress=False)
        return packing.read(videos.videos[0], TMFI.size, np.arange(len(videos.videos[0])))

    first = pack()
    assert len(read) == 5 and torch.equal(first, pack()) and not read
    write_image(folder / "images" / "0002.png", picture(9, 9, SIZE)[..., ::-1])
    second = pack()
    assert len(read) == 3 and [torch.equal(a, b) for a, b in zip(first, second, strict=True)] == [
        True,
        False,
        True,
    ]
    (folder / "images" / "0003.png").unlink()
    (folder / "maps" / "0003.png").unlink()
    assert len(pack()) == 2
    assert len(list((tmp_path / "packed").iterdir())) == 2, "what is stale is removed"


def test_packing_leaves_no_part_of_a_file(tmp_path, monkeypatch):
    folder = write_video(tmp_path / "videos" / "0001", 3, size=SIZE)
    (folder / "images" / "0003.png").write_bytes(b"no image")
    videos = open_dataset("dhf1k", tmp_path / "videos", "train")
    with pytest.raises(DataError, match=r"0003\.png"):
        pack_frames(videos, [TMFI.size], tmp_path / "packed", progress=False)
    assert list((tmp_path / "packed").iterdir()) == []
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(packed.shutil, "disk_usage", lambda path: usage._replace(free=10))
    with pytest.raises(DataError, match=r"packing needs 0\.0 GB, 0\.0 GB are free"):
        pack_frames(videos, [TMFI.size], tmp_path / "packed", progress=False)


def _pack_on_a_rank(world, root, folder):
    note = []
    packed.read_frame = lambda path: note.append(path) or read_frame(path)
    sets = [open_dataset("dhf1k", root, split) for split in ("train", "val")]
    try:
        packing = pack_frames(sets, [TMFI.size, VINET_A.size], folder, False, world)
        found = [packing.read(v, TMFI.size, np.array([0])) for s in sets for v in s.videos]
        (root / f"read{world.rank}").write_text("\n".join(note))
        torch.save(torch.cat(found), root / f"pixels{world.rank}")
    except DataError as error:
        (root / f"error{world.rank}").write_text(str(error))


def test_ranks_share_the_packing(tmp_path):
    videos = {"annotation/0001": 4, "annotation/0002": 3, "val/0601": 2, "val/0602": 5}
    root = write_dataset(tmp_path / "videos", videos, size=SIZE)
    launch(_pack_on_a_rank, 2, root, tmp_path / "packed")
    read = [(root / f"read{rank}").read_text().splitlines() for rank in range(2)]
    assert [{path.split("/")[-3] for path in part} for part in read] == [
        {"0001", "0601"},
        {"0002", "0602"},
    ]
    assert sum(map(len, read)) == len({*read[0], *read[1]}) == 14
    pixels = [torch.load(root / f"pixels{rank}") for rank in range(2)]
    alone = pack_frames(open_dataset("dhf1k", root, "val"), [TMFI.size], tmp_path / "b", False)
    first = alone.read(open_dataset("dhf1k", root, "val").videos[0], TMFI.size, np.array([0]))
    assert torch.equal(*pixels) and torch.equal(pixels[0][2:3], first)
    assert len(list((tmp_path / "packed").iterdir())) == 8


def test_what_one_rank_cannot_pack_ends_all(tmp_path):
    root = write_dataset(tmp_path / "videos", {"annotation/0001": 2, "val/0601": 2}, size=SIZE)
    (root / "val" / "0601" / "images" / "0002.png").write_bytes(b"no image")
    launch(_pack_on_a_rank, 2, root, tmp_path / "packed")
    told = {(root / f"error{rank}").read_text() for rank in range(2)}
    assert len(told) == 1 and "0601/images/0002.png: no image" in told.pop()


def test_ranks_are_patient(monkeypatch):
    given = []
    for name, value in {"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(
        torch.distributed, "init_process_group", lambda *a, **k: given.append(k["timeout"])
    )
    start("cpu")
    start("cpu", timeout=timedelta(seconds=5))
    assert given == [PATIENCE, timedelta(seconds=5)] and timedelta(hours=6) < PATIENCE


def test_a_packed_file_that_is_gone_is_named(train, tmp_path):
    packing = pack_frames(train, [TMFI.size], tmp_path, progress=False)
    for file in tmp_path.iterdir():
        file.unlink()
    with pytest.raises(DataError, match=r"dhf1k-0001-.*npy: cannot be read"):
        dataset(train, [TMFI], reader=FrameReader(packing)).sample(0, 3)
