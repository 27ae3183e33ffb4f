"""The numbers behind the charts, as one compact JSON object.

Keys are short because they stand once per run; ``assets/page.js`` is the only reader. Numbers
keep five significant digits, missing ones are null.
"""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from prefixrl_mcore.observability.phases import TIMED
from prefixrl_mcore.report.headline import set_names
from prefixrl_mcore.report.reader import CurvePoint, EvaluationRecord, MetricLine, RunRecord
from prefixrl_mcore.report.style import MARKERS, RunStyle

_TRAIN_KEYS = (
    "rollout/reward_mean",
    "rollout/reward_prefix_mean",
    "rollout/reward_no_prefix_mean",
    "rollout/all_negative_fraction",
    "rollout/all_negative_prefix_fraction",
    "rollout/all_negative_no_prefix_fraction",
    "rollout/all_positive_fraction",
    "rollout/completion_tokens_mean",
    "rollout/stopped_fraction",
    "rollout/tokens_per_second",
    "rollout/cached_context_fraction",
    "loss/entropy_nats",
    "loss/logprob_gap_mean_nats",
    "loss/logprob_gap_max_nats",
    "loss/k3_nats",
    "policy/gradient_norm",
    "policy/learning_rate",
)
_BIN_ACCURACY = re.compile(r"eval/bins/(\d+\.\d+)-(\d+\.\d+)/accuracy")


def build_payload(runs: Sequence[RunRecord], styles: Sequence[RunStyle]) -> dict[str, Any]:
    """Return what the page's charts draw, as plain JSON values."""
    names = set_names(runs)
    return {
        "sets": names,
        "runs": [_run(run, style, names) for run, style in zip(runs, styles, strict=True)],
    }


def _run(run: RunRecord, style: RunStyle, names: Sequence[str]) -> dict[str, Any]:
    """Return one run's curves."""
    eval_keys = [f"eval/{n}/{q}" for n in names for q in ("accuracy", "accuracy_stderr")]
    return {
        "title": style.title,
        "color": style.slot,
        "marker": MARKERS[style.slot],
        "dash": style.dash,
        "collect": _rounded(run.charged("collect")),
        "sft": _rounded(run.charged("sft")),
        "train": _columns(run.train, _TRAIN_KEYS),
        "evals": _columns(run.evals, eval_keys),
        "bins": _bins(run),
        "sft_lines": _warm_up(run.sft),
        "unlock": [_unlock(e) for e in _ends([e for e in run.evaluations if e.unlock])],
        "pass": [_pass_at_k(e) for e in run.evaluations if e.sets][-1:],
        "time": _phase_seconds(run.train),
        "tries": None
        if run.collection is None
        else {
            "solved": list(run.collection.tries_solved),
            "unsolved": list(run.collection.tries_unsolved),
        },
    }


def _columns(lines: Sequence[MetricLine], keys: Iterable[str]) -> dict[str, Any]:
    """Return steps, charged FLOPs and one column per quantity that is known anywhere."""
    known = [key for key in keys if any(key in line.values for line in lines)]
    columns: dict[str, Any] = {
        "step": [line.step for line in lines],
        "flops": [_rounded(line.get("flops/total")) for line in lines],
    }
    return columns | {key: [_rounded(line.get(key)) for line in lines] for key in known}


def _warm_up(lines: Sequence[MetricLine]) -> dict[str, Any]:
    """Return the losses of the supervised warm-up; no columns without one."""
    keys = dict.fromkeys(key for line in lines for key in line.values if "loss" in key)
    columns = {key: [_rounded(line.get(key)) for line in lines] for key in keys}
    return {"step": [line.step for line in lines]} | columns if columns else {}


def _bins(run: RunRecord) -> dict[str, Any] | None:
    """Return accuracy by prefix bin over training, or None when it was never measured.

    Evaluations inside training are preferred; the files of ``eval/`` stand in for them.
    """
    rows: list[tuple[int, Mapping[tuple[float, float], float | None]]] = []
    for line in run.evals:
        found = {
            (float(match[1]), float(match[2])): value
            for key, value in line.values.items()
            if (match := _BIN_ACCURACY.fullmatch(key))
        }
        if found:
            rows.append((line.step, found))
    if not rows:
        rows = [
            (e.step, {(b.low, b.high): b.accuracy for b in e.bins})
            for e in run.evaluations
            if e.bins
        ]
    if not rows:
        return None
    edges = sorted({edge for _, found in rows for edge in found})
    return {
        "edges": [list(edge) for edge in edges],
        "steps": [step for step, _ in rows],
        "values": [[_rounded(found.get(edge)) for _, found in rows] for edge in edges],
    }


def _ends(evaluations: Sequence[EvaluationRecord]) -> list[EvaluationRecord]:
    """Return the first and the last evaluation."""
    return [*evaluations[:1], *evaluations[1:][-1:]]


def _unlock(evaluation: EvaluationRecord) -> dict[str, Any]:
    """Return one unlock curve."""
    return {"step": evaluation.step, "points": [_point(point) for point in evaluation.unlock]}


def _point(point: CurvePoint) -> list[float | None]:
    """Return [fraction, accuracy, low, high, rollouts]."""
    values = (point.low, point.accuracy, point.ci_low, point.ci_high, point.num_rollouts)
    return [_rounded(value) for value in values]


def _pass_at_k(evaluation: EvaluationRecord) -> dict[str, Any]:
    """Return pass@k of every problem set of one evaluation."""
    return {
        "step": evaluation.step,
        "sets": {
            name: [[k, *map(_rounded, estimate)] for k, estimate in sorted(one.pass_at_k.items())]
            for name, one in evaluation.sets.items()
        },
    }


def _phase_seconds(lines: Sequence[MetricLine]) -> dict[str, Any]:
    """Return wall time per phase and step; what no phase claims is ``other``."""
    phases = [p for p in TIMED if any(f"time/{p}_seconds" in line.values for line in lines)]
    columns: dict[str, list[float | None]] = {
        phase: [_rounded(line.get(f"time/{phase}_seconds") or 0.0) for line in lines]
        for phase in phases
    }
    if any("time/step_seconds" in line.values for line in lines):
        columns["other"] = [_rounded(_other_seconds(line, phases)) for line in lines]
    return {"step": [line.step for line in lines], "phases": columns}


def _other_seconds(line: MetricLine, phases: Sequence[str]) -> float:
    """Return the step's time outside all known phases, at least 0."""
    claimed = sum(line.get(f"time/{phase}_seconds") or 0.0 for phase in phases)
    return max(0.0, (line.get("time/step_seconds") or 0.0) - claimed)


def _rounded(value: float | None) -> float | None:
    """Return ``value`` with five significant digits; None for None."""
    if value is None or not math.isfinite(value):
        return None
    if value == int(value) and abs(value) < 1e15:
        return int(value)
    return float(f"{value:.5g}")
