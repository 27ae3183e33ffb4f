"""Storage that ends early."""

import resource
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


@contextmanager
def small_disk_at(folder: Path, *, mebibytes: int) -> Iterator[Path]:
    """Have a new folder be a file system of its own; the test needs the marker ``mount``."""
    folder.mkdir(parents=True)
    mount = ["mount", "-t", "tmpfs", "-o", f"size={mebibytes}m", "tmpfs", str(folder)]
    done = subprocess.run(mount, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"may not mount a file system: {done.stderr.strip()}")
    try:
        yield folder
    finally:  # lazily: a run that a failed test left may have files open
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


@contextmanager
def no_file_above(size_bytes: int) -> Iterator[None]:
    """Let the kernel refuse longer files, as a full disk would (EFBIG instead of ENOSPC)."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
