import sys

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

pytest.importorskip("detectron2", reason="Detectron2 is not installed: make setup-segmentation")

from detectron2.data import DatasetCatalog, MetadataCatalog

from segmentation.errors import DataError
from segmentation.evaluation import augmented, evaluate_group, predict
from tests.common.toy import HERE
from tests.segmentation.toy import make_cfg, make_peer, make_samples

NAME = "by_hand"


class Says(nn.Module):
    """Predicts what it was told, at the size that is asked for."""

    def __init__(self, logits):
        super().__init__()
        self.logits = torch.tensor(logits)

    def forward(self, inputs):
        return [{"sem_seg": self.logits} for _ in inputs]


class Told:
    """As much of a peer as evaluation needs."""

    dense = True

    def __init__(self, name, logits):
        self.name = name
        self.best_module = Says(logits)
        self.cfg = make_cfg("fpn", "INPUT.MIN_SIZE_TEST", 0, "DATALOADER.NUM_WORKERS", 0)

    def probabilities(self, sem_seg):
        return sem_seg.softmax(dim=0)


@pytest.fixture
def by_hand(tmp_path):
    """One image of 2 x 3 pixels; the last is ignored."""
    Image.fromarray(np.zeros((2, 3, 3), dtype=np.uint8)).save(tmp_path / "image.png")
    labels = np.array([[0, 0, 1], [1, 2, 255]], dtype=np.uint8)
    Image.fromarray(labels).save(tmp_path / "labels.png")
    record = {
        "file_name": str(tmp_path / "image.png"),
        "sem_seg_file_name": str(tmp_path / "labels.png"),
        "height": 2,
        "width": 3,
    }
    DatasetCatalog.register(NAME, lambda: [record])
    MetadataCatalog.get(NAME).set(
        stuff_classes=["a", "b", "c"], ignore_label=255, evaluator_type="sem_seg"
    )
    yield NAME
    DatasetCatalog.remove(NAME)
    MetadataCatalog.remove(NAME)


def saying(labels, weight=8.0):
    """Logits [3, 2, 3] for a map of labels."""
    one_hot = np.eye(3, dtype=np.float32)[np.array(labels)]
    return (weight * one_hot).transpose(2, 0, 1)


def test_metrics_by_hand(by_hand):
    # one of two pixels of a is called b; what is said of the ignored pixel does not count
    found = evaluate_group([Told("one", saying([[0, 1, 1], [1, 2, 0]]))], by_hand, HERE)
    assert found["one/pACC"] == pytest.approx(100 * 4 / 5)
    assert found["one/IoU-a"] == pytest.approx(50)
    assert found["one/IoU-b"] == pytest.approx(100 * 2 / 3)
    assert found["one/mIoU"] == pytest.approx(100 * (1 / 2 + 2 / 3 + 1) / 3)
    assert found["one/fwIoU"] == pytest.approx(100 * (2 * 1 / 2 + 2 * 2 / 3 + 1) / 5)
    assert found["one/mACC"] == pytest.approx(100 * (1 / 2 + 1 + 1) / 3)
    assert not any(name.startswith("ensemble") for name in found)


def test_the_ensemble_is_the_mean_of_probabilities(by_hand):
    truth = [[0, 0, 1], [1, 2, 2]]
    wrong = [[1, 1, 2], [2, 0, 0]]
    sure, unsure = Told("sure", saying(truth)), Told("unsure", saying(wrong, weight=1.0))
    found = evaluate_group([sure, unsure], by_hand, HERE)
    assert found["unsure/pACC"] == 0
    assert found["ensemble/mIoU"] == found["sure/mIoU"] == 100


@pytest.mark.parametrize("label", [3, 77])
def test_labels_of_no_class_are_refused(by_hand, label):
    path = DatasetCatalog.get(by_hand)[0]["sem_seg_file_name"]
    Image.fromarray(np.full((2, 3), label, dtype=np.uint8)).save(path)
    with pytest.raises(DataError, match=rf"labels\.png: holds the label {label}; there are 3"):
        evaluate_group([Told("one", saying([[0, 1, 1], [1, 2, 0]]))], by_hand, HERE)


def test_cityscapes_is_evaluated_as_detectron2_registers_it(tmp_path, monkeypatch):
    """Its files under their own names, without cityscapesscripts."""
    from detectron2.data.datasets.cityscapes import load_cityscapes_semantic

    labels = np.array([[0, 0, 1], [18, 18, 255]], dtype=np.uint8)
    for folder, end, array in (
        ("leftImg8bit", "leftImg8bit", np.zeros((2, 3, 3), dtype=np.uint8)),
        ("gtFine", "gtFine_labelTrainIds", labels),
        ("gtFine", "gtFine_labelIds", labels),
        ("gtFine", "gtFine_instanceIds", labels),
    ):
        (tmp_path / folder / "town").mkdir(parents=True, exist_ok=True)
        Image.fromarray(array).save(tmp_path / folder / "town" / f"town_000000_000000_{end}.png")
    (tmp_path / "gtFine" / "town" / "town_000000_000000_gtFine_polygons.json").write_text(
        '{"imgHeight": 2, "imgWidth": 3}'
    )
    folders = str(tmp_path / "leftImg8bit"), str(tmp_path / "gtFine")
    monkeypatch.setitem(
        DatasetCatalog.data,
        "cityscapes_fine_sem_seg_val",
        lambda: load_cityscapes_semantic(*folders),
    )
    monkeypatch.setitem(sys.modules, "cityscapesscripts", None)
    logits = 8 * np.eye(19, dtype=np.float32)[[[0, 1, 1], [18, 18, 0]]].transpose(2, 0, 1)
    found = evaluate_group([Told("one", logits)], "cityscapes_fine_sem_seg_val", HERE)
    assert found["one/pACC"] == pytest.approx(100 * 4 / 5)
    assert found["one/mIoU"] == pytest.approx(100 * (1 / 2 + 1 / 2 + 1) / 3)
    assert found["one/IoU-road"] == pytest.approx(50)


def test_coco_stuff_has_an_evaluator_as_detectron2_registers_it():
    from segmentation.evaluation import _SEMANTIC

    for name in ("coco_2017_val_panoptic_stuffonly", "ade20k_sem_seg_val"):
        assert MetadataCatalog.get(name).evaluator_type in _SEMANTIC


def test_modes_are_put_back(by_hand):
    peer = Told("one", saying([[0, 1, 1], [1, 2, 0]]))
    peer.best_module.train()
    evaluate_group([peer], by_hand, HERE)
    assert peer.best_module.training


def test_a_dataset_of_another_kind_is_refused(by_hand):
    MetadataCatalog.remove(by_hand)
    MetadataCatalog.get(by_hand).set(evaluator_type="coco", ignore_label=255)
    with pytest.raises(DataError, match="by_hand: evaluator type 'coco'"):
        evaluate_group([Told("one", saying([[0, 1, 1], [1, 2, 0]]))], by_hand, HERE)


def make_sample():
    sample = make_samples(sizes=((32, 48),))[0]
    return {name: sample[name] for name in ("image", "height", "width")}


@pytest.mark.parametrize("kind", ["fpn", "mask2former"])
def test_predictions_are_probabilities_at_the_files_resolution(kind):
    peer = make_peer(kind)
    peer.module.eval()
    sample = {**make_sample(), "height": 40, "width": 60}
    with torch.no_grad():
        p = predict(peer, sample)
    assert p.shape[1:] == (40, 60)
    torch.testing.assert_close(p.sum(dim=0), torch.ones(40, 60))


def test_tta_is_the_mean_over_sizes_and_flips():
    options = ["TEST.AUG.MIN_SIZES", (32, 64), "TEST.AUG.MAX_SIZE", 128, "TEST.AUG.FLIP", True]
    peer = make_peer("fpn", *options)
    peer.module.eval()
    sample = make_sample()
    with torch.no_grad():
        p = augmented(peer, sample)
        mirrored = augmented(peer, {**sample, "image": sample["image"].flip(-1)})
        same_size = predict(peer, sample)
    torch.testing.assert_close(p.sum(dim=0), torch.ones(32, 48))
    torch.testing.assert_close(mirrored.flip(-1), p, atol=0.02, rtol=0)
    assert not torch.allclose(p, same_size)


def test_one_size_and_no_flip_is_no_augmentation():
    peer = make_peer("fpn", "TEST.AUG.MIN_SIZES", (32,), "TEST.AUG.FLIP", False)
    peer.module.eval()
    sample = make_sample()
    with torch.no_grad():
        torch.testing.assert_close(augmented(peer, sample), predict(peer, sample))


def test_tta_without_sizes_is_refused():
    peer = make_peer("fpn", "TEST.AUG.MIN_SIZES", ())
    with pytest.raises(DataError, match="MIN_SIZES is empty"):
        augmented(peer, make_sample())
