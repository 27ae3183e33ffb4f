"""One trainer per run folder: a file that its trainer renews, and that another one respects.

``RUN/lease.json`` names host and process of the trainer. It goes with the trainer; after a kill it
stays, and is stale at once if a process of this host wrote it, else when it has not been renewed
for a minute. A lock of the file system would be simpler, but does not hold on all shared ones.

An earlier start of the same Slurm job is not another trainer: Slurm has lost it and started the
job again. It ends by itself once it sees that (`launch/slurm/orphan.py`), which the shared file
system's caches may put off; the later start waits for that.
"""

import json
import logging
import os
import socket
import threading
import time
import uuid
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from prefixrl_mcore.config.base import ConfigError
from prefixrl_mcore.observability.atomic import write_json_atomic

logger = logging.getLogger(__name__)

RENEWAL_SECONDS = 10.0
STALE_SECONDS = 60.0
_POLLS_PER_RENEWAL = 5
_LOST_START_SECONDS = 300.0
"""What an earlier start of the same Slurm job may take to see that it is lost, and to end."""


class Lease:
    """The right to write to a run folder; a context manager."""

    def __init__(
        self,
        file: Path,
        *,
        renewal_seconds: float = RENEWAL_SECONDS,
        stale_seconds: float = STALE_SECONDS,
        lost_start_seconds: float = _LOST_START_SECONDS,
    ) -> None:
        """Describe a lease; nothing is written before the context is entered.

        Args:
            file: in the run folder, which is made if needed.
            renewal_seconds: time between two renewals, the same for all trainers.
            stale_seconds: time without one after which another host's trainer counts as dead.
            lost_start_seconds: how long an earlier start of this Slurm job is waited for.
        """
        self._file = file
        self._renewal_seconds = renewal_seconds
        self._stale_seconds = stale_seconds
        self._lost_start_seconds = lost_start_seconds
        self._content: dict[str, Any] = {
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "process_start": _process_start(os.getpid()),
            "token": uuid.uuid4().hex,
            "slurm_job": os.environ.get("SLURM_JOB_ID"),
            "slurm_start": int(os.environ.get("SLURM_RESTART_COUNT") or 0),
        }
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._renew, name="lease", daemon=True)

    def __enter__(self) -> Self:
        """Take the folder; waits up to a minute for a sign of life of another host's trainer.

        It waits up to five minutes for the end of an earlier start of this Slurm job.

        Raises:
            ConfigError: if another trainer holds it.
        """
        deadline = time.monotonic() + self._lost_start_seconds
        is_waiting = False
        while (holder := _read(self._file)) is not None and self._is_alive(holder):
            who = f"process {holder.get('pid')} on {holder.get('host')}"
            if not self._is_earlier_start(holder) or time.monotonic() >= deadline:
                raise ConfigError(
                    f"{self._file.parent}: the trainer with {who} writes to this run folder; let "
                    "it end, or end it, before --resume. Nothing was changed."
                )
            if not is_waiting:
                logger.warning(
                    "%s: %s, an earlier start of this Slurm job, still writes; waiting up to %g s "
                    "for its end",
                    self._file.parent,
                    who,
                    self._lost_start_seconds,
                )
                is_waiting = True
            time.sleep(self._renewal_seconds / _POLLS_PER_RENEWAL)
        self._write()
        self._thread.start()
        return self

    def __exit__(
        self,
        exception_type: type[BaseException] | None,
        exception: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Give the folder back."""
        self._end.set()
        self._thread.join()
        if self._is_ours():
            self._file.unlink(missing_ok=True)

    def _is_earlier_start(self, holder: dict[str, Any]) -> bool:
        """Return whether the holder is a start of this Slurm job that came before this one."""
        return (
            self._content["slurm_job"] is not None
            and holder.get("slurm_job") == self._content["slurm_job"]
            and holder.get("slurm_start", 0) < self._content["slurm_start"]
        )

    def _is_alive(self, holder: dict[str, Any]) -> bool:
        """Return whether the holder's process lives, or renews its lease while this waits."""
        if holder.get("host") == self._content["host"]:
            start = _process_start(int(holder.get("pid", 0)))
            return start is not None and start == holder.get("process_start")
        renewed = _renewal(self._file)
        deadline = time.monotonic() + self._stale_seconds
        if renewed is not None:
            logger.info("%s is of another host; waiting for a sign of life", self._file)
        while time.monotonic() < deadline:
            time.sleep(self._renewal_seconds / _POLLS_PER_RENEWAL)
            now = _renewal(self._file)
            if now is None:
                return False
            if now != renewed:
                return True
        return False

    def _renew(self) -> None:
        while not self._end.wait(self._renewal_seconds):
            try:
                if not self._is_ours():
                    logger.error(
                        "%s: another trainer took this run folder, while this one was not heard of "
                        "for %g s; end one of the two",
                        self._file,
                        self._stale_seconds,
                    )
                    return
                self._write()
            except OSError as error:  # the storage; it must not end the run
                logger.warning("lease: %s", error)

    def _write(self) -> None:
        write_json_atomic(self._file, self._content, durable=False)

    def _is_ours(self) -> bool:
        holder = _read(self._file)
        return holder is None or holder.get("token") == self._content["token"]


def _read(file: Path) -> dict[str, Any] | None:
    """Return the content of a lease; None if there is none, or none that was written whole."""
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (FileNotFoundError, json.JSONDecodeError):
        return None
    return value if isinstance(value, dict) else None


def _renewal(file: Path) -> tuple[int, int] | None:
    """Return what differs after each renewal, by no clock of ours; None if the file is gone."""
    try:
        status = file.stat()
    except FileNotFoundError:
        return None
    return status.st_ino, status.st_mtime_ns


def _process_start(pid: int) -> str | None:
    """Return what tells a process of this host from a later one with its number; None if dead."""
    try:
        after_name = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    state, start_ticks = after_name[0], after_name[19]
    return None if state in "ZX" else start_ticks
