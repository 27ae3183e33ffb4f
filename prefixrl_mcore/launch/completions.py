"""How many completions each stage of a run samples at most: its price beside the updates."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from prefixrl_mcore.config.run import RunConfig
from prefixrl_mcore.data.problem_sets import TRAINING_SET, read_evaluation_sets
from prefixrl_mcore.eval.parts import most_completions, parts_in_training, parts_of_checkpoint
from prefixrl_mcore.records import Problem


@dataclass(frozen=True, kw_only=True, slots=True)
class Completions:
    """Upper bounds, for the whole run."""

    training: int
    """Rollouts that are trained on, and those that a schedule begins beside them."""

    num_evaluations: int
    """Evaluations inside training."""

    evaluation: int
    """Of one evaluation inside training."""

    checkpoint: int
    """Of one ``prefixrl eval``."""

    collection: int
    """Of a collection that solves nothing; 0 for a method without traces."""

    @property
    def in_training(self) -> int:
        """Of all evaluations inside training."""
        return self.num_evaluations * self.evaluation


def count_completions(config: RunConfig, sets: Mapping[str, Sequence[Problem]]) -> Completions:
    """Return the bounds for the run's problems, by name of their set."""
    num_collected = 0 if config.method == "rl" else len(sets[TRAINING_SET])
    return Completions(
        training=_in_training_steps(config),
        num_evaluations=config.evaluation.num_in_training(config.trainer.num_steps),
        evaluation=most_completions(parts_in_training(config.evaluation, sets)),
        checkpoint=most_completions(parts_of_checkpoint(config.evaluation, sets)),
        collection=config.collect.most_completions(num_collected),
    )


def completions_text(config: RunConfig) -> str:
    """Return the bounds in words, one stage per line; without problem files only those of steps.

    Raises:
        ValueError: if a problem file is there and wrong.
    """
    training = (
        f"training {_in_training_steps(config):,} = {config.trainer.num_steps:,} steps x "
        f"{config.most_completions_per_step:,}"
    )
    files = (config.data.problems, *config.data.held_out.values())
    if not all(path.exists() for path in files):
        return (
            f"{training}\nevaluation and collection: known when the problem files are there; "
            f"collection {config.collect.max_tries:,} a problem"
        )
    sets = read_evaluation_sets(config)
    count = count_completions(config, sets)
    lines = [
        training,
        f"evaluation in training {count.in_training:,} = {count.num_evaluations:,} x "
        f"{count.evaluation:,}",
        f"prefixrl eval {count.checkpoint:,} for each checkpoint",
    ]
    if count.collection:
        lines.append(
            f"collection {count.collection:,} = {len(sets[TRAINING_SET]):,} problems x "
            f"{config.collect.max_tries:,} tries; a solved problem has no more of them"
        )
    return "\n".join(lines)


def _in_training_steps(config: RunConfig) -> int:
    return config.trainer.num_steps * config.most_completions_per_step
