"""Requests of one batch that were lost: how often, where, and until when each of them rests."""

import time

_FIRST_PAUSE_SECONDS = 0.5
_LONGEST_PAUSE_SECONDS = 30.0
"""A request that was lost is issued again after a pause, which doubles each time: a server or a
router that is busy for a moment must not use up all tries in it."""


class Retries:
    """Counts losses of each request, by its place in the batch."""

    def __init__(self, max_retries: int) -> None:
        """Begin with nothing lost.

        Args:
            max_retries: times that a lost request is issued again after a death of its server,
                and as often after other losses: a death is seldom the request's fault, but one
                that kills every server must come to an end.
        """
        self._max_retries = max_retries
        self._num_lost: dict[int, int] = {}
        self._num_deaths: dict[int, int] = {}
        self._lost_on: dict[int, int] = {}
        self._resting: dict[int, float] = {}  # until when, on the monotonic clock

    @property
    def num_resting(self) -> int:
        """Requests that wait for the end of their pause."""
        return len(self._resting)

    def num_lost(self, index: int) -> int:
        """Return how often a request was lost."""
        return self._num_lost.get(index, 0)

    def num_deaths(self, index: int) -> int:
        """Return how often a request was lost because its server died."""
        return self._num_deaths.get(index, 0)

    def may_retry(self, index: int) -> bool:
        """Return whether a request that was lost may be issued again."""
        num_deaths = self.num_deaths(index)
        return max(num_deaths, self.num_lost(index) - num_deaths) <= self._max_retries

    def lost_on(self, index: int) -> int | None:
        """Return the server that lost a request last: another one may do better."""
        return self._lost_on.get(index)

    def note_loss(self, index: int, server: int, *, is_death: bool) -> None:
        """Count the loss of a request, which its server may have died of."""
        self._num_lost[index] = self.num_lost(index) + 1
        self._num_deaths[index] = self.num_deaths(index) + is_death
        self._lost_on[index] = server

    def rest(self, index: int) -> None:
        """Let a lost request wait before it is issued again."""
        num_others = self._num_lost[index] - self.num_deaths(index)
        pause = _FIRST_PAUSE_SECONDS * 2 ** (num_others - 1)
        self._resting[index] = time.monotonic() + min(pause, _LONGEST_PAUSE_SECONDS)

    def wake(self) -> list[int]:
        """Return the requests whose pause is over, and forget that they rest."""
        now = time.monotonic()
        woken = [index for index, until in self._resting.items() if until <= now]
        for index in woken:
            del self._resting[index]
        return woken

    def wake_all(self) -> list[int]:
        """Return all requests that rest, and forget that they do."""
        woken = list(self._resting)
        self._resting.clear()
        return woken
