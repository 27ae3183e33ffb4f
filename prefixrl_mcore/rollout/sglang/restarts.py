"""How often a server that died may be started again."""

import math
from collections import deque

from prefixrl_mcore.config.rollout import SGLangConfig

_PAUSES_SECONDS = (1.0, 10.0, 60.0)
"""Least times from one restart to the next, after one, two and more in vain: what this machine
lacks for a moment, and fails a start by at once, must not use up all of them in it."""


class RestartAllowance:
    """So many restarts within a window of time, and as many in a row that lead to nothing.

    The second bound is for starts that take long: of a server that hangs for an hour each time,
    few restarts are ever within a window. It is for a run that waits for this server: one that
    goes on with others tries again when a window has passed since a restart was refused.
    """

    def __init__(self, config: SGLangConfig) -> None:
        """Begin with none taken."""
        self._max_restarts = config.max_restarts
        self._window_seconds = config.restart_window_seconds
        self._times: deque[float] = deque()
        self._num_in_vain = 0
        self._pause_ends = -math.inf
        self._first_refused = math.inf  # since the last one was taken
        self.num_restarts = 0
        """Restarts in all."""

    def is_left(self, now: float) -> bool:
        """Return whether there is a restart left at ``time.monotonic()``, if after a pause."""
        while self._times and self._times[0] < now - self._window_seconds:
            self._times.popleft()
        return max(len(self._times), self._num_in_vain) < self._max_restarts

    def take(self, now: float, *, others_serve: bool = False) -> bool:
        """Take one restart; return whether one was left and is due.

        Args:
            now: ``time.monotonic()``.
            others_serve: the run goes on whatever comes of it.
        """
        if others_serve and now - self._window_seconds > self._first_refused:
            self._num_in_vain = 0
        if not self.is_left(now):
            self._first_refused = min(self._first_refused, now)
            return False
        if now < self._pause_ends:
            return False
        self._first_refused = math.inf
        self._times.append(now)
        self._num_in_vain += 1
        self._pause_ends = now + _PAUSES_SECONDS[min(self._num_in_vain, len(_PAUSES_SECONDS)) - 1]
        self.num_restarts += 1
        return True

    def note_success(self) -> None:
        """Note that the server serves: what was taken before was not in vain."""
        self._num_in_vain = 0
        self._pause_ends = -math.inf

    def __str__(self) -> str:
        """Say how much is taken."""
        return (
            f"{len(self._times)} restart(s) in {self._window_seconds:g} s, {self._num_in_vain} in "
            f"vain, rollout.sglang.max_restarts = {self._max_restarts}"
        )
