"""Servers of a pool that give their memory back, and take it again."""

import time
from types import SimpleNamespace
from typing import Any

import pytest

from prefixrl_mcore.rollout.engine import EngineError
from prefixrl_mcore.rollout.sglang.member import State
from prefixrl_mcore.rollout.weight_sync.sync import is_incomplete
from tests.support.fake_pool import PARAMS, Pool, requests_of, weights


def test_woken_server_takes_memory_for_weights_first_and_for_its_cache_after_the_update(
    pool: Pool,
) -> None:
    engine = pool.engine(urls=pool.urls[:1])
    engine.sample(requests_of(1), PARAMS)
    before = len(pool.fakes[0].calls)

    engine.pause()
    engine.sleep()
    engine.wake()
    engine.load_weights(weights, 1)

    calls = pool.fakes[0].calls[before:]
    steps = [
        "/pause_generation",  # the engine's
        "/continue_generation",
        "/flush_cache",
        "/release_memory_occupation weights kv_cache",
        "/resume_memory_occupation weights",
        "/pause_generation",  # the update's
        "/update_weights_from_tensor",
        "/continue_generation",
        "/flush_cache",
        "/resume_memory_occupation kv_cache",
    ]
    rest = iter(calls)
    assert all(step in rest for step in steps), calls
    assert pool.fakes[0].released == set()
    engine.sample(requests_of(1), PARAMS)


def test_server_that_came_back_while_the_others_slept_is_not_told_to_wake(pool: Pool) -> None:
    """What was not released cannot be resumed: SGLang's scheduler would die of it."""
    engine = pool.engine(urls=pool.urls[:2], max_restarts=5)
    engine.sample(requests_of(4), PARAMS)
    engine.sleep()
    returned, slept = pool.fakes[0], pool.fakes[1]
    returned.released.clear()  # a new process
    engine._pool.bury(engine._pool.members[0], "killed in its sleep")

    engine.wake()
    engine.load_weights(weights, 1)
    deadline = time.monotonic() + 60
    while len(engine._pool.ready) < 2 and time.monotonic() < deadline:
        engine.sample(requests_of(4), PARAMS)

    assert len(engine._pool.ready) == 2
    assert not any(call.startswith("/resume_memory") for call in returned.calls)
    assert [call for call in slept.calls if call.startswith("/resume_memory")] == [
        "/resume_memory_occupation weights",
        "/resume_memory_occupation kv_cache",
    ]


def test_server_that_somebody_started_anew_in_its_sleep_is_not_told_to_wake(pool: Pool) -> None:
    """Its supervisor may do so without a word; also when the folder's weights were those before."""
    engine = pool.engine(urls=pool.urls[:2], max_restarts=5)
    engine.sleep()
    restarted = pool.fakes[0]
    assert is_incomplete(restarted.weight_version)  # for those who come upon it
    restarted.released.clear()
    restarted.weight_version = "first"

    engine.wake()
    engine.load_weights(weights, 1)
    deadline = time.monotonic() + 60
    while len(engine._pool.ready) < 2 and time.monotonic() < deadline:
        engine.sample(requests_of(4), PARAMS)

    assert len(engine._pool.ready) == 2
    assert not any(call.startswith("/resume_memory") for call in restarted.calls)
    assert "started anew in its sleep" in engine._pool.members[0].last_death
    assert restarted.weight_version == pool.fakes[1].weight_version


def test_server_whose_process_ended_in_its_sleep_is_buried_before_the_others_wake(
    pool: Pool,
) -> None:
    engine = pool.engine(urls=pool.urls[:2], max_restarts=0)
    engine.sleep()
    lost: Any = engine._pool.members[0]
    lost.server = SimpleNamespace(
        is_alive=False,
        cause_of_death=lambda: "killed",
        log_tail=lambda: "end of its log",
        stop=lambda: None,
    )

    engine.wake()

    assert lost.last_death == "killed (its process is gone)"
    assert engine._pool.members[1].state is State.STARTING


def test_sleeping_servers_take_no_weights(pool: Pool) -> None:
    engine = pool.engine()
    engine.sleep()

    with pytest.raises(EngineError, match="call wake first"):
        engine.load_weights(weights, 1)


def test_servers_that_sleep_when_metrics_are_taken_are_not_lost(pool: Pool) -> None:
    """A run that takes turns with its servers takes them after the update, all asleep."""
    engine = pool.engine()
    engine.sample(requests_of(3), PARAMS)
    engine.sleep()
    engine._pool.bury(engine._pool.members[0], "killed in its sleep")

    assert engine.take_metrics()["engine/num_ready_servers"] == 2
