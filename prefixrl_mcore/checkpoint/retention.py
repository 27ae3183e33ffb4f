"""Which checkpoints of a run may be deleted: pure rules, no file is touched here."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from prefixrl_mcore.config.run import KeepBestConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class Retention:
    """What is kept; a checkpoint that no rule keeps is deleted."""

    keep_last: int | None = None
    """Checkpoints written last, at least 1; None keeps all, whatever the other rules say."""

    keep_every_steps: int | None = None
    """Keep every checkpoint whose step is a multiple of this; None has no such rule."""

    keep_best: KeepBestConfig | None = None
    """Keep the best by a metric; None has no such rule."""

    def __post_init__(self) -> None:
        """Refuse counts that would keep nothing."""
        for name, value in (
            ("keep_last", self.keep_last),
            ("keep_every_steps", self.keep_every_steps),
        ):
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1 or None, got {value}")


KEEP_ALL = Retention()
"""Deletes nothing."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Candidate:
    """A complete checkpoint, as far as the rules look at it."""

    name: str
    """Name of its folder."""

    step: int
    """Step of the trainer when it saved."""

    metrics: Mapping[str, float]
    """Evaluation of these weights; empty if there was none."""


def deletable(
    candidates: Sequence[Candidate],
    retention: Retention,
    *,
    protected: frozenset[str],
    abandoned: frozenset[str] = frozenset(),
) -> list[str]:
    """Return the names of the checkpoints that no rule keeps, oldest first.

    Args:
        candidates: the complete checkpoints, in the order in which they were written.
        retention: the rules.
        protected: names that are kept whatever the rules say: the one that ``latest`` names.
        abandoned: names that no rule counts or keeps: of a course that the run has left by going
            back to an older checkpoint.
    """
    if retention.keep_last is None:
        return []
    counted = [candidate for candidate in candidates if candidate.name not in abandoned]
    kept = {candidate.name for candidate in counted[-retention.keep_last :]} | protected
    if retention.keep_every_steps is not None:
        kept |= {c.name for c in counted if c.step % retention.keep_every_steps == 0}
    if retention.keep_best is not None:
        kept |= set(best_names(counted, retention.keep_best))
    return [candidate.name for candidate in candidates if candidate.name not in kept]


def best_names(candidates: Sequence[Candidate], rule: KeepBestConfig) -> list[str]:
    """Return the names of the best checkpoints, best first; of equal ones the older comes first."""
    sign = -1.0 if rule.mode == "max" else 1.0
    ranked = [
        (sign * candidate.metrics[rule.metric], index)
        for index, candidate in enumerate(candidates)
        if math.isfinite(candidate.metrics.get(rule.metric, math.nan))
    ]
    return [candidates[index].name for _, index in sorted(ranked)[: rule.num]]
