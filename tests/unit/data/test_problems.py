"""Reading problem files, real rows and broken ones."""

import json
from pathlib import Path
from typing import Any

import pytest

from prefixrl_mcore.data.problems import read_problems
from prefixrl_mcore.records import Problem

FIXTURES = Path(__file__).parents[2] / "fixtures"


def _read(path: Path, **options: Any) -> list[Problem]:
    arguments: dict[str, Any] = {
        "id_field": None,
        "text_field": "problem",
        "answer_field": "answer",
        "answer_format": "plain",
        "max_problems": None,
    }
    return read_problems(path, **(arguments | options))


def _write(folder: Path, content: str | bytes) -> Path:
    path = folder / "set.jsonl"
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def test_gsm8k_rows() -> None:
    problems = _read(
        FIXTURES / "gsm8k_test_head.jsonl",
        text_field="question",
        answer_format="gsm8k",
        max_problems=3,
    )
    assert [p.answer for p in problems] == ["18", "3", "70000"]
    assert [p.problem_id for p in problems] == [f"gsm8k_test_head-{i}" for i in range(3)]
    assert problems[1].text.startswith("A robe takes 2 bolts of blue fiber")


def test_aime_rows_have_integer_ids_and_string_answers() -> None:
    problems = _read(FIXTURES / "aime24_head.jsonl", id_field="id")
    assert [(p.problem_id, p.answer) for p in problems] == [("60", "204"), ("61", "113")]


def test_amc_rows_have_float_answers_that_become_integers() -> None:
    problems = _read(FIXTURES / "amc23_head.jsonl", id_field="id")
    assert [(p.problem_id, p.answer) for p in problems] == [("0", "27"), ("1", "36")]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        pytest.param(7, "7", id="int"),
        pytest.param(-1.0, "-1", id="integral-float"),
        pytest.param(0.5, "0.5", id="float"),
        pytest.param("  \\frac{1}{2} ", "\\frac{1}{2}", id="text-is-stripped"),
        pytest.param("025", "025", id="text-is-kept"),
        pytest.param(10**25, "1" + "0" * 25, id="big-int"),
        pytest.param(0, "0", id="zero"),
    ],
)
def test_answers_become_canonical_text(tmp_path: Path, value: object, text: str) -> None:
    path = _write(tmp_path, json.dumps({"problem": "x", "answer": value}))
    assert _read(path)[0].answer == text


@pytest.mark.parametrize(
    ("field", "text"),
    [
        pytest.param("work #### 1,234,567", "1234567", id="thousands"),
        pytest.param("a #### 1 #### 2 ", "2", id="last-marker"),
        pytest.param("#### (1,2)", "(1,2)", id="a-pair-is-kept"),
    ],
)
def test_gsm8k_answers(tmp_path: Path, field: str, text: str) -> None:
    path = _write(tmp_path, json.dumps({"problem": "x", "answer": field}))
    assert _read(path, answer_format="gsm8k")[0].answer == text


def test_blank_lines_byte_order_mark_and_line_separators_do_no_harm(tmp_path: Path) -> None:
    row = json.dumps({"problem": "a\u2028b", "answer": "1"}, ensure_ascii=False)
    path = _write(tmp_path, b"\xef\xbb\xbf\n" + row.encode() + b"\r\n\n" + row.encode())
    problems = _read(path)
    assert [p.problem_id for p in problems] == ["set-0", "set-1"]
    assert problems[0].text == "a\u2028b"


def test_max_problems_keeps_the_first(tmp_path: Path) -> None:
    lines = [json.dumps({"problem": str(i), "answer": i}) for i in range(5)]
    path = _write(tmp_path, "\n".join([*lines, "not json"]))
    assert [p.text for p in _read(path, max_problems=2)] == ["0", "1"]


GOOD = '{"id": "a", "problem": "x", "answer": 1}\n'


@pytest.mark.parametrize(
    ("content", "message"),
    [
        pytest.param("", r"set\.jsonl: is empty", id="empty"),
        pytest.param("\n \n", r"is empty", id="blank"),
        pytest.param(GOOD + "{oops\n", r"line 2: not valid JSON: .* column 2", id="not-json"),
        pytest.param(GOOD + "[1]\n", r"line 2: expected a JSON object, got list \[1\]", id="list"),
        pytest.param(b"\xff\xfe\n", r"line 1: not UTF-8", id="encoding"),
        pytest.param("[" * 100000 + "\n", r"line 1: ", id="nested"),
        pytest.param(
            '\n{"id": "a", "answer": 1}', r"line 2: field 'problem' is missing.*'id'", id="missing"
        ),
        pytest.param(
            '{"id": "a", "problem": 3, "answer": 1}',
            r"line 1: field 'problem' must be a non-empty string, got int 3",
            id="text-type",
        ),
        pytest.param(
            '{"id": "a", "problem": " ", "answer": 1}',
            r"'problem' must be a non-empty",
            id="blank-text",
        ),
        *(
            pytest.param(
                f'{{"id": "a", "problem": "x", "answer": {answer}}}',
                r"line 1: field 'answer' must be a non-empty string or a finite number",
                id=f"answer-{answer}",
            )
            for answer in ('""', "null", "true", "[1]", "{}", "NaN", "Infinity", "1e999")
        ),
        pytest.param(GOOD + GOOD, r"line 2: field 'id': id 'a' .* line 1", id="duplicate"),
        pytest.param(
            '{"id": 1.5, "problem": "x", "answer": 1}',
            r"id must be a string or an int",
            id="float-id",
        ),
    ],
)
def test_broken_files_are_refused_with_place_and_field(
    tmp_path: Path, content: str | bytes, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        _read(_write(tmp_path, content), id_field="id")


def test_an_integer_and_a_string_id_can_collide(tmp_path: Path) -> None:
    rows = '{"id": 1, "problem": "x", "answer": 1}\n{"id": "1", "problem": "y", "answer": 1}'
    with pytest.raises(ValueError, match="id '1' already occurs in line 1"):
        _read(_write(tmp_path, rows), id_field="id")


@pytest.mark.parametrize("field", ["no marker", "empty #### "])
def test_gsm8k_without_an_answer_is_refused(tmp_path: Path, field: str) -> None:
    path = _write(tmp_path, json.dumps({"problem": "x", "answer": field}))
    with pytest.raises(ValueError, match="line 1: field 'answer': answer_format gsm8k expects"):
        _read(path, answer_format="gsm8k")


def test_unknown_format_and_missing_file_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="plain or gsm8k, got 'boxed'"):
        _read(FIXTURES / "aime24_head.jsonl", answer_format="boxed")
    with pytest.raises(ValueError, match="does not exist"):
        _read(tmp_path / "none.jsonl")
    with pytest.raises(ValueError, match="is a folder"):
        _read(tmp_path)
