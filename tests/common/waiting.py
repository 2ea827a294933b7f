"""A run to be ended: in a module of its own, which processes import faster than the test."""

import time

from common.termination import Preempted, Termination


def train_for_a_minute(begun):
    """End by SIGTERM as a training does: its own run alone."""
    end = time.monotonic() + 60
    with Termination() as termination:
        begun.write_text("")
        while time.monotonic() < end:
            time.sleep(0.01)
            if termination.asked:
                raise Preempted("saved")
