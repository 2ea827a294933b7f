"""Run a function in several gloo processes of this machine."""

import faulthandler
import sys
import time
import warnings

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from common import distributed

HUNG = 240  # seconds


def _entry(rank, size, port, function, arguments):
    import os

    os.environ |= {
        "RANK": str(rank),
        "WORLD_SIZE": str(size),
        "LOCAL_RANK": str(rank),
        "LOCAL_WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",  # the parent's, as under torchrun
    }
    torch.set_num_threads(1)
    faulthandler.dump_traceback_later(HUNG - 10, file=sys.__stderr__)
    world = distributed.start("cpu")
    try:
        function(world, *arguments)
    finally:
        distributed.stop()
        faulthandler.cancel_dump_traceback_later()


def launch(function, size, *arguments):
    """Call ``function(world, *arguments)`` in ``size`` processes; raise where one fails.

    A process forked from one with threads may inherit a lock that a thread held, and hang. Such a
    launch tells where each thread is, is ended, and made once more with a warning.
    """
    if _launch(function, size, arguments):
        return
    warnings.warn(f"{size} processes hung for {HUNG} seconds; once more", stacklevel=2)
    if not _launch(function, size, arguments):
        raise TimeoutError(f"{size} processes hung for {HUNG} seconds, twice")


def _launch(function, size, arguments):
    """Return whether all processes ended in time."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    arguments = (size, store.port, function, arguments)
    context = mp.start_processes(  # forks: imports no more
        _entry, arguments, nprocs=size, join=False, start_method="fork"
    )
    end = time.monotonic() + HUNG
    while not context.join(timeout=5):
        if time.monotonic() > end:
            for process in context.processes:
                process.kill()
            return False
    return True
