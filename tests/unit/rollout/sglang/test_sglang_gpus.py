"""Each server's ranks get handles of memory on the server's own GPUs."""

import logging
import queue
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from prefixrl_mcore.config.base import ConfigError
from prefixrl_mcore.config.rollout import RolloutConfig, SGLangConfig
from prefixrl_mcore.rollout.build import build_engine
from prefixrl_mcore.rollout.engine import EngineError
from prefixrl_mcore.rollout.sglang.gpus import gpu_numbers, gpus_of_servers, reported_gpus
from prefixrl_mcore.rollout.sglang.inspection import Inspector
from prefixrl_mcore.rollout.sglang.launch import (
    ServerLaunch,
    server_arguments,
    server_environment,
)
from prefixrl_mcore.rollout.sglang.member import CameUp, Member, State
from prefixrl_mcore.rollout.sglang.weights import Weights, send_weights
from prefixrl_mcore.rollout.weight_sync.transport import SyncTarget
from tests.support.fake_sglang import FakeSGLang, serve
from tests.support.tiny_models import write_tiny_qwen3

CONFIG = SGLangConfig(num_servers=2, tensor_parallel_size=2)


class _Syncer:
    """Keeps the targets that it was given."""

    def __init__(self) -> None:
        self.targets: list[SyncTarget] = []

    def sync(self, targets: Sequence[SyncTarget], *_: object) -> Any:
        self.targets += targets
        return SimpleNamespace(failed={})


def test_weights_go_to_the_gpus_that_each_server_was_started_on(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,GPU-b, 6,7,8")
    with caplog.at_level(logging.INFO):
        gpus = gpus_of_servers(CONFIG, "cuda", colocated=False, num_trainer_ranks=1)
    assert gpus == [("GPU-b", "6"), ("7", "8")]
    assert "GPUs of this machine: trainer 4; server 0 GPU-b,6; server 1 7,8" in caplog.text
    members = [
        Member(
            index,
            CONFIG,
            launch=ServerLaunch(
                name=f"server {index}",
                model_folder=tmp_path,
                config=CONFIG,
                logits_dtype="float32",
                device="cuda",
                gpus=entries,
                max_total_tokens=10,
                weight_version="first",
            ),
            is_here=True,
            logs_folder=tmp_path,
            check=lambda client: None,
        )
        for index, entries in enumerate(gpus)
    ]
    for member in members:
        member.state = State.STARTING
        monkeypatch.setattr(member, "_client", SimpleNamespace())
    syncer: Any = _Syncer()
    make_buckets: Any = iter
    weights = Weights(name="new", policy_version=0, make_buckets=make_buckets)

    send_weights(weights, members, syncer, num_ranks=2, bury=Member.die)

    assert [target.rank_gpus for target in syncer.targets] == [(1, 2), (3, 4)]
    assert all(target.is_here for target in syncer.targets)


def test_too_few_gpus_are_no_reason_to_take_another_engine(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    folder = write_tiny_qwen3(tmp_path / "model")

    with pytest.raises(ConfigError, match=r"1 trainer ranks \+ 1 servers x TP 1 = 2 GPUs"):
        build_engine(
            RolloutConfig(),
            folder,
            logits_dtype="float32",
            logs_folder=tmp_path,
            device="cuda",
            num_trainer_ranks=1,
        )


def test_server_that_shares_the_trainers_gpus_says_which_they_are(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6,7")
    info = {"device": "cuda", "base_gpu_id": 2, "gpu_id_step": 1, "tp_size": 2}

    assert reported_gpus(info, url="http://a") == (2, 3)
    assert reported_gpus({**info, "base_gpu_id": 0, "gpu_id_step": 2}, url="http://a") == (0, 2)
    assert reported_gpus({**info, "device": "cpu"}, url="http://a") is None
    with pytest.raises(EngineError, match=r"has GPUs 3, 4, this process has 4; start both with"):
        reported_gpus({**info, "base_gpu_id": 3}, url="http://a")


def test_server_that_comes_back_on_other_gpus_gets_handles_there(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2,3")
    fake = FakeSGLang()
    inspector = Inspector(
        write_tiny_qwen3(tmp_path / "model"), SGLangConfig(), logits_dtype="float32", colocated=True
    )
    with serve(fake):
        member = Member(
            0,
            SGLangConfig(urls=(fake.url,), start_timeout_seconds=60.0),
            launch=None,
            is_here=True,
            logs_folder=tmp_path,
            check=inspector.inspect,
        )
        seen = []
        for first in (1, 3):
            fake.precision |= {
                "device": "cuda",
                "base_gpu_id": first,
                "tp_size": 1,
                "enable_memory_saver": True,
            }
            came: queue.SimpleQueue[CameUp] = queue.SimpleQueue()
            member.revive(came.put)
            assert came.get(timeout=10).outcome == "first"
            seen.append(member.gpus)
            member.die("by the test")
        member.close()

    assert seen == [(1,), (3,)]


def test_server_that_sees_other_gpus_too_is_told_its_first(tmp_path: Path) -> None:
    launch = ServerLaunch(
        name="server 1",
        model_folder=tmp_path,
        config=CONFIG,
        logits_dtype="float32",
        device="cuda",
        gpus=("4", "5", "6", "7"),
        first_gpu=2,
        max_total_tokens=10,
        weight_version="first",
    )

    arguments = server_arguments(launch, 30000, has_key=False)

    assert arguments[arguments.index("--base-gpu-id") + 1] == "2"
    assert server_environment(launch)["CUDA_VISIBLE_DEVICES"] == "4,5,6,7"
    own = server_arguments(replace(launch, first_gpu=0), 30000, has_key=False)
    assert "--base-gpu-id" not in own


def test_server_without_gpus_has_no_numbers() -> None:
    assert gpu_numbers(()) is None


@pytest.mark.parametrize("releases_memory", [True, False])
def test_server_that_shares_gpus_is_started_so_that_its_memory_can_be_released(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, releases_memory: bool
) -> None:
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    launch = ServerLaunch(
        name="server 0",
        model_folder=tmp_path,
        config=CONFIG,
        logits_dtype="float32",
        device="cuda",
        gpus=("0", "1"),
        max_total_tokens=10,
        weight_version="first",
        releases_memory=releases_memory,
    )

    arguments = server_arguments(launch, 30000, has_key=False)

    assert ("--enable-memory-saver" in arguments) == releases_memory
    assert ("PYTORCH_CUDA_ALLOC_CONF" in server_environment(launch)) != releases_memory
