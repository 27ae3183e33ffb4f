"""The judging pool: limits, kills and replacements, with judges that misbehave on demand."""

import os
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from prefixrl_mcore.rewards.pool import JudgePool
from prefixrl_mcore.rewards.wire import Json
from tests.support.processes import is_running, wait_until_gone
from tests.support.waiting import once

MISBEHAVE = "tests.support.judges:misbehave"
LIMIT_SECONDS = 2.0
MEMORY_BYTES = 64 * 1024**2


def make_pool(
    *, judge: str = MISBEHAVE, num_workers: int = 2, timeout_seconds: float = LIMIT_SECONDS
) -> JudgePool:
    return JudgePool(
        judge,
        num_workers=num_workers,
        timeout_seconds=timeout_seconds,
        memory_limit_bytes=MEMORY_BYTES,
    )


@pytest.fixture
def pool() -> Iterator[JudgePool]:
    pool = make_pool()
    yield pool
    pool.close()


@pytest.fixture
def patient_pool() -> Iterator[JudgePool]:
    """For tests without a hang, so that a busy machine causes no time-out."""
    pool = make_pool(timeout_seconds=60.0)
    yield pool
    pool.close()


def test_outcomes_come_in_the_order_of_the_payloads(patient_pool: JudgePool) -> None:
    payloads: list[Json] = [["sleep", 0.05 if index % 7 == 0 else 0.0] for index in range(40)]
    numbered: list[Json] = [[index, payload] for index, payload in enumerate(payloads)]
    assert [outcome.value for outcome in patient_pool.run(numbered)] == numbered
    slow_first: list[Json] = [["sleep", 0.3], *range(500)]
    assert [outcome.value for outcome in patient_pool.run(slow_first)] == slow_first


def test_no_payloads_give_no_outcomes(pool: JudgePool) -> None:
    assert pool.run([]) == []


def test_work_is_spread_over_all_processes(patient_pool: JudgePool) -> None:
    payloads: list[Json] = [["slow pid"]] * 8
    pids = {str(outcome.value) for outcome in patient_pool.run(payloads)}
    assert pids == set(map(str, patient_pool.process_ids[1:]))
    assert len(pids) == 2


def test_a_hang_costs_its_limit_and_only_its_own_outcome(pool: JudgePool) -> None:
    pool.run([1, 2])
    before = pool.process_ids
    payloads = [*range(50), ["hang"], *range(50, 150)]
    started = time.monotonic()
    outcomes = pool.run(payloads)
    elapsed = time.monotonic() - started
    assert outcomes[50].status == "timeout"
    assert outcomes[50].value is None
    assert outcomes[50].seconds >= LIMIT_SECONDS
    assert elapsed >= LIMIT_SECONDS
    del outcomes[50]
    assert [(outcome.status, outcome.value) for outcome in outcomes] == [
        ("done", number) for number in range(150)
    ]
    counters = pool.counters
    assert (counters.num_timeouts, counters.num_replaced, counters.num_payloads) == (1, 1, 153)
    assert len(pool.process_ids) == 3
    assert len(set(pool.process_ids) & set(before)) == 2  # the nursery and the other child
    assert wait_until_gone(set(before) - set(pool.process_ids)) == []


def test_hangs_on_every_process_leave_the_pool_full(pool: JudgePool) -> None:
    outcomes = pool.run([["hang"], ["hang"], ["hang"], "alive"])
    assert [outcome.status for outcome in outcomes] == ["timeout"] * 3 + ["done"]
    assert pool.counters.num_replaced == 3
    assert all(is_running(pid) for pid in pool.process_ids)
    assert len(pool.process_ids) == 3
    assert [outcome.value for outcome in pool.run([1, 2, 3])] == [1, 2, 3]


def test_the_limit_holds_for_each_payload_and_not_for_a_chunk() -> None:
    pool = make_pool(num_workers=1, timeout_seconds=1.0)
    payloads: list[Json] = [["sleep", 1.0 / 8]] * 40  # ten of them travel together
    outcomes = pool.run(payloads)
    pool.close()
    assert [outcome.status for outcome in outcomes] == ["done"] * 40


@pytest.mark.parametrize("verb", ["eat memory", "eat memory quietly"])
def test_a_memory_bomb_is_an_outcome_even_if_the_judge_hides_it(
    patient_pool: JudgePool, verb: str
) -> None:
    outcomes = patient_pool.run([1, [verb], 2, 3])
    assert [outcome.status for outcome in outcomes] == ["done", "memory", "done", "done"]
    assert [outcome.value for outcome in outcomes] == [1, None, 2, 3]
    assert patient_pool.counters.num_memory == 1
    assert patient_pool.counters.num_replaced == 1


def test_a_process_that_keeps_memory_retires_before_the_next_payload_suffers() -> None:
    pool = make_pool(num_workers=1, timeout_seconds=60.0)
    leaks = [["leak", MEMORY_BYTES // 3] for _ in range(6)]
    outcomes = pool.run(leaks)
    pool.close()
    assert [outcome.status for outcome in outcomes] == ["done"] * 6
    assert pool.counters.num_memory == 0
    assert pool.counters.num_replaced == 3  # after every second leak


@pytest.mark.parametrize("verb", ["abort", "exit"])
def test_a_crash_is_tried_twice_and_costs_only_its_own_outcome(
    patient_pool: JudgePool, verb: str
) -> None:
    payloads = [*range(60), [verb], *range(60, 120)]
    outcomes = patient_pool.run(payloads)
    assert outcomes.pop(60).status == "crash"
    assert [outcome.value for outcome in outcomes] == list(range(120))
    assert patient_pool.counters.num_crashes == 1
    assert patient_pool.counters.num_replaced == 2
    assert all(is_running(pid) for pid in patient_pool.process_ids)


def test_a_process_killed_from_outside_convicts_no_payload(
    patient_pool: JudgePool, tmp_path: Path
) -> None:
    payloads: list[Json] = [1, ["die once", str(tmp_path / "marker")], 2]
    assert [outcome.value for outcome in patient_pool.run(payloads)] == [1, "survived", 2]
    assert patient_pool.counters.num_crashes == 0
    assert patient_pool.counters.num_replaced == 1


def test_idle_processes_killed_from_outside_are_replaced(patient_pool: JudgePool) -> None:
    patient_pool.run([1])
    nursery, *children = patient_pool.process_ids
    for pid in children:
        os.kill(pid, signal.SIGKILL)
    assert wait_until_gone(children) == []
    assert [outcome.value for outcome in patient_pool.run([1, 2, 3])] == [1, 2, 3]
    assert patient_pool.process_ids[0] == nursery
    assert set(patient_pool.process_ids).isdisjoint(children)
    assert patient_pool.counters.num_replaced == 2
    assert patient_pool.counters.num_reissued == 0  # noticed before anything was sent to them


def test_a_dead_nursery_is_started_again_between_calls(patient_pool: JudgePool) -> None:
    patient_pool.run([1])
    before = patient_pool.process_ids
    os.kill(before[0], signal.SIGKILL)
    assert wait_until_gone(before) == []
    assert [outcome.value for outcome in patient_pool.run([1, 2])] == [1, 2]
    assert set(patient_pool.process_ids).isdisjoint(before)


def test_a_dead_nursery_is_started_again_within_a_call(
    patient_pool: JudgePool, tmp_path: Path
) -> None:
    payloads = [*range(20), ["kill nursery once", str(tmp_path / "marker")], *range(20, 40)]
    values = [outcome.value for outcome in patient_pool.run(payloads)]
    assert values == [*range(20), "survived", *range(20, 40)]
    assert patient_pool.counters.num_crashes == 0


def test_a_nursery_that_keeps_dying_is_an_error_and_not_an_outcome(
    patient_pool: JudgePool,
) -> None:
    with pytest.raises(RuntimeError, match="died 4 times in one call"):
        patient_pool.run([["kill nursery"]])
    assert [outcome.value for outcome in patient_pool.run([5])] == [5]


@pytest.mark.parametrize(
    ("payload", "name"),
    [
        (["raise", "ValueError"], "ValueError"),
        (["raise", "SystemExit"], "SystemExit"),
        (["recurse"], "RecursionError"),
    ],
)
def test_an_exception_in_the_judge_is_an_outcome(
    patient_pool: JudgePool, payload: Json, name: str
) -> None:
    outcomes = patient_pool.run([payload, "next"])
    assert (outcomes[0].status, outcomes[0].value) == ("error", name)
    assert outcomes[1].value == "next"
    assert patient_pool.counters.num_errors == 1
    assert patient_pool.counters.num_replaced == 0


def test_large_payloads_behind_a_hang_do_not_block_the_parent(pool: JudgePool) -> None:
    large = "x" * 1_000_000
    outcomes = pool.run([["hang"], large, large, ["hang"], large])
    assert [outcome.status for outcome in outcomes] == [
        "timeout",
        "done",
        "done",
        "timeout",
        "done",
    ]
    assert outcomes[4].value == large


def test_any_text_survives_the_way_to_a_child_and_back(patient_pool: JudgePool) -> None:
    texts = ["\x00", "\ud800", "\U0001f600", "a\nb\r\u2028", ""]
    assert [outcome.value for outcome in patient_pool.run(texts)] == texts


def test_calls_from_two_threads_take_turns(patient_pool: JudgePool) -> None:
    results: dict[int, list[object]] = {}

    def call(offset: int) -> None:
        numbers = list(range(offset, offset + 200))
        results[offset] = [outcome.value for outcome in patient_pool.run(numbers)]

    threads = [threading.Thread(target=call, args=(offset,)) for offset in (0, 1000)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == {offset: list(range(offset, offset + 200)) for offset in (0, 1000)}


def test_an_interrupted_call_leaves_no_stale_outcome_behind(patient_pool: JudgePool) -> None:
    def interrupt(_number: int, _frame: object) -> None:
        raise KeyboardInterrupt

    patient_pool.run([0])
    before = patient_pool.process_ids
    old_handler = signal.signal(signal.SIGALRM, interrupt)

    def are_busy() -> bool:
        return all(child.assigned for child in patient_pool._children)

    try:
        with (
            pytest.raises(KeyboardInterrupt),
            once(are_busy, lambda: os.kill(os.getpid(), signal.SIGALRM)),
        ):
            patient_pool.run([["sleep", 60.0]] * 4)
    finally:
        signal.signal(signal.SIGALRM, old_handler)
    assert wait_until_gone(before) == []
    assert [outcome.value for outcome in patient_pool.run([1, 2, 3])] == [1, 2, 3]


def test_signals_for_the_whole_job_do_not_end_the_children(patient_pool: JudgePool) -> None:
    patient_pool.run([1])
    before = patient_pool.process_ids
    for pid in before:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP):
            os.kill(pid, number)
    assert [outcome.value for outcome in patient_pool.run([1, 2])] == [1, 2]
    assert patient_pool.process_ids == before


def test_close_leaves_no_process_even_if_one_hangs() -> None:
    pool = make_pool()
    pool.run([1])
    pids = pool.process_ids
    assert len(pids) == 3
    pool.close()
    pool.close()
    assert wait_until_gone(pids) == []
    assert pool.process_ids == ()
    with pytest.raises(RuntimeError, match="closed"):
        pool.run([1])


def test_a_judge_that_cannot_be_imported_is_named() -> None:
    pool = make_pool(judge="tests.support.judges:no_such_judge")
    with pytest.raises(RuntimeError, match="no_such_judge"):
        pool.run([1])
    pool.close()


PARENT_PROGRAM = """
import sys, threading, time
from prefixrl_mcore.rewards.pool import JudgePool
from prefixrl_mcore.rewards.wire import Json
pool = JudgePool("tests.support.judges:misbehave", num_workers=2, timeout_seconds=600.0,
                 memory_limit_bytes=64 * 1024**2)
pool.run([1])
print(*pool.process_ids, flush=True)
if sys.argv[1] == "killed":
    pool.run([["hang"], ["hang"]])
"""


@pytest.mark.parametrize("end", ["killed", "finished"])
def test_no_process_outlives_the_parent(end: str) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", PARENT_PROGRAM, end],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    ) as parent:
        assert parent.stdout is not None
        pids = [int(word) for word in parent.stdout.readline().split()]
        assert len(pids) == 3
        if end == "killed":
            time.sleep(0.3)  # both children are in the middle of a hang
            parent.kill()
        parent.wait()
    assert wait_until_gone(pids) == []


def test_children_import_math_verify_but_not_torch() -> None:
    payload: Json = ["final", "1/2", r"\boxed{0.5}", 0, True]
    pool = JudgePool(
        "tests.support.real_judge:judge_and_list_modules",
        num_workers=1,
        timeout_seconds=60.0,
        memory_limit_bytes=4 * MEMORY_BYTES,
        warm_up=[payload],
    )
    (outcome,) = pool.run([payload])
    pool.close()
    assert isinstance(outcome.value, list)
    verdict, *modules = outcome.value
    assert verdict == ["correct", "0.5"]
    assert "math_verify" in modules
    assert {"torch", "numpy", "pydantic", "transformers"}.isdisjoint(map(str, modules))


def test_a_process_with_more_than_1024_open_files_can_have_a_pool() -> None:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(before[0], 2048), before[1]))
    opened = [os.open(os.devnull, os.O_RDONLY) for _ in range(1100)]
    pool = make_pool(timeout_seconds=60.0)
    try:
        assert [outcome.value for outcome in pool.run([1])] == [1]
    finally:
        pool.close()
        for descriptor in opened:
            os.close(descriptor)
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
