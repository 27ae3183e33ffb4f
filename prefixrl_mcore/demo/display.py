"""What the demo shows while its stages run: one table, or plain lines without a terminal."""

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

_LINE_PERIOD_SECONDS = 20.0


@dataclass(kw_only=True)
class StageState:
    """One row of the table."""

    title: str
    """What the row is called."""

    state: str = "waiting"
    """``waiting``, ``running``, ``done``, ``failed``."""

    seconds: float = 0.0
    """Wall time, while running and in the end."""

    started: float = 0.0
    """Start, seconds since the epoch; 0 before it."""

    progress_file: Path | None = None
    """Progress written by the stage's own process; None when the demo itself sets ``detail``."""

    completed: int = 0
    """Units done."""

    total: int = 0
    """Units in all; 0 when unknown."""

    detail: str = ""
    """Latest values, and what is waited for."""

    eta_seconds: float | None = None
    """Expected time left; None when unknown."""

    def refresh(self) -> None:
        """Take over what the stage's process wrote last."""
        if self.state != "running":
            return
        self.seconds = time.time() - self.started
        if self.progress_file is None or not self.progress_file.exists():
            return
        progress = json.loads(self.progress_file.read_text())
        if progress["time"] < self.started:
            return
        self.completed, self.total = progress["completed"], progress["total"]
        self.eta_seconds = progress["eta_seconds"]
        values = " ".join(f"{k} {v:.3g}" for k, v in progress["values"].items())
        self.detail = f"{values} | {progress['waiting_for']}"


class DemoDisplay:
    """Shows all stages at once; call ``refresh`` often."""

    def __init__(self, console: Console, stages: Mapping[str, StageState]) -> None:
        """Show ``stages`` on ``console``."""
        self._console = console
        self._stages = stages
        self._start = time.time()
        self._last_line = 0.0
        self._live = Live(console=console, refresh_per_second=4, transient=False)

    def __enter__(self) -> "DemoDisplay":
        """Start the live table on a terminal."""
        if self._console.is_terminal:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Show the last state and stop."""
        self.refresh(force=True)
        if self._console.is_terminal:
            self._live.stop()

    def refresh(self, *, force: bool = False) -> None:
        """Read the stages' progress and show it."""
        for stage in self._stages.values():
            stage.refresh()
        if self._console.is_terminal:
            self._live.update(self._render())
        elif force or time.time() - self._last_line > _LINE_PERIOD_SECONDS:
            self._last_line = time.time()
            for stage in self._stages.values():
                if stage.state == "running":
                    self._console.print(_line(stage), highlight=False, markup=False)

    def _render(self) -> RenderableType:
        """Return the table of all stages."""
        table = Table(expand=True, pad_edge=False, box=None)
        for column in ("", "stage", "progress", "time", "ETA"):
            table.add_column(column, no_wrap=True)
        table.add_column("latest", ratio=1, no_wrap=True)
        for stage in self._stages.values():
            mark, style = {
                "waiting": ("·", "dim"),
                "running": (">", "bold cyan"),
                "done": ("✓", "green"),
                "failed": ("✗", "bold red"),
            }[stage.state]
            done = f"{stage.completed}/{stage.total}" if stage.total else ""
            table.add_row(
                Text(mark, style),
                Text(stage.title, style),
                done,
                clock(stage.seconds) if stage.seconds else "",
                "" if stage.eta_seconds is None else clock(stage.eta_seconds),
                Text(stage.detail, "dim" if stage.state != "running" else ""),
            )
        return Group(table, Text(f"elapsed {clock(time.time() - self._start)}", "dim"))


def clock(seconds: float) -> str:
    """Return ``m:ss``."""
    minutes, rest = divmod(int(seconds), 60)
    return f"{minutes}:{rest:02d}"


def _line(stage: StageState) -> str:
    """Return one stage as a plain line."""
    done = f" {stage.completed}/{stage.total}" if stage.total else ""
    eta = "" if stage.eta_seconds is None else f", ETA {clock(stage.eta_seconds)}"
    return f"{clock(stage.seconds)} {stage.title}{done}{eta}: {stage.detail}"
