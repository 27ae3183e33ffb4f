"""The port of a server that is not started before somebody asks for it.

A server sizes its memory by what is free on its GPUs when it starts. Beside a trainer it must
therefore start after the policy is built, and after a death in its sleep not during an update. Both
are when the trainer looks for it, so its first request is what a start waits for.
"""

import secrets
import socketserver
from collections.abc import Callable
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler

from prefixrl_mcore.rollout.engine import EngineError
from prefixrl_mcore.rollout.sglang.api_key import ApiKey

_POLL_SECONDS = 0.5
_REQUEST_SECONDS = 5.0
"""How long somebody who connects may take to say what he wants; others wait meanwhile."""


def wait_for_call(port: int, key: ApiKey, *, is_ending: Callable[[], bool]) -> bool:
    """Hold a port until a request with the key comes, which is told to come back later.

    Args:
        port: of the server, on all addresses of this machine; free again on return.
        key: of the server; other requests, such as those of a port scanner, do not count.
        is_ending: whether to give up.

    Returns:
        Whether somebody called.

    Raises:
        EngineError: if the port is taken.
    """
    try:
        door = _Door(port, key)
    except OSError as error:
        raise EngineError(
            f"port {port}, which the job has for a rollout server, cannot be used: "
            f"{error.strerror}; find out what listens there (ss --listening --tcp --processes)"
        ) from None
    with door:
        while not door.was_called and not is_ending():
            door.handle_request()
    return door.was_called


class _Door(socketserver.TCPServer):
    """Answers each request with 503, and notices one that has the key."""

    allow_reuse_address = True
    timeout = _POLL_SECONDS

    def __init__(self, port: int, key: ApiKey) -> None:
        super().__init__(("", port), _Caller)
        self.key = key
        self.was_called = False


class _Caller(BaseHTTPRequestHandler):
    """One request."""

    timeout = _REQUEST_SECONDS

    def do_GET(self) -> None:
        """Answer, and remember who has the key."""
        door = self.server
        assert isinstance(door, _Door), "made by it"
        expected = door.key.headers["Authorization"].encode()
        given = self.headers.get("Authorization", "").encode()
        door.was_called |= secrets.compare_digest(given, expected)
        self.send_response(HTTPStatus.SERVICE_UNAVAILABLE)
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_POST = do_GET  # noqa: N815 -- called by its name

    def log_message(self, format: str, *arguments: object) -> None:
        """Say nothing: the caller polls."""
