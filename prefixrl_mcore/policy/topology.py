"""The processes of the trainer: torch.distributed, Megatron's parallel groups, who is who.

A single process needs nothing from the environment. Several processes are started by a launcher
that sets ``RANK``, ``WORLD_SIZE``, ``LOCAL_RANK``, ``MASTER_ADDR`` and ``MASTER_PORT`` (torchrun,
srun with our template), or join a process group that exists already (tests).
"""

import datetime
import gc
import logging
import os
import pickle
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel import random as megatron_random

from prefixrl_mcore.config.layout import check_supported
from prefixrl_mcore.config.policy import ParallelConfig
from prefixrl_mcore.policy import cpu_runtime

logger = logging.getLogger(__name__)

_DEFAULT_GROUP_TIMEOUT = datetime.timedelta(hours=24)
"""The default group carries ``run_on_first``, in which ranks wait while rank 0 samples rollouts or
evaluates; a rank that dies is noticed at once all the same. Megatron's groups keep 30 minutes."""


FROM_FIRST = "raised on rank 0, which did this for all ranks"
"""Note of an error that ``run_on_first`` passed on to another rank."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Topology:
    """This process's place among the trainer's ranks."""

    rank: int
    """Global rank, from 0."""

    world_size: int
    """Trainer ranks in all."""

    tp_rank: int
    """Rank in the tensor-parallel group."""

    tp_size: int
    """Ranks that share each weight matrix."""

    pp_rank: int
    """Pipeline stage, from 0."""

    pp_size: int
    """Pipeline stages."""

    cp_rank: int
    """Rank in the context-parallel group."""

    cp_size: int
    """Ranks that share each sequence."""

    ep_size: int
    """Ranks that share the experts of a layer."""

    etp_size: int
    """Ranks that share the matrices of an expert."""

    dp_rank: int
    """Which replica of the model this rank belongs to."""

    dp_size: int
    """Replicas of the model; each takes its share of a batch's streams."""

    device: torch.device
    """Where this rank's tensors live."""

    @property
    def is_first(self) -> bool:
        """Return whether this is global rank 0, which writes files and talks to engines."""
        return self.rank == 0

    @property
    def is_last_stage(self) -> bool:
        """Return whether this rank holds the language-model head."""
        return self.pp_rank == self.pp_size - 1


def initialize(
    parallel: ParallelConfig, *, seed: int, environment: Mapping[str, str] | None = None
) -> Topology:
    """Join the process group, build Megatron's groups and seed its random states.

    All ranks must call this. Calling it again with the same layout returns the same topology.

    Args:
        parallel: the layout; its ``world_size`` must be the number of processes.
        seed: seed of Megatron's random states (dropout, initial weights).
        environment: variables of the launcher; None reads the process's own.

    Raises:
        ValueError: if the layout does not fit the number of processes, or another layout was
            initialized before in this process.
    """
    cpu_runtime.install()
    environment = os.environ if environment is None else environment
    check_supported(parallel)
    _check_world_size(parallel, _world_size(environment))
    device = _select_device(environment)
    if not dist.is_initialized():
        # Megatron's data-parallel wrapper is part of reference cycles (its hooks), and holds the
        # groups that were shut down, with about 70 open sockets and files.
        gc.collect()
        _join(environment, device)
    if parallel_state.model_parallel_is_initialized():
        _check_same_layout(parallel)
    else:
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=parallel.tensor_model_parallel_size,
            pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
            virtual_pipeline_model_parallel_size=parallel.virtual_pipeline_model_parallel_size,
            context_parallel_size=parallel.context_parallel_size,
            expert_model_parallel_size=parallel.expert_model_parallel_size,
            expert_tensor_parallel_size=parallel.expert_tensor_parallel_size,
        )
        with cpu_runtime.megatron_on_cpu():
            megatron_random.model_parallel_cuda_manual_seed(seed, force_reset_rng=True)
        logger.info("rank %d of %d on %s", dist.get_rank(), dist.get_world_size(), device)
    return current(device)


def current(device: torch.device | None = None) -> Topology:
    """Return this process's place; ``initialize`` must have been called.

    Raises:
        RuntimeError: if there is no initialized layout.
    """
    if not parallel_state.model_parallel_is_initialized():
        raise RuntimeError("topology: no parallel layout yet; call topology.initialize first")
    return Topology(
        rank=dist.get_rank(),
        world_size=dist.get_world_size(),
        tp_rank=parallel_state.get_tensor_model_parallel_rank(),
        tp_size=parallel_state.get_tensor_model_parallel_world_size(),
        pp_rank=parallel_state.get_pipeline_model_parallel_rank(),
        pp_size=parallel_state.get_pipeline_model_parallel_world_size(),
        cp_rank=parallel_state.get_context_parallel_rank(),
        cp_size=parallel_state.get_context_parallel_world_size(),
        ep_size=parallel_state.get_expert_model_parallel_world_size(),
        etp_size=parallel_state.get_expert_tensor_parallel_world_size() or 1,
        dp_rank=parallel_state.get_data_parallel_rank(),
        dp_size=parallel_state.get_data_parallel_world_size(),
        device=device or cpu_runtime.device(),
    )


def num_local_ranks(environment: Mapping[str, str] | None = None) -> int:
    """Return the ranks on this machine, which have its first GPUs.

    Args:
        environment: variables of the launcher; None reads the process's own.
    """
    environment = os.environ if environment is None else environment
    return int(environment.get("LOCAL_WORLD_SIZE", environment.get("WORLD_SIZE", "1")))


def shut_down() -> None:
    """Leave Megatron's groups and the process group; a no-op when there are none.

    All ranks must call this. Models built before are of no use afterwards.
    """
    if parallel_state.model_parallel_is_initialized():
        parallel_state.destroy_model_parallel()
    if dist.is_initialized():
        dist.destroy_process_group()


def run_on_first[T](function: Callable[[], T]) -> T:
    """Run ``function`` on rank 0 only and return its (picklable) result on every rank.

    All ranks must call this. Without a process group, or with a single rank, it is a plain call.

    Raises:
        Exception: whatever ``function`` raised on rank 0, on every rank; as a ``RuntimeError``
            with the same text on the other ranks if it cannot be pickled. ``is_from_first`` tells
            it from an error of the rank itself.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return function()
    if dist.get_rank() == 0:
        return _run_and_send(function)
    message: list[bytes] = [b""]
    dist.broadcast_object_list(message, src=0)
    result, error = pickle.loads(message[0])
    if error is not None:
        error.add_note(FROM_FIRST)
        raise error
    return result


def is_from_first(error: BaseException) -> bool:
    """Return whether another rank's ``run_on_first`` raised ``error``, passed on to this one."""
    return FROM_FIRST in getattr(error, "__notes__", ())


def any_rank(flag: bool) -> bool:
    """Return whether ``flag`` is true on any rank; all ranks must call this."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return flag
    flags = torch.tensor([int(flag)], dtype=torch.int32)
    dist.all_reduce(flags, op=dist.ReduceOp.MAX)
    return bool(flags.item())


def gather_floats(values: Sequence[float]) -> np.ndarray:
    """Return [world size, num_values] float64: the values of every rank; all ranks call this.

    ``values`` has equally many entries on every rank.
    """
    mine = torch.tensor(values, dtype=torch.float64)
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return mine[None].numpy()
    gathered = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(gathered, mine)
    return torch.stack(gathered).numpy()


def gather_objects[T](value: T) -> list[T]:
    """Return the (picklable) value of every rank, by rank; all ranks must call this."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return [value]
    values: list[T] = [value] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def _run_and_send[T](function: Callable[[], T]) -> T:
    """Run ``function``, send its result or its exception to the other ranks, and pass it on."""
    try:
        result = function()
        message = pickle.dumps((result, None))  # before the broadcast: it may fail
    except BaseException as error:  # the others wait in the broadcast, whatever went wrong
        dist.broadcast_object_list([pickle.dumps((None, _picklable(error)))], src=0)
        raise
    dist.broadcast_object_list([message], src=0)
    return result


def _picklable(error: BaseException) -> BaseException:
    """Return ``error`` if it survives pickling, otherwise a RuntimeError with its text."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:  # any class may fail to pickle in its own way
        return RuntimeError(f"rank 0 raised {type(error).__name__}: {error}")
    return error


def _world_size(environment: Mapping[str, str]) -> int:
    """Return the number of processes: of the group if there is one, else of the launcher."""
    if dist.is_initialized():
        return dist.get_world_size()
    return int(environment.get("WORLD_SIZE", "1"))


def _check_world_size(parallel: ParallelConfig, world_size: int) -> None:
    """Refuse a layout that needs another number of processes."""
    if parallel.world_size != world_size:
        raise ValueError(
            f"policy.parallel needs {parallel.world_size} processes (tensor "
            f"{parallel.tensor_model_parallel_size} x pipeline "
            f"{parallel.pipeline_model_parallel_size} x context {parallel.context_parallel_size} "
            f"x data {parallel.data_parallel_size}), got {world_size}; start as many processes, "
            "or change policy.parallel"
        )


def _check_same_layout(parallel: ParallelConfig) -> None:
    """Refuse a second, different layout in one process."""
    wanted = (
        parallel.tensor_model_parallel_size,
        parallel.pipeline_model_parallel_size,
        parallel.virtual_pipeline_model_parallel_size,
        parallel.context_parallel_size,
        parallel.expert_model_parallel_size,
        parallel.expert_tensor_parallel_size,
    )
    got = (
        parallel_state.get_tensor_model_parallel_world_size(),
        parallel_state.get_pipeline_model_parallel_world_size(),
        parallel_state.get_virtual_pipeline_model_parallel_world_size(),
        parallel_state.get_context_parallel_world_size(),
        parallel_state.get_expert_model_parallel_world_size(),
        parallel_state.get_expert_tensor_parallel_world_size(),
    )
    if wanted != got:
        raise ValueError(
            "policy.parallel (tensor, pipeline, virtual pipeline, context, expert, expert tensor) "
            f"= {wanted}, but this process already runs {got}; call topology.shut_down first"
        )


def _select_device(environment: Mapping[str, str]) -> torch.device:
    """Make this rank's GPU the current one and return it; the CPU without CUDA."""
    if torch.cuda.is_available():
        local_rank = int(environment.get("LOCAL_RANK", environment.get("RANK", "0")))
        torch.cuda.set_device(local_rank % torch.cuda.device_count())
    return cpu_runtime.device()


def _join(environment: Mapping[str, str], device: torch.device) -> None:
    """Create the default process group."""
    # Objects and CPU tensors go over gloo on GPU machines too.
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    if int(environment.get("WORLD_SIZE", "1")) == 1:
        dist.init_process_group(
            backend, store=dist.HashStore(), rank=0, world_size=1, timeout=_DEFAULT_GROUP_TIMEOUT
        )
        return
    missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if name not in environment]
    if missing:
        raise ValueError(
            f"WORLD_SIZE is {environment['WORLD_SIZE']} but {', '.join(missing)} not set; "
            "start the ranks with torchrun or the slurm launcher"
        )
    address, port = environment["MASTER_ADDR"], environment["MASTER_PORT"]
    dist.init_process_group(
        backend,
        init_method=f"tcp://{address}:{port}",
        rank=int(environment["RANK"]),
        world_size=int(environment["WORLD_SIZE"]),
        timeout=_DEFAULT_GROUP_TIMEOUT,
    )
