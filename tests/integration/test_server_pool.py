"""A pool of three real SGLang servers: balance, the loss of one, an end without remains."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import torch

from prefixrl_mcore.config.rollout import SGLangConfig, SyncConfig
from prefixrl_mcore.records import Completion
from prefixrl_mcore.rollout.engine import SampleRequest, SamplingParams
from prefixrl_mcore.rollout.sglang.client import SGLangClient
from prefixrl_mcore.rollout.sglang.engine import SGLangEngine
from prefixrl_mcore.rollout.weight_sync.distributed import Broadcast
from tests.support.pool_requests import CONTEXT_TOKENS, params_of, requests_of
from tests.support.processes import pids_of_groups, wait_until_gone
from tests.support.server_loads import computed_context_tokens
from tests.support.sglang_environments import sglang_python
from tests.support.tiny_models import build_tiny_qwen3, write_tiny_qwen3

pytestmark = pytest.mark.slow

NUM_SERVERS = 3
START_SECONDS = 300.0
BUCKET_BYTES = 50_000
SYNC_SECONDS = 15.0
"""For a bucket: long for tiny weights on a busy machine, short against other limits."""


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_qwen3(tmp_path_factory.mktemp("pool") / "model", seed=0)


@pytest.fixture(scope="module", params=["sglang"])
def engine(request: pytest.FixtureRequest, model_folder: Path) -> Iterator[SGLangEngine]:
    config = SGLangConfig(
        python=sglang_python(request.param),
        num_servers=NUM_SERVERS,
        start_timeout_seconds=START_SECONDS,
        request_timeout_seconds=3600,
        health_every_seconds=1,
        health_timeout_seconds=5,
        max_failures=2,
        sync=SyncConfig(bucket_bytes=BUCKET_BYTES, timeout_seconds=SYNC_SECONDS),
    )
    engine = SGLangEngine(
        model_folder,
        config,
        logits_dtype="float32",
        max_total_tokens=1200,
        logs_folder=model_folder.parent / "logs" / request.param,
    )
    try:
        yield engine
    finally:
        engine.close()


BOTH_VERSIONS = pytest.mark.parametrize("engine", ["sglang", "sglang-next"], indirect=True)
"""For a test that is to run on either end of the supported range; others run on the older one."""


def weights(seed: int) -> Iterator[tuple[str, torch.Tensor]]:
    torch.manual_seed(seed)
    return ((name, weight.detach()) for name, weight in build_tiny_qwen3().named_parameters())


def load(engine: SGLangEngine, version: int) -> None:
    engine.load_weights(lambda: weights(version), version)


def wait_until_all_are_ready(engine: SGLangEngine, version: int) -> None:
    """Sample until the pool is whole again: it is restarted from within ``sample``."""
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        (group,) = engine.sample(requests_of(1, 1), params_of(2))
        assert group[0].policy_version == version
        if engine.take_metrics()["engine/num_ready_servers"] == NUM_SERVERS:
            return
    raise AssertionError("the pool did not become whole again")


def sample_while_one_is_hit(engine: SGLangEngine, signal_number: int) -> list[list[Completion]]:
    """Sample long completions, and send a signal to all of one server when the first is done."""
    victim = engine.servers[1]
    hit: list[int] = []

    def strike(*_counts: int) -> None:
        if not hit:
            hit.append(victim.supervisor_pid)
            if signal_number == signal.SIGSTOP:
                os.killpg(victim.supervisor_pid, signal_number)
            else:
                for child in psutil.Process(victim.supervisor_pid).children():
                    child.send_signal(signal_number)

    short = SampleRequest(
        request_id="short", context_token_ids=(5,) * 795, num_samples=1, seed=0
    )  # done at once, while the others have hundreds of tokens to go
    params = SamplingParams(
        temperature=1.0, max_completion_tokens=700, max_total_tokens=800, stop_token_ids=()
    )
    groups = engine.sample([short, *requests_of(9, 2)], params, strike)
    assert not victim.is_alive
    return groups[1:]


@BOTH_VERSIONS
def test_groups_are_spread_evenly_and_share_their_context(engine: SGLangEngine) -> None:
    load(engine, 1)
    engine.take_metrics()
    before = [computed_context_tokens(server.client.url) for server in engine.servers]
    started = time.monotonic()

    groups = engine.sample(requests_of(12, 8), params_of(10))

    assert [len(group) for group in groups] == [8] * 12
    assert {one.policy_version for group in groups for one in group} == {1}
    metrics = engine.take_metrics()
    counts = [metrics[f"engine/server_{index}/num_requests"] for index in range(NUM_SERVERS)]
    assert counts == [4, 4, 4]
    assert metrics["engine/server_tokens_max_over_mean"] < 1.1
    # Each context is computed once, and its last token again for each of its 8 samples; but a
    # health check, of which there is one in a second, may add a token, and equal beginnings of
    # contexts take some away.
    num_checks = 1 + time.monotonic() - started
    after = [computed_context_tokens(server.client.url) for server in engine.servers]
    context_tokens = [
        metrics[f"engine/server_{index}/tokens"] - 4 * 8 * 10 for index in range(NUM_SERVERS)
    ]
    assert [new - old for new, old in zip(after, before, strict=True)] == pytest.approx(
        context_tokens, abs=2 + num_checks
    )
    assert sum(context_tokens) == pytest.approx(12 * (CONTEXT_TOKENS + 8), abs=12)
    all_tokens = 12 * 8 * CONTEXT_TOKENS
    assert metrics["engine/cache_hit_fraction"] == 1 - sum(context_tokens) / all_tokens
    cached = sum(one.num_cached_tokens for group in groups for one in group)
    assert cached == all_tokens - sum(context_tokens)


@BOTH_VERSIONS
def test_nothing_is_lost_when_one_server_is_killed_in_the_middle(
    engine: SGLangEngine, caplog: pytest.LogCaptureFixture
) -> None:
    load(engine, 2)
    engine.take_metrics()

    groups = sample_while_one_is_hit(engine, signal.SIGKILL)

    assert [[len(one.token_ids) for one in group] for group in groups] == [[700, 700]] * 9
    assert {one.policy_version for group in groups for one in group} == {2}
    assert "was killed by SIGKILL: out of memory, or killed by hand" in caplog.text
    metrics = engine.take_metrics()
    assert metrics["engine/num_server_deaths"] == 1
    assert metrics["engine/num_reissued_requests"] >= 1
    wait_until_all_are_ready(engine, 2)


@BOTH_VERSIONS
def test_nothing_is_lost_when_one_server_hangs_in_the_middle(
    engine: SGLangEngine, caplog: pytest.LogCaptureFixture
) -> None:
    load(engine, 3)
    engine.take_metrics()
    started = time.monotonic()

    groups = sample_while_one_is_hit(engine, signal.SIGSTOP)

    assert time.monotonic() - started < 600  # the requests' own limit is an hour
    assert [[len(one.token_ids) for one in group] for group in groups] == [[700, 700]] * 9
    assert "2 health checks in a row failed" in caplog.text
    assert engine.take_metrics()["engine/num_server_deaths"] == 1
    wait_until_all_are_ready(engine, 3)


@pytest.mark.parametrize("transport", ["tensor", "distributed"])
def test_server_that_hangs_in_the_middle_of_a_sync_gets_the_weights_after_its_restart(
    engine: SGLangEngine,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    transport: str,
) -> None:
    if transport == "distributed":
        broadcast = Broadcast("gloo", timeout_seconds=SYNC_SECONDS)
        monkeypatch.setattr(engine._pool._syncer, "_transport", broadcast)
    engine.take_metrics()
    victim, *others = engine.servers
    is_hit = False

    def stop_one_half_way() -> Iterator[tuple[str, torch.Tensor]]:
        nonlocal is_hit
        num_bytes = 0
        for name, weight in weights(6):
            num_bytes += weight.nbytes
            if not is_hit and num_bytes > 3 * BUCKET_BYTES:  # two buckets are through
                is_hit = True
                os.killpg(victim.supervisor_pid, signal.SIGSTOP)
            yield name, weight

    started = time.monotonic()
    engine.load_weights(stop_one_half_way, 6)

    assert is_hit
    assert SYNC_SECONDS <= time.monotonic() - started < 10 * SYNC_SECONDS
    assert not victim.is_alive
    assert "server 0: updating -> dead" in caplog.text
    names = [server.client.weight_version() for server in others]
    assert [name.endswith(":6") for name in names] == [True] * len(others), names
    metrics = engine.take_metrics()
    assert (metrics["engine/num_server_deaths"], metrics["engine/num_ready_servers"]) == (1, 2)
    assert metrics["sync/num_failed_servers"] >= 1
    groups = engine.sample(requests_of(6, 1), params_of(2))
    assert {one.policy_version for group in groups for one in group} == {6}
    wait_until_all_are_ready(engine, 6)
    assert {server.client.weight_version() for server in engine.servers} == set(names)


@BOTH_VERSIONS
def test_completion_that_another_trainer_renamed_the_weights_of_is_refused(
    engine: SGLangEngine, caplog: pytest.LogCaptureFixture
) -> None:
    """Real servers stamp it with the name that their weights have at its end."""
    load(engine, 7)
    engine.take_metrics()
    victims = [
        SGLangClient(server.client.url, request_timeout_seconds=60) for server in engine.servers[1:]
    ]  # one of them at least has long ones, wherever the short one is

    def rename(*_counts: int) -> None:
        while victims:  # once, in the middle of what the others sample
            victims.pop().set_weight_version("theirs")

    short, *long = requests_of(7, 1)
    short = SampleRequest(request_id="short", context_token_ids=(5,) * 795, num_samples=1, seed=0)
    groups = engine.sample([short, *long], params_of(700, max_total_tokens=800), rename)

    assert {one.policy_version for group in groups for one in group} == {7}
    assert [len(group[0].token_ids) for group in groups] == [5, *[700] * 6]
    refusals = [text for text in caplog.messages if ": ready -> dead" in text]
    assert len(refusals) in (1, 2)
    for refusal in refusals:
        assert "does another trainer update this server?" in refusal
        assert "'theirs'" in refusal
    metrics = engine.take_metrics()
    assert metrics["engine/num_bad_answers"] >= 1
    assert metrics["engine/num_server_deaths"] == len(refusals)
    load(engine, 8)
    wait_until_all_are_ready(engine, 8)


def test_what_is_not_needed_any_more_comes_back_as_far_as_it_got(engine: SGLangEngine) -> None:
    load(engine, 4)
    short, *long = requests_of(7, 2)
    short = SampleRequest(request_id="short", context_token_ids=(5,) * 1190, num_samples=2, seed=0)

    groups = engine.sample([short, *long], params_of(1000), is_enough=lambda _index, _group: True)

    assert {one.finish_reason for one in groups[0]} == {"length"}
    rest = [one for group in groups[1:] for one in group]
    assert {one.finish_reason for one in rest} == {"abort"}
    assert all(len(one.token_ids) == len(one.logprobs) < 1000 for one in rest)
    assert any(one.token_ids for one in rest)
    assert {one.policy_version for one in rest} == {4}
    # The servers are free again, and can be updated: nothing is in flight.
    load(engine, 5)
    assert engine.sample(requests_of(1, 1), params_of(2))[0][0].policy_version == 5


@BOTH_VERSIONS
def test_closed_pool_leaves_no_process(engine: SGLangEngine) -> None:
    """The last test with the pool of all others."""
    groups = [server.supervisor_pid for server in engine.servers]
    before = pids_of_groups(groups)
    assert len(before) >= 3 * NUM_SERVERS  # supervisor, HTTP process, scheduler

    engine.close()

    assert wait_until_gone(before) == []


def test_killed_trainer_leaves_no_process(model_folder: Path, tmp_path: Path) -> None:
    done_file = tmp_path / "pids"
    trainer = subprocess.Popen(
        [
            *(sys.executable, "-m", "tests.support.pool_trainer"),
            *(str(model_folder), str(sglang_python()), str(done_file)),
        ]
    )
    try:
        deadline = time.monotonic() + START_SECONDS
        while not done_file.exists() and time.monotonic() < deadline:
            assert trainer.poll() is None
            time.sleep(0.1)
        groups = [int(pid) for pid in done_file.read_text().split()]
        before = pids_of_groups(groups)
        assert len(before) >= 6
    finally:
        trainer.kill()
        trainer.wait()

    assert wait_until_gone(before) == []
