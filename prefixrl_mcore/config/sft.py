"""The supervised phase of ``sft_then_rl``: its settings, and how long traces make it."""

import logging
from collections.abc import Mapping
from typing import Literal

from pydantic import Field

from prefixrl_mcore.config.base import Config, ConfigError
from prefixrl_mcore.config.optimizer import OptimizerConfig

logger = logging.getLogger(__name__)


class SftConfig(Config):
    """Supervised warm-up of the ``sft_then_rl`` baseline on the collected traces."""

    max_epochs: int = Field(default=16, ge=1)
    """Passes over the training traces at most."""

    keep: Literal["best", "last"] = "best"
    """``best``: the epoch with the lowest validation loss; ``last``: the weights after
    ``max_epochs``, whatever the validation loss says."""

    patience: int = Field(default=2, ge=1)
    """With ``keep = "best"``: stop after so many epochs without a lower validation loss."""

    traces_per_step: int = Field(default=16, ge=1)
    """Traces per optimizer step."""

    validation_fraction: float = Field(default=0.125, gt=0.0, lt=1.0)
    """Share of the traces held back to choose the epoch."""

    lr: float = Field(default=1e-5, gt=0.0)
    """Peak learning rate of the supervised phase. Its schedule, warm-up and floor are those of
    ``policy.optimizer``, over the steps of ``max_epochs``."""

    def num_held_back(self, num_traces: int) -> int:
        """Return how many traces choose the epoch.

        Raises:
            ConfigError: if these or the others would be none.
        """
        num_validation = round(self.validation_fraction * num_traces)
        if not 0 < num_validation < num_traces:
            raise ConfigError(
                f"sft.validation_fraction {self.validation_fraction} of {num_traces} traces leaves "
                "nothing to train on or to validate on; collect more traces or change the fraction"
            )
        return num_validation

    def steps_per_epoch(self, num_training: int) -> int:
        """Return the optimizer steps of one epoch; the last one may have fewer traces."""
        return -(-num_training // self.traces_per_step)

    def check_phase(self, optimizer: OptimizerConfig, num_traces: int) -> None:
        """Refuse a phase that the run's schedule does not fit into; needs no policy.

        Args:
            optimizer: the run's.
            num_traces: of the trace store, one per problem.

        Raises:
            ConfigError: if nothing could be held back, or warm-up and decay leave no step.
        """
        num_training = num_traces - self.num_held_back(num_traces)
        num_steps = self.max_epochs * self.steps_per_epoch(num_training)
        length = (
            f"{num_training} of {num_traces} traces, {self.traces_per_step} a step, for "
            f"{self.max_epochs} epochs are {num_steps} steps"
        )
        try:
            optimizer.check_phase(lr=self.lr, num_steps=num_steps)
        except ValueError as error:
            raise ConfigError(
                f"method sft_then_rl: the supervised phase is too short for its schedule ({length})"
                f": {error}. Collect more traces, raise sft.max_epochs, or lower "
                "sft.traces_per_step"
            ) from error
        if optimizer.num_warmup_steps >= num_steps:
            logger.warning(
                "sft: the warm-up of %d steps outlasts the phase (%s): the learning rate stays "
                "below sft.lr (%g)",
                *(optimizer.num_warmup_steps, length, self.lr),
            )


def check_trace_lengths(num_tokens: Mapping[str, int], stream_tokens: int) -> None:
    """Refuse traces that no stream can hold.

    Args:
        num_tokens: problem id -> tokens of its prompt and trace.
        stream_tokens: length of a stream.

    Raises:
        ConfigError: naming the longest.
    """
    problem_id = max(num_tokens, key=num_tokens.__getitem__)
    if num_tokens[problem_id] > stream_tokens:
        raise ConfigError(
            f"method sft_then_rl: prompt and trace of problem {problem_id!r} have "
            f"{num_tokens[problem_id]} tokens, expected at most the {stream_tokens} of a stream; "
            "raise batch.stream_tokens, or rollout.max_total_tokens to what the traces were "
            "collected with"
        )
