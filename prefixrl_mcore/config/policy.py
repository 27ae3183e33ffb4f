"""The trained policy: initial weights, parallel layout, optimizer, loss, batch."""

from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from prefixrl_mcore.config.base import Config


class ModelConfig(Config):
    """Initial weights and tokenizer."""

    path: Path = Field()
    """Hugging Face folder: config, weights, tokenizer."""


class ParallelConfig(Config):
    """Megatron layout; names are Megatron's."""

    tensor_model_parallel_size: int = Field(default=1, ge=1)
    """Ranks that share each weight matrix."""

    pipeline_model_parallel_size: int = Field(default=1, ge=1)
    """Pipeline stages."""

    virtual_pipeline_model_parallel_size: int | None = Field(default=None, ge=2)
    """Model chunks per stage (interleaved schedule); None has one."""

    context_parallel_size: int = Field(default=1, ge=1)
    """Ranks that share each sequence."""

    expert_model_parallel_size: int = Field(default=1, ge=1)
    """Ranks that share the experts of a mixture-of-experts layer."""

    data_parallel_size: int = Field(default=1, ge=1)
    """Replicas of the model, each with its share of the batch."""

    sequence_parallel: bool = False
    """Shard activations between tensor-parallel regions along the sequence."""

    @property
    def world_size(self) -> int:
        """Trainer ranks in all."""
        return (
            self.tensor_model_parallel_size
            * self.pipeline_model_parallel_size
            * self.context_parallel_size
            * self.data_parallel_size
        )

    @model_validator(mode="after")
    def _sequence_parallel_needs_tensor_parallel(self) -> "ParallelConfig":
        if self.sequence_parallel and self.tensor_model_parallel_size == 1:
            raise ValueError(
                "policy.parallel.sequence_parallel needs tensor_model_parallel_size > 1, got 1; "
                "switch it off or raise tensor_model_parallel_size"
            )
        return self


class OptimizerConfig(Config):
    """AdamW and its schedule."""

    lr: float = Field(default=1e-6, gt=0.0)
    """Peak learning rate."""

    min_lr: float = Field(default=0.0, ge=0.0)
    """Learning rate at the end of a decaying schedule; unused by ``constant``."""

    schedule: Literal["constant", "cosine", "linear"] = "constant"
    """Shape of the learning rate after warm-up."""

    num_warmup_steps: int = Field(default=0, ge=0)
    """Optimizer steps of linear warm-up from zero."""

    beta1: float = Field(default=0.9, ge=0.0, lt=1.0)
    """AdamW's first-moment decay."""

    beta2: float = Field(default=0.95, ge=0.0, lt=1.0)
    """AdamW's second-moment decay."""

    eps: float = Field(default=1e-8, gt=0.0)
    """AdamW's denominator offset."""

    weight_decay: float = Field(default=0.0, ge=0.0)
    """Decoupled weight decay on matrices; norms and biases have none."""

    clip_grad: float = Field(default=1.0, gt=0.0)
    """Global gradient norm above which gradients are scaled down."""

    use_distributed_optimizer: bool = False
    """Shard optimizer state over data-parallel ranks."""


class PolicyConfig(Config):
    """How the policy is built and trained."""

    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Precision of weights and activations; gradients and optimizer state are float32."""

    parallel: ParallelConfig = Field(default_factory=ParallelConfig)
    """Layout over ranks."""

    optimizer: OptimizerConfig = Field(default_factory=OptimizerConfig)
    """AdamW and its schedule."""

    recompute: Literal["none", "full"] = "none"
    """Activation recomputation in the backward pass."""


class LossConfig(Config):
    """Policy-gradient estimator; the defaults are the paper's REINFORCE."""

    baseline: Literal["mean", "leave_one_out", "none"] = "mean"
    """Group baseline: mean of all rewards, mean of the others (RLOO), or nothing."""

    normalize_std: bool = False
    """Divide advantages by the group's standard deviation of rewards."""

    aggregation: Literal["token_mean", "sequence_mean", "constant"] = "token_mean"
    """``token_mean``: sum over completion tokens / their global number; ``sequence_mean``: mean
    over rollouts of each rollout's token mean; ``constant``: sum / (rollouts x
    ``max_completion_tokens``)."""

    importance: Literal["none", "truncated", "ppo_clip"] = "none"
    """``none``: REINFORCE; ``truncated``: detached ratio to the rollout logprobs, cut at
    ``max_importance``; ``ppo_clip``: clipped surrogate."""

    max_importance: float = Field(default=2.0, gt=0.0)
    """Upper cut of the truncated importance weight."""

    clip_low: float = Field(default=0.2, gt=0.0, lt=1.0)
    """The surrogate's ratio is not rewarded below ``1 - clip_low``."""

    clip_high: float = Field(default=0.2, gt=0.0)
    """The surrogate's ratio is not rewarded above ``1 + clip_high``."""

    entropy_coefficient: float = Field(default=0.0, ge=0.0)
    """Weight of the entropy bonus on completion tokens."""


class BatchConfig(Config):
    """One optimizer step's work."""

    prompts_per_step: int = Field(default=128, ge=1)
    """Groups per optimizer step."""

    group_size: int = Field(default=8, ge=2)
    """Rollouts per group."""

    stream_tokens: int | None = Field(default=None, ge=2)
    """Length of a packed stream (one microbatch), tokens; None is
    ``rollout.max_total_tokens``."""
