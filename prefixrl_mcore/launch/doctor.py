"""``prefixrl doctor``: what is installed and usable here, and what to do about the rest.

Nothing heavy is imported in this process: versions are read from the packages' metadata, and one
child process tries the imports.
"""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from prefixrl_mcore.rollout.sglang.environment import installed_version, setup_command
from prefixrl_mcore.rollout.sglang.protocol import is_supported, supported_range

_GIB = 1024**3

MIN_SHARED_MEMORY_BYTES = _GIB
"""Of /dev/shm: NCCL and gloo pass messages through it."""

MIN_DISK_BYTES = 12 * _GIB
"""For both environments; a run needs its checkpoints on top."""

_REQUIRED_PACKAGES = ("torch", "megatron-core", "transformers", "triton", "math-verify")
_SETUP_REMEDY = "make setup, or pip install . in a checkout"
_TE_REMEDY = "on GPUs: make setup-te, or pip install '.[te]' in a checkout (compiled with nvcc)"
_PROBE_SECONDS = 300.0

_PROBE = """
import contextlib, json, sys, warnings
warnings.simplefilter("ignore")
with contextlib.redirect_stdout(sys.stderr):
    import torch, transformers, megatron.core, prefixrl_kernels.head
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
print(json.dumps(gpus))
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """One line of the report."""

    subject: str
    """What was looked at."""

    is_ok: bool
    """Whether it is as it should be, or not needed."""

    detail: str
    """What was found."""

    remedy: str = ""
    """What to do, or what could be done; empty where there is nothing."""


def examine(sglang_python: Path, folder: Path) -> list[Finding]:
    """Return what is installed and usable.

    Args:
        sglang_python: interpreter of SGLang's environment.
        folder: where environments and runs are to be; its disk is looked at.
    """
    checks: list[Callable[[], Finding]] = [
        _python,
        *(lambda name=name: _package(name) for name in _REQUIRED_PACKAGES),
        _transformer_engine,
        _imports,
        lambda: _sglang(sglang_python),
        lambda: _free("shared memory", Path("/dev/shm"), MIN_SHARED_MEMORY_BYTES),
        lambda: _free("disk", folder, MIN_DISK_BYTES),
    ]
    return [check() for check in checks]


def make_sglang_environment(sglang_python: Path) -> int:
    """Make or complete SGLang's environment with the script of this package; return its exit code.

    Raises:
        ValueError: if there is no uv, or ``sglang_python`` is not FOLDER/bin/python.
    """
    folder = sglang_python.absolute().parent.parent
    if sglang_python.absolute() != folder / "bin" / "python":
        raise ValueError(
            f"--sglang-python must be FOLDER/bin/python for --fix to make FOLDER, got "
            f"{sglang_python}"
        )
    command = setup_command(find_uv(), Path(sys.executable), folder)
    return subprocess.run(command, check=False).returncode


def find_uv() -> Path:
    """Return uv: of the PATH, of this environment, or of the checkout.

    Raises:
        ValueError: if there is none.
    """
    found = shutil.which("uv")
    candidates = [Path(sys.executable).with_name("uv"), Path(".uv/bin/uv").absolute()]
    for path in [Path(found)] if found else candidates:
        if os.access(path, os.X_OK):
            return path
    raise ValueError(
        f"SGLang's environment is made with uv, which is not on the PATH and not in "
        f"{', '.join(str(path.parent) for path in candidates)}; pip install uv"
    )


def _python() -> Finding:
    version = ".".join(str(number) for number in sys.version_info[:3])
    is_ok = sys.version_info[:2] == (3, 12)
    return Finding(
        subject="python",
        is_ok=is_ok,
        detail=f"{version}, {sys.executable}",
        remedy="" if is_ok else "make an environment of Python 3.12",
    )


def _package(name: str) -> Finding:
    try:
        version = metadata.version(name)
    except metadata.PackageNotFoundError:
        return Finding(subject=name, is_ok=False, detail="missing", remedy=_SETUP_REMEDY)
    return Finding(subject=name, is_ok=True, detail=version)


def _transformer_engine() -> Finding:
    """Tell of it; a trainer without it is complete."""
    found = _package("transformer-engine")
    if found.is_ok:
        return found
    return Finding(
        subject=found.subject,
        is_ok=True,
        detail="not installed; the local layers are used",
        remedy=_TE_REMEDY,
    )


def _imports() -> Finding:
    """Try the imports, and see the GPUs, in a process of its own: some failures end a process."""
    try:
        done = subprocess.run(
            [sys.executable, "-c", _PROBE],
            capture_output=True,
            text=True,
            timeout=_PROBE_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        detail = f"imports took more than {_PROBE_SECONDS:.0f} s"
        return Finding(subject="GPU", is_ok=False, detail=detail, remedy="is the disk too slow?")
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or ["no output"])[-1]
        return Finding(
            subject="GPU", is_ok=False, detail=f"imports fail: {last}", remedy=_SETUP_REMEDY
        )
    gpus = json.loads(done.stdout)
    detail = ", ".join(gpus) if gpus else "none that PyTorch sees; everything runs on the CPU"
    return Finding(subject="GPU", is_ok=True, detail=detail)


def _sglang(python: Path) -> Finding:
    version = installed_version(python, "sglang")
    if version is None:
        return Finding(
            subject="SGLang",
            is_ok=False,
            detail=f"no environment with SGLang at {python}; rollouts would fall back to "
            "transformers",
            remedy="prefixrl doctor --fix, or make setup-sglang",
        )
    is_ok = is_supported(version)
    return Finding(
        subject="SGLang",
        is_ok=is_ok,
        detail=f"{version}, {python}; supported: {supported_range()}",
        remedy="" if is_ok else "prefixrl doctor --fix",
    )


def _free(subject: str, folder: Path, min_bytes: int) -> Finding:
    """Compare the free space of a file system with what is needed."""
    try:
        num_bytes = shutil.disk_usage(folder).free
    except OSError as error:
        return Finding(
            subject=subject, is_ok=False, detail=f"{folder}: {error.strerror}", remedy="mount it"
        )
    detail = f"{num_bytes / _GIB:.1f} GiB free in {folder}"
    if num_bytes >= min_bytes:
        return Finding(subject=subject, is_ok=True, detail=detail)
    return Finding(
        subject=subject,
        is_ok=False,
        detail=detail,
        remedy=f"free {(min_bytes - num_bytes) / _GIB:.1f} GiB"
        + (", or start the container with a larger --shm-size" if "shm" in str(folder) else ""),
    )
