"""Phases of a training step: where its wall time goes, and where this rank is right now."""

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Literal

Phase = Literal[
    "start",
    "sync",
    "rollout",
    "verify",
    "pack",
    "reference",
    "forward_backward",
    "optimizer",
    "save",
    "eval",
    "other",
]
"""``start``: before the first step; ``other``: what is in no phase, such as writing metrics."""

TIMED: tuple[Phase, ...] = (
    *("sync", "rollout", "verify", "pack", "reference", "forward_backward", "optimizer"),
    *("save", "eval"),
)
"""Phases that every ``train`` line has the seconds of, besides ``other``."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PhaseState:
    """Where a rank is; replaced as a whole, so that another thread reads it consistently."""

    step: str
    """Step under way, such as ``step 3`` or ``supervised step 3``; empty before the first."""

    phase: Phase
    """Innermost phase under way."""

    num_changes: int
    """Phases begun or left since the start, inner ones not counted: ranks take the same ones in the
    same order, so that a rank with fewer is behind (rank 0 alone has inner phases)."""

    num_beats: int
    """Signs of progress within the phase: microbatches begun."""

    since: float
    """Monotonic seconds (``time.monotonic``) of the last sign of progress."""


class Phases:
    """Adds up wall time by phase: ``with phases.phase("rollout"): ...``.

    A phase within a phase takes its time from the outer one, so that phases never overlap and
    ``other`` is what is left of the step.
    """

    def __init__(
        self,
        *,
        annotate: Callable[[str], AbstractContextManager[object]] = lambda name: nullcontext(),
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        """Begin in ``start``.

        Args:
            annotate: makes a context to be entered with each phase (a profiler's named range).
            clock: seconds; the phases' time is counted with it.
        """
        self.failed: Phase | None = None
        """Phase that the last exception came out of; None since the next one began."""
        self.annotate = annotate
        self._clock = clock
        self._seconds: dict[str, float] = {}
        self._open: list[Phase] = ["start"]
        self._start = self._last = clock()
        self._state = PhaseState(
            step="", phase="start", num_changes=0, num_beats=0, since=time.monotonic()
        )

    @property
    def state(self) -> PhaseState:
        """Where this rank is; may be read by any thread."""
        return self._state

    @contextmanager
    def phase(self, name: Phase) -> Iterator[None]:
        """Count the time spent inside as ``name``."""
        self._switch()
        is_inner = len(self._open) > 1
        self._open.append(name)
        self._announce(is_inner=is_inner)
        try:
            with self.annotate(name):
                self.failed = None
                yield
        except BaseException:
            self.failed = self.failed or name  # the innermost one
            raise
        finally:
            self._switch()
            self._open.pop()
            self._announce(is_inner=is_inner)

    def beat(self) -> None:
        """Note a sign of progress within the phase; costs less than a microsecond."""
        state = self._state
        self._state = replace(state, num_beats=state.num_beats + 1, since=time.monotonic())

    def begin_steps(self) -> None:
        """Leave ``start``, and count time from here on."""
        self._open = ["other"]
        self._seconds, self._start = {}, self._clock()
        self._last = self._start
        self._announce()

    def begin_step(self, step: int, *, kind: str = "step") -> None:
        """Say which step the coming phases belong to, of those called ``kind``."""
        self._state = replace(self._state, step=f"{kind} {step}")

    def end_steps(self) -> None:
        """Say that the coming phases belong to no step."""
        self._state = replace(self._state, step="")

    def take(self) -> dict[str, float]:
        """Return ``time/<phase>_seconds`` and their sum ``time/step_seconds``, and start anew.

        Raises:
            RuntimeError: inside a phase, whose time would be torn apart.
        """
        if len(self._open) > 1:
            raise RuntimeError(f"phases: take() inside phase {self._open[-1]!r}; leave it first")
        self._switch()
        total = self._last - self._start
        metrics = {f"time/{name}_seconds": self._seconds.get(name, 0.0) for name in TIMED}
        metrics["time/other_seconds"] = total - sum(metrics.values())
        metrics["time/step_seconds"] = total
        self._seconds, self._start = {}, self._last
        return metrics

    def _switch(self) -> None:
        """Give the time since the last change to the phase that is under way."""
        now = self._clock()
        name = self._open[-1]
        self._seconds[name] = self._seconds.get(name, 0.0) + now - self._last
        self._last = now

    def _announce(self, *, is_inner: bool = False) -> None:
        """Publish the phase that is under way now, after one was begun or left."""
        state = self._state
        self._state = PhaseState(
            step=state.step,
            phase=self._open[-1],
            num_changes=state.num_changes + (not is_inner),
            num_beats=0,
            since=time.monotonic(),
        )
