"""Weights by broadcast from the trainer to all ranks of all servers: NCCL, or gloo on CPUs.

The path over NCCL has not been run yet.
"""

import datetime
import functools
import logging
import threading
import time
import uuid
from collections.abc import Container, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from itertools import accumulate

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

from prefixrl_mcore.rollout.weight_sync.addresses import address_for
from prefixrl_mcore.rollout.weight_sync.buckets import Bucket
from prefixrl_mcore.rollout.weight_sync.releases import own_nccl
from prefixrl_mcore.rollout.weight_sync.transport import (
    Failures,
    SyncTarget,
    collect_failures,
    on_all,
)

logger = logging.getLogger(__name__)

_POLL_SECONDS = 0.0005
_GRACE_SECONDS = 30.0
"""How much longer than this side a server may wait: it then gives up because this side did, and
tells who failed first."""

_LEAVE_SECONDS = 10.0
"""Longest wait for servers to leave a broken group, and for this side to abort it."""


class Broadcast:
    """Broadcasts every bucket in a process group of its own, in which the trainer is rank 0.

    The group is made for one update and belongs to the thread that sends: the policy's collectives
    go on meanwhile, in other groups, with ranks that do not wait for any server. It is not kept for
    the next update, since a server that was started anew in between has no part in it, and one
    that is told to receive from a group that it does not know ends itself.

    The ranks of all servers receive together, so one that is lost breaks the update of all. The
    deadline of that is kept here, and the group is aborted from here when it passes: NCCL's own
    watchdog, which would end the trainer, waits longer.
    """

    has_session = True

    def __init__(self, backend: str, *, timeout_seconds: float) -> None:
        """Prepare for ``nccl`` or ``gloo``.

        Args:
            backend: must fit the device of trainer and servers.
            timeout_seconds: how long servers may take to join, and to receive a bucket.
        """
        self.name = f"distributed ({backend})"
        self.innocent: frozenset[str] = frozenset()
        self._backend = backend
        self._timeout_seconds = timeout_seconds
        # By URL: a name that nobody resolves for a moment must not end a run.
        self._address_for = functools.cache(address_for)
        self._group: dist.ProcessGroup | None = None
        self._group_name = ""
        self._store: dist.TCPStore | None = None
        self._joined: frozenset[str] = frozenset()

    def open(self, targets: Sequence[SyncTarget]) -> Failures:
        """Make the group; return which targets did not join, or all if the group was not made."""
        self.close()
        self.innocent = frozenset()
        if not targets:
            return {}
        sizes = [target.num_ranks for target in targets]
        offsets = dict(
            zip((t.name for t in targets), accumulate(sizes[:-1], initial=1), strict=True)
        )
        world_size = 1 + sum(sizes)
        addresses = {target.name: self._address_for(target.client.url) for target in targets}
        timeout = datetime.timedelta(seconds=self._timeout_seconds)
        # A free port at every address; the servers come in any order, before or after this rank.
        store = dist.TCPStore(
            "127.0.0.1", 0, world_size, is_master=True, timeout=timeout, wait_for_workers=False
        )
        self._store, self._group_name = store, f"prefixrl-{uuid.uuid4().hex}"
        self._joined = frozenset(offsets)
        with ThreadPoolExecutor(len(targets), "weight-sync-join") as pool:
            joining = {
                target.name: pool.submit(
                    target.client.init_update_group,
                    address=addresses[target.name],
                    port=store.port,
                    rank_offset=offsets[target.name],
                    world_size=world_size,
                    group_name=self._group_name,
                    backend=self._backend,
                    timeout_seconds=self._timeout_seconds + _GRACE_SECONDS,
                )
                for target in targets
            }
            cause = self._join(world_size)
            guilty = _failed_so_far(joining)
            if cause:
                del store
                self.close()  # so that the servers that still wait for the others give up
        return self._failures(joining, cause, guilty)

    def _join(self, world_size: int) -> str:
        """Take part in the group as rank 0; return why it was not made, or nothing."""
        assert self._store is not None, "the store comes first"
        timeout = _group_timeout(self._backend, self._timeout_seconds)
        try:
            self._group, _ = distributed_c10d._new_process_group_helper(
                world_size,
                0,
                [],
                dist.Backend(self._backend),
                dist.PrefixStore(self._group_name, self._store),
                group_name=distributed_c10d.GroupName(self._group_name),
                backend_options=_options(self._backend, timeout),
                timeout=timeout,
            )
        except RuntimeError as error:
            return f"no process group with all servers in {self._timeout_seconds:.0f} s: {error}"
        distributed_c10d._world.pg_group_ranks[self._group] = {i: i for i in range(world_size)}
        return ""

    def send(self, bucket: Bucket, targets: Sequence[SyncTarget]) -> Failures:
        """Broadcast one bucket while all targets receive it; return when they have loaded it.

        A target that is no longer given, because it refused a bucket that it had received, would
        never receive this one, which the others would wait for: they all get another group.
        """
        lost = self._lost(targets)
        if lost:
            self._destroy()
            self.innocent = frozenset(target.name for target in targets)
            self._leave_broken(targets)
            broke = f"the broadcast to all servers broke: lost before: {', '.join(sorted(lost))}"
            return dict.fromkeys(self.innocent, broke)
        entries = bucket.entries
        payload = {
            "names": [entry.name for entry in entries],
            "dtypes": [str(bucket.dtype).removeprefix("torch.")] * len(entries),
            "shapes": [list(entry.shape) for entry in entries],
            "group_name": self._group_name,
            "load_format": "flattened_bucket",
        }
        with ThreadPoolExecutor(len(targets), "weight-sync-receive") as pool:
            receiving = {
                target.name: pool.submit(
                    target.client.update_from_distributed,
                    payload,
                    self._timeout_seconds + _GRACE_SECONDS,
                )
                for target in targets
            }
            cause = self._broadcast(bucket, receiving)
            guilty = _failed_so_far(receiving)
            if cause:
                self._destroy()  # so that the servers that still receive give up
        failures = self._failures(receiving, cause, guilty)
        if cause:
            self._leave_broken([target for target in targets if target.name in self.innocent])
        return failures

    def _lost(self, targets: Sequence[SyncTarget]) -> frozenset[str]:
        """Return who is in the group and not among the targets any more."""
        return self._joined - {target.name for target in targets}

    def _broadcast(self, bucket: Bucket, receiving: Mapping[str, Future[None]]) -> str:
        """Broadcast the bytes; return why that failed, or nothing."""
        assert self._group is not None, "open comes first"
        limit = _group_timeout(self._backend, self._timeout_seconds)
        broadcasting = _begin_broadcast(self._group, bucket, limit)
        deadline = time.monotonic() + self._timeout_seconds
        while not broadcasting.done():
            if any(future.done() and future.exception() for future in receiving.values()):
                return "a server does not receive"
            if time.monotonic() > deadline:
                return f"not received by all servers in {self._timeout_seconds:.0f} s"
            time.sleep(_POLL_SECONDS)
        error = broadcasting.exception()
        if error is not None and not isinstance(error, RuntimeError):
            raise error
        if error is None:
            return ""
        return f"{type(error).__name__}: {error}"  # a connection broke

    def _leave_broken(self, targets: Sequence[SyncTarget]) -> None:
        """Let servers that did nothing wrong drop a group that others do not leave with them."""
        name, self._group_name = self._group_name, ""
        failures = on_all(
            targets,
            lambda target: target.client.destroy_update_group(name, _LEAVE_SECONDS),
        )
        for target, failure in failures.items():
            logger.warning("weight sync: %s did not leave a broken group: %s", target, failure)

    def _failures(
        self, futures: Mapping[str, Future[None]], cause: str, guilty: Container[str]
    ) -> Failures:
        """Return why targets failed: by themselves, or because the broadcast broke."""
        failures = collect_failures(futures)
        if not cause:
            return failures
        self.innocent = frozenset(name for name in futures if name not in guilty)
        broke = f"the broadcast to all servers broke: {cause}"
        if self._backend == "nccl":
            broke += f" (NCCL must be of one version on both sides; the trainer has {own_nccl()})"
        return {
            name: f"{failures[name]}; {broke}" if name in failures else broke for name in futures
        }

    def finish(self, targets: Sequence[SyncTarget]) -> Failures:
        """Leave the group on both sides at once: NCCL's ranks of one machine wait for another.

        Those that are given have all buckets, and would wait for one that is not, because it
        refused the last: the group is broken up for them, as ``send`` does.
        """
        if self._lost(targets):
            self._destroy()
            self._leave_broken(targets)
            return {}
        name, self._group_name = self._group_name, ""
        leaving = self._begin_to_leave()
        failures = on_all(
            targets, lambda target: target.client.destroy_update_group(name, self._timeout_seconds)
        )
        _wait_for(leaving)
        return failures

    def close(self) -> None:
        """Leave the group, complete or not."""
        self._destroy()
        self._store = None

    def _destroy(self) -> None:
        """Leave the group on this side; connections are closed even if something is on its way."""
        _wait_for(self._begin_to_leave())

    def _begin_to_leave(self) -> threading.Thread | None:
        """Leave the group on this side, in a thread: an abort that hangs must not hang the run."""
        group, self._group = self._group, None
        if group is None:
            return None
        leaving = threading.Thread(target=_abort, args=(group,), daemon=True)
        leaving.start()
        return leaving


def _wait_for(leaving: threading.Thread | None) -> None:
    """Wait until the group was left; give it up if that takes too long."""
    if leaving is None:
        return
    leaving.join(_LEAVE_SECONDS)
    if leaving.is_alive():
        logger.warning("weight sync: the process group is still being aborted")


def _abort(group: dist.ProcessGroup) -> None:
    """Abort a group, whatever is on its way in it, and forget it."""
    try:
        distributed_c10d._abort_process_group(group)
    except RuntimeError as error:
        logger.warning("weight sync: the process group was not ended cleanly: %s", error)


def _group_timeout(backend: str, timeout_seconds: float) -> datetime.timedelta:
    """Return the group's own limit.

    NCCL's watchdog ends the process when it passes, so that it must not pass before the deadline
    that is kept here, and what follows it. Gloo only raises, and waits for others to join no
    longer than it: the deadline itself.
    """
    spare = 2 * _GRACE_SECONDS if backend == "nccl" else 0.0
    return datetime.timedelta(seconds=timeout_seconds + spare)


def _options(backend: str, timeout: datetime.timedelta) -> object | None:
    """Return the backend's options.

    The servers' NCCL communicator is made inside of the first broadcast, and so is this side's.
    Made without blocking it is one that an abort finds and ends; a blocking one is known to the
    group only when all have joined it.
    """
    if backend != "nccl":
        return None
    options = dist.ProcessGroupNCCL.Options()
    options.config.blocking = 0
    options._timeout = timeout
    return options


def _begin_broadcast(
    group: dist.ProcessGroup, bucket: Bucket, limit: datetime.timedelta
) -> Future[None]:
    """Broadcast in a thread of its own: with NCCL the call waits for all servers to join.

    A daemon's, and no pool's: one that hangs must not keep the interpreter from ending.
    """
    done: Future[None] = Future()

    def broadcast() -> None:
        options = dist.BroadcastOptions()
        options.rootRank, options.rootTensor = 0, 0
        try:
            with _current(bucket):
                work = group.broadcast([bucket.data], options)
                while not work.is_completed():
                    time.sleep(_POLL_SECONDS)
                # Also true if it failed. NCCL raises that only where there is a limit.
                work.wait(limit)
        except BaseException as error:  # raised where the future is read
            done.set_exception(error)
        else:
            done.set_result(None)

    threading.Thread(target=broadcast, name="weight-sync-broadcast", daemon=True).start()
    return done


def _failed_so_far(futures: Mapping[str, Future[None]]) -> set[str]:
    """Return who was the first to fail, before anything was given up because of it."""
    return {name for name, future in futures.items() if future.done() and future.exception()}


def _current(bucket: Bucket) -> AbstractContextManager[object]:
    """Return a context in which the bucket's GPU is the current one of this thread."""
    return torch.cuda.device(bucket.data.device) if bucket.data.is_cuda else nullcontext()
