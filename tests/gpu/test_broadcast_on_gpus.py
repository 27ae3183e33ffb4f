"""Servers lost between joining a broadcast over NCCL and its first bucket; never run so far.

The trainer is on GPU 0, the server on GPU 1. The server comes from ``.venv-sglang``, or from the
interpreter that PREFIXRL_SGLANG_PYTHON names.
"""

import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from prefixrl_mcore.config.rollout import SGLangConfig
from prefixrl_mcore.rollout.sglang.launch import ServerLaunch
from prefixrl_mcore.rollout.sglang.server import SGLangServer
from prefixrl_mcore.rollout.weight_names import read_weight_coverage
from prefixrl_mcore.rollout.weight_sync.buckets import Bucket, pack_buckets
from prefixrl_mcore.rollout.weight_sync.distributed import Broadcast
from prefixrl_mcore.rollout.weight_sync.transport import SyncTarget
from tests.support.tiny_models import build_tiny_qwen3, write_model_folder

SGLANG_PYTHON = Path(
    os.environ.get(
        "PREFIXRL_SGLANG_PYTHON", str(Path(__file__).parents[2] / ".venv-sglang/bin/python")
    )
)
LIMIT_SECONDS = 20.0

pytestmark = [
    pytest.mark.multi_gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices"),
    pytest.mark.skipif(not SGLANG_PYTHON.exists(), reason="SGLang's environment is missing"),
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_model_folder(build_tiny_qwen3(seed=0), tmp_path / "model")


@pytest.fixture
def server(folder: Path, tmp_path: Path) -> Iterator[SGLangServer]:
    launch = ServerLaunch(
        name="server 0",
        model_folder=folder,
        config=SGLangConfig(python=SGLANG_PYTHON, dtype="float32", memory_fraction=0.2),
        logits_dtype="float32",
        device="cuda",
        gpus=("1",),
        max_total_tokens=200,
        weight_version="of the folder",
    )
    server = SGLangServer.start(launch, tmp_path / "server.log", cancelled=threading.Event())
    yield server
    server.stop()


@pytest.fixture
def bucket(folder: Path) -> Bucket:
    model = build_tiny_qwen3(seed=1)
    on_gpu = ((name, w.detach().to("cuda:0")) for name, w in model.named_parameters())
    (bucket,) = pack_buckets(
        on_gpu, read_weight_coverage(folder), dtype=torch.float32, bucket_bytes=2**30
    )
    return bucket


def test_server_that_dies_after_joining_is_given_up(server: SGLangServer, bucket: Bucket) -> None:
    target = SyncTarget(client=server.client, num_ranks=1, name="server 0")
    transport = Broadcast("nccl", timeout_seconds=LIMIT_SECONDS)
    assert transport.open([target]) == {}
    server.stop()
    started = time.monotonic()

    assert list(transport.send(bucket, [target])) == ["server 0"]

    assert time.monotonic() - started < LIMIT_SECONDS + 20
    transport.close()


def test_server_that_never_receives_is_given_up_and_takes_part_in_the_next_group(
    server: SGLangServer, bucket: Bucket
) -> None:
    """The process outlives it too: NCCL's watchdog has not ended it by the end of the test."""
    target = SyncTarget(client=server.client, num_ranks=1, name="server 0")
    transport = Broadcast("nccl", timeout_seconds=LIMIT_SECONDS)
    assert transport.open([target]) == {}
    deaf: Any = SimpleNamespace(
        url=server.client.url,
        update_from_distributed=lambda _payload, _seconds: None,
        destroy_update_group=server.client.destroy_update_group,
    )
    started = time.monotonic()

    failures = transport.send(bucket, [SyncTarget(client=deaf, num_ranks=1, name="server 0")])

    assert "not received by all servers" in failures["server 0"]
    assert time.monotonic() - started < LIMIT_SECONDS + 20
    transport.close()
    assert transport.open([target]) == {}
    server.client.begin_update()
    assert transport.send(bucket, [target]) == {}
    assert transport.finish([target]) == {}
    transport.close()
