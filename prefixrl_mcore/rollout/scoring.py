"""Rollouts → scored rollouts: texts for the verifier, verdicts back in place."""

from collections.abc import Sequence

from prefixrl_mcore.data.prompts import PromptRenderer
from prefixrl_mcore.records import Rollout, ScoredRollout
from prefixrl_mcore.rewards.base import Verifier, VerifyRequest
from prefixrl_mcore.rewards.build import verify


def score_groups(
    sampled: Sequence[Sequence[Rollout]], verifier: Verifier, renderer: PromptRenderer
) -> list[list[ScoredRollout]]:
    """Verify every rollout; the shape of the nested list is kept."""
    flat = [rollout for rollouts in sampled for rollout in rollouts]
    verdicts = iter(verify(verifier, [verify_request(rollout, renderer) for rollout in flat]))
    return [
        [ScoredRollout(rollout=rollout, verdict=next(verdicts)) for rollout in rollouts]
        for rollouts in sampled
    ]


def verify_request(rollout: Rollout, renderer: PromptRenderer) -> VerifyRequest:
    """Return what the verifier needs to know of a rollout."""
    completion = rollout.completion
    return VerifyRequest(
        request_id=rollout.rollout_id,
        answer=rollout.prefixed_problem.problem.answer,
        prefix_text=renderer.decode(rollout.prefixed_problem.prefix_token_ids),
        completion_text=renderer.completion_text(completion.token_ids),
        has_stopped=completion.finish_reason == "stop",
    )
