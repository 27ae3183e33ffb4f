"""One update of the weights of all servers: pause, load bucket by bucket, resume, flush.

While a server has weights of more than one version, or a cache of the old one, their name says so:
what a trainer that died left behind is recognised and never sampled from.
"""

import logging
import threading
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass

import torch

from prefixrl_mcore.rollout.engine import EngineError
from prefixrl_mcore.rollout.sglang.faults import ServerRefusal
from prefixrl_mcore.rollout.weight_sync.buckets import Bucket
from prefixrl_mcore.rollout.weight_sync.transport import (
    Failures,
    SyncTarget,
    Transport,
    on_all,
)

logger = logging.getLogger(__name__)

_INCOMPLETE = "incomplete"
_BYTES_PER_GIGABYTE = 1e9
_HEARTBEAT_SECONDS = 30.0

MakeBuckets = Callable[[], Generator[Bucket]]
"""Begins a new stream of all buckets; called again if an update must begin again."""


GiveUp = Callable[[str, str], None]
"""Called with the name of a target that gets no weights, and why."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SyncReport:
    """What an update did."""

    num_bytes: int
    """Weights that went through, in the engine's precision; counted once for all servers. Those of
    an update that broke and was tried once more count twice, as its time does."""

    num_buckets: int
    """Buckets that they were sent in."""

    seconds: float
    """Wall time from the first pause to the last resume; export included."""

    sending_seconds: float
    """Part of it in which a bucket was on its way; the rest is export that nothing overlapped, and
    the calls before and after."""

    failed: Mapping[str, str]
    """Name of each target that has incomplete weights now -> why."""

    @property
    def gigabytes_per_second(self) -> float:
        """Return 10^9 bytes of weights per second of the whole update."""
        return self.num_bytes / _BYTES_PER_GIGABYTE / self.seconds


def is_incomplete(weight_version: str) -> bool:
    """Return whether a server with weights of this name was left in the middle of an update."""
    return weight_version.endswith(f":{_INCOMPLETE}")


def sync_weights(
    targets: Sequence[SyncTarget],
    transport: Transport,
    make_buckets: MakeBuckets,
    weight_version: str,
    *,
    give_up: GiveUp | None = None,
) -> SyncReport:
    """Load new weights into all targets; they are sampled from under the name ``weight_version``.

    The next bucket is exported while the last one is being sent, by one thread, which uses no
    collective of the policy's. A target that fails stays under a name that ``is_incomplete``
    knows; the others go on.

    Args:
        targets: servers that nothing is in flight on.
        transport: carries the buckets. Where one target's failure breaks the others' update, they
            try once more without it.
        make_buckets: begins the stream of buckets, which checks that they are all of the model's
            weights. It is exhausted, or closed before its end.
        weight_version: name of the new weights.
        give_up: is told who failed before others try once more: a server that hangs keeps the
            connections of a broadcast open, and others wait at them until its process is ended.

    Raises:
        EngineError: if the stream is not that of the model's weights, or the transport has nowhere
            to put them. No target has usable weights then.
    """
    started = time.monotonic()
    updates = [_run(_Update(targets, transport, weight_version), make_buckets)]
    failed = updates[0].failed
    again = [t for t in targets if t.name in transport.innocent and t.client.is_healthy()]
    if again:
        for name in failed.keys() - {target.name for target in again}:
            if give_up is not None:
                give_up(name, failed[name])
        updates.append(_run(_Update(again, transport, weight_version), make_buckets))
        failed = {name: failed[name] for name in failed.keys() - {t.name for t in again}}
        failed |= updates[1].failed
    for name, cause in failed.items():
        logger.warning("weight sync: %s did not get the weights: %s", name, cause)
    return SyncReport(
        num_bytes=sum(update.num_bytes for update in updates),
        num_buckets=sum(update.num_buckets for update in updates),
        seconds=time.monotonic() - started,
        sending_seconds=sum(update.sending_seconds for update in updates),
        failed=failed,
    )


def _run(update: "_Update", make_buckets: MakeBuckets) -> "_Update":
    """Do an update from beginning to end, and return it."""
    try:
        with _heartbeat(update):
            update.begin()
            update.send(make_buckets)
            update.end()
    except OSError as error:
        raise EngineError(f"weight sync by {update.transport.name}: {error}") from error
    finally:
        update.transport.close()
    return update


@contextmanager
def _heartbeat(update: "_Update") -> Generator[None]:
    """Say in the log how far an update is, as long as it goes on."""
    ended = threading.Event()
    started = time.monotonic()

    def beat() -> None:
        while not ended.wait(_HEARTBEAT_SECONDS):
            logger.info(
                "weight sync: %d buckets, %.2f GB in %.0f s, by %s; servers given up: %s",
                *(update.num_buckets, update.num_bytes / _BYTES_PER_GIGABYTE),
                *(time.monotonic() - started, update.transport.name),
                ", ".join(list(update.failed)) or "none",
            )

    threading.Thread(target=beat, name="weight-sync-heartbeat", daemon=True).start()
    try:
        yield
    finally:
        ended.set()


class _Update:
    """The state of one update."""

    def __init__(
        self, targets: Sequence[SyncTarget], transport: Transport, weight_version: str
    ) -> None:
        self._targets = targets
        self.transport = transport
        self._weight_version = weight_version
        self._open_sessions: set[str] = set()
        self.failed: dict[str, str] = {}
        self.num_bytes = 0
        self.num_buckets = 0
        self.sending_seconds = 0.0

    @property
    def _left(self) -> list[SyncTarget]:
        """The targets that have not failed."""
        return [target for target in self._targets if target.name not in self.failed]

    def begin(self) -> None:
        """Pause the targets and mark their weights as incomplete."""
        self.failed |= on_all(self._targets, self._begin_one)
        self.failed |= self.transport.open(self._left)

    def _begin_one(self, target: SyncTarget) -> None:
        target.client.pause()
        target.client.abort()  # what another trainer, or a batch that was given up, left in flight
        target.client.set_weight_version(f"{self._weight_version}:{_INCOMPLETE}")
        if self.transport.has_session and target.client.begin_update():
            self._open_sessions.add(target.name)

    def send(self, make_buckets: MakeBuckets) -> None:
        """Send all buckets, each while the next one is made."""
        with closing(make_buckets()) as buckets, ThreadPoolExecutor(1, "weight-sync") as sender:
            sending: Future[Failures] | None = None
            while self._left:
                bucket = next(buckets, None)
                if sending is not None:
                    self.failed |= sending.result()
                left = self._left
                if bucket is None or not left:
                    break
                if bucket.data.is_cuda:  # the sender has a stream of its own
                    torch.cuda.current_stream(bucket.data.device).synchronize()
                self.num_bytes += bucket.num_bytes
                self.num_buckets += 1
                sending = sender.submit(self._send_one, bucket, left)
        self.failed |= self.transport.finish(self._left)

    def _send_one(self, bucket: Bucket, targets: Sequence[SyncTarget]) -> Failures:
        """Do the work of the sender."""
        started = time.monotonic()
        try:
            return self.transport.send(bucket, targets)
        finally:
            self.sending_seconds += time.monotonic() - started

    def end(self) -> None:
        """Make the new weights usable in the targets that have them all."""
        self.failed |= on_all(self._left, self._end_one)

    def _end_one(self, target: SyncTarget) -> None:
        client = target.client
        if target.name in self._open_sessions:
            client.end_update()
        # A server that was paused right after its last answer still holds the finished batch, and
        # is never idle enough for a flush. Under its name nobody samples before the flush.
        client.resume()
        client.flush_cache()
        client.set_weight_version(self._weight_version)
        served = client.weight_version()
        if served != self._weight_version:
            raise ServerRefusal(
                "/model_info",
                200,
                f"weights {served!r} after an update to {self._weight_version!r}; does another "
                "trainer use the server?",
            )
