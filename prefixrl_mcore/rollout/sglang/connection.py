"""HTTP with JSON to one address: what is sent, what comes back, and how it can fail."""

import json
import math
import time
from collections.abc import Mapping
from typing import Any

import urllib3
from urllib3.connection import HTTPConnection, HTTPSConnection

from prefixrl_mcore.rollout.sglang.api_key import ApiKey
from prefixrl_mcore.rollout.sglang.faults import BadAnswer, ServerLost, ServerRefusal

_CONNECT_SECONDS = 5.0

_KEPT_SECONDS = 2.0
"""A connection that was idle for longer is not used again: a server closes it after 5 s, and a call
that is sent in that moment would be lost."""


class _PatientConnection(HTTPConnection):
    """Sends for as long as the call may take: a bucket of weights is hundreds of megabytes.

    urllib3 has one limit for connecting and for sending, of which only the first is to be short.
    """

    _answered = -math.inf

    @property
    def is_connected(self) -> bool:
        """Whether it may be used again."""
        return super().is_connected and time.monotonic() - self._answered < _KEPT_SECONDS

    def getresponse(self) -> urllib3.HTTPResponse:
        """Note when there was an answer."""
        response = super().getresponse()
        self._answered = time.monotonic()
        return response

    def connect(self) -> None:
        """Connect within ``_CONNECT_SECONDS``."""
        limit, self.timeout = self.timeout, _CONNECT_SECONDS
        super().connect()
        self.timeout = limit
        self.sock.settimeout(limit)


class _PatientTLSConnection(_PatientConnection, HTTPSConnection):
    """The same, encrypted."""


class _Pool(urllib3.HTTPConnectionPool):
    # urllib3's own connections fail pyright's check, too.
    ConnectionCls = _PatientConnection  # pyright: ignore[reportAssignmentType]


class _TLSPool(urllib3.HTTPSConnectionPool):
    ConnectionCls = _PatientTLSConnection  # pyright: ignore[reportAssignmentType]


class Connection:
    """Calls to one server; may be used by many threads."""

    def __init__(self, url: str, *, api_key: ApiKey | None, max_connections: int) -> None:
        """Prepare for the server at ``url``; nothing is sent yet.

        Args:
            url: its address.
            api_key: is brought along with every call.
            max_connections: are kept open for later calls; more are opened while they are needed.
        """
        self.url = url.rstrip("/")
        self._api_key = api_key
        self._pool = urllib3.PoolManager(maxsize=max_connections, retries=False)
        self._pool.pool_classes_by_scheme = {"http": _Pool, "https": _TLSPool}

    @property
    def has_key(self) -> bool:
        """Whether calls bring an API key."""
        return self._api_key is not None

    def close(self) -> None:
        """Close the connections that are open."""
        self._pool.clear()

    def call(
        self,
        method: str,
        path: str,
        payload: Mapping[str, Any] | bytes | None,
        timeout_seconds: float,
    ) -> bytes:
        """Return what is answered.

        Args:
            method: ``GET`` or ``POST``.
            path: of the endpoint.
            payload: is sent as JSON; bytes are JSON already.
            timeout_seconds: longest time to send the payload, and then to wait for the answer or
                for more of it.

        Raises:
            ServerLost: if no answer came.
            ServerRefusal: if it has another status than 200.
        """
        is_ready = payload is None or isinstance(payload, bytes)
        headers = {"Content-Type": "application/json"}
        if self._api_key is not None:
            headers |= self._api_key.headers
        try:
            response = self._pool.request(
                method,
                self.url + path,
                body=payload if is_ready else json.dumps(payload).encode(),
                headers=headers,
                timeout=timeout_seconds,
            )
        except (urllib3.exceptions.HTTPError, OSError) as error:
            raise ServerLost(f"{self.url}{path}: {error}") from error
        if response.status != 200:
            raise ServerRefusal(path, response.status, response.data.decode(errors="replace"))
        return response.data

    def get_object(self, path: str, timeout_seconds: float) -> Mapping[str, Any]:
        """Return the JSON object that a GET is answered with.

        Raises:
            ServerFault: as ``call``; if it is none.
        """
        return self._object(path, self.call("GET", path, None, timeout_seconds))

    def post_for_object(
        self, path: str, payload: Mapping[str, Any], timeout_seconds: float
    ) -> Mapping[str, Any]:
        """Return the JSON object that a POST is answered with.

        Raises:
            ServerFault: as ``call``; if it is none.
        """
        return self._object(path, self.call("POST", path, payload, timeout_seconds))

    def post_for_objects(
        self, path: str, payload: Mapping[str, Any], timeout_seconds: float
    ) -> list[dict[str, Any]]:
        """Return the JSON objects that a POST is answered with; one without a list is one.

        Raises:
            ServerFault: as ``call``; if it is neither.
        """
        data = self.call("POST", path, payload, timeout_seconds)
        parsed = self._parse(path, data)
        answers = parsed if isinstance(parsed, list) else [parsed]
        found = [answer for answer in answers if isinstance(answer, dict)]
        if len(found) < len(answers):
            raise BadAnswer(f"{self.url}{path}: expected JSON objects, got {_start_of(data)}")
        return found

    def control(
        self, path: str, payload: Mapping[str, Any] | bytes, timeout_seconds: float
    ) -> None:
        """Post what is answered with success or not.

        Raises:
            ServerFault: as ``call``; a ServerRefusal also for an answer with ``success: false``.
        """
        data = self.call("POST", path, payload, timeout_seconds)
        try:
            answer = json.loads(data) if data else None
        except ValueError:  # no JSON, or no text at all
            return  # some endpoints answer in prose
        if isinstance(answer, dict) and answer.get("success") is False:
            raise ServerRefusal(path, 200, data.decode(errors="replace"))

    def _object(self, path: str, data: bytes) -> Mapping[str, Any]:
        parsed = self._parse(path, data)
        if not isinstance(parsed, dict):
            raise BadAnswer(f"{self.url}{path}: expected a JSON object, got {_start_of(data)}")
        return parsed

    def _parse(self, path: str, data: bytes) -> object:
        try:
            return json.loads(data)
        except ValueError as error:
            raise BadAnswer(
                f"{self.url}{path}: expected JSON, got {_start_of(data)}: {error}"
            ) from error


def _start_of(data: bytes) -> str:
    """Render the beginning of an answer."""
    return repr(data[:200].decode(errors="replace"))
