"""What an interrupted part leaves is taken up, whole results only, and by nothing else."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest

from prefixrl_mcore.config.base import ConfigError
from prefixrl_mcore.eval.part_file import PartFile
from prefixrl_mcore.eval.runner import StartResult
from prefixrl_mcore.records import PrefixedProblem, Problem

TWO_OF_FOUR = StartResult(num_correct=2, completion_tokens=31)
NONE_OF_FOUR = StartResult(num_correct=0, completion_tokens=44)


def starts(num_problems: int = 3, answer: str = "7") -> list[PrefixedProblem]:
    return [
        PrefixedProblem(
            prefixed_problem_id=f"p{index}",
            problem=Problem(problem_id=f"p{index}", text="x", answer=answer),
            prompt_token_ids=(index, 5),
        )
        for index in range(num_problems)
    ]


def open_part(path: Path, **changed: Any) -> PartFile:
    usual: dict[str, Any] = {
        "settings": {"temperature": 0.7, "prefix_bins": (0.0, 0.5)},
        "label": "set/train",
        "starts": starts(),
        "num_samples": 4,
    }
    return PartFile(path, **(usual | changed))


def begun(path: Path) -> bytes:
    part = open_part(path)
    part.append({2: TWO_OF_FOUR})
    part.append({0: NONE_OF_FOUR})
    return path.read_bytes()


def test_results_are_there_for_the_next_start(tmp_path: Path) -> None:
    path = tmp_path / "base.part.jsonl"
    before = begun(path)
    again = open_part(path)
    assert again.results == {2: TWO_OF_FOUR, 0: NONE_OF_FOUR}
    assert path.read_bytes() == before
    again.append({1: TWO_OF_FOUR})
    assert open_part(path).results.keys() == {0, 1, 2}


@pytest.mark.parametrize("num_bytes", [1, 12, 40])
def test_a_torn_last_record_is_dropped_and_made_again(
    tmp_path: Path, num_bytes: int, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "base.part.jsonl"
    whole = begun(path)
    path.write_bytes(whole[:-num_bytes])  # of the last line, which is 57 bytes long
    with caplog.at_level(logging.INFO, logger="prefixrl_mcore"):
        again = open_part(path)
    assert again.results == {2: TWO_OF_FOUR}
    assert "half-written result was dropped" in caplog.text
    again.append({0: NONE_OF_FOUR})
    assert path.read_bytes() == whole


@pytest.mark.parametrize(
    ("line", "text"),
    [
        (1, "no JSON"),
        (2, '{"index": 1, "num_co'),
        (2, '{"index": 3, "num_correct": 1, "completion_tokens": 1}'),
        (2, '{"index": 1, "num_correct": 5, "completion_tokens": 1}'),
        (2, '{"index": 1, "num_correct": 1}'),
        (3, "[]"),
    ],
)
def test_any_other_line_that_is_no_result_stops_the_evaluation(
    tmp_path: Path, line: int, text: str
) -> None:
    path = tmp_path / "base.part.jsonl"
    begun(path)
    lines = path.read_text().splitlines()
    lines[line - 1] = text
    path.write_text("\n".join(lines) + "\n")
    with pytest.raises(ConfigError, match=rf"part.jsonl, line {line}: .* remove it"):
        open_part(path)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"settings": {"temperature": 1.0, "prefix_bins": (0.0, 0.5)}}, "other temperature"),
        ({"settings": {"temperature": 0.7, "prefix_bins": (0.0,)}}, "other prefix_bins"),
        ({"num_samples": 8}, "other samples_per_start"),
        ({"starts": starts(answer="8")}, "other starts"),
        ({"starts": starts(2)}, "other starts"),
    ],
)
def test_results_of_anything_else_are_not_taken(
    tmp_path: Path, changed: dict[str, Any], said: str, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "base.part.jsonl"
    begun(path)
    assert open_part(path, **changed).results == {}
    assert f"2 results of part set/train are not used here ({said})" in caplog.text
    assert len(path.read_text().splitlines()) == 1
    assert open_part(path).results == {}  # nor are they there for those that they were of


def test_what_a_finished_part_has_left_is_replaced_silently(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "base.part.jsonl"
    begun(path)  # killed between writing the part's results elsewhere and removing this
    assert open_part(path, label="bin/0.00-0.50", starts=starts(2), num_samples=1).results == {}
    assert caplog.text == ""
    assert json.loads(path.read_text())["part"] == "bin/0.00-0.50"
