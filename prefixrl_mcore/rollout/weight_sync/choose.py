"""Which transport a run uses, and why."""

import logging
from importlib.metadata import distributions
from pathlib import Path

import torch

from prefixrl_mcore.config.rollout import SyncConfig
from prefixrl_mcore.rollout.weight_sync.disk import Disk
from prefixrl_mcore.rollout.weight_sync.distributed import Broadcast
from prefixrl_mcore.rollout.weight_sync.tensor import TensorByHandle, TensorByValue
from prefixrl_mcore.rollout.weight_sync.transport import Transport

logger = logging.getLogger(__name__)


def choose_transport(
    config: SyncConfig, *, device: str, server_python: Path | None, folder: Path
) -> Transport:
    """Return the transport that ``config`` names, or the fastest that works; log which and why.

    Args:
        config: ``rollout.sglang.sync``.
        device: of the servers, ``cpu`` or ``cuda``.
        server_python: interpreter of servers on this machine that this trainer starts; None for
            servers that run elsewhere.
        folder: of the run; gets the files of the transport ``disk``.
    """
    transport, reason = _choose(config, device, server_python, folder)
    logger.info("weight sync: %s, because %s", transport.name, reason)
    return transport


def _choose(
    config: SyncConfig, device: str, server_python: Path | None, folder: Path
) -> tuple[Transport, str]:
    kind, reason = config.transport, "rollout.sglang.sync.transport says so"
    if kind is None and device == "cuda" and server_python is None:
        kind, reason = "distributed", "the servers have GPUs and run elsewhere"
    elif kind is None:
        kind, reason = "tensor", f"the servers run on this machine's {device}"
        if server_python is None:
            reason = "the servers have no GPU"
    limit = config.timeout_seconds
    if kind == "disk":
        return Disk(config.folder or folder, timeout_seconds=limit), reason
    if kind == "distributed":
        backend = "nccl" if device == "cuda" else "gloo"
        return Broadcast(backend, timeout_seconds=limit), reason
    obstacle = _obstacle_to_handles(device, server_python)
    if not obstacle:
        return TensorByHandle(timeout_seconds=limit), reason
    return TensorByValue(timeout_seconds=limit), f"{reason}; no GPU handles: {obstacle}"


def _obstacle_to_handles(device: str, server_python: Path | None) -> str:
    """Return why GPU memory cannot be shared with the servers, or nothing.

    What torch writes into a handle is its own affair, so both sides must have the same release.
    """
    if device != "cuda":
        return "no GPU"
    if server_python is None:
        return "the servers run elsewhere"
    theirs, ours = torch_release(server_python), _release(torch.__version__)
    if theirs != ours:
        return f"the servers have torch {theirs or 'of unknown version'}, the trainer {ours}"
    return ""


def torch_release(python: Path) -> str:
    """Return the release of torch in another interpreter's environment; empty if it has none."""
    folders = python.parent.parent.glob("lib/python3.*/site-packages")
    for found in distributions(name="torch", path=[str(folder) for folder in folders]):
        return _release(found.version)
    return ""


def _release(version: str) -> str:
    """Return major and minor number: what a handle looks like does not change in between."""
    return ".".join(version.split("+")[0].split(".")[:2])
