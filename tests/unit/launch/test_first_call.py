"""A server's port before the server: who calls, who does not, and that it is free afterwards."""

import socket
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from prefixrl_mcore.launch.slurm.first_call import wait_for_call
from prefixrl_mcore.rollout.engine import EngineError
from prefixrl_mcore.rollout.sglang.api_key import ApiKey
from prefixrl_mcore.rollout.sglang.client import SGLangClient
from tests.support.ports import free_port
from tests.support.waiting import wait_until

KEY = ApiKey("0123456789abcdef")


@pytest.fixture
def port() -> int:
    return free_port()


def _client(port: int, key: ApiKey | None) -> SGLangClient:
    return SGLangClient(f"http://127.0.0.1:{port}", request_timeout_seconds=5, api_key=key)


def test_the_trainers_look_at_the_server_is_a_call_and_no_health(port: int) -> None:
    strangers = (None, ApiKey("another-key-of-others"))
    is_over = threading.Event()
    with ThreadPoolExecutor(1) as thread:
        waiting = thread.submit(wait_for_call, port, KEY, is_ending=is_over.is_set)
        try:
            wait_until(lambda: _is_open(port))
            assert not any(_client(port, key).is_healthy() for key in strangers)
            assert not waiting.done()  # a port scanner starts no server
            assert not _client(port, KEY).is_healthy()
            assert waiting.result(20)
        finally:
            is_over.set()  # the executor waits for its thread
    with socket.socket() as server:  # as the server does it, at once
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        server.bind(("", port))


def _is_open(port: int) -> bool:
    with socket.socket() as one:
        return one.connect_ex(("127.0.0.1", port)) == 0


def test_nobody_calls_before_the_end(port: int) -> None:
    ending = threading.Event()
    ending.set()
    assert not wait_for_call(port, KEY, is_ending=ending.is_set)


def test_a_port_that_is_taken_is_named(port: int) -> None:
    with socket.socket() as other:
        other.bind(("", port))
        other.listen()
        with pytest.raises(EngineError, match=f"^port {port}, .* Address already in use; find out"):
            wait_for_call(port, KEY, is_ending=lambda: False)
