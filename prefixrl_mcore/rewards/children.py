"""Handles on the judging processes: the nursery that forks them, and each of them.

The other side is ``nursery.py``. Nothing here decides what a payload is worth; see ``pool.py``.
"""

import json
import os
import socket
import subprocess
import sys
import time
from collections import deque
from dataclasses import dataclass, field

from prefixrl_mcore.rewards.wire import Inbox, Json, encode, receive

_REPLY_TIMEOUT_SECONDS = 120.0
"""For importing the judge, or forking one child, on a machine that is busy with training."""
_CLOSE_TIMEOUT_SECONDS = 5.0
_RECEIVE_BYTES = 1 << 16
_BOOT = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); "
    "from prefixrl_mcore.rewards.nursery import main; main(sys.argv[2:])"
)


class ChildLostError(RuntimeError):
    """A judging process has ended, or answers with something that is not a reply."""


class NurseryLostError(RuntimeError):
    """The nursery has ended and its children with it; no payload is to blame, it judges none."""


@dataclass(kw_only=True, slots=True, eq=False)
class Child:
    """One judging process: what it was given, and how long it has been at the first of it."""

    pid: int
    """Process id; it stays this child's until ``Nursery.end``."""

    connection: socket.socket
    """Our end of the pair, not blocking."""

    inbox: Inbox = field(default_factory=Inbox)
    """What it has sent so far of an unfinished reply."""

    outbox: bytearray = field(default_factory=bytearray)
    """What it has not taken yet of its payloads."""

    assigned: deque[int] = field(default_factory=deque)
    """Ids of its payloads without a reply, in order; the first one is being judged."""

    head_since: float = 0.0
    """``time.monotonic`` when the first assigned payload became the first."""

    def assign(self, payloads: list[tuple[int, Json]]) -> None:
        """Put (id, payload) pairs into the outbox of a child that has nothing to do."""
        self.head_since = time.monotonic()
        for payload_id, payload in payloads:
            self.assigned.append(payload_id)
            self.outbox += encode([payload_id, payload])

    def send(self) -> None:
        """Send as much of the outbox as goes without waiting.

        Raises:
            ChildLostError: if the child has ended.
        """
        try:
            while self.outbox:
                del self.outbox[: self.connection.send(self.outbox)]
        except BlockingIOError:
            return
        except ConnectionError:
            raise ChildLostError("the child has ended") from None

    def receive(self) -> list[Json]:
        """Return the replies that have arrived, without waiting; possibly none.

        Raises:
            ChildLostError: if the child has ended and every reply it sent has been returned.
        """
        data = b""
        try:
            while chunk := self.connection.recv(_RECEIVE_BYTES):
                data += chunk
        except BlockingIOError:
            return self._parse(data)
        except ConnectionError:
            pass
        if not data:
            raise ChildLostError("the child has ended")
        return self._parse(data)

    def has_hung_up(self) -> bool:
        """An idle child has nothing to say: whatever there is to read means that it is unusable."""
        try:
            self.connection.recv(1)
        except BlockingIOError:
            return False
        except ConnectionError:
            return True
        return True

    def _parse(self, data: bytes) -> list[Json]:
        try:
            return self.inbox.feed(data)
        except ValueError as error:
            raise ChildLostError(f"the child sent garbage: {error}") from None


class Nursery:
    """The process that forks children; starts at once and is ready after the judge's import.

    Args:
        judge: ``module:function``.
        memory_limit_bytes: address space of one child above its idle size.
        warm_up: payloads judged once before any fork.
    """

    def __init__(self, *, judge: str, memory_limit_bytes: int, warm_up: list[Json]) -> None:
        self.control, theirs = socket.socketpair()
        self.control.settimeout(_REPLY_TIMEOUT_SECONDS)
        self._owner_pid = os.getpid()
        self._is_ready = False
        options: dict[str, Json] = {
            "judge": judge,
            "memory_limit_bytes": memory_limit_bytes,
            "warm_up": warm_up,
            "control": theirs.fileno(),
            "parent": self._owner_pid,
        }
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, "-c", _BOOT, json.dumps(sys.path), json.dumps(options)],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                # A fixed hash seed: sympy's orderings, and with them verdicts, are reproducible.
                env={**os.environ, "PYTHONHASHSEED": "0"},
            )

    def wait_until_ready(self) -> None:
        """Wait for the judge's import.

        Raises:
            RuntimeError: if the judge could not be imported, or the process could not start.
        """
        if self._is_ready:
            return
        try:
            reply = receive(self.control)
        except (OSError, EOFError) as error:
            raise RuntimeError(
                f"the judging process did not start: {str(error) or type(error).__name__}, "
                f"exit code {self.process.poll()}; its standard error says why"
            ) from None
        if reply != ["ready"]:
            raise RuntimeError(f"the judging process did not start: {reply}")
        self._is_ready = True

    def spawn(self) -> Child:
        """Return a new child.

        Raises:
            NurseryLostError: if the nursery has ended.
        """
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        try:
            with theirs:
                reply = self._ask(["spawn"], [theirs.fileno()])
        except NurseryLostError:
            ours.close()
            raise
        match reply:
            case ["child", int(pid)]:
                return Child(pid=pid, connection=ours)
            case _:
                raise NurseryLostError(f"expected a child, got {reply}")

    def end(self, child: Child) -> int:
        """Kill and reap a child; return its exit code, negative for a signal.

        Raises:
            NurseryLostError: if the nursery has ended.
        """
        child.connection.close()
        match self._ask(["end", child.pid], []):
            case ["ended", int(status)]:
                return os.waitstatus_to_exitcode(status)
            case reply:
                raise NurseryLostError(f"expected a child's end, got {reply}")

    def close(self) -> None:
        """End the nursery and thereby its children; in a forked copy only close the socket."""
        self.control.close()
        if os.getpid() != self._owner_pid:
            return
        try:
            self.process.wait(_CLOSE_TIMEOUT_SECONDS)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def _ask(self, request: Json, descriptors: list[int]) -> Json:
        """Send one request and wait for its reply."""
        try:
            # One byte announces a request: descriptors travel with the bytes of one receive call.
            socket.send_fds(self.control, [b"!"], descriptors)
            self.control.sendall(encode(request))
            return receive(self.control)
        except (OSError, EOFError) as error:
            raise NurseryLostError(str(error) or type(error).__name__) from None
