"""``prefixrl eval``: a checkpoint's pass@k, accuracy by prefix bin, and unlock curve, as JSON.

The checkpoint is converted to a Hugging Face folder and served by the rollout engine, so that
evaluation needs no trainer. Results are written problem by problem (``part_file.py``): a killed
evaluation goes on behind what it has, with the samples that an undisturbed one would have drawn
where the engine honours seeds. Nothing of it is charged in FLOPs.
"""

import itertools
import json
import logging
import shutil
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from prefixrl_mcore.checkpoint.convert.hf_folder import digest_of_weights
from prefixrl_mcore.checkpoint.convert.offline import convert_to_hf
from prefixrl_mcore.checkpoint.manifest import MANIFEST_NAME, hash_file
from prefixrl_mcore.checkpoint.run_checkpoints import read_trainer_state, step_folder
from prefixrl_mcore.checkpoint.save_load import latest_checkpoint
from prefixrl_mcore.config.base import ConfigError
from prefixrl_mcore.config.run import RunConfig
from prefixrl_mcore.data.prefix_cuts import check_room
from prefixrl_mcore.data.problem_sets import read_evaluation_sets
from prefixrl_mcore.eval.ending import exits_at_signals
from prefixrl_mcore.eval.part_file import PartFile, differing_keys, hash_starts
from prefixrl_mcore.eval.parts import Part, parts_of_checkpoint
from prefixrl_mcore.eval.pass_at_k import bootstrap_mean, mean_pass_at_k, prefix_bins
from prefixrl_mcore.eval.runner import EvaluationResult, Evaluator, StartResults
from prefixrl_mcore.eval.setup import build_evaluator
from prefixrl_mcore.observability.atomic import write_json_atomic
from prefixrl_mcore.observability.progress import Progress
from prefixrl_mcore.observability.run_folder import RunFolder
from prefixrl_mcore.records import PrefixedProblem, Problem

logger = logging.getLogger(__name__)

Parts = dict[str, dict[str, Any]]
"""Part label → {"num_correct": [...], "num_samples": n, "starts": their digest}: what a continued
evaluation reuses, each only if it would sample from the same starts."""

Plan = Sequence[tuple[Part, list[PrefixedProblem]]]
"""Parts and what each samples from."""

_WITHOUT_EFFECT = {"every_steps", "training_num_samples", "keep_seconds", "pass_at"}
"""Settings of ``evaluation`` that decide no result of ``prefixrl eval``."""


def evaluate_checkpoint(config: RunConfig, which: str) -> Path:
    """Evaluate one checkpoint and return the JSON file with the results.

    Args:
        config: the run's config; ``evaluation`` says how many samples and which bins.
        which: ``latest``, ``base`` (the initial weights), a step number, or a checkpoint folder.

    Raises:
        ConfigError: if there is no such checkpoint.
    """
    start = time.perf_counter()
    folder = RunFolder(config.run_folder)
    sets = read_evaluation_sets(config)
    folder.check(config)
    name, checkpoint = find_checkpoint(folder, which)
    folder.claim(config)
    out = folder.eval / f"{name}.json"
    step = 0 if checkpoint is None else read_trainer_state(checkpoint).step
    settings = _settings(config, checkpoint)
    with ExitStack() as stack:
        stack.callback(lambda: folder.add_stage_seconds("eval", time.perf_counter() - start))
        stack.enter_context(exits_at_signals())
        model_folder = config.model.path
        if checkpoint is not None:
            model_folder = folder.eval / f".hf-{name}"
            shutil.rmtree(model_folder, ignore_errors=True)
            convert_to_hf(checkpoint, model_folder)
            stack.callback(shutil.rmtree, model_folder, ignore_errors=True)
        evaluator = stack.enter_context(
            build_evaluator(
                config,
                model_folder=model_folder,
                temperature=config.evaluation.temperature,
                logs_folder=folder.logs / f"eval-{name}",
                problems=itertools.chain.from_iterable(sets.values()),
            )
        )
        plan = _plan(config, evaluator, sets)
        for _, starts in plan:
            check_room(starts, config.rollout.max_total_tokens)
        parts = _read_parts(out, settings, plan)
        _evaluate_parts(config, evaluator, plan, parts, settings=settings, out=out, which=which)
    summary = _summarise(config, step, checkpoint, parts)
    write_json_atomic(out, {**summary, "is_complete": True, "settings": settings, "parts": parts})
    _show(summary, out)
    return out


def _evaluate_parts(
    config: RunConfig,
    evaluator: Evaluator,
    plan: Plan,
    parts: Parts,
    *,
    settings: dict[str, Any],
    out: Path,
    which: str,
) -> None:
    """Add the parts that are missing; what is there of one is on disk all the time.

    Args:
        config: the run's.
        evaluator: holds the weights.
        plan: parts and their contexts.
        parts: what is done; the others are added.
        settings: what decides the parts.
        out: the JSON file.
        which: the checkpoint, as the user names it.
    """
    sizes = {part.name: len(starts) * part.num_samples for part, starts in plan}
    num_done = sum(size for name, size in sizes.items() if name in parts)
    file = progress_file(config.run_folder, which)
    with Progress(f"eval {out.stem}", total=sum(sizes.values()), file=file) as progress:
        for part, starts in plan:
            if part.name in parts:
                continue
            part_file = PartFile(
                out.with_suffix(".part.jsonl"),
                settings=settings,
                label=part.name,
                starts=starts,
                num_samples=part.num_samples,
            )
            num_known = len(part_file.results) * part.num_samples
            progress.update(num_done + num_known, waiting_for=part.name)
            result = evaluator.evaluate(
                starts,
                num_samples=part.num_samples,
                label=f"{out.stem}/{part.name}",
                known=part_file.results,
                on_results=partial(_keep, part_file, progress, num_done, part.num_samples),
                keep_seconds=config.evaluation.keep_seconds,
            )
            parts[part.name] = {
                "num_correct": result.num_correct,
                "num_samples": result.num_samples,
                "starts": part_file.starts_hash,
            }
            write_json_atomic(out, {"is_complete": False, "settings": settings, "parts": parts})
            part_file.remove()
            num_done += sizes[part.name]
            progress.update(num_done, accuracy=result.accuracy)
        progress.update(num_done)  # where nothing was missing, too


def _keep(
    part_file: PartFile, progress: Progress, num_before: int, num_samples: int, new: StartResults
) -> None:
    """Write results of the part under way, and show them.

    Args:
        part_file: of the part.
        progress: of the evaluation, in samples.
        num_before: samples of the parts before.
        num_samples: of each context.
        new: the results.
    """
    part_file.append(new)
    progress.update(num_before + len(part_file.results) * num_samples)


def progress_file(run_folder: Path, which: str) -> Path:
    """Return where the evaluation of ``which`` writes its progress."""
    return run_folder / f"progress-eval-{Path(which).name}.json"


def find_checkpoint(folder: RunFolder, which: str) -> tuple[str, Path | None]:
    """Return (name, checkpoint folder) for ``which``; the folder is None for ``base``.

    Raises:
        ConfigError: if there is no such checkpoint.
    """
    if which == "base":
        return "base", None
    if which == "latest":
        latest = latest_checkpoint(folder.checkpoints)
        if latest is None:
            raise ConfigError(
                f"{folder.checkpoints}: no complete checkpoint; run prefixrl train first, or give "
                "--checkpoint base"
            )
        return latest.name, latest
    path = step_folder(folder.checkpoints, int(which)) if which.isdigit() else Path(which)
    if not path.is_dir():
        known = sorted(p.name for p in folder.checkpoints.glob("step-*") if p.is_dir())
        raise ConfigError(
            f"checkpoint {path}: does not exist; there are: {', '.join(known) or 'none'}"
        )
    return path.name, path


def _settings(config: RunConfig, checkpoint: Path | None) -> dict[str, Any]:
    """Return what decides all parts, beside what each samples from; nothing else is mixed."""
    chosen = config.evaluation.model_dump(mode="json", exclude=_WITHOUT_EFFECT)
    if checkpoint is None:
        weights = digest_of_weights(config.model.path)
    else:
        weights = hash_file(checkpoint / MANIFEST_NAME)
    return chosen | {"seed": config.seed, "weights": weights}


def _read_parts(out: Path, settings: dict[str, Any], plan: Plan) -> Parts:
    """Return the parts of an interrupted evaluation with the same settings and starts.

    Args:
        out: the JSON file.
        settings: of this evaluation.
        plan: its parts; problems and traces may have changed since.
    """
    if not out.exists():
        return {}
    before = json.loads(out.read_text())
    if before["is_complete"]:
        return {}
    found: Parts = before["parts"]
    if differing := differing_keys(before["settings"], settings):
        logger.warning(
            "%s: finished parts that are not used here (other %s): %s",
            *(out, ", ".join(differing), ", ".join(found)),
        )
        return {}
    digests = {part.name: hash_starts(starts) for part, starts in plan}
    parts = {name: part for name, part in found.items() if part["starts"] == digests.get(name)}
    if dropped := [name for name in found if name not in parts]:
        logger.warning(
            "%s: finished parts that are not used here (other starts: problems or traces have "
            "changed): %s",
            *(out, ", ".join(dropped)),
        )
    logger.info("%s: continuing, %d parts are done", out, len(parts))
    return parts


def _plan(config: RunConfig, evaluator: Evaluator, sets: dict[str, list[Problem]]) -> Plan:
    """Return each part and its contexts; parts without any context are left out."""
    if not evaluator.traces:
        logger.warning("no trace store: prefix bins and the unlock curve are left out")
    planned = [
        (part, evaluator.starts(part, label=part.name))
        for part in parts_of_checkpoint(config.evaluation, sets)
    ]
    return [(part, starts) for part, starts in planned if starts]


def _summarise(
    config: RunConfig, step: int, checkpoint: Path | None, parts: Parts
) -> dict[str, Any]:
    """Return sets, bins and unlock curve with their intervals."""
    results = {
        label: EvaluationResult(
            num_correct=tuple(part["num_correct"]),
            num_samples=part["num_samples"],
            completion_tokens=0,
        )
        for label, part in parts.items()
    }
    bins, unlock = [], []
    for prefix_bin in prefix_bins(config.evaluation.prefix_bins):
        if result := results.get(f"bin/{prefix_bin.name}"):
            edges = {"low": prefix_bin.low, "high": prefix_bin.high}
            bins.append(edges | _proportion(result))
    for fraction in config.evaluation.unlock_fractions:
        if result := results.get(f"unlock/{fraction:.2f}"):
            unlock.append({"fraction": fraction} | _proportion(result))
    return {
        "step": step,
        "checkpoint": str(checkpoint or config.model.path),
        "temperature": config.evaluation.temperature,
        "sets": {
            label.removeprefix("set/"): _set_summary(label, result, config.evaluation.pass_at)
            for label, result in results.items()
            if label.startswith("set/")
        },
        "bins": bins,
        "unlock": unlock,
    }


def _proportion(result: EvaluationResult) -> dict[str, float]:
    """Return the mean accuracy with its bootstrap interval over problems."""
    estimate = bootstrap_mean([count / result.num_samples for count in result.num_correct])
    return {
        "accuracy": estimate.value,
        "ci_low": estimate.low,
        "ci_high": estimate.high,
        "num_rollouts": len(result.num_correct) * result.num_samples,
    }


def _set_summary(label: str, result: EvaluationResult, pass_at: Sequence[int]) -> dict[str, Any]:
    """Return accuracy and pass@k of one problem set."""
    too_large = [k for k in pass_at if k > result.num_samples]
    if too_large:
        logger.warning(
            "%s: pass@k left out for k = %s: only %d samples (evaluation.train_set_num_samples of "
            "training problems, num_samples of the others)",
            label,
            too_large,
            result.num_samples,
        )
    num_samples = [result.num_samples] * len(result.num_correct)
    estimates = {
        str(k): mean_pass_at_k(num_samples, result.num_correct, k)
        for k in pass_at
        if k <= result.num_samples
    }
    return {
        "num_problems": len(result.num_correct),
        "num_samples": result.num_samples,
        "accuracy": result.accuracy,
        "accuracy_stderr": result.accuracy_stderr,
        "all_negative_fraction": result.all_negative_fraction,
        "pass_at_k": {
            k: {"value": e.value, "low": e.low, "high": e.high} for k, e in estimates.items()
        },
    }


def _show(summary: dict[str, Any], out: Path) -> None:
    """Print the results as tables."""
    console = Console()
    table = Table(title=f"{summary['checkpoint']}, T = {summary['temperature']}, no prefix")
    for column in ("set", "problems", "samples", "pass@k [95 % interval]"):
        table.add_column(column)
    for name, values in summary["sets"].items():
        cells = [
            f"@{k} {e['value']:.3f} [{e['low']:.3f}, {e['high']:.3f}]"
            for k, e in values["pass_at_k"].items()
        ]
        table.add_row(
            name, str(values["num_problems"]), str(values["num_samples"]), "\n".join(cells)
        )
    console.print(table)
    _show_curve(console, "accuracy by prefix bin", summary["bins"], _bin_name)
    _show_curve(console, "unlock curve", summary["unlock"], lambda row: f"{row['fraction']:.2f}")
    console.print(f"written: {out}", highlight=False)


def _bin_name(row: dict[str, float]) -> str:
    """Return the label of a bin's row."""
    return "none" if row["high"] == 0 else f"{row['low']:.2f}-{row['high']:.2f}"


def _show_curve(
    console: Console,
    title: str,
    rows: Sequence[dict[str, float]],
    name: Callable[[dict[str, float]], str],
) -> None:
    """Print one table of proportions with bars; nothing when there are no rows."""
    if not rows:
        return
    table = Table(title=title)
    for column in ("prefix", "accuracy [95 % interval]", ""):
        table.add_column(column)
    for row in rows:
        interval = f"{row['accuracy']:.3f} [{row['ci_low']:.3f}, {row['ci_high']:.3f}]"
        table.add_row(name(row), interval, "#" * round(30 * row["accuracy"]))
    console.print(table)
