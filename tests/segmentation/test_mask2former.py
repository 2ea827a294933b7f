import pytest
import torch
from torch.nn.parallel import DistributedDataParallel

pytest.importorskip("detectron2", reason="Detectron2 is not installed: make setup-segmentation")

from detectron2.checkpoint import DetectionCheckpointer
from detectron2.modeling import build_model
from detectron2.structures import BitMasks, Instances

from common.checkpoint import load_weights
from segmentation import mask2former_names as names
from segmentation.config import base_config
from segmentation.errors import ConfigError
from segmentation.mask2former import load_transformers, pad_masks, save_transformers
from tests.launch import launch
from tests.segmentation.original import mended
from tests.segmentation.test_config import CONFIGS
from tests.segmentation.toy import make_cfg, make_samples

KINDS = ["mask2former", "swin"]


def build(kind, *options, original=False, seed=0):
    cfg = make_cfg(kind, *options)
    if original:
        mended()
        cfg.MODEL.META_ARCHITECTURE = "MaskFormer"
        cfg.DATASETS.TRAIN = ("ade20k_sem_seg_train",)
    torch.manual_seed(seed)
    return build_model(cfg)


def images(height=70, width=90):
    draw = torch.Generator().manual_seed(1)
    return [{"image": torch.randint(256, (3, height, width), generator=draw).to(torch.uint8)}]


@torch.no_grad()
def predict(model, inputs):
    return model.eval()(inputs)[0]["sem_seg"]


def assert_same(ours, theirs):
    found, expected = predict(ours, images()), predict(theirs, images())
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_file_loads_in_the_original(kind, tmp_path):
    ours, theirs = build(kind), build(kind, original=True, seed=2)
    DetectionCheckpointer(ours, str(tmp_path)).save("model")
    DetectionCheckpointer(theirs).load(str(tmp_path / "model.pth"))
    assert_same(ours, theirs)


@pytest.mark.parametrize("kind", KINDS)
def test_outputs_equal_the_originals_with_its_weights_and_back(kind):
    theirs = build(kind, original=True)
    ours = build(kind, seed=5)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    assert predict(ours, images()).shape == (4, 70, 90)
    torch.testing.assert_close(
        predict(ours, images()), predict(theirs, images()), atol=1e-4, rtol=0
    )
    other = build(kind, seed=6)
    theirs.load_state_dict(other.state_dict(), strict=True)
    torch.testing.assert_close(
        predict(other, images()), predict(theirs, images()), atol=1e-4, rtol=0
    )


@pytest.mark.parametrize("kind", KINDS)
def test_losses_equal_the_originals_where_points_are_drawn_alike(kind):
    theirs = build(kind, original=True)
    ours = build(kind)
    ours.load_state_dict(theirs.state_dict())
    samples = make_samples(sizes=((64, 64), (64, 64)))
    found = {}
    for name, model in (("ours", ours), ("theirs", theirs)):
        torch.manual_seed(3)
        model.train()
        found[name] = {k: float(x) for k, x in model(samples).items()}
    assert found["ours"].keys() == found["theirs"].keys()
    for term, loss in found["ours"].items():
        assert loss == pytest.approx(found["theirs"][term], rel=1e-3), term


@pytest.mark.slow
@pytest.mark.parametrize("name", ["swin_t", "r50"])
def test_full_size_models_have_the_originals_weights(name):
    mended()
    cfg = base_config()
    cfg.merge_from_file(str(CONFIGS / "ade20k" / f"mask2former_{name}.yaml"))
    cfg.DATASETS.TRAIN = ("ade20k_sem_seg_train",)
    theirs = build_model(cfg)
    cfg.MODEL.META_ARCHITECTURE = "Mask2Former"
    ours = build_model(cfg)
    shapes = [{k: x.shape for k, x in model.state_dict().items()} for model in (ours, theirs)]
    assert shapes[0] == shapes[1]
    load_weights(ours, theirs.state_dict(), "original")
    torch.testing.assert_close(
        predict(ours, images()), predict(theirs, images()), atol=1e-4, rtol=0
    )


@pytest.mark.parametrize("kind", KINDS)
def test_weights_go_through_a_file_and_plain_detectron2(kind, tmp_path):
    ours = build(kind)
    DetectionCheckpointer(ours, str(tmp_path)).save("model")
    other = build(kind, seed=9)
    DetectionCheckpointer(other).load(str(tmp_path / "model.pth"))
    for name, x in ours.state_dict().items():
        assert torch.equal(x, other.state_dict()[name]), name
    assert torch.equal(predict(ours, images()), predict(other, images()))


@pytest.mark.parametrize("kind", KINDS)
def test_names_there_and_back(kind):
    ours = build(kind)
    own = dict(ours.named_parameters())
    back = names.from_original(names.to_original(own))
    assert set(own) - set(back) == {name for name in own if name.startswith(names.UNUSED)}
    assert all(torch.equal(x, own[name]) for name, x in back.items())


def test_released_files_in_older_spelling_are_understood():
    old = ["sem_seg_head.predictor.static_query.weight", "sem_seg_head.input_proj.0.0.bias"]
    assert list(names.from_original(dict.fromkeys(old, torch.zeros(1)))) == [
        "sem_seg_head.predictor.queries_features.weight",
        "sem_seg_head.pixel_decoder.input_projections.0.0.bias",
    ]


@pytest.mark.parametrize("kind", KINDS)
def test_every_parameter_that_learns_gets_a_gradient(kind):
    model = build(kind).train()
    samples = make_samples()
    sum(model(samples).values()).backward()
    assert not [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]


def test_amp_trains_and_an_image_without_labels_does_not_break_it():
    model = build("mask2former").train()
    samples = make_samples()
    empty = Instances((40, 64))
    empty.gt_classes, empty.gt_masks = torch.zeros(0).long(), torch.zeros(0, 40, 64).bool()
    samples[1]["instances"] = empty
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = sum(model(samples).values())
    loss.backward()
    assert loss.isfinite()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


def test_the_last_loss_alone_without_deep_supervision():
    model = build("mask2former", "MODEL.MASK_FORMER.DEEP_SUPERVISION", False).train()
    assert set(model(make_samples())) == {"loss_ce", "loss_mask", "loss_dice"}
    deep = build("mask2former").train()
    assert len(deep(make_samples())) == 9  # 3 predictions


def test_masks_are_padded_with_zeros():
    masks = torch.ones(2, 3, 4, dtype=torch.bool)
    padded = pad_masks(BitMasks(masks), (5, 6))
    assert padded.shape == (2, 5, 6) and padded.sum() == 24
    assert torch.equal(padded[:, :3, :4], masks.float())


def test_swin_goes_to_transformers_and_back(tmp_path):
    ours = build("swin")
    save_transformers(ours, tmp_path)
    other = build("swin", seed=3)
    load_weights(other, load_transformers(str(tmp_path)), "folder")
    assert torch.equal(predict(ours, images()), predict(other, images()))
    with pytest.raises(ConfigError, match="only models with a Swin backbone"):
        save_transformers(build("mask2former"), tmp_path)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("MODEL.SEM_SEG_HEAD.PIXEL_DECODER_NAME", "BasePixelDecoder"),
        ("MODEL.MASK_FORMER.PRE_NORM", True),
        ("MODEL.MASK_FORMER.TEST.INSTANCE_ON", True),
        ("MODEL.SWIN.APE", True),
        ("MODEL.BACKBONE.NAME", "build_mnv2_backbone"),
        ("MODEL.RESNETS.OUT_FEATURES", ["res4", "res5"]),
    ],
)
def test_what_it_does_not_have_is_refused_by_name(key, value):
    kind = "swin" if "SWIN" in key else "mask2former"
    with pytest.raises(ConfigError, match=key.replace(".", r"\.")):
        build(kind, key, value)


def _one_step(world, folder):
    model = build("swin")
    wrapped = DistributedDataParallel(model)
    samples = make_samples(sizes=((64, 64),), seed=world.rank)
    wrapped.train()
    torch.manual_seed(0)
    sum(wrapped(samples).values()).backward()
    torch.save(float(model.criterion.masks), folder / f"{world.rank}.pt")
    assert set(wrapped.state_dict()) == {f"module.{name}" for name in model.state_dict()}


def test_two_processes_divide_by_the_mean_number_of_masks(tmp_path):
    launch(_one_step, 2, tmp_path)
    counts = [len(make_samples(sizes=((64, 64),), seed=i)[0]["instances"]) for i in range(2)]
    for rank in range(2):
        found = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        assert found == sum(counts) / 2
