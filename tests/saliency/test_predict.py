from fractions import Fraction

import numpy as np
import pytest
import torch

pytest.importorskip("av", reason="PyAV is not installed: pip install av")

import av

from saliency.clips import IMAGENET_MEAN, IMAGENET_STD, ClipView
from saliency.images import read_frame, read_map
from saliency.predict import Predictor, Source, main, open_sources, windows
from tests.saliency.folders import picture, write_dataset
from tests.saliency.toy import Deep, Flat

TOY = "tests.saliency.toy"


def view(frames, stride, before, size=(4, 6)):
    return ClipView(size, IMAGENET_MEAN, IMAGENET_STD, frames, stride, before)


def numbered(count):
    """Frames that show their own number."""
    return [np.full((4, 6, 3), k, np.uint8) for k in range(count)]


@pytest.fixture(scope="module")
def video(tmp_path_factory):
    path = tmp_path_factory.mktemp("video") / "clip.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 36, "yuv420p"
        for k in range(12):
            frame = np.ascontiguousarray(picture(0, k, (36, 64)))
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    return path


@pytest.mark.parametrize("count", [1, 2, 5, 30])
def test_windows_hold_the_frames_that_training_would_give(count):
    views = [view(6, 1, 5), view(5, 3, 6), view(1, 1, 0), view(4, 2, 0), view(3, 1, 9)]
    seen = list(windows(iter(numbered(count)), views))
    assert [int(frame[0, 0, 0]) for frame, _ in seen] == list(range(count))
    for target, (_, clips) in enumerate(seen):
        for its in views:
            expected = its.indices(target, count).tolist()
            assert clips[its][:, 0, 0, 0].tolist() == expected


def test_frames_are_read_no_further_ahead_than_a_clip_reaches():
    read = []

    def frames():
        for frame in numbered(50):
            read.append(frame)
            yield frame

    ahead = [len(read) - target for target, _ in enumerate(windows(frames(), [view(8, 2, 8)]))]
    assert max(ahead) == 1 + 6  # the target itself, and the clip's last frame, 6 after it


def test_maps_do_not_depend_on_the_batch_and_several_models_are_averaged():
    torch.manual_seed(0)
    deep, flat = Deep().eval(), Flat().eval()
    frames = [picture(0, k, (36, 64)) for k in range(7)]
    cpu = torch.device("cpu")
    found = {}
    for name, modules in (("deep", [deep]), ("flat", [flat]), ("both", [deep, flat])):
        predictor = Predictor(modules, [m.view for m in modules], cpu)
        runs = [[m for _, m in predictor.run(frames, batch)] for batch in (1, 3)]
        for one, other in zip(*runs, strict=True):
            np.testing.assert_allclose(one, other, atol=1e-5)
        found[name] = runs[0]
    for one, other, mean in zip(found["deep"], found["flat"], found["both"], strict=True):
        np.testing.assert_allclose(mean, one / one.sum() + other / other.sum(), rtol=1e-4)


def test_a_video_file_gets_an_overlay(video, tmp_path):
    asked = [str(video), "--peer", f"{TOY}:Deep", "--output", str(tmp_path), "--device", "cpu"]
    assert main([*asked, "-b", "5"]) == 0
    with av.open(str(tmp_path / "clip.mp4")) as container:
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
        assert container.streams.video[0].average_rate == Fraction(10)
    assert len(frames) == 12 and frames[0].shape == (36, 64, 3)
    assert main([*asked, "--maps"]) == 0
    assert len(list((tmp_path / "clip").glob("*.png"))) == 12


def test_folders_of_frames_get_maps_in_the_layout_of_submissions(tmp_path):
    root = write_dataset(tmp_path / "d", {"val/0701": 3, "val/0702": 4})
    asked = ["--peer", f"{TOY}:Flat", "--output", str(tmp_path / "out"), "--device", "cpu"]
    assert main([str(root / "val"), *asked]) == 0
    assert [p.name for p in sorted((tmp_path / "out/0702").iterdir())] == [
        f"{k:04d}.png" for k in range(1, 5)
    ]
    map_ = read_map(str(tmp_path / "out/0701/0001.png"))
    assert map_.shape == (36, 64) and map_.min() == 0 and map_.max() == 1
    (source,) = open_sources(root / "val/0701")
    assert source.count == 3 and source.frame_name(2) == "0003"
    assert np.array_equal(next(source.read()), read_frame(str(source.files[0])))


def test_inputs_and_other_targets_are_never_written_over(video, tmp_path, caplog):
    root = write_dataset(tmp_path / "d", {"v1": 2, "sub/v1": 2})
    before = video.read_bytes()
    peer = ["--peer", f"{TOY}:Flat", "--device", "cpu", "--output"]
    assert main([str(video), *peer, str(video.parent)]) == 1
    assert "over the input" in caplog.text and video.read_bytes() == before
    assert main([str(root / "v1"), *peer, str(root)]) == 1
    assert len(list((root / "v1").rglob("*.png"))) == 4
    caplog.clear()
    assert main([str(root / "v1"), str(root / "sub/v1"), *peer, str(tmp_path / "out")]) == 1
    assert "would both be written" in caplog.text


def test_names_of_frames_of_a_video_file(video):
    source = Source(video, "clip", rate=Fraction(10))
    assert source.frame_name(0) == "0001"


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (["/nowhere.mp4"], "no such file"),
        ([__file__], "cannot be read as a video"),
        (["FOLDER"], "holds no frames"),
        (["VIDEO", "--strength", "2"], "--strength is 2.0"),
        (["VIDEO", "--blur", "2"], "--blur is 2"),
        (["VIDEO", "--peer", "vinet_b"], "vinet_b"),
    ],
)
def test_bad_input_ends_in_one_line(video, tmp_path, caplog, given, says):
    names = {"VIDEO": str(video), "FOLDER": str(tmp_path)}
    asked = [names.get(word, word) for word in given]
    assert main([*asked, "--peer", f"{TOY}:Flat", "--output", str(tmp_path / "out")]) == 1
    assert says in caplog.text
