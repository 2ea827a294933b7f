import itertools
import random

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("detectron2", reason="Detectron2 is not installed: make setup-segmentation")

from segmentation.config import base_config
from segmentation.data import (
    SharedMapper,
    Stream,
    TestMapper,
    build_train_loader,
    class_masks,
    load_datasets,
    peer_view,
)
from segmentation.errors import DataError
from segmentation.prepare_ade20k import main as prepare


def make_cfg(*options):
    cfg = base_config()
    cfg.merge_from_list(
        [
            *("INPUT.MIN_SIZE_TRAIN", (16,), "INPUT.MAX_SIZE_TRAIN", 64),
            *("INPUT.CROP.ENABLED", True, "INPUT.CROP.TYPE", "absolute"),
            *("INPUT.CROP.SIZE", [8, 8], "MODEL.SEM_SEG_HEAD.NUM_CLASSES", 200),
            *options,
        ]
    )
    return cfg


@pytest.fixture
def records(tmp_path):
    """Images whose red channel is the label, so that geometry can be seen; the rest is ignored."""
    found = []
    for i in range(5):
        labels = np.arange(16 * 16, dtype=np.uint8).reshape(16, 16) % 100 + i
        image = np.stack([labels, np.full_like(labels, 7), np.full_like(labels, 9)], axis=-1)
        labels = np.where(labels % 7 == 0, 255, labels).astype(np.uint8)
        paths = {}
        for kind, array in (("file_name", image), ("sem_seg_file_name", labels)):
            paths[kind] = str(tmp_path / f"{kind}{i}.png")
            Image.fromarray(array).save(paths[kind])
        found.append(paths)
    return found


def draws(records, **settings):
    settings = {"batch": 2, "workers": 0, "seed": 3, **settings}
    return iter(build_train_loader(records, SharedMapper(make_cfg(), False), **settings))


def taken(stream, count):
    return [sample for batch in itertools.islice(stream, count) for sample in batch]


def same(one, other):
    return len(one) == len(other) and all(
        torch.equal(a["image"], b["image"]) and torch.equal(a["sem_seg"], b["sem_seg"])
        for a, b in zip(one, other, strict=True)
    )


def test_image_and_labels_have_one_geometry_and_what_is_ignored_stays_so(records):
    mapper = SharedMapper(make_cfg(), True)
    for _ in range(20):
        sample = mapper(records[0])
        red, labels = sample["image"][0].long(), sample["sem_seg"]
        assert sample["image"].shape == (3, 8, 8) and sample["image"].dtype == torch.uint8
        assert torch.equal(labels, torch.where(red % 7 == 0, 255, red))
        assert (sample["height"], sample["width"]) == (16, 16)
        masks = sample["instances"]
        assert 255 not in masks.gt_classes
        assert torch.equal(masks.gt_masks.sum(0), (labels != 255).long())
        for label, mask in zip(masks.gt_classes, masks.gt_masks, strict=True):
            assert torch.equal(mask, labels == label)


def test_colours_alone_change_under_colour_augmentation(records):
    mapper = SharedMapper(make_cfg("INPUT.COLOR_AUG_SSD", True, "INPUT.CROP.ENABLED", False), False)
    np.random.seed(0)
    random.seed(0)
    samples = [mapper(records[0]) for _ in range(8)]
    assert len({tuple(s["image"].flatten().tolist()) for s in samples}) > 4
    flips = {tuple(s["sem_seg"].flatten().tolist()) for s in samples}
    assert len(flips) == 2


def test_a_crop_without_labels_is_drawn_again(records, tmp_path):
    labels = np.full((16, 16), 255, dtype=np.uint8)
    labels[3, 3] = 1
    path = str(tmp_path / "sparse.png")
    Image.fromarray(labels).save(path)
    mapper = SharedMapper(make_cfg(), False)
    np.random.seed(0)
    found = [
        (mapper(records[0] | {"sem_seg_file_name": path})["sem_seg"] == 1).any() for _ in range(20)
    ]
    assert sum(map(bool, found)) >= 17  # 4 of 9 x 9 crops in 10 draws; by chance 1 in 4 has it


def test_the_stream_does_not_depend_on_ranks_workers_or_interruptions(records):
    whole = taken(draws(records), 6)
    assert same(whole, taken(draws(records, workers=2), 6))
    assert same(whole[4:], taken(draws(records, start=4), 4))
    ranks = [taken(draws(records, batch=1, rank=rank, ranks=2), 6) for rank in range(2)]
    assert same(whole, [ranks[i % 2][i // 2] for i in range(12)])
    assert not same(whole, taken(draws(records, seed=4), 6))
    names = [sample["file_name"] for sample in whole]
    assert len(set(names[:5])) == len(set(names[5:10])) == 5 and names[:5] != names[5:10]


def test_the_stream_leaves_the_process_own_generators_alone(records):
    np.random.seed(0)
    torch.manual_seed(0)
    stream = draws(records)
    before = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    taken(stream, 3)
    assert torch.equal(before[0], torch.get_rng_state())
    assert (before[1] == np.random.get_state()[1]).all() and before[2] == random.getstate()


def test_any_position_can_be_the_first():
    whole = list(itertools.islice(Stream(7, 0), 30))
    assert list(itertools.islice(Stream(7, 0, start=9), 21)) == whole[9:]


def test_test_images_keep_their_size_where_it_is_zero(records):
    assert TestMapper(0, 0)(records[0])["image"].shape == (3, 16, 16)
    sample = TestMapper(32, 64)(records[0])
    assert sample["image"].shape == (3, 32, 32) and sample["height"] == 16


def test_a_peers_channels():
    image = torch.arange(3.0).view(3, 1, 1)
    assert peer_view({"image": image}, "BGR")["image"].flatten().tolist() == [2, 1, 0]
    assert peer_view({"image": image}, "RGB")["image"] is image


def test_an_image_without_labels_has_no_masks():
    found = class_masks(torch.full((4, 4), 255), 255)
    assert len(found) == 0 and found.gt_masks.shape == (0, 4, 4)


def test_broken_samples_are_refused_by_name(records, tmp_path):
    mapper = SharedMapper(make_cfg("MODEL.SEM_SEG_HEAD.NUM_CLASSES", 50), False)
    with pytest.raises(DataError, match=r"name0\.png: holds the label \d+; there are 50 classes"):
        mapper(records[0])
    small = tmp_path / "small.png"
    Image.fromarray(np.zeros((3, 4), dtype=np.uint8)).save(small)
    mapper = SharedMapper(make_cfg(), False)
    with pytest.raises(DataError, match=r"16 x 16 pixels, its labels .*small\.png: 3 x 4"):
        mapper(records[0] | {"sem_seg_file_name": str(small)})
    small.write_bytes(b"no image")
    with pytest.raises(DataError, match=r"small\.png: labels cannot be read"):
        mapper(records[0] | {"sem_seg_file_name": str(small)})
    with pytest.raises(DataError, match=r"none\.png: cannot be read"):
        mapper(records[0] | {"file_name": str(tmp_path / "none.png")})


def ade20k(root, label=3):
    for split, image in (("training", "a"), ("validation", "b")):
        for kind, suffix in (("images", "jpg"), ("annotations", "png")):
            folder = root / "ADEChallengeData2016" / kind / split
            folder.mkdir(parents=True)
            size = (4, 6, 3) if kind == "images" else (4, 6)
            array = np.zeros(size, dtype=np.uint8)
            if kind == "annotations":
                array[0, 0], array[1, 1] = label, 150
            Image.fromarray(array).save(folder / f"{image}.{suffix}")


def test_ade20k_is_prepared_as_detectron2_reads_it(tmp_path, monkeypatch):
    from detectron2.data import DatasetCatalog, MetadataCatalog
    from detectron2.data.datasets.builtin import register_all_ade20k

    ade20k(tmp_path)
    assert prepare(["--root", str(tmp_path)]) == 0
    for name in ("ade20k_sem_seg_train", "ade20k_sem_seg_val"):
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)
    register_all_ade20k(str(tmp_path))
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    record = load_datasets(["ade20k_sem_seg_val"])[0]
    cfg = make_cfg("MODEL.SEM_SEG_HEAD.NUM_CLASSES", 150, "INPUT.CROP.ENABLED", False)
    cfg.INPUT.RANDOM_FLIP = "none"
    cfg.INPUT.MIN_SIZE_TRAIN = (4,)
    labels = SharedMapper(cfg, False)(record)["sem_seg"]
    assert (int(labels[0, 0]), int(labels[1, 1]), int(labels[2, 2])) == (2, 149, 255)
    assert prepare(["--root", str(tmp_path)]) == 0  # done already


def test_preparing_what_is_not_there_says_so(tmp_path, capsys):
    assert prepare(["--root", str(tmp_path)]) == 1
    assert "ADEChallengeData2016/annotations/training" in capsys.readouterr().err
    ade20k(tmp_path, label=200)
    assert prepare(["--root", str(tmp_path)]) == 1
    assert "holds the label 200; ADE20K has 150 classes" in capsys.readouterr().err


def test_what_is_not_on_disk_says_where_it_is_looked_for(monkeypatch, tmp_path):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    with pytest.raises(DataError, match=r"cityscapes_fine_sem_seg_val.*DETECTRON2_DATASETS"):
        load_datasets(["cityscapes_fine_sem_seg_val"])
