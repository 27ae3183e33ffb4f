"""HTTP calls to a SGLang server: what is sent, what comes back, and what went wrong."""

import base64
import json
import pickle
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import urllib3
from torch import Tensor

from prefixrl_mcore.rollout.sglang.protocol import ServerProtocol, read_protocol
from prefixrl_mcore.rollout.weight_names import WeightCoverage

_CONNECT_SECONDS = 5.0
_HEALTH_SECONDS = 5.0
_CONTROL_SECONDS = 600.0
"""Limit of control calls: a flush is quick, a bucket of weights may be large."""

_BUCKET_BYTES = 256 * 1024**2
"""Weights that are sent in one call; base64 makes a third more of them."""

MAX_CONNECTIONS = 256
"""Requests in flight at once; the server has a queue of its own."""


class ServerLost(RuntimeError):  # noqa: N818 -- not an error of the caller's
    """The server did not answer: connection refused or broken, or the time ran out."""


class ServerRefusal(RuntimeError):  # noqa: N818 -- an answer, though a bad one
    """The server answered with an HTTP error."""

    def __init__(self, path: str, status: int, text: str) -> None:
        """Keep what was answered."""
        super().__init__(path, status, text)
        self.path, self.status, self.text = path, status, text

    def __str__(self) -> str:
        """Name the endpoint, the status and the server's words."""
        return f"{self.path} answered {self.status}: {self.text[:1000]}"


class SGLangClient:
    """One server's endpoints; may be used by many threads."""

    def __init__(self, url: str, *, request_timeout_seconds: float) -> None:
        """Prepare for the server at ``url``; nothing is sent yet."""
        self.url = url.rstrip("/")
        self._request_timeout_seconds = request_timeout_seconds
        self._pool = urllib3.PoolManager(maxsize=MAX_CONNECTIONS, retries=False)
        self._protocol: ServerProtocol | None = None

    def close(self) -> None:
        """Close the connections that are open."""
        self._pool.clear()

    def is_healthy(self) -> bool:
        """Return whether ``/health`` answers 200 at once."""
        try:
            self._call("GET", "/health", None, _HEALTH_SECONDS)
        except (ServerLost, ServerRefusal):
            return False
        return True

    def model_info(self) -> Mapping[str, Any]:
        """Return what the server says of its model, ``weight_version`` included."""
        return json.loads(self._call("GET", "/model_info", None, _CONTROL_SECONDS))

    def server_info(self) -> Mapping[str, Any]:
        """Return the server's arguments, limits and ``version``."""
        return json.loads(self._call("GET", "/server_info", None, _CONTROL_SECONDS))

    def detect_protocol(self, server_info: Mapping[str, Any]) -> ServerProtocol:
        """Return what the server can do, and remember it until this is called again.

        Args:
            server_info: from ``server_info``.

        Raises:
            ServerLost: if the server does not answer.
            EngineError: if its version is not supported.
        """
        self._protocol = read_protocol(
            server_info,
            has_update_sessions=self._has_endpoint("/begin_weight_update"),
            url=self.url,
        )
        return self._protocol

    def _has_endpoint(self, path: str) -> bool:
        """Return whether the server knows a path that may only be posted to, without posting."""
        try:
            self._call("GET", path, None, _CONTROL_SECONDS)
        except ServerRefusal as refusal:
            if refusal.status not in (404, 405):
                raise
            return refusal.status == 405
        return True

    def generate(self, payload: Mapping[str, Any]) -> list[dict[str, Any]]:
        """Return one answer per sample, in order.

        Raises:
            ServerLost: if no answer came.
            ServerRefusal: if the payload was refused.
        """
        data = self._call("POST", "/generate", payload, self._request_timeout_seconds)
        answers = json.loads(data)
        return answers if isinstance(answers, list) else [answers]

    def abort(self, request_id: str | None = None) -> None:
        """Drop one request, or all of them, if the server still answers."""
        payload = {"abort_all": True} if request_id is None else {"rid": request_id}
        try:
            self._call("POST", "/abort_request", payload, _HEALTH_SECONDS)
        except (ServerLost, ServerRefusal):
            return

    def pause(self) -> None:
        """Stop inference; requests in flight keep their state."""
        self._control("/pause_generation", {"mode": "in_place"})

    def resume(self) -> None:
        """Go on after ``pause``."""
        self._control("/continue_generation", {})

    def sleep(self) -> None:
        """Free device memory."""
        self._control("/release_memory_occupation", {})

    def wake(self) -> None:
        """Take device memory again."""
        self._control("/resume_memory_occupation", {})

    def begin_update(self) -> bool:
        """Open a session of weight updates; return False where the server knows none.

        A session that a killed trainer left open is ended first.
        """
        protocol = self._protocol or self.detect_protocol(self.server_info())
        if not protocol.has_update_sessions:
            return False
        try:
            self._control("/begin_weight_update", {})
        except ServerRefusal:
            self._control("/end_weight_update", {})
            self._control("/begin_weight_update", {})
        return True

    def end_update(self) -> None:
        """Close the session."""
        self._control("/end_weight_update", {})

    def update_weights(
        self, serialized: str, *, num_ranks: int, weight_version: str | None
    ) -> None:
        """Load one bucket of weights; the last one also forgets all keys and values.

        Nothing may be in flight: the flush would be refused, though the weights had changed. (The
        endpoint for flushing would do as well, but returns memory to the system too, which takes
        ten times as long as the update of a small model.)

        Args:
            serialized: from ``serialize_weights``.
            num_ranks: tensor-parallel ranks; each takes its part of the full tensors.
            weight_version: name of the weights from now on; None until the last bucket.
        """
        payload: dict[str, Any] = {
            "serialized_named_tensors": [serialized] * num_ranks,
            "flush_cache": weight_version is not None,
        }
        if weight_version is not None:
            payload["weight_version"] = weight_version
        self._control("/update_weights_from_tensor", payload)

    def _control(self, path: str, payload: Mapping[str, Any]) -> None:
        """Post; raise ServerRefusal also for an answer that says ``success: false``."""
        data = self._call("POST", path, payload, _CONTROL_SECONDS)
        try:
            answer = json.loads(data) if data else None
        except json.JSONDecodeError:
            return  # some endpoints answer in prose
        if isinstance(answer, dict) and answer.get("success") is False:
            raise ServerRefusal(path, 200, data.decode(errors="replace"))

    def _call(
        self, method: str, path: str, payload: Mapping[str, Any] | None, timeout_seconds: float
    ) -> bytes:
        try:
            response = self._pool.request(
                method,
                self.url + path,
                body=None if payload is None else json.dumps(payload).encode(),
                headers={"Content-Type": "application/json"},
                timeout=urllib3.Timeout(connect=_CONNECT_SECONDS, read=timeout_seconds),
            )
        except (urllib3.exceptions.HTTPError, OSError) as error:
            raise ServerLost(f"{self.url}{path}: {error}") from error
        if response.status != 200:
            raise ServerRefusal(path, response.status, response.data.decode(errors="replace"))
        return response.data


def generate_payload(
    *,
    context_token_ids: Sequence[int],
    num_samples: int,
    max_new_tokens: int,
    temperature: float,
    stop_token_ids: Sequence[int],
    request_id: str,
) -> dict[str, Any]:
    """Return the body of ``/generate`` for one context.

    Every parameter that shapes the distribution is given: a model's generation config must not
    bring its own top-p or top-k. With ``num_samples`` above 1 the server computes the context
    first and takes it from its cache for every sample.
    """
    parameters: dict[str, Any] = {
        "n": num_samples,
        "max_new_tokens": max_new_tokens,
        "temperature": temperature,
        "top_p": 1.0,
        "top_k": -1,
        "min_p": 0.0,
        "frequency_penalty": 0.0,
        "presence_penalty": 0.0,
        "repetition_penalty": 1.0,
        "stop_token_ids": list(stop_token_ids),
        # True switches all stop tokens off, ours too.
        "ignore_eos": not stop_token_ids,
        "skip_special_tokens": False,
    }
    return {
        "input_ids": list(context_token_ids),
        "sampling_params": parameters,
        "return_logprob": True,
        "logprob_start_len": -1,
        "rid": request_id,
    }


def serialize_weights(
    weights: Iterable[tuple[str, Tensor]], coverage: WeightCoverage, dtype: torch.dtype
) -> list[str]:
    """Return the weights as the server reads them, in buckets: plain pickles, by value.

    Raises:
        EngineError: if the weights are not exactly those of ``coverage``.
    """
    buckets: list[str] = []
    bucket: list[tuple[str, Tensor]] = []
    num_bytes = 0
    for name, weight in weights:
        if not coverage.is_to_load(name, tuple(weight.shape)):
            continue
        bucket.append((name, weight.detach().to(device="cpu", dtype=dtype).contiguous()))
        num_bytes += weight.numel() * dtype.itemsize
        if num_bytes >= _BUCKET_BYTES:
            buckets.append(_pickled(bucket))
            bucket, num_bytes = [], 0
    coverage.check_complete()
    return [*buckets, _pickled(bucket)] if bucket else buckets


def _pickled(bucket: list[tuple[str, Tensor]]) -> str:
    # A view would be pickled with all of the storage that it looks at.
    own = [(name, weight.clone()) for name, weight in bucket]
    with _stock_storage_pickles():
        return base64.b64encode(pickle.dumps(own, protocol=4)).decode("ascii")


@contextmanager
def _stock_storage_pickles() -> Iterator[None]:
    """Let pickled tensors name torch's own loader of storages, as a server expects.

    Importing megatron-core replaces ``torch.storage._load_from_bytes``; tensors pickled after that
    name megatron's function, which the server's process does not have and refuses.
    """
    replaced = torch.storage._load_from_bytes
    torch.storage._load_from_bytes = _load_from_bytes
    try:
        yield
    finally:
        torch.storage._load_from_bytes = replaced


def _load_from_bytes(data: bytes) -> object:
    """Stand for torch's function of this name in a pickle; only its name is ever used."""
    raise NotImplementedError("torch.storage._load_from_bytes takes its place when it is read")


_load_from_bytes.__module__ = "torch.storage"
