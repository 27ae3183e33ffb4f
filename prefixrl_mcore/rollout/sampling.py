"""From prefixed problems to groups of rollouts, through any engine."""

from collections.abc import Sequence
from hashlib import blake2b

from prefixrl_mcore.records import PrefixedProblem, Rollout
from prefixrl_mcore.rollout.engine import (
    OnCompleted,
    RolloutEngine,
    RolloutError,
    SampleRequest,
    SamplingParams,
)


def sample_groups(
    engine: RolloutEngine,
    prefixed_problems: Sequence[PrefixedProblem],
    params: SamplingParams,
    *,
    group_size: int,
    label: str,
    seed: int,
    on_completed: OnCompleted | None = None,
) -> list[list[Rollout]]:
    """Sample ``group_size`` completions for each prefixed problem, in order.

    Seeds depend on ``(seed, label, index)`` only, so that a resumed run samples what the
    undisturbed one would have sampled (where the engine honours seeds).

    Args:
        engine: where to sample.
        prefixed_problems: contexts; equal ones form separate groups.
        params: temperature and limits.
        group_size: completions per group.
        label: names the call in rollout ids, for instance the step number.
        seed: seed of the run.
        on_completed: progress callback.

    Raises:
        RolloutError: if the engine returned fewer or more completions than were asked for.
    """
    requests = [
        SampleRequest(
            request_id=f"{label}/{index}",
            context_token_ids=prefixed_problem.context_token_ids,
            num_samples=group_size,
            seed=derive_seed(seed, label, index),
        )
        for index, prefixed_problem in enumerate(prefixed_problems)
    ]
    completions = engine.sample(requests, params, on_completed)
    groups: list[list[Rollout]] = []
    for request, prefixed_problem, sampled in zip(
        requests, prefixed_problems, completions, strict=True
    ):
        if len(sampled) != group_size:
            raise RolloutError(
                f"request {request.request_id}: asked {engine.name} for {group_size} completions, "
                f"got {len(sampled)}"
            )
        groups.append(
            [
                Rollout(
                    rollout_id=f"{request.request_id}/{index}",
                    prefixed_problem=prefixed_problem,
                    completion=completion,
                )
                for index, completion in enumerate(sampled)
            ]
        )
    return groups


def derive_seed(seed: int, label: str, index: int) -> int:
    """Return a 31-bit seed that depends on all three and on nothing else."""
    digest = blake2b(f"{seed}/{label}/{index}".encode(), digest_size=4).digest()
    return int.from_bytes(digest, "little") >> 1
