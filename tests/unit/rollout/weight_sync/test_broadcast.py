"""What only NCCL does, as stand-ins for its group show it, and which address servers are told."""

import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

from prefixrl_mcore.rollout.sglang.client import SGLangClient
from prefixrl_mcore.rollout.weight_sync import distributed
from prefixrl_mcore.rollout.weight_sync.buckets import Bucket, BucketEntry
from prefixrl_mcore.rollout.weight_sync.distributed import Broadcast
from prefixrl_mcore.rollout.weight_sync.transport import SyncTarget
from tests.support.fake_sglang import FakeSGLang, serve

ENTRY = BucketEntry(name="w", shape=(4,), start_bytes=0, end_bytes=16)
BUCKET = Bucket(data=torch.zeros(16, dtype=torch.uint8), dtype=torch.float32, entries=(ENTRY,))


class Hanging:
    """A group whose broadcast does not return before the group is aborted."""

    def __init__(self) -> None:
        self.aborted = threading.Event()

    def broadcast(self, tensors: object, options: object) -> None:
        self.aborted.wait(20)
        raise RuntimeError("aborted")


@pytest.fixture
def fake() -> FakeSGLang:
    return FakeSGLang()


@pytest.fixture
def target(fake: FakeSGLang) -> Iterator[SyncTarget]:
    with serve(fake) as url:
        client = SGLangClient(url, request_timeout_seconds=5)
        yield SyncTarget(client=client, num_ranks=1, name="server 0")


def joined(group: object) -> Broadcast:
    transport: Any = Broadcast("nccl", timeout_seconds=0.3)
    transport._group, transport._group_name = group, "prefixrl-old"
    return transport


def test_communicator_that_is_never_made_is_aborted_after_the_limit(
    fake: FakeSGLang, target: SyncTarget, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(distributed_c10d, "_abort_process_group", lambda group: group.aborted.set())
    group = Hanging()
    transport = joined(group)
    started = time.monotonic()

    failures = transport.send(BUCKET, [target])

    assert time.monotonic() - started < 5
    assert "not received by all servers in 0 s" in failures["server 0"]
    assert group.aborted.is_set()
    assert transport.innocent == {"server 0"}


def test_abort_that_hangs_does_not_hang_the_run(
    target: SyncTarget, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(distributed, "_LEAVE_SECONDS", 0.2)
    release = threading.Event()
    monkeypatch.setattr(distributed_c10d, "_abort_process_group", lambda group: release.wait(20))

    assert list(joined(Hanging()).send(BUCKET, [target])) == ["server 0"]
    assert "still being aborted" in caplog.text
    release.set()


def test_innocent_servers_drop_the_broken_group(
    fake: FakeSGLang, target: SyncTarget, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(distributed_c10d, "_abort_process_group", lambda group: group.aborted.set())
    dropped: list[str] = []
    answer = fake.answer

    def note(path: str, payload: dict[str, Any]) -> tuple[int, Any]:
        if path == "/destroy_weights_update_group":
            dropped.append(payload["group_name"])
        return answer(path, payload)

    fake.answer = note  # type: ignore[method-assign]
    joined(Hanging()).send(BUCKET, [target])

    assert dropped == ["prefixrl-old"]


def test_watchdog_of_nccl_waits_longer_than_this_side_and_an_abort_finds_the_communicator() -> None:
    timeout = distributed._group_timeout("nccl", 300.0)

    assert timeout.total_seconds() == 300.0 + 2 * 30.0
    assert distributed._group_timeout("gloo", 300.0).total_seconds() == 300.0
    assert distributed._options("gloo", timeout) is None
    if dist.is_nccl_available():
        options: Any = distributed._options("nccl", timeout)
        assert (options.config.blocking, options._timeout) == (0, timeout)


def test_servers_of_the_other_kind_of_address_are_told_one_of_that_kind(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    client = SGLangClient("http://[2001:db8::7]:30000", request_timeout_seconds=5)
    asked: list[tuple[int, Any]] = []

    class Probe:
        def __init__(self, family: int, kind: int) -> None:
            self.family = family

        def __enter__(self) -> "Probe":
            return self

        def __exit__(self, *fault: object) -> None:
            pass

        def connect(self, address: Any) -> None:
            asked.append((self.family, address[0]))

        def getsockname(self) -> tuple[str, int]:
            return "2001:db8::1", 0

    monkeypatch.setattr(socket, "socket", Probe)
    target = SyncTarget(client=client, num_ranks=1, name="server 0")

    assert distributed._own_address([target]) == "2001:db8::1"
    assert asked == [(socket.AF_INET6, "2001:db8::7")]
