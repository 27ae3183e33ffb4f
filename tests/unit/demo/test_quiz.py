"""The quiz's rules, problems and demonstrations."""

import dataclasses
import json
import random
from pathlib import Path
from typing import Any

import pytest

from prefixrl_mcore.demo.quiz import Quiz, draw_problem_sets, write_problems

QUIZ = Quiz(num_parts=4, num_ops=2, num_methods=3, num_values=3, is_method_shared=False, seed=5)
DIGITS = [(1, 2), (3, 4), (5, 6), (7, 8)]


def boxed_values(text: str) -> str:
    """Return the boxed values of a text, comma separated, read without the quiz's own code."""
    return ",".join(word[len("\\boxed{") : -1] for word in text.split() if word.startswith("\\"))


def test_problem_text_names_operations_cyclically() -> None:
    problem = QUIZ.problem(DIGITS, source="train")
    assert problem.text == "a 1 2 b 3 4 a 5 6 b 7 8"
    assert problem.problem_id == "train-12345678"
    assert QUIZ.digits_of(problem) == DIGITS


def test_part_answer_is_the_tables_entry_of_the_shifted_digits() -> None:
    step = QUIZ.solution_step(1, (3, 4), method=QUIZ.sound_methods["b"], guess=0).split()
    rng = random.Random(5)
    offsets = [rng.randint(1, 9) for _ in range(4)]
    worked = [(3 + offsets[2]) % 10, (4 + offsets[3]) % 10]
    assert step[:4] == ["b", "3", "4", QUIZ.sound_methods["b"]]
    assert step[4:6] == [str(digit) for digit in worked]
    assert step[6] == f"\\boxed{{{QUIZ.part_answer(1, (3, 4))}}}"


def test_table_holds_every_value_equally_often() -> None:
    counts = [0, 0, 0]
    for first in range(10):
        for second in range(10):
            counts[QUIZ.part_answer(0, (first, second))] += 1
    assert sorted(counts) == [33, 33, 34]


def test_sound_demonstration_states_the_reference_answer() -> None:
    problem = QUIZ.problem(DIGITS, source="train")
    text = QUIZ.demonstration(problem, sound_probability=1.0, rng=random.Random(0))
    assert boxed_values(text) == problem.answer
    assert text.split()[-1] == "<eos>"
    assert len(text.split()) == QUIZ.max_completion_tokens == 29


def test_unsound_demonstration_guesses_each_value_equally_often() -> None:
    rng = random.Random(0)
    problem = QUIZ.problem(DIGITS, source="train")
    values: list[str] = []
    for _ in range(750):
        text = QUIZ.demonstration(problem, sound_probability=0.0, rng=rng)
        assert len(text.split()) == 4 * 5 + 1
        values += boxed_values(text).split(",")
    for value in "012":
        # 3000 draws: a standard deviation of 26.
        assert abs(values.count(value) - 1000) < 104


def test_equal_seeds_give_equal_rules_and_other_seeds_other_rules() -> None:
    problem = QUIZ.problem(DIGITS, source="train")
    again = dataclasses.replace(QUIZ, seed=5).problem(DIGITS, source="train")
    assert again == problem
    answers = {
        dataclasses.replace(QUIZ, seed=seed).problem(DIGITS, source="train").answer
        for seed in range(20)
    }
    assert len(answers) > 5


def test_sound_method_is_shared_unless_each_operation_draws_its_own() -> None:
    shared = Quiz(num_ops=8, seed=3).sound_methods
    own = Quiz(num_ops=8, seed=3, is_method_shared=False).sound_methods
    assert set(shared.values()) == {own["a"]}
    assert len(set(own.values())) > 1


def test_problem_sets_are_disjoint_and_reproducible() -> None:
    sizes = {"train": 40, "heldout": 60}
    sets = draw_problem_sets(QUIZ, sizes, seed=1)
    texts = [problem.text for problems in sets.values() for problem in problems]
    assert len(set(texts)) == len(texts) == 100
    assert {name: len(problems) for name, problems in sets.items()} == sizes
    assert draw_problem_sets(QUIZ, sizes, seed=1) == sets
    assert draw_problem_sets(QUIZ, sizes, seed=2) != sets


def test_digits_are_not_drawn_twice_even_when_there_are_few() -> None:
    sets = draw_problem_sets(Quiz(num_parts=1), {"train": 25, "heldout": 25}, seed=0)
    texts = [problem.text for problems in sets.values() for problem in problems]
    assert len(set(texts)) == 50


def test_more_problems_than_exist_are_refused() -> None:
    with pytest.raises(ValueError, match="51 problems wanted but only 100 exist"):
        draw_problem_sets(Quiz(num_parts=1), {"train": 51}, seed=0)


def test_written_problems_are_one_json_object_per_line(tmp_path: Path) -> None:
    problem = QUIZ.problem(DIGITS, source="train")
    path = tmp_path / "new" / "train.jsonl"
    write_problems(path, [problem])
    assert json.loads(path.read_text()) == {
        "id": "train-12345678",
        "problem": "a 1 2 b 3 4 a 5 6 b 7 8",
        "answer": problem.answer,
    }
    assert [file.name for file in path.parent.iterdir()] == ["train.jsonl"]


def test_duplicate_ids_are_refused(tmp_path: Path) -> None:
    problem = QUIZ.problem(DIGITS, source="train")
    with pytest.raises(ValueError, match="'train-12345678' occurs more than once"):
        write_problems(tmp_path / "train.jsonl", [problem, problem])


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        pytest.param({"num_parts": 0}, "num_parts must lie in 1..64, got 0", id="no parts"),
        pytest.param({"num_methods": 1}, "num_methods must lie in 2..11, got 1", id="one method"),
        pytest.param({"num_ops": 27}, "num_ops must lie in 1..26, got 27", id="too many ops"),
        pytest.param({"num_values": 11}, "num_values must lie in 2..10, got 11", id="values"),
    ],
)
def test_impossible_sizes_are_refused(sizes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Quiz(**sizes)


def test_text_of_another_quiz_is_refused() -> None:
    other = Quiz(num_parts=3, num_ops=3).problem(DIGITS[:3], source="other")
    with pytest.raises(ValueError, match="not a 4-part quiz over a b"):
        QUIZ.digits_of(other)
