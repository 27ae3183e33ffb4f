"""Two transports in one update: each has its own targets, and its failures are its own."""

import threading
from collections.abc import Generator, Iterator, Sequence
from contextlib import ExitStack

import pytest
import torch

from prefixrl_mcore.rollout.sglang.client import SGLangClient
from prefixrl_mcore.rollout.weight_names import WeightCoverage
from prefixrl_mcore.rollout.weight_sync.buckets import Bucket, pack_buckets
from prefixrl_mcore.rollout.weight_sync.by_location import ByLocation
from prefixrl_mcore.rollout.weight_sync.sync import is_incomplete, sync_weights
from prefixrl_mcore.rollout.weight_sync.transport import Failures, SyncTarget
from tests.support.fake_sglang import FakeSGLang, serve

SHAPES = {f"w{index}": (4,) for index in range(4)}


class Noting:
    """Keeps what it was asked for, and fails when it is told to."""

    has_session = True

    def __init__(self, name: str) -> None:
        self.name = name
        self.calls: list[tuple[str, list[str]]] = []
        self.fails_at = ""
        self.innocent: frozenset[str] = frozenset()
        self.meets: threading.Barrier | None = None

    def open(self, targets: Sequence[SyncTarget]) -> Failures:
        return self._note("open", targets)

    def send(self, bucket: Bucket, targets: Sequence[SyncTarget]) -> Failures:
        if self.meets is not None:
            self.meets.wait(60)
        return self._note(bucket.entries[0].name, targets)

    def finish(self, targets: Sequence[SyncTarget]) -> Failures:
        return self._note("finish", targets)

    def close(self) -> None:
        self.calls.append(("close", []))

    def _note(self, what: str, targets: Sequence[SyncTarget]) -> Failures:
        self.calls.append((what, [target.name for target in targets]))
        if what != self.fails_at:
            return {}
        return {target.name: f"{self.name} broke" for target in targets}


@pytest.fixture
def fakes() -> list[FakeSGLang]:
    return [FakeSGLang() for _ in range(3)]


@pytest.fixture
def targets(fakes: list[FakeSGLang]) -> Iterator[list[SyncTarget]]:
    """One server here, two elsewhere."""
    with ExitStack() as stack:
        yield [
            SyncTarget(
                client=SGLangClient(stack.enter_context(serve(fake)), request_timeout_seconds=5),
                num_ranks=1,
                name=f"server {index}",
                is_here=index == 0,
            )
            for index, fake in enumerate(fakes)
        ]


class Export:
    """Counts how often the policy is exported."""

    def __init__(self) -> None:
        self.number = 0

    def buckets(self) -> Generator[Bucket]:
        """Begin a stream of four weights, a bucket each."""
        self.number += 1
        weights = ((name, torch.ones(4)) for name in SHAPES)
        return pack_buckets(
            weights, WeightCoverage(shapes=SHAPES), dtype=torch.float32, bucket_bytes=16
        )


def test_every_bucket_goes_to_both_at_the_same_time_out_of_one_export(
    targets: list[SyncTarget], fakes: list[FakeSGLang]
) -> None:
    here, elsewhere, export = Noting("here"), Noting("elsewhere"), Export()
    here.meets = elsewhere.meets = threading.Barrier(2)  # neither comes back before the other

    transport = ByLocation(here, elsewhere)

    report = sync_weights(targets, transport, export.buckets, "run:1")

    assert report.failed == {}
    assert transport.name == "here on this machine, elsewhere elsewhere"
    assert export.number == 1
    steps = ["open", *SHAPES, "finish"]
    assert here.calls == [*((step, ["server 0"]) for step in steps), ("close", [])]
    assert elsewhere.calls == [
        *((step, ["server 1", "server 2"]) for step in steps),
        ("close", []),
    ]
    assert {fake.weight_version for fake in fakes} == {"run:1"}


@pytest.mark.parametrize("where", ["here", "elsewhere"])
@pytest.mark.parametrize("fails_at", ["open", "w1", "finish"])
def test_failure_of_one_leaves_the_others_targets_their_weights(
    targets: list[SyncTarget], fakes: list[FakeSGLang], where: str, fails_at: str
) -> None:
    transports = {name: Noting(name) for name in ("here", "elsewhere")}
    transports[where].fails_at = fails_at

    report = sync_weights(targets, ByLocation(*transports.values()), Export().buckets, "run:1")

    lost = {"server 0"} if where == "here" else {"server 1", "server 2"}
    assert report.failed == dict.fromkeys(lost, f"{where} broke")
    for target, fake in zip(targets, fakes, strict=True):
        assert is_incomplete(fake.weight_version) == (target.name in lost)
    (other,) = transports.keys() - {where}
    assert [step for step, _ in transports[other].calls] == ["open", *SHAPES, "finish", "close"]
    sent = [step for step, _ in transports[where].calls if step in SHAPES]
    assert sent == {"open": [], "w1": ["w0", "w1"], "finish": list(SHAPES)}[fails_at]


def test_targets_that_did_nothing_wrong_try_again_whichever_transport_says_so(
    targets: list[SyncTarget], fakes: list[FakeSGLang]
) -> None:
    here, elsewhere, export = Noting("here"), Noting("elsewhere"), Export()
    elsewhere.fails_at, elsewhere.innocent = "w1", frozenset({"server 2"})
    transport = ByLocation(here, elsewhere)
    opened = elsewhere.open

    def open_and_heal(targets: Sequence[SyncTarget]) -> Failures:
        if len(targets) == 1:
            elsewhere.fails_at = ""
        return opened(targets)

    elsewhere.open = open_and_heal  # type: ignore[method-assign]

    report = sync_weights(targets, transport, export.buckets, "run:1")

    assert list(report.failed) == ["server 1"]
    assert export.number == 2
    assert [fake.weight_version for fake in fakes][0::2] == ["run:1", "run:1"]
    assert is_incomplete(fakes[1].weight_version)
    assert [names for step, names in here.calls if step == "w0"] == [["server 0"]]
