"""Hard problems: those that a policy did not solve in a given number of tries."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from prefixrl_mcore.records import Problem

CountSolved = Callable[[Sequence[Problem], int], Sequence[int]]
"""Called with (problems, tries per problem); returns the number of correct tries of each."""


@dataclass(frozen=True, kw_only=True, slots=True)
class HardProblems:
    """Selected problems, and what the selection saw."""

    problems: tuple[Problem, ...]
    """[num_wanted] problems without a correct try, in the order of the candidates."""

    num_screened: int
    """Candidates that were tried."""

    num_tries: int
    """Tries over all of them; screening is not charged to any method."""

    num_correct: int
    """Correct tries over all of them; ``num_correct / num_tries`` estimates the success rate of
    the policy on unselected problems."""


def select_hard_problems(
    candidates: Sequence[Problem],
    count_solved: CountSolved,
    *,
    num_wanted: int,
    num_tries: int = 64,
    problems_per_call: int = 16,
) -> HardProblems:
    """Return the first ``num_wanted`` candidates that the policy solves in none of its tries.

    Args:
        candidates: problems to choose from, in order.
        count_solved: samples the policy and judges it.
        num_wanted: problems to select.
        num_tries: tries per candidate.
        problems_per_call: candidates per call of ``count_solved``.

    Raises:
        ValueError: if the candidates hold too few hard problems.
    """
    selected: list[Problem] = []
    num_screened = 0
    num_correct = 0
    for start in range(0, len(candidates), problems_per_call):
        if len(selected) >= num_wanted:
            break
        batch = candidates[start : start + problems_per_call]
        solved = count_solved(batch, num_tries)
        selected.extend(problem for problem, count in zip(batch, solved, strict=True) if count == 0)
        num_screened += len(batch)
        num_correct += sum(solved)
    if len(selected) < num_wanted:
        raise ValueError(
            f"hard problems: {num_wanted} wanted, {len(selected)} found among {len(candidates)} "
            f"candidates with 0 of {num_tries} tries correct; give more candidates"
        )
    return HardProblems(
        problems=tuple(selected[:num_wanted]),
        num_screened=num_screened,
        num_tries=num_screened * num_tries,
        num_correct=num_correct,
    )
