"""Run a function in several gloo processes of this machine."""

import faulthandler
import tempfile
import time
import warnings
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from common import distributed

HUNG = 240  # seconds


def _entry(rank, size, port, folder, function, arguments):
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
    told = open(f"{folder}/{rank}", "w")  # noqa: SIM115 - it is written to when nobody else can
    faulthandler.dump_traceback_later(HUNG - 10, file=told)
    world = distributed.start("cpu")
    try:
        function(world, *arguments)
    finally:
        distributed.stop()
        faulthandler.cancel_dump_traceback_later()


def launch(function, size, *arguments):
    """Call ``function(world, *arguments)`` in ``size`` processes; raise where one fails.

    A process forked from one with threads may inherit a lock that a thread held, and hang. Such a
    launch is ended, and made once more with a warning that tells where each thread was.
    """
    where = _launch(function, size, arguments)
    if where is None:
        return
    warnings.warn(f"{size} processes hung for {HUNG} seconds; once more\n{where}", stacklevel=2)
    where = _launch(function, size, arguments)
    if where is not None:
        raise TimeoutError(f"{size} processes hung for {HUNG} seconds, twice\n{where}")


def _launch(function, size, arguments):
    """Return where the processes hung; None: all ended in time."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    with tempfile.TemporaryDirectory() as folder:
        context = mp.start_processes(  # forks: imports no more
            _entry,
            (size, store.port, folder, function, arguments),
            nprocs=size,
            join=False,
            start_method="fork",
        )
        end = time.monotonic() + HUNG
        while not context.join(timeout=5):
            if time.monotonic() > end:
                for process in context.processes:
                    process.kill()
                texts = [(Path(folder) / f"{rank}").read_text() for rank in range(size)]
                return "\n".join(f"process {rank}:\n{text}" for rank, text in enumerate(texts))
    return None
