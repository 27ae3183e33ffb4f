"""Where a measurement was made: device, driver, versions, commit."""

import os
import platform
import re
import subprocess
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import torch

_QUERY_TIMEOUT_SECONDS = 10.0

_ALLOCATOR_VARIABLES = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF")
_GROWING_SEGMENTS = "expandable_segments:True"

PACKAGES = (
    "torch",
    "triton",
    "liger-kernel",
    "cut-cross-entropy",
    "megatron-core",
    "quack-kernels",
    "nvidia-cutlass-dsl",
    "numpy",
)
"""Distributions whose versions are recorded."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Environment:
    """One machine as a run found it. Nothing of it is set by the benchmark."""

    device: str
    """Name of the GPU."""

    device_kind: str
    """Type of PyTorch device: ``cuda``."""

    memory_bytes: int
    """Device memory."""

    num_multiprocessors: int
    """Multiprocessors of the device."""

    l2_cache_bytes: int
    """Size of the L2 cache."""

    compute_capability: str
    """As ``9.0``."""

    driver: str | None
    """Version of the driver; None where it cannot be read."""

    cuda: str | None
    """Version of CUDA that PyTorch was built with."""

    power_limit_watts: float | None
    """Power limit in force; None where it cannot be read."""

    platform: str
    """Operating system and processor."""

    python: str
    """Version of the interpreter."""

    packages: dict[str, str | None]
    """Distribution -> version; None when it is not installed."""

    git_commit: str | None
    """Commit of this repository; None outside a checkout."""

    has_local_changes: bool | None
    """Whether tracked files differ from the commit; None outside a checkout."""

    allocator: str | None
    """Settings of PyTorch's CUDA allocator."""

    allows_tf32: bool
    """Whether float32 matrix products may use TF32, as some peer's do in float32."""


def map_memory_in_growing_segments() -> None:
    """Have the CUDA allocator map memory in segments that grow, unless the user has settings.

    Contestants of different sizes take turns, and segments of fixed size would make each of them
    wait for cudaMalloc in its timed turn. The variable is for the record.
    """
    if not any(name in os.environ for name in _ALLOCATOR_VARIABLES):
        os.environ[_ALLOCATOR_VARIABLES[-1]] = _GROWING_SEGMENTS
        torch._C._accelerator_setAllocatorSettings(_GROWING_SEGMENTS)


def describe(device: torch.device, commit: str | None = None) -> Environment:
    """Return where this process runs.

    Args:
        device: the CUDA device that is measured.
        commit: commit of the code, for a copy without its repository; None asks git.
    """
    properties = torch.cuda.get_device_properties(device)
    driver, power_limit = query_device("driver_version", "power.limit", device=device)
    found, has_changes = _git_state()
    return Environment(
        device=properties.name,
        device_kind=device.type,
        memory_bytes=properties.total_memory,
        num_multiprocessors=properties.multi_processor_count,
        l2_cache_bytes=properties.L2_cache_size,
        compute_capability=f"{properties.major}.{properties.minor}",
        driver=driver,
        cuda=torch.version.cuda,
        power_limit_watts=as_number(power_limit),
        platform=f"{platform.system()} {platform.release()} {platform.machine()}",
        python=platform.python_version(),
        packages={name: installed_version(name) for name in PACKAGES},
        git_commit=commit or found,
        has_local_changes=has_changes,
        allocator=next(
            (os.environ[name] for name in _ALLOCATOR_VARIABLES if name in os.environ), None
        ),
        allows_tf32=bool(torch.backends.cuda.matmul.allow_tf32),
    )


def slug(text: str) -> str:
    """Return a text as lower-case words joined by hyphens, for a file name."""
    return "-".join(re.findall(r"[a-z0-9]+", text.lower()))


def installed_version(distribution: str) -> str | None:
    """Return the version of an installed distribution, or None."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def query_device(*fields: str, device: torch.device) -> tuple[str | None, ...]:
    """Return fields of ``nvidia-smi --query-gpu`` as text; None where they cannot be read."""
    uuid = torch.cuda.get_device_properties(device).uuid
    command = [
        "nvidia-smi",
        f"--id=GPU-{uuid}",
        f"--query-gpu={','.join(fields)}",
        "--format=csv,noheader,nounits",
    ]
    output = _output(command)
    values = [] if output is None else [value.strip() for value in output.split(",")]
    if len(values) != len(fields):
        return (None,) * len(fields)
    return tuple(values)


def as_number(text: str | None) -> float | None:
    """Return a reading as a number; None for ``[N/A]`` and its like."""
    try:
        return None if text is None else float(text)
    except ValueError:
        return None


def _git_state() -> tuple[str | None, bool | None]:
    """Return the commit and whether tracked files differ from it."""
    folder = str(Path(__file__).parent)
    commit = _output(["git", "-C", folder, "rev-parse", "HEAD"])
    if commit is None:
        return None, None
    changes = _output(["git", "-C", folder, "status", "--porcelain", "--untracked-files=no"])
    return commit, None if changes is None else bool(changes)


def _output(command: list[str]) -> str | None:
    """Return what a command prints, or None when it is missing or fails."""
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            check=True,
            timeout=_QUERY_TIMEOUT_SECONDS,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
