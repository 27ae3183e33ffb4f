"""The SGLang rollout engine: SGLang's own HTTP server, token ids in, token ids and logprobs out.

The server is a child process, or one that already runs (``rollout.sglang.url``). What it answers
is checked before it is believed: lengths, finish reasons, logprobs and the name of the weights.
"""

import logging
import threading
import time
import uuid
from collections.abc import Callable, Generator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

import torch

from prefixrl_mcore.config.policy import LogitsDtype
from prefixrl_mcore.config.rollout import SGLangConfig
from prefixrl_mcore.records import Completion
from prefixrl_mcore.rollout.engine import (
    EngineError,
    IsEnough,
    OnCompleted,
    RolloutError,
    SampleRequest,
    SamplingParams,
    WeightStream,
)
from prefixrl_mcore.rollout.request_limits import completion_limits
from prefixrl_mcore.rollout.sglang.answer import AnswerReader
from prefixrl_mcore.rollout.sglang.api_key import find_api_key
from prefixrl_mcore.rollout.sglang.client import (
    MAX_CONNECTIONS,
    ServerLost,
    ServerRefusal,
    SGLangClient,
    generate_payload,
)
from prefixrl_mcore.rollout.sglang.determinism import check_determinism, sample_seeds
from prefixrl_mcore.rollout.sglang.precision import check_logits
from prefixrl_mcore.rollout.sglang.server import SGLangServer
from prefixrl_mcore.rollout.weight_names import (
    read_config_number,
    read_end_token_ids,
    read_weight_coverage,
)
from prefixrl_mcore.rollout.weight_sync.buckets import Bucket, pack_buckets
from prefixrl_mcore.rollout.weight_sync.sync import is_incomplete, sync_weights
from prefixrl_mcore.rollout.weight_sync.tensor import TensorByValue
from prefixrl_mcore.rollout.weight_sync.transport import SyncTarget, Transport

logger = logging.getLogger(__name__)

_HEALTH_POLL_SECONDS = 1.0

_MEMORY_TAGS = ("weights", "kv_cache")
"""Device memory that ``sleep`` frees."""

_PAUSED = "it is paused; call resume first"
_CLOSED = "it is closed"


class SGLangEngine:
    """Samples on a SGLang server; a server that dies is started again with the same weights.

    ``sample`` and ``load_weights`` exclude each other; the rest may be called from other threads.
    For a restart, the last weights are asked for again.
    """

    def __init__(
        self,
        model_folder: Path,
        config: SGLangConfig,
        *,
        logits_dtype: LogitsDtype,
        max_total_tokens: int,
        logs_folder: Path,
        device: str = "cpu",
    ) -> None:
        """Start the server, or connect to ``config.url``.

        Args:
            model_folder: Hugging Face folder that is served; its weights have version -1.
            config: settings of the server.
            logits_dtype: precision of a bfloat16 model's logits, as in the trainer's head; a
                server that computes others is refused.
            max_total_tokens: longest context and completion together that will be asked for.
            logs_folder: gets ``sglang-<n>.log``, one file per start.
            device: ``cpu`` or ``cuda``.

        Raises:
            ValueError: if the folder is not a model's.
            EngineError: if the server does not start, does not answer, or has logits of another
                precision.
        """
        self._model_folder = model_folder
        self._config = config
        self._logits_dtype: LogitsDtype = logits_dtype
        self._logs_folder = logs_folder
        self._device = device
        self._dtype = torch.float32 if device == "cpu" else getattr(torch, config.dtype)
        self._vocab_size = read_config_number(model_folder, "vocab_size")
        self._max_positions = read_config_number(model_folder, "max_position_embeddings")
        self._max_total_tokens = min(max_total_tokens, self._max_positions)
        self._end_token_ids = read_end_token_ids(model_folder)
        read_weight_coverage(model_folder)  # fails now rather than at the first update
        # Names of weights are this engine's own: another trainer's update is noticed.
        self._run = uuid.uuid4().hex[:8]
        self._policy_version = -1
        self._weight_version = self._weights_name(-1)
        self._stream: WeightStream | None = None
        self._transport: Transport = TensorByValue()
        self._cannot_sample = ""
        self._num_calls = 0
        self._num_starts = 0
        self._in_use = threading.Lock()
        self._version = "of unknown version"
        self._server: SGLangServer | None = None
        if config.url is None:
            self._start_server()
        else:
            self._client = SGLangClient(
                config.url,
                request_timeout_seconds=config.request_timeout_seconds,
                api_key=find_api_key(config),
            )
            self._wait_until_healthy()
            self._weight_version = self._served_weights()
            if is_incomplete(self._weight_version):
                self._cannot_sample = "a trainer died while it sent weights; call load_weights"

    @property
    def name(self) -> str:
        """``sglang <version>``."""
        return f"sglang {self._version}"

    @property
    def is_seeded(self) -> bool:
        """Whether the server is deterministic; otherwise a completion depends on its batch."""
        return self._client.protocol.is_deterministic

    @property
    def policy_version(self) -> int:
        """Version of the weights loaded last; ``-1`` for those of the model folder."""
        return self._policy_version

    @property
    def server(self) -> SGLangServer | None:
        """The server that this engine started; None if it runs elsewhere, or after ``close``."""
        return self._server

    def sample(
        self,
        requests: Sequence[SampleRequest],
        params: SamplingParams,
        on_completed: OnCompleted | None = None,
    ) -> list[list[Completion]]:
        """Return ``num_samples`` completions for each request, in the order of the requests.

        Raises:
            ValueError: if a request or ``params`` makes no sense.
            RolloutError: if a request was refused, or lost after all retries.
            EngineError: if the engine is closed or paused, has no complete weights, is served
                with other weights than it was given, or could not be started again.
        """
        if self._cannot_sample:
            raise EngineError(f"{self.name}: cannot sample: {self._cannot_sample}")
        limits = completion_limits(
            requests, params, vocab_size=self._vocab_size, max_positions=self._max_positions
        )
        self._check_stop_tokens(params)
        done: dict[int, list[Completion]] = {}
        with self._in_use:
            lost: dict[int, str] = {}
            for attempt in range(self._config.max_retries + 1):
                todo = [index for index in range(len(requests)) if index not in done]
                if attempt > 0:
                    self._report_lost(requests, lost, attempt)
                    self._recover()
                lost = self._sample_round(requests, limits, params, todo, done, on_completed)
                if not lost:
                    return [done[index] for index in range(len(requests))]
        names = ", ".join(repr(requests[index].request_id) for index in sorted(lost)[:5])
        raise RolloutError(
            f"{self.name}: {len(lost)} of {len(requests)} requests were lost after "
            f"{self._config.max_retries + 1} attempts: {names}; the first: {lost[min(lost)]}"
        )

    def sample_until(
        self,
        requests: Sequence[SampleRequest],
        params: SamplingParams,
        is_enough: IsEnough,
        on_completed: OnCompleted | None = None,
    ) -> list[list[Completion]]:
        """Refuse: this engine cannot abort a part of a call yet.

        Raises:
            EngineError: always.
        """
        raise EngineError(
            f"{self.name}: cannot abort a part of a call; set rollout.schedule.oversampling = 1 or "
            'rollout.engine = "transformers"'
        )

    def _sample_round(
        self,
        requests: Sequence[SampleRequest],
        limits: Sequence[int],
        params: SamplingParams,
        todo: Sequence[int],
        done: dict[int, list[Completion]],
        on_completed: OnCompleted | None,
    ) -> dict[int, str]:
        """Issue the requests ``todo`` together into ``done``; return the lost ones and why."""
        lost: dict[int, str] = {}
        self._num_calls += 1
        pool = ThreadPoolExecutor(max(1, min(len(todo), MAX_CONNECTIONS)), "sglang")
        try:
            futures = {
                pool.submit(self._sample_one, requests[index], limits[index], params): index
                for index in todo
            }
            for future in as_completed(futures):
                index = futures[future]
                try:
                    completions = future.result()
                except ServerLost as error:
                    lost[index] = str(error)
                    continue
                done[index] = completions
                if on_completed is not None:
                    on_completed(len(completions), sum(len(one.token_ids) for one in completions))
        except BaseException:
            # Whatever it was: nothing may go on sampling behind the caller's back.
            pool.shutdown(wait=False, cancel_futures=True)
            self._client.abort()
            raise
        pool.shutdown()
        return lost

    def _sample_one(
        self, request: SampleRequest, limit: int, params: SamplingParams
    ) -> list[Completion]:
        """Return the completions of one request.

        Raises:
            ServerLost: if no answer came, or the server cut the request off: it may be retried.
            RolloutError: if the answer is a refusal, or does not answer the request.
            EngineError: if other weights sampled it.
        """
        server_id = f"{self._run}-{self._num_calls}-{request.request_id}."
        payload = generate_payload(
            context_token_ids=request.context_token_ids,
            num_samples=request.num_samples,
            max_new_tokens=limit,
            temperature=params.temperature,
            stop_token_ids=params.stop_token_ids,
            request_id=server_id,
            seeds=sample_seeds(request.seed, request.num_samples) if self.is_seeded else None,
        )
        try:
            answers = self._client.generate(payload)
        except ServerLost:
            self._client.abort(server_id)
            raise
        except ServerRefusal as refusal:
            if refusal.status >= 500:
                raise ServerLost(str(refusal)) from refusal
            raise RolloutError(
                f"{self.name}: request {request.request_id!r} was refused: {refusal}"
            ) from refusal
        if len(answers) != request.num_samples:
            raise RolloutError(
                f"{self.name}: request {request.request_id!r}: expected {request.num_samples} "
                f"completions, got {len(answers)}"
            )
        reader = AnswerReader(
            where=f"{self.name}: request {request.request_id!r}",
            max_new_tokens=limit,
            stop_token_ids=frozenset(params.stop_token_ids),
            weight_version=self._weight_version,
            policy_version=self._policy_version,
        )
        return [reader.read(answer) for answer in answers]

    def load_weights(self, stream: WeightStream, policy_version: int) -> None:
        """Replace all weights; later completions carry ``policy_version``.

        Raises:
            EngineError: if a name is unknown, missing or repeated, or its shape differs (the
                engine has incomplete weights then); if the server refuses the weights; if
                completions are being sampled.
        """
        if self._cannot_sample == _CLOSED:
            raise EngineError(f"{self.name}: cannot load weights: {_CLOSED}")
        if not self._in_use.acquire(blocking=False):
            raise EngineError(
                f"{self.name}: cannot load weights while completions are sampled; wait for sample"
            )
        try:
            self._stream = stream
            self._weight_version = self._weights_name(policy_version)
            state = self._cannot_sample
            self._cannot_sample = "its weights are incomplete; load_weights failed"
            try:
                self._push_weights()
            except ServerLost as error:
                logger.warning("%s: lost while weights were loaded: %s", self.name, error)
                self._recover()
            self._policy_version = policy_version
            self._cannot_sample = state if state == _PAUSED else ""
        finally:
            self._in_use.release()

    def _push_weights(self) -> None:
        """Send the current weights; raise ServerLost if the server did not take them."""
        target = SyncTarget(
            client=self._client,
            num_ranks=self._config.tensor_parallel_size,
            name=self._client.url,
        )
        report = sync_weights([target], self._transport, self._buckets, self._weight_version)
        for cause in report.failed.values():
            raise ServerLost(cause)

    def _buckets(self) -> Generator[Bucket]:
        """Begin the current weights."""
        assert self._stream is not None, "load_weights was called"
        return pack_buckets(
            self._stream(),
            read_weight_coverage(self._model_folder),
            dtype=self._dtype,
            bucket_bytes=self._config.sync.bucket_bytes,
        )

    def pause(self) -> None:
        """Hold what is in flight; ``sample`` refuses until ``resume``."""
        if not self._cannot_sample:
            self._cannot_sample = _PAUSED
            self._command(self._client.pause)

    def resume(self) -> None:
        """Go on with what is in flight, and accept requests again."""
        if self._cannot_sample == _PAUSED:
            self._command(self._client.resume)
            self._cannot_sample = ""

    def sleep(self) -> None:
        """Give device memory back; the weights are lost."""
        self._cannot_sample = "it slept; call wake and load_weights first"
        self._command(lambda: self._client.release_memory(_MEMORY_TAGS))

    def wake(self) -> None:
        """Take device memory again; ``load_weights`` must follow before sampling."""
        self._command(lambda: self._client.resume_memory(_MEMORY_TAGS))

    def is_healthy(self) -> bool:
        """Return whether the server answers and ``sample`` would be accepted."""
        return not self._cannot_sample and self._client.is_healthy()

    def close(self) -> None:
        """End the server if this engine started it; safe to call twice."""
        self._cannot_sample = _CLOSED
        if self._server is not None:
            self._server.stop()
            self._server = None
        self._client.close()
        self._stream = None

    def _command(self, call: Callable[[], None]) -> None:
        try:
            call()
        except (ServerLost, ServerRefusal) as error:
            raise EngineError(f"{self.name}: {error}") from error

    def _start_server(self) -> None:
        """Start a server with the weights of the model folder."""
        self._num_starts += 1
        self._server = SGLangServer.start(
            self._model_folder,
            self._config,
            logits_dtype=self._logits_dtype,
            device=self._device,
            max_total_tokens=self._max_total_tokens,
            weight_version=self._weights_name(-1),
            log_file=self._logs_folder / f"sglang-{self._num_starts}.log",
        )
        self._client = self._server.client
        try:
            if self._served_weights() != self._weights_name(-1):
                raise EngineError(f"SGLang: another server answers at {self._client.url}")
            self._check_server()
        except EngineError:
            self._server.stop()
            raise

    def _recover(self) -> None:
        """Return with a healthy server that has the current weights; restart it if it is ours.

        Raises:
            EngineError: if that is not possible.
        """
        if self._server is not None and not (self._server.is_alive and self._client.is_healthy()):
            logger.warning("%s: the server is gone; %s", self.name, self._server.log_tail())
            self._server.stop()
            self._start_server()
        else:
            self._wait_until_healthy()
        if self._served_weights() == self._weight_version:
            return
        if self._stream is None:
            raise EngineError(
                f"{self.name}: the server at {self._client.url} was restarted with other weights"
            )
        try:
            self._push_weights()
        except ServerLost as error:
            raise EngineError(f"{self.name}: lost again while it recovered: {error}") from error

    def _wait_until_healthy(self) -> None:
        """Wait for a server that runs elsewhere.

        Raises:
            EngineError: if it is not healthy in time.
        """
        deadline = time.monotonic() + self._config.start_timeout_seconds
        while not self._client.is_healthy():
            if time.monotonic() > deadline:
                raise EngineError(
                    f"SGLang: no healthy server at {self._client.url} after "
                    f"{self._config.start_timeout_seconds:.0f} s"
                )
            logger.info("SGLang: waiting for the server at %s", self._client.url)
            time.sleep(_HEALTH_POLL_SECONDS)
        if self._server is None:  # it may have been restarted with other arguments
            self._check_server()

    def _check_server(self) -> None:
        """Note the server's version; raise EngineError if its logits are not the trainer's."""
        try:
            info = self._client.server_info()
            self._version = self._client.detect_protocol(info).version
        except (ServerLost, ServerRefusal) as error:
            raise EngineError(f"SGLang: {error}") from error
        check_logits(info, self._config, self._logits_dtype)
        check_determinism(info, self._config)

    def _served_weights(self) -> str:
        """Return the name of the weights that the server has."""
        try:
            return str(self._client.model_info()["weight_version"])
        except (ServerLost, ServerRefusal) as error:
            raise EngineError(f"SGLang: {error}") from error

    def _weights_name(self, policy_version: int) -> str:
        return f"{self._run}:{policy_version}"

    def _check_stop_tokens(self, params: SamplingParams) -> None:
        """Refuse what SGLang cannot do: it stops at the model's end tokens too, or at none."""
        further = sorted(self._end_token_ids - set(params.stop_token_ids))
        if params.stop_token_ids and further:
            raise ValueError(
                f"sampling: SGLang also stops at the model's end tokens {further}, which are not "
                f"among stop_token_ids {list(params.stop_token_ids)}; add them, or take them out "
                f"of eos_token_id in {self._model_folder}"
            )

    def _report_lost(
        self, requests: Sequence[SampleRequest], lost: Mapping[int, str], attempt: int
    ) -> None:
        first = min(lost)
        logger.warning(
            "%s: %d of %d requests were lost (%r: %s); attempt %d of %d",
            *(self.name, len(lost), len(requests), requests[first].request_id, lost[first]),
            *(attempt + 1, self._config.max_retries + 1),
        )
