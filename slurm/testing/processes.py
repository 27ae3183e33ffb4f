"""Daemons that are started, remembered by process id and start time, and ended by them alone."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

_POLL_SECONDS = 0.05


class Daemons:
    """The processes of a cluster, in the order of their start."""

    def __init__(self, folder: Path) -> None:
        """Read what an earlier command started in the cluster's folder."""
        self._file = folder / "pids.json"
        self._logs = folder / "log"
        self._started: list[dict[str, object]] = []
        if self._file.exists():
            self._started = json.loads(self._file.read_text())

    def start(
        self, name: str, command: Sequence[str], *, environment: Mapping[str, str] | None = None
    ) -> None:
        """Start a daemon in the foreground of a session of its own; its output is logged."""
        with (self._logs / f"{name}.out").open("ab") as log:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={**os.environ, **(environment or {})},
                start_new_session=True,
            )
        self._started.append({"name": name, "pid": process.pid, "start": _start_of(process.pid)})
        self._write()

    def alive(self) -> list[str]:
        """Return the names of those that run."""
        return [str(daemon["name"]) for daemon in self._started if _is_alive(daemon)]

    def pid_of(self, name: str) -> int | None:
        """Return the process id of a daemon that runs; None if it does not."""
        for daemon in self._started:
            if daemon["name"] == name and _is_alive(daemon):
                return int(str(daemon["pid"]))
        return None

    def kill(self, name: str) -> None:
        """End a daemon with SIGKILL, wait until it is gone, and forget it."""
        pid = self.pid_of(name)
        if pid is not None:
            os.kill(pid, signal.SIGKILL)
            _wait(lambda: self.pid_of(name) is None, 10.0)
        self._forget([daemon for daemon in self._started if daemon["name"] == name])

    def stop(self, prefix: str, *, seconds: float = 10.0) -> None:
        """End the daemons whose name begins with ``prefix``: SIGTERM, and SIGKILL in the end."""
        chosen = [d for d in self._started if str(d["name"]).startswith(prefix)]
        for number in (signal.SIGTERM, signal.SIGKILL):
            for daemon in chosen:
                if _is_alive(daemon):
                    with suppress(ProcessLookupError):
                        os.kill(int(str(daemon["pid"])), number)
            if _wait(lambda: not any(map(_is_alive, chosen)), seconds):
                break
        self._forget(chosen)

    def _forget(self, daemons: Sequence[dict[str, object]]) -> None:
        """Remember the others only."""
        self._started = [daemon for daemon in self._started if daemon not in daemons]
        self._write()

    def _write(self) -> None:
        self._file.write_text(json.dumps(self._started, indent=2) + "\n")


def wait_for(what: str, is_done: Callable[[], bool], *, seconds: float, log: Path) -> None:
    """Say what is waited for, wait for it, and say how long it took.

    Raises:
        RuntimeError: if it takes longer; with the end of ``log``.
    """
    say(f"  {what} ...")
    start = time.monotonic()
    if not _wait(is_done, seconds):
        tail = log.read_text(errors="replace").splitlines()[-15:] if log.exists() else []
        raise RuntimeError(
            f"waited {seconds:g} s for: {what}; {log} ends:\n" + "\n".join(tail or ["(empty)"])
        )
    say(f"    {time.monotonic() - start:.1f} s")


def say(line: str) -> None:
    """Write a line for the person who waits."""
    sys.stderr.write(line + "\n")
    sys.stderr.flush()


def _wait(is_done: Callable[[], bool], seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while not is_done():
        if time.monotonic() > deadline:
            return False
        time.sleep(_POLL_SECONDS)
    return True


def _is_alive(daemon: Mapping[str, object]) -> bool:
    """Return whether this very process runs; a zombie and another process of the id do not."""
    return daemon["start"] is not None and _start_of(int(str(daemon["pid"]))) == daemon["start"]


def _start_of(pid: int) -> str | None:
    """Return the start time of a process in clock ticks; None if it has ended."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else fields[19]
