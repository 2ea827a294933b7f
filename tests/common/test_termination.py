"""SIGTERM to a process that started others."""

import multiprocessing
import os
import signal
import time

from common.termination import EXIT_STATUS, Termination, handed_to_children


def in_a_child(work):
    child = os.fork()
    if not child:
        os._exit(work())
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def wait_to_be_asked(ready, first):
    with Termination() as termination:
        ready.wait()
        if first:
            os.kill(os.getppid(), signal.SIGTERM)
        while not termination.asked:
            time.sleep(0.01)
    os._exit(EXIT_STATUS)


def test_sigterm_is_handed_to_all_children():
    def work():
        fork = multiprocessing.get_context("fork")
        ready = fork.Barrier(2)
        started = [fork.Process(target=wait_to_be_asked, args=(ready, k == 0)) for k in (0, 1)]
        with handed_to_children():
            for child in started:
                child.start()
            for child in started:
                child.join()
        return 0 if [child.exitcode for child in started] == [EXIT_STATUS] * 2 else 1

    assert in_a_child(work) == 0


def test_without_children_sigterm_has_its_usual_effect():
    def work():
        with handed_to_children():
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(10)

    assert in_a_child(work) == -signal.SIGTERM
