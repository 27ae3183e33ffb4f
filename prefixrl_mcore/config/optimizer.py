"""AdamW as Megatron runs it: its schedule, where its state is kept, and in which types."""

from typing import Literal

from pydantic import Field, model_validator

from prefixrl_mcore.config.base import Config

MomentDtype = Literal["float32", "float16", "bfloat16", "float8"]


class OptimizerConfig(Config):
    """AdamW and its schedule."""

    lr: float = Field(default=1e-6, gt=0.0)
    """Peak learning rate."""

    min_lr: float = Field(default=0.0, ge=0.0)
    """Learning rate at the end of a decaying schedule; unused by ``constant``."""

    schedule: Literal["constant", "cosine", "linear", "wsd"] = "constant"
    """Shape of the learning rate after warm-up. ``wsd`` (warm-up, stable, decay) stays at the peak
    and falls to ``min_lr`` in the last ``decay_fraction`` of the steps. With ``sft_then_rl`` each
    phase has a schedule of its own, over its own steps."""

    decay_fraction: float = Field(default=0.1, gt=0.0, le=1.0)
    """Share of a phase's steps in which ``wsd`` falls; unused by the other schedules."""

    decay_shape: Literal["linear", "cosine", "exponential", "minus_sqrt"] = "linear"
    """How ``wsd`` falls; unused by the other schedules."""

    num_warmup_steps: int = Field(default=0, ge=0)
    """Optimizer steps of linear warm-up from zero, of each phase."""

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

    use_precision_aware_optimizer: bool = False
    """Keep main weights and moments in the types named below; needs ``use_distributed_optimizer``,
    a bfloat16 model, and Transformer Engine's FusedAdam (not with ``cpu_offload``)."""

    main_params_dtype: Literal["float32", "float16"] = "float32"
    """Type of the main weights, which the optimizer steps; float16 is scaled."""

    exp_avg_dtype: MomentDtype = "float32"
    """Type of AdamW's first moment; other types than float32 are scaled."""

    exp_avg_sq_dtype: MomentDtype = "float32"
    """Type of AdamW's second moment; as ``exp_avg_dtype``."""

    cpu_offload: bool = False
    """Keep main weights and moments in host memory and step them there; needs a GPU,
    ``use_precision_aware_optimizer`` and all its types at float32."""

    cpu_offload_fraction: float = Field(default=1.0, gt=0.0, le=1.0)
    """Share of the optimizer state that ``cpu_offload`` keeps in host memory."""

    @model_validator(mode="after")
    def _precision_aware_state_is_sharded(self) -> "OptimizerConfig":
        if self.use_precision_aware_optimizer and not self.use_distributed_optimizer:
            raise ValueError(
                "policy.optimizer.use_precision_aware_optimizer needs use_distributed_optimizer, "
                "got false; switch it on (it shards nothing on a single rank)"
            )
        return self

    @model_validator(mode="after")
    def _other_types_need_the_precision_aware_optimizer(self) -> "OptimizerConfig":
        others = self._types_other_than_float32()
        if others and not self.use_precision_aware_optimizer:
            raise ValueError(
                f"policy.optimizer: {', '.join(others)} needs use_precision_aware_optimizer, got "
                "false; switch it on or use float32"
            )
        return self

    @model_validator(mode="after")
    def _offloaded_state_is_float32_and_precision_aware(self) -> "OptimizerConfig":
        if not self.cpu_offload:
            return self
        if not self.use_precision_aware_optimizer:
            raise ValueError(
                "policy.optimizer.cpu_offload needs use_precision_aware_optimizer, got false: "
                "Megatron's hybrid optimizer keeps the main weights itself; switch it on"
            )
        others = self._types_other_than_float32()
        if others:
            raise ValueError(
                f"policy.optimizer.cpu_offload keeps all state in float32, got {', '.join(others)}"
                "; leave the types out"
            )
        return self

    @model_validator(mode="after")
    def _a_fraction_needs_the_offload(self) -> "OptimizerConfig":
        if not self.cpu_offload and self.cpu_offload_fraction != 1.0:
            raise ValueError(
                f"policy.optimizer.cpu_offload_fraction = {self.cpu_offload_fraction} is used with "
                "cpu_offload only, got false; switch it on or leave the fraction out"
            )
        return self

    def num_decay_steps(self, num_steps: int) -> int:
        """Return in how many of a phase's last steps ``wsd`` falls."""
        return max(1, round(self.decay_fraction * num_steps))

    def check_phase(self, *, lr: float, num_steps: int) -> None:
        """Refuse a phase that the schedule does not fit into.

        Args:
            lr: peak learning rate of the phase (``self.lr`` is not read).
            num_steps: its optimizer steps.

        Raises:
            ValueError: if the warm-up leaves no step, the decay does not fit behind it, or
                ``min_lr`` exceeds the peak. ``constant`` fits into any phase.
        """
        warmup, decay = self.num_warmup_steps, self.num_decay_steps(num_steps)
        if self.schedule == "wsd" and warmup + decay > num_steps:
            raise ValueError(
                "policy.optimizer: the warm-up and the decay of wsd must fit into each phase, got "
                f"num_warmup_steps {warmup} + decay_fraction {self.decay_fraction} of {num_steps} "
                f"steps = {decay}; lower one of them"
            )
        if self.schedule != "constant" and warmup >= num_steps:
            raise ValueError(
                "policy.optimizer.num_warmup_steps must be below the number of steps of each phase "
                f"(trainer.num_steps, and those of sft.max_epochs), got {warmup} >= {num_steps}"
            )
        if self.schedule != "constant" and self.min_lr > lr:
            raise ValueError(
                f"policy.optimizer.min_lr must not exceed the peak, got {self.min_lr} > {lr}"
            )

    def _types_other_than_float32(self) -> list[str]:
        """Return ``field = value`` of each type of state that is not float32."""
        return [
            f"{name} = {value!r}"
            for name in ("main_params_dtype", "exp_avg_dtype", "exp_avg_sq_dtype")
            if (value := getattr(self, name)) != "float32"
        ]
