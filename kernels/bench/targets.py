"""What the head shall reach, and whether it does; every verdict is computed from the records."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from bench.cases import Case
from bench.results import DeviceResults, Line, find_line, whole_batch

MIN_CEILING_FRACTION = 0.85
MIN_SPEEDUP_PACKED = 1.0
MIN_SPEEDUP_SPARSE = 4.0
SPARSE_FRACTION = 0.2
MAX_EXTRA_BYTES = 1.5e9
MEMORY_TOKENS = 32768
MEMORY_VOCABULARY = 151936

_TRAINING = "forward_backward"


@dataclass(frozen=True, kw_only=True, slots=True)
class Target:
    """One number to reach."""

    title: str
    """Heading of its column."""

    statement: str
    """What is asked, in words."""

    value: Callable[[str, Case, Sequence[Line]], float | None]
    """Value of one of our implementations in one case of one run; None where the case does not
    decide it, infinity or zero where it could not run."""

    limit: float
    """The number."""

    is_minimum: bool
    """Whether the value must not be smaller; otherwise it must not be larger."""

    show: Callable[[float], str]
    """The value for a reader."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """One of our implementations against one target."""

    implementation: str
    """Name of the implementation."""

    worst: float | None
    """Worst value over the cases; None when no case decided."""

    num_cases: int
    """Cases that decided."""

    is_met: bool | None
    """Whether the worst case meets the target; None when it is not measured."""


def outcome(target: Target, implementation: str, results: DeviceResults) -> Outcome:
    """Return the worst value over all cases, each from its latest run that decides it."""
    values = []
    for case in results.cases:
        for lines in results.runs_of(case):
            value = target.value(implementation, case, lines)
            if value is not None:
                values.append(value)
                break
    if not values:
        return Outcome(implementation=implementation, worst=None, num_cases=0, is_met=None)
    worst = min(values) if target.is_minimum else max(values)
    is_met = worst >= target.limit if target.is_minimum else worst <= target.limit
    return Outcome(implementation=implementation, worst=worst, num_cases=len(values), is_met=is_met)


def training_modes(results: DeviceResults) -> list[str]:
    """Return the names of ours that were measured in a training step, in the order of the runs."""
    return list(
        dict.fromkeys(
            line.implementation
            for case in results.cases
            for line in results.latest(case)
            if line.family == "ours" and _TRAINING in line.passes
        )
    )


def _ceiling_fraction(implementation: str, case: Case, lines: Sequence[Line]) -> float | None:
    """Return the fraction of the bare products on the active rows."""
    del case
    line = find_line(lines, implementation, "active")
    if line is None or _TRAINING not in line.ceiling_ms:
        return None
    return line.ceiling_fraction(_TRAINING) or 0.0


def _speedup_packed(implementation: str, case: Case, lines: Sequence[Line]) -> float | None:
    """Return the time of the fastest peer over ours, all rows being active."""
    if case.active_fraction != 1.0:
        return None
    return speedup(find_line(lines, implementation, "active"), _peers(lines, "active"))


def _speedup_sparse(implementation: str, case: Case, lines: Sequence[Line]) -> float | None:
    """Return the time of the fastest peer over ours, both given the whole batch."""
    if case.active_fraction != SPARSE_FRACTION:
        return None
    rows = whole_batch(case)
    return speedup(find_line(lines, implementation, rows), _peers(lines, rows))


def packed_speedup(implementation: str, results: DeviceResults) -> float | None:
    """Return the worst speedup on packed rows at the sparse fraction: the kernel without its mask.

    What stands beside the speedup on the whole batch, so that none is taken for the other.
    """
    found = [
        speedup(find_line(lines, implementation, "active"), _peers(lines, "active"))
        for case in results.cases
        if case.active_fraction == SPARSE_FRACTION
        for lines in results.runs_of(case)
    ]
    return min((value for value in found if value is not None), default=None)


def _extra_bytes(implementation: str, case: Case, lines: Sequence[Line]) -> float | None:
    """Return the peak of extra memory of a training step, over both sets of rows."""
    if (case.num_tokens, case.vocab_size) != (MEMORY_TOKENS, MEMORY_VOCABULARY):
        return None
    found = [find_line(lines, implementation, rows) for rows in case.row_sets]
    steps = [line.passes[_TRAINING] for line in found if line and _TRAINING in line.passes]
    if not steps:
        return None
    peaks = [step.peak_extra_bytes for step in steps]
    return max(float("inf") if peak is None else float(peak) for peak in peaks)


def speedup(ours: Line | None, peers: Sequence[Line]) -> float | None:
    """Return the time of the fastest of some lines over that of one; 0 where that one failed."""
    times = [line.median_ms(_TRAINING) for line in peers]
    fastest = min((time for time in times if time is not None), default=None)
    if ours is None or fastest is None:
        return None
    median = ours.median_ms(_TRAINING)
    return 0.0 if median is None else fastest / median


def _peers(lines: Sequence[Line], rows: str) -> list[Line]:
    """Return the lines of peers on a set of rows."""
    return [line for line in lines if line.family == "peer" and line.rows == rows]


TARGETS = (
    Target(
        title="of the bare GEMMs",
        statement=(
            f"forward+backward reaches at least {MIN_CEILING_FRACTION:.0%} of the three bare GEMMs "
            "on the active rows"
        ),
        value=_ceiling_fraction,
        limit=MIN_CEILING_FRACTION,
        is_minimum=True,
        show=lambda value: f"{value:.1%}",
    ),
    Target(
        title="against the fastest peer, all rows active",
        statement="at fraction 1.0 it is at least as fast as the fastest peer",
        value=_speedup_packed,
        limit=MIN_SPEEDUP_PACKED,
        is_minimum=True,
        show=lambda value: f"{value:.2f}x",
    ),
    Target(
        title=f"against the fastest peer, whole batch at fraction {SPARSE_FRACTION:g}",
        statement=(
            f"at fraction {SPARSE_FRACTION:g} it is at least {MIN_SPEEDUP_SPARSE:g} times as fast "
            "as any peer that is given the whole batch"
        ),
        value=_speedup_sparse,
        limit=MIN_SPEEDUP_SPARSE,
        is_minimum=True,
        show=lambda value: f"{value:.2f}x",
    ),
    Target(
        title="extra memory",
        statement=(
            f"extra memory of at most {MAX_EXTRA_BYTES / 1e9:g} GB at T = {MEMORY_TOKENS} and "
            f"V = {MEMORY_VOCABULARY}"
        ),
        value=_extra_bytes,
        limit=MAX_EXTRA_BYTES,
        is_minimum=False,
        show=lambda value: f"{value / 1e9:.2f} GB",
    ),
)
"""The targets, for an H100."""
