"""Which request goes to which server, and in which order: pure functions of expected tokens.

A request is a context and n completions after it. It goes to one server whole, so that the context
is computed once, where the server has a cache for it. The longest are placed first and each where
it will be done earliest, which is at most a third worse than the best placement of all (Graham
1969, https://doi.org/10.1137/0117039).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Self

from prefixrl_mcore.rollout.engine import SampleRequest

_MEMORY = 1024
"""Completions that the running mean remembers: about two steps, as the policy's lengths drift."""


@dataclass(kw_only=True, slots=True)
class CompletionLengths:
    """Running mean of the tokens of completions; what is expected of the next ones."""

    num_seen: int = 0
    """Completions that were observed."""

    mean_tokens: float = 0.0
    """Mean over the last ones, the older the less."""

    def observe(self, num_tokens: int) -> None:
        """Take one completion into the mean."""
        self.num_seen += 1
        self.mean_tokens += (num_tokens - self.mean_tokens) / min(self.num_seen, _MEMORY)

    def expected_tokens(self, limit: int) -> float:
        """Return the tokens expected of a completion of at most ``limit``; all before any came."""
        return min(self.mean_tokens, limit) if self.num_seen else float(limit)


@dataclass(frozen=True, kw_only=True, slots=True)
class Cost:
    """Tokens that a request is expected to make a server compute."""

    context_tokens: int
    """Computed once, and not at all where the context is in the server's cache."""

    completion_tokens: float
    """Of all samples together; with their contexts where servers have no cache."""

    @classmethod
    def of(cls, request: SampleRequest, mean_tokens: float, *, is_cached: bool) -> Self:
        """Return what a request is expected to take.

        Args:
            request: what is asked for.
            mean_tokens: expected of a completion.
            is_cached: the servers have a cache for its context.
        """
        context_tokens = len(request.context_token_ids)
        of_sample = mean_tokens if is_cached else context_tokens + mean_tokens
        return cls(
            context_tokens=context_tokens if is_cached else 0,
            completion_tokens=request.num_samples * of_sample,
        )

    @property
    def tokens(self) -> float:
        """Both together, on a server that does not have the context."""
        return self.context_tokens + self.completion_tokens


@dataclass(kw_only=True, slots=True)
class Load:
    """What one server is busy with."""

    outstanding_tokens: float = 0.0
    """Expected of the requests that it has not answered."""

    outstanding_samples: int = 0
    """Completions that it was asked for and has not answered."""

    contexts: set[tuple[int, ...]] = field(default_factory=set)
    """Contexts that it has computed, so far as is known; they may be in its cache."""

    def cost_of(self, cost: Cost, context: tuple[int, ...]) -> float:
        """Return the tokens that a request adds here."""
        return cost.completion_tokens if context in self.contexts else cost.tokens

    def has_room(self, num_samples: int, max_samples: int) -> bool:
        """Return whether a request may be sent now; a server without any takes one of any size."""
        fits = self.outstanding_samples + num_samples <= max_samples
        return fits or self.outstanding_samples == 0


def longest_first(costs: Sequence[Cost]) -> list[int]:
    """Return the indices of the costs, the largest first and equal ones in their order."""
    return sorted(range(len(costs)), key=lambda index: -costs[index].tokens)


def choose_server(
    cost: Cost,
    context: tuple[int, ...],
    num_samples: int,
    loads: Mapping[int, Load],
    *,
    max_samples: int,
) -> int | None:
    """Return the server that is expected to have answered the request first; None if all are full.

    A server that has the context computes less, and so wins until it is behind by more tokens than
    it saves. Among equals the first in ``loads`` is taken.

    Args:
        cost: what the request is expected to take.
        context: its context.
        num_samples: completions that it asks for.
        loads: what each server that may be chosen is busy with, by its index.
        max_samples: completions that a server may be asked for at a time.
    """
    with_room = [i for i, load in loads.items() if load.has_room(num_samples, max_samples)]
    if not with_room:
        return None
    return min(
        with_room,
        key=lambda index: loads[index].outstanding_tokens + loads[index].cost_of(cost, context),
    )


def max_over_mean(values: Sequence[float]) -> float:
    """Return the largest value over the mean: 1 is even; 1 also where nothing was done at all."""
    total = sum(values)
    return max(values) * len(values) / total if total > 0 else 1.0
