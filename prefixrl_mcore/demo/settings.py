"""What the demo's task looks like (``configs/demo/task.toml``); no torch."""

from pydantic import Field

from prefixrl_mcore.config.base import Config
from prefixrl_mcore.demo.quiz import Quiz


class TaskConfig(Config):
    """What the demo's task looks like; the run's own settings are a ``RunConfig``."""

    num_parts: int = Field(default=8, ge=2)
    """Parts of a quiz problem."""

    num_ops: int = Field(default=8, ge=1)
    """Different operations; part ``i`` uses operation ``i mod num_ops``."""

    num_values: int = Field(default=3, ge=2)
    """Possible answers of one part."""

    sound_probability: float = Field(default=0.08, gt=0.0, lt=1.0)
    """Share of sound steps in the demonstrations that the base policy imitates last."""

    base_steps: int = Field(default=360, ge=1)
    """Optimizer steps of the base policy's training."""

    num_problems: int = Field(default=16, ge=2)
    """Training problems, each unsolved in the screening."""

    num_held_out: int = Field(default=32, ge=2)
    """Held-out problems, not screened."""

    screening_samples: int = Field(default=64, ge=1)
    """Samples of the base policy in which a training problem must stay unsolved (not charged)."""

    seed: int = Field(default=0, ge=0)
    """Seed of rules, problems and base policy."""

    @property
    def quiz(self) -> Quiz:
        """The rules."""
        return Quiz(
            num_parts=self.num_parts,
            num_ops=self.num_ops,
            num_values=self.num_values,
            seed=self.seed,
        )
