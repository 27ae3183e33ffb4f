"""The life of one server: what its death waits for."""

import queue
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from prefixrl_mcore.config.rollout import SGLangConfig
from prefixrl_mcore.rollout.engine import EngineError
from prefixrl_mcore.rollout.sglang.client import SGLangClient
from prefixrl_mcore.rollout.sglang.launch import ServerLaunch
from prefixrl_mcore.rollout.sglang.member import CameUp, Member, State
from prefixrl_mcore.rollout.sglang.server import SGLangServer
from tests.support.fake_sglang import FakeSGLang, serve
from tests.support.tiny_models import write_tiny_qwen3
from tests.support.waiting import wait_until


def _is_fine(_member: Member) -> None:
    """Check nothing."""


def member_in(folder: Path, **settings: Any) -> Member:
    config = SGLangConfig(**settings)
    launch = ServerLaunch(
        name="server 0",
        model_folder=folder,
        config=config,
        logits_dtype="float32",
        device="cpu",
        gpus=(),
        max_total_tokens=100,
        weight_version="first",
    )
    return Member(0, config, launch=launch, is_here=True, logs_folder=folder, check=_is_fine)


def member_at(fake: FakeSGLang, folder: Path, **settings: Any) -> Member:
    config = SGLangConfig(urls=(fake.url,), **settings)
    return Member(0, config, launch=None, is_here=True, logs_folder=folder, check=_is_fine)


def outcome_of(member: Member) -> str | BaseException:
    """Start the server, and return what comes of it."""
    came: queue.SimpleQueue[CameUp] = queue.SimpleQueue()
    member.revive(came.put)
    return came.get(timeout=90).outcome


def test_death_during_a_start_waits_for_the_process_of_that_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ended = threading.Event()

    def start(_launch: ServerLaunch, _log: Path, *, cancelled: threading.Event) -> Any:
        cancelled.wait(10)
        time.sleep(0.5)  # until its processes have ended, and its memory is free
        ended.set()
        raise EngineError("no longer wanted")

    monkeypatch.setattr(SGLangServer, "start", start)
    member = member_in(tmp_path)
    member.revive(lambda _up: None)

    member.die("not wanted any more")

    assert ended.is_set()
    assert member.state is State.DEAD


def start_of(fake: FakeSGLang) -> Any:
    """Stand for SGLangServer.start: the fake is the server."""

    def start(_launch: ServerLaunch, _log: Path, *, cancelled: threading.Event) -> Any:
        client = SGLangClient(fake.url, request_timeout_seconds=60)
        return SimpleNamespace(
            client=client, is_alive=True, stop=lambda: None, log_tail=lambda: "end of its log"
        )

    return start


@pytest.mark.parametrize("is_own", [True, False])
@pytest.mark.parametrize("compiles_in_time", [True, False])
def test_server_is_up_once_it_has_sampled_whoever_started_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, compiles_in_time: bool, is_own: bool
) -> None:
    fake = FakeSGLang()
    fake.hold_warm_up = threading.Event()
    monkeypatch.setattr(SGLangServer, "start", start_of(fake))
    with serve(fake):
        settings: dict[str, Any] = {"start_timeout_seconds": 60.0 if compiles_in_time else 0.5}
        member = (
            member_in(tmp_path, **settings) if is_own else member_at(fake, tmp_path, **settings)
        )
        if compiles_in_time:
            threading.Timer(0.5, fake.hold_warm_up.set).start()
        outcome = outcome_of(member)
        wait_until(lambda: "warm-up" in fake.calls)  # it may be read after it was given up
        fake.hold_warm_up.set()

    if compiles_in_time:
        assert outcome == "first"
    else:
        assert isinstance(outcome, EngineError)
        assert "did not sample its first tokens within 0.5 s; raise rollout" in str(outcome)
        assert ("end of its log" in str(outcome)) == is_own


def test_server_that_was_left_paused_samples_its_first_tokens(tmp_path: Path) -> None:
    fake = FakeSGLang()
    fake.is_paused = True
    with serve(fake):
        assert outcome_of(member_at(fake, tmp_path, start_timeout_seconds=60.0)) == "first"


def test_server_that_was_left_in_the_middle_of_an_update_is_not_asked_to_sample(
    tmp_path: Path,
) -> None:
    fake = FakeSGLang()
    fake.weight_version = "ab12:3:incomplete"
    with serve(fake):
        assert outcome_of(member_at(fake, tmp_path)) == "ab12:3:incomplete"

    assert "warm-up" not in fake.calls


def test_first_tokens_of_a_server_that_is_no_longer_wanted_are_not_waited_for(
    tmp_path: Path,
) -> None:
    fake = FakeSGLang()
    fake.hold_warm_up = threading.Event()
    came: queue.SimpleQueue[CameUp] = queue.SimpleQueue()
    with serve(fake):
        member = member_at(fake, tmp_path)
        member.revive(came.put)
        wait_until(lambda: "warm-up" in fake.calls)
        started = time.monotonic()
        member.close()
        seconds = time.monotonic() - started
        fake.hold_warm_up.set()

    assert seconds < 20  # and not the minutes that a start may take
    assert "no longer wanted" in str(came.get(timeout=1).outcome)


def test_end_of_a_start_by_anything_at_all_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def start(*_: object, **__: object) -> Any:
        raise SystemExit("as a library may do it")

    monkeypatch.setattr(SGLangServer, "start", start)

    assert isinstance(outcome_of(member_in(tmp_path)), SystemExit)


def test_log_of_a_server_that_an_earlier_trainer_started_is_kept(tmp_path: Path) -> None:
    write_tiny_qwen3(tmp_path)
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho no memory left\nexit 1\n")
    python.chmod(0o755)

    for number in (1, 2, 3):
        member = member_in(tmp_path, python=python)
        for _ in range(1 + (number == 2)):  # one of them starts it twice
            assert "no memory left" in str(outcome_of(member))
            member.die("it did not start")
        member.close()

    assert sorted(file.name for file in tmp_path.glob("*.log")) == [
        f"sglang-0-{number}.log" for number in (1, 2, 3, 4)
    ]
