"""How long a call may take to connect, and how long to send."""

import http.server
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from urllib3.util import connection as urllib3_connection

from prefixrl_mcore.rollout.sglang import connection as sglang_connection
from prefixrl_mcore.rollout.sglang.connection import Connection
from prefixrl_mcore.rollout.sglang.faults import ServerLost

MORE_THAN_THE_KERNEL_TAKES = b"1" * 50_000_000


@contextmanager
def reader(pause_seconds: float) -> Iterator[str]:
    """Serve calls one after the other, each read after a pause; yield the URL."""
    ended = threading.Event()

    def answer(client: socket.socket) -> None:
        data = client.makefile("rb")
        while not ended.wait(pause_seconds):
            length = 0
            while (line := data.readline()) != b"\r\n":
                if not line:
                    return
                if line.lower().startswith(b"content-length"):
                    length = int(line.split(b":")[1])
            data.read(length)
            client.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\ndone")

    def serve() -> None:
        client, _ = listener.accept()
        with client:
            answer(client)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        ended.set()
    thread.join(10)


def test_large_body_is_sent_for_as_long_as_the_call_may_take(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sglang_connection, "_CONNECT_SECONDS", 0.2)
    monkeypatch.setattr(sglang_connection, "_KEPT_SECONDS", 60.0)
    with reader(0.6) as url:
        server = Connection(url, api_key=None, max_connections=1)
        for _ in range(2):  # over a new connection, and over one that was kept
            assert server.call("POST", "/weights", MORE_THAN_THE_KERNEL_TAKES, 20.0) == b"done"
        server.close()


def test_body_that_nobody_reads_is_given_up_after_the_limit() -> None:
    with reader(20.0) as url:
        server = Connection(url, api_key=None, max_connections=1)
        started = time.monotonic()
        with pytest.raises(ServerLost, match="timed out"):
            server.call("POST", "/weights", MORE_THAN_THE_KERNEL_TAKES, 0.5)
        assert 0.4 < time.monotonic() - started < 10
        server.close()


def test_nobody_waits_long_for_a_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    limits: list[object] = []

    def refuse(address: object, timeout: object, **_: object) -> socket.socket:
        limits.append(timeout)
        raise TimeoutError

    monkeypatch.setattr(urllib3_connection, "create_connection", refuse)
    for scheme in ("http", "https"):
        server = Connection(f"{scheme}://127.0.0.1:9", api_key=None, max_connections=1)
        with pytest.raises(ServerLost):
            server.call("GET", "/", None, 3600.0)

    assert limits == [5.0, 5.0]


@pytest.mark.parametrize(("kept_seconds", "pause_seconds"), [(60.0, 0.0), (0.2, 0.4)])
def test_connection_that_its_server_may_be_about_to_close_is_not_used_again(
    monkeypatch: pytest.MonkeyPatch, kept_seconds: float, pause_seconds: float
) -> None:
    connections: list[object] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        """Closes a connection in the moment in which a late call comes."""

        protocol_version = "HTTP/1.1"
        last = float("inf")

        def do_GET(self) -> None:
            now = time.monotonic()
            if now - self.last > kept_seconds:
                self.close_connection = True
                return
            self.last = now
            connections.append(self.client_address)
            self.send_response(200)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:
            """Say nothing."""

    monkeypatch.setattr(sglang_connection, "_KEPT_SECONDS", kept_seconds)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as listener:
        thread = threading.Thread(target=listener.serve_forever, args=(0.02,), daemon=True)
        thread.start()
        server = Connection(
            f"http://127.0.0.1:{listener.server_port}", api_key=None, max_connections=1
        )
        server.call("GET", "/", None, 5.0)
        time.sleep(pause_seconds)
        server.call("GET", "/", None, 5.0)
        server.close()
        listener.shutdown()
        thread.join(10)

    assert len(set(connections)) == (1 if pause_seconds == 0.0 else 2)
