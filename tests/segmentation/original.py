"""The original Mask2Former, to compare with: PyPI's maskformer2 with the mend it needs."""

import pytest


def mended():
    """Import it, and let its model take the weights of the losses that it makes itself.

    As released, its model gives them to a criterion that does not take them.
    """
    pytest.importorskip(
        "mask2former",
        reason="the original is not installed: make test installs it, or "
        "pip install --no-deps --no-build-isolation maskformer2==0.1",
    )
    from mask2former import maskformer_model
    from mask2former.modeling.criterion import SetCriterion

    class Criterion(SetCriterion):
        def __init__(self, *arguments, weight_dict, **rest):
            weights = {f"{kind}_weight": 1.0 for kind in ("class", "mask", "dice")}
            super().__init__(*arguments, num_layers=0, **weights, **rest)
            self.weight_dict = weight_dict

    maskformer_model.SetCriterion = Criterion
    return maskformer_model.MaskFormer
