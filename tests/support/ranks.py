"""Run a function on several ranks: over NCCL where every rank has a GPU, otherwise on the CPU.

``PREFIXRL_TEST_RANKS=cpu`` keeps ranks off the GPUs. The path over NCCL has not been run yet.
"""

import datetime
import os
import pickle
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

_TIMEOUT = datetime.timedelta(seconds=180)


def run_on_ranks[T](function: Callable[..., T], *args: object, world_size: int) -> list[T]:
    """Call ``function(rank, *args)`` in ``world_size`` processes and return their results.

    The processes have joined one group. ``function`` must be defined at a module's top level;
    arguments and results must be picklable. Results come back on the CPU. An exception in one rank
    is raised here.
    """
    # Without CUDA, forked from a server that has imported the heavy packages once, and that has,
    # unlike the test process, neither threads nor a process group that a fork would leave half
    # alive. A fork cannot use CUDA after its parent asked for it.
    has_cuda, has_gpus = torch.cuda.is_available(), _has_gpu_each(world_size)
    mp.get_context("forkserver").set_forkserver_preload(["tests.support.ranks_preload"])
    with tempfile.TemporaryDirectory() as folder, _hidden_gpus(has_cuda and not has_gpus):
        mp.start_processes(
            _entry,
            args=(function, world_size, has_gpus, folder, args),
            nprocs=world_size,
            start_method="spawn" if has_cuda else "forkserver",
        )
        return [
            torch.load(Path(folder) / f"result-{rank}", map_location="cpu", weights_only=False)
            for rank in range(world_size)
        ]


def _has_gpu_each(world_size: int) -> bool:
    """Return whether there is a GPU for every rank, and they may be used."""
    is_allowed = os.environ.get("PREFIXRL_TEST_RANKS") != "cpu"
    return is_allowed and torch.cuda.device_count() >= world_size


@contextmanager
def _hidden_gpus(is_hidden: bool) -> Iterator[None]:
    """Let processes that start inside see no GPU, and Triton run its kernels on the CPU."""
    before = dict(os.environ)
    if is_hidden:
        os.environ.update({"CUDA_VISIBLE_DEVICES": "", "TRITON_INTERPRET": "1"})
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def _entry(
    rank: int,
    function: Callable[..., object],
    world_size: int,
    has_gpus: bool,
    folder: str,
    args: tuple[object, ...],
) -> None:
    torch.set_num_threads(1)
    if has_gpus:
        os.environ["LOCAL_RANK"] = str(rank)
        torch.cuda.set_device(rank)
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if has_gpus else "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=world_size,
        timeout=_TIMEOUT,
    )
    result = function(rank, *args)
    torch.save(result, Path(folder) / f"result-{rank}", pickle_protocol=pickle.HIGHEST_PROTOCOL)
    dist.barrier()
    dist.destroy_process_group()
