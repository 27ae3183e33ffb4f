"""From records to lines of a table: several runs merged, every number computed from samples."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from bench.cases import Case, Rows
from bench.implementation import Family, Pass
from bench.measure import percentile
from bench.records import OK, CellRecord, Measurement, RunRecord

CEILING_NAME = "gemms"
"""The implementation whose time on the active rows is the floor of all others."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Line:
    """One implementation on one set of rows of one case."""

    case: Case
    """Sizes and mask."""

    implementation: str
    """Name of the implementation."""

    family: Family
    """Ceiling, ours or peer."""

    rows: Rows
    """Rows that it was given."""

    passes: dict[Pass, Measurement]
    """What it was measured in."""

    ceiling_ms: dict[Pass, float]
    """Median of the bare products on the active rows, of the same run; empty without them."""

    def median_ms(self, pass_: Pass) -> float | None:
        """Return the median time; None where the pass was not measured."""
        return self.quantile_ms(pass_, 0.5)

    def quantile_ms(self, pass_: Pass, fraction: float) -> float | None:
        """Return a quantile of the times; None where the pass was not measured."""
        measurement = self.passes.get(pass_)
        if measurement is None or measurement.status != OK:
            return None
        return percentile(measurement.samples_ms, fraction)

    def ceiling_fraction(self, pass_: Pass) -> float | None:
        """Return the ceiling's time over this one's; 1 is as fast as the bare products."""
        median, ceiling = self.median_ms(pass_), self.ceiling_ms.get(pass_)
        return None if median is None or ceiling is None else ceiling / median

    def useful_tflops(self, pass_: Pass) -> float | None:
        """Return 1e12 useful FLOPs per second: those that the active rows need, once."""
        median = self.median_ms(pass_)
        if median is None:
            return None
        products = 1 if pass_ == "forward" else 3
        size = self.case.num_active * self.case.hidden_size * self.case.vocab_size
        return 2 * products * size / median / 1e9


def lines_of(cell: CellRecord) -> list[Line]:
    """Return the lines of one case as one run measured it, in the order of the run."""
    ceiling_ms: dict[Pass, float] = {
        item.pass_: percentile(item.samples_ms, 0.5)
        for item in cell.measurements
        if (item.implementation, item.rows, item.status) == (CEILING_NAME, "active", OK)
    }
    groups: dict[tuple[str, Rows], dict[Pass, Measurement]] = {}
    for item in cell.measurements:
        groups.setdefault((item.implementation, item.rows), {})[item.pass_] = item
    return [
        Line(
            case=cell.case,
            implementation=implementation,
            family=next(iter(passes.values())).family,
            rows=rows,
            passes=passes,
            ceiling_ms=ceiling_ms,
        )
        for (implementation, rows), passes in groups.items()
    ]


@dataclass(frozen=True, kw_only=True, slots=True)
class DeviceResults:
    """All runs on one kind of device."""

    device: str
    """Name of the GPU."""

    records: tuple[RunRecord, ...]
    """Oldest first."""

    @property
    def cases(self) -> list[Case]:
        """Every case that was measured, smallest first."""
        found = {cell.case for record in self.records for cell in record.cells}
        return sorted(
            found,
            key=lambda case: (
                case.vocab_size,
                case.hidden_size,
                case.num_tokens,
                case.active_fraction,
                case.mask,
            ),
        )

    def runs_of(self, case: Case) -> list[list[Line]]:
        """Return the lines of a case, run by run, the latest run first.

        Only lines of one run are measured in turns with each other.
        """
        return [
            lines_of(cell)
            for record in reversed(self.records)
            for cell in record.cells
            if cell.case == case
        ]

    def latest(self, case: Case) -> list[Line]:
        """Return one line per implementation and set of rows, each from its latest run."""
        found: dict[tuple[str, Rows], Line] = {}
        for lines in self.runs_of(case):
            for line in lines:
                found.setdefault((line.implementation, line.rows), line)
        return list(found.values())


def by_device(records: Iterable[RunRecord]) -> list[DeviceResults]:
    """Return the runs by device; those on another device are never mixed in one table."""
    groups: dict[str, list[RunRecord]] = {}
    for record in sorted(records, key=lambda record: record.started):
        groups.setdefault(record.environment.device, []).append(record)
    return [
        DeviceResults(device=device, records=tuple(runs)) for device, runs in sorted(groups.items())
    ]


def find_line(lines: Sequence[Line], implementation: str, rows: Rows) -> Line | None:
    """Return the line of an implementation on a set of rows."""
    for line in lines:
        if line.implementation == implementation and line.rows == rows:
            return line
    return None


def whole_batch(case: Case) -> Rows:
    """Return the set of rows that is the whole batch."""
    return case.row_sets[-1]
