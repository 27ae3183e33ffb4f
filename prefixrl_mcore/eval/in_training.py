"""The short evaluation inside training: every set without a prefix, and prefix bins."""

from collections.abc import Mapping, Sequence

from prefixrl_mcore.config.run import EvaluationConfig
from prefixrl_mcore.eval.parts import parts_in_training
from prefixrl_mcore.eval.runner import EvaluationResult, Evaluator
from prefixrl_mcore.records import Problem


def evaluate_in_training(
    evaluator: Evaluator,
    sets: Mapping[str, Sequence[Problem]],
    config: EvaluationConfig,
    *,
    label: str,
) -> dict[str, float]:
    """Return the ``eval/…`` metrics of the weights that the engine holds.

    Args:
        evaluator: engine, verifier, prompts and, where a store exists, traces.
        sets: name → problems; ``train`` is the one that prefix bins are taken from.
        config: samples per problem, bin edges, limit of problems per set.
        label: names the evaluation in rollout ids and seeds.
    """
    values: dict[str, float] = {}
    for part in parts_in_training(config, sets):
        part_label = f"{label}/{part.name}"
        starts = evaluator.starts(part, label=part_label)
        if not starts and part.prefix is not None:
            continue  # no trace reaches into the bin
        result = evaluator.evaluate(starts, num_samples=part.num_samples, label=part_label)
        values[f"eval/{part.name}/accuracy"] = result.accuracy
        if part.prefix is None:
            values |= _of_set(part.name, result)
    return values


def _of_set(name: str, result: EvaluationResult) -> dict[str, float]:
    """Return what is told of a set beside its accuracy."""
    num_completions = len(result.num_correct) * result.num_samples
    return {
        f"eval/{name}/accuracy_stderr": result.accuracy_stderr,
        f"eval/{name}/all_negative_fraction": result.all_negative_fraction,
        f"eval/{name}/completion_tokens_mean": result.completion_tokens / num_completions,
    }
