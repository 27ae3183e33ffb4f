"""Faults of single servers of a pool, as the scripted fake shows them."""

import errno
import itertools
import logging
import queue
import socket
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from prefixrl_mcore.config.rollout import SGLangConfig
from prefixrl_mcore.rollout.engine import EngineError, RolloutError, SampleRequest, SamplingParams
from prefixrl_mcore.rollout.interruption import (
    IsInterrupted,
    SamplingInterrupted,
    never_interrupted,
)
from prefixrl_mcore.rollout.sglang import batch, health, retries
from prefixrl_mcore.rollout.sglang import pool as sglang_pool
from prefixrl_mcore.rollout.sglang.counters import PoolCounters
from prefixrl_mcore.rollout.sglang.engine import SGLangEngine
from prefixrl_mcore.rollout.sglang.health import Checked, HealthWatch
from prefixrl_mcore.rollout.sglang.in_flight import InFlight
from prefixrl_mcore.rollout.sglang.member import Member, State
from prefixrl_mcore.rollout.sglang.schedule import Cost
from prefixrl_mcore.rollout.weight_sync.checksums import WeightsDifferError
from prefixrl_mcore.rollout.weight_sync.sync import is_incomplete
from tests.support.fake_sglang import SAMPLED_TOKEN, Answer, FakeSGLang, serve
from tests.support.tiny_models import build_tiny_qwen3, write_tiny_qwen3
from tests.support.waiting import once, wait_until

PARAMS = SamplingParams(
    temperature=1.0, max_completion_tokens=6, max_total_tokens=50, stop_token_ids=()
)


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_qwen3(tmp_path_factory.mktemp("model"))


@dataclass(frozen=True, kw_only=True, slots=True)
class Pool:
    """Three fakes, and what makes an engine on them."""

    fakes: list[FakeSGLang]
    urls: tuple[str, ...]
    model_folder: Path
    logs_folder: Path
    stack: ExitStack

    def engine(
        self, *, is_interrupted: IsInterrupted = never_interrupted, **settings: Any
    ) -> SGLangEngine:
        config = {
            "urls": self.urls,
            "start_timeout_seconds": 5,
            "health_every_seconds": 0.05,
            "health_timeout_seconds": 1.5,
        }
        engine = SGLangEngine(
            self.model_folder,
            SGLangConfig(**(config | settings)),
            logits_dtype="float32",
            max_total_tokens=100,
            logs_folder=self.logs_folder,
            is_interrupted=is_interrupted,
        )
        self.stack.callback(engine.close)
        return engine


@pytest.fixture
def pool(model_folder: Path, tmp_path: Path) -> Iterator[Pool]:
    with ExitStack() as stack:
        fakes = [FakeSGLang() for _ in range(3)]
        urls = tuple(stack.enter_context(serve(fake)) for fake in fakes)
        yield Pool(
            fakes=fakes, urls=urls, model_folder=model_folder, logs_folder=tmp_path, stack=stack
        )
        for fake in fakes:  # what hangs must not hang the end of the test
            if fake.hold is not None:
                fake.hold.set()


def requests_of(count: int, num_samples: int = 2) -> list[SampleRequest]:
    return [
        SampleRequest(
            request_id=f"r{index}",
            context_token_ids=(5, 6, 7 + index),
            num_samples=num_samples,
            seed=0,
        )
        for index in range(count)
    ]


def weights() -> Iterator[tuple[str, torch.Tensor]]:
    return ((name, weight.detach()) for name, weight in build_tiny_qwen3().named_parameters())


def tokens_of(groups: list[list[Any]]) -> list[list[int]]:
    return [[len(one.token_ids) for one in group] for group in groups]


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


def test_new_weights_reach_every_server(pool: Pool) -> None:
    engine = pool.engine()

    engine.load_weights(weights, 4)

    assert len({fake.weight_version for fake in pool.fakes}) == 1
    assert {len(fake.loaded) for fake in pool.fakes} == {len(list(weights()))}
    groups = engine.sample(requests_of(3), PARAMS)
    assert {one.policy_version for group in groups for one in group} == {4}


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
    assert time.monotonic() - started < 5  # and not request_timeout_seconds, an hour
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


def break_off_for_good(fake: FakeSGLang) -> None:
    """Have a server break every connection, from the first request on."""
    answer, has_broken = fake.answer, threading.Event()

    def break_off(path: str, payload: dict[str, Any]) -> tuple[int, Any]:
        if path == "/generate":
            has_broken.set()
        return (0, None) if has_broken.is_set() else answer(path, payload)

    fake.answer = break_off  # type: ignore[method-assign]


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


def test_lost_request_goes_to_another_server_although_the_first_has_its_context(pool: Pool) -> None:
    engine = pool.engine(urls=pool.urls[:2], max_retries=1, max_failures=99)
    pool.fakes[0].fail_generate = 503

    assert tokens_of(engine.sample(requests_of(1), PARAMS)) == [[6, 6]]
    assert len(pool.fakes[1].sampled) == 1


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
        once(lambda: member.life == 2, engine.close),  # while it is waited for
        pytest.raises(EngineError, match="the engine was closed while it was in use"),
    ):
        use()

    assert member.life == 2  # it was not started again


def test_load_that_fails_leaves_the_version_of_before(pool: Pool) -> None:
    engine = pool.engine(urls=pool.urls[:1])
    engine.load_weights(weights, 4)

    with pytest.raises(EngineError, match="did not come"):
        engine.load_weights(lambda: iter(list(weights())[:-1]), 5)

    assert engine.policy_version == 4


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
        time.sleep(0.05)  # longer than a check may take
        watch.begin_due([member])
        return len(asked)

    assert [look(), look()] == [1, 1]
    member.life = 2  # the call to the server that was is still under way
    assert look() == 1
    member.life = 1
    answer.set()
    checked = ended.get(timeout=5)
    assert look() == 1  # its end was not looked at yet
    watch.note(checked)
    assert look() == 2


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
            all_have_come.wait(10)
            return status, {"error": {"message": "busy"}}
        return answer(path, payload)

    fake.answer = fail  # type: ignore[method-assign]


def test_hiccup_that_many_requests_fail_by_is_one_failure(pool: Pool) -> None:
    engine = pool.engine(urls=pool.urls[:1], max_restarts=0, max_failures=2)
    fail_first(pool.fakes[0], 5, 503)

    assert tokens_of(engine.sample(requests_of(5), PARAMS)) == [[6, 6]] * 5
    metrics = engine.take_metrics()
    assert (metrics["engine/num_reissued_requests"], metrics["engine/num_server_deaths"]) == (5, 0)


def test_server_that_came_back_is_brought_up_to_date_and_samples_again(pool: Pool) -> None:
    engine = pool.engine()
    engine.load_weights(weights, 7)
    restarted = pool.fakes[0]
    restarted.weight_version = "of its folder"
    restarted.loaded.clear()

    deadline = time.monotonic() + 10
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
        deadline = time.monotonic() + 10
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
        while late not in engine._pool._await_load:
            time.sleep(0.01)
        is_lost = is_lost_for_good
        pool.fakes[1].answer = lambda _path, _payload: (500, None)  # type: ignore[method-assign]

    threading.Thread(target=lose_the_other_one, daemon=True).start()
    sampled: list[Any] = []

    def sample() -> None:
        try:
            sampled.append(tokens_of(engine.sample(requests_of(4), PARAMS)))
        except EngineError as error:
            sampled.append(str(error))

    sampling = threading.Thread(target=sample, daemon=True)
    sampling.start()
    sampling.join(20)

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


@pytest.mark.parametrize("min_servers", [1, 2])
def test_too_few_servers_are_one_error_that_names_them(pool: Pool, min_servers: int) -> None:
    engine = pool.engine(urls=pool.urls[:2], max_restarts=0, min_servers=min_servers)
    for fake in pool.fakes[: 3 - min_servers]:
        fake.hold = threading.Event()
        fake.is_sick = True

    with pytest.raises(EngineError, match=rf"{3 - min_servers} of 2 servers are dead.*server 0"):
        engine.sample(requests_of(4), PARAMS)


def test_server_that_never_starts_is_given_up_although_its_starts_take_longer_than_the_window(
    pool: Pool,
) -> None:
    engine = pool.engine(
        urls=pool.urls[:1],
        max_restarts=2,
        restart_window_seconds=0.01,
        start_timeout_seconds=0.1,
    )
    break_off_for_good(pool.fakes[0])

    with pytest.raises(EngineError, match=r"1 of 1 servers are dead for good.*, 2 in vain,"):
        engine.sample(requests_of(1), PARAMS)


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOMEM, "Cannot allocate memory"), ValueError("no API key")]
)
def test_restart_that_this_machine_has_not_enough_for_is_one_that_failed(
    pool: Pool, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    engine = pool.engine(urls=pool.urls[:1], max_restarts=2)
    come_up, errors = Member._come_up, iter([error])

    def lack(member: Member, life: int, cancelled: threading.Event) -> str:
        if (lacks := next(errors, None)) is not None:
            raise lacks
        return come_up(member, life, cancelled)

    monkeypatch.setattr(Member, "_come_up", lack)
    engine._pool.bury(engine._pool.members[0], "by the test")

    assert tokens_of(engine.sample(requests_of(1), PARAMS)) == [[6, 6]]
    assert engine._pool.members[0].last_death == f"{type(error).__name__}: {error}"


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

    assert 0.5 <= time.monotonic() - before < 10
    with pytest.raises(SamplingInterrupted):  # which saves the step
        engine.sample(requests_of(1), PARAMS)


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
        return len(asked) == 2

    groups = engine.sample_until(
        requests_of(6), PARAMS, is_enough, lambda count, _tokens: announced.append(count)
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
        time.sleep(0.5)  # until the answers are here
        return True

    groups = engine.sample_until(requests_of(3), PARAMS, is_enough)

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
    engine.sample_until(requests_of(3), PARAMS, lambda _index, _completions: True)

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
    engine = pool.engine(
        router_url=pool.stack.enter_context(serve(router)), max_retries=0, start_timeout_seconds=2
    )

    with pytest.raises(RolloutError, match=r"'r0' was lost after [4-9] attempts"):
        engine.sample(requests_of(1), PARAMS)

    def come_back() -> None:
        router.fail_generate, router.num_dropped_answers = 0, 0

    threading.Timer(0.5, come_back).start()
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
    monkeypatch.setattr(retries, "_FIRST_PAUSE_SECONDS", 3.0)
    engine = pool.engine(urls=pool.urls[:1])
    fake = pool.fakes[0]
    first = iter([0])  # the first answer does not come

    def drop_one(path: str, payload: Any) -> tuple[int, Any]:
        dropped = path == "/generate" and next(first, None) == 0
        return (503, {"error": {}}) if dropped else FakeSGLang.answer(fake, path, payload)

    fake.answer = drop_one  # type: ignore[method-assign]
    done: list[float] = []

    started = time.monotonic()
    engine.sample(
        requests_of(3), PARAMS, lambda _count, _tokens: done.append(time.monotonic() - started)
    )

    assert done[1] < 3.0 <= done[2]


def test_server_that_was_started_anew_is_not_believed_to_have_contexts_in_its_cache() -> None:
    member: Any = SimpleNamespace(index=0, life=1)
    in_flight = InFlight()
    (request,) = requests_of(1)
    cost = Cost(context_tokens=3, completion_tokens=12.0)
    expected: list[float] = []
    for member.life in (1, 1, 2):
        ticket = in_flight.begin(0, request, cost, server=0, member=member, server_id="r")
        expected.append(ticket.tokens)

    assert expected == [15.0, 12.0, 15.0]


def test_servers_left_in_the_middle_of_an_update_wait_for_weights(pool: Pool) -> None:
    pool.fakes[1].weight_version = "crashed:3:incomplete"
    engine = pool.engine()

    with pytest.raises(EngineError, match="different, incomplete or another"):
        engine.sample(requests_of(1), PARAMS)
    engine.load_weights(weights, 0)

    assert tokens_of(engine.sample(requests_of(3), PARAMS)) == [[6, 6]] * 3


@pytest.mark.parametrize("name", ["ab12:7", "ab12:-1", "0123abcd:400"])
def test_complete_weights_of_another_run_are_not_sampled_from(pool: Pool, name: str) -> None:
    for fake in pool.fakes:
        fake.weight_version = name
    engine = pool.engine()

    with pytest.raises(EngineError, match=r"another run's weights.*call load_weights first"):
        engine.sample(requests_of(1), PARAMS)
    engine.load_weights(weights, 0)

    assert tokens_of(engine.sample(requests_of(3), PARAMS)) == [[6, 6]] * 3


@pytest.mark.parametrize("name", ["initial", "default", "first"])
def test_weights_that_servers_were_started_with_are_sampled_from(pool: Pool, name: str) -> None:
    for fake in pool.fakes:
        fake.weight_version = name

    groups = pool.engine().sample(requests_of(1), PARAMS)

    assert {one.policy_version for group in groups for one in group} == {-1}


def test_servers_left_paused_by_a_trainer_that_died_are_found_and_updated(pool: Pool) -> None:
    for fake in pool.fakes:
        fake.is_paused = True
        fake.weight_version = "ab12:3:incomplete"
    engine = pool.engine()

    engine.load_weights(weights, 0)

    assert tokens_of(engine.sample(requests_of(3), PARAMS)) == [[6, 6]] * 3
    assert [fake.is_paused for fake in pool.fakes] == [False] * 3


def test_where_a_server_is_is_asked_once(pool: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    resolve, asked = socket.getaddrinfo, list[str]()

    def note(host: str, port: Any, *args: Any, **kwargs: Any) -> Any:
        if port is None:  # and not to connect to it
            asked.append(host)
        return resolve("127.0.0.1" if host == "node-a" else host, port, *args, **kwargs)

    monkeypatch.setattr(socket, "getaddrinfo", note)

    pool.engine(urls=(pool.urls[0].replace("127.0.0.1", "node-a"),))

    assert asked == ["node-a"]


def test_server_that_was_given_up_while_paused_comes_back(pool: Pool) -> None:
    engine = pool.engine(urls=pool.urls[:2])
    engine.load_weights(weights, 1)
    lost = pool.fakes[0]
    lost.is_paused = True
    lost.weight_version = "ab12:3:incomplete"

    groups = engine.sample(requests_of(6), PARAMS)
    assert tokens_of(groups) == [[6, 6]] * 6
    deadline = time.monotonic() + 10
    while lost.is_paused and time.monotonic() < deadline:
        engine.sample(requests_of(2), PARAMS)

    assert not lost.is_paused


@pytest.mark.parametrize(
    ("reported", "message"),
    [
        ({"tp_size": 2}, r"tp_size = 2, expected 1; set rollout\.sglang\.tensor_parallel_size"),
        ({"pp_size": 2}, r"pp_size = 2, expected 1; start it without --pp-size"),
        ({"dp_size": 4}, r"dp_size = 4, expected 1; .*rollout\.sglang\.urls"),
    ],
)
def test_server_of_other_parallel_sizes_is_refused(
    pool: Pool, reported: dict[str, int], message: str
) -> None:
    pool.fakes[1].precision |= reported

    with pytest.raises(EngineError, match=message):
        pool.engine()


@pytest.mark.parametrize(
    "reported",
    [{"architectures": ["LlamaForCausalLM"]}, {"model_type": "llama"}, {"vocab_size": 7}],
)
def test_server_with_another_kind_of_model_is_refused(pool: Pool, reported: dict[str, Any]) -> None:
    pool.fakes[1].model = reported

    with pytest.raises(EngineError, match=rf"a model with {next(iter(reported))}.*model\.path"):
        pool.engine()


def test_servers_of_the_folders_model_are_accepted(pool: Pool) -> None:
    for fake in pool.fakes:
        fake.precision |= {"tp_size": 1, "pp_size": 1, "dp_size": 1}
        fake.model = {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3"}

    assert tokens_of(pool.engine().sample(requests_of(1), PARAMS)) == [[6, 6]]


def test_servers_of_different_versions_are_refused(pool: Pool) -> None:
    pool.fakes[2].version = "0.5.19"

    with pytest.raises(EngineError, match=r"0\.5\.1[79], others of the pool are 0\.5\.1[79]"):
        pool.engine()


def test_what_is_waited_for_is_logged(
    pool: Pool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(sglang_pool, "_HEARTBEAT_SECONDS", 0.3)
    engine = pool.engine(urls=pool.urls[:1])
    pool.fakes[0].hold = hold = threading.Event()
    threading.Timer(1.0, hold.set).start()

    with caplog.at_level(logging.INFO):
        engine.sample(requests_of(2), PARAMS)

    # Without a cache each of 2 x 2 samples computes its 3 context tokens.
    assert "waiting for 2 requests in flight (about 36 tokens, the oldest for 0 s)" in caplog.text
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
    deadline = time.monotonic() + 10
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
    deadline = time.monotonic() + 10
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
