"""One trainer per run folder: a file that its trainer renews, and that another one respects.

``RUN/lease.json`` names host and process of the trainer. It goes with the trainer; after a kill it
stays, and is stale at once if a process of this host wrote it, else when it has not been renewed
for a minute. A lock of the file system would be simpler, but does not hold on all shared ones.
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


class Lease:
    """The right to write to a run folder; a context manager."""

    def __init__(
        self,
        file: Path,
        *,
        renewal_seconds: float = RENEWAL_SECONDS,
        stale_seconds: float = STALE_SECONDS,
    ) -> None:
        """Describe a lease; nothing is written before the context is entered.

        Args:
            file: in the run folder, which is made if needed.
            renewal_seconds: time between two renewals, the same for all trainers.
            stale_seconds: time without one after which another host's trainer counts as dead.
        """
        self._file = file
        self._renewal_seconds = renewal_seconds
        self._stale_seconds = stale_seconds
        self._content = {
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "process_start": _process_start(os.getpid()),
            "token": uuid.uuid4().hex,
        }
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._renew, name="lease", daemon=True)

    def __enter__(self) -> Self:
        """Take the folder; waits up to a minute for a sign of life of another host's trainer.

        Raises:
            ConfigError: if another trainer holds it.
        """
        holder = _read(self._file)
        if holder is not None and self._is_alive(holder):
            raise ConfigError(
                f"{self._file.parent}: the trainer with process {holder.get('pid')} on "
                f"{holder.get('host')} writes to this run folder; let it end, or end it, before "
                "--resume. Nothing was changed."
            )
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
