"""What is judged right, and by which class."""

from typing import Literal

from pydantic import Field, field_validator

from prefixrl_mcore.config.base import Config


class RewardConfig(Config):
    """Verification of answers, in killable child processes."""

    verifier: str = "prefixrl_mcore.rewards.math_answer:MathVerifier"
    """Class that judges, ``package.module:Class``. The default compares mathematical answers by
    math-verify; a class of yours (docs/rewards.md) says itself what it does with the settings
    below."""

    answer_form: Literal["final", "sequence"] = "final"
    """``final``: the last answer of the completion must equal the reference. ``sequence``: every
    ``\\boxed{}`` of prefix + completion, in order, must equal the reference's comma-separated
    parts (multi-part problems)."""

    require_stop: bool = False
    """Count a completion that did not end by itself as wrong, whatever it says."""

    num_workers: int = Field(default=2, ge=1)
    """Child processes."""

    timeout_seconds: float = Field(default=10.0, gt=0.0)
    """Wall time per answer; the child is killed after it and the answer counts as wrong."""

    memory_limit_bytes: int = Field(default=2 * 1024**3, ge=256 * 1024**2)
    """Address space of one child above what it uses when idle."""

    @field_validator("verifier")
    @classmethod
    def _verifier_names_a_class(cls, verifier: str) -> str:
        module, _, name = verifier.partition(":")
        if not (name.isidentifier() and all(part.isidentifier() for part in module.split("."))):
            raise ValueError("must name a class as package.module:Class")
        return verifier
