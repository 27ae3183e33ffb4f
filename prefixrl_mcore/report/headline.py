"""The numbers a reader looks for first: accuracy reached, and the FLOPs that it took."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from prefixrl_mcore.report.reader import TRAIN_SET, RunRecord

CANDIDATE_THRESHOLDS = (0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
"""Accuracies that runs are compared at; those that some run reached are shown."""

MAX_THRESHOLDS = 5
"""Thresholds shown per problem set: the highest ones reached."""


@dataclass(frozen=True, kw_only=True, slots=True)
class AccuracyPoint:
    """One evaluation of one problem set, without prefixes."""

    step: int
    """Optimizer steps of the evaluated policy."""

    flops: float | None
    """FLOPs charged up to it; None when the evaluation does not say."""

    accuracy: float
    """Mean over problems."""

    stderr: float | None
    """Standard error over problems, if known."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Reach:
    """What it took one run to reach one accuracy."""

    flops: float | None
    """FLOPs at the first evaluation at or above the threshold; None when never reached."""

    budget: float
    """FLOPs at the run's last evaluation."""

    ratio: float | None
    """FLOPs relative to the reference run; of a run that never arrived, its budget over the
    reference's FLOPs. None for the reference, and where the reference itself did not arrive."""

    ratio_kind: Literal["exact", "at_least", "none"]
    """``at_least``: the run spent that much without arriving; ``none``: nothing can be said."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """All runs at one accuracy of one problem set."""

    set_name: str
    """``train`` or a held-out set."""

    threshold: float
    """The accuracy."""

    reaches: tuple[Reach, ...]
    """One per run, in the order of the runs."""


def accuracy_points(run: RunRecord, set_name: str) -> list[AccuracyPoint]:
    """Return the evaluations of one problem set by rising step."""
    key = f"eval/{set_name}/accuracy"
    return [
        AccuracyPoint(
            step=line.step,
            flops=line.get("flops/total"),
            accuracy=line.values[key],
            stderr=line.get(f"{key}_stderr"),
        )
        for line in run.evals
        if key in line.values
    ]


def set_names(runs: Sequence[RunRecord]) -> list[str]:
    """Return the evaluated problem sets, the training problems first."""
    held_out = dict.fromkeys(name for run in runs for name in run.held_out)
    return [TRAIN_SET, *held_out]


def reference_index(runs: Sequence[RunRecord]) -> int:
    """Return which run the others are compared with: the first evaluated PrefixRL run.

    Where there is none, the first PrefixRL run, and otherwise the first run.
    """
    own = [index for index, run in enumerate(runs) if run.method == "prefixrl"]
    return next((index for index in own if runs[index].evals), own[0] if own else 0)


def compare(runs: Sequence[RunRecord]) -> list[Comparison]:
    """Return, for each problem set, all runs at the accuracies that some run reached."""
    comparisons = []
    for set_name in set_names(runs):
        points = [accuracy_points(run, set_name) for run in runs]
        best = max((p.accuracy for run in points for p in run if p.flops is not None), default=0.0)
        reached = [t for t in CANDIDATE_THRESHOLDS if t <= best]
        comparisons += [
            _compare_at(points, set_name, threshold, reference_index(runs))
            for threshold in reached[-MAX_THRESHOLDS:]
        ]
    return comparisons


def _compare_at(
    points: Sequence[Sequence[AccuracyPoint]], set_name: str, threshold: float, reference: int
) -> Comparison:
    """Return all runs at one accuracy."""
    arrived = [_first_flops(run, threshold) for run in points]
    budgets = [max((p.flops for p in run if p.flops is not None), default=0.0) for run in points]
    reaches = tuple(
        _reach(flops, budget, None if i == reference else arrived[reference])
        for i, (flops, budget) in enumerate(zip(arrived, budgets, strict=True))
    )
    return Comparison(set_name=set_name, threshold=threshold, reaches=reaches)


def _first_flops(points: Sequence[AccuracyPoint], threshold: float) -> float | None:
    """Return the FLOPs of the first evaluation at or above ``threshold``."""
    hits = (p.flops for p in points if p.accuracy >= threshold and p.flops is not None)
    return next(hits, None)


def _reach(flops: float | None, budget: float, reference: float | None) -> Reach:
    """Return one run's FLOPs and how they compare with the reference's."""
    if not reference:
        return Reach(flops=flops, budget=budget, ratio=None, ratio_kind="none")
    if flops is not None:
        return Reach(flops=flops, budget=budget, ratio=flops / reference, ratio_kind="exact")
    # A run that stopped before the reference had arrived tells nothing about the ratio.
    if budget <= reference:
        return Reach(flops=None, budget=budget, ratio=None, ratio_kind="none")
    return Reach(flops=None, budget=budget, ratio=budget / reference, ratio_kind="at_least")
