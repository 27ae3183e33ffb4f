"""The trace store: what goes in comes out, rounds are whole or absent, strangers are refused."""

import dataclasses
import subprocess
import sys
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from prefixrl_mcore.data.traces import (
    AttemptRecord,
    TraceRecord,
    TraceStore,
    build_trace_id,
)

HASHES = {"tokenizer_hash": "t" * 64, "chat_template_hash": "c" * 64}


def _create(folder: Path) -> TraceStore:
    return TraceStore.create(folder, **HASHES, model="tiny")


def _trace(trace_id: str, problem_id: str = "p", **changes: object) -> TraceRecord:
    record = TraceRecord(
        trace_id=trace_id,
        problem_id=problem_id,
        prompt_token_ids=(1, 2, 3),
        completion_token_ids=(4, 5),
        rollout_logprobs=(-0.5, -0.25),
        finish_reason="stop",
        sampler="transformers 5.23.0",
        source_model="tiny",
        policy_version=-1,
        weights_hash="w" * 64,
        temperature=1.0,
        seed=7,
        verifier="fake 1.0",
        num_tries=3,
        flops=1.5e9,
        seconds=0.5,
        **HASHES,
    )
    return dataclasses.replace(record, **changes)  # type: ignore[arg-type]


def _attempt(problem_id: str = "p", **changes: object) -> AttemptRecord:
    record = AttemptRecord(
        problem_id=problem_id,
        num_tries=4,
        num_tokens=20,
        flops=2e9,
        seconds=0.5,
        is_solved=True,
    )
    return dataclasses.replace(record, **changes)  # type: ignore[arg-type]


def test_every_column_comes_back(tmp_path: Path) -> None:
    traces = [
        _trace("a"),
        _trace(
            "b",
            "q",
            rollout_logprobs=(),
            temperature=None,
            seed=None,
            finish_reason="length",
            label=False,
        ),
    ]
    _create(tmp_path / "s").append(traces, [_attempt(), _attempt("q", origin="file sha256:1")])
    store = TraceStore.open(tmp_path / "s", **HASHES)
    assert list(store.traces()) == traces
    assert store.attempts() == [_attempt(), _attempt("q", origin="file sha256:1")]
    assert store.origins() == {"file sha256:1"}
    assert store.header.model == "tiny"
    trace = traces[0].as_trace()
    assert (trace.trace_id, trace.problem_id) == ("a", "p")
    assert (trace.prompt_token_ids, trace.completion_token_ids) == ((1, 2, 3), (4, 5))


def test_the_parts_are_plain_parquet_files(tmp_path: Path) -> None:
    _create(tmp_path).append([_trace("a")], [_attempt()])
    table = pq.read_table(tmp_path / "part-000000" / "traces.parquet")
    assert table.column_names == [field.name for field in dataclasses.fields(TraceRecord)]
    assert table["completion_token_ids"].to_pylist() == [[4, 5]]


def test_costs_of_a_problem_add_up_over_rounds_and_unsolved_problems_are_kept(
    tmp_path: Path,
) -> None:
    store = _create(tmp_path)
    store.append([], [_attempt(is_solved=False), _attempt("never", is_solved=False)])
    store.append([_trace("a")], [_attempt(num_tries=1, num_tokens=5, flops=5e8, seconds=0.25)])
    store.append([], [])
    store.append([], [_attempt(is_solved=False)])
    assert store.attempts() == [
        _attempt(num_tries=9, num_tokens=45, flops=4.5e9, seconds=1.25),
        _attempt("never", is_solved=False),
    ]
    assert store.total_flops() == 6.5e9
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["part-000000", "part-000001", "part-000002", "store.json"]


def test_a_reader_sees_rounds_that_are_added_later(tmp_path: Path) -> None:
    writer = _create(tmp_path)
    reader = TraceStore.open(tmp_path)
    for number in range(1, 4):
        writer.append([_trace(str(number))], [_attempt()])
        assert [attempt.num_tries for attempt in reader.attempts()] == [4 * number]
        assert len(list(reader.traces())) == number


def test_stats_by_hand(tmp_path: Path) -> None:
    store = _create(tmp_path)
    empty = store.stats()
    assert (empty.num_traces, empty.completion_tokens_mean, empty.max_tries) == (0, 0.0, 0)
    longer = _trace(
        "b", "q", completion_token_ids=(1,) * 6, rollout_logprobs=(), finish_reason="length"
    )
    store.append(
        [_trace("a"), longer],
        [_attempt(), _attempt("q", num_tries=9), _attempt("r", is_solved=False)],
    )
    stats = store.stats()
    assert (stats.num_traces, stats.num_problems, stats.num_solved) == (2, 3, 2)
    assert (stats.num_tries, stats.max_tries, stats.num_tokens) == (17, 9, 60)
    assert (stats.flops, stats.seconds) == (6e9, 1.5)
    lengths = stats.completion_tokens_min, stats.completion_tokens_mean, stats.completion_tokens_max
    assert lengths == (2, 4.0, 6)
    assert stats.finish_reasons == {"stop": 1, "length": 1}
    assert stats.samplers == {"transformers 5.23.0 tiny": 2}
    assert stats.verifiers == {"fake 1.0": 2}


def test_trace_ids_depend_on_problem_and_content() -> None:
    ids = {build_trace_id("p", (1, 2)), build_trace_id("p", (12,)), build_trace_id("q", (1, 2))}
    assert len(ids) == 3
    assert build_trace_id("p", (1, 2)) == build_trace_id("p", [1, 2])
    assert build_trace_id("p", (1, 2)).startswith("p:")


@pytest.mark.parametrize("name", ["tokenizer_hash", "chat_template_hash"])
def test_a_store_of_another_tokenizer_or_template_is_refused_with_both_hashes(
    tmp_path: Path, name: str
) -> None:
    _create(tmp_path)
    hashes = HASHES | {name: "x" * 64}
    with pytest.raises(ValueError, match=f"{HASHES[name]}, this run has {'x' * 64}"):
        TraceStore.open(tmp_path, **hashes)
    with pytest.raises(ValueError, match=f"{HASHES[name]}, this run has {'x' * 64}"):
        TraceStore.open_or_create(tmp_path, **hashes, model="tiny")
    assert TraceStore.open(tmp_path).header.model == "tiny"
    with pytest.raises(ValueError, match=f"{'x' * 64}, this run has {HASHES[name]}"):
        TraceStore.open(tmp_path).append([_trace("a", **{name: "x" * 64})], [_attempt()])


def test_duplicates_and_traces_without_cost_are_refused_and_change_nothing(tmp_path: Path) -> None:
    store = _create(tmp_path)
    store.append([_trace("a")], [_attempt()])
    again = TraceStore.open(tmp_path)
    for broken in (store, again):
        with pytest.raises(ValueError, match="trace 'a': is already in the store"):
            broken.append([_trace("b"), _trace("a")], [_attempt()])
    with pytest.raises(ValueError, match="trace 'c': is already"):
        store.append([_trace("c"), _trace("c")], [_attempt()])
    with pytest.raises(ValueError, match="trace 'd': problem 'q' has no attempt"):
        store.append([_trace("d", "q")], [_attempt()])
    assert [trace.trace_id for trace in TraceStore.open(tmp_path).traces()] == ["a"]
    store.append([_trace("b")], [_attempt()])


def test_records_that_cannot_be_used_are_refused() -> None:
    with pytest.raises(ValueError, match="3 prompt and 0 completion tokens"):
        _trace("a", completion_token_ids=(), rollout_logprobs=())
    with pytest.raises(ValueError, match="2 completion tokens but 1 rollout logprobs"):
        _trace("a", rollout_logprobs=(-1.0,))
    with pytest.raises(ValueError, match="must not be empty"):
        _trace("")


def test_missing_and_foreign_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="does not exist; run `prefixrl collect`"):
        TraceStore.open(tmp_path / "none")
    (tmp_path / "file").write_text("x")
    with pytest.raises(ValueError, match="not empty"):
        _create(tmp_path)
    _create(tmp_path / "s")
    with pytest.raises(ValueError, match="not empty"):
        _create(tmp_path / "s")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        pytest.param("{", "damaged header", id="json"),
        pytest.param("{}", "damaged header", id="fields"),
        pytest.param("[]", "damaged header", id="list"),
        pytest.param(
            '{"format_version": 99}', "has format version 99, this program reads 1", id="version"
        ),
    ],
)
def test_a_damaged_header_is_refused(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "store.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        TraceStore.open(tmp_path)


def test_no_changed_byte_of_the_data_goes_unnoticed(tmp_path: Path) -> None:
    traces = [_trace("a", completion_token_ids=tuple(range(40)), rollout_logprobs=(-0.5,) * 40)]
    _create(tmp_path).append(traces, [_attempt()])
    path = tmp_path / "part-000000" / "traces.parquet"
    content = path.read_bytes()
    end_of_data = len(content) - 8 - int.from_bytes(content[-8:-4], "little")
    for position in range(4, end_of_data, 5):
        changed = bytearray(content)
        changed[position] ^= 0x01
        path.write_bytes(changed)
        try:
            assert list(TraceStore.open(tmp_path).traces()) == traces
        except ValueError as error:
            assert "damaged or incomplete" in str(error)  # noqa: PT017 - either outcome is right


def test_damaged_and_missing_parts_are_refused(tmp_path: Path) -> None:
    store = _create(tmp_path)
    for name in "abc":
        store.append([_trace(name)], [_attempt()])
    path = tmp_path / "part-000001" / "traces.parquet"
    path.write_bytes(path.read_bytes()[:300])
    with pytest.raises(ValueError, match=r"part-000001/traces\.parquet: damaged or incomplete"):
        list(TraceStore.open(tmp_path).traces())
    path.unlink()
    with pytest.raises(ValueError, match="damaged or incomplete"):
        list(TraceStore.open(tmp_path).traces())
    path.parent.rename(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match="expected part-000001, found part-000002"):
        TraceStore.open(tmp_path).attempts()


def test_a_half_written_round_does_not_exist_and_is_cleared_away(tmp_path: Path) -> None:
    store = _create(tmp_path)
    store.append([_trace("a")], [_attempt()])
    leftover = tmp_path / ".tmp-part-000001-999999"
    leftover.mkdir()
    (leftover / "traces.parquet").write_bytes(b"half")
    assert [trace.trace_id for trace in TraceStore.open(tmp_path).traces()] == ["a"]
    store.append([_trace("b")], [_attempt()])
    assert [trace.trace_id for trace in TraceStore.open(tmp_path).traces()] == ["a", "b"]
    assert not leftover.exists()


def _append_until_killed(folder: Path, name: str) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-m", "tests.support.endless_store", str(folder), name],
        cwd=Path(__file__).parents[3],
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.parametrize("delay_ms", [3, 37, 150])
def test_a_store_survives_sigkill_at_any_moment(tmp_path: Path, delay_ms: int) -> None:
    _create(tmp_path)
    child = _append_until_killed(tmp_path, "x")
    while not (tmp_path / "part-000000").exists():
        assert child.poll() is None
        time.sleep(0.001)
    time.sleep(delay_ms / 1000)
    child.kill()
    child.communicate()
    store = TraceStore.open(tmp_path, **HASHES)
    traces = list(store.traces())
    assert traces
    assert [trace.trace_id for trace in traces] == [f"x{n}" for n in range(len(traces))]
    assert [a.problem_id for a in store.attempts()] == [trace.problem_id for trace in traces]
    store.append([_trace("last")], [_attempt()])
    assert [t.trace_id for t in store.traces()][-1] == "last"
    assert not list(tmp_path.glob(".tmp-*"))


def test_of_two_writers_one_is_stopped_and_the_store_stays_whole(tmp_path: Path) -> None:
    _create(tmp_path)
    children = [_append_until_killed(tmp_path, name) for name in "xy"]
    while all(child.poll() is None for child in children):
        time.sleep(0.01)
    for child in children:
        child.kill()
    messages = [child.communicate()[1] for child in children]
    assert any("another process writes to it" in message for message in messages)
    store = TraceStore.open(tmp_path)
    traces = [trace.trace_id for trace in store.traces()]
    assert len(traces) == len(set(traces)) == len(store.attempts())
