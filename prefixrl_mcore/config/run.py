"""The tree: everything that one run depends on."""

from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from prefixrl_mcore.config.base import Config
from prefixrl_mcore.config.data import CollectConfig, DataConfig, PrefixConfig
from prefixrl_mcore.config.operations import ProfileConfig, StallConfig
from prefixrl_mcore.config.policy import BatchConfig, LossConfig, ModelConfig, PolicyConfig
from prefixrl_mcore.config.reward import RewardConfig
from prefixrl_mcore.config.rollout import RolloutConfig
from prefixrl_mcore.config.sft import SftConfig

Method = Literal["prefixrl", "rl", "sft_then_rl"]


class TrainerConfig(Config):
    """Length and bookkeeping of the training loop."""

    num_steps: int = Field(default=400, ge=1)
    """Optimizer steps of reinforcement learning."""

    max_flops: float | None = Field(default=None, gt=0.0)
    """Stop when the charged FLOPs (collection included; without sampling that a stop interrupted)
    reach this; None has no such limit."""

    max_seconds: float | None = Field(default=None, gt=0.0)
    """Save and stop before this much wall time has passed since the trainer started; None has no
    such limit. The exit code is then 75, and --resume goes on."""

    end_unix_seconds: float | None = Field(default=None, gt=0.0)
    """Save and stop before this time, as ``max_seconds``: the end of a batch job (``date +%s``;
    Slurm gives it to the job as ``SLURM_JOB_END_TIME``). None has no such limit."""

    stop_margin_seconds: float = Field(default=60.0, ge=0.0)
    """Time that is left at a wall-clock limit, beside a step as long as the longest so far and the
    saves that are still to be waited for, each as long as the longest so far: for the way out, and
    for the last save of a run that has not saved before."""

    peak_flops: float | None = Field(default=None, gt=0.0)
    """FLOPs per second that one rank's device computes at most in ``policy.dtype``, dense: the
    denominator of MFU. None takes the data sheet's figure of a known GPU; an unknown device, and
    a CPU, then have no MFU."""

    rollouts_every_steps: int = Field(default=1, ge=1)
    """Steps between two written rollout tables."""

    dry_run_step: bool | None = None
    """Before the first step, run forward and backward once on streams full of the longest
    sequences, so that out-of-memory happens first; changes nothing of the run. None does so on
    GPUs."""

    stall: StallConfig = Field(default_factory=StallConfig)
    """When a rank that makes no progress is reported."""


EVALUATED_QUANTITIES = ("accuracy", "all_negative_fraction", "completion_tokens_mean")
"""What ``eval/<set>/...`` tells of every set of problems in each evaluation inside training."""


class KeepBestConfig(Config):
    """Keep the best checkpoints by one metric of the evaluation inside training."""

    metric: str = Field()
    """``eval/<set>/<quantity>``; the sets are ``train`` and the names of ``data.held_out``, the
    quantities ``accuracy``, ``all_negative_fraction`` and ``completion_tokens_mean``."""

    mode: Literal["max", "min"] = "max"
    """Which end is good."""

    num: int = Field(default=1, ge=1)
    """Checkpoints kept; of equal ones the older."""


class CheckpointConfig(Config):
    """When the trainer saves, and what is kept."""

    every_steps: int = Field(default=50, ge=1)
    """Steps between checkpoints; the last step is always saved."""

    keep_last: int | None = Field(default=2, ge=1)
    """Newest checkpoints kept; None keeps all."""

    keep_every_steps: int | None = Field(default=None, ge=1)
    """Also keep, for good, the checkpoints of steps that are multiples of this; None has no such
    rule."""

    keep_best: KeepBestConfig | None = None
    """Also keep the best checkpoints by a metric; None has no such rule."""

    in_background: bool = True
    """Write checkpoints beside the training steps, from a copy of weights and optimizer state in
    host memory; the step waits only for the copy. Switch it off where host memory has no room for
    that copy: the step then waits for the whole save."""

    @model_validator(mode="after")
    def _keep_every_steps_meets_checkpoints(self) -> "CheckpointConfig":
        if self.keep_every_steps is not None and self.keep_every_steps % self.every_steps:
            raise ValueError(
                "checkpoint.keep_every_steps must be a multiple of checkpoint.every_steps, got "
                f"{self.keep_every_steps} and {self.every_steps}: the steps between are not saved"
            )
        return self

    @model_validator(mode="after")
    def _rules_have_something_to_keep(self) -> "CheckpointConfig":
        rules = {"keep_every_steps": self.keep_every_steps, "keep_best": self.keep_best}
        used = [f"checkpoint.{name}" for name, value in rules.items() if value is not None]
        if self.keep_last is None and used:
            raise ValueError(
                f"checkpoint.keep_last = None keeps every checkpoint, so {' and '.join(used)} "
                "would do nothing; set keep_last to a number or remove the rule"
            )
        return self


class EvaluationConfig(Config):
    """Accuracy during and after training."""

    every_steps: int = Field(default=10, ge=1)
    """Steps between evaluations; step 0 and the last step are always evaluated."""

    temperature: float = Field(default=0.7, gt=0.0)
    """Sampling temperature of evaluations."""

    num_samples: int = Field(default=256, ge=1)
    """Samples per held-out problem of ``prefixrl eval``, as the paper's for its benchmarks."""

    train_set_num_samples: int = Field(default=8, ge=1)
    """Samples per training problem of ``prefixrl eval``: there are many of them, and their accuracy
    is a mean over all. More are needed for pass@k with a larger k, and to screen problems."""

    training_num_samples: int = Field(default=4, ge=1)
    """Samples per problem of evaluations inside training."""

    unlock_num_samples: int = Field(default=8, ge=1)
    """Samples per problem and prefix fraction (or bin) of ``prefixrl eval``."""

    max_problems: int | None = Field(default=None, ge=1)
    """Evaluate only the first so many problems of each set; None evaluates all."""

    keep_seconds: float = Field(default=60.0, ge=0.0)
    """Seconds between two writes of the results of ``prefixrl eval``: so much at most, and the
    problems that are being sampled, is lost when it is killed."""

    pass_at: tuple[int, ...] = (1, 8, 16, 32, 64)
    """Values of k for pass@k; a k above the number of samples is left out, and logged."""

    prefix_bins: tuple[float, ...] = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
    """Edges of the prefix-fraction bins; no prefix is a bin of its own."""

    unlock_fractions: tuple[float, ...] = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
    """Prefix fractions of the unlock curve."""

    def is_due(self, step: int) -> bool:
        """Return whether the policy after ``step`` steps is evaluated; the last one always is."""
        return step % self.every_steps == 0

    def num_in_training(self, num_steps: int) -> int:
        """Return how many evaluations a run of ``num_steps`` steps has."""
        return sum(self.is_due(step) for step in range(num_steps)) + 1


class WandbConfig(Config):
    """Weights & Biases logging."""

    project: str = "prefixrl"
    """Project name."""

    mode: Literal["offline", "online"] = "offline"
    """``offline`` writes to the run folder, to be synced later."""

    every_steps_rollouts: int = Field(default=10, ge=1)
    """Steps between two uploaded rollout tables."""


class MetricsConfig(Config):
    """Where metrics go besides ``metrics.jsonl``, which is always written."""

    wandb: WandbConfig | None = None
    """Weights & Biases; None logs nothing there."""

    tensorboard: bool = False
    """Write TensorBoard events into the run folder."""


class RunConfig(Config):
    """Everything that one run depends on; saved with the run."""

    run_folder: Path = Field()
    """Folder that everything of this run is written to."""

    method: Method = "prefixrl"
    """``prefixrl``, or a baseline: ``rl`` on the original problems only, ``sft_then_rl`` on the
    traces and then the original problems."""

    seed: int = Field(default=0, ge=0)
    """Seed of data order and sampling."""

    model: ModelConfig = Field()
    data: DataConfig = Field()
    collect: CollectConfig = Field(default_factory=CollectConfig)
    prefixes: PrefixConfig = Field(default_factory=PrefixConfig)
    rollout: RolloutConfig = Field(default_factory=RolloutConfig)
    reward: RewardConfig = Field(default_factory=RewardConfig)
    policy: PolicyConfig = Field(default_factory=PolicyConfig)
    loss: LossConfig = Field(default_factory=LossConfig)
    batch: BatchConfig = Field(default_factory=BatchConfig)
    sft: SftConfig = Field(default_factory=SftConfig)
    trainer: TrainerConfig = Field(default_factory=TrainerConfig)
    checkpoint: CheckpointConfig = Field(default_factory=CheckpointConfig)
    evaluation: EvaluationConfig = Field(default_factory=EvaluationConfig)
    metrics: MetricsConfig = Field(default_factory=MetricsConfig)
    profile: ProfileConfig = Field(default_factory=ProfileConfig)

    @property
    def stream_tokens(self) -> int:
        """Length of one packed stream, tokens."""
        return self.batch.stream_tokens or self.rollout.max_total_tokens

    @property
    def shortest_stream_tokens(self) -> int:
        """Least length of a stream that holds the longest sequence and that the layout can cut."""
        multiple = self.policy.stream_multiple
        return -(-self.rollout.max_total_tokens // multiple) * multiple

    @property
    def most_completions_per_step(self) -> int:
        """Completions that a step samples, or begins, at most."""
        schedule, batch = self.rollout.schedule, self.batch
        num_groups = schedule.num_rounds * schedule.num_begun(batch.prompts_per_step)
        return num_groups * batch.group_size

    @property
    def traces_folder(self) -> Path:
        """Folder of the trace store."""
        return self.data.traces or self.run_folder / "traces"

    @property
    def prefixes_folder(self) -> Path:
        """Folder of the prefixed problems."""
        return self.data.prefixes or self.run_folder / "prefixes"

    @model_validator(mode="after")
    def _stream_holds_the_longest_sequence(self) -> "RunConfig":
        if self.stream_tokens < self.rollout.max_total_tokens:
            raise ValueError(
                f"batch.stream_tokens must hold rollout.max_total_tokens, got {self.stream_tokens}"
                f" < {self.rollout.max_total_tokens}; raise the first or lower the second"
            )
        return self

    @model_validator(mode="after")
    def _trainer_and_engine_round_the_same_logits(self) -> "RunConfig":
        """Refuse rounded logits on one side: a float32 model has none to round."""
        if self.model.logits_dtype == "float32":
            return self
        dtypes = {
            "sglang": self.rollout.sglang.dtype,
            "transformers": self.rollout.transformers.dtype,
        }
        for name, dtype in dtypes.items():
            if self.rollout.engine in (None, name) and dtype != self.policy.dtype:
                raise ValueError(
                    'model.logits_dtype = "bfloat16" rounds the logits of bfloat16 models only: '
                    f'with policy.dtype = "{self.policy.dtype}" and rollout.{name}.dtype = '
                    f'"{dtype}" one side would round; make the two equal, or set '
                    'model.logits_dtype = "float32" (rollout.engine = '
                    f"{self.rollout.engine!r}; None may use either engine)"
                )
        return self

    @model_validator(mode="after")
    def _rollouts_of_older_weights_are_weighted(self) -> "RunConfig":
        if self.rollout.schedule.is_off_policy and self.loss.importance == "none":
            raise ValueError(
                "rollout.schedule.overlap and .partial train on rollouts of older weights, which "
                'needs importance weights: got loss.importance = "none"; set "truncated" (or '
                '"masked", "ppo_clip", "cispo"), or switch overlap and partial off'
            )
        return self

    @model_validator(mode="after")
    def _a_reference_after_supervised_warm_up_is_named(self) -> "RunConfig":
        """Refuse to choose silently between the weights before and after the warm-up."""
        if (
            self.method == "sft_then_rl"
            and self.loss.kl != "none"
            and self.loss.reference_path is None
        ):
            raise ValueError(
                f'loss.kl = {self.loss.kl!r} with method = "sft_then_rl" needs '
                "loss.reference_path, got none: the default would be model.path, the weights "
                "before the supervised warm-up; name that folder, or one with warmed-up weights"
            )
        return self

    @model_validator(mode="after")
    def _the_supervised_peak_is_above_the_floor(self) -> "RunConfig":
        optimizer = self.policy.optimizer
        if (
            self.method == "sft_then_rl"
            and optimizer.schedule != "constant"
            and self.sft.lr < optimizer.min_lr
        ):
            raise ValueError(
                f"sft.lr must be at least policy.optimizer.min_lr, got {self.sft.lr} < "
                f"{optimizer.min_lr}: both phases fall to it; raise the first or lower the second"
            )
        return self

    @model_validator(mode="after")
    def _best_checkpoints_have_their_metric(self) -> "RunConfig":
        best = self.checkpoint.keep_best
        if best is None:
            return self
        known = [
            f"eval/{name}/{quantity}"
            for name in ("train", *self.data.held_out)
            for quantity in EVALUATED_QUANTITIES
        ]
        if best.metric not in known:
            raise ValueError(
                f"checkpoint.keep_best.metric is {best.metric!r}, which no evaluation of this run "
                f"makes; expected one of {', '.join(known)}"
            )
        if self.checkpoint.every_steps % self.evaluation.every_steps:
            raise ValueError(
                "checkpoint.every_steps must be a multiple of evaluation.every_steps with "
                f"checkpoint.keep_best, got {self.checkpoint.every_steps} and "
                f"{self.evaluation.every_steps}: checkpoints between evaluations have no "
                f"{best.metric}"
            )
        return self

    @model_validator(mode="after")
    def _profiled_steps_and_ranks_exist(self) -> "RunConfig":
        num_ranks, num_steps = self.policy.parallel.world_size, self.trainer.num_steps
        for name, values, limit, bound in (
            ("steps", self.profile.steps, num_steps, "trainer.num_steps"),
            ("ranks", self.profile.ranks, num_ranks, "the number of ranks in policy.parallel"),
        ):
            beyond = [value for value in values if value >= limit]
            if beyond:
                raise ValueError(
                    f"profile.{name} must be below {bound} = {limit}, got {beyond}; they count "
                    "from 0"
                )
        return self

    @model_validator(mode="after")
    def _completion_fits_the_total(self) -> "RunConfig":
        if self.rollout.max_completion_tokens >= self.rollout.max_total_tokens:
            raise ValueError(
                "rollout.max_completion_tokens must be below rollout.max_total_tokens, got "
                f"{self.rollout.max_completion_tokens} >= {self.rollout.max_total_tokens}"
            )
        return self
