import json
import math

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("detectron2", reason="Detectron2 is not installed: make setup-segmentation")

from torch import nn

from common.transfer import KnowledgeTransfer
from segmentation.errors import SegmentorError
from segmentation.peer import (
    at_grid,
    dense_score,
    find_prediction,
    make_batch,
    mask_classification_logits,
    pad,
    padded_size,
    read_losses,
    to_grid,
)
from tests.common.toy import HERE
from tests.launch import launch
from tests.segmentation.original import mended
from tests.segmentation.toy import ARCHITECTURES, CLASSES, make_peer, make_samples

CPU = torch.device("cpu")
KINDS = list(ARCHITECTURES)


def batch_of(**settings):
    return make_batch(make_samples(**settings), CPU, 255)


def test_mask_classification_by_hand():
    classes = torch.log(torch.tensor([[[0.5, 0.25, 0.25], [0.1, 0.6, 0.3]]]))
    masks = torch.tensor([[[[0.0]], [[math.log(3)]]]])  # sigmoid: 0.5 and 0.75
    s = torch.tensor([0.5 * 0.5 + 0.1 * 0.75, 0.25 * 0.5 + 0.6 * 0.75])
    got = mask_classification_logits(classes, masks)[0, :, 0, 0]
    torch.testing.assert_close(got, s.log())
    torch.testing.assert_close(got.softmax(0), s / s.sum())


def test_mask_classification_survives_masks_that_say_nothing():
    classes = torch.randn(1, 3, 5, requires_grad=True)
    masks = torch.full((1, 3, 2, 2), -200.0, requires_grad=True)
    logits = mask_classification_logits(classes, masks)
    logits.sum().backward()
    assert logits.isfinite().all()
    assert classes.grad.isfinite().all() and masks.grad.isfinite().all()


def test_mask_classification_is_float32_under_autocast():
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = mask_classification_logits(torch.randn(1, 3, 5), torch.randn(1, 3, 2, 2))
    assert got.dtype == torch.float32


def test_dense_score_by_hand():
    p = torch.tensor([[0.7, 0.2], [0.6, 0.9]])
    logits = torch.stack([p, 1 - p]).log()[None]
    target = torch.tensor([[[0, 1], [255, 0]]])
    pixels, valid = dense_score(logits, target, granularity="pixel")
    expected = torch.tensor([[0.7, 0.8], [1.0, 0.9]]).log()  # log 1 where it is ignored
    torch.testing.assert_close(pixels[0], expected)
    assert valid[0].tolist() == [[True, True], [False, True]]
    score, same = dense_score(logits, target)
    assert torch.equal(dense_score(logits, target, valid=valid)[0], score)
    torch.testing.assert_close(score, expected.sum().view(1) / 3)
    assert torch.equal(valid, same)


def test_dense_score_brings_labels_to_the_grid_by_nearest_neighbour():
    target = torch.arange(4).view(1, 2, 2).repeat_interleave(4, 1).repeat_interleave(4, 2)
    logits = torch.randn(1, 4, 2, 2)
    small, _ = dense_score(logits, torch.arange(4).view(1, 2, 2), granularity="pixel")
    large, valid = dense_score(logits, target, granularity="pixel")
    assert torch.equal(small, large) and valid.shape == (1, 2, 2)


def test_labels_come_to_a_grid_as_by_nearest_neighbour():
    draw = torch.Generator().manual_seed(0)
    target = torch.randint(CLASSES, (2, 12, 20), generator=draw)
    for size in ((12, 20), (3, 5), (6, 10), (4, 10), (5, 7), (24, 40)):
        expected = F.interpolate(target[:, None].double(), size=size, mode="nearest")[:, 0]
        assert torch.equal(at_grid(target, size), expected.long()), size
    batch = make_batch(make_samples(), CPU, 255)
    assert batch.labels is batch.labels and batch.labels.shape[1:] == batch.grid


def test_an_image_without_labels_scores_zero_for_all():
    score, valid = dense_score(torch.randn(1, 3, 2, 2), torch.full((1, 8, 8), 255))
    assert score.tolist() == [0] and not valid.any()


def test_dense_score_refuses_another_granularity():
    with pytest.raises(ValueError, match="'row'; choose from image, pixel"):
        dense_score(torch.zeros(1, 2, 1, 1), torch.zeros(1, 1, 1), granularity="row")


@pytest.mark.parametrize("kind", KINDS)
def test_every_architecture_gives_losses_and_logits_with_gradient(kind):
    peer = make_peer(kind)
    peer.train()
    batch = batch_of()
    output = peer.forward(batch)
    assert output.logits.shape == (2, CLASSES, 12, 16)
    assert output.score.shape == (2,) and not output.score.requires_grad
    assert output.mask.shape == (2, 12, 16)
    assert not output.mask[1, 10:].any() and not output.mask[..., :2].any()
    assert output.mask[0, :, 2:].all()
    output.task_loss.backward(retain_graph=True)
    missing = [n for n, p in peer.module.named_parameters() if p.requires_grad and p.grad is None]
    assert not missing
    peer.module.zero_grad()
    output.logits.square().sum().backward()
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in peer.module.parameters())


def test_the_original_mask2former_is_a_peer_as_ours_is():
    mended()
    original = ["MODEL.META_ARCHITECTURE", "MaskFormer", "DATASETS.TRAIN", ("ade20k_sem_seg_val",)]
    theirs = make_peer("mask2former", *original)
    ours = make_peer("mask2former")
    assert type(theirs.module).__module__.startswith("mask2former.")
    ours.module.load_state_dict(theirs.module.state_dict())
    batch, outputs = batch_of(), []
    for peer in (ours, theirs):
        peer.train()
        torch.manual_seed(1)
        outputs.append(peer.forward(batch))
    torch.testing.assert_close(outputs[1].logits, outputs[0].logits, atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(outputs[1].score, outputs[0].score, atol=1e-3, rtol=1e-3)
    outputs[1].task_loss.backward(retain_graph=True)
    theirs.module.zero_grad()
    outputs[1].logits.square().sum().backward()
    assert theirs.module.sem_seg_head.predictor.mask_embed.layers[0].weight.grad.abs().sum() > 0


@pytest.mark.parametrize("kind", KINDS)
def test_the_task_loss_is_the_hosts_own(kind):
    peer = make_peer(kind)
    peer.train()
    batch = batch_of(sizes=((64, 64), (64, 32)))
    torch.manual_seed(1)
    ours = peer.forward(batch).task_loss
    torch.manual_seed(1)
    losses = peer.module([peer.view(sample) for sample in batch.samples])
    torch.testing.assert_close(ours, sum(losses.values()), rtol=1e-5, atol=1e-5)
    assert read_losses([peer], HERE) == pytest.approx(
        {f"{kind}/{name}": float(loss) for name, loss in losses.items()}, rel=1e-4, abs=1e-4
    )
    assert read_losses([peer], HERE) == {}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("granularity", ["image", "pixel"])
def test_gradient_in_every_student_and_none_in_a_detached_teacher(kind, granularity):
    peers = [
        make_peer(kind, granularity=granularity),
        make_peer("fpn", seed=7, granularity=granularity),
    ]
    for teacher, student in ((0, 1), (1, 0)):
        outputs = []
        for peer in peers:
            peer.train()
            peer.module.zero_grad()
            outputs.append(peer.forward(batch_of()))
            outputs[-1].task_loss = outputs[-1].task_loss * 0
        names = ["a", "b"]
        KnowledgeTransfer(f"one_way:{names[teacher]}", names=names)(outputs).total.backward()

        def size(peer):
            return sum(
                float(p.grad.abs().sum()) for p in peer.module.parameters() if p.grad is not None
            )

        assert size(peers[student]) > 0
        assert size(peers[teacher]) == 0


def test_padding_and_ignored_pixels_do_not_count():
    peer = make_peer("fpn")
    peer.train()
    output = peer.forward(batch_of())
    other = make_peer("deeplab")
    other.train()
    teacher = other.forward(batch_of())
    outputs = [output, teacher]
    for each in outputs:
        each.logits = each.logits.detach().requires_grad_()
    KnowledgeTransfer("mutual")(outputs).total.backward()
    for each in outputs:
        gradient = each.logits.grad.abs().sum(dim=1)
        assert (gradient[~each.mask] == 0).all()
        assert (gradient[each.mask] > 0).all()


def test_equal_peers_transfer_nothing():
    peers = [make_peer("fpn", name="a"), make_peer("fpn", name="b")]
    for granularity in ("image", "pixel"):
        for peer in peers:
            peer.granularity = granularity
            peer.train()
        outputs = [peer.forward(batch_of()) for peer in peers]
        result = KnowledgeTransfer("best")(outputs)
        assert result.roles.sum() == 0
        assert result.transfer_loss.tolist() == [0, 0]


def test_roles_by_hand_with_ignored_pixels():
    """Two classes, one image of 1 x 3 pixels, the last ignored; who is better differs by pixel."""
    from common.transfer import PeerOutput

    p = torch.tensor([[0.9, 0.4, 0.1], [0.6, 0.8, 0.9]])
    target = torch.tensor([[[0, 0, 255]]])
    roles = {}
    for granularity in ("image", "pixel"):
        outputs = []
        for row in p:
            logits = torch.stack([row, 1 - row]).log().view(1, 2, 1, 3)
            score, valid = dense_score(logits, target, granularity=granularity)
            outputs.append(PeerOutput(torch.zeros(()), score, logits, mask=valid))
        result = KnowledgeTransfer("best")(outputs)
        roles[granularity] = result.roles
        kl = F.kl_div(p.log(), p.flip(0), reduction="none")
        kl = kl + F.kl_div((1 - p).log(), (1 - p).flip(0), reduction="none")
        if granularity == "image":  # 0.9 * 0.4 < 0.6 * 0.8: the second teaches, on two pixels
            expected = torch.tensor([kl[0, :2].mean(), 0])
        else:
            expected = torch.tensor([kl[0, 1], kl[1, 0]]) / 2
        torch.testing.assert_close(result.transfer_loss, expected)
    assert roles["image"][:, :, 0].tolist() == [[0, 0], [1, 0]]
    assert roles["pixel"][0, 1, 0, 0].tolist() == [1, 0, 0]
    assert roles["pixel"][1, 0, 0, 0].tolist() == [0, 1, 0]


@pytest.mark.parametrize("kind", KINDS)
def test_a_frozen_peer_scores_as_in_evaluation_and_learns_nothing(kind):
    peer = make_peer(kind, frozen=True)
    peer.train()
    assert not peer.module.training
    before = {name: x.clone() for name, x in peer.module.state_dict().items()}
    outputs = []
    peer.module.register_forward_hook(lambda *call: outputs.append(call[-1]))
    with torch.no_grad():
        output = peer.forward(batch_of())
        assert not outputs  # it ends where its prediction is caught
        peer.module([peer.view(sample) for sample in make_samples()])
    assert len(outputs) == 1 and outputs[0][0]["sem_seg"].shape == (CLASSES, 48, 64)
    assert output.logits.shape == (2, CLASSES, 12, 16) and output.score.isfinite().all()
    assert all(torch.equal(x, before[name]) for name, x in peer.module.state_dict().items())


@pytest.mark.parametrize("kind", ["fpn", "deeplab", "deeplab_v3"])
def test_a_batch_without_labels_teaches_a_dense_peer_nothing(kind):
    samples = make_samples(((48, 64), (48, 64)))
    for sample in samples:
        sample["sem_seg"].fill_(255)
        sample["instances"] = sample["instances"][:0]
    batch = make_batch(samples, CPU, 255)
    peers = [make_peer(kind), make_peer("mask2former", seed=1)]
    outputs = []
    for peer in peers:
        peer.train()
        outputs.append(peer.forward(batch))
    assert float(outputs[0].task_loss) == 0
    total = KnowledgeTransfer("mutual")(outputs).total
    total.backward()
    assert total.isfinite()
    for peer in peers:
        gradients = [p.grad for p in peer.module.parameters() if p.grad is not None]
        assert gradients and all(gradient.isfinite().all() for gradient in gradients)
    assert all(not p.grad.any() for p in peers[0].module.parameters())
    assert set(read_losses(peers[:1], HERE).values()) == {0.0}


class Further(nn.Module):
    """A host with one more loss in some batches; ``seen`` gets the other one of each."""

    def __init__(self, host, has_it, seen):
        super().__init__()
        self.host, self.has_it, self.seen = host, has_it, seen

    def forward(self, inputs):
        losses = self.host(inputs)
        self.seen.append(losses["loss_sem_seg"].item())
        return losses | ({"loss_aux": torch.tensor(2.0)} if self.has_it() else {})


def test_a_loss_counts_for_the_batches_that_had_it():
    """Some hosts have a loss of their own in some batches alone."""
    peer = make_peer("fpn")
    peer.train()
    batch, seen = batch_of(), []
    peer.model = Further(peer.model, lambda: len(seen) != 2, seen)
    for _ in range(3):
        peer.forward(batch)
    assert read_losses([peer], HERE) == pytest.approx(
        {"fpn/loss_sem_seg": sum(seen) / 3, "fpn/loss_aux": 2.0}
    )
    peer.forward(batch)
    assert read_losses([peer], HERE)["fpn/loss_aux"] == 2.0


def _loses(world, file):
    peer = make_peer("fpn")
    peer.train()
    if world.rank == 0:
        peer.model = Further(peer.model, lambda: True, [])
    for _ in range(1 + world.rank):
        peer.forward(batch_of())
    (file / f"{world.rank}.json").write_text(json.dumps(read_losses([peer], world)))


def test_a_loss_need_not_be_there_on_every_rank(tmp_path):
    launch(_loses, 2, tmp_path)
    found = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    assert found[0] == found[1] and found[0]["fpn/loss_aux"] == 2.0
    assert found[0]["fpn/loss_sem_seg"] > 0


@pytest.mark.parametrize(("kind", "dense"), [("fpn", True), ("mask2former", False)])
def test_probabilities_are_made_in_place(kind, dense):
    peer = make_peer(kind)
    given = torch.randn(CLASSES, 3, 4) if dense else torch.rand(CLASSES, 3, 4)
    expected = given.softmax(0) if dense else given / given.sum(0)
    p = peer.probabilities(given)
    torch.testing.assert_close(p, expected)
    assert p.data_ptr() == given.data_ptr()
    half = given.half()
    assert peer.probabilities(half).dtype == torch.float32


def test_confidence_needs_no_labels():
    peer = make_peer("fpn", score="confidence")
    peer.train()
    torch.manual_seed(0)
    batch = batch_of()
    output = peer.forward(batch)
    p = output.logits.detach().softmax(1).amax(1)
    expected = (p * output.mask).flatten(1).sum(1) / output.mask.flatten(1).sum(1)
    torch.testing.assert_close(output.score, expected)


def test_each_peer_has_its_own_channels_and_padding():
    bgr = make_peer("fpn", "INPUT.FORMAT", "BGR")
    samples = make_samples(sizes=((50, 70),))
    seen = bgr.view(samples[0])["image"]
    assert torch.equal(seen, samples[0]["image"].flip(0))
    assert padded_size(bgr.module, samples) == (64, 96)
    deeplab = make_peer("deeplab")
    assert (bgr.multiple, deeplab.multiple) == (0, 32)
    assert make_peer("deeplab", "INPUT.SIZE_DIVISIBILITY", 128).multiple == 128
    batch = make_batch(samples, CPU, 255)
    assert batch.target.shape == (1, 52, 72)
    for peer in (bgr, deeplab):
        peer.train()
        assert peer.forward(make_batch(make_samples(((50, 70), (50, 70))), CPU, 255)).logits.shape[
            -2:
        ] == (13, 18)


@pytest.mark.parametrize("kind", ["fpn", "deeplab", "mask2former"])
def test_the_network_sees_training_images_padded_as_the_config_says(kind):
    peer = make_peer(kind, "INPUT.SIZE_DIVISIBILITY", 128)
    peer.train()
    seen = []
    peer.module.backbone.register_forward_pre_hook(lambda module, x: seen.append(x[0].shape))
    output = peer.forward(batch_of())
    assert [tuple(shape) for shape in seen] == [(2, 3, 128, 128)]
    assert output.logits.shape[-2:] == (12, 16) and output.task_loss.isfinite()


def test_padding_is_the_mean_to_the_network_and_ignored_in_the_labels():
    sample = make_samples(sizes=((50, 70),))[0]
    mean = torch.tensor([10.2, 20.6, 30.0]).view(3, 1, 1)
    padded = pad([sample], 32, mean, 255)[0]
    assert padded["image"].shape == (3, 64, 96) and padded["sem_seg"].shape == (64, 96)
    assert torch.equal(padded["image"][:, :50, :70], sample["image"].float())
    assert torch.equal(padded["image"][:, 63, 95], torch.tensor([10.2, 20.6, 30.0]))
    assert (padded["sem_seg"][50:] == 255).all() and (padded["sem_seg"][:, 70:] == 255).all()
    assert torch.equal(padded["sem_seg"][:50, :70], sample["sem_seg"])


def test_grid_cuts_padding_and_resizes_other_strides():
    dense = torch.arange(16.0).view(1, 1, 4, 4)
    assert torch.equal(to_grid(dense, (16, 16), (3, 2)), dense[..., :3, :2])
    flat = torch.full((1, 1, 2, 2), 5.0)
    assert torch.equal(to_grid(flat, (16, 16), (4, 4)), torch.full((1, 1, 4, 4), 5.0))


def test_what_is_no_segmentor_is_refused_by_name():
    with pytest.raises(SegmentorError, match="'x': no dense prediction is known for Linear"):
        find_prediction(nn.Linear(1, 1), "x")
