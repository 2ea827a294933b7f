"""Which videos a split has, which file belongs where, and the listing of all faults."""

import logging

import numpy as np
import pytest

from saliency import check
from saliency.check import check_data, list_faults
from saliency.errors import DataError
from saliency.images import read_map
from saliency.layouts import natural_key, open_dataset
from tests.saliency.folders import write_dataset, write_image, write_video

SMALL = {"size": (12, 16)}


@pytest.fixture
def dhf1k(tmp_path):
    """Three videos to train on and one to validate."""
    videos = {"annotation/0001": 3, "annotation/0002": 2, "annotation/0010": 2, "val/0601": 2}
    return write_dataset(tmp_path / "dhf1k", videos, fixations="mat", **SMALL)


def faults(dataset, tmp_path, depth="full"):
    listing = list_faults(dataset, depth=depth, cache=tmp_path / "cache", workers=1, progress=False)
    return listing, [str(fault).removeprefix(dataset.root + "/") for fault in listing.faults]


def names(videos):
    return [video.name for video in videos.videos]


def test_names_are_ordered_as_people_do():
    given = ["clip_10", "clip_2", "clip_1", "clip", "12", "3"]
    assert sorted(given, key=natural_key) == ["3", "12", "clip", "clip_1", "clip_2", "clip_10"]


def test_dhf1k_by_folders(dhf1k):
    assert names(open_dataset("dhf1k", dhf1k, "train")) == ["0001", "0002", "0010"]
    val = open_dataset("dhf1k", dhf1k, "val")
    assert names(val) == ["0601"] and not val.faults
    video = val.videos[0]
    assert video.frames == ("images/0001.png", "images/0002.png")
    assert video.maps == ("maps/0001.png", "maps/0002.png")
    assert video.fixations == ("fixation/maps/0001.mat", "fixation/maps/0002.mat")
    assert len(video) == 2 and video.path(video.frames[1]).endswith("0601/images/0002.png")


@pytest.mark.parametrize("inside", ["", "annotation/", "train/"])
def test_dhf1k_by_official_numbers(tmp_path, inside):
    numbers = ("0001", "0600", "0601", "0700", "0701")
    write_dataset(tmp_path, {f"{inside}{number}": 1 for number in numbers}, **SMALL)
    train, val = (open_dataset("dhf1k", tmp_path, split) for split in ("train", "val"))
    assert names(train) == ["0001", "0600"] and names(val) == ["0601", "0700"]
    assert [fault.fatal for fault in train.faults] == [False]
    assert "holds 2 of the 600 videos of the official split 'train'" in str(train.faults[0])


def test_a_split_made_by_hand_goes_before_the_official_folder(tmp_path):
    videos = ("annotation/0001", "annotation/0601", "train/0002", "val/0601")
    write_dataset(tmp_path, {video: 1 for video in videos}, **SMALL)
    for split, name in (("train", "0002"), ("val", "0601")):
        found = open_dataset("dhf1k", tmp_path, split)
        assert names(found) == [name] and not found.faults


def test_videos_beside_the_folder_of_a_split(tmp_path):
    write_dataset(tmp_path, {name: 1 for name in ("0001", "0002", "val/0601")}, **SMALL)
    (tmp_path / "test").mkdir()
    train, val = (open_dataset("dhf1k", tmp_path, split) for split in ("train", "val"))
    assert names(train) == ["0001", "0002"] and names(val) == ["0601"]
    assert not [fault for fault in train.faults + val.faults if fault.fatal]
    write_video(tmp_path / "val" / "0002", 1, **SMALL)
    for split in ("train", "val"):
        fatal = [fault for fault in open_dataset("dhf1k", tmp_path, split).faults if fault.fatal]
        assert len(fatal) == 1 and "0002: this video is in both splits" in str(fatal[0])


def test_a_relative_path_is_as_good(dhf1k, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = open_dataset("dhf1k", "dhf1k", "val")
    monkeypatch.chdir("/")
    assert found == open_dataset("dhf1k", dhf1k, "val")
    video = found.videos[0]
    assert read_map(video.path(video.maps[0])).shape == (12, 16)


def test_a_video_of_unknown_split_is_a_fault(tmp_path):
    write_dataset(tmp_path, {"0001": 1, "mine": 1}, **SMALL)
    found = open_dataset("dhf1k", tmp_path, "train").faults
    assert any(fault.fatal and "mine: no number of DHF1K" in str(fault) for fault in found)


def test_a_video_in_both_splits_is_a_fault(dhf1k):
    write_video(dhf1k / "annotation" / "0601", 1, **SMALL)
    for split in ("train", "val"):
        fatal = [fault for fault in open_dataset("dhf1k", dhf1k, split).faults if fault.fatal]
        assert len(fatal) == 1 and "0601: this video is in both splits" in str(fatal[0])


@pytest.mark.parametrize("name", ["hollywood2", "ucf_sports"])
def test_shots_are_videos_of_their_own_in_natural_order(tmp_path, name):
    shots = {f"training/clip00001_{k}": ["b10", "b9", "a1"] for k in (1, 10, 2)}
    write_dataset(tmp_path, {**shots, "testing/clip00002_1": 1}, fixations="mat", **SMALL)
    train = open_dataset(name, tmp_path, "train")
    assert names(train) == ["clip00001_1", "clip00001_2", "clip00001_10"]
    assert train.videos[0].frames == ("images/a1.png", "images/b9.png", "images/b10.png")
    assert train.videos[0].maps == ("maps/a1.png", "maps/b9.png", "maps/b10.png")
    assert train.videos[0].fixations[2] == "fixation/maps/b10.mat"
    assert names(open_dataset(name, tmp_path, "val")) == ["clip00002_1"]


def test_fixations_as_images_and_none(tmp_path):
    write_dataset(tmp_path, {"0001": 2}, fixations="png", **SMALL)
    write_dataset(tmp_path, {"0002": 1}, **SMALL)
    first, second = open_dataset("dhf1k", tmp_path, "train").videos
    assert first.fixations == ("fixation/0001.png", "fixation/0002.png")
    assert second.fixations == (None,)


def test_maps_of_other_names_are_paired_in_order(tmp_path):
    folder = write_video(tmp_path / "training" / "a_1", ["9", "10"], **SMALL)
    for old, new in (("9", "m1"), ("10", "m2")):
        (folder / "maps" / f"{old}.png").rename(folder / "maps" / f"{new}.png")
    videos = open_dataset("hollywood2", tmp_path, "train")
    assert videos.videos[0].frames == ("images/9.png", "images/10.png")
    assert videos.videos[0].maps == ("maps/m1.png", "maps/m2.png") and not videos.faults


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (("dhf2k", ".", "train"), "choose from dhf1k, hollywood2, ucf_sports"),
        (("dhf1k", ".", "test"), "'test' is no split; choose from train, val"),
        (("dhf1k", "gone", "train"), "gone: no such folder"),
        (("dhf1k", ".", "train"), "no videos of split 'train'; expected annotation/0001"),
        (("hollywood2", ".", "val"), "testing: no such folder; expected training/SHOT"),
    ],
)
def test_wrong_names_and_places_are_refused(tmp_path, given, said):
    name, root, split = given
    with pytest.raises(DataError, match=said):
        open_dataset(name, tmp_path / root, split)


def test_sound_data_pass(dhf1k, tmp_path):
    for split in ("train", "val"):
        assert faults(open_dataset("dhf1k", dhf1k, split), tmp_path)[1] == []


def test_every_sort_of_fault_is_in_one_listing(dhf1k, tmp_path, caplog):
    a, b, c = (dhf1k / "annotation" / name for name in ("0001", "0002", "0010"))
    (a / "images" / "0002.png").unlink()
    (dhf1k / "annotation" / ".DS_Store").touch()
    (a / "images" / "Thumbs.db").touch()
    (a / "maps" / "._0001.png").touch()
    write_image(a / "maps" / "0001.png", np.zeros((12, 16), np.uint8))
    (b / "maps" / "0001.png").unlink()
    whole = (b / "images" / "0002.png").read_bytes()
    (b / "images" / "0002.png").write_bytes(whole[:-20])
    for k in (1, 2):
        write_image(c / "maps" / f"000{k}.png", np.zeros((12, 16), np.uint8))
    write_video(dhf1k / "annotation" / "0011", 0, **SMALL)
    (dhf1k / "annotation" / "0012").mkdir()
    (a / "fixation" / "maps" / "0003.mat").unlink()
    (b / "images" / "0002.jpg").write_bytes(b"no image")
    listing, told = faults(open_dataset("dhf1k", dhf1k, "train"), tmp_path)
    fatal = [
        "annotation/0001: 2 frames, but 3 maps",
        "annotation/0001/images/0002.png: frame missing in the numbering",
        "annotation/0001/maps/0002.png: map without a frame",
        "annotation/0002: 3 frames, but 1 maps",
        "annotation/0002/images/0001.png: frame without a map",
        "annotation/0002/images/0002.png: another file differs from it only in its suffix",
        "annotation/0002/images/0002.jpg: no image that can be decoded (8 bytes); copy or extract",
        "annotation/0002/images/0002.png: no image that can be decoded",
        "annotation/0010/maps: every map is empty (all zero)",
        "annotation/0011/images: no images in this folder",
        "annotation/0011/maps: no images in this folder",
        "annotation/0012/images: this folder is missing",
        "annotation/0012/maps: this folder is missing",
    ]
    mild = [
        "annotation/.DS_Store: not of the data set; ignored",
        "annotation/0001/images/Thumbs.db: not of the data set; ignored",
        "annotation/0001/maps/._0001.png: not of the data set; ignored",
        "annotation/0001/maps/0001.png: empty map (all zero), never a target",
        "annotation/0001/images/0003.png: frame without fixations",
    ]
    for expected in fatal + mild:
        assert [line.startswith(expected) for line in told].count(True) == 1, (expected, told)
    assert len(listing.fatal) == len(fatal) and len(listing.warnings) == len(mild)
    with caplog.at_level(logging.WARNING), pytest.raises(DataError, match="13 faults in the data"):
        check_data(
            open_dataset("dhf1k", dhf1k, "train"),
            depth="full",
            cache=tmp_path / "cache",
            progress=False,
        )
    assert "5 warnings about the data" in caplog.text and "Thumbs.db" in caplog.text


def test_maps_and_fixations_of_other_sizes_are_told(dhf1k, tmp_path):
    video = dhf1k / "val" / "0601"
    write_image(video / "maps" / "0001.png", np.full((10, 16), 9, np.uint8))
    listing, told = faults(open_dataset("dhf1k", dhf1k, "val"), tmp_path)
    assert told == [
        "val/0601/maps/0001.png: map of another size than its frame",
        "val/0601/fixation/maps/0001.mat: fixations of another size than their map",
    ]
    assert not listing.fatal


def test_headers_find_what_was_cut_off_and_empty_maps(dhf1k, tmp_path):
    video = dhf1k / "val" / "0601"
    whole = (video / "images" / "0001.png").read_bytes()
    (video / "images" / "0001.png").write_bytes(whole[:-20])
    write_image(video / "maps" / "0002.png", np.zeros((12, 16), np.uint8))
    (video / "maps" / "0001.png").write_bytes(b"")
    told = faults(open_dataset("dhf1k", dhf1k, "val"), tmp_path, "headers")[1]
    assert told == [
        "val/0601/images/0001.png: the file ends early; copy or extract it anew",
        "val/0601/maps/0001.png: no image that can be decoded (0 bytes); copy or extract it anew",
        "val/0601/maps/0002.png: empty map (all zero), never a target",
    ]


def test_a_long_listing_is_cut_and_counted(tmp_path):
    for k in range(1, 31):
        (tmp_path / f"{k:04d}" / "images").mkdir(parents=True)
    videos = open_dataset("dhf1k", tmp_path, "train")
    with pytest.raises(DataError) as caught:
        check_data(videos, cache=tmp_path / "cache", progress=False)
    lines = str(caught.value).splitlines()
    assert lines[0] == "60 faults in the data" and len(lines) == 22
    assert lines[-1] == "  ... and 40 more"


def test_many_files_of_one_fault_are_counted(tmp_path):
    folder = write_video(tmp_path / "0001", 9, **SMALL)
    for k in range(2, 8):
        (folder / "images" / f"{k:04d}.png").unlink()
    told = faults(open_dataset("dhf1k", tmp_path, "train"), tmp_path)[1]
    missing = [line for line in told if "missing in the numbering" in line]
    assert len(missing) == 4
    assert missing[-1] == "0001/images: frame missing in the numbering: 3 more"


def test_the_result_is_kept_until_a_file_changes(dhf1k, tmp_path, monkeypatch):
    looked = []
    look = check._look_at
    monkeypatch.setattr(
        check, "_look_at", lambda video, full: looked.append(1) or look(video, full)
    )
    train = open_dataset("dhf1k", dhf1k, "train")
    file = dhf1k / "annotation" / "0002" / "maps" / "0001.png"
    write_image(file, np.zeros((12, 16), np.uint8))
    first = faults(train, tmp_path, "headers")
    assert len(looked) == 3 and "empty map" in first[1][0]
    assert faults(train, tmp_path, "headers") == first and len(looked) == 3
    faults(train, tmp_path, "full")
    assert len(looked) == 6
    faults(train, tmp_path, "headers")
    assert len(looked) == 6, "what was looked at closely needs no second, quicker look"
    write_image(file, np.full((12, 16), 9, np.uint8))
    assert faults(train, tmp_path, "headers")[1] == [] and len(looked) == 9


def test_a_broken_or_unwritable_cache_does_no_harm(dhf1k, tmp_path, caplog):
    val = open_dataset("dhf1k", dhf1k, "val")
    (tmp_path / "cache").mkdir()
    assert faults(val, tmp_path)[1] == []
    (kept,) = (tmp_path / "cache").iterdir()
    kept.write_text("{")
    assert faults(val, tmp_path)[1] == []
    (tmp_path / "file").touch()
    with caplog.at_level(logging.WARNING):
        found = list_faults(val, cache=tmp_path / "file" / "x", workers=1, progress=False)
    assert not found.faults and "cannot keep the result" in caplog.text


def test_a_wrong_depth_is_refused(dhf1k):
    with pytest.raises(DataError, match="depth is 'deep'; choose from listing, headers, full"):
        check_data(open_dataset("dhf1k", dhf1k, "val"), depth="deep")
