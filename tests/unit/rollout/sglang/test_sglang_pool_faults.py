"""Faults of single servers of a pool: who is given up for them, and who goes on."""

import errno
import itertools
import queue
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from prefixrl_mcore.config.rollout import SGLangConfig
from prefixrl_mcore.rollout.engine import EngineError
from prefixrl_mcore.rollout.sglang.health import Checked, HealthWatch
from prefixrl_mcore.rollout.sglang.member import Member
from tests.support.fake_pool import (
    PARAMS,
    Pool,
    requests_of,
    tokens_of,
    weights,
)
from tests.support.fake_sglang import Answer, FakeSGLang
from tests.support.waiting import wait_until


@pytest.mark.parametrize(
    ("garbage", "message"),
    [
        pytest.param(b"<html>busy</html>", "expected JSON", id="no JSON"),
        pytest.param(b'["a", "b"]', "expected JSON objects", id="no objects"),
        pytest.param(b"[{}, {}]", "not an answer of SGLang's: KeyError", id="no fields"),
        pytest.param(b"[{}]", "expected 2 completions, got 1", id="too few"),
    ],
)
def test_garbage_of_one_server_is_answered_by_the_others(
    pool: Pool, caplog: pytest.LogCaptureFixture, garbage: bytes, message: str
) -> None:
    engine = pool.engine()
    pool.fakes[1].raw_answer = garbage

    groups = engine.sample(requests_of(6), PARAMS)

    assert tokens_of(groups) == [[6, 6]] * 6
    assert message in caplog.text
    assert pool.fakes[1].sampled == []
    metrics = engine.take_metrics()
    assert metrics["engine/num_bad_answers"] >= 1
    assert metrics["engine/num_reissued_requests"] == metrics["engine/num_bad_answers"]


def test_server_that_only_talks_garbage_is_given_up_and_the_run_goes_on(pool: Pool) -> None:
    engine = pool.engine(max_restarts=0, max_failures=2)
    pool.fakes[1].raw_answer = b"?"

    for _ in range(3):
        assert tokens_of(engine.sample(requests_of(6), PARAMS)) == [[6, 6]] * 6

    metrics = engine.take_metrics()
    assert metrics["engine/num_ready_servers"] == 2
    assert metrics["engine/num_server_deaths"] == 1
    assert metrics["engine/num_bad_answers"] <= 6


def test_server_errors_are_answered_by_the_others(pool: Pool) -> None:
    engine = pool.engine()
    pool.fakes[0].fail_generate = 503

    groups = engine.sample(requests_of(6), PARAMS)

    assert tokens_of(groups) == [[6, 6]] * 6
    assert pool.fakes[0].sampled == []


def test_hung_server_is_found_by_its_health_and_its_requests_go_elsewhere(pool: Pool) -> None:
    engine = pool.engine(max_restarts=0)
    hung = pool.fakes[2]
    hung.hold = threading.Event()
    hung.is_sick = True
    started = time.monotonic()

    groups = engine.sample(requests_of(9), PARAMS)

    assert tokens_of(groups) == [[6, 6]] * 9
    assert time.monotonic() - started < 60  # and not request_timeout_seconds, an hour
    assert [len(fake.sampled) for fake in pool.fakes[:2]] != [0, 0]
    metrics = engine.take_metrics()
    assert (metrics["engine/num_server_deaths"], metrics["engine/num_ready_servers"]) == (1, 2)
    assert metrics["engine/num_reissued_requests"] == 3


def test_one_answer_of_other_weights_is_death(pool: Pool) -> None:
    engine = pool.engine(urls=pool.urls[:2], max_restarts=0, max_failures=99)

    def of_other_weights(answer: Answer) -> None:
        answer["meta_info"]["weight_version"] = "theirs"

    pool.fakes[0].spoil = of_other_weights

    assert tokens_of(engine.sample(requests_of(1), PARAMS)) == [[6, 6]]
    metrics = engine.take_metrics()
    assert (metrics["engine/num_bad_answers"], metrics["engine/num_server_deaths"]) == (1, 1)


@pytest.mark.parametrize("is_reachable", [True, False])
def test_server_that_broke_a_connection_is_dead_if_it_does_not_answer_at_all(
    pool: Pool, is_reachable: bool
) -> None:
    engine = pool.engine(urls=pool.urls[:2], max_restarts=0, max_failures=99)
    fake, answer = pool.fakes[0], pool.fakes[0].answer
    has_broken = False

    def break_off(path: str, payload: dict[str, Any]) -> tuple[int, Any]:
        nonlocal has_broken
        has_broken = has_broken or path == "/generate"
        is_gone = has_broken and not is_reachable
        return (0, None) if path == "/generate" or is_gone else answer(path, payload)

    fake.answer = break_off  # type: ignore[method-assign]

    assert tokens_of(engine.sample(requests_of(1), PARAMS)) == [[6, 6]]
    assert engine.take_metrics()["engine/num_server_deaths"] == (0 if is_reachable else 1)


@pytest.mark.parametrize(("num_broken", "num_deaths"), [(1, 0), (2, 1)])
def test_connection_that_breaks_before_a_batch_is_no_death(
    pool: Pool, num_broken: int, num_deaths: int
) -> None:
    engine = pool.engine(urls=pool.urls[:2], max_restarts=0)
    fake, answer, asked = pool.fakes[0], pool.fakes[0].answer, itertools.count()

    def break_off(path: str, payload: dict[str, Any]) -> tuple[int, Any]:
        is_broken = path == "/model_info" and next(asked) < num_broken
        return (0, None) if is_broken else answer(path, payload)

    fake.answer = break_off  # type: ignore[method-assign]

    assert tokens_of(engine.sample(requests_of(4), PARAMS)) == [[6, 6]] * 4
    assert engine.take_metrics()["engine/num_server_deaths"] == num_deaths
    assert (fake.sampled == []) == (num_deaths == 1)


def every_other_time(fake: FakeSGLang, path: str) -> None:
    """Have a server refuse every other call of an endpoint, the first among them."""
    turns = itertools.count()
    answer = fake.answer

    def flap(called: str, payload: dict[str, Any]) -> tuple[int, Any]:
        if called == path and next(turns) % 2 == 0:
            return 503, None
        return answer(called, payload)

    fake.answer = flap  # type: ignore[method-assign]


def test_health_checks_that_fail_now_and_then_are_not_failures_in_a_row(pool: Pool) -> None:
    engine = pool.engine(urls=pool.urls[:1], max_restarts=0, max_failures=2)
    fake = pool.fakes[0]
    every_other_time(fake, "/health_generate")
    fake.hold = hold = threading.Event()

    def let_go_after_some_checks() -> None:
        while fake.calls.count("/health_generate") < 4:
            time.sleep(0.01)
        hold.set()

    threading.Thread(target=let_go_after_some_checks, daemon=True).start()

    assert tokens_of(engine.sample(requests_of(2), PARAMS)) == [[6, 6]] * 2
    assert engine.take_metrics()["engine/num_server_deaths"] == 0


def test_silence_of_a_server_counts_once_however_long_nobody_looked() -> None:
    asked, answer = list[float](), threading.Event()

    def check_progress(timeout_seconds: float) -> None:
        asked.append(timeout_seconds)
        answer.wait()

    ended: queue.SimpleQueue[Checked] = queue.SimpleQueue()
    config: Any = SimpleNamespace(health_timeout_seconds=0.01, health_every_seconds=0.0)
    watch = HealthWatch(config, ended.put)
    config_of_member = SGLangConfig(urls=("http://192.0.2.1:9",))
    member: Any = Member(
        0, config_of_member, launch=None, is_here=False, logs_folder=Path(), check=print
    )
    member.life, member._client = 1, SimpleNamespace(check_progress=check_progress)

    def look() -> int:
        watch.begin_due([member])
        time.sleep(0.05)  # longer than a check may take; for one too many
        return len(asked)

    look()
    wait_until(lambda: asked)
    assert look() == 1
    member.life = 2  # the call to the server that was is still under way
    assert look() == 1
    member.life = 1
    answer.set()
    checked = ended.get(timeout=20)
    assert look() == 1  # its end was not looked at yet
    watch.note(checked)
    look()
    wait_until(lambda: len(asked) == 2)


def test_answers_that_fail_now_and_then_are_not_failures_in_a_row(pool: Pool) -> None:
    engine = pool.engine(urls=pool.urls[:1], max_restarts=0, max_failures=2)
    every_other_time(pool.fakes[0], "/generate")

    for _ in range(3):  # one after the other
        assert tokens_of(engine.sample(requests_of(1), PARAMS)) == [[6, 6]]

    metrics = engine.take_metrics()
    assert (metrics["engine/num_reissued_requests"], metrics["engine/num_server_deaths"]) == (3, 0)


def fail_first(fake: FakeSGLang, count: int, status: int) -> None:
    """Have a server answer its first requests so, all of them at the same moment."""
    answer, all_have_come = fake.answer, threading.Barrier(count)
    numbers = itertools.count()

    def fail(path: str, payload: dict[str, Any]) -> tuple[int, Any]:
        if path == "/generate" and next(numbers) < count:
            all_have_come.wait(60)
            return status, {"error": {"message": "busy"}}
        return answer(path, payload)

    fake.answer = fail  # type: ignore[method-assign]


def test_hiccup_that_many_requests_fail_by_is_one_failure(pool: Pool) -> None:
    engine = pool.engine(urls=pool.urls[:1], max_restarts=0, max_failures=2)
    fail_first(pool.fakes[0], 5, 503)

    assert tokens_of(engine.sample(requests_of(5), PARAMS)) == [[6, 6]] * 5
    metrics = engine.take_metrics()
    assert (metrics["engine/num_reissued_requests"], metrics["engine/num_server_deaths"]) == (5, 0)


@pytest.mark.parametrize("min_servers", [1, 2])
def test_too_few_servers_are_one_error_that_names_them(pool: Pool, min_servers: int) -> None:
    engine = pool.engine(urls=pool.urls[:2], max_restarts=0, min_servers=min_servers)
    for fake in pool.fakes[: 3 - min_servers]:
        fake.hold = threading.Event()
        fake.is_sick = True

    with pytest.raises(EngineError, match=rf"{3 - min_servers} of 2 servers are dead.*server 0"):
        engine.sample(requests_of(4), PARAMS)


def test_server_that_never_starts_is_given_up_although_its_starts_take_longer_than_the_window(
    pool: Pool, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = pool.engine(urls=pool.urls[:1], max_restarts=2, restart_window_seconds=0.2)

    def take_long(*_: object) -> str:
        time.sleep(0.5)
        raise EngineError("it never starts")

    monkeypatch.setattr(Member, "_come_up", take_long)
    engine._pool.bury(engine._pool.members[0], "by the test")

    with pytest.raises(EngineError, match=r"1 of 1 servers are dead for good.*, 2 in vain,"):
        engine.sample(requests_of(1), PARAMS)


def fail_starts(monkeypatch: pytest.MonkeyPatch, seconds: float, error: Exception) -> None:
    """Have the next start fail at once, and all that follow it within so many seconds."""
    come_up, is_over = Member._come_up, list[float]()

    def lack(member: Member, life: int, cancelled: threading.Event) -> str:
        is_over.append(time.monotonic() + seconds)
        if len(is_over) == 1 or time.monotonic() < is_over[0]:
            raise error
        return come_up(member, life, cancelled)

    monkeypatch.setattr(Member, "_come_up", lack)


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOMEM, "Cannot allocate memory"), ValueError("no API key")]
)
def test_what_this_machine_lacks_for_a_moment_does_not_use_up_all_restarts(
    pool: Pool, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    engine = pool.engine(urls=pool.urls[:1], max_restarts=2)
    fail_starts(monkeypatch, 0.3, error)
    engine._pool.bury(engine._pool.members[0], "by the test")

    assert tokens_of(engine.sample(requests_of(1), PARAMS)) == [[6, 6]]
    assert engine._pool.members[0].last_death == f"{type(error).__name__}: {error}"


def test_server_whose_restarts_were_all_in_vain_is_tried_again_while_others_serve(
    pool: Pool, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = pool.engine(urls=pool.urls[:2], max_restarts=1, restart_window_seconds=0.3)
    fail_starts(monkeypatch, 0.2, EngineError("its file system is away"))
    engine._pool.bury(engine._pool.members[0], "by the test")

    deadline = time.monotonic() + 60
    while len(engine._pool.ready) < 2 and time.monotonic() < deadline:
        engine.sample(requests_of(2), PARAMS)

    assert len(engine._pool.ready) == 2
    assert engine._pool.members[0].restarts.num_restarts == 2


def test_server_that_was_given_up_while_paused_comes_back(pool: Pool) -> None:
    engine = pool.engine(urls=pool.urls[:2])
    engine.load_weights(weights, 1)
    lost = pool.fakes[0]
    lost.is_paused = True
    lost.weight_version = "ab12:3:incomplete"

    groups = engine.sample(requests_of(6), PARAMS)
    assert tokens_of(groups) == [[6, 6]] * 6
    deadline = time.monotonic() + 60
    while lost.is_paused and time.monotonic() < deadline:
        engine.sample(requests_of(2), PARAMS)

    assert not lost.is_paused
