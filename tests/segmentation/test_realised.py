"""Finished runs of segmentors, read back: which keys make another model."""

import pytest

from segmentation.realised import at_start


@pytest.mark.parametrize(
    ("key", "expected"),
    [
        ("MODEL.WEIGHTS", True),
        ("MODEL.RESNETS.DEPTH", True),
        ("MODEL.MASK_FORMER.TEST.OBJECT_MASK_THRESHOLD", True),
        ("INPUT.MIN_SIZE_TEST", True),
        ("SOLVER.BASE_LR", False),
        ("MODEL.MASK_FORMER.DICE_WEIGHT", False),
        ("MODEL.BACKBONE.FREEZE_AT", False),
        ("INPUT.MIN_SIZE_TRAIN", False),
    ],
)
def test_what_a_model_predicts_before_training_does_not_hang_on_its_solver(key, expected):
    assert at_start(key) is expected
