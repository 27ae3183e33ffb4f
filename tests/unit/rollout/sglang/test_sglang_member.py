"""The life of one server: what its death waits for."""

import threading
import time
from pathlib import Path
from typing import Any

import pytest

from prefixrl_mcore.config.rollout import SGLangConfig
from prefixrl_mcore.rollout.engine import EngineError
from prefixrl_mcore.rollout.sglang.launch import ServerLaunch
from prefixrl_mcore.rollout.sglang.member import Member, State
from prefixrl_mcore.rollout.sglang.server import SGLangServer


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
    config = SGLangConfig()
    launch = ServerLaunch(
        name="server 0",
        model_folder=tmp_path,
        config=config,
        logits_dtype="float32",
        device="cpu",
        gpus=(),
        max_total_tokens=100,
        weight_version="first",
    )
    member = Member(0, config, launch=launch, logs_folder=tmp_path, check=lambda _client: None)
    member.revive(lambda _up: None)

    member.die("not wanted any more")

    assert ended.is_set()
    assert member.state is State.DEAD
