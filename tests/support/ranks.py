"""Run a function on several CPU ranks over gloo."""

import datetime
import pickle
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

_TIMEOUT = datetime.timedelta(seconds=180)


def run_on_ranks[T](function: Callable[..., T], *args: object, world_size: int) -> list[T]:
    """Call ``function(rank, *args)`` in ``world_size`` processes and return their results.

    The processes have joined one gloo group. ``function`` must be defined at a module's top
    level; arguments and results must be picklable. An exception in one rank is raised here.
    """
    # Forked from a server that has imported the heavy packages once, and that has, unlike the
    # test process, neither threads nor a process group that a fork would leave half alive.
    mp.get_context("forkserver").set_forkserver_preload(["tests.support.ranks_preload"])
    with tempfile.TemporaryDirectory() as folder:
        mp.start_processes(
            _entry,
            args=(function, world_size, folder, args),
            nprocs=world_size,
            start_method="forkserver",
        )
        return [
            pickle.loads((Path(folder) / f"result-{rank}").read_bytes())
            for rank in range(world_size)
        ]


def _entry(
    rank: int,
    function: Callable[..., object],
    world_size: int,
    folder: str,
    args: tuple[object, ...],
) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=world_size,
        timeout=_TIMEOUT,
    )
    result = function(rank, *args)
    (Path(folder) / f"result-{rank}").write_bytes(pickle.dumps(result))
    dist.barrier()
    dist.destroy_process_group()
