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
    return Member(0, config, launch=launch, logs_folder=folder, check=lambda _member: None)


def outcome_of(member: Member) -> str | BaseException:
    """Start the server, and return what comes of it."""
    came: queue.SimpleQueue[CameUp] = queue.SimpleQueue()
    member.revive(came.put)
    return came.get(timeout=20).outcome


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


@pytest.mark.parametrize("compiles_in_time", [True, False])
def test_server_that_was_started_is_up_once_it_has_sampled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compiles_in_time: bool
) -> None:
    fake = FakeSGLang()
    fake.hold = threading.Event()

    def start(_launch: ServerLaunch, _log: Path, *, cancelled: threading.Event) -> Any:
        client = SGLangClient(fake.url, request_timeout_seconds=60)
        return SimpleNamespace(
            client=client, is_alive=True, stop=lambda: None, log_tail=lambda: "end of its log"
        )

    monkeypatch.setattr(SGLangServer, "start", start)
    with serve(fake):
        seconds = 10.0 if compiles_in_time else 0.5
        member = member_in(tmp_path, start_timeout_seconds=seconds)
        if compiles_in_time:
            threading.Timer(0.5, fake.hold.set).start()
        outcome = outcome_of(member)
        fake.hold.set()

    assert fake.calls[0] == "/generate"
    if compiles_in_time:
        assert outcome == "first"
    else:
        assert isinstance(outcome, EngineError)
        assert "did not sample its first tokens within 0.5 s; raise rollout" in str(outcome)
        assert "end of its log" in str(outcome)


def test_end_of_a_start_by_anything_at_all_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def start(*_: object, **__: object) -> Any:
        raise SystemExit("as a library may do it")

    monkeypatch.setattr(SGLangServer, "start", start)

    assert isinstance(outcome_of(member_in(tmp_path)), SystemExit)
