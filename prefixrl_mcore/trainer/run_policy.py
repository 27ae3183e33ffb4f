"""The policy that a run's config describes."""

from prefixrl_mcore.config.run import RunConfig
from prefixrl_mcore.policy.policy import MegatronPolicy


def build_policy(config: RunConfig) -> MegatronPolicy:
    """Return the policy of a run with its initial weights; all ranks must call this."""
    return MegatronPolicy.build(
        model_path=config.model.path,
        policy=config.policy,
        loss=config.loss,
        stream_tokens=config.stream_tokens,
        temperature=config.rollout.temperature,
        num_steps=config.trainer.num_steps,
        seed=config.seed,
        logits_dtype=config.model.logits_dtype,
    )
