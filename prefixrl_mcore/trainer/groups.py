"""Scored rollouts → groups with advantages → training sequences, and their metrics."""

from collections.abc import Sequence

from prefixrl_mcore.advantages import group_advantages
from prefixrl_mcore.config.policy import LossConfig
from prefixrl_mcore.records import Group, ScoredRollout, TrainingSequence


def with_advantages(scored: Sequence[Sequence[ScoredRollout]], loss: LossConfig) -> list[Group]:
    """Give each rollout its advantage; the baseline never leaves the (problem, prefix) group."""
    groups: list[Group] = []
    for rollouts in scored:
        rewards = [rollout.verdict.reward for rollout in rollouts]
        advantages = group_advantages(
            rewards, baseline=loss.baseline, normalize_std=loss.normalize_std
        )
        groups.append(
            Group(
                prefixed_problem=rollouts[0].rollout.prefixed_problem,
                rollouts=tuple(rollouts),
                advantages=advantages,
            )
        )
    return groups


def training_sequences(groups: Sequence[Group]) -> list[TrainingSequence]:
    """Return one training sequence per rollout: prompt and prefix as context, never trained on."""
    return [
        TrainingSequence(
            sequence_id=scored.rollout.rollout_id,
            group_index=group_index,
            context_token_ids=group.prefixed_problem.context_token_ids,
            completion_token_ids=scored.rollout.completion.token_ids,
            advantage=advantage,
            rollout_logprobs=scored.rollout.completion.logprobs,
        )
        for group_index, group in enumerate(groups)
        for scored, advantage in zip(group.rollouts, group.advantages, strict=True)
    ]


def group_metrics(groups: Sequence[Group]) -> dict[str, float]:
    """Return the ``rollout/…`` metrics of one step; shares over no group are left out."""
    prefixed = [group for group in groups if group.prefixed_problem.prefix_token_ids]
    plain = [group for group in groups if not group.prefixed_problem.prefix_token_ids]
    completions = [scored.rollout.completion for group in groups for scored in group.rollouts]
    contexts = [len(group.prefixed_problem.context_token_ids) for group in groups]
    metrics = {
        "rollout/all_positive_fraction": _mean([float(all(g.rewards)) for g in groups]),
        "rollout/completion_tokens_mean": _mean([float(len(c.token_ids)) for c in completions]),
        "rollout/stopped_fraction": _mean([float(c.finish_reason == "stop") for c in completions]),
        "rollout/context_tokens_mean": _mean([float(length) for length in contexts]),
        "rollout/num_prefix_groups": float(len(prefixed)),
        "rollout/num_no_prefix_groups": float(len(plain)),
    }
    for suffix, chosen in (("", groups), ("_prefix", prefixed), ("_no_prefix", plain)):
        if not chosen:
            continue
        rewards = [reward for group in chosen for reward in group.rewards]
        metrics[f"rollout/reward{suffix}_mean"] = _mean(rewards)
        metrics[f"rollout/all_negative{suffix}_fraction"] = _mean(
            [float(group.is_all_negative) for group in chosen]
        )
    for reason in sorted({s.verdict.reason for group in groups for s in group.rollouts}):
        matches = [s.verdict.reason == reason for group in groups for s in group.rollouts]
        metrics[f"verdict/{reason}_fraction"] = _mean([float(match) for match in matches])
    return metrics


def _mean(values: Sequence[float]) -> float:
    """Return the mean of at least one value."""
    return sum(values) / len(values)
