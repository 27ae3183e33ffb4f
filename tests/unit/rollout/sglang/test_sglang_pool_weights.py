"""New weights for a pool whose servers refuse them, are lost, or come back late."""

import logging
import re
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from prefixrl_mcore.rollout.engine import EngineError
from prefixrl_mcore.rollout.interruption import (
    SamplingInterrupted,
)
from prefixrl_mcore.rollout.sglang import health
from prefixrl_mcore.rollout.sglang.member import State
from prefixrl_mcore.rollout.weight_sync.checksums import WeightsDifferError
from tests.support.fake_pool import PARAMS, Pool, requests_of, tokens_of, weights
from tests.support.fake_sglang import FakeSGLang
from tests.support.waiting import once


def test_new_weights_reach_every_server(pool: Pool) -> None:
    engine = pool.engine()

    engine.load_weights(weights, 4)

    assert len({fake.weight_version for fake in pool.fakes}) == 1
    assert {len(fake.loaded) for fake in pool.fakes} == {len(list(weights()))}
    groups = engine.sample(requests_of(3), PARAMS)
    assert {one.policy_version for group in groups for one in group} == {4}


def test_load_that_fails_leaves_the_version_of_before(pool: Pool) -> None:
    engine = pool.engine(urls=pool.urls[:1])
    engine.load_weights(weights, 4)

    with pytest.raises(EngineError, match="did not come"):
        engine.load_weights(lambda: iter(list(weights())[:-1]), 5)

    assert engine.policy_version == 4


def test_server_that_came_back_is_brought_up_to_date_and_samples_again(pool: Pool) -> None:
    engine = pool.engine()
    engine.load_weights(weights, 7)
    restarted = pool.fakes[0]
    restarted.weight_version = "of its folder"
    restarted.loaded.clear()

    deadline = time.monotonic() + 60
    while not restarted.sampled and time.monotonic() < deadline:
        groups = engine.sample(requests_of(3), PARAMS)
        assert {one.policy_version for group in groups for one in group} == {7}

    assert len(restarted.loaded) == len(list(weights()))
    assert restarted.weight_version == pool.fakes[1].weight_version
    metrics = engine.take_metrics()
    assert metrics["engine/num_server_restarts"] == 1
    assert metrics["engine/num_ready_servers"] == 3


def test_server_that_was_caught_up_with_other_weights_ends_the_run(
    pool: Pool, caplog: pytest.LogCaptureFixture
) -> None:
    engine = pool.engine(sync={"checksum_every_syncs": 1})
    engine.load_weights(weights, 7)
    restarted = pool.fakes[0]
    restarted.weight_version = "of its folder"
    update = restarted._update

    def lose_one(payload: dict[str, Any]) -> tuple[int, Any]:
        answer = update(payload)
        restarted.weights["model.norm.weight"] = restarted.weights["model.norm.weight"] + 1
        return answer

    restarted._update = lose_one  # type: ignore[method-assign]

    def sample_for_a_while() -> None:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            engine.sample(requests_of(3), PARAMS)

    caplog.set_level(logging.INFO)
    with pytest.raises(WeightsDifferError, match=r"1 differ: model\.norm\.weight\..*-syncs None"):
        sample_for_a_while()
    assert "the update ended: weight sync: the weights of server 0, rank 0" in caplog.text
    assert "incomplete" not in caplog.text


def when_checked(fake: FakeSGLang, status: int) -> None:
    """Have a server end its first comparison of checksums so; 0 breaks the connection."""
    answer, first = fake.answer, iter([status])

    def once(path: str, payload: dict[str, Any]) -> tuple[int, Any]:
        if path == "/weights_checker" and (told := next(first, None)) is not None:
            return told, None
        return answer(path, payload)

    fake.answer = once  # type: ignore[method-assign]


@pytest.mark.parametrize("status", [0, 503])
def test_server_that_is_lost_while_checksums_are_compared_is_buried_alone(
    pool: Pool, status: int
) -> None:
    engine = pool.engine(max_restarts=0)
    when_checked(pool.fakes[1], status)

    engine.load_weights(weights, 1)

    assert tokens_of(engine.sample(requests_of(6), PARAMS)) == [[6, 6]] * 6
    assert pool.fakes[1].sampled == []
    metrics = engine.take_metrics()
    assert (metrics["engine/num_ready_servers"], metrics["engine/num_server_deaths"]) == (2, 1)
    assert metrics["sync/num_failed_servers"] == 1
    engine.load_weights(weights, 2)
    assert pool.fakes[0].calls.count("/weights_checker") == 1  # the others were compared


def test_server_that_refuses_to_tell_its_checksums_ends_the_run_with_the_remedy(
    pool: Pool,
) -> None:
    engine = pool.engine()
    when_checked(pool.fakes[1], 404)

    with pytest.raises(EngineError, match=r"server 1 does not tell the checksums.*404.*-syncs No"):
        engine.load_weights(weights, 1)


@pytest.mark.parametrize(
    "told", [{}, {"parallelism_info": [], "checksums": {}}, {"parallelism_info": {"tp_rank": 0}}, 7]
)
def test_checksums_in_a_form_that_is_not_known_end_the_run_with_the_remedy(
    pool: Pool, told: Any
) -> None:
    engine = pool.engine()
    pool.fakes[1]._checksums = lambda: told  # type: ignore[method-assign]

    remedy = "checksum-every-syncs None does without"
    with pytest.raises(EngineError, match=rf"server 1 tells the checksums .* form .*{remedy}"):
        engine.load_weights(weights, 1)


@pytest.mark.parametrize("status", [0, 500])
def test_run_whose_servers_are_all_lost_by_checksums_ends_with_the_remedy(
    pool: Pool, caplog: pytest.LogCaptureFixture, status: int
) -> None:
    engine = pool.engine(urls=pool.urls[:2], max_restarts=0)
    for fake in pool.fakes[:2]:
        when_checked(fake, status)

    remedy = r"checksum-every-syncs None does without"
    with pytest.raises(EngineError, match=rf"2 of 2 servers are dead for good; .*{remedy}"):
        engine.load_weights(weights, 1)
    assert re.search(rf"server 0 did not tell its checksums: .*{remedy}", caplog.text)


def test_comparison_in_which_all_servers_were_lost_is_made_up_for(pool: Pool) -> None:
    engine = pool.engine(urls=pool.urls[:1], max_restarts=1)
    when_checked(pool.fakes[0], 0)

    engine.load_weights(weights, 1)  # and waits for the server to come back
    assert engine.take_metrics()["engine/num_server_deaths"] == 1
    for version in (2, 3):
        engine.load_weights(weights, version)

    assert pool.fakes[0].calls.count("/weights_checker") == 1  # beside the one that was lost


@pytest.mark.parametrize("is_lost_for_good", [True, False])
def test_servers_that_wait_for_the_next_weights_are_not_waited_for_when_the_last_other_dies(
    pool: Pool, *, is_lost_for_good: bool
) -> None:
    engine = pool.engine(urls=pool.urls[:2], sync={"checksum_every_syncs": None})
    is_lost = False

    def stream() -> Iterator[tuple[str, torch.Tensor]]:
        if is_lost:
            raise EngineError("an update has begun meanwhile")
        return weights()

    engine.load_weights(stream, 7)
    late, last = engine._pool.members[:2]
    is_lost = True
    pool.fakes[0].weight_version = "of its folder"
    pool.fakes[1].hold = threading.Event()

    def lose_the_other_one() -> None:
        nonlocal is_lost
        is_lost = is_lost_for_good
        pool.fakes[1].answer = lambda _path, _payload: (500, None)  # type: ignore[method-assign]

    sampled: list[Any] = []

    def sample() -> None:
        try:
            sampled.append(tokens_of(engine.sample(requests_of(4), PARAMS)))
        except EngineError as error:
            sampled.append(str(error))

    sampling = threading.Thread(target=sample, daemon=True)
    with once(lambda: late in engine._pool._await_load, lose_the_other_one):
        sampling.start()
        sampling.join(60)

    assert sampled == ["an update has begun meanwhile" if is_lost_for_good else [[6, 6]] * 4]
    assert last.state is not State.READY
    assert engine._pool._await_load == set()


@pytest.mark.parametrize(("max_failures", "num_ready"), [(2, 2), (3, 3)])
def test_server_is_buried_before_an_update_after_as_many_missed_probes_as_it_may_miss(
    pool: Pool, monkeypatch: pytest.MonkeyPatch, max_failures: int, num_ready: int
) -> None:
    monkeypatch.setattr(health, "_PROBE_PAUSE_SECONDS", 0.01)
    engine = pool.engine(max_restarts=0, max_failures=max_failures)
    missed = iter([503, 503])
    answer = pool.fakes[1].answer

    def miss_two(path: str, payload: dict[str, Any]) -> tuple[int, Any]:
        status = next(missed, 200) if path == "/model_info" else 200
        return (status, None) if status != 200 else answer(path, payload)

    pool.fakes[1].answer = miss_two  # type: ignore[method-assign]
    engine.load_weights(weights, 1)

    assert engine.take_metrics()["engine/num_ready_servers"] == num_ready


def test_weights_that_do_not_reach_one_server_bury_it_alone(pool: Pool) -> None:
    engine = pool.engine(max_restarts=0)
    pool.fakes[1].refuse_update = "out of memory"

    engine.load_weights(weights, 1)

    groups = engine.sample(requests_of(6), PARAMS)
    assert {one.policy_version for group in groups for one in group} == {1}
    assert pool.fakes[1].sampled == []
    assert engine.take_metrics()["engine/num_ready_servers"] == 2


def test_a_run_that_is_told_to_stop_does_not_wait_for_a_server_for_its_new_weights(
    pool: Pool,
) -> None:
    fake, stop = pool.fakes[0], threading.Event()
    engine = pool.engine(
        urls=pool.urls[:1], max_restarts=100, start_timeout_seconds=60, is_interrupted=stop.is_set
    )
    fake.refuse_update, fake.is_sick = "out of memory", True
    before = time.monotonic()
    threading.Timer(0.5, stop.set).start()

    engine.load_weights(weights, 1)

    assert 0.5 <= time.monotonic() - before < 30
    with pytest.raises(SamplingInterrupted):  # which saves the step
        engine.sample(requests_of(1), PARAMS)
