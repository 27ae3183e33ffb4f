"""Requests of a pool that are lost, refused, or no longer wanted; a router before it."""

import threading
import time
from collections import Counter
from types import SimpleNamespace
from typing import Any

import pytest

from prefixrl_mcore.rollout.engine import RolloutError
from prefixrl_mcore.rollout.sglang import batch, retries
from prefixrl_mcore.rollout.sglang.member import State
from tests.support.fake_pool import (
    PARAMS,
    Pool,
    break_off_for_good,
    requests_of,
    tokens_of,
    weights,
)
from tests.support.fake_sglang import SAMPLED_TOKEN, Answer, FakeSGLang, serve
from tests.support.waiting import is_inside, once, wait_until


def test_loss_that_shows_a_death_is_one_by_a_death(pool: Pool) -> None:
    engine = pool.engine(urls=pool.urls[:1], max_restarts=3, max_retries=0)
    break_off_for_good(pool.fakes[0])

    with pytest.raises(RolloutError, match=r"lost after 1 attempts \(1 by a server's death"):
        engine.sample(requests_of(1), PARAMS)


def test_request_whose_loss_shows_a_death_is_the_first_to_be_issued_again(pool: Pool) -> None:
    engine = pool.engine(urls=pool.urls[:2], max_restarts=0, max_samples_per_server=2)
    break_off_for_good(pool.fakes[0])
    other = pool.fakes[1]
    other.hold = hold = threading.Event()

    def let_go_after_the_death() -> None:
        while engine._pool.members[0].state is not State.DEAD:
            time.sleep(0.01)
        hold.set()

    threading.Thread(target=let_go_after_the_death, daemon=True).start()

    assert tokens_of(engine.sample(requests_of(3), PARAMS)) == [[6, 6]] * 3
    assert [rid.split("-", 2)[2] for rid in other.sampled] == ["0-r1.", "1-r0.", "0-r2."]


def test_lost_request_goes_to_another_server_although_the_first_has_its_context(pool: Pool) -> None:
    engine = pool.engine(urls=pool.urls[:2], max_retries=1, max_failures=99)
    pool.fakes[0].fail_generate = 503

    assert tokens_of(engine.sample(requests_of(1), PARAMS)) == [[6, 6]]
    assert len(pool.fakes[1].sampled) == 1


def test_refused_request_ends_the_call_and_what_is_in_flight(pool: Pool) -> None:
    engine = pool.engine(urls=pool.urls[:2])
    pool.fakes[0].refuse_generate = "too long"
    pool.fakes[1].hold = threading.Event()

    with pytest.raises(RolloutError, match=r"'r0' was refused.*too long"):
        engine.sample(requests_of(2), PARAMS)

    assert "/abort_request" in pool.fakes[1].calls


def test_what_is_not_needed_any_more_is_aborted(pool: Pool) -> None:
    engine = pool.engine(max_samples_per_server=2)
    for fake in pool.fakes[1:]:
        fake.hold = threading.Event()
    asked: list[int] = []
    announced: list[int] = []

    def is_enough(index: int, completions: list[Any]) -> bool:
        asked.append(index)
        wait_until(lambda: all(fake.calls.count("/generate") for fake in pool.fakes))
        return len(asked) == 2

    groups = engine.sample(
        requests_of(6), PARAMS, lambda count, _tokens: announced.append(count), is_enough
    )

    whole = [index for index, group in enumerate(groups) if group[0].finish_reason == "length"]
    assert sorted(asked) == whole
    assert announced == [2, 2]
    aborted = [group for index, group in enumerate(groups) if index not in whole]
    assert len(aborted) == 4
    assert {one.finish_reason for group in aborted for one in group} == {"abort"}
    # Two were in flight: one sample of each had begun, the other was in the queue. Two were unsent.
    assert sorted(tokens_of(aborted)) == [[0, 0], [0, 0], [2, 0], [2, 0]]
    assert {one.token_ids for group in aborted for one in group} == {(), (SAMPLED_TOKEN,) * 2}
    assert engine.take_metrics()["engine/num_aborted_completions"] == 8


def test_what_came_in_time_is_not_given_up_by_a_batch_that_looks_too_late(
    pool: Pool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batch, "_ABORT_LIMIT_SECONDS", 0.0)
    engine = pool.engine()

    def is_enough(index: int, completions: list[Any]) -> bool:
        wait_until(lambda: all(fake.sampled for fake in pool.fakes))
        wait_until(lambda: not is_inside("_ask"))  # the answers are here
        return True

    groups = engine.sample(requests_of(3), PARAMS, is_enough=is_enough)

    assert tokens_of(groups) == [[6, 6]] * 3


def test_batch_that_ends_does_not_begin_an_update(
    pool: Pool, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = pool.engine()
    engine.load_weights(weights, 1)
    servers, seen = engine._pool, list[bool]()
    tend = servers.tend

    def note(*, may_update: bool = True) -> None:
        seen.append(may_update)
        tend(may_update=may_update)

    monkeypatch.setattr(servers, "tend", note)
    for fake in pool.fakes[1:]:
        fake.hold = threading.Event()
    engine.sample(requests_of(3), PARAMS, is_enough=lambda _index, _completions: True)

    assert seen[0]
    assert not seen[-1]
    late = servers.members[0]
    pool.fakes[0].weight_version = "of its folder"
    servers.bury(late, "by the test")
    while not late.is_up:
        tend(may_update=False)
        servers.next_answer(waiting_for="it to come back")
    tend(may_update=False)
    assert late.state is State.STARTING
    tend()
    assert late.state is State.READY


def test_abort_that_nobody_asked_for_is_tried_again(pool: Pool) -> None:
    engine = pool.engine(urls=pool.urls[:1])

    def abort_once(answer: Answer) -> None:
        answer["meta_info"]["finish_reason"] = {"type": "abort", "message": "?"}
        pool.fakes[0].spoil = None

    pool.fakes[0].spoil = abort_once

    assert tokens_of(engine.sample(requests_of(1), PARAMS)) == [[6, 6]]
    assert engine.take_metrics()["engine/num_reissued_requests"] == 1


def test_requests_go_through_the_router_and_everything_else_does_not(pool: Pool) -> None:
    router = FakeSGLang()
    turns = iter(range(99))

    def forward(path: str, payload: Any) -> tuple[int, Any]:
        router.calls.append(path)
        return pool.fakes[next(turns) % 3].answer(path, payload)

    router.answer = forward
    url = pool.stack.enter_context(serve(router))
    engine = pool.engine(router_url=url)

    engine.load_weights(weights, 2)
    groups = engine.sample(requests_of(6), PARAMS)

    assert router.calls == ["/generate"] * 6
    assert {one.policy_version for group in groups for one in group} == {2}
    assert [len(fake.sampled) for fake in pool.fakes] == [2, 2, 2]
    metrics = engine.take_metrics()
    assert metrics["engine/num_requests"] == 6
    assert "engine/server_0/tokens" not in metrics


def test_router_that_is_busy_for_a_second_does_not_use_up_the_tries(pool: Pool) -> None:
    router = FakeSGLang()
    router.weight_version = pool.fakes[0].weight_version
    tries: Counter[str] = Counter()

    def refuse_twice(path: str, payload: Any) -> tuple[int, Any]:
        context = str(payload.get("input_ids"))
        tries[context] += path == "/generate"
        is_busy = path == "/generate" and tries[context] <= 2
        return (503, {"error": {}}) if is_busy else FakeSGLang.answer(router, path, payload)

    router.answer = refuse_twice  # type: ignore[method-assign]
    engine = pool.engine(router_url=pool.stack.enter_context(serve(router)), max_retries=2)
    started = time.monotonic()

    assert tokens_of(engine.sample(requests_of(3), PARAMS)) == [[6, 6]] * 3
    assert time.monotonic() - started >= 1.5  # tried at 0, 0.5 and 1.5 s
    assert engine.take_metrics()["engine/num_reissued_requests"] == 6


@pytest.mark.parametrize("status", [0, 429, 503])
def test_router_that_is_away_is_waited_for_and_not_for_ever(
    pool: Pool, monkeypatch: pytest.MonkeyPatch, status: int
) -> None:
    monkeypatch.setattr(retries, "_FIRST_PAUSE_SECONDS", 0.05)
    router = FakeSGLang()
    router.weight_version = pool.fakes[0].weight_version
    router.fail_generate = status
    router.num_dropped_answers = 99 if status == 0 else 0
    url = pool.stack.enter_context(serve(router))
    engine = pool.engine(router_url=url, max_retries=0, start_timeout_seconds=2)

    with pytest.raises(RolloutError, match=r"'r0' was lost after [2-9] attempts"):
        engine.sample(requests_of(1), PARAMS)

    def come_back() -> None:
        router.fail_generate, router.num_dropped_answers = 0, 0

    engine = pool.engine(router_url=url, max_retries=0)
    before = len(router.calls)
    with once(lambda: len(router.calls) > before + 3, come_back):  # one was asked for twice
        assert tokens_of(engine.sample(requests_of(3), PARAMS)) == [[6, 6]] * 3


@pytest.mark.parametrize("status", [401, 404, 408, 429])
def test_refusal_that_says_nothing_of_the_request_is_answered_by_the_others(
    pool: Pool, status: int
) -> None:
    engine = pool.engine(urls=pool.urls[:2])
    pool.fakes[0].fail_generate = status

    assert tokens_of(engine.sample(requests_of(4), PARAMS)) == [[6, 6]] * 4
    assert pool.fakes[0].sampled == []


@pytest.mark.parametrize("status", [400, 413, 422])
def test_request_that_no_server_would_take_ends_the_call(pool: Pool, status: int) -> None:
    engine = pool.engine(urls=pool.urls[:2])
    for fake in pool.fakes:
        fake.fail_generate = status

    with pytest.raises(RolloutError, match=rf"'r0' was refused: .*{status}"):
        engine.sample(requests_of(1), PARAMS)


def test_request_that_rests_does_not_keep_the_others_waiting(
    pool: Pool, monkeypatch: pytest.MonkeyPatch
) -> None:
    skipped = [0.0]
    clock = SimpleNamespace(monotonic=lambda: time.monotonic() + skipped[0])
    monkeypatch.setattr(retries, "time", clock)
    monkeypatch.setattr(retries, "_FIRST_PAUSE_SECONDS", 1000.0)
    monkeypatch.setattr(retries, "_LONGEST_PAUSE_SECONDS", 1000.0)
    engine = pool.engine(urls=pool.urls[:1])
    fake = pool.fakes[0]
    first = iter([0])  # the first answer does not come

    def drop_one(path: str, payload: Any) -> tuple[int, Any]:
        dropped = path == "/generate" and next(first, None) == 0
        return (503, {"error": {}}) if dropped else FakeSGLang.answer(fake, path, payload)

    fake.answer = drop_one  # type: ignore[method-assign]
    done: list[float] = []

    def note(_count: int, _tokens: int) -> None:
        done.append(skipped[0])
        if len(done) == 2:
            skipped[0] = 1000.0  # its pause is over

    engine.sample(requests_of(3), PARAMS, note)

    assert done == [0.0, 0.0, 1000.0]
