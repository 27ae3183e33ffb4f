"""What a step trains on: groups of rollouts, sampled, verified and given their advantages."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

from prefixrl_mcore.config.run import RunConfig
from prefixrl_mcore.eval.runner import Evaluator
from prefixrl_mcore.observability.phases import Phases
from prefixrl_mcore.records import Group, PrefixedProblem
from prefixrl_mcore.rollout.engine import SamplingParams
from prefixrl_mcore.rollout.sampling import sample_groups
from prefixrl_mcore.rollout.scoring import score_groups
from prefixrl_mcore.trainer.groups import with_advantages


def sample_and_score(
    evaluator: Evaluator,
    prefixed_problems: Sequence[PrefixedProblem],
    run: RunConfig,
    *,
    step: int,
    phases: Phases,
    on_wait: Callable[[str], None],
) -> list[Group]:
    """Sample one group per prefixed problem and verify it.

    Args:
        evaluator: engine, verifier and prompts.
        prefixed_problems: what the groups start from.
        run: the run's settings.
        step: names the rollouts.
        phases: of rank 0; verification is a phase of its own.
        on_wait: told what is waited for.
    """
    on_wait("rollouts")
    sampled = sample_groups(
        evaluator.engine,
        prefixed_problems,
        sampling_params(evaluator, run),
        group_size=run.batch.group_size,
        label=str(step),
        seed=run.seed,
    )
    on_wait("verifier")
    with phases.phase("verify"):
        scored = score_groups(sampled, evaluator.verifier, evaluator.renderer)
    return with_advantages(scored, run.loss)


def sampling_params(evaluator: Evaluator, run: RunConfig) -> SamplingParams:
    """Return how to sample in training: at the run's temperature instead of the evaluation's."""
    return replace(evaluator.params, temperature=run.rollout.temperature)


def check_versions(groups: Iterable[Group], policy_version: int) -> None:
    """Refuse rollouts of other weights: the loop is strictly on-policy."""
    sampled = {s.rollout.completion.policy_version for group in groups for s in group.rollouts}
    if sampled != {policy_version}:
        raise RuntimeError(
            f"rollouts carry policy versions {sorted(sampled)}, the policy is at "
            f"{policy_version}: the weight sync did not take effect"
        )
