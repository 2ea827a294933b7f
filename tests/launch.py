"""Run a function in several gloo processes of this machine."""

import socket

import torch
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
    }
    torch.set_num_threads(1)
    world = distributed.start("cpu")
    try:
        function(world, *arguments)
    finally:
        distributed.stop()


def launch(function, size, *arguments):
    """Call ``function(world, *arguments)`` in ``size`` processes; raise where one fails."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(_entry, (size, port, function, arguments), nprocs=size)
