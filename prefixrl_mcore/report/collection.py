"""What rejection sampling cost and found, as one record per trace store."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from prefixrl_mcore.data.traces import AttemptRecord, TraceStore


@dataclass(frozen=True, kw_only=True, slots=True)
class CollectionRecord:
    """Rejection sampling of one trace store; failed tries are included everywhere."""

    folder: Path
    """The trace store."""

    num_problems: int
    """Problems that were tried."""

    num_solved: int
    """Problems with at least one verified-correct trace."""

    tries_solved: tuple[int, ...]
    """Tries spent on each solved problem, rising."""

    tries_unsolved: tuple[int, ...]
    """Tries spent on each problem that was given up, rising."""

    num_tokens: int
    """Tokens sampled, prompts included as the accounting charges them."""

    flops: float
    """FLOPs charged."""

    seconds: float
    """Wall time of the attempts."""

    @property
    def num_tries(self) -> int:
        """Tries over all problems."""
        return sum(self.tries_solved) + sum(self.tries_unsolved)

    @property
    def median_tries(self) -> float | None:
        """Median tries of the solved problems; None when none was solved."""
        return statistics.median(self.tries_solved) if self.tries_solved else None


def summarize_attempts(folder: Path, attempts: Sequence[AttemptRecord]) -> CollectionRecord:
    """Return the summary of one trace store's attempts.

    Args:
        folder: the store, to be named in the report.
        attempts: one or more records per problem; those of one problem are added up.
    """
    tries: dict[str, int] = {}
    solved: set[str] = set()
    for attempt in attempts:
        tries[attempt.problem_id] = tries.get(attempt.problem_id, 0) + attempt.num_tries
        if attempt.is_solved:
            solved.add(attempt.problem_id)
    return CollectionRecord(
        folder=folder,
        num_problems=len(tries),
        num_solved=len(solved),
        tries_solved=tuple(sorted(n for name, n in tries.items() if name in solved)),
        tries_unsolved=tuple(sorted(n for name, n in tries.items() if name not in solved)),
        num_tokens=sum(attempt.num_tokens for attempt in attempts),
        flops=sum(attempt.flops for attempt in attempts),
        seconds=sum(attempt.seconds for attempt in attempts),
    )


def read_collection(folder: Path, notices: list[str]) -> CollectionRecord | None:
    """Return the summary of a trace store, or None when there is none to read.

    Args:
        folder: the trace store.
        notices: what could not be read is appended here.
    """
    if not folder.is_dir():
        return None
    try:
        attempts = TraceStore.open(folder).attempts()
    except (OSError, ValueError, KeyError) as error:
        notices.append(f"trace store {folder} could not be read: {error}")
        return None
    return summarize_attempts(folder, attempts)
