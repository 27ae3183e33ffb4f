"""The endpoints of a SGLang server, as this project uses them, and how long each may take."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from prefixrl_mcore.rollout.engine import EngineError
from prefixrl_mcore.rollout.sglang.api_key import ApiKey
from prefixrl_mcore.rollout.sglang.connection import Connection
from prefixrl_mcore.rollout.sglang.faults import BadAnswer, ServerFault, ServerRefusal
from prefixrl_mcore.rollout.sglang.protocol import ServerProtocol, read_protocol

_HEALTH_SECONDS = 5.0
_INFO_SECONDS = 30.0
_CONTROL_SECONDS = 600.0
"""Limit of control calls that may take long."""

_END_SECONDS = 300.0
"""Limit of the end of an update, at which a server may pack its weights anew."""

_SHORT_SECONDS = 60.0
"""Limit of control calls that wait for no more than the step under way, or for idleness."""

_IDLE_SECONDS = 30.0
"""How long a server may take, after its last answer, until it counts itself as idle."""

_WARM_UP_TOKENS = 8

_UPDATED_NOT_FLUSHED = "but the cache was not flushed"
"""Part of a refusal that says that the weights were loaded."""


class SGLangClient:
    """One server's endpoints; may be used by many threads."""

    def __init__(
        self,
        url: str,
        *,
        request_timeout_seconds: float,
        api_key: ApiKey | None = None,
        max_connections: int = 16,
    ) -> None:
        """Prepare for the server at ``url``; nothing is sent yet.

        Args:
            url: its address.
            request_timeout_seconds: limit of ``generate``.
            api_key: is brought along with every call.
            max_connections: are kept open for later calls; more are opened while they are needed.
        """
        self._connection = Connection(url, api_key=api_key, max_connections=max_connections)
        self._request_timeout_seconds = request_timeout_seconds
        self._protocol: ServerProtocol | None = None

    @property
    def url(self) -> str:
        """The server's address."""
        return self._connection.url

    def close(self) -> None:
        """Close the connections that are open."""
        self._connection.close()

    def is_healthy(self) -> bool:
        """Return whether the HTTP process, which listens once the model is loaded, answers at once.

        Not ``/health``: a stock server samples a token for it, which a paused one never does.
        """
        try:
            self._connection.call("GET", "/model_info", None, _HEALTH_SECONDS)
        except ServerRefusal as refusal:
            return refusal.status == 401  # the next call says what to do about the key
        except ServerFault:
            return False
        return True

    def check_guard(self) -> None:
        """Make sure that a server with an API key refuses those who do not bring it.

        Raises:
            EngineError: if it lets them in, or does not answer.
        """
        if not self._connection.has_key:
            return
        stranger = SGLangClient(self.url, request_timeout_seconds=_HEALTH_SECONDS)
        try:
            stranger.weight_version()
        except ServerRefusal as refusal:
            if refusal.status == 401:
                return
            raise EngineError(f"SGLang: {refusal}") from refusal
        except ServerFault as fault:
            raise EngineError(f"SGLang: {fault}") from fault
        finally:
            stranger.close()
        raise EngineError(
            f"SGLang: the server at {self.url} answers without the API key; it was started without "
            "one, or its version does not protect /model_info"
        )

    def check_progress(self, timeout_seconds: float) -> None:
        """Return when the model itself shows a sign of life: an answer to anyone, or one token.

        ``is_healthy`` is answered by the HTTP process, also while the one with the model hangs.
        A paused server shows none.

        Raises:
            ServerFault: if there is none in time.
        """
        self._connection.call("GET", "/health_generate", None, timeout_seconds)

    def warm_up(self, timeout_seconds: float) -> None:
        """Return when a prefill and some decoding steps are through.

        Raises:
            ServerFault: if they are not in time.
        """
        parameters = {"max_new_tokens": _WARM_UP_TOKENS, "temperature": 0.0, "ignore_eos": True}
        payload = {"input_ids": [0], "sampling_params": parameters, "rid": "warm-up"}
        self._connection.call("POST", "/generate", payload, timeout_seconds)

    def weight_version(self) -> str:
        """Return the name of the weights that the server has.

        Raises:
            ServerFault: if it does not say.
        """
        info = self.model_info()
        if "weight_version" not in info:
            raise BadAnswer(f"{self.url}/model_info: expected a weight_version, got {info}")
        return str(info["weight_version"])

    def model_info(self) -> Mapping[str, Any]:
        """Return the model's path, architecture and name of the weights.

        Raises:
            ServerFault: if it does not say.
        """
        return self._connection.get_object("/model_info", _INFO_SECONDS)

    def server_info(self) -> Mapping[str, Any]:
        """Return the server's arguments, limits and ``version``.

        Raises:
            ServerFault: if it does not say.
        """
        return self._connection.get_object("/server_info", _INFO_SECONDS)

    @property
    def protocol(self) -> ServerProtocol:
        """What the server can do, as detected last; ``detect_protocol`` must have been called."""
        assert self._protocol is not None, f"the protocol of {self.url} was not detected"
        return self._protocol

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
            self._connection.call("GET", path, None, _CONTROL_SECONDS)
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
            BadAnswer: if the answer is not JSON objects.
        """
        return self._connection.post_for_objects(
            "/generate", payload, self._request_timeout_seconds
        )

    def abort(self) -> None:
        """Drop all requests, if the server still answers."""
        try:
            self._connection.call("POST", "/abort_request", {"abort_all": True}, _HEALTH_SECONDS)
        except ServerFault:
            return

    def pause(self) -> None:
        """Stop inference; requests in flight keep their state."""
        self._control("/pause_generation", {"mode": "in_place"}, _SHORT_SECONDS)

    def resume(self) -> None:
        """Go on after ``pause``."""
        self._control("/continue_generation", {}, _SHORT_SECONDS)

    def release_memory(self, tags: Sequence[str]) -> None:
        """Free the device memory of ``weights`` or ``kv_cache``; nothing may be in flight."""
        self._control("/release_memory_occupation", {"tags": list(tags)}, _CONTROL_SECONDS)

    def resume_memory(self, tags: Sequence[str]) -> None:
        """Take device memory again; each of ``tags`` must have been released."""
        self._control("/resume_memory_occupation", {"tags": list(tags)}, _CONTROL_SECONDS)

    def begin_update(self) -> bool:
        """Open a session of weight updates; return False where the server knows none.

        A session that a killed trainer left open is ended first.
        """
        protocol = self._protocol or self.detect_protocol(self.server_info())
        if not protocol.has_update_sessions:
            return False
        try:
            self._control("/begin_weight_update", {}, _SHORT_SECONDS)
        except ServerRefusal:
            self._control("/end_weight_update", {}, _END_SECONDS)
            self._control("/begin_weight_update", {}, _SHORT_SECONDS)
        return True

    def end_update(self) -> None:
        """Close the session."""
        self._control("/end_weight_update", {}, _END_SECONDS)

    def update_from_tensor(self, body: bytes, timeout_seconds: float) -> None:
        """Load the weights of one flattened bucket, from a body made by ``tensor_update``."""
        self._update("/update_weights_from_tensor", body, timeout_seconds)

    def update_from_disk(self, folder: Path, timeout_seconds: float) -> None:
        """Load the safetensors files of a folder that the server sees under the same path."""
        payload = {"model_path": str(folder), "flush_cache": False}
        self._update("/update_weights_from_disk", payload, timeout_seconds)

    def init_update_group(
        self,
        *,
        address: str,
        port: int,
        rank_offset: int,
        world_size: int,
        group_name: str,
        backend: str,
        timeout_seconds: float,
    ) -> None:
        """Join a process group of ``world_size``, from rank ``rank_offset`` on; rank 0 is ours."""
        payload = {
            "master_address": address,
            "master_port": port,
            "rank_offset": rank_offset,
            "world_size": world_size,
            "group_name": group_name,
            "backend": backend,
        }
        self._control("/init_weights_update_group", payload, timeout_seconds)

    def update_from_distributed(self, payload: Mapping[str, Any], timeout_seconds: float) -> None:
        """Receive weights that rank 0 of a group broadcasts meanwhile, and load them."""
        payload = {**payload, "flush_cache": False}
        self._update("/update_weights_from_distributed", payload, timeout_seconds)

    def destroy_update_group(self, group_name: str, timeout_seconds: float) -> None:
        """Leave a process group."""
        path = "/destroy_weights_update_group"
        self._control(path, {"group_name": group_name}, timeout_seconds)

    def checksums(self) -> Mapping[str, Any]:
        """Return a digest of every tensor of every rank, under ``ranks``."""
        payload = {"action": "checksum"}
        return self._connection.post_for_object("/weights_checker", payload, _CONTROL_SECONDS)

    def set_weight_version(self, name: str) -> None:
        """Name the weights; every later sample carries the name."""
        payload = {"new_version": name, "abort_all_requests": False}
        self._control("/update_weight_version", payload, _SHORT_SECONDS)

    def flush_cache(self) -> None:
        """Forget all keys and values, as soon as nothing runs; refused if that takes too long.

        A paused server does not get to that: the batch that it finished last stays with it, so
        that ``resume`` comes before.
        """
        self._control(f"/flush_cache?timeout={_IDLE_SECONDS:.0f}", {}, _SHORT_SECONDS)

    def _update(
        self, path: str, payload: Mapping[str, Any] | bytes, timeout_seconds: float
    ) -> None:
        """Load weights; the payload leaves the cache alone, which is flushed after the last."""
        try:
            self._control(path, payload, timeout_seconds)
        except ServerRefusal as refusal:
            # The weights were loaded all the same; loading them again would do no harm.
            if _UPDATED_NOT_FLUSHED not in refusal.text:
                raise

    def _control(
        self,
        path: str,
        payload: Mapping[str, Any] | bytes,
        timeout_seconds: float,
    ) -> None:
        self._connection.control(path, payload, timeout_seconds)
