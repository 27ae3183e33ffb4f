"""Watching processes from outside."""

import os
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

import psutil


def is_running(pid: int) -> bool:
    """Return False for a process that is gone or only waits to be reaped."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
    return stat.rpartition(")")[2].split()[0] != "Z"


def pids_of_groups(groups: Iterable[int]) -> list[int]:
    """Return the processes of some process groups; others of the machine may come and go."""
    wanted, found = set(groups), list[int]()
    for pid in psutil.pids():
        with suppress(ProcessLookupError):
            if os.getpgid(pid) in wanted:
                found.append(pid)
    return found


def wait_until_gone(pids: Iterable[int], *, timeout_seconds: float = 60.0) -> list[int]:
    """Return the processes that still run when all are gone or the time is over."""
    deadline = time.monotonic() + timeout_seconds
    left = list(pids)
    while left and time.monotonic() < deadline:
        left = [pid for pid in left if is_running(pid)]
        time.sleep(0.02)
    return left
