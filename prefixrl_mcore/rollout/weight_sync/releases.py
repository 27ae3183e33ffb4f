"""Releases of torch and NCCL, here and in the servers' environment."""

from pathlib import Path

import torch
import torch.distributed as dist
from torch.cuda import nccl

from prefixrl_mcore.rollout.sglang.environment import installed_version

_NCCL_PACKAGES = ("nvidia-nccl-cu13", "nvidia-nccl-cu12")


def own_torch() -> str:
    """Return the release of torch in this process."""
    return _handle_release(torch.__version__)


def torch_release(python: Path) -> str:
    """Return the release of torch in another interpreter's environment; empty if it has none."""
    return _handle_release(installed_version(python, "torch") or "")


def own_nccl() -> str:
    """Return the version of NCCL in this process; empty without it."""
    return ".".join(map(str, nccl.version())) if dist.is_nccl_available() else ""


def nccl_version(python: Path) -> str:
    """Return the version of NCCL in another environment; empty if it is in no package there."""
    found = (installed_version(python, package) for package in _NCCL_PACKAGES)
    return next(filter(None, found), "")


def _handle_release(version: str) -> str:
    """Return major and minor number: what a handle looks like does not change in between."""
    return ".".join(version.split("+")[0].split(".")[:2])
