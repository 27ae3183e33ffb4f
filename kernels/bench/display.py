"""What a person sees while the benchmark runs: a bar on a terminal, plain lines elsewhere."""

import time
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from bench.cases import Case
from bench.measure import percentile
from bench.records import CellRecord, Measurement

_LINE_PERIOD_SECONDS = 10.0


class Display:
    """Shows which case is running and what it is doing."""

    def __init__(self, console: Console, num_cases: int) -> None:
        """Describe the whole; nothing is shown yet."""
        self._console = console
        self._num_cases = num_cases
        self._index = 0
        self._name = ""
        self._last_line = 0.0
        self._progress: Progress | None = None

    def __enter__(self) -> Self:
        """Start the display."""
        if self._console.is_terminal:
            self._progress = Progress(
                BarColumn(bar_width=20),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TextColumn("{task.description}"),
                console=self._console,
            )
            self._progress.add_task("", total=self._num_cases)
            self._progress.start()
        return self

    def __exit__(
        self,
        exception_type: type[BaseException] | None,
        exception: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Stop the display."""
        if self._progress is not None:
            if exception_type is None:
                self._progress.update(self._progress.task_ids[0], completed=self._index)
            self._progress.stop()

    def case(self, case: Case) -> None:
        """Begin a case."""
        self._index += 1
        self._name = case.name
        self._last_line = 0.0
        if self._progress is not None:
            self._progress.update(self._progress.task_ids[0], completed=self._index - 1)

    def step(self, text: str) -> None:
        """Say what the case does now; elsewhere than on a terminal every few seconds."""
        if self._progress is not None:
            self._progress.update(
                self._progress.task_ids[0], description=f"[bold]{self._name}[/]  {text}"
            )
        elif time.monotonic() - self._last_line > _LINE_PERIOD_SECONDS:
            self._last_line = time.monotonic()
            self._console.print(
                f"[{self._index}/{self._num_cases}] {self._name}: {text}",
                markup=False,
                highlight=False,
                soft_wrap=True,
            )


def cell_table(cell: CellRecord) -> Table:
    """Return one case as a table for a terminal."""
    table = Table(title=cell.case.name)
    for heading in ("implementation", "rows", "pass"):
        table.add_column(heading)
    for heading in ("ms", "p10", "p90", "n", "extra GB", "first call s", "dH err", "dW err"):
        table.add_column(heading, justify="right")
    for item in cell.measurements:
        table.add_row(item.implementation, item.rows, item.pass_, *_values(item))
    return table


def _values(item: Measurement) -> list[str]:
    """Return the numbers of one line."""
    if item.status != "ok":
        return [item.status, *[""] * 7]
    samples, extra = item.samples_ms, item.peak_extra_bytes
    errors = (item.errors.hidden_relative, item.errors.weight_relative)
    return [
        f"{percentile(samples, 0.5):.3f}",
        f"{percentile(samples, 0.1):.3f}",
        f"{percentile(samples, 0.9):.3f}",
        str(len(samples)),
        "" if extra is None else f"{extra / 1e9:.2f}",
        f"{item.first_call_seconds or 0.0:.1f}",
        *("" if error is None else f"{error:.1e}" for error in errors),
    ]
