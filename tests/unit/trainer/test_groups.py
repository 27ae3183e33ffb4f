"""From verdicts to advantages, training sequences and metrics, with hand-worked numbers."""

import pytest

from prefixrl_mcore.config.policy import LossConfig
from prefixrl_mcore.records import (
    Completion,
    FinishReason,
    PrefixedProblem,
    Problem,
    Rollout,
    ScoredRollout,
    Verdict,
)
from prefixrl_mcore.trainer.groups import group_metrics, training_sequences, with_advantages

PROBLEM = Problem(problem_id="p", text="1 + 1", answer="2")


def _group(
    prefix: tuple[int, ...], rewards: list[float], *, finish_reason: FinishReason = "stop"
) -> list[ScoredRollout]:
    start = PrefixedProblem(
        prefixed_problem_id=f"p@{len(prefix)}",
        problem=PROBLEM,
        prompt_token_ids=(1, 2, 3),
        prefix_token_ids=prefix,
    )
    return [
        ScoredRollout(
            rollout=Rollout(
                rollout_id=f"0/{len(prefix)}/{index}",
                prefixed_problem=start,
                completion=Completion(
                    token_ids=(7,) * (index + 1),
                    logprobs=(-0.5,) * (index + 1),
                    finish_reason=finish_reason,
                    policy_version=0,
                ),
            ),
            verdict=Verdict(reward=reward, reason="correct" if reward else "wrong"),
        )
        for index, reward in enumerate(rewards)
    ]


def test_the_baseline_stays_inside_the_problem_and_prefix_group() -> None:
    groups = with_advantages([_group((), [0, 0]), _group((4, 5), [1, 0])], LossConfig())
    assert groups[0].advantages == (0.0, 0.0)
    assert groups[1].advantages == (0.5, -0.5)


def test_prompt_and_prefix_are_context_and_only_the_completion_is_trained() -> None:
    groups = with_advantages([_group((4, 5), [1, 0])], LossConfig())
    first, second = training_sequences(groups)
    assert first.context_token_ids == (1, 2, 3, 4, 5)
    assert first.completion_token_ids == (7,)
    assert second.completion_token_ids == (7, 7)
    assert (first.advantage, second.advantage) == (0.5, -0.5)
    assert second.rollout_logprobs == (-0.5, -0.5)
    assert first.group_index == second.group_index == 0


def test_metrics_tell_prefixed_from_plain_groups() -> None:
    scored = [_group((), [0, 0]), _group((4, 5), [1, 0]), _group((4,), [1, 1])]
    metrics = group_metrics(with_advantages(scored, LossConfig()))
    assert metrics["rollout/reward_mean"] == pytest.approx(3 / 6)
    assert metrics["rollout/reward_no_prefix_mean"] == 0.0
    assert metrics["rollout/reward_prefix_mean"] == pytest.approx(3 / 4)
    assert metrics["rollout/all_negative_fraction"] == pytest.approx(1 / 3)
    assert metrics["rollout/all_negative_no_prefix_fraction"] == 1.0
    assert metrics["rollout/all_negative_prefix_fraction"] == 0.0
    assert metrics["rollout/all_positive_fraction"] == pytest.approx(1 / 3)
    assert metrics["rollout/completion_tokens_mean"] == pytest.approx(1.5)
    assert metrics["verdict/correct_fraction"] == pytest.approx(0.5)
    assert (metrics["rollout/num_prefix_groups"], metrics["rollout/num_no_prefix_groups"]) == (2, 1)


def test_a_step_without_prefixed_groups_has_no_prefixed_metrics() -> None:
    metrics = group_metrics(with_advantages([_group((), [1, 0])], LossConfig()))
    assert "rollout/reward_prefix_mean" not in metrics
    assert metrics["rollout/reward_no_prefix_mean"] == 0.5


def test_unfinished_completions_are_counted() -> None:
    scored = [_group((), [0, 0], finish_reason="length"), _group((4,), [0, 0])]
    metrics = group_metrics(with_advantages(scored, LossConfig()))
    assert metrics["rollout/stopped_fraction"] == 0.5
