"""Problems, prompts, collection of traces, and prefixes."""

from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from prefixrl_mcore.config.base import Config


class PromptConfig(Config):
    """How a problem becomes prompt tokens."""

    style: Literal["chat", "text"] = "chat"
    """``chat`` renders the tokenizer's chat template with a generation prompt; ``text`` encodes
    the template's text as it is (for base models without a chat template)."""

    template: str = (
        "{problem}\n\nPlease reason step by step, and put your final answer within \\boxed{{}}."
    )
    """Python format string with one field ``{problem}``: the user turn, or the whole text."""

    system: str | None = None
    """System turn of the chat; None sends none."""

    @model_validator(mode="after")
    def _template_names_the_problem(self) -> "PromptConfig":
        if "{problem}" not in self.template:
            raise ValueError(
                "data.prompt.template must contain the field {problem}, "
                f"got {self.template!r}; add it where the problem text belongs"
            )
        return self


class DataConfig(Config):
    """Which problems are trained on, and which are only evaluated."""

    problems: Path = Field()
    """JSONL of training problems."""

    held_out: dict[str, Path] = Field(default_factory=dict)
    """Name → JSONL of problems that are never trained on, evaluated beside the training set."""

    id_field: str | None = None
    """JSONL key of the problem id; None numbers the rows ``<file stem>-<row>``."""

    text_field: str = "problem"
    """JSONL key of the problem text."""

    answer_field: str = "answer"
    """JSONL key of the reference answer."""

    answer_format: Literal["plain", "gsm8k"] = "plain"
    """``plain``: the field is the answer; ``gsm8k``: the answer follows ``####`` in the field."""

    max_problems: int | None = Field(default=None, ge=1)
    """Use only the first so many training problems; None uses all."""

    prompt: PromptConfig = Field(default_factory=PromptConfig)
    """Prompt rendering."""

    traces: Path | None = None
    """Trace store to read or write; None is ``traces/`` in the run folder."""

    prefixes: Path | None = None
    """Prefix file to read or write; None is ``prefixes/`` in the run folder."""


class CollectConfig(Config):
    """Rejection sampling from the base policy (cost charged to the run)."""

    max_tries: int = Field(default=2500, ge=1)
    """Tries per problem before it is given up (kept, with its cost)."""

    tries_per_round: int = Field(default=16, ge=1)
    """Rollouts per problem and round; a problem leaves after the round that solved it."""

    problems_per_round: int = Field(default=128, ge=1)
    """Problems in flight in one round."""

    keep_seconds: float = Field(default=300.0, ge=0.0)
    """Seconds between two writes of the tries of a round: so much at most, and the problems that
    are being sampled, is lost when the collection is killed. Each write is a part of the store."""

    temperature: float = Field(default=1.0, gt=0.0)
    """Sampling temperature."""

    seed: int = Field(default=0, ge=0)
    """Seed of the sampler."""

    def most_completions(self, num_problems: int) -> int:
        """Return how many completions the collection samples if it solves no problem."""
        return num_problems * self.max_tries


class PrefixConfig(Config):
    """How prefixes are cut from recorded traces."""

    num_per_trace: int = Field(default=3, ge=1)
    """Prefixes cut from each trace, once, for the whole run."""

    min_fraction: float = Field(default=0.4, gt=0.0, lt=1.0)
    """Shortest prefix, as a fraction of the trace's tokens."""

    max_fraction: float = Field(default=0.8, gt=0.0, lt=1.0)
    """Longest prefix, as a fraction of the trace's tokens."""

    seed: int = Field(default=0, ge=0)
    """Seed of the cut positions."""

    answer_in_prefix: Literal["keep", "drop"] = "keep"
    """What happens to a prefix that already contains the final answer: kept and flagged (the
    paper's recipe filters nothing), or dropped and counted."""

    @model_validator(mode="after")
    def _fractions_are_ordered(self) -> "PrefixConfig":
        if self.min_fraction > self.max_fraction:
            raise ValueError(
                "prefixes.min_fraction must not exceed prefixes.max_fraction, got "
                f"{self.min_fraction} > {self.max_fraction}; swap them"
            )
        return self
