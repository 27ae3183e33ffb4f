"""Stopping between steps: a signal or the clock asks, and all ranks agree.

What is being sampled does not wait for the step to end: it is interrupted.
"""

import logging
import signal
import time
from collections.abc import Callable
from types import FrameType

from prefixrl_mcore.config import exit_codes
from prefixrl_mcore.config.run import TrainerConfig
from prefixrl_mcore.policy.topology import any_rank, gather_floats

logger = logging.getLogger(__name__)

_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class TimeLimit:
    """Says when another step might not end before the wall-clock limit."""

    def __init__(
        self,
        config: TrainerConfig,
        *,
        started: float,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """Remember the nearer of the two limits.

        Args:
            config: the limits and the margin.
            started: when the trainer started, unix seconds.
            clock: current time, unix seconds.
        """
        limits = [] if config.max_seconds is None else [started + config.max_seconds]
        limits += [] if config.end_unix_seconds is None else [config.end_unix_seconds]
        self._end = min(limits, default=None)
        self._margin_seconds = config.stop_margin_seconds
        self._clock = clock
        self._last_asked: float | None = None
        self._longest_seconds = 0.0
        self._was_far = False

    def begin(self) -> None:
        """Take this moment for the beginning of a phase's first step; forget earlier phases."""
        self._last_asked = self._clock()
        self._longest_seconds = 0.0
        self._was_far = False

    def is_near(self, save_seconds: float = 0.0) -> bool:
        """Return whether to stop now; asked once per step, it learns how long steps take.

        Args:
            save_seconds: what saving will take then, beyond the length of a step and the margin.
        """
        now = self._clock()
        if self._last_asked is not None:
            self._longest_seconds = max(self._longest_seconds, now - self._last_asked)
        self._last_asked = now
        if self._end is None:
            return False
        needed = self._longest_seconds + save_seconds + self._margin_seconds
        self._was_far = now + needed < self._end
        return not self._was_far

    def is_missed(self, save_seconds: float) -> bool:
        """Return whether what was begun at the last ``is_near`` takes longer than there is time.

        Never in a phase's first step, and never once a stop is planned: ``is_near`` has left time
        for what is under way then. May be called from any thread.

        Args:
            save_seconds: what saving will take, beyond the margin.
        """
        if self._end is None or not self._was_far:
            return False
        return self._clock() + save_seconds + self._margin_seconds >= self._end


class StopSignal:
    """Remembers the first stop signal, and watches the clock; a second SIGINT stops at once."""

    def __init__(self, limit: TimeLimit) -> None:
        """Install the handlers of this process."""
        self._received: int | None = None
        self._agreed: int | None = None
        self._limit = limit
        self._is_out_of_time = False
        self._is_limit_missed = False
        for number in _SIGNALS:
            signal.signal(number, self._remember)

    @property
    def exit_code(self) -> int:
        """0, or why the run stopped early: 128 + signal number, or ``exit_codes.TIME_LIMIT``.

        Equal on all ranks. A signal that came when nothing was left to stop does not count.
        """
        if self._agreed is not None:
            return 128 + self._agreed
        return exit_codes.TIME_LIMIT if self._is_out_of_time else 0

    def begin_steps(self) -> None:
        """Start to measure the steps of a phase; what came before counts for none of them."""
        self._limit.begin()

    def interrupts_sampling(self, save_seconds: float) -> bool:
        """Return whether to stop at once what this rank samples; no collective, from any thread.

        Whoever does so calls ``is_set`` on all ranks next, which agrees.

        Args:
            save_seconds: what saving will take.
        """
        if self._received is None and self._limit.is_missed(save_seconds):
            self._is_limit_missed = True
        return self._received is not None or self._is_limit_missed

    def is_signalled(self) -> bool:
        """Return whether any rank got a signal; all ranks must call this.

        Before the first step the clock does not count: a run that is started takes one step, so
        that it gets on however often it is started again.
        """
        highest = int(gather_floats([float(self._received or 0)]).max())
        if highest and self._agreed is None:
            self._agreed = highest
        return self._agreed is not None

    def is_stopping(self) -> bool:
        """Return whether the ranks have agreed to stop, or any got a signal; all must call this."""
        return self.is_signalled() or self._is_out_of_time

    def is_set(self, save_seconds: float = 0.0) -> bool:
        """Return whether any rank was asked to stop; all ranks must call this, once per step.

        Args:
            save_seconds: what saving will take then, beyond the length of a step.
        """
        is_near = self._limit.is_near(save_seconds) or self._is_limit_missed
        if not self._is_out_of_time and any_rank(is_near):
            self._is_out_of_time = True
            logger.warning("the wall-clock limit is near: saving and stopping")
        return self.is_stopping()

    def _remember(self, number: int, _frame: FrameType | None) -> None:
        """Keep the signal for whoever samples, and for the end of the step."""
        if number == signal.SIGINT and self._received is not None:
            raise KeyboardInterrupt
        self._received = number
        logger.warning(
            "got %s: saving and stopping, after the step under way unless it still samples",
            signal.Signals(number).name,
        )
