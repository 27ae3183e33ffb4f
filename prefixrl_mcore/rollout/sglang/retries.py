"""Requests of one batch that were lost: how often, where, and until when each of them rests."""

import time
from collections import Counter, defaultdict
from typing import Literal

_FIRST_PAUSE_SECONDS = 0.5
_LONGEST_PAUSE_SECONDS = 30.0
"""A request that was lost is issued again after a pause, which doubles each time: a server or a
router that is busy for a moment must not use up all tries in it."""

Loss = Literal["death", "router", "other"]
"""How a request was lost: its server died, the router was away, or otherwise."""


class Retries:
    """Counts losses of each request, by its place in the batch."""

    def __init__(self, max_retries: int, *, router_seconds: float) -> None:
        """Begin with nothing lost.

        Args:
            max_retries: times that a lost request is issued again after a death of its server,
                and as often after other losses: a death is seldom the request's fault, but one
                that kills every server must come to an end.
            router_seconds: how long a router may be away, from the first loss of a request by that:
                there is no other one to ask.
        """
        self._max_retries = max_retries
        self._router_seconds = router_seconds
        self._losses: defaultdict[int, Counter[Loss]] = defaultdict(Counter)
        self._lost_on: dict[int, int] = {}
        self._router_back_by: dict[int, float] = {}  # on the monotonic clock, as the next
        self._resting: dict[int, float] = {}

    @property
    def num_resting(self) -> int:
        """Requests that wait for the end of their pause."""
        return len(self._resting)

    def num_lost(self, index: int) -> int:
        """Return how often a request was lost."""
        return self._losses[index].total()

    def num_deaths(self, index: int) -> int:
        """Return how often a request was lost because its server died."""
        return self._losses[index]["death"]

    def may_retry(self, index: int) -> bool:
        """Return whether a request that was lost may be issued again."""
        losses = self._losses[index]
        if max(losses["death"], losses["other"]) > self._max_retries:
            return False
        is_in_time = time.monotonic() < self._router_back_by.get(index, 0.0)
        return is_in_time or losses["router"] <= self._max_retries

    def lost_on(self, index: int) -> int | None:
        """Return the server that lost a request last: another one may do better."""
        return self._lost_on.get(index)

    def note_loss(self, index: int, server: int, loss: Loss) -> None:
        """Count the loss of a request."""
        self._losses[index][loss] += 1
        self._lost_on[index] = server
        if loss == "router":
            self._router_back_by.setdefault(index, time.monotonic() + self._router_seconds)

    def rest(self, index: int) -> None:
        """Let a lost request wait before it is issued again."""
        num_others = self.num_lost(index) - self.num_deaths(index)
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
