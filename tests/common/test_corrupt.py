"""Corruptions by hand and against torchvision's; more of them in the tests of the tasks."""

import pytest
import torch
import torchvision.transforms.v2.functional as F
from torchvision.transforms.v2 import InterpolationMode

from common.corrupt import SEVERITIES, STILL, corrupt, number_of


def image(channels=3, height=40, width=55):
    coarse = torch.rand(1, channels, 5, 7, generator=torch.Generator().manual_seed(0))
    smooth = torch.nn.functional.interpolate(coarse, (height, width), mode="bicubic")[0]
    return (smooth * 255).clamp(0, 255).to(torch.uint8)


def spoilt(pixels, name, severity, *numbers):
    return corrupt(pixels, name, severity, *numbers, own={})


def blurred(pixels, share):
    sigma = share * 40 + 0.3
    size = 2 * int(-(-3 * sigma // 1)) + 1
    return F.gaussian_blur(pixels / 255, [size] * 2, [sigma] * 2) * 255


OTHERS = {
    "gaussian_blur": blurred,
    "contrast": F.adjust_contrast,
    "brighter": F.adjust_brightness,
    "darker": F.adjust_brightness,
    "posterize": lambda pixels, bits: F.posterize(pixels, bits),
}


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", OTHERS)
def test_the_same_as_torchvision_s(name, channels):
    pixels = image(channels)
    for severity, amount in enumerate(SEVERITIES[name], 1):
        other = OTHERS[name](pixels, amount).float()
        assert (spoilt(pixels, name, severity, 0) - other).abs().max() <= 0.502, severity


def test_pixels_by_hand_and_as_pil_averages_them():
    row = torch.tensor([[[0, 10, 20, 30, 41]]], dtype=torch.uint8)  # 0.4 of it: two cells
    assert spoilt(row, "pixelate", 3, 0).tolist() == [[[10, 10, 10, 36, 36]]]
    pixels = image()
    small = F.resize(F.to_pil_image(pixels), [8, 11], interpolation=InterpolationMode.BOX)
    wide = F.pil_to_tensor(small).repeat_interleave(5, 1).repeat_interleave(5, 2)
    assert torch.equal(spoilt(pixels, "pixelate", 5, 0), wide)


def test_what_is_drawn_depends_on_every_number():
    pixels = image()
    drawn = [spoilt(pixels, "gaussian_noise", s, *n) for s in (1, 2) for n in ((3, 4), (4, 3))]
    assert all(not torch.equal(drawn[0], other) for other in drawn[1:])
    assert torch.equal(drawn[0], spoilt(pixels, "gaussian_noise", 1, 3, 4))
    assert number_of("0601") == 2131855446 and number_of("0601") != number_of("0602")


def test_what_needs_an_image_library_is_the_caller_s():
    with pytest.raises(KeyError, match="jpeg"):
        spoilt(image(), "jpeg", 1, 0)
    made = corrupt(image(), "jpeg", 2, 0, own={"jpeg": lambda x, quality: x * 0 + int(quality)})
    assert set(made.flatten().tolist()) == {30}
    assert set(SEVERITIES) - set(STILL) == {"elastic"}
