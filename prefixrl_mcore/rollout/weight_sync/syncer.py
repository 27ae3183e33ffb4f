"""The weight syncs of a run: one transport, checksums now and then, and what it all took."""

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

from torch import Tensor

from prefixrl_mcore.rollout.weight_sync.checksums import Compared
from prefixrl_mcore.rollout.weight_sync.sync import GiveUp, MakeBuckets, SyncReport, sync_weights
from prefixrl_mcore.rollout.weight_sync.transport import (
    Failures,
    SyncTarget,
    Transport,
)

logger = logging.getLogger(__name__)

CheckWeights = Callable[[Sequence[SyncTarget], Iterator[tuple[str, Tensor]]], Compared]
"""Raises EngineError if a target's weights differ; returns what it compared, and who was lost."""

METRIC_NAMES = tuple(
    f"sync/{name}"
    for name in (
        *("seconds", "sending_seconds", "check_seconds", "bytes", "num_buckets"),
        *("gigabytes_per_second", "num_failed_servers", "step_fraction"),
    )
)
"""Metrics of a step in which weights were sent; the session adds the last."""


class Syncer:
    """Brings weights to servers, again and again."""

    def __init__(
        self, transport: Transport, *, check: CheckWeights, check_every_syncs: int | None
    ) -> None:
        """Begin with no sync.

        Args:
            transport: carries the buckets.
            check: compares the weights of servers with a stream of the policy's.
            check_every_syncs: how often; the first sync is always checked. None: never.
        """
        self._transport = transport
        self._check = check
        self._check_every_syncs = check_every_syncs
        self._num_syncs = 0
        self._reports: list[SyncReport] = []
        self._check_seconds = 0.0

    def sync(
        self,
        targets: Sequence[SyncTarget],
        make_buckets: MakeBuckets,
        weight_version: str,
        give_up: GiveUp | None = None,
    ) -> SyncReport:
        """Load new weights into all targets, as ``sync_weights`` does, and check them if it is due.

        Raises:
            EngineError: as ``sync_weights``; if a server holds other weights than it was sent.
        """
        report = sync_weights(
            targets, self._transport, make_buckets, weight_version, give_up=give_up
        )
        logger.debug("weight sync: %.2f GB/s", report.gigabytes_per_second)
        left = [target for target in targets if target.name not in report.failed]
        every = self._check_every_syncs
        is_due = every is not None and self._num_syncs % every == 0
        if left and is_due:
            failed = self._compare(left, make_buckets)
            report = replace(report, failed={**report.failed, **failed})
            is_due = len(failed) == len(left)  # nothing was compared: the next sync is checked
        self._reports.append(report)
        if not is_due:
            self._num_syncs += 1
        return report

    def _compare(self, targets: Sequence[SyncTarget], make_buckets: MakeBuckets) -> Failures:
        """Compare the weights of targets with the policy's; return who was lost meanwhile."""
        started = time.monotonic()
        weights = (pair for bucket in make_buckets() for pair in bucket.weights())
        compared = self._check(targets, weights)
        self._check_seconds += time.monotonic() - started
        logger.info("weight sync: checksums of %d tensors agree", compared.num_digests)
        for name, cause in compared.failed.items():
            logger.warning("weight sync: %s did not tell its checksums: %s", name, cause)
        return compared.failed

    def take_metrics(self) -> dict[str, float]:
        """Return what the syncs since the last call took, by metric name; empty without one."""
        reports, self._reports = self._reports, []
        check_seconds, self._check_seconds = self._check_seconds, 0.0
        if not reports:
            return {}
        seconds = sum(report.seconds for report in reports)
        num_bytes = sum(report.num_bytes for report in reports)
        return {
            "sync/seconds": seconds,
            "sync/sending_seconds": sum(report.sending_seconds for report in reports),
            "sync/check_seconds": check_seconds,
            "sync/bytes": float(num_bytes),
            "sync/num_buckets": float(sum(report.num_buckets for report in reports)),
            "sync/gigabytes_per_second": num_bytes / 1e9 / seconds,
            "sync/num_failed_servers": float(sum(len(report.failed) for report in reports)),
        }
