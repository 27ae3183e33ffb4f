"""The nursery: a process that imports the judge once and forks judging children on demand.

A fresh interpreter needs about a second to import math-verify, a fork of one that has it a few
milliseconds, so that a killed child is replaced at once. The nursery is started by the pool with
``exec``: it shares no memory, thread or lock with the trainer, and torch is never imported here.
It is the parent of the children and the only one that reaps them, so a process id that the pool
names is never one that the system has given to somebody else.

Requests on the control socket, one reply each:

* ``["spawn"]`` with one socket attached: fork a child that serves it; reply ``["child", pid]``.
* ``["end", pid]``: kill the child if it still runs, reap it; reply ``["ended", wait status]``.

The nursery ends when the control socket is closed or its parent is gone, and its children are
killed with it (``PR_SET_PDEATHSIG``). Standard library only.
"""

import ctypes
import gc
import importlib
import json
import os
import resource
import select
import signal
import socket
import sys
import time
from collections.abc import Callable
from types import CodeType

from prefixrl_mcore.rewards.wire import Json, encode, receive

type Judge = Callable[[Json], Json]
"""What a child runs on each payload."""

_ORPHAN_POLL_SECONDS = 1.0
_PR_SET_PDEATHSIG = 1
_IGNORED_SIGNALS = (
    # Ctrl-C, and the signals that a scheduler sends to every process of a job, are the trainer's
    # to handle: it may still want verdicts while it saves. Closing the pool ends the children.
    signal.SIGINT,
    signal.SIGTERM,
    signal.SIGHUP,
    signal.SIGUSR1,
    signal.SIGUSR2,
)


def main(arguments: list[str]) -> None:
    """Serve the control socket until it is closed.

    Args:
        arguments: one JSON object: ``control`` (file descriptor), ``parent`` (process id),
            ``judge`` (``module:function``), ``warm_up`` (payloads judged once before any fork),
            ``memory_limit_bytes`` (of a child, above its idle size).
    """
    options = json.loads(arguments[0])
    for number in _IGNORED_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    control = socket.socket(fileno=options["control"])
    try:
        judge = _import_judge(options["judge"])
        for payload in options["warm_up"]:
            judge(payload)
    # The outermost frame of this process: the pool raises what is reported here.
    except Exception as error:
        control.sendall(encode(["failed", f"{type(error).__name__}: {error}"]))
        return
    gc.collect()
    gc.freeze()  # keeps the collector from touching, and thereby copying, shared pages
    try:
        control.sendall(encode(["ready"]))
    except (BrokenPipeError, ConnectionResetError):
        return  # the parent failed early and is gone
    children: set[int] = set()
    while _wait_for_request(control, options["parent"]):
        if not _serve(control, judge, options["memory_limit_bytes"], children):
            break
    for pid in children:
        _end(pid)


def _import_judge(name: str) -> Judge:
    module, _, function = name.partition(":")
    return getattr(importlib.import_module(module), function)


def _wait_for_request(control: socket.socket, parent_pid: int) -> bool:
    """Return True when there is something to read, False when the parent is gone."""
    poller = select.poll()  # select() takes no descriptor above 1023, and trainers have many
    poller.register(control, select.POLLIN)
    while os.getppid() == parent_pid:
        if poller.poll(_ORPHAN_POLL_SECONDS * 1000):
            return True
    return False


def _serve(
    control: socket.socket, judge: Judge, memory_limit_bytes: int, children: set[int]
) -> bool:
    """Answer one request; return False when the control socket is closed."""
    message, descriptors = _receive_request(control)
    match message:
        case ["spawn"]:
            connection = socket.socket(fileno=descriptors[0])
            nursery_pid = os.getpid()
            pid = os.fork()
            if pid == 0:
                control.close()
                _run_child(connection, judge, memory_limit_bytes, nursery_pid)
            connection.close()
            children.add(pid)
            control.sendall(encode(["child", pid]))
        case ["end", int(pid)] if pid in children:
            children.remove(pid)
            control.sendall(encode(["ended", _end(pid)]))
        case _:
            return False
    return True


def _receive_request(control: socket.socket) -> tuple[Json, list[int]]:
    """Return the next request and the descriptors sent with it; ``None`` at end of file."""
    try:
        _, descriptors, _, _ = socket.recv_fds(control, 1, 1)  # one byte announces a request
        return receive(control), descriptors
    except (EOFError, ConnectionError):
        return None, []


def _end(pid: int) -> int:
    """Kill a child that still runs, reap it, and return its wait status."""
    os.kill(pid, signal.SIGKILL)  # a zombie takes it without effect and keeps its status
    return os.waitpid(pid, 0)[1]


def _run_child(
    connection: socket.socket, judge: Judge, memory_limit_bytes: int, nursery_pid: int
) -> None:
    """Be a judging child: never returns."""
    libc = ctypes.CDLL(None)
    libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != nursery_pid:  # the nursery died before the line above
        os._exit(0)
    try:
        limit_bytes = _confine(memory_limit_bytes)
        _judge_all(connection, judge, retire_above_bytes=limit_bytes - memory_limit_bytes // 2)
    # The outermost frame of this process; a fork must not run the nursery's own clean-up.
    except BaseException:
        os._exit(1)
    os._exit(0)


def _confine(memory_limit_bytes: int) -> int:
    """Silence this process and limit its memory; return the limit of its address space."""
    silence = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):  # parsers write complaints about malformed answers there
        os.dup2(silence, descriptor)
    limit = _address_space_bytes() + memory_limit_bytes
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    return limit


def _judge_all(connection: socket.socket, judge: Judge, *, retire_above_bytes: int) -> None:
    """Answer payloads in order until the connection is closed or this process has grown.

    Request: ``[job id, payload]``. Reply: ``[job id, status, value, seconds, is_retiring]`` with
    status ``done``, ``memory`` or ``error``; the value of an error is its type's name. A child
    that retires has kept so much memory that the next payload would not get half of the limit.
    """
    memory_watch = _MemoryWatch()
    is_retiring = False
    while not is_retiring:
        try:
            request = receive(connection)
        except (EOFError, ConnectionError):
            return
        if not isinstance(request, list):
            raise TypeError(f"expected [job id, payload], got {type(request).__name__}")
        job_id, payload = request
        started = time.perf_counter()
        status, value = _judge_one(judge, payload)
        if memory_watch.has_fired:
            status, value = "memory", None
        seconds = time.perf_counter() - started
        is_retiring = status == "memory" or _address_space_bytes() > retire_above_bytes
        connection.sendall(encode([job_id, status, value, seconds, is_retiring]))


class _MemoryWatch:
    """Notices every ``MemoryError``, also those that foreign code catches and forgets."""

    def __init__(self) -> None:
        self.has_fired = False
        monitoring = sys.monitoring
        monitoring.use_tool_id(monitoring.DEBUGGER_ID, "memory watch")
        monitoring.register_callback(
            monitoring.DEBUGGER_ID, monitoring.events.RAISE, self._on_raise
        )
        monitoring.set_events(monitoring.DEBUGGER_ID, monitoring.events.RAISE)

    def _on_raise(self, _code: CodeType, _offset: int, error: BaseException) -> None:
        if isinstance(error, MemoryError):
            self.has_fired = True


def _judge_one(judge: Judge, payload: Json) -> tuple[str, Json]:
    """Return (status, value); nothing that the payload makes the judge raise gets out."""
    try:
        return "done", judge(payload)
    # The outermost frame around foreign code: what it raises is a counted outcome of this payload
    # (math-verify's own exceptions derive from BaseException).
    except BaseException as error:
        return "error", type(error).__name__


def _address_space_bytes() -> int:
    with open("/proc/self/statm", encoding="ascii") as statm:
        return int(statm.read().split()[0]) * resource.getpagesize()


if __name__ == "__main__":
    main(sys.argv[1:])
