import numpy as np
import pytest

pytest.importorskip("mlxtend", reason='mlxtend is not installed: pip install -e ".[demo]"')
pytest.importorskip("sklearn", reason='scikit-learn is not installed: pip install -e ".[demo]"')

from common.peers import PeerGroup
from saliency import scenes
from saliency.check import check_data
from saliency.layouts import open_dataset
from saliency.pictures import overlay, teaching_pictures, to_bytes
from saliency.standins import around, pair, recent
from tests.common.toy import HERE
from tests.saliency.test_peer import peer_of


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    root = tmp_path_factory.mktemp("scenes")
    scenes.write_videos(root / "annotation", 2, 1)
    scenes.write_videos(root / "val", 2, 1, held_out=True, first=601)
    splits = [open_dataset("dhf1k", root, split) for split in ("train", "val")]
    check_data(splits, depth="full", cache=root / "cache", progress=False)
    return splits[1]


def test_videos_are_in_the_layout_and_sound(videos):
    assert [video.name for video in videos.videos] == ["0601", "0602"]
    assert all(len(video) == scenes.FRAMES and video.fixations[0] for video in videos.videos)


def test_the_same_seed_gives_the_same_video_and_another_one_another():
    one, two = (scenes.compose(np.random.default_rng(0)) for _ in range(2))
    assert all(np.array_equal(a, b) for a, b in zip(one, two, strict=True))
    assert not np.array_equal(one[0], scenes.compose(np.random.default_rng(1))[0])


@pytest.mark.parametrize("motion", scenes.MOTIONS)
def test_where_people_look_is_where_something_moves(motion):
    frames, maps, fixations = scenes.compose(np.random.default_rng(5), [motion])
    assert maps.max(axis=(1, 2)).tolist() == [255] * scenes.FRAMES
    changed = np.abs(np.diff(frames.astype(float).mean(axis=-1), axis=0)).mean(axis=0)
    seen = maps.astype(float).mean(axis=0)
    assert changed[seen > 60].mean() > 2 * changed[seen < 5].mean()
    assert (fixations.sum(axis=(1, 2)) == 12).all() and maps[fixations].mean() > maps.mean()


def test_unknown_motions_are_refused():
    with pytest.raises(ValueError, match="motion is 'fly'; choose from slide"):
        scenes.compose(np.random.default_rng(0), ["fly"])


def test_a_split_is_written_once_and_again_when_it_shall_differ(tmp_path):
    folder = scenes.write_videos(tmp_path / "a", 1, 0)
    before = (folder / "0001/images/0001.png").stat().st_mtime_ns
    scenes.write_videos(folder, 1, 0)
    assert (folder / "0001/images/0001.png").stat().st_mtime_ns == before
    scenes.write_videos(folder, 2, 0)
    assert (folder / "0002").is_dir()
    assert scenes.contact_sheet(folder, videos=2, count=4).size == (4 * 64, 4 * 48)


def test_pictures_show_frames_truth_and_every_peer(videos):
    peers = [peer_of(build(), name) for name, build in (("a", recent), ("b", around), ("c", pair))]
    peers[0].module.train()
    png, caption = teaching_pictures(PeerGroup(peers), videos, HERE, count=2)
    assert png.startswith(b"\x89PNG") and "teach the others" in caption
    assert peers[0].module.training


def test_overlays_and_bytes():
    frame = np.full((4, 6, 3), 100, np.uint8)
    heat = np.zeros((2, 3))
    assert np.array_equal(overlay(frame, heat), frame)
    heat[0, 0] = 5.0
    shown = overlay(frame, heat)
    assert not np.array_equal(shown[0, 0], frame[0, 0]) and np.array_equal(shown[3, 5], frame[3, 5])
    assert to_bytes(np.array([[0.25, 0.75], [0.5, 0.25]])).tolist() == [[0, 255], [128, 0]]
    assert to_bytes(np.ones((2, 2))).tolist() == [[0, 0], [0, 0]]
