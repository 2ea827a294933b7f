"""Which frames a peer sees, and how they are normalised."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from saliency.clips import VIEWS


def files(name, target, count):
    """Return file numbers, which begin at 1."""
    return (VIEWS[name].indices(target, count) + 1).tolist()


def test_tmfi_net_sees_32_consecutive_frames_that_end_at_the_target():
    assert files("tmfi_net", 50, 100) == list(range(20, 52))
    assert files("tmfi_net", 99, 100) == list(range(69, 101))
    assert files("tmfi_net", 0, 100) == [1] * 32
    assert files("tmfi_net", 2, 100) == [1] * 30 + [2, 3]
    assert VIEWS["vinet_s"] == VIEWS["tmfi_net"]


def test_vinet_a_sees_every_second_frame_with_the_target_at_index_16():
    assert files("vinet_a", 50, 100) == list(range(19, 82, 2))
    assert files("vinet_a", 50, 100)[16] == 51
    assert files("vinet_a", 99, 100) == list(range(68, 101, 2)) + [100] * 15
    assert files("vinet_a", 0, 100) == [1] * 17 + list(range(3, 32, 2))


def test_the_original_vinet_a_does_not_see_its_target():
    seen = VIEWS["vinet_a_original"].indices(50, 200).tolist()
    assert seen == [50 + k for k in range(-31, 32, 2)] and 50 not in seen


def test_the_published_transfer_gives_vinet_a_consecutive_frames_of_hollywood():
    seen = VIEWS["vinet_a_consecutive"].indices(50, 200)
    assert seen.tolist() == list(range(34, 66)) and seen[16] == 50


@pytest.mark.parametrize("name", VIEWS)
@pytest.mark.parametrize("count", [1, 2, 31, 32, 33])
def test_short_videos_are_clamped(name, count):
    for target in range(count):
        seen = VIEWS[name].indices(target, count)
        assert len(seen) == 32 and seen.min() >= 0 and seen.max() < count
        assert (np.diff(seen) >= 0).all()


@pytest.mark.parametrize("target", [-1, 100])
def test_a_target_outside_of_the_video_is_refused(target):
    with pytest.raises(IndexError, match=f"target frame {target} of a video with 100 frames"):
        VIEWS["tmfi_net"].indices(target, 100)


def test_normalisation_by_hand():
    view = replace(VIEWS["tmfi_net"], size=(2, 2), frames=2)
    clips = torch.randint(0, 256, (2, 2, 2, 2, 3), dtype=torch.uint8).permute(0, 4, 1, 2, 3)
    mean, std = (torch.tensor(x).view(3, 1, 1, 1) for x in (view.mean, view.std))
    before = clips.clone()
    out = view.normalise(clips)
    torch.testing.assert_close(out, (clips / 255 - mean) / std, atol=1e-6, rtol=0)
    assert out.is_contiguous() and out.dtype == torch.float32
    assert torch.equal(clips, before)
    assert torch.equal(view.normalise(clips, torch.bfloat16), out.bfloat16())


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"size": (0, 4)}, "size is"),
        ({"std": (0.2, 0.2, 0.0)}, "std above 0"),
        ({"mean": (0.5,)}, "three numbers"),
        ({"frames": 0}, "frames is 0; expected at least 1"),
        ({"stride": 0}, "stride is 0"),
        ({"before": -1}, "before is -1; expected at least 0"),
    ],
)
def test_numbers_out_of_range_are_refused(change, said):
    with pytest.raises(ValueError, match=said):
        replace(VIEWS["tmfi_net"], **change)


def test_views_tell_what_they_are():
    told = str(VIEWS["vinet_a"])
    assert told == "32 frames of 256x456, from 32 before the target to 30 after it, every 2"
    assert "to 0 after it" in str(VIEWS["tmfi_net"])
