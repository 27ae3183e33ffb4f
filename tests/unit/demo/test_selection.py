"""Selection of hard problems."""

from collections.abc import Sequence

import pytest

from prefixrl_mcore.demo.quiz import Quiz, draw_problem_sets
from prefixrl_mcore.demo.selection import select_hard_problems
from prefixrl_mcore.records import Problem

CANDIDATES = draw_problem_sets(Quiz(), {"train": 10}, seed=0)["train"]
SOLVED = [0, 2, 0, 0, 1, 0, 0, 0, 0, 0]


def count_solved(problems: Sequence[Problem], num_tries: int) -> list[int]:
    """Return the scripted counts, and check what is asked for."""
    assert num_tries == 8
    assert len(problems) <= 4
    return [SOLVED[CANDIDATES.index(problem)] for problem in problems]


def test_first_unsolved_candidates_are_selected_and_the_rest_is_never_tried() -> None:
    hard = select_hard_problems(
        CANDIDATES, count_solved, num_wanted=4, num_tries=8, problems_per_call=4
    )
    assert hard.problems == tuple(CANDIDATES[index] for index in (0, 2, 3, 5))
    assert (hard.num_screened, hard.num_tries, hard.num_correct) == (8, 64, 3)


def test_too_few_hard_problems_are_an_error() -> None:
    with pytest.raises(ValueError, match="9 wanted, 8 found among 10 candidates with 0 of 8"):
        select_hard_problems(
            CANDIDATES, count_solved, num_wanted=9, num_tries=8, problems_per_call=4
        )
