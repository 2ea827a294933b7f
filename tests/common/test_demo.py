"""Runs side by side."""

import multiprocessing

from common.demo import side_by_side


def method():
    return multiprocessing.get_start_method()


def test_a_run_starts_its_readers_as_the_caller_would():
    with side_by_side(1, 1) as workers:
        found = workers.run("asked", method, {"a": ()})
    assert found == {"a": method()} == {"a": multiprocessing.get_all_start_methods()[0]}
