"""What an evaluation samples, part by part: which problems, with which prefix, how often.

The evaluations take their parts from here, and ``prefixrl check`` counts them. Bins and unlock
curve leave out problems without a trace, so that the counts are upper bounds. No torch.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from prefixrl_mcore.config.run import EvaluationConfig
from prefixrl_mcore.data.problem_sets import TRAINING_SET
from prefixrl_mcore.eval.pass_at_k import PrefixBin, prefix_bins
from prefixrl_mcore.records import Problem

BIN_SAMPLES = 1
"""Completions per problem and prefix bin in training; the curves are means over problems."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """Problems that are sampled equally often, with prefixes of one kind."""

    name: str
    """Names the part in results, rollout ids and seeds: ``set/aime25``, ``unlock/0.30``."""

    problems: Sequence[Problem]
    """What is sampled."""

    num_samples: int
    """Completions of each."""

    prefix: PrefixBin | float | None = None
    """A random cut of the trace inside a bin, a cut at a fraction of it, or no prefix."""


def parts_of_checkpoint(
    evaluation: EvaluationConfig, sets: Mapping[str, Sequence[Problem]]
) -> list[Part]:
    """Return the parts of ``prefixrl eval``: sets, bins, unlock curve."""
    few = min(evaluation.num_samples, evaluation.unlock_num_samples)
    training = sets[TRAINING_SET][: evaluation.max_problems]
    return [
        *(
            Part(
                name=f"set/{name}",
                problems=problems[: evaluation.max_problems],
                num_samples=evaluation.train_set_num_samples
                if name == TRAINING_SET
                else evaluation.num_samples,
            )
            for name, problems in sets.items()
        ),
        *(
            Part(name=f"bin/{one.name}", problems=training, num_samples=few, prefix=one)
            for one in prefix_bins(evaluation.prefix_bins)
        ),
        *(
            Part(name=f"unlock/{fraction:.2f}", problems=training, num_samples=few, prefix=fraction)
            for fraction in evaluation.unlock_fractions
        ),
    ]


def parts_in_training(
    evaluation: EvaluationConfig, sets: Mapping[str, Sequence[Problem]]
) -> list[Part]:
    """Return the parts of an evaluation inside training: sets, then bins."""
    training = sets[TRAINING_SET][: evaluation.max_problems]
    return [
        *(
            Part(
                name=name,
                problems=problems[: evaluation.max_problems],
                num_samples=evaluation.training_num_samples,
            )
            for name, problems in sets.items()
        ),
        *(
            Part(name=f"bins/{one.name}", problems=training, num_samples=BIN_SAMPLES, prefix=one)
            for one in prefix_bins(evaluation.prefix_bins)
        ),
    ]


def most_completions(parts: Iterable[Part]) -> int:
    """Return how many completions the parts are if every problem has a trace."""
    return sum(len(part.problems) * part.num_samples for part in parts)
