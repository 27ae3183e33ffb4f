"""Which GPUs each server of this machine gets, and their numbers in this process."""

import os
from collections.abc import Sequence

import torch

from prefixrl_mcore.config.rollout import SGLangConfig
from prefixrl_mcore.rollout.engine import EngineError


def gpus_of_servers(config: SGLangConfig, device: str) -> list[tuple[str, ...]]:
    """Return each child process's GPUs, as entries of CUDA_VISIBLE_DEVICES; empty on a CPU machine.

    Raises:
        EngineError: if there are too few for all servers.
    """
    if device == "cpu":
        return [()] * config.num_servers
    entries, size = _visible_gpus(), config.tensor_parallel_size
    if config.num_servers * size > len(entries):
        raise EngineError(
            f"SGLang: {config.num_servers} server(s) of {size} GPU(s) each need "
            f"{config.num_servers * size} GPUs, this machine shows {len(entries)} "
            f"(CUDA_VISIBLE_DEVICES = {os.environ.get('CUDA_VISIBLE_DEVICES')!r}); lower "
            "rollout.sglang.num_servers or rollout.sglang.tensor_parallel_size"
        )
    return [tuple(entries[i * size : (i + 1) * size]) for i in range(config.num_servers)]


def gpu_numbers(gpus: Sequence[str]) -> tuple[int, ...] | None:
    """Return the numbers that this process has for a server's GPUs; None for a server without."""
    visible = _visible_gpus() if gpus else []
    return tuple(visible.index(gpu) for gpu in gpus) or None


def _visible_gpus() -> list[str]:
    """Return the entries of CUDA_VISIBLE_DEVICES, in the order of this process's GPU numbers."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return [str(index) for index in range(torch.cuda.device_count())]
    return [entry.strip() for entry in visible.split(",") if entry.strip()]
