"""Run a function in several gloo processes of this machine."""

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from common import distributed


def _entry(rank, size, port, function, arguments):
    import os

    os.environ |= {
        "RANK": str(rank),
        "WORLD_SIZE": str(size),
        "LOCAL_RANK": str(rank),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",  # the parent's, as under torchrun
    }
    torch.set_num_threads(1)
    world = distributed.start("cpu")
    try:
        function(world, *arguments)
    finally:
        distributed.stop()


def launch(function, size, *arguments):
    """Call ``function(world, *arguments)`` in ``size`` processes; raise where one fails."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    arguments = (size, store.port, function, arguments)
    mp.start_processes(_entry, arguments, nprocs=size, start_method="fork")  # imports no more
