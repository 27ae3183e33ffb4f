"""What is said of a stall: where every rank is, which one is late, and their Python stacks."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

_ORDER = {
    "start": 0,
    "sync": 1,
    "rollout": 2,
    "verify": 2,  # rank 0 verifies while the others are in rollout
    "pack": 3,
    "reference": 4,
    "forward_backward": 5,
    "optimizer": 6,
    "other": 7,
    "eval": 8,
    "save": 9,
}
"""Phases in the order of a step; ranks are as far as each other where it is equal."""

_SECTION = re.compile(r"^(?:Current thread|Thread) (0x[0-9a-f]+).*\(most recent call first\):$")
_MAIN = re.compile(r"^main thread (0x[0-9a-f]+)$")
_FRAME = re.compile(r'^  File "(?P<file>[^"]*)", line (?P<line>\S+) in (?P<name>.*)$')
_WAITING = re.compile(r"/torch/distributed/|/multiprocessing/connection\.py")
_DEPTH_OF_WAITING = 3
"""Innermost frames among which a call of ``torch.distributed`` means waiting for other ranks."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Beat:
    """One rank's heartbeat."""

    rank: int
    """Global rank."""

    host: str
    """Name of its machine."""

    pid: int
    """Its process."""

    step: int | None
    """Step under way; None before the first."""

    phase: str
    """Phase under way."""

    num_beats: int
    """Microbatches begun within the phase."""

    seconds: float
    """Time since the last progress, when the heartbeat was written."""

    time: float
    """Unix seconds when it was written."""

    answers: str
    """The request for stacks that it answers; empty when none."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RankReport:
    """What is known of one rank."""

    rank: int
    """Global rank."""

    beat: Beat | None
    """Its last heartbeat; None if it never wrote one."""

    silent_seconds: float
    """Time since the heartbeat was written; clocks of two machines may differ."""

    has_answered: bool
    """It wrote its stacks when it was asked to. A rank that did not is dead, or holds Python's
    global lock in a call that does not return."""

    frames: tuple[str, ...]
    """Main thread's stack, innermost first, as faulthandler writes it; empty when unknown."""

    @property
    def progress(self) -> tuple[int, int, int]:
        """How far the rank is: step, phase in the order of a step, microbatches."""
        if self.beat is None:
            return (-1, -1, -1)
        step = -1 if self.beat.step is None else self.beat.step
        return (step, _ORDER.get(self.beat.phase, -1), self.beat.num_beats)

    @property
    def is_waiting(self) -> bool:
        """Whether the main thread is in a collective of torch.distributed.

        Over NCCL collectives return at once, and a rank waits where it next reads from the device.
        """
        return any(_WAITING.search(frame) for frame in self.frames[:_DEPTH_OF_WAITING])

    @property
    def place(self) -> str:
        """Innermost frame, short."""
        match = _FRAME.match(self.frames[0]) if self.frames else None
        if match is None:
            return "stack unknown"
        return f"{match['file'].rpartition('/')[2]}:{match['line']} in {match['name']}"


def main_frames(stacks: str) -> tuple[str, ...]:
    """Return the main thread's frames of what faulthandler wrote, innermost first.

    The last dump of the file counts. A line ``main thread 0x...`` names the thread; without one
    the last section is taken, which faulthandler writes for the main thread.
    """
    main, sections, section = "", {}, ""
    for line in stacks.splitlines():
        if found := _MAIN.match(line):
            main = found[1]
        elif found := _SECTION.match(line):
            section = found[1]
            sections[section] = []
        elif line.startswith("  ") and section:
            sections[section].append(line)
    if not sections:
        return ()
    return tuple(sections.get(main, next(reversed(sections.values()))))


def late_ranks(reports: Sequence[RankReport]) -> list[RankReport]:
    """Return the ranks that the others wait for, as far as can be told.

    Those that did not answer; else those that are least far; of these, those that are not in a
    collective, where some are.
    """
    silent = [report for report in reports if not report.has_answered]
    if silent:
        return silent
    least = min(report.progress for report in reports)
    behind = [report for report in reports if report.progress == least]
    working = [report for report in behind if not report.is_waiting]
    return working or behind


def render(
    reports: Sequence[RankReport], *, limits: Mapping[str, float | None], folder: str
) -> str:
    """Return the whole report as text.

    Args:
        reports: one per rank, in order.
        limits: limit of each phase, seconds.
        folder: where the stacks of all threads are.
    """
    late = late_ranks(reports)
    lines = [f"stall: {_blame(late, len(reports), limits)}"]
    lines += [f"  {_one_line(report, late)}" for report in reports]
    by_stack: dict[tuple[str, ...], list[int]] = {}
    for report in reports:
        by_stack.setdefault(report.frames, []).append(report.rank)
    for frames, ranks in by_stack.items():
        lines.append(f"stack of rank {', '.join(map(str, ranks))}, innermost call first:")
        lines += frames or ["  unknown: the rank wrote none"]
    lines.append(f"stacks of all threads: {folder}/rank-*.stacks")
    return "\n".join(lines)


def _blame(late: Sequence[RankReport], num_ranks: int, limits: Mapping[str, float | None]) -> str:
    """Return the first line: who is late, where, for how long."""
    first = late[0]
    if num_ranks > 1 and len(late) == num_ranks:
        return "all ranks are equally far; the stacks tell what they do"
    names = f"rank{'s' if len(late) > 1 else ''} {', '.join(str(r.rank) for r in late)}"
    if first.beat is None:
        return f"{names} never gave a sign of life"
    if not first.has_answered:
        return (
            f"{names} without a sign of life for {first.silent_seconds:.0f} s, last seen in phase "
            f"{first.beat.phase}{_of_step(first.beat)}: the process or its machine is gone, or a "
            "call holds Python's global lock"
        )
    limit = limits.get(first.beat.phase)
    text = (
        f"{names} late in phase {first.beat.phase}{_of_step(first.beat)}, no progress for "
        f"{first.beat.seconds:.0f} s"
    )
    return text if limit is None else f"{text} (limit {limit:g} s)"


def _one_line(report: RankReport, late: Sequence[RankReport]) -> str:
    """Return where one rank is."""
    beat = report.beat
    if beat is None:
        return f"rank {report.rank}: no heartbeat"
    doing = "in a collective, at" if report.is_waiting else "at"
    text = (
        f"rank {report.rank} ({beat.host}, process {beat.pid}): {beat.phase}{_of_step(beat)}, "
        f"no progress for {beat.seconds:.0f} s, {doing} {report.place}"
    )
    if beat.num_beats:
        text += f", microbatch {beat.num_beats}"
    if not report.has_answered:
        text += ", did not answer"
    return text + (" <- late" if report in late and len(late) < 2 else "")


def _of_step(beat: Beat) -> str:
    """Return the step of a heartbeat."""
    return "" if beat.step is None else f" of step {beat.step}"
