"""From prefixed problems to groups of rollouts, through any engine."""

from collections.abc import Sequence
from hashlib import blake2b

from prefixrl_mcore.records import Completion, PrefixedProblem, Rollout
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
        group_request(prefixed_problem, index, group_size=group_size, label=label, seed=seed)
        for index, prefixed_problem in enumerate(prefixed_problems)
    ]
    completions = engine.sample(requests, params, on_completed)
    groups: list[list[Rollout]] = []
    for request, prefixed_problem, sampled in zip(
        requests, prefixed_problems, completions, strict=True
    ):
        check_num_samples(engine, request, sampled)
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


def group_request(
    prefixed_problem: PrefixedProblem, index: int, *, group_size: int, label: str, seed: int
) -> SampleRequest:
    """Return the request for a whole group.

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
