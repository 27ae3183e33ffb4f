"""The trained policy: initial weights, parallel layout, optimizer, loss, batch."""

import math
from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from prefixrl_mcore.config.base import Config
from prefixrl_mcore.config.experts import ExpertsConfig

LogitsDtype = Literal["float32", "bfloat16"]


class ModelConfig(Config):
    """Initial weights and tokenizer."""

    path: Path = Field()
    """Hugging Face folder: config, weights, tokenizer."""

    logits_dtype: LogitsDtype = "float32"
    """Precision of the logits of a bfloat16 model, in the trainer's head and in the rollout engine
    alike: one-sided, it widens the gap between their logprobs. ``float32`` keeps what the matrix
    product accumulates; ``bfloat16`` rounds the logits as most engines do by
    default. A float32 model has float32 logits either way."""


class ParallelConfig(Config):
    """Megatron layout; names are Megatron's."""

    tensor_model_parallel_size: int = Field(default=1, ge=1)
    """Ranks that share each weight matrix."""

    pipeline_model_parallel_size: int = Field(default=1, ge=1)
    """Pipeline stages."""

    virtual_pipeline_model_parallel_size: int | None = Field(default=None, ge=2)
    """Model chunks per stage (interleaved schedule); None has one."""

    num_layers_in_first_pipeline_stage: int | None = Field(default=None, ge=1)
    """Layers of the first stage, which also has the embedding; None is an equal share."""

    num_layers_in_last_pipeline_stage: int | None = Field(default=None, ge=1)
    """Layers of the last stage, which also has the head; None is an equal share."""

    context_parallel_size: int = Field(default=1, ge=1)
    """Ranks that share each sequence; sequences are padded to a multiple of twice this."""

    expert_model_parallel_size: int = Field(default=1, ge=1)
    """Ranks that share the experts of a mixture-of-experts layer; no factor of the number of ranks:
    times ``expert_tensor_parallel_size`` it divides the ranks of a pipeline stage."""

    expert_tensor_parallel_size: int = Field(default=1, ge=1)
    """Ranks that share the matrices of each expert; independent of
    ``tensor_model_parallel_size``."""

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

    @property
    def sequence_multiple(self) -> int:
        """Tokens that a packed sequence is padded to a multiple of.

        Each context-parallel rank takes two chunks of every sequence, one from either half.
        """
        size = self.context_parallel_size
        return 2 * size if size > 1 else 1

    @property
    def stream_multiple(self) -> int:
        """Tokens that the computed length of a stream is a multiple of.

        Its context-parallel share divides over the tensor-parallel ranks with sequence
        parallelism.
        """
        tensor = self.tensor_model_parallel_size if self.sequence_parallel else 1
        return math.lcm(self.sequence_multiple, self.context_parallel_size * tensor)

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

    schedule: Literal["constant", "cosine", "linear", "wsd"] = "constant"
    """Shape of the learning rate after warm-up. ``wsd`` (warm-up, stable, decay) stays at the peak
    and falls to ``min_lr`` in the last ``decay_fraction`` of the run."""

    decay_fraction: float = Field(default=0.1, gt=0.0, le=1.0)
    """Share of the run's steps in which ``wsd`` falls; unused by the other schedules."""

    decay_shape: Literal["linear", "cosine", "exponential", "minus_sqrt"] = "linear"
    """How ``wsd`` falls; unused by the other schedules."""

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
    """Shard optimizer state over data- and context-parallel ranks."""


class HeadConfig(Config):
    """The language-model head: logprobs, loss and their gradient on completion tokens only."""

    memory_gb: float = Field(default=1.5, gt=0.0)
    """Memory that the head may use beyond inputs and gradients, 1e9 bytes; decides how much of the
    forward pass it keeps for the backward pass (the choice is logged)."""

    backend: Literal["triton", "torch"] | None = None
    """Row kernels; None is Triton on GPUs and PyTorch on the CPU."""


class PolicyConfig(Config):
    """How the policy is built and trained."""

    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Precision of weights and activations; gradients and optimizer state are float32."""

    parallel: ParallelConfig = Field(default_factory=ParallelConfig)
    """Layout over ranks."""

    optimizer: OptimizerConfig = Field(default_factory=OptimizerConfig)
    """AdamW and its schedule."""

    experts: ExpertsConfig = Field(default_factory=ExpertsConfig)
    """Experts of a mixture."""

    recompute: Literal["none", "full"] = "none"
    """Activation recomputation in the backward pass."""

    head: HeadConfig = Field(default_factory=HeadConfig)
    """Memory and implementation of the language-model head."""


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

    importance: Literal["none", "truncated", "masked", "ppo_clip", "cispo"] = "none"
    """How the ratio to the rollout logprobs enters. ``none``: not at all (REINFORCE);
    ``truncated``: as detached weight, cut at ``max_importance``; ``masked``: as detached weight,
    rows outside ``min_importance`` to ``max_importance`` have no loss; ``ppo_clip``: clipped
    surrogate; ``cispo``: as detached weight, clipped like the surrogate's."""

    min_importance: float = Field(default=0.5, ge=0.0)
    """Lower end of the band of ``masked``."""

    max_importance: float = Field(default=2.0, gt=0.0)
    """Cut of ``truncated``; upper end of the band of ``masked``."""

    clip_low: float = Field(default=0.2, gt=0.0, lt=1.0)
    """``ppo_clip`` and ``cispo`` clip the ratio at ``1 - clip_low``."""

    clip_high: float = Field(default=0.2, gt=0.0)
    """``ppo_clip`` and ``cispo`` clip the ratio at ``1 + clip_high``."""

    entropy_coefficient: float = Field(default=0.0, ge=0.0)
    """Weight of the entropy bonus on completion tokens."""

    @model_validator(mode="after")
    def _importance_band_is_ordered(self) -> "LossConfig":
        if self.importance == "masked" and self.min_importance > self.max_importance:
            raise ValueError(
                "loss.min_importance must not exceed loss.max_importance, "
                f"got {self.min_importance} > {self.max_importance}"
            )
        return self


class BatchConfig(Config):
    """One optimizer step's work."""

    prompts_per_step: int = Field(default=128, ge=1)
    """Groups per optimizer step."""

    group_size: int = Field(default=8, ge=2)
    """Rollouts per group."""

    stream_tokens: int | None = Field(default=None, ge=2)
    """Length of a packed stream (one microbatch), tokens; None is
    ``rollout.max_total_tokens``."""
