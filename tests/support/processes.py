"""Watching processes from outside."""

import time
from collections.abc import Iterable
from pathlib import Path


def is_running(pid: int) -> bool:
    """Return False for a process that is gone or only waits to be reaped."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
    return stat.rpartition(")")[2].split()[0] != "Z"


def wait_until_gone(pids: Iterable[int], *, timeout_seconds: float = 20.0) -> list[int]:
    """Return the processes that still run when all are gone or the time is over."""
    deadline = time.monotonic() + timeout_seconds
    left = list(pids)
    while left and time.monotonic() < deadline:
        left = [pid for pid in left if is_running(pid)]
        time.sleep(0.02)
    return left
