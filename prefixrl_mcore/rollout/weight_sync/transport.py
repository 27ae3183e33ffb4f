"""How buckets of weights get to servers: what every transport does, and whom it does it for."""

import logging
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol

from prefixrl_mcore.rollout.sglang.client import SGLangClient
from prefixrl_mcore.rollout.sglang.faults import ServerFault
from prefixrl_mcore.rollout.weight_sync.buckets import Bucket

logger = logging.getLogger(__name__)

DEFAULT_TIMEOUT_SECONDS = 300.0
"""How long a server may take to load a bucket, where nothing else is said."""

Failures = Mapping[str, str]
"""Name of a target -> why it did not take the weights."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SyncTarget:
    """A server that is to have the weights."""

    client: SGLangClient
    """Its endpoints."""

    num_ranks: int
    """Its tensor-parallel ranks; each takes its part of the full weights."""

    name: str
    """Unique among the targets; named in errors."""

    gpus: tuple[int, ...] | None = None
    """The GPU of each rank, as the trainer numbers them, where trainer and server are on one
    machine; None if they are the first ones, or none."""

    is_here: bool = True
    """It is on this machine."""

    @property
    def rank_gpus(self) -> Sequence[int]:
        """Return the GPU of each rank."""
        return range(self.num_ranks) if self.gpus is None else self.gpus


class Transport(Protocol):
    """Carries the buckets of one update; its methods are called from one thread, in this order.

    A target that fails is left out of the later calls.
    """

    @property
    def name(self) -> str:
        """``disk``, ``tensor`` or ``distributed``, with what else tells it from others, or two."""
        ...

    @property
    def has_session(self) -> bool:
        """Whether the server must be told where an update begins and ends (from 0.5.21)."""
        ...

    @property
    def innocent(self) -> frozenset[str]:
        """Targets that failed in this update only because another one did; they may try again."""
        ...

    def open(self, targets: Sequence[SyncTarget]) -> Failures:
        """Prepare for an update of these targets.

        Raises:
            OSError: if there is nowhere to write to.
        """
        ...

    def send(self, bucket: Bucket, targets: Sequence[SyncTarget]) -> Failures:
        """Bring one bucket to all targets; return when its memory is not needed any more."""
        ...

    def finish(self, targets: Sequence[SyncTarget]) -> Failures:
        """Return when the targets have all buckets loaded."""
        ...

    def close(self) -> None:
        """Forget the update, complete or not; safe to call at any time, and twice."""
        ...


def on_all(targets: Sequence[SyncTarget], call: Callable[[SyncTarget], object]) -> dict[str, str]:
    """Do ``call`` for all targets at once; return which of them were lost or refused it."""
    if not targets:
        return {}
    with ThreadPoolExecutor(len(targets), "weight-sync") as pool:
        futures = {target.name: pool.submit(call, target) for target in targets}
    return collect_failures(futures)


def collect_failures(futures: Mapping[str, Future[Any]]) -> dict[str, str]:
    """Wait for calls, by the target's name; return which were lost or refused."""
    failures: dict[str, str] = {}
    for name, future in futures.items():
        try:
            future.result()
        except ServerFault as error:
            failures[name] = str(error)
    return failures
