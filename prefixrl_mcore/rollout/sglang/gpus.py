"""Which GPUs each server of this machine has, and their numbers in this process."""

import logging
import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from prefixrl_mcore.config.rollout import SGLangConfig
from prefixrl_mcore.config.server_gpus import server_gpus
from prefixrl_mcore.rollout.engine import EngineError

logger = logging.getLogger(__name__)


def gpus_of_servers(
    config: SGLangConfig, device: str, *, colocated: bool, num_trainer_ranks: int
) -> list[tuple[str, ...]]:
    """Return each child process's GPUs, as entries of CUDA_VISIBLE_DEVICES; empty on a CPU machine.

    Args:
        config: how many servers, of how many GPUs.
        device: ``cpu`` or ``cuda``.
        colocated: they take turns with the trainer on its GPUs.
        num_trainer_ranks: ranks on this machine, which have its first GPUs, one each.

    Raises:
        ConfigError: if there are too few, with the arithmetic.
    """
    if device == "cpu":
        return [()] * config.num_servers
    entries = _visible_gpus()
    numbers = server_gpus(
        config,
        colocated=colocated,
        num_trainer_ranks=num_trainer_ranks,
        num_gpus=len(entries),
    )
    placed = [tuple(entries[number] for number in of_one) for of_one in numbers]
    owners = {f"server {index}": gpus for index, gpus in enumerate(placed)}
    if num_trainer_ranks:
        owners = {"trainer": tuple(entries[:num_trainer_ranks]), **owners}
    logger.info(
        "GPUs of this machine: %s", "; ".join(f"{who} {','.join(g)}" for who, g in owners.items())
    )
    return placed


def gpu_numbers(gpus: Sequence[str]) -> tuple[int, ...] | None:
    """Return the numbers that this process has for a server's GPUs; None for a server without."""
    visible = _visible_gpus() if gpus else []
    return tuple(visible.index(gpu) for gpu in gpus) or None


def reported_gpus(server_info: Mapping[str, Any], *, url: str) -> tuple[int, ...] | None:
    """Return the GPU of each rank of a server that shares this run's; None for one without GPUs.

    A server numbers GPUs as its own CUDA_VISIBLE_DEVICES does, which must be this process's.

    Args:
        server_info: the server's arguments, as it reports them.
        url: the server's, for the error.

    Raises:
        EngineError: if this process has no GPU of such a number.
    """
    if server_info.get("device") != "cuda":
        return None
    first, step = int(server_info["base_gpu_id"]), int(server_info.get("gpu_id_step", 1))
    numbers = tuple(first + rank * step for rank in range(int(server_info["tp_size"])))
    visible = len(_visible_gpus())
    if max(numbers) >= visible:
        raise EngineError(
            f"SGLang: the server at {url} is on this machine and has GPUs "
            f"{', '.join(map(str, numbers))}, this process has {visible}; start both with the same "
            "CUDA_VISIBLE_DEVICES, and the server with --base-gpu-id"
        )
    return numbers


def _visible_gpus() -> list[str]:
    """Return the entries of CUDA_VISIBLE_DEVICES, in the order of this process's GPU numbers."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return [str(index) for index in range(torch.cuda.device_count())]
    return [entry.strip() for entry in visible.split(",") if entry.strip()]
