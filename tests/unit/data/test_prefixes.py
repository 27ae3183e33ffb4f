"""Cutting prefixes and keeping them: exact token ids, fixed cuts, counted losses, refusals."""

import dataclasses
import itertools
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from prefixrl_mcore.config.data import PrefixConfig, PromptConfig
from prefixrl_mcore.data.prefix_cuts import cut_positions
from prefixrl_mcore.data.prefixes import (
    PrefixStats,
    answer_finder,
    cut_prefixes,
    read_prefixes,
    write_prefixes,
)
from prefixrl_mcore.data.prompts import PromptRenderer
from prefixrl_mcore.records import PrefixedProblem, Problem, Trace
from tests.support.byte_tokenizer import write_byte_tokenizer
from tests.support.fake_verifier import FakeVerifier

END = 99
HASHES = {"tokenizer_hash": "t" * 64, "chat_template_hash": "c" * 64}
PROBLEMS = [Problem(problem_id=f"p{i}", text="x", answer="1") for i in range(3)]


def _trace(name: str, length: int, problem_id: str = "p0", num_prompt: int = 4) -> Trace:
    return Trace(
        trace_id=name,
        problem_id=problem_id,
        prompt_token_ids=tuple(range(num_prompt)),
        completion_token_ids=(*range(100, 100 + length - 1), END),
    )


def _never(items: Sequence[tuple[str, tuple[int, ...]]]) -> list[bool]:
    return [False] * len(items)


def _cut(
    traces: Sequence[Trace],
    config: PrefixConfig | None = None,
    *,
    max_total: int = 1000,
    max_completion: int = 50,
    finds_answer: object = _never,
) -> tuple[list[PrefixedProblem], PrefixStats]:
    return cut_prefixes(
        traces,
        PROBLEMS,
        config or PrefixConfig(),
        max_total_tokens=max_total,
        max_completion_tokens=max_completion,
        finds_answer=finds_answer,  # type: ignore[arg-type]
    )


def test_prefixes_are_slices_of_the_traces_token_ids() -> None:
    traces = [_trace("a", 50), _trace("b", 70, "p1")]
    items, stats = _cut(traces)
    assert [item.trace_id for item in items] == ["a"] * 3 + ["b"] * 3
    by_id = {trace.trace_id: trace for trace in traces}
    for item in items:
        trace = by_id[item.trace_id]
        cut = len(item.prefix_token_ids)
        whole = np.array(trace.completion_token_ids, dtype=np.int64)
        assert np.array(item.prefix_token_ids, dtype=np.int64).tobytes() == whole[:cut].tobytes()
        assert item.prompt_token_ids == trace.prompt_token_ids
        assert item.problem.problem_id == trace.problem_id
        assert item.prefixed_problem_id == f"{trace.problem_id}#{trace.trace_id}@{cut}"
        assert item.fraction == cut / len(trace.completion_token_ids)
        assert 0.4 <= item.fraction <= 0.8
        assert END not in item.prefix_token_ids
    assert (stats.num_traces, stats.num_prefixes, stats.num_missing_cuts) == (2, 6, 0)
    assert stats.prefix_tokens_mean == sum(len(i.prefix_token_ids) for i in items) / 6


def test_a_prefix_that_ends_inside_a_character_keeps_its_bytes(tmp_path: Path) -> None:
    # Decoding such a prefix gives a replacement character; its token ids must not care.
    renderer = PromptRenderer(
        write_byte_tokenizer(tmp_path), PromptConfig(style="text", template="{problem}")
    )
    token_ids = renderer.encode_continuation("漢" * 20)
    trace = Trace(
        trace_id="a", problem_id="p0", prompt_token_ids=(1,), completion_token_ids=token_ids
    )
    items, _ = _cut([trace], PrefixConfig(num_per_trace=24))
    cuts = [len(item.prefix_token_ids) for item in items]
    assert any(cut % 3 for cut in cuts)
    for item, cut in zip(items, cuts, strict=True):
        assert item.prefix_token_ids == token_ids[:cut]
        text = renderer.decode(item.prefix_token_ids)
        is_whole = cut % 3 == 0
        assert (renderer.encode_continuation(text) == item.prefix_token_ids) == is_whole


def test_cuts_depend_on_seed_and_trace_id_only() -> None:
    traces = [_trace(name, 200) for name in "abcdef"]
    forward, _ = _cut(traces)
    backward, _ = _cut(traces[::-1])
    alone, _ = _cut(traces[3:4])
    assert sorted(i.prefixed_problem_id for i in forward) == sorted(
        i.prefixed_problem_id for i in backward
    )
    assert alone == [item for item in forward if item.trace_id == "d"]
    other, _ = _cut(traces, PrefixConfig(seed=1))
    assert forward != other
    assert len({cut_positions(trace, PrefixConfig()) for trace in traces}) == 6


def test_cuts_are_distinct_and_ascending() -> None:
    for number in range(200):
        cuts = cut_positions(_trace(f"t{number}", 20), PrefixConfig(num_per_trace=5))
        assert len(cuts) == 5
        assert all(first < second for first, second in itertools.pairwise(cuts))


def test_cuts_are_uniform_over_the_closed_range_of_positions() -> None:
    # 40-80 % of 20 tokens: positions 8..16, nine of them.
    config = PrefixConfig(num_per_trace=1)
    counts = Counter(cut_positions(_trace(f"t{n}", 20), config)[0] for n in range(4500))
    assert sorted(counts) == list(range(8, 17))
    assert all(abs(count - 500) < 110 for count in counts.values())  # five standard deviations


@pytest.mark.parametrize(
    ("length", "minimum", "maximum", "positions"),
    [
        pytest.param(10, 0.4, 0.8, range(4, 9), id="paper"),
        pytest.param(11, 0.4, 0.8, range(5, 9), id="ceil-and-floor"),
        pytest.param(100, 0.55, 0.57, range(55, 58), id="exact-decimals"),
        pytest.param(10, 0.95, 0.99, range(0), id="nothing-between"),
        pytest.param(10, 0.5, 0.99, range(5, 10), id="end-token-is-left"),
        pytest.param(1, 0.4, 0.8, range(0), id="one-token"),
        pytest.param(2, 0.4, 0.8, range(1, 2), id="two-tokens"),
        pytest.param(3, 0.1, 0.2, range(0), id="less-than-one-token"),
    ],
)
def test_the_range_of_positions(
    length: int, minimum: float, maximum: float, positions: range
) -> None:
    config = PrefixConfig(num_per_trace=1000, min_fraction=minimum, max_fraction=maximum)
    assert cut_positions(_trace("a", length), config) == tuple(positions)


def test_short_traces_give_fewer_prefixes_which_is_counted() -> None:
    items, stats = _cut([_trace("a", 1), _trace("b", 2), _trace("c", 50)])
    assert Counter(item.trace_id for item in items) == {"b": 1, "c": 3}
    assert (stats.num_traces_without_cut, stats.num_missing_cuts, stats.num_prefixes) == (1, 5, 4)


def test_traces_of_other_problems_are_left_out_and_counted() -> None:
    items, stats = _cut([_trace("a", 50), _trace("b", 50, "unknown")])
    assert {item.trace_id for item in items} == {"a"}
    assert (stats.num_traces, stats.num_traces_without_problem) == (2, 1)
    with pytest.raises(ValueError, match="none of the 1 traces belongs to one of the 3 problems"):
        _cut([_trace("b", 50, "unknown")])
    with pytest.raises(ValueError, match="the trace store has no traces"):
        _cut([])


def _finds_long(items: Sequence[tuple[str, tuple[int, ...]]]) -> list[bool]:
    assert {answer for answer, _ in items} == {"1"}
    return [len(token_ids) > 60 for _, token_ids in items]


def test_prefixes_that_state_the_answer_are_flagged_or_dropped() -> None:
    config = PrefixConfig(num_per_trace=10)
    kept, stats = _cut([_trace("a", 100)], config, finds_answer=_finds_long)
    flagged = [item for item in kept if item.answer_in_prefix]
    assert flagged == [item for item in kept if len(item.prefix_token_ids) > 60]
    assert 0 < len(flagged) < 10
    assert (stats.num_answer_in_prefix, stats.num_dropped) == (len(flagged), 0)
    config = config.model_copy(update={"answer_in_prefix": "drop"})
    rest, stats = _cut([_trace("a", 100)], config, finds_answer=_finds_long)
    assert rest == [item for item in kept if not item.answer_in_prefix]
    assert (stats.num_answer_in_prefix, stats.num_dropped) == (len(flagged), len(flagged))
    assert stats.num_prefixes == 10 - len(flagged)


def test_the_answer_finder_asks_the_verifier_about_the_prefixs_text(tmp_path: Path) -> None:
    renderer = PromptRenderer(
        write_byte_tokenizer(tmp_path), PromptConfig(style="text", template="{problem}")
    )
    finds = answer_finder(FakeVerifier(), renderer)
    encode = renderer.encode_continuation
    assert finds([("7", encode("so A: 7 is")), ("7", encode("so A:"))]) == [True, False]


def test_a_trace_longer_than_the_context_is_refused_with_numbers() -> None:
    with pytest.raises(
        ValueError,
        match=r"1 of 2 traces are longer than rollout\.max_total_tokens = 100 "
        r"\('b': 4 prompt \+ 97 tokens\); raise it",
    ):
        _cut([_trace("a", 96), _trace("b", 97)], max_total=100)
    many = [_trace(f"t{i}", 97) for i in range(7)]
    with pytest.raises(ValueError, match=r"7 of 7 .*'t4'.*; and 2 more\)"):
        _cut(many, max_total=100)


def test_a_reduced_completion_budget_is_counted() -> None:
    # Prompt 4, prefix 2, completion 2: eight tokens.
    config = PrefixConfig(num_per_trace=1, min_fraction=0.6, max_fraction=0.7)
    for max_total, num_reduced in ((7, 1), (8, 0)):
        _, stats = _cut([_trace("a", 3)], config, max_total=max_total, max_completion=2)
        assert stats.num_reduced_budget == num_reduced


def _write(folder: Path, config: PrefixConfig, traces: Sequence[Trace]) -> list[PrefixedProblem]:
    items, stats = _cut(traces, config)
    write_prefixes(folder, items, config=config, stats=stats, **HASHES)
    return items


TRACES = [_trace("a", 50), _trace("b", 70, "p1")]


def test_written_prefixes_come_back(tmp_path: Path) -> None:
    items = _write(tmp_path, PrefixConfig(), TRACES)
    assert read_prefixes(tmp_path, PROBLEMS, **HASHES) == items
    assert read_prefixes(tmp_path, PROBLEMS, **HASHES, config=PrefixConfig()) == items
    header = json.loads((tmp_path / "prefixes.json").read_text())
    assert header["tokenizer_hash"] == HASHES["tokenizer_hash"]
    assert header["config"] == PrefixConfig().model_dump(mode="json")
    assert header["stats"]["num_prefixes"] == 6


def test_prefixes_of_problems_that_are_not_trained_on_are_left_out_and_logged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    items = _write(tmp_path, PrefixConfig(), TRACES)
    assert read_prefixes(tmp_path, PROBLEMS[:1], **HASHES) == items[:3]
    assert "3 of 6 prefixes belong to problems that are not trained on" in caplog.text


def test_writing_the_same_again_changes_nothing_and_other_prefixes_are_refused(
    tmp_path: Path,
) -> None:
    _write(tmp_path, PrefixConfig(), TRACES)
    before = {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    _write(tmp_path, PrefixConfig(), TRACES)
    with pytest.raises(ValueError, match=r"holds other prefixes already \(config is"):
        _write(tmp_path, PrefixConfig(seed=1), TRACES)
    with pytest.raises(ValueError, match=r"holds other prefixes already \(prefixes_hash is"):
        _write(tmp_path, PrefixConfig(), TRACES[:1])
    assert {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == before


def test_an_interrupted_writing_is_no_prefix_folder_and_can_be_repeated(tmp_path: Path) -> None:
    items = _write(tmp_path, PrefixConfig(), TRACES)
    (tmp_path / "prefixes.json").unlink()
    with pytest.raises(ValueError, match="holds no prefixes; run `prefixrl prefixes` first"):
        read_prefixes(tmp_path, PROBLEMS, **HASHES)
    _write(tmp_path, PrefixConfig(), TRACES)
    assert read_prefixes(tmp_path, PROBLEMS, **HASHES) == items


@pytest.mark.parametrize("name", ["tokenizer_hash", "chat_template_hash"])
def test_other_hashes_are_refused(tmp_path: Path, name: str) -> None:
    _write(tmp_path, PrefixConfig(), TRACES)
    with pytest.raises(ValueError, match=f"{HASHES[name]}, this run has {'x' * 64}"):
        read_prefixes(tmp_path, PROBLEMS, **(HASHES | {name: "x" * 64}))


def test_other_settings_and_changed_answers_are_refused(tmp_path: Path) -> None:
    _write(tmp_path, PrefixConfig(), TRACES)
    with pytest.raises(ValueError, match=r"was cut with .*'seed': 0.*the config says .*'seed': 5"):
        read_prefixes(tmp_path, PROBLEMS, **HASHES, config=PrefixConfig(seed=5))
    changed = [dataclasses.replace(PROBLEMS[0], answer="2"), *PROBLEMS[1:]]
    with pytest.raises(ValueError, match=r"the answer of problem 'p0' was '1' .* is '2' now"):
        read_prefixes(tmp_path, changed, **HASHES)


def test_a_stored_prefix_that_leaves_no_room_is_refused_with_numbers(tmp_path: Path) -> None:
    config = PrefixConfig(num_per_trace=1, min_fraction=0.5, max_fraction=0.5)
    items = _write(tmp_path, config, [_trace("a", 50), _trace("b", 20)])  # contexts of 29 and 14
    assert read_prefixes(tmp_path, PROBLEMS, **HASHES, max_total_tokens=30) == items
    with pytest.raises(
        ValueError,
        match=r"1 of 2 prefixes leave no room for a completion in rollout\.max_total_tokens = 29 "
        r"\('p0#a@25': 4 prompt \+ 25 prefix tokens\); raise it",
    ):
        read_prefixes(tmp_path, PROBLEMS, **HASHES, max_total_tokens=29)


def test_damaged_folders_are_refused(tmp_path: Path) -> None:
    _write(tmp_path, PrefixConfig(), TRACES)
    table = tmp_path / "prefixes.parquet"
    content = bytearray(table.read_bytes())
    content[50] ^= 1
    table.write_bytes(content)
    with pytest.raises(ValueError, match="damaged: its SHA-256 is"):
        read_prefixes(tmp_path, PROBLEMS, **HASHES)
    table.unlink()
    with pytest.raises(ValueError, match="is missing; cut the prefixes again"):
        read_prefixes(tmp_path, PROBLEMS, **HASHES)
    (tmp_path / "prefixes.json").write_text("{}")
    with pytest.raises(ValueError, match="format version 1"):
        read_prefixes(tmp_path, PROBLEMS, **HASHES)
    (tmp_path / "prefixes.json").write_text("{")
    with pytest.raises(ValueError, match="restore this header"):
        read_prefixes(tmp_path, PROBLEMS, **HASHES)
