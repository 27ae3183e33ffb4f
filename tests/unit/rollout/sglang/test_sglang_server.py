"""What a server's process is given, and what is read of its log; no server is started."""

import dataclasses
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from prefixrl_mcore.config.rollout import SGLangConfig
from prefixrl_mcore.rollout.engine import EngineError
from prefixrl_mcore.rollout.sglang.client import SGLangClient
from prefixrl_mcore.rollout.sglang.launch import ServerLaunch, server_environment
from prefixrl_mcore.rollout.sglang.server import SGLangServer
from tests.support.tiny_models import write_tiny_qwen3


def launch_on_gpus(*gpus: str) -> ServerLaunch:
    return ServerLaunch(
        name="server 0",
        model_folder=Path("model"),
        config=SGLangConfig(),
        logits_dtype="float32",
        device="cuda",
        gpus=gpus,
        max_total_tokens=100,
        weight_version="first",
    )


@pytest.mark.parametrize(
    "name",
    [
        *("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"),
        *("GROUP_RANK", "GROUP_WORLD_SIZE", "ROLE_RANK", "ROLE_NAME", "ROLE_WORLD_SIZE"),
        *("TORCHELASTIC_USE_AGENT_STORE", "TORCHELASTIC_RUN_ID", "TORCHELASTIC_ERROR_FILE"),
        *("TORCH_NCCL_ASYNC_ERROR_HANDLING", "CUDA_DEVICE_MAX_CONNECTIONS"),
        *("SGLANG_RETURN_ORIGINAL_LOGPROB", "PREFIXRL_SGLANG_API_KEY", "PYTHONPATH"),
    ],
)
def test_server_does_not_inherit_what_is_the_trainers(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, "1")

    assert name not in server_environment(launch_on_gpus("0"))


def test_server_inherits_the_rest_and_gets_its_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NCCL_DEBUG", "INFO")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2,3")

    environment = server_environment(launch_on_gpus("2", "3"))

    assert environment["NCCL_DEBUG"] == "INFO"
    assert environment["CUDA_VISIBLE_DEVICES"] == "2,3"


@pytest.mark.parametrize(("cores", "bound"), [({3, 5, 7}, "3|5"), ({6}, "6|6")])
def test_ranks_of_a_server_on_a_cpu_get_a_core_each_and_no_nccl(
    monkeypatch: pytest.MonkeyPatch, cores: set[int], bound: str
) -> None:
    monkeypatch.delenv("SGLANG_CPU_OMP_THREADS_BIND", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _process: cores)
    config = SGLangConfig(tensor_parallel_size=2)
    launch = dataclasses.replace(launch_on_gpus(), device="cpu", config=config)

    environment = server_environment(launch)

    assert environment["SGLANG_CPU_OMP_THREADS_BIND"] == bound
    assert not Path(environment["SGLANG_NCCL_SO_PATH"]).exists()
    monkeypatch.setenv("SGLANG_CPU_OMP_THREADS_BIND", "0|9")
    assert server_environment(launch)["SGLANG_CPU_OMP_THREADS_BIND"] == "0|9"


@pytest.mark.parametrize(("device", "num_ranks"), [("cpu", 1), ("cuda", 2)])
def test_nobody_else_gets_a_core_and_a_missing_library(
    monkeypatch: pytest.MonkeyPatch, device: str, num_ranks: int
) -> None:
    names = {"SGLANG_CPU_OMP_THREADS_BIND", "SGLANG_NCCL_SO_PATH"}
    for name in names:
        monkeypatch.delenv(name, raising=False)
    config = SGLangConfig(tensor_parallel_size=num_ranks)

    launch = dataclasses.replace(launch_on_gpus(), device=device, config=config)

    assert not names & set(server_environment(launch))


@contextmanager
def server_that_ended(log_file: Path) -> Iterator[SGLangServer]:
    process = subprocess.Popen([sys.executable, "-c", ""], start_new_session=True)
    client = SGLangClient("http://127.0.0.1:9", request_timeout_seconds=1)
    one = SGLangServer("server 0", process, client, log_file)
    try:
        process.wait()
        yield one
    finally:
        one.stop()


def test_only_the_end_of_a_log_is_read(tmp_path: Path) -> None:
    log_file = tmp_path / "sglang.log"
    log_file.write_text("first\n" + "x" * 200_000 + "\nlast: \u00e9\n", encoding="utf-8")

    with server_that_ended(log_file) as one:
        text = one._log_text()

    assert len(text.encode()) == 64 * 1024
    assert text.endswith("\nlast: \u00e9\n")


def test_death_is_told_although_the_log_cannot_be_read(tmp_path: Path) -> None:
    with server_that_ended(tmp_path / "gone.log") as one:
        assert one.cause_of_death() == "its supervisor ended with exit code 0"
        assert "cannot be read: [Errno 2] No such file" in one.log_tail()


def test_start_on_a_port_that_was_taken_is_in_the_log_and_not_the_cause_of_the_next_death(
    tmp_path: Path,
) -> None:
    python, log_file = tmp_path / "python", tmp_path / "server.log"
    python.write_text(
        f"#!/bin/sh\nif mkdir {tmp_path}/was_here 2>/dev/null\n"
        "then echo '[Errno 98] address already in use'\nelse echo no memory left\nfi\nexit 1\n"
    )
    python.chmod(0o755)
    config = SGLangConfig(python=python, start_timeout_seconds=60)
    launch = dataclasses.replace(
        launch_on_gpus(), device="cpu", config=config, model_folder=tmp_path
    )
    write_tiny_qwen3(tmp_path)

    with pytest.raises(EngineError, match=r"(?s)^SGLang: server 0 died while it .*no memory left"):
        SGLangServer.start(launch, log_file, cancelled=threading.Event())

    words = [line for line in log_file.read_text().splitlines() if "--port" not in line]
    assert words == ["[Errno 98] address already in use", "no memory left"]


def test_idle_connections_are_as_many_as_requests_may_be_under_way() -> None:
    client = SGLangClient("http://a", request_timeout_seconds=1, max_connections=700)

    assert client._connection._pool.connection_pool_kw["maxsize"] == 700


def test_no_call_of_an_update_waits_ten_minutes_for_a_server_that_hangs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    client, limits = SGLangClient("http://a", request_timeout_seconds=1), dict[str, float]()
    has_sessions: Any = SimpleNamespace(has_update_sessions=True)
    monkeypatch.setattr(client, "_protocol", has_sessions)

    def note(path: str, payload: object, timeout_seconds: float) -> None:
        limits[path.partition("?")[0]] = timeout_seconds

    monkeypatch.setattr(client._connection, "control", note)
    client.pause()
    client.begin_update()
    client.end_update()
    client.resume()
    client.flush_cache()
    client.set_weight_version("new")

    assert limits.pop("/end_weight_update") == 300.0
    assert len(limits) == 5
    assert set(limits.values()) == {60.0}
