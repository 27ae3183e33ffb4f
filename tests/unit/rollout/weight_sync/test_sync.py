import logging
import threading
import time
from collections.abc import Generator, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch

from prefixrl_mcore.rollout.engine import EngineError
from prefixrl_mcore.rollout.sglang.client import SGLangClient
from prefixrl_mcore.rollout.sglang.payloads import tensor_update
from prefixrl_mcore.rollout.weight_names import WeightCoverage
from prefixrl_mcore.rollout.weight_sync import sync, tensor
from prefixrl_mcore.rollout.weight_sync.buckets import Bucket, pack_buckets
from prefixrl_mcore.rollout.weight_sync.checksums import Compared
from prefixrl_mcore.rollout.weight_sync.disk import Disk
from prefixrl_mcore.rollout.weight_sync.sync import is_incomplete, sync_weights
from prefixrl_mcore.rollout.weight_sync.syncer import METRIC_NAMES, Syncer
from prefixrl_mcore.rollout.weight_sync.tensor import TensorByValue
from prefixrl_mcore.rollout.weight_sync.transport import Failures, SyncTarget
from tests.support.fake_sglang import FakeSGLang, serve

SHAPES = {f"w{index}": (4,) for index in range(4)}
UPDATE = "/update_weights_from_tensor"


class Refusing(FakeSGLang):
    """Refuses what it is told to, with a status and a message."""

    def __init__(self, *, has_sessions: bool = False) -> None:
        super().__init__(has_sessions=has_sessions)
        self.refusals: dict[str, tuple[int, str]] = {}
        self.payloads: dict[str, dict[str, Any]] = {}

    def answer(self, path: str, payload: dict[str, Any]) -> tuple[int, Any]:
        self.payloads[path] = payload
        if path in self.refusals:
            self.calls.append(path)
            status, message = self.refusals[path]
            return status, {"success": False, "message": message}
        return super().answer(path, payload)


@pytest.fixture
def fakes() -> list[Refusing]:
    return [Refusing(has_sessions=True), Refusing()]


@pytest.fixture
def targets(fakes: list[Refusing]) -> Iterator[list[SyncTarget]]:
    with ExitStack() as stack:
        yield [
            SyncTarget(
                client=SGLangClient(stack.enter_context(serve(fake)), request_timeout_seconds=5),
                num_ranks=1,
                name=f"server {index}",
            )
            for index, fake in enumerate(fakes)
        ]


def buckets(drawn: list[str] | None = None, last: int = 4) -> Generator[Bucket]:
    """Begin a stream of four weights, a bucket each; note which were asked for."""

    def weights() -> Iterator[tuple[str, torch.Tensor]]:
        for name in list(SHAPES)[:last]:
            if drawn is not None:
                drawn.append(name)
            yield name, torch.ones(4)

    coverage = WeightCoverage(shapes=SHAPES)
    return pack_buckets(weights(), coverage, dtype=torch.float32, bucket_bytes=16)


def test_calls_come_in_an_order_in_which_nobody_samples_from_half_an_update(
    fakes: list[Refusing], targets: list[SyncTarget]
) -> None:
    report = sync_weights(targets, TensorByValue(), buckets, "run:3")

    calls = [[one for one in fake.calls if one != "/server_info"] for fake in fakes]
    before = ["/pause_generation", "/abort_request", "/update_weight_version"]
    after = ["/continue_generation", "/flush_cache"]
    last = ["/update_weight_version", "/model_info"]
    begin, end = ["/begin_weight_update"], ["/end_weight_update"]
    assert calls[0] == [*before, *begin, *[UPDATE] * 4, *end, *after, *last]
    assert calls[1][:3] == before
    assert calls[1][-8:] == [*[UPDATE] * 4, *after, *last]
    for fake in fakes:
        assert fake.loaded == {name: [4] for name in SHAPES}
        assert fake.payloads[UPDATE]["flush_cache"] is False
        assert fake.payloads["/update_weight_version"]["abort_all_requests"] is False
        assert fake.weight_version == "run:3"
    assert (report.num_bytes, report.num_buckets, report.failed) == (64, 4, {})
    assert report.seconds > report.sending_seconds > 0
    assert report.gigabytes_per_second == pytest.approx(64e-9 / report.seconds)


def test_server_that_is_paused_with_a_finished_batch_is_flushed_before_it_gets_its_name(
    fakes: list[Refusing], targets: list[SyncTarget]
) -> None:
    """SGLang refuses every flush then until it is resumed."""
    fakes[0].holds_finished_batch = True

    report = sync_weights(targets, TensorByValue(), buckets, "run:3")

    assert report.failed == {}
    assert fakes[0].is_cache_fresh
    assert not fakes[0].is_paused
    named = len(fakes[0].calls) - 1 - fakes[0].calls[::-1].index("/update_weight_version")
    assert fakes[0].calls.index("/flush_cache") < named


@pytest.mark.parametrize(
    ("path", "status", "message"),
    [
        (UPDATE, 400, "no such parameter"),
        (UPDATE, 0, ""),
        ("/pause_generation", 500, "scheduler is gone"),
        ("/flush_cache", 400, "pending requests"),
        ("/end_weight_update", 400, "cannot quantize"),
    ],
)
def test_server_that_fails_is_named_and_left_out_and_the_others_go_on(
    fakes: list[Refusing], targets: list[SyncTarget], path: str, status: int, message: str
) -> None:
    fakes[0].refusals[path] = (status, message)

    report = sync_weights(targets, TensorByValue(), buckets, "run:3")

    assert list(report.failed) == ["server 0"]
    assert message in report.failed["server 0"]
    assert is_incomplete(fakes[0].weight_version) or path == "/pause_generation"
    assert fakes[0].calls.count(UPDATE) <= 4 - 3 * (path == UPDATE)
    assert fakes[1].weight_version == "run:3"


def test_stream_is_left_when_no_server_is_left(
    fakes: list[Refusing], targets: list[SyncTarget]
) -> None:
    drawn: list[str] = []
    for fake in fakes:
        fake.refusals[UPDATE] = (400, "no")

    report = sync_weights(targets, TensorByValue(), lambda: buckets(drawn), "run:3")

    assert set(report.failed) == {"server 0", "server 1"}
    assert len(drawn) < 4


def test_loaded_weights_whose_flush_was_refused_count_as_loaded(
    fakes: list[Refusing], targets: list[SyncTarget]
) -> None:
    refusal = "Weights were updated, but the cache was not flushed because requests are running"
    fakes[1].refusals[UPDATE] = (400, refusal)

    assert sync_weights(targets, TensorByValue(), buckets, "run:3").failed == {}
    assert fakes[1].calls.count("/flush_cache") == 1


def test_stream_without_all_weights_stops_before_the_end_and_leaves_a_name_that_says_so(
    fakes: list[Refusing], targets: list[SyncTarget]
) -> None:
    with pytest.raises(EngineError, match="did not come: w3"):
        sync_weights(targets, TensorByValue(), lambda: buckets(last=3), "run:3")

    for fake in fakes:
        assert is_incomplete(fake.weight_version)
        assert "/end_weight_update" not in fake.calls
        assert "/continue_generation" not in fake.calls
    assert fakes[0].is_session_open

    assert sync_weights(targets, TensorByValue(), buckets, "run:4").failed == {}
    assert [fake.weight_version for fake in fakes] == ["run:4", "run:4"]
    assert not fakes[0].is_session_open


def test_server_that_another_trainer_updates_at_the_same_time_fails(
    fakes: list[Refusing], targets: list[SyncTarget], monkeypatch: pytest.MonkeyPatch
) -> None:
    fakes[0].answer = lambda path, payload: (  # type: ignore[method-assign]
        (200, {"weight_version": "theirs"})
        if path == "/model_info"
        else Refusing.answer(fakes[0], path, payload)
    )

    report = sync_weights(targets, TensorByValue(), buckets, "run:3")

    assert "'theirs' after an update to 'run:3'; does another" in report.failed["server 0"]


class Slow(TensorByValue):
    """Does not finish a bucket before the next one was asked for."""

    def __init__(self, drawn: list[str]) -> None:
        super().__init__()
        self._drawn = drawn
        self.threads: set[str] = set()

    def send(self, bucket: Bucket, targets: Sequence[SyncTarget]) -> Failures:
        self.threads.add(threading.current_thread().name)
        wanted = min(4, int(bucket.entries[0].name[1]) + 2)
        deadline = threading.Event()
        for _ in range(500):
            if len(self._drawn) >= wanted:
                return {}
            deadline.wait(0.01)
        return {target.name: "the next bucket was not exported meanwhile" for target in targets}


def test_next_bucket_is_exported_while_one_is_sent(targets: list[SyncTarget]) -> None:
    drawn: list[str] = []
    transport = Slow(drawn)

    assert sync_weights(targets, transport, lambda: buckets(drawn), "run:3").failed == {}
    assert len(transport.threads) == 1
    assert threading.current_thread().name not in transport.threads


def test_server_that_hangs_is_given_up_after_the_limit_and_the_others_go_on(
    fakes: list[Refusing],
    targets: list[SyncTarget],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(sync, "_HEARTBEAT_SECONDS", 0.2)
    release = threading.Event()

    def hang(path: str, payload: dict[str, Any]) -> tuple[int, Any]:
        if path == UPDATE and fakes[0].calls.count(UPDATE) == 1:
            release.wait(60)
        return Refusing.answer(fakes[0], path, payload)

    fakes[0].answer = hang  # type: ignore[method-assign]
    started = time.monotonic()
    with caplog.at_level(logging.INFO):
        report = sync_weights(targets, TensorByValue(timeout_seconds=2.0), buckets, "run:3")
    seconds = time.monotonic() - started
    release.set()

    assert seconds < 30
    assert list(report.failed) == ["server 0"]
    assert "timed out" in report.failed["server 0"]
    assert fakes[1].weight_version == "run:3"
    assert "weight sync: 2 buckets, 0.00 GB in" in caplog.text


def test_body_of_a_bucket_is_made_once_for_all_servers(
    targets: list[SyncTarget], monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[bytes] = []

    def make(serialized: Sequence[str]) -> bytes:
        made.append(tensor_update(serialized))
        return made[-1]

    monkeypatch.setattr(tensor, "tensor_update", make)

    assert sync_weights(targets, TensorByValue(), buckets, "run:3").failed == {}
    assert len(made) == 4


class BreaksOnce(TensorByValue):
    """Fails for all with the first bucket, as a broadcast does that one server hangs in."""

    def __init__(self, log: list[str]) -> None:
        super().__init__()
        self._log = log

    def send(self, bucket: Bucket, targets: Sequence[SyncTarget]) -> Failures:
        self._log += [f"send to {one.name}" for one in targets]
        if self.innocent:
            return {}
        self.innocent = frozenset(one.name for one in targets)
        return {one.name: "broken" for one in targets}


def test_server_that_broke_the_update_of_all_is_given_up_before_the_others_try_again(
    fakes: list[Refusing], targets: list[SyncTarget]
) -> None:
    fakes[0].refusals["/model_info"] = (503, "hangs")
    log: list[str] = []

    report = sync_weights(
        targets,
        BreaksOnce(log),
        buckets,
        "run:3",
        give_up=lambda name, cause: log.append(f"{name} is given up: {cause}"),
    )

    assert report.failed == {"server 0": "broken"}
    assert fakes[1].weight_version == "run:3"
    assert log == [
        *("send to server 0", "send to server 1", "server 0 is given up: broken"),
        *["send to server 1"] * 4,
    ]
    sizes = [bucket.num_bytes for bucket in buckets()]
    assert report.num_buckets == 1 + len(sizes) == 5  # of both tries, as the time is
    assert report.num_bytes == sizes[0] + sum(sizes)


class LosesAll(TensorByValue):
    """Loses every server with the second bucket."""

    def __init__(self) -> None:
        super().__init__()
        self.sent_to: list[int] = []

    def send(self, bucket: Bucket, targets: Sequence[SyncTarget]) -> Failures:
        self.sent_to.append(len(targets))
        return {one.name: "lost" for one in targets} if len(self.sent_to) == 2 else {}


def test_nothing_is_sent_to_nobody(targets: list[SyncTarget]) -> None:
    transport = LosesAll()

    assert len(sync_weights(targets, transport, buckets, "run:3").failed) == 2
    assert transport.sent_to == [2, 2]


def test_servers_read_files_that_are_gone_afterwards(
    fakes: list[Refusing], targets: list[SyncTarget], tmp_path: Path
) -> None:
    (tmp_path / "writing-of-a-trainer-that-died").mkdir()
    seen: list[list[str]] = []

    def reading(path: str, payload: dict[str, Any]) -> tuple[int, Any]:
        if path == "/update_weights_from_disk":
            folder = Path(payload["model_path"])
            assert [one.name for one in folder.parent.iterdir()] == [folder.name]
            seen.append(sorted(one.name for one in folder.iterdir()))
        return Refusing.answer(fakes[0], path, payload)

    fakes[0].answer = reading  # type: ignore[method-assign]
    report = sync_weights(targets, Disk(tmp_path), buckets, "run:3")

    assert report.failed == {}
    assert seen == [[f"model-0000{number}.safetensors" for number in range(1, 5)]]
    assert list(tmp_path.iterdir()) == []
    assert "/begin_weight_update" not in fakes[0].calls


def test_folder_that_cannot_be_written_to_is_an_error_that_names_it(
    targets: list[SyncTarget], tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")

    with pytest.raises(EngineError, match=r"weight sync by disk: .*file"):
        sync_weights(targets, Disk(tmp_path / "file" / "folder"), buckets, "run:3")


def test_sync_is_counted_and_checked_when_it_is_due(targets: list[SyncTarget]) -> None:
    checked: list[int] = []

    def check(left: object, weights: Iterator[tuple[str, torch.Tensor]]) -> Compared:
        checked.append(len(list(weights)))
        return Compared(num_digests=checked[-1], failed={})

    syncer = Syncer(TensorByValue(), check=check, check_every_syncs=2)
    for number in range(3):
        syncer.sync(targets, buckets, f"run:{number}")

    metrics = syncer.take_metrics()
    assert checked == [4, 4]  # at the first and at the third
    assert (metrics["sync/bytes"], metrics["sync/num_buckets"]) == (192.0, 12.0)
    assert {*metrics, "sync/step_fraction"} == set(METRIC_NAMES)
    assert syncer.take_metrics() == {}
