"""From prefixed problems to groups of rollouts, through any engine."""

import math
import time
from collections.abc import Callable, Sequence
from hashlib import blake2b

from prefixrl_mcore.records import Completion, PrefixedProblem, Rollout
from prefixrl_mcore.rollout.engine import (
    RolloutEngine,
    RolloutError,
    SampleRequest,
    SamplingParams,
)

_MAX_COMPLETIONS = 16_384
"""Asked for in one call, whose completions are in memory together: of 10,000 tokens each, 11 GB."""

OnGroups = Callable[[dict[int, list[Rollout]]], None]
"""Called with (index of the request → its rollouts), by rising index, of groups that are whole."""


def sample_groups(
    engine: RolloutEngine,
    prefixed_problems: Sequence[PrefixedProblem],
    requests: Sequence[SampleRequest],
    params: SamplingParams,
    *,
    on_groups: OnGroups,
    keep_seconds: float = math.inf,
    max_completions: int = _MAX_COMPLETIONS,
) -> None:
    """Sample the groups that are asked for, and hand over each of them once.

    Args:
        engine: where to sample.
        prefixed_problems: contexts; equal ones form separate groups.
        requests: of ``group_request``, one for each of them.
        params: temperature and limits.
        on_groups: told of finished groups, in this thread while others are sampled; what it raises
            ends the sampling.
        keep_seconds: least time between two calls of it, so that what is sampled can be kept before
            the last group is finished. Infinite: all groups that the engine is given at a time.
        max_completions: of the groups that the engine is given at a time; of one at least.

    Raises:
        RolloutError: if the engine returned fewer or more completions than were asked for.
    """
    finished: dict[int, list[Rollout]] = {}
    last = time.monotonic()

    def hand_over() -> None:
        nonlocal last
        groups = {index: finished[index] for index in sorted(finished)}
        finished.clear()  # first: a signal that ends the process never has a group kept twice
        on_groups(groups)
        last = time.monotonic()

    def take(index: int, completions: list[Completion]) -> bool:
        request = requests[index]
        check_num_samples(engine, request, completions)
        finished[index] = [
            Rollout(
                rollout_id=f"{request.request_id}/{sample}",
                prefixed_problem=prefixed_problems[index],
                completion=completion,
            )
            for sample, completion in enumerate(completions)
        ]
        if time.monotonic() - last >= keep_seconds:
            hand_over()
        return False

    size = max(1, max_completions // max(request.num_samples for request in requests))
    for first in range(0, len(requests), size):
        engine.sample(
            requests[first : first + size],
            params,
            is_enough=lambda i, one, first=first: take(first + i, one),
        )
        if finished:
            hand_over()


def group_request(
    prefixed_problem: PrefixedProblem, index: int, *, group_size: int, label: str, seed: int
) -> SampleRequest:
    """Return the request for a whole group.

    Its seed depends on ``(seed, label, index)`` only, so that a resumed run samples what the
    undisturbed one would have sampled (where the engine honours seeds).

    Args:
        prefixed_problem: what the group starts from.
        index: of the group in the call.
        group_size: completions.
        label: of the call.
        seed: seed of the run.
    """
    return SampleRequest(
        request_id=f"{label}/{index}",
        context_token_ids=prefixed_problem.context_token_ids,
        num_samples=group_size,
        seed=derive_seed(seed, label, index),
    )


def check_num_samples(
    engine: RolloutEngine, request: SampleRequest, sampled: Sequence[Completion]
) -> None:
    """Refuse another number of completions than was asked for.

    Raises:
        RolloutError: naming the request.
    """
    if len(sampled) != request.num_samples:
        raise RolloutError(
            f"request {request.request_id}: asked {engine.name} for {request.num_samples} "
            f"completions, got {len(sampled)}"
        )


def derive_seed(seed: int, label: str, index: int) -> int:
    """Return a 31-bit seed that depends on all three and on nothing else."""
    digest = blake2b(f"{seed}/{label}/{index}".encode(), digest_size=4).digest()
    return int.from_bytes(digest, "little") >> 1
