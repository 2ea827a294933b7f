"""The comparison with finished runs: which runs a command line asks for."""

import pytest

from common.scout_check import runs_asked


@pytest.mark.parametrize(
    ("given", "runs"),
    [
        ("DATA --model a", []),
        ("DATA --realised x y --top 3", ["x", "y"]),
        ("--realised=x --top 3", ["x"]),
        ("--realised=x --top 3 --realised y z", ["x", "y", "z"]),
    ],
)
def test_runs_are_found_however_they_are_given(given, runs):
    assert runs_asked(given.split()) == runs
