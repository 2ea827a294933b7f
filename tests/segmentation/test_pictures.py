import io

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("detectron2", reason="Detectron2 is not installed: make setup-segmentation")

from detectron2.data import MetadataCatalog

from common.peers import PeerGroup
from segmentation import pictures
from segmentation.data import load_datasets
from segmentation.errors import DataError
from segmentation.evaluation import evaluating
from segmentation.peer import make_batch
from segmentation.scenes import colour
from tests.common.toy import HERE
from tests.segmentation.toy import make_peer, make_samples

OPTIONS = [
    *("INPUT.MIN_SIZE_TEST", 64, "INPUT.MAX_SIZE_TEST", 128),
    *("MODEL.SEM_SEG_HEAD.NUM_CLASSES", 6),
]


def test_pictures_are_drawn_and_modes_put_back(datasets):
    peers = PeerGroup([make_peer("fpn", *OPTIONS), make_peer("mask2former", *OPTIONS, seed=1)])
    peers[0].module.train()
    peers[1].module.eval()
    picture, caption = pictures.teaching_pictures(peers, "scenes_val", HERE, count=2)
    image = np.array(Image.open(io.BytesIO(picture)))
    assert image.shape[0] > 200 and image.shape[1] > image.shape[0]
    assert len(np.unique(image.reshape(-1, image.shape[-1]), axis=0)) > 100
    assert "scenes_val" in caption
    assert [peer.module.training for peer in peers] == [True, False]


def test_labels_of_no_class_are_refused(datasets):
    peers = PeerGroup([make_peer("fpn", *OPTIONS[:-1], 3)])
    with pytest.raises(DataError, match=r"\.png: holds the label \d; there are 3 classes"):
        for record in load_datasets(["scenes_val"]):
            pictures._batch(record, peers.here, 255, (64, 128))


def test_labels_have_the_datasets_own_colours_or_some(datasets):
    load_datasets(["scenes_val"])
    own = MetadataCatalog.get("scenes_val").stuff_colors
    table = pictures._palette("scenes_val", 255)
    assert table[: len(own)].tolist() == own and table[255].tolist() == [255, 255, 255]
    sheet = np.array(colour(np.array([[0, 1], [5, 255]], dtype=np.uint8)))
    assert (sheet == table[[[0, 1], [5, 255]]]).all()
    others = pictures._palette("no_colours", 3)
    MetadataCatalog.remove("no_colours")
    assert others[3].tolist() == [255, 255, 255] and others[4].tolist() != [255, 255, 255]


def test_who_would_teach_is_who_does_best():
    scores = torch.tensor([[[-1.0, -1.0, -2.0]], [[-2.0, -1.0, -1.0]], [[-3.0, -3.0, -3.0]]])
    assert pictures._best(scores).tolist() == [[0, -1, 1]]  # a tie at the top teaches nobody


def test_a_peer_alone_teaches_nobody():
    assert pictures._best(torch.zeros(1, 4)).tolist() == [-1] * 4


def test_lessons_leave_out_what_is_ignored():
    batch = make_batch(make_samples(sizes=((48, 64),)), torch.device("cpu"), 255)
    peers = [make_peer("fpn"), make_peer("fpn", seed=1)]
    with torch.no_grad(), evaluating(peers):
        logits = [peer.predict(batch) for peer in peers]
    teacher, of_image = pictures._lessons(["a", "b"], logits, batch)
    assert teacher.shape == (12, 16)
    assert (teacher[:, :2] == -1).all()  # the band that make_samples ignores
    assert (teacher[:, 2:] >= 0).any()
    assert of_image in ("a", "b")
