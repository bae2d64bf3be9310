"""Several gloo ranks on this machine, forked from one process that has imported everything."""

import os
import socket
import traceback
from collections.abc import Callable

import torch


def run_ranks(function: Callable, *arguments, ranks: int = 2) -> None:
    """Call `function(*arguments)` on each of `ranks` processes, as torchrun would start them; fails if one fails."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.start_processes(
        _rank, args=(ranks, port, function, arguments), nprocs=ranks, start_method="fork"
    )


def _rank(rank: int, ranks: int, port: int, function: Callable, arguments: tuple) -> None:
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(ranks),
        "LOCAL_WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    torch.set_num_threads(1)
    try:
        function(*arguments)
    except BaseException:
        traceback.print_exc()
        raise
