"""One transport for the servers on this machine, another for those elsewhere, in one update."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

from prefixrl_mcore.rollout.weight_sync.buckets import Bucket
from prefixrl_mcore.rollout.weight_sync.transport import Failures, SyncTarget, Transport


class ByLocation:
    """Gives every bucket to two transports, each with its own targets, at the same time.

    So servers that share the trainer's GPUs are in no communicator with it, which would have a
    GPU twice, and the policy is exported once for all. The failures of one transport's targets
    are of no concern to the other's.
    """

    def __init__(self, here: Transport, elsewhere: Transport) -> None:
        """Put two transports together.

        Args:
            here: for targets on this machine.
            elsewhere: for all others; wants update sessions if and only if ``here`` does.
        """
        assert here.has_session == elsewhere.has_session, "a target is told one thing"
        self.name = f"{here.name} on this machine, {elsewhere.name} elsewhere"
        self.has_session = here.has_session
        self._here, self._elsewhere = here, elsewhere

    @property
    def innocent(self) -> frozenset[str]:
        """Targets of either transport that failed only because another one of it did."""
        return self._here.innocent | self._elsewhere.innocent

    def open(self, targets: Sequence[SyncTarget]) -> Failures:
        """Prepare both for their targets, of which there may be none."""
        return self._do(targets, lambda transport, own: transport.open(own))

    def send(self, bucket: Bucket, targets: Sequence[SyncTarget]) -> Failures:
        """Bring one bucket to all targets; return when neither transport needs it any more."""
        return self._do(targets, lambda transport, own: transport.send(bucket, own) if own else {})

    def finish(self, targets: Sequence[SyncTarget]) -> Failures:
        """Return when the targets have all buckets loaded."""
        return self._do(targets, lambda transport, own: transport.finish(own))

    def close(self) -> None:
        """Forget the update in both."""
        try:
            self._here.close()
        finally:
            self._elsewhere.close()

    def _do(
        self,
        targets: Sequence[SyncTarget],
        call: Callable[[Transport, Sequence[SyncTarget]], Failures],
    ) -> Failures:
        """Do the same with both transports at once; return all failures."""
        here = [target for target in targets if target.is_here]
        elsewhere = [target for target in targets if not target.is_here]
        with ThreadPoolExecutor(1, "weight-sync-elsewhere") as thread:
            other = thread.submit(call, self._elsewhere, elsewhere)
            failures = call(self._here, here)
        return {**failures, **other.result()}
