"""Each server's ranks get handles of memory on the server's own GPUs."""

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from prefixrl_mcore.config.rollout import SGLangConfig
from prefixrl_mcore.rollout.sglang.gpus import gpu_numbers, gpus_of_servers
from prefixrl_mcore.rollout.sglang.launch import (
    ServerLaunch,
    server_arguments,
    server_environment,
)
from prefixrl_mcore.rollout.sglang.member import Member, State
from prefixrl_mcore.rollout.sglang.weights import Weights, send_weights
from prefixrl_mcore.rollout.weight_sync.transport import SyncTarget

CONFIG = SGLangConfig(num_servers=2, tensor_parallel_size=2)


class _Syncer:
    """Keeps the targets that it was given."""

    def __init__(self) -> None:
        self.targets: list[SyncTarget] = []

    def sync(self, targets: Sequence[SyncTarget], *_: object) -> Any:
        self.targets += targets
        return SimpleNamespace(failed={})


def test_weights_go_to_the_gpus_that_each_server_was_started_on(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,GPU-b, 6,7,8")
    gpus = gpus_of_servers(CONFIG, "cuda")
    assert gpus == [("4", "GPU-b"), ("6", "7")]
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

    assert [target.rank_gpus for target in syncer.targets] == [(0, 1), (2, 3)]


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
