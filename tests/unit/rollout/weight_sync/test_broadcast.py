"""What only NCCL does, as stand-ins for its group show it; whose addresses are whose."""

import datetime
import socket
import threading
import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

from prefixrl_mcore.rollout.engine import EngineError
from prefixrl_mcore.rollout.sglang.client import SGLangClient
from prefixrl_mcore.rollout.weight_sync import distributed
from prefixrl_mcore.rollout.weight_sync.addresses import address_for, is_here
from prefixrl_mcore.rollout.weight_sync.buckets import Bucket, BucketEntry
from prefixrl_mcore.rollout.weight_sync.distributed import Broadcast
from prefixrl_mcore.rollout.weight_sync.releases import own_nccl
from prefixrl_mcore.rollout.weight_sync.transport import SyncTarget
from tests.support.fake_sglang import FakeSGLang, serve

ENTRY = BucketEntry(name="w", shape=(4,), start_bytes=0, end_bytes=16)
BUCKET = Bucket(data=torch.zeros(16, dtype=torch.uint8), dtype=torch.float32, entries=(ENTRY,))


class Hanging:
    """A group whose broadcast does not return before the group is aborted."""

    def __init__(self) -> None:
        self.aborted = threading.Event()

    def broadcast(self, tensors: object, options: object) -> None:
        self.aborted.wait(60)
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

    assert time.monotonic() - started < 30
    assert "not received by all servers in 0 s" in failures["server 0"]
    assert group.aborted.is_set()
    assert transport.innocent == {"server 0"}


def test_abort_that_hangs_does_not_hang_the_run(
    target: SyncTarget, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(distributed, "_LEAVE_SECONDS", 0.2)
    release = threading.Event()
    monkeypatch.setattr(distributed_c10d, "_abort_process_group", lambda group: release.wait(60))

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


def test_bucket_after_one_that_a_server_refused_is_not_waited_for(
    fake: FakeSGLang, target: SyncTarget, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(distributed_c10d, "_abort_process_group", lambda group: group.aborted.set())
    group = Hanging()
    transport: Any = joined(group)
    transport._joined = frozenset({"server 0", "server 1"})

    failures = transport.send(BUCKET, [target])

    assert failures == {"server 0": "the broadcast to all servers broke: lost before: server 1"}
    assert group.aborted.is_set()
    assert transport.innocent == {"server 0"}
    assert fake.calls == ["/destroy_weights_update_group"]


def test_server_that_refused_the_last_bucket_is_not_waited_for_to_leave(
    fake: FakeSGLang,
    target: SyncTarget,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(distributed_c10d, "_abort_process_group", lambda group: group.aborted.set())
    monkeypatch.setattr(distributed, "_LEAVE_SECONDS", 0.2)
    group, release = Hanging(), threading.Event()
    transport: Any = joined(group)
    transport._joined, transport._timeout_seconds = frozenset({"server 0", "server 1"}), 20.0
    answer = fake.answer

    def wait_for_the_other(path: str, payload: dict[str, Any]) -> tuple[int, Any]:
        release.wait(60)
        return answer(path, payload)

    fake.answer = wait_for_the_other  # type: ignore[method-assign]
    started = time.monotonic()
    failures = transport.finish([target])
    seconds = time.monotonic() - started
    release.set()

    assert failures == {}  # it has all buckets
    assert seconds < 30
    assert group.aborted.is_set()
    assert transport.innocent == frozenset()
    assert "server 0 did not leave a broken group" in caplog.text


def test_watchdog_of_nccl_waits_longer_than_this_side_and_an_abort_finds_the_communicator() -> None:
    timeout = distributed._group_timeout("nccl", 300.0)

    assert timeout.total_seconds() == 300.0 + 2 * 30.0
    assert distributed._group_timeout("gloo", 300.0).total_seconds() == 300.0
    assert distributed._options("gloo", timeout) is None
    if dist.is_nccl_available():
        options: Any = distributed._options("nccl", timeout)
        assert (options.config.blocking, options._timeout) == (0, timeout)


class Failed:
    """A broadcast that is over because NCCL failed, as it shows that."""

    def is_completed(self) -> bool:
        return True

    def wait(self, timeout: datetime.timedelta | None = None) -> bool:
        if timeout is not None:
            raise RuntimeError("ncclRemoteError")
        return True


def test_broadcast_that_failed_is_not_one_that_is_done(
    target: SyncTarget, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(distributed_c10d, "_abort_process_group", lambda group: None)
    group: Any = SimpleNamespace(broadcast=lambda tensors, options: Failed())
    transport = joined(group)

    failures = transport.send(BUCKET, [target])

    assert "RuntimeError: ncclRemoteError" in failures["server 0"]
    assert f"one version on both sides; the trainer has {own_nccl()}" in failures["server 0"]
    assert transport.innocent == {"server 0"}


def test_trainer_leaves_the_group_without_waiting_for_the_servers_to_have_left(
    fake: FakeSGLang, target: SyncTarget, monkeypatch: pytest.MonkeyPatch
) -> None:
    """NCCL's ranks on one machine leave together: a server's answer may wait for this side."""
    left = threading.Event()
    monkeypatch.setattr(distributed_c10d, "_abort_process_group", lambda group: left.set())
    answer = fake.answer
    waited: list[bool] = []

    def leave_together(path: str, payload: dict[str, Any]) -> tuple[int, Any]:
        if path == "/destroy_weights_update_group":
            waited.append(left.wait(20))
        return answer(path, payload)

    fake.answer = leave_together  # type: ignore[method-assign]
    group: Any = object()
    transport: Any = joined(group)
    transport._timeout_seconds = 20.0

    assert transport.finish([target]) == {}
    assert waited == [True]


def test_every_server_is_told_an_address_that_it_can_reach(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
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

    assert address_for("http://[2001:db8::7]:30000") == "2001:db8::1"
    assert address_for("http://127.0.0.1:30000") == "127.0.0.1"
    assert asked == [(socket.AF_INET6, "2001:db8::7")]


def test_name_of_a_server_is_resolved_once_for_all_updates(
    target: SyncTarget, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who resolves names may be away for a moment: no reason to end a run."""
    answers = iter(["127.0.0.1"])

    def resolve(url: str) -> str:
        try:
            return next(answers)
        except StopIteration:
            raise socket.gaierror("Temporary failure in name resolution") from None

    monkeypatch.setattr(distributed, "address_for", resolve)
    monkeypatch.setattr(Broadcast, "_join", lambda *_: "the fake does not join")
    transport = Broadcast("gloo", timeout_seconds=30.0)

    for _ in range(2):
        (failure,) = transport.open([target]).values()
        assert failure.endswith("the fake does not join")


def test_server_is_here_if_this_machine_has_its_address() -> None:
    assert is_here("http://localhost:1")
    assert is_here("http://127.0.0.2:1")  # all of 127 is
    assert is_here(f"http://{socket.gethostname()}:1")
    assert not is_here("http://192.0.2.1:1")  # for documentation
    with pytest.raises(EngineError, match=r"host 'nobody-knows\.invalid' .* no address.*urls, or"):
        is_here("http://nobody-knows.invalid:1")
