"""What a pool does as long as nothing fails: it spreads, counts and tells."""

import logging
import re
import threading
import time
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest

from prefixrl_mcore.rollout.engine import EngineError
from prefixrl_mcore.rollout.sglang import pool as sglang_pool
from prefixrl_mcore.rollout.sglang.counters import PoolCounters
from prefixrl_mcore.rollout.sglang.in_flight import InFlight
from prefixrl_mcore.rollout.sglang.member import Member, State
from prefixrl_mcore.rollout.sglang.schedule import Cost
from tests.support.fake_pool import PARAMS, Pool, requests_of, tokens_of, weights
from tests.support.waiting import is_inside, once


def test_groups_are_spread_and_counted(pool: Pool) -> None:
    engine = pool.engine()
    for fake in pool.fakes:
        fake.hold = threading.Event()  # nobody is done before all have got their part

    def release() -> None:
        for fake in pool.fakes:
            assert fake.hold is not None
            fake.hold.set()

    with once(lambda: sum(fake.calls.count("/generate") for fake in pool.fakes) == 9, release):
        groups = engine.sample(requests_of(9), PARAMS)

    assert tokens_of(groups) == [[6, 6]] * 9
    assert [len(fake.sampled) for fake in pool.fakes] == [3, 3, 3]
    metrics = engine.take_metrics()
    assert metrics["engine/num_requests"] == 9
    assert metrics["engine/server_tokens_max_over_mean"] == 1.0
    # 3 requests of 2 samples: 3 context tokens, none of them cached, and 6 sampled ones.
    assert metrics["engine/server_2/tokens"] == 3 * 2 * (3 + 6)
    assert metrics["engine/cache_hit_fraction"] == 0.0
    assert metrics["engine/num_ready_servers"] == 3
    assert engine.take_metrics()["engine/num_requests"] == 0


def test_server_is_asked_for_no_more_than_its_bound_at_a_time(pool: Pool) -> None:
    engine = pool.engine(urls=pool.urls[:1], max_samples_per_server=4)
    fake = pool.fakes[0]
    fake.hold = threading.Event()
    seen: list[int] = []

    def look() -> None:
        time.sleep(0.2)  # for one too many
        seen.append(fake.calls.count("/generate"))
        assert fake.hold is not None
        fake.hold.set()

    with once(lambda: fake.calls.count("/generate") >= 2, look):
        engine.sample(requests_of(5), PARAMS)

    assert seen == [2]
    assert fake.calls.count("/generate") == 5


@pytest.mark.parametrize("is_loading", [True, False])
def test_engine_that_is_closed_waits_for_no_server(pool: Pool, *, is_loading: bool) -> None:
    engine = pool.engine(urls=pool.urls[:1], max_restarts=99, start_timeout_seconds=60)
    member, fake = engine._pool.members[0], pool.fakes[0]
    if is_loading:
        fake.refuse_update = "out of memory"
    fake.is_sick = True
    fake.hold = threading.Event()

    use = partial(engine.load_weights, weights, 1)
    if not is_loading:
        use = partial(engine.sample, requests_of(1), PARAMS)
    with (
        once(lambda: member.life == 2 and is_inside("_wait_for_url"), engine.close),
        pytest.raises(EngineError, match="the engine was closed while it was in use"),
    ):
        use()

    assert member.life == 2  # it was not started again


def test_server_that_is_closed_as_it_is_revived_is_not_started(
    pool: Pool, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = pool.engine(urls=pool.urls[:1], max_restarts=99)
    member = engine._pool.members[0]
    pool.fakes[0].is_sick = True  # it would be waited for
    member.die("so that it can be revived")
    move_to = Member.move_to

    def move_and_close(one: Member, state: State, cause: str) -> None:
        move_to(one, state, cause)
        if one.life == 2:
            one.close()  # as another thread does

    monkeypatch.setattr(Member, "move_to", move_and_close)
    member.revive(lambda came_up: None)
    assert member.life == 2
    assert not any(thread.name == "sglang-0" for thread in threading.enumerate())


def test_what_is_counted_while_metrics_are_taken_is_in_the_next_ones(
    pool: Pool, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = pool.engine()
    original = PoolCounters.metrics

    def interrupted(counters: PoolCounters, *, num_ready: int) -> dict[str, float]:
        values = original(counters, num_ready=num_ready)
        monkeypatch.setattr(PoolCounters, "metrics", original)
        engine.sample(requests_of(3), PARAMS)  # as the thread of an overlapping generation does
        return values

    monkeypatch.setattr(PoolCounters, "metrics", interrupted)

    assert engine.take_metrics()["engine/num_requests"] == 0
    assert engine.take_metrics()["engine/num_requests"] == 3


def test_server_that_was_started_anew_is_not_believed_to_have_contexts_in_its_cache() -> None:
    member: Any = SimpleNamespace(index=0, life=1)
    in_flight = InFlight()
    (request,) = requests_of(1)
    cost = Cost(context_tokens=3, completion_tokens=12.0)
    expected: list[float] = []
    for member.life in (1, 1, 2):
        ticket = in_flight.begin(0, request, cost, member=member, server_id="r")
        expected.append(ticket.tokens)

    assert expected == [15.0, 12.0, 15.0]


def test_what_is_waited_for_is_logged(
    pool: Pool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(sglang_pool, "_HEARTBEAT_SECONDS", 0.3)
    engine = pool.engine(urls=pool.urls[:1])
    pool.fakes[0].hold = hold = threading.Event()

    with (
        caplog.at_level(logging.INFO),
        once(lambda: "SGLang: waiting for" in caplog.text, hold.set),
    ):
        engine.sample(requests_of(2), PARAMS)

    # Without a cache each of 2 x 2 samples computes its 3 context tokens.
    waited = r"waiting for 2 requests in flight \(about 36 tokens, the oldest for \d+ s\)"
    assert re.search(waited, caplog.text)
    assert "server 0 ready for" in caplog.text


def test_every_change_of_state_is_logged_with_its_cause(
    pool: Pool, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        engine = pool.engine(urls=pool.urls[:1])
        engine.pause()
        engine.resume()
        engine.sleep()
        engine.wake()

    changes = [m.split(": ", 2)[2] for m in caplog.messages if " -> " in m]
    assert changes == [
        "dead -> starting: waiting for it",
        "starting -> ready: has weights 'first'",
        "ready -> paused: pause",
        "paused -> ready: resume",
        "ready -> asleep: its memory is released",
        "asleep -> starting: it was woken, and has no weights",
    ]
