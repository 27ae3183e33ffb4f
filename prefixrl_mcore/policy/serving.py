"""Work of rank 0 alone, in the middle of which it may ask all ranks for a collective.

An engine is driven by rank 0, and may need the weights at any time: to bring a restarted server
up to date in the middle of sampling. The weights come out of a collective, so the other ranks
stand by while rank 0 works, and take part whenever it asks.
"""

import logging
import os
import threading
import time
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, Never

import torch.distributed as dist
from torch.distributed import distributed_c10d

from prefixrl_mcore.config import exit_codes
from prefixrl_mcore.policy.topology import run_on_first

logger = logging.getLogger(__name__)

Service = Callable[[], Iterator[Any]]
"""A collective generator: all ranks call it and exhaust it together; rank 0 uses what it yields."""

_FAILURE_KEY = "prefixrl/service_failure"
"""Entry of the process group's store that tells the other ranks why one of them left."""

_LOOKS_PER_LIMIT = 10

_NEVER = object()
"""No service yields it."""


class ServiceFailure(RuntimeError):  # noqa: N818 -- the failure is of a service, not of the caller
    """A rank failed inside a collective; the message names the rank and the cause.

    The ranks are out of step then: no further collective can be trusted.
    """


class CollectiveServices:
    """Named collectives that rank 0 may ask for inside ``run_on_first``; made on every rank."""

    def __init__(
        self, services: Mapping[str, Service], *, limit_seconds: float | None = None
    ) -> None:
        """Keep the services, which must be the same on every rank.

        Args:
            services: by name.
            limit_seconds: how long rank 0 waits for what a service yields next before it ends its
                process, and with it the run: another rank hangs. None waits for ever.
        """
        self._services = services
        self._limit_seconds = limit_seconds
        self._is_serving = False
        self._current: Iterator[Any] | None = None
        self._failure: ServiceFailure | None = None

    def run_on_first[T](self, function: Callable[[], T]) -> T:
        """Run ``function`` on rank 0 and return its (picklable) result on every rank.

        All ranks must call this. On rank 0, ``function`` may call ``ask`` any number of times; the
        others wait, and take part in what is asked for.

        Raises:
            ServiceFailure: if a rank failed inside a service.
            Exception: what ``function`` raised, as ``topology.run_on_first`` passes it on.
        """
        if _is_alone() or dist.get_rank() == 0:
            return run_on_first(self._outcome(function))
        self._stand_by()
        return run_on_first(function)  # receives what rank 0 found

    def ask(self, name: str) -> Iterator[Any]:
        """Return what the service yields on rank 0; all ranks take part in it.

        To be called from the thread of ``run_on_first``. One service runs at a time: asking again
        ends the one before. One that is left half-way is still exhausted on all ranks, when the
        iterator is closed, at the next ``ask``, or at the end of ``run_on_first``.

        Raises:
            RuntimeError: outside of ``run_on_first``.
            ServiceFailure: while iterating, if a rank failed.
        """
        if not self._is_serving:
            raise RuntimeError(
                f"service {name!r}: no rank is standing by; ask for it inside run_on_first"
            )
        self._exhaust()
        self._command(name)
        self._current = self._take_part(name)
        return self._yield_all(self._current)

    def _yield_all(self, service: Iterator[Any]) -> Iterator[Any]:
        """Yield what ``service`` yields; exhaust it even if the caller stops before its end."""
        try:
            # Not "yield from service": closing this generator would close that one half-way.
            yield from iter(service.__next__, _NEVER)
        finally:
            if self._current is service:
                self._exhaust()

    def _outcome[T](self, function: Callable[[], T]) -> Callable[[], T]:
        """Do the work of rank 0; return a function that returns or raises what came of it.

        Raises:
            ServiceFailure: if a rank failed inside a service; the others are not told, since they
                do not listen.
        """
        self._is_serving = True
        try:
            result = function()
        except BaseException as error:  # the others stand by, whatever went wrong
            self._dismiss()
            return partial(_raise, error)
        self._dismiss()
        return lambda: result

    def _dismiss(self) -> None:
        """Let the others stand by no longer."""
        self._is_serving = False
        self._exhaust()
        if self._failure is not None:
            raise self._failure
        self._command(None)

    def _exhaust(self) -> None:
        """Take part in what is left of the current service."""
        current, self._current = self._current, None
        for _ in current or ():
            pass

    def _command(self, name: str | None) -> None:
        """Tell the other ranks which service is next; None: that there is none any more.

        A rank that hangs may keep rank 0 in this collective too.
        """
        if _is_alone():
            return
        with ExitStack() as stack:
            if self._limit_seconds is not None:
                watch = _Watch(name or "the end of the services", self._limit_seconds)
                stack.enter_context(watch.running())
                stack.enter_context(watch.waiting())
            dist.broadcast_object_list([name], src=0)

    def _stand_by(self) -> None:
        """Take part in every service that rank 0 asks for, until it is done."""
        while True:
            command: list[str | None] = [None]
            dist.broadcast_object_list(command, src=0)
            if command[0] is None:
                return
            for _ in self._take_part(command[0]):
                pass

    def _take_part(self, name: str) -> Iterator[Any]:
        """Yield what a service yields; say on all ranks which one failed, and why.

        A rank that fails leaves a note in the store of the process group and raises. The others
        wait for it in a collective, which breaks when its process ends; they then find the note.
        """
        try:
            if _is_alone() or dist.get_rank() or self._limit_seconds is None:
                yield from self._services[name]()
            else:
                yield from _watched(name, self._services[name](), self._limit_seconds)
        except Exception as error:  # of any kind: the others must learn of it
            if _is_alone():
                raise
            self._failure = ServiceFailure(_failure_text(name, error))
            raise self._failure from error


def _watched(name: str, service: Iterator[Any], limit_seconds: float) -> Iterator[Any]:
    """Yield what a service yields; end the process if it takes longer than the limit once."""
    watch = _Watch(name, limit_seconds)
    with watch.running():
        while True:
            with watch.waiting():
                item = next(service, _NEVER)
            if item is _NEVER:
                return
            yield item


class _Watch:
    """Ends the process when it waits too long: its main thread may never return from a collective.

    What is exported is incomplete then, and the ranks are out of step: there is nothing to save.
    """

    def __init__(self, name: str, limit_seconds: float) -> None:
        self._name = name
        self._limit_seconds = limit_seconds
        self._num_items = 0
        self._since: float | None = None

    @contextmanager
    def waiting(self) -> Generator[None]:
        """Count the time inside; what is outside is the caller's."""
        self._since = time.monotonic()
        yield
        self._since = None
        self._num_items += 1

    @contextmanager
    def running(self) -> Generator[None]:
        """Look at the time now and then, in a thread."""
        ended = threading.Event()

        def look() -> None:
            while not ended.wait(self._limit_seconds / _LOOKS_PER_LIMIT):
                since = self._since
                if since is not None and time.monotonic() - since > self._limit_seconds:
                    self._end_process()

        threading.Thread(target=look, name=f"watch-{self._name}", daemon=True).start()
        try:
            yield
        finally:
            ended.set()

    def _end_process(self) -> None:
        logger.critical(
            "%s: nothing for %.0f s after %d items: rank 0 waits for a rank that takes no part "
            "(trainer.stall.export_seconds). The run ends without saving, with exit code %d; "
            "heartbeats/ in its folder has every rank's phase, and it goes on with --resume",
            *(self._name, self._limit_seconds, self._num_items, exit_codes.STALLED),
        )
        logging.shutdown()
        os._exit(exit_codes.STALLED)


def _is_alone() -> bool:
    return not dist.is_initialized() or dist.get_world_size() == 1


def _raise(error: BaseException) -> Never:
    raise error


def _failure_text(name: str, error: Exception) -> str:
    """Return the first failure that a rank noted; if there is none, note this one."""
    mine = f"rank {dist.get_rank()} failed in {name!r}: {type(error).__name__}: {error}"
    try:
        store = distributed_c10d._get_default_store()
        if store.check([_FAILURE_KEY]):
            return store.get(_FAILURE_KEY).decode()
        store.set(_FAILURE_KEY, mine)
    except (RuntimeError, ValueError) as store_error:  # the process that keeps it is gone
        logger.debug("the store cannot be asked for the cause: %s", store_error)
    return mine
