import pytest
import torch

pytest.importorskip("detectron2", reason="Detectron2 is not installed: make setup-segmentation")

from detectron2.modeling import build_model

from segmentation.models import build_module
from tests.segmentation.toy import make_cfg

CROP = ["INPUT.CROP.ENABLED", True, "INPUT.CROP.TYPE", "absolute", "INPUT.CROP.SIZE", [64, 64]]


def both(kind, *options):
    cfg = make_cfg(kind, *options)
    ours, host = build_module(cfg), build_model(cfg)
    ours.load_state_dict(host.state_dict())
    assert cfg.INPUT.CROP.ENABLED
    return ours.eval(), host.eval()


def image(height, width):
    draw = torch.Generator().manual_seed(0)
    return [{"image": torch.randint(256, (3, height, width), generator=draw).to(torch.uint8)}]


@pytest.mark.parametrize("kind", ["deeplab", "deeplab_v3"])
@pytest.mark.parametrize("size", [(64, 64), (128, 192)])
@torch.no_grad()
def test_where_the_crop_fits_deeplab_is_the_hosts_own(kind, size):
    ours, host = both(kind, *CROP)
    assert torch.equal(ours(image(*size))[0]["sem_seg"], host(image(*size))[0]["sem_seg"])


@pytest.mark.parametrize("kind", ["deeplab", "deeplab_v3"])
@torch.no_grad()
def test_deeplab_takes_images_that_are_no_multiple_of_the_crop(kind):
    ours, host = both(kind, *CROP)
    with pytest.raises(ValueError, match="must be divisible"):
        host(image(72, 100))
    assert ours(image(72, 100))[0]["sem_seg"].shape == (4, 72, 100)


@pytest.mark.parametrize("crop", [["INPUT.CROP.TYPE", "relative"], ["INPUT.CROP.SIZE", [70, 70]]])
def test_deeplab_takes_crops_that_its_head_refuses(crop):
    assert build_module(make_cfg("deeplab", *CROP, *crop))(_training()) is not None


def _training():
    return [{**sample, "sem_seg": torch.zeros(96, 64).long()} for sample in image(96, 64) * 2]
