"""``summary.json``: the headline curves of one or several runs, for scripts."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from prefixrl_mcore.observability.atomic import write_json_atomic
from prefixrl_mcore.report.headline import reference_index, set_names
from prefixrl_mcore.report.reader import TRAIN_SET, EvaluationRecord, RunRecord, read_runs


def write_summary(
    run_folders: Sequence[Path],
    out: Path,
    *,
    seconds_per_stage: Mapping[str, float] | None = None,
) -> Path:
    """Write the runs' headline curves as JSON and return the file's path.

    ``methods`` has one entry per run, named by its method (with the folder's name where two runs
    share a method). Its lists have one element per evaluation inside training, null where a
    quantity was not measured. ``unlock_curve`` is the policy before training where that was
    measured; each method has the curve of its last measured checkpoint.

    Args:
        run_folders: the runs.
        out: the JSON file; replaced atomically.
        seconds_per_stage: wall time by stage, where somebody measured all of it; None takes what
            each run has recorded.

    Raises:
        ConfigError: if no folder is given, one is given twice, or one holds no run.
    """
    runs = read_runs(run_folders)
    reference = runs[reference_index(runs)]
    summary = {
        "methods": {run.label: _method(run, set_names(runs)) for run in runs},
        "unlock_curve": _unlock_before_training([reference, *runs]),
        "seconds_per_stage": dict(seconds_per_stage)
        if seconds_per_stage is not None
        else {run.label: dict(run.stage_seconds) for run in runs},
    }
    write_json_atomic(out, summary)
    return out


def fallback_lines(run_folders: Sequence[Path]) -> list[str]:
    """Return one line for each reason why a stage was to use SGLang and did not; none is good.

    Raises:
        ConfigError: as ``write_summary``.
    """
    places: dict[str, list[str]] = {}
    for run in read_runs(run_folders):
        for stage, reason in run.fallbacks.items():
            places.setdefault(reason, []).append(f"{run.label} {stage}")
    return [
        f"SGLang was not used in {', '.join(stages)}: {reason}" for reason, stages in places.items()
    ]


def _method(run: RunRecord, names: Sequence[str]) -> dict[str, Any]:
    """Return one run's lists."""
    held_out = [name for name in names if name != TRAIN_SET]
    accuracies = {name: [line.get(f"eval/{name}/accuracy") for line in run.evals] for name in names}
    measured = [evaluation for evaluation in run.evaluations if evaluation.unlock]
    return {
        "run_folder": str(run.folder),
        "engines": dict(run.engines),
        "fallbacks": dict(run.fallbacks),
        "steps": [line.step for line in run.evals],
        "total_flops": [line.get("flops/total") for line in run.evals],
        "collect_flops": run.charged("collect"),
        "sft_flops": run.charged("sft"),
        "train_accuracy": accuracies[TRAIN_SET],
        "heldout_accuracy": accuracies[held_out[0]] if held_out else [],
        "heldout_set": held_out[0] if held_out else None,
        "accuracy_by_set": accuracies,
        "all_negative_fraction": [
            line.get("eval/train/all_negative_fraction") for line in run.evals
        ],
        "unlock_curve": _unlock(measured[-1]) if measured else None,
    }


def _unlock_before_training(runs: Sequence[RunRecord]) -> dict[str, Any] | None:
    """Return the first unlock curve of untrained weights that some run has measured."""
    for run in runs:
        for evaluation in run.evaluations:
            if evaluation.unlock and evaluation.step == 0:
                return _unlock(evaluation)
    return None


def _unlock(evaluation: EvaluationRecord) -> dict[str, Any]:
    """Return an unlock curve as lists."""
    points = evaluation.unlock
    return {
        "step": evaluation.step,
        "fraction": [point.low for point in points],
        "accuracy": [point.accuracy for point in points],
        "ci_low": [point.ci_low for point in points],
        "ci_high": [point.ci_high for point in points],
        "num_rollouts": [point.num_rollouts for point in points],
    }
