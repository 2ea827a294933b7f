"""What is silenced, and what is not."""

import warnings

import pytest

from common.quiet import hush_imports

SCRIPT = "`torch.jit.script` is deprecated. Please switch to `torch.compile` or `torch.export`."


@pytest.mark.parametrize(
    ("message", "kind", "module", "shown"),
    [
        (SCRIPT, FutureWarning, "torch.jit._script", 0),
        (SCRIPT, DeprecationWarning, "torch.jit._script", 0),
        (SCRIPT, FutureWarning, "classification.train", 1),
        ("`torch.jit.trace` is deprecated", FutureWarning, "torch.jit._script", 1),
        (SCRIPT, UserWarning, "torch.jit._script", 1),
    ],
)
def test_one_warning_is_silenced(message, kind, module, shown):
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        hush_imports()
        warnings.warn_explicit(message, kind, f"{module}.py", 1, module=module)
    assert len(told) == shown
