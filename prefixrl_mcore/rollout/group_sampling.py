"""Groups that may be begun in one call and finished in another, through any engine."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from prefixrl_mcore.records import Completion, StartedGroup
from prefixrl_mcore.rollout.engine import (
    RolloutEngine,
    RolloutError,
    SampleRequest,
    SamplingParams,
)
from prefixrl_mcore.rollout.sampling import check_num_samples, derive_seed, group_request


@dataclass(frozen=True, kw_only=True, slots=True)
class SampledGroups:
    """What one call of the engine made of its groups."""

    groups: tuple[StartedGroup, ...]
    """All groups, in the order in which they were given, with what they have now."""

    finished: tuple[int, ...]
    """Indices of the finished groups, in the order in which they finished."""

    num_tokens: int
    """Context and new tokens of all requests, aborted ones included; the context of a completion
    that is continued is all that comes before its new tokens. A request that was aborted before
    its first token counts nothing."""

    num_new_tokens: int
    """Those of them that were sampled."""

    num_cached_tokens: int
    """Context tokens that the engine did not compute."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Part:
    """One request, and the completions of the group that it continues."""

    group: int
    """Index of the group."""

    samples: tuple[int, ...]
    """[num_samples] indices of the completions in the group."""

    request: SampleRequest
    """What the engine is asked for."""


def sample_started(
    engine: RolloutEngine,
    groups: Sequence[StartedGroup],
    params: SamplingParams,
    *,
    num_wanted: int,
    group_size: int,
    label: str,
    seed: int,
) -> SampledGroups:
    """Sample ``groups`` on until ``num_wanted`` of them are finished; the rest is aborted.

    A group without tokens is one request, so that its context is computed once; of one that goes
    on, each unfinished completion is a request of its own, whose context includes its tokens. Seeds
    depend on ``(seed, label, index)`` only.

    Args:
        engine: where to sample.
        groups: to be finished; finished ones are allowed and count.
        params: temperature and limits of whole completions.
        num_wanted: finished groups that are enough; more may finish at the same moment.
        group_size: completions per group.
        label: names the call in request ids; unique in the run.
        seed: seed of the run.

    Raises:
        RolloutError: if the engine returned fewer or more completions than were asked for, or
            aborted some although it was not asked to.
    """
    parts = [
        part
        for index, group in enumerate(groups)
        for part in _parts(group, index, params, group_size=group_size, label=label, seed=seed)
    ]
    open_parts = [0] * len(groups)
    for part in parts:
        open_parts[part.group] += 1
    finished = [index for index, number in enumerate(open_parts) if not number]

    def is_enough(index: int, _: list[Completion]) -> bool:
        group = parts[index].group
        open_parts[group] -= 1
        if not open_parts[group]:
            finished.append(group)
        return len(finished) >= num_wanted

    requests = [part.request for part in parts]
    if len(finished) >= num_wanted:
        sampled: list[list[Completion]] = [
            [Completion.unstarted(engine.policy_version)] * request.num_samples
            for request in requests
        ]
    elif num_wanted == len(groups):
        sampled = engine.sample(requests, params)
        finished = list(range(len(groups)))
    else:
        sampled = engine.sample(requests, params, is_enough=is_enough)
    return _merged(engine, groups, parts, sampled, finished, params, group_size=group_size)


def _parts(
    group: StartedGroup,
    index: int,
    params: SamplingParams,
    *,
    group_size: int,
    label: str,
    seed: int,
) -> list[_Part]:
    """Return the requests that finish a group."""
    context = group.prefixed_problem.context_token_ids
    if not group.num_tokens:
        request = group_request(
            group.prefixed_problem, index, group_size=group_size, label=label, seed=seed
        )
        return [_Part(group=index, samples=tuple(range(group_size)), request=request)]
    return [
        _Part(
            group=index,
            samples=(sample,),
            request=SampleRequest(
                request_id=f"{label}/{index}.{sample}",
                context_token_ids=context + completion.token_ids,
                num_samples=1,
                seed=derive_seed(seed, f"{label}/{index}", sample),
                max_completion_tokens=params.max_completion_tokens - len(completion.token_ids),
            ),
        )
        for sample, completion in enumerate(group.completions)
        if not completion.is_finished
    ]


def _merged(
    engine: RolloutEngine,
    groups: Sequence[StartedGroup],
    parts: Sequence[_Part],
    sampled: Sequence[Sequence[Completion]],
    finished: Sequence[int],
    params: SamplingParams,
    *,
    group_size: int,
) -> SampledGroups:
    """Add what was sampled to the groups."""
    completions = [
        list(group.completions) or [Completion.unstarted(engine.policy_version)] * group_size
        for group in groups
    ]
    num_tokens, num_new_tokens, num_cached_tokens = 0, 0, 0
    for part, answers in zip(parts, sampled, strict=True):
        _check_answer(engine, part, answers, is_whole=part.group in finished)
        for sample, answer in zip(part.samples, answers, strict=True):
            if not answer.token_ids:
                continue
            num_tokens += len(part.request.context_token_ids) + len(answer.token_ids)
            num_new_tokens += len(answer.token_ids)
            num_cached_tokens += answer.num_cached_tokens
            of_group = completions[part.group]
            context = groups[part.group].prefixed_problem.context_token_ids
            whole = of_group[sample].continued_by(answer)
            of_group[sample] = _with_reason(whole, params, num_context_tokens=len(context))
    return SampledGroups(
        groups=tuple(
            replace(group, completions=tuple(of_group))
            for group, of_group in zip(groups, completions, strict=True)
        ),
        finished=tuple(finished),
        num_tokens=num_tokens,
        num_new_tokens=num_new_tokens,
        num_cached_tokens=num_cached_tokens,
    )


def _check_answer(
    engine: RolloutEngine, part: _Part, answers: Sequence[Completion], *, is_whole: bool
) -> None:
    """Refuse another number of completions, and aborted ones where none was to be."""
    request = part.request
    check_num_samples(engine, request, answers)
    if is_whole and not all(answer.is_finished for answer in answers):
        raise RolloutError(
            f"request {request.request_id}: {engine.name} aborted a completion without being asked"
        )


def _with_reason(
    completion: Completion, params: SamplingParams, *, num_context_tokens: int
) -> Completion:
    """Return a completion that was aborted at its very end as the finished one that it is."""
    room = params.max_total_tokens - num_context_tokens
    if completion.is_finished:
        return completion
    if completion.token_ids[-1] in params.stop_token_ids:
        return replace(completion, finish_reason="stop")
    if len(completion.token_ids) >= min(params.max_completion_tokens, room):
        return replace(completion, finish_reason="length")
    return completion
