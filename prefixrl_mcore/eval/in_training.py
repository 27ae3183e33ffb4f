"""The short evaluation inside training: every set without a prefix, and prefix bins."""

from collections.abc import Mapping, Sequence

from prefixrl_mcore.config.run import EvaluationConfig
from prefixrl_mcore.eval.pass_at_k import prefix_bins
from prefixrl_mcore.eval.runner import Evaluator
from prefixrl_mcore.records import Problem

BIN_SAMPLES = 1
"""Completions per problem and prefix bin; the bins' curves are means over problems."""


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
    for name, problems in sets.items():
        starts = evaluator.plain_starts(problems[: config.max_problems])
        result = evaluator.evaluate(
            starts, num_samples=config.training_num_samples, label=f"{label}/{name}"
        )
        values[f"eval/{name}/accuracy"] = result.accuracy
        values[f"eval/{name}/accuracy_stderr"] = result.accuracy_stderr
        values[f"eval/{name}/all_negative_fraction"] = result.all_negative_fraction
        values[f"eval/{name}/completion_tokens_mean"] = result.completion_tokens / (
            len(starts) * result.num_samples
        )
    for prefix_bin in prefix_bins(config.prefix_bins):
        bin_label = f"{label}/bins/{prefix_bin.name}"
        problems = sets["train"][: config.max_problems]
        starts = evaluator.starts_in_bin(problems, prefix_bin, label=bin_label)
        if starts:
            result = evaluator.evaluate(starts, num_samples=BIN_SAMPLES, label=bin_label)
            values[f"eval/bins/{prefix_bin.name}/accuracy"] = result.accuracy
    return values
