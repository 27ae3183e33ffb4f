"""Problem files: JSON Lines in, records out."""

import re
from pathlib import Path
from typing import Literal

from prefixrl_mcore.data.jsonl import JsonRow, read_jsonl
from prefixrl_mcore.records import Problem

AnswerFormat = Literal["plain", "gsm8k"]

_THOUSANDS = re.compile(r"[-+]?\d{1,3}(,\d{3})+(\.\d+)?")


def read_problems(
    path: Path,
    *,
    id_field: str | None,
    text_field: str,
    answer_field: str,
    answer_format: AnswerFormat,
    max_problems: int | None,
) -> list[Problem]:
    """Return the problems of a JSON Lines file, in its order.

    Numbers become canonical text (``27.0`` is ``27``); thousands separators of a ``gsm8k`` answer
    are removed (``1,080`` is ``1080``).

    Args:
        path: the file.
        id_field: key of the id (string or integer); None numbers the rows ``<file stem>-<row>``
            from 0, blank lines not counted.
        text_field: key of the problem text.
        answer_field: key of the answer: a string or a number.
        answer_format: ``plain``: the field is the answer; ``gsm8k``: the answer follows the last
            ``####`` of the field.
        max_problems: keep only the first so many; None keeps all.

    Raises:
        ValueError: if the file is missing, empty or malformed, a field is missing or of a wrong
            type, an id occurs twice, or the answer format is unknown; names file, line, field.
    """
    if answer_format not in ("plain", "gsm8k"):
        raise ValueError(f"data.answer_format must be plain or gsm8k, got {answer_format!r}")
    problems: list[Problem] = []
    first_line: dict[str, int] = {}
    for index, row in enumerate(read_jsonl(path)):
        if max_problems is not None and index >= max_problems:
            break
        problem_id = f"{path.stem}-{index}" if id_field is None else _identifier(row, id_field)
        if problem_id in first_line:
            raise ValueError(
                f"{row.where}: field {id_field!r}: id {problem_id!r} already occurs in line "
                f"{first_line[problem_id]}; ids must be unique; leave data.id_field out to number "
                "the rows"
            )
        first_line[problem_id] = row.line
        problems.append(
            Problem(
                problem_id=problem_id,
                text=row.text(text_field),
                answer=_answer(row, answer_field, answer_format),
            )
        )
    return problems


def _identifier(row: JsonRow, field: str) -> str:
    """Return the id as text; floats are refused, since they do not name anything reliably."""
    if isinstance(row.required(field), float):
        raise ValueError(
            f"{row.where}: field {field!r}: an id must be a string or an integer, "
            f"got {row.values[field]!r}"
        )
    return row.scalar_text(field)


def _answer(row: JsonRow, field: str, answer_format: AnswerFormat) -> str:
    """Return the reference answer as canonical text."""
    if answer_format == "plain":
        return row.scalar_text(field)
    text = row.text(field)
    _, marker, answer = text.rpartition("####")
    answer = answer.strip()
    if not marker or not answer:
        raise ValueError(
            f"{row.where}: field {field!r}: answer_format gsm8k expects the answer after '####', "
            f"got {text[-60:]!r}; set data.answer_format = 'plain' if the field is the answer"
        )
    return answer.replace(",", "") if _THOUSANDS.fullmatch(answer) else answer
