"""The SGLang rollout engine: SGLang's own HTTP servers, token ids in, token ids and logprobs out.

The servers are child processes, or run already (``rollout.sglang.urls``). What they answer is
checked before it is believed: lengths, finish reasons, logprobs and the name of the weights.
"""

import logging
import uuid
from collections.abc import Collection, Generator, Sequence
from functools import partial
from pathlib import Path

import torch

from prefixrl_mcore.config.policy import LogitsDtype
from prefixrl_mcore.config.rollout import SGLangConfig
from prefixrl_mcore.records import Completion
from prefixrl_mcore.rollout.engine import (
    EngineError,
    IsEnough,
    OnCompleted,
    SampleRequest,
    SamplingParams,
    WeightStream,
    never_enough,
)
from prefixrl_mcore.rollout.guard import EngineGuard
from prefixrl_mcore.rollout.interruption import (
    IsInterrupted,
    SamplingInterrupted,
    never_interrupted,
)
from prefixrl_mcore.rollout.request_limits import completion_limits
from prefixrl_mcore.rollout.sglang.api_key import find_api_key
from prefixrl_mcore.rollout.sglang.batch import Batch
from prefixrl_mcore.rollout.sglang.client import SGLangClient
from prefixrl_mcore.rollout.sglang.gpus import gpus_of_servers
from prefixrl_mcore.rollout.sglang.inspection import Inspector
from prefixrl_mcore.rollout.sglang.launch import ServerLaunch
from prefixrl_mcore.rollout.sglang.member import Member, State
from prefixrl_mcore.rollout.sglang.pool import ServerPool
from prefixrl_mcore.rollout.sglang.schedule import CompletionLengths
from prefixrl_mcore.rollout.sglang.server import SGLangServer
from prefixrl_mcore.rollout.sglang.weights import Weights, weights_name
from prefixrl_mcore.rollout.weight_names import (
    read_config_number,
    read_end_token_ids,
    read_weight_coverage,
)
from prefixrl_mcore.rollout.weight_sync.addresses import is_here
from prefixrl_mcore.rollout.weight_sync.buckets import Bucket, pack_buckets
from prefixrl_mcore.rollout.weight_sync.checksums import check_weights
from prefixrl_mcore.rollout.weight_sync.choose import choose_transport
from prefixrl_mcore.rollout.weight_sync.syncer import Syncer

logger = logging.getLogger(__name__)


class SGLangEngine:
    """Samples on a pool of SGLang servers; one that dies is started again with the same weights.

    ``sample`` and what changes the engine exclude each other; ``close`` ends any of them.
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
        colocated: bool = False,
        is_interrupted: IsInterrupted = never_interrupted,
        num_trainer_ranks: int = 0,
    ) -> None:
        """Start ``config.num_servers`` servers, or connect to ``config.urls``.

        Args:
            model_folder: Hugging Face folder that is served; its weights have version -1.
            config: settings of the servers.
            logits_dtype: precision of a bfloat16 model's logits, as in the trainer's head; a
                server that computes others is refused.
            max_total_tokens: longest context and completion together that will be asked for.
            logs_folder: gets ``sglang-<server>-<start>.log``, one file per start.
            device: ``cpu`` or ``cuda``.
            colocated: ``sleep`` is to free the memory of GPUs.
            is_interrupted: asked several times a second while it samples.
            num_trainer_ranks: on this machine, with its first GPUs; servers that are started get
                the ones after them, unless colocated.

        Raises:
            ValueError: if the folder is not a model's; if there are too few GPUs.
            EngineError: if a server does not start, does not answer, or has logits of another
                precision.
        """
        self._model_folder = model_folder
        self._config = config
        self._dtype = torch.float32 if device == "cpu" else getattr(torch, config.dtype)
        self._vocab_size = read_config_number(model_folder, "vocab_size")
        self._max_positions = read_config_number(model_folder, "max_position_embeddings")
        self._end_token_ids = read_end_token_ids(model_folder)
        read_weight_coverage(model_folder)  # fails now rather than at the first update
        # Names of weights are this engine's own: another trainer's update is noticed.
        self._run = uuid.uuid4().hex[:8]
        self._guard = EngineGuard(lambda: self.name)
        self._is_interrupted = is_interrupted
        self._num_calls = 0
        self._lengths = CompletionLengths()
        self._inspector = Inspector(
            model_folder, config, logits_dtype=logits_dtype, colocated=colocated
        )
        find_api_key(config)  # fails now rather than in a thread
        base_weights = weights_name(self._run, -1)
        urls_here = [url for url in config.urls if is_here(url)]
        launches: list[ServerLaunch | None] = [None] * len(config.urls)
        if not config.urls:
            placed = gpus_of_servers(
                config, device, colocated=colocated, num_trainer_ranks=num_trainer_ranks
            )
            launches = [
                ServerLaunch(
                    name=f"server {index}",
                    model_folder=model_folder,
                    config=config,
                    logits_dtype=logits_dtype,
                    device=device,
                    gpus=gpus,
                    releases_memory=colocated,
                    max_total_tokens=min(max_total_tokens, self._max_positions),
                    weight_version=base_weights,
                )
                for index, gpus in enumerate(placed)
            ]
        self._pool = ServerPool(
            [
                Member(
                    index,
                    config,
                    launch=launch,
                    is_here=launch is not None or config.urls[index] in urls_here,
                    logs_folder=logs_folder,
                    check=self._inspector.inspect,
                )
                for index, launch in enumerate(launches)
            ],
            config,
            syncer=self._build_syncer(device, logs_folder, urls_here, colocated=colocated),
            router=self._client_of_router(),
        )
        try:
            self._pool.start(base_weights)
        except BaseException:
            self._pool.close()
            raise
        if not self._pool.ready:
            self._guard.forbid(
                "its servers have different, incomplete or another run's weights, left by another "
                "trainer; call load_weights first, as train, eval and collect do"
            )

    @property
    def name(self) -> str:
        """``sglang <version>``."""
        return f"sglang {self._inspector.version}"

    @property
    def is_seeded(self) -> bool:
        """Whether all servers are deterministic; otherwise a completion depends on its batch."""
        return self._inspector.all_deterministic

    @property
    def policy_version(self) -> int:
        """Version of the weights loaded last; ``-1`` for those of the model folder."""
        return self._pool.weights.policy_version

    @property
    def servers(self) -> list[SGLangServer]:
        """The servers that this engine started and that live; none of those that run elsewhere."""
        return [member.server for member in self._pool.members if member.server is not None]

    def sample(
        self,
        requests: Sequence[SampleRequest],
        params: SamplingParams,
        on_completed: OnCompleted | None = None,
        is_enough: IsEnough = never_enough,
    ) -> list[list[Completion]]:
        """Return ``num_samples`` completions for each request, in the order of the requests.

        Raises:
            ValueError: if a request or ``params`` makes no sense.
            RolloutError: if a request was refused, or lost after all retries.
            EngineError: if the engine is closed or paused, has no complete weights, or too few
                servers are left.
            SamplingInterrupted: if somebody ended it.
        """
        with self._guard.sampling():
            limits = completion_limits(
                requests, params, vocab_size=self._vocab_size, max_positions=self._max_positions
            )
            self._check_stop_tokens(params)
            self._num_calls += 1
            self._pool.verify()
            batch = Batch(
                name=self.name,
                tag=f"{self._run}-{self._num_calls}",
                pool=self._pool,
                requests=requests,
                limits=limits,
                params=params,
                vocab_size=self._vocab_size,
                lengths=self._lengths,
                is_seeded=self.is_seeded,
                has_prefix_cache=self._inspector.all_have_prefix_cache,
                max_retries=self._config.max_retries,
                router_seconds=self._config.start_timeout_seconds,
                max_samples=self._config.max_samples_per_server,
                is_enough=is_enough,
                on_completed=on_completed,
                is_interrupted=self._is_interrupted,
            )
            sampled = batch.run()
        if batch.was_interrupted:
            raise SamplingInterrupted.after(requests, sampled)
        return sampled

    def load_weights(self, stream: WeightStream, policy_version: int) -> None:
        """Replace all weights; later completions carry ``policy_version``.

        Raises:
            EngineError: if a name is unknown, missing or repeated, or its shape differs (the
                weights are incomplete then, and ``sample`` refuses until others are loaded); if
                the servers refuse the weights; if too few servers are left; if completions are
                being sampled.
        """
        with self._guard.changing("load weights"):
            if any(member.state is State.ASLEEP for member in self._pool.members):
                raise EngineError(
                    f"{self.name}: cannot load weights while it sleeps; call wake first"
                )
            weights = Weights(
                name=weights_name(self._run, policy_version),
                policy_version=policy_version,
                make_buckets=partial(self._buckets, stream),
            )
            with self._guard.replacing_weights():
                self._pool.load(weights, is_interrupted=self._is_interrupted)

    def pause(self) -> None:
        """Have the servers compute nothing; ``sample`` refuses until ``resume``.

        Raises:
            EngineError: if the engine is closed, or samples; if too few servers are left.
        """
        with self._guard.changing("pause"):
            if self._guard.pause():
                self._pool.command(
                    lambda member: member.client.pause(), [State.READY], State.PAUSED, "pause"
                )

    def resume(self) -> None:
        """Accept requests again.

        Raises:
            EngineError: if the engine is closed; if too few servers are left.
        """
        with self._guard.changing("resume"):
            if self._guard.resume():
                self._pool.command(
                    lambda member: member.client.resume(), [State.PAUSED], State.READY, "resume"
                )

    def sleep(self) -> None:
        """Give device memory back; the weights are lost.

        Raises:
            EngineError: if the engine is closed, or samples; if too few servers are left.
        """
        with self._guard.changing("sleep"):
            self._guard.sleep()
            self._pool.sleep()

    def wake(self) -> None:
        """Take the weights' memory again; ``load_weights`` must follow, and takes the KV cache's.

        Raises:
            EngineError: if the engine is closed; if too few servers are left.
        """
        with self._guard.changing("wake"):
            self._pool.wake()

    def take_metrics(self) -> dict[str, float]:
        """Return what the pool counted since the last call: ``engine/...`` of docs/metrics.md."""
        return self._pool.take_metrics()

    def close(self) -> None:
        """End the servers that this engine started; safe to call twice."""
        self._guard.close()
        self._pool.close()

    def _buckets(self, stream: WeightStream) -> Generator[Bucket]:
        """Begin the stream, checked against the model's weights."""
        return pack_buckets(
            stream(),
            read_weight_coverage(self._model_folder),
            dtype=self._dtype,
            bucket_bytes=self._config.sync.bucket_bytes,
        )

    def _build_syncer(
        self, device: str, logs_folder: Path, urls_here: Collection[str], *, colocated: bool
    ) -> Syncer:
        """Choose how weights get to the servers, and how they are checked."""
        config, folder = self._config, self._model_folder
        heads = read_config_number(folder, "num_attention_heads")
        check = partial(
            check_weights,
            dtype=self._dtype,
            num_key_value_heads=read_config_number(folder, "num_key_value_heads", heads),
            is_cuda=device == "cuda",
        )
        transport = choose_transport(
            config,
            device=device,
            colocated=colocated,
            folder=logs_folder / "weights",
            urls_here=urls_here,
        )
        return Syncer(transport, check=check, check_every_syncs=config.sync.checksum_every_syncs)

    def _client_of_router(self) -> SGLangClient | None:
        if self._config.router_url is None:
            return None
        return SGLangClient(
            self._config.router_url,
            request_timeout_seconds=self._config.request_timeout_seconds,
            api_key=find_api_key(self._config),
            max_connections=self._config.max_samples_per_server * self._config.num_members,
        )

    def _check_stop_tokens(self, params: SamplingParams) -> None:
        """Refuse what SGLang cannot do: it stops at the model's end tokens too, or at none."""
        further = sorted(self._end_token_ids - set(params.stop_token_ids))
        if params.stop_token_ids and further:
            raise ValueError(
                f"sampling: SGLang also stops at the model's end tokens {further}, which are not "
                f"among stop_token_ids {list(params.stop_token_ids)}; add them, or take them out "
                f"of eos_token_id in {self._model_folder}"
            )
