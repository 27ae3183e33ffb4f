"""Live progress: a rich display on a terminal, plain lines elsewhere, a JSON file always.

The JSON file lets another process (the demo, a launcher) show several runs at once and see
what each one is waiting for.
"""

import logging
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.progress import Progress as RichProgress

from prefixrl_mcore.observability.atomic import write_json_atomic

logger = logging.getLogger(__name__)

_FILE_PERIOD_SECONDS = 0.5
_LINE_PERIOD_SECONDS = 20.0


class Progress:
    """Shows how far a stage is, its latest values and what it waits for."""

    def __init__(
        self, stage: str, *, total: int, file: Path | None = None, enabled: bool = True
    ) -> None:
        """Describe a stage of ``total`` units; ``enabled=False`` makes every call do nothing."""
        self._stage = stage
        self._total = total
        self._file = file
        self._enabled = enabled
        self._completed = 0
        self._first_completed: int | None = None
        self._values: dict[str, float] = {}
        self._waiting_for = "start"
        self._start = time.time()
        self._last_file = 0.0
        self._last_line = time.time()
        self._rich: RichProgress | None = None

    def __enter__(self) -> Self:
        """Start the display."""
        if self._enabled and sys.stderr.isatty():
            self._rich = RichProgress(
                TextColumn("[bold]{task.fields[stage]}"),
                BarColumn(bar_width=24),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TextColumn("ETA {task.fields[eta]}"),
                TextColumn("{task.fields[values]}"),
                TextColumn("[dim]{task.fields[waiting_for]}"),
                console=Console(stderr=True),
                refresh_per_second=4,
            )
            task = self._rich.add_task(
                "", total=self._total, start=True, stage="", eta="", values=""
            )
            self._rich.tasks[task].fields.update(self._fields())
            self._rich.start()
        self._publish(force=True)
        return self

    def __exit__(
        self,
        exception_type: type[BaseException] | None,
        exception: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Stop the display and leave the last state in the file."""
        if exception_type is None:
            self._waiting_for = "done"
        elif exception_type in (KeyboardInterrupt, SystemExit):
            self._waiting_for = "stopped"
        else:
            self._waiting_for = f"failed: {exception_type.__name__}"
        self._publish(force=True)
        if self._rich is not None:
            self._rich.stop()

    def update(
        self, completed: int | None = None, *, waiting_for: str | None = None, **values: float
    ) -> None:
        """Set what is done, what is waited for, and values to show (``reward=0.3``)."""
        if completed is not None:
            if self._first_completed is None:
                self._first_completed = completed
            self._completed = completed
        if waiting_for is not None:
            self._waiting_for = waiting_for
        self._values |= values
        self._publish(force=False)

    def eta_seconds(self) -> float | None:
        """Return the expected time left, or None before the first unit is done."""
        done = self._completed - (self._first_completed or 0)
        if done <= 0:
            return None
        return (time.time() - self._start) / done * (self._total - self._completed)

    def _fields(self) -> dict[str, str]:
        """Return the texts of the display."""
        eta = self.eta_seconds()
        return {
            "stage": self._stage,
            "eta": "?" if eta is None else f"{eta / 60:.0f}:{eta % 60:02.0f}",
            "values": " ".join(f"{k} {v:.4g}" for k, v in self._values.items()),
            "waiting_for": self._waiting_for,
        }

    def _publish(self, *, force: bool) -> None:
        """Write the file, the display or a log line, each at its own pace."""
        if not self._enabled:
            return
        now = time.time()
        if self._file is not None and (force or now - self._last_file > _FILE_PERIOD_SECONDS):
            self._last_file = now
            write_json_atomic(self._file, self._as_json(now), durable=False)
        if self._rich is not None:
            task = self._rich.tasks[0]
            task.fields.update(self._fields())
            self._rich.update(task.id, completed=self._completed)
        elif now - self._last_line > _LINE_PERIOD_SECONDS:
            self._last_line = now
            fields = self._fields()
            logger.info(
                "%s %d/%d, ETA %s, %s, waiting for %s",
                self._stage,
                self._completed,
                self._total,
                fields["eta"],
                fields["values"],
                fields["waiting_for"],
            )

    def _as_json(self, now: float) -> dict[str, object]:
        """Return the state that other processes read."""
        return {
            "stage": self._stage,
            "completed": self._completed,
            "total": self._total,
            "eta_seconds": self.eta_seconds(),
            "elapsed_seconds": now - self._start,
            "values": self._values,
            "waiting_for": self._waiting_for,
            "time": now,
        }


def byte_progress(console: Console) -> RichProgress:
    """Return a display that counts bytes."""
    return RichProgress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
        console=console,
        transient=True,
    )
