"""What one node finds out about itself, GPUs apart."""

import os
import platform
import shutil
import socket
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from prefixrl_mcore.launch.slurm.precheck.gpus import check_gpus

_GIB = 2**30
_CACHE_SECONDS = 20.0
"""How long a network file system may show an old state of a folder."""

_POLL_SECONDS = 0.2
_SHARED_MEMORY = Path("/dev/shm")
_MODELS = ("model.path", "loss.reference_path")


def check_node(
    folder: Path, *, limits: dict[str, Any], canary: str, num_gpus: int, ports: Sequence[int]
) -> tuple[dict[str, Any], list[str]]:
    """Return facts and faults of this node.

    Args:
        folder: of this start's pre-check, in the job's folder.
        limits: of the site, by the names of ``PrecheckConfig``.
        canary: what the first node has written into the folder.
        num_gpus: GPUs that the job asked for on this node.
        ports: on which something is to listen here.
    """
    temporary = Path(tempfile.gettempdir())
    faults = [
        *check_canary(folder, canary),
        *check_ports(ports),
        *check_free(folder, "job_folder", limits["min_free_gib"]),
        *check_free(temporary, f"{temporary}", limits["min_temporary_gib"]),
        *check_free(_SHARED_MEMORY, "/dev/shm", limits["min_shared_memory_gib"]),
    ]
    gpu_facts, gpu_faults = check_gpus(
        num_gpus,
        max_memory_used_gib=limits["max_gpu_memory_used_gib"],
        probe_seconds=limits["timeout_seconds"] / 2,
    )
    return {"python": platform.python_version(), **gpu_facts}, [*faults, *gpu_faults]


def check_canary(folder: Path, canary: str, *, seconds: float = _CACHE_SECONDS) -> list[str]:
    """Return a fault unless the file of the first node is here, with its content."""
    file, deadline, content = folder / "canary", time.monotonic() + seconds, None
    while True:
        with suppress(OSError):
            content = file.read_text()
        if content == canary:
            return []
        if time.monotonic() > deadline:
            what = "is not there" if content is None else "is another one"
            return [f"job_folder is not shared: {file}, which the first node wrote, {what} here"]
        time.sleep(_POLL_SECONDS)


def check_needed(needed: Mapping[str, str], *, is_in_container: bool) -> list[str]:
    """Return the paths of the config that are not here, and links of them that lead nowhere.

    Args:
        needed: paths that the launching machine has, by setting.
        is_in_container: the remedy is a mount.
    """
    faults = []
    for name, text in needed.items():
        path = Path(text)
        missing = path if not path.exists() else _missing_target(path, name)
        if missing is None:
            continue
        what = "is not there" if missing == path else f"has a link to {missing}, which is not there"
        folder = missing if missing == path else missing.parent
        remedy = f'; container.mounts of the site lacks "{folder}:{folder}"'
        faults.append(f"{name} {path} {what}{remedy if is_in_container else ''}")
    return faults


def _missing_target(folder: Path, name: str) -> Path | None:
    """Return where the first broken link of a model's folder leads; None if there is none.

    Hugging Face's cache is folders of links to files that lie elsewhere.
    """
    if name not in _MODELS or not folder.is_dir():
        return None
    broken = (entry for entry in sorted(folder.iterdir()) if not entry.exists())
    return next((entry.resolve() for entry in broken), None)


def check_ports(ports: Iterable[int]) -> list[str]:
    """Return the ports of the job's plan that something listens on already."""
    faults = []
    for port in ports:
        with socket.socket() as tried:
            tried.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                tried.bind(("", port))
            except OSError as error:
                faults.append(f"port {port}, which the job needs, cannot be used: {error.strerror}")
    return faults


def check_free(folder: Path, name: str, min_gib: float) -> list[str]:
    """Return a fault if a folder's file system has less free, or cannot be asked."""
    existing = next((f for f in (folder, *folder.parents) if f.exists()), Path("/"))
    try:
        free = shutil.disk_usage(existing).free / _GIB
    except OSError as error:
        return [f"{name} {folder}: {error.strerror}"]
    if free < min_gib:
        return [f"{name} has {free:.2f} GiB free, {min_gib:g} are needed"]
    if not os.access(existing, os.W_OK):
        return [f"{name} cannot be written"]
    return []
