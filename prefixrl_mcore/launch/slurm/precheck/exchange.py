"""How nodes and the first of them talk during the pre-check: one JSON line each way over TCP.

Not through the job's folder, because that is one of the things that are checked. The port is that
of the later rendezvous, so whoever gets through here gets through there.
"""

import hmac
import json
import socket
import socketserver
import time
from collections.abc import Callable
from typing import Any

_POLL_SECONDS = 0.5
_ANSWER_SECONDS = 10.0

Answer = Callable[[dict[str, Any]], dict[str, Any]]
"""Called in a thread per request; what it returns is sent back."""


class Listener(socketserver.ThreadingTCPServer):
    """Answers the requests of those who know the job's token."""

    allow_reuse_address = True
    daemon_threads = True
    request_queue_size = 1024

    def __init__(self, port: int, token: str, answer: Answer) -> None:
        """Listen on all addresses.

        Raises:
            OSError: if somebody else does.
        """
        self.token, self.answer = token, answer
        super().__init__(("", port), _Request)


class _Request(socketserver.StreamRequestHandler):
    """One request; a wrong one is left without an answer."""

    timeout = _ANSWER_SECONDS

    def handle(self) -> None:
        assert isinstance(self.server, Listener), "made by the Listener alone"
        try:
            request = json.loads(self.rfile.readline())
            if not hmac.compare_digest(str(request.pop("token", "")), self.server.token):
                return
            answer = self.server.answer(request)
            self.wfile.write(json.dumps(answer).encode() + b"\n")
            self.rfile.read()  # until the other side closes: then no address stays in use here
        except (OSError, ValueError, AttributeError):  # somebody else's connection
            return


def ask(
    host: str, port: int, token: str, request: dict[str, Any], *, deadline: float
) -> dict[str, Any]:
    """Send a request and return the answer; tries again until the deadline.

    Args:
        host: the first node.
        port: where it listens.
        token: of the job.
        request: anything that JSON can hold.
        deadline: ``time.monotonic()`` at which to give up.

    Raises:
        RuntimeError: if there is no answer until then, with the last cause.
    """
    while True:
        try:
            with socket.create_connection((host, port), timeout=_ANSWER_SECONDS) as connection:
                connection.sendall(json.dumps({**request, "token": token}).encode() + b"\n")
                with connection.makefile("rb") as stream:
                    return json.loads(stream.readline())
        except (OSError, ValueError) as error:
            if time.monotonic() > deadline:
                raise RuntimeError(f"{host}:{port} does not answer: {error}") from None
        time.sleep(_POLL_SECONDS)


def clock_offset(
    host: str, port: int, token: str, *, deadline: float, num_tries: int = 3
) -> tuple[float, dict[str, Any]]:
    """Return how far this node's clock is ahead of the first node's, and that node's last answer.

    Of some tries the quickest counts; half the time that it took is the uncertainty.

    Raises:
        RuntimeError: as ``ask``.
    """
    tries: list[tuple[float, float]] = []
    answer: dict[str, Any] = {}
    for _ in range(num_tries):
        before = time.time()
        answer = ask(host, port, token, {"what": "hello"}, deadline=deadline)
        after = time.time()
        tries.append((after - before, (before + after) / 2 - answer["unix_seconds"]))
    return min(tries)[1], answer
