"""The trained policy: initial weights, parallel layout, optimizer, loss, batch."""

import math
from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from prefixrl_mcore.config.base import Config
from prefixrl_mcore.config.experts import ExpertsConfig
from prefixrl_mcore.config.optimizer import OptimizerConfig

LogitsDtype = Literal["float32", "bfloat16"]
RecomputeModule = Literal["core_attn", "mlp", "moe", "layernorm"]
LayerSpec = Literal["local", "transformer_engine"]

FP8_BLOCKS = {"tensorwise": 16, "delayed": 16, "mxfp8": 32, "blockwise": 128}
"""Per recipe: sizes of an FP8 matrix product must be multiples of this."""


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
    def arithmetic(self) -> str:
        """The trainer ranks as a product, for messages."""
        return (
            f"TP {self.tensor_model_parallel_size} x PP {self.pipeline_model_parallel_size} x "
            f"CP {self.context_parallel_size} x DP {self.data_parallel_size} = "
            f"{self.world_size} trainer ranks"
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

    @property
    def microbatch_multiple(self) -> int:
        """Microbatches of a data-parallel rank are a multiple of this.

        The interleaved schedule goes around the stages; the plain one takes any number.
        """
        is_interleaved = self.virtual_pipeline_model_parallel_size is not None
        return self.pipeline_model_parallel_size if is_interleaved else 1

    @model_validator(mode="after")
    def _sequence_parallel_needs_tensor_parallel(self) -> "ParallelConfig":
        if self.sequence_parallel and self.tensor_model_parallel_size == 1:
            raise ValueError(
                "policy.parallel.sequence_parallel needs tensor_model_parallel_size > 1, got 1; "
                "switch it off or raise tensor_model_parallel_size"
            )
        return self


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
    """Precision of weights and activations; gradients are float32, and so is optimizer state
    unless ``optimizer.use_precision_aware_optimizer`` keeps it in other types."""

    parallel: ParallelConfig = Field(default_factory=ParallelConfig)
    """Layout over ranks."""

    optimizer: OptimizerConfig = Field(default_factory=OptimizerConfig)
    """AdamW and its schedule."""

    experts: ExpertsConfig = Field(default_factory=ExpertsConfig)
    """Experts of a mixture."""

    layer_spec: LayerSpec | None = None
    """Megatron's layers: its own ones with our attention (``local``), or Transformer Engine's. None
    is Transformer Engine where it and CUDA are there and the model is bfloat16, otherwise
    ``local``; the choice is logged with its reason."""

    recompute: Literal["none", "selective", "full"] = "none"
    """Activations that the backward pass computes again instead of keeping them: none, those of
    ``recompute_modules``, or all but the inputs of the layers."""

    recompute_modules: tuple[RecomputeModule, ...] | None = None
    """What ``selective`` recomputes: attention after the projections (``core_attn``; keeps nothing
    of size T x T either way), the feed-forward layer (``mlp``), the mixture of experts with its
    routing (``moe``), the norms (``layernorm``). None is ``mlp``, in a mixture of experts
    ``moe``."""

    fp8: Literal["hybrid", "e4m3"] | None = None
    """Run the layers' matrix products in FP8, with E4M3 forward and E5M2 backward (``hybrid``) or
    E4M3 throughout; needs ``transformer_engine``. Weights, the head and sums stay as they are."""

    fp8_recipe: Literal["tensorwise", "delayed", "mxfp8", "blockwise"] = "tensorwise"
    """How FP8 scales are found, by Megatron's names. ``delayed`` scales by earlier steps, which a
    resumed run has forgotten; ``mxfp8`` needs compute capability 10, ``blockwise`` 9."""

    gradient_accumulation_fusion: bool | None = None
    """Add weight gradients to the float32 buffer inside the matrix product. None is yes where
    Megatron can: with Transformer Engine's layers, or apex's kernel."""

    head: HeadConfig = Field(default_factory=HeadConfig)
    """Memory and implementation of the language-model head."""

    @property
    def weight_bytes(self) -> int:
        """Bytes of a weight or an activation."""
        return 2 if self.dtype == "bfloat16" else 4

    @property
    def stream_multiple(self) -> int:
        """Tokens that the computed length of a stream is a multiple of.

        FP8 matrix products take whole blocks of tokens on each rank, before and after sequence
        parallelism gathers them.
        """
        parallel = self.parallel
        if self.fp8 is None:
            return parallel.stream_multiple
        tensor = parallel.tensor_model_parallel_size if parallel.sequence_parallel else 1
        block = FP8_BLOCKS[self.fp8_recipe]
        return math.lcm(parallel.stream_multiple, parallel.context_parallel_size * tensor * block)

    @model_validator(mode="after")
    def _recomputed_modules_belong_to_selective(self) -> "PolicyConfig":
        if self.recompute_modules is not None and self.recompute != "selective":
            raise ValueError(
                f"policy.recompute_modules has a meaning only with recompute = 'selective', got "
                f"{self.recompute!r}; leave it out or set recompute"
            )
        if self.recompute_modules == ():
            raise ValueError(
                "policy.recompute_modules is empty; name modules, or set recompute = 'none'"
            )
        return self

    @model_validator(mode="after")
    def _transformer_engine_is_bfloat16(self) -> "PolicyConfig":
        if self.layer_spec == "transformer_engine" and self.dtype != "bfloat16":
            raise ValueError(
                "policy.layer_spec = 'transformer_engine' needs dtype = 'bfloat16' (its attention "
                f"over packed sequences is 16-bit), got {self.dtype!r}; use layer_spec = 'local'"
            )
        return self

    @model_validator(mode="after")
    def _fp8_runs_in_transformer_engine_on_bfloat16(self) -> "PolicyConfig":
        if self.fp8 is not None and (self.layer_spec == "local" or self.dtype != "bfloat16"):
            raise ValueError(
                f"policy.fp8 = {self.fp8!r} needs layer_spec = 'transformer_engine' (or none "
                f"given) and dtype = 'bfloat16', got layer_spec = {self.layer_spec!r} and dtype = "
                f"{self.dtype!r}; leave fp8 out or change these"
            )
        return self

    @model_validator(mode="after")
    def _a_recipe_needs_fp8(self) -> "PolicyConfig":
        if self.fp8 is None and self.fp8_recipe != "tensorwise":
            raise ValueError(
                f"policy.fp8_recipe = {self.fp8_recipe!r} is used with policy.fp8 only, got none; "
                "set fp8 or leave the recipe out"
            )
        return self

    @model_validator(mode="after")
    def _other_precisions_of_state_are_for_bfloat16(self) -> "PolicyConfig":
        if self.optimizer.use_precision_aware_optimizer and self.dtype != "bfloat16":
            raise ValueError(
                "policy.optimizer.use_precision_aware_optimizer needs policy.dtype = 'bfloat16', "
                f"got {self.dtype!r}: float32 weights are their own main weights"
            )
        return self


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

    kl: Literal["none", "k1", "k2", "k3"] = "none"
    """Estimate of KL(policy || reference) that is added to the loss of each row, with
    ``d = logprob - reference_logprob``: ``k1`` is ``d``, ``k2`` ``d^2 / 2``, ``k3``
    ``exp(-d) - 1 + d``. ``none`` has no reference and costs nothing; the others cost one forward
    pass a step, and twice a rank's weights in host memory."""

    kl_coefficient: float = Field(default=0.0, ge=0.0)
    """Weight of ``kl``."""

    reference_path: Path | None = None
    """Hugging Face folder of the reference, of the model's own shape; None is ``model.path``, the
    weights before any training (``sft_then_rl`` must name one: before or after its warm-up)."""

    @model_validator(mode="after")
    def _kl_and_its_coefficient_go_together(self) -> "LossConfig":
        if (self.kl == "none") != (self.kl_coefficient == 0.0):
            raise ValueError(
                f"loss.kl = {self.kl!r} and loss.kl_coefficient = {self.kl_coefficient} do not go "
                'together: set both, or leave both out (loss.kl = "none", loss.kl_coefficient = 0)'
            )
        if self.kl == "none" and self.reference_path is not None:
            raise ValueError(
                f"loss.reference_path = {self.reference_path} is used with loss.kl only, got "
                '"none"; set loss.kl and loss.kl_coefficient, or leave the path out'
            )
        return self

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
