"""Rollout engine and sampling."""

import math
from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from prefixrl_mcore.config.base import Config, ConfigError

_NO_KEY_THERE = "set PREFIXRL_SGLANG_API_KEY or rollout.sglang.api_key_file: arguments are public"
_NO_GUARD_THERE = "its port would not ask for the API key"
_NO_PORT_THERE = (
    "it belongs to a server of several parts, which listens where no API key is asked for"
)
_ONE_REPLICA = "a server is one replica: set rollout.sglang.num_servers for more"
_TENSOR_PARALLEL = "set rollout.sglang.tensor_parallel_size"
_MODEL = "set model.path"
_PLACED = "servers get the GPUs after the trainer's, or with rollout.colocated the same ones"
_RESERVED_ARGUMENTS = {
    "--dtype": "set rollout.sglang.dtype",
    "--enable-fp32-lm-head": "set model.logits_dtype, which the trainer's head obeys too",
    "--enable-tf32-matmul": "it would round what the trainer's head computes in float32",
    "--rl-on-policy-target": "it would round logits and logprobs as no trainer's head does",
    "--enable-deterministic-inference": "set rollout.sglang.deterministic",
    "--model-path": _MODEL,
    "--preferred-sampling-params": "every request says how to sample, as the loss knows it",
    "--weight-version": "the engine names the weights itself, to know whose they are",
    "--device": "it is the trainer's",
    "--tp-size": _TENSOR_PARALLEL,
    "--tensor-parallel-size": _TENSOR_PARALLEL,
    "--base-gpu-id": _PLACED,
    "--gpu-id-step": _PLACED,
    "--dp-size": _ONE_REPLICA,
    "--data-parallel-size": _ONE_REPLICA,
    "--pp-size": f"pipelines of servers are not supported; {_TENSOR_PARALLEL}",
    "--pipeline-parallel-size": f"pipelines of servers are not supported; {_TENSOR_PARALLEL}",
    "--context-length": "set rollout.max_total_tokens",
    "--max-total-tokens": "set rollout.sglang.max_kv_tokens",
    "--mem-fraction-static": "set rollout.sglang.memory_fraction",
    "--host": "set rollout.sglang.host",
    "--port": "a free port is found by itself",
    "--api-key": _NO_KEY_THERE,
    "--admin-api-key": _NO_KEY_THERE,
    "--config": "write the arguments themselves: a file could set what has settings of its own",
    "--tokenizer-worker-num": "a second process would not ask for the API key",
    "--enable-http-worker-reuseport": "a second process would not ask for the API key",
    "--grpc-port": _NO_GUARD_THERE,
    "--grpc-mode": _NO_GUARD_THERE,
    "--smg-grpc-mode": _NO_GUARD_THERE,
    "--smg-http-sidecar-port": _NO_GUARD_THERE,
    "--grpc-http-sidecar-port": _NO_GUARD_THERE,
    "--sidecar": _NO_GUARD_THERE,
    "--gated-launch-port": _NO_GUARD_THERE,
    "--kv-events-config": _NO_GUARD_THERE,
    "--dist-init-addr": _NO_PORT_THERE,
    "--nccl-init-addr": _NO_PORT_THERE,
    "--nccl-port": _NO_PORT_THERE,
    "--encoder-only": _NO_PORT_THERE,
    "--encoder-urls": _NO_PORT_THERE,
    "--encoder-register-urls": _NO_PORT_THERE,
    "--encoder-bootstrap-port": _NO_PORT_THERE,
    "--engine-info-bootstrap-port": _NO_PORT_THERE,
    "--disaggregation-": _NO_PORT_THERE,
    "--remote-instance-weight-loader-": _NO_PORT_THERE,
}
"""Arguments of a server that ``extra_args`` must not have, and what to do instead; a name that ends
in a dash stands for all that begin with it."""


_NARROWED = ("top_p", "top_k", "min_p")
"""What engines can do and the loss cannot follow."""


class SyncConfig(Config):
    """How the policy's weights get to the servers."""

    transport: Literal["tensor", "distributed", "disk"] | None = None
    """``tensor``: in the request. ``distributed``: broadcast from rank 0 to all servers (NCCL;
    gloo on CPUs). ``disk``: a folder that trainer and servers share. None chooses and says why."""

    bucket_bytes: int = Field(default=512 * 1024**2, ge=1024)
    """Weights that are on their way at a time; rank 0 has memory for two buckets of this size.
    ``tensor`` by value takes up to about six more of host memory."""

    folder: Path | None = None
    """Where the transport ``disk`` writes, for all servers under the same path; None is a folder in
    the run's."""

    checksum_every_syncs: int | None = Field(default=100, ge=1)
    """Syncs from one comparison of the servers' weights with the policy's to the next, by
    checksums; the first sync is one. A difference ends the run. None compares never."""

    timeout_seconds: float = Field(default=300.0, gt=0.0)
    """How long a server may take to join a broadcast, and to load a bucket (with ``disk``: a file);
    then it is given up, and the others go on."""


class SGLangConfig(Config):
    """SGLang servers run as child processes, in a virtual environment of their own."""

    python: Path = Path(".venv-sglang/bin/python")
    """Interpreter of the environment that SGLang is installed in (``make setup-sglang``)."""

    num_servers: int = Field(default=1, ge=1)
    """Servers to start as child processes; on a GPU machine each has ``tensor_parallel_size``
    GPUs, in the order of ``CUDA_VISIBLE_DEVICES``: after those of the trainer's ranks there, or
    with ``rollout.colocated`` from the first one on. In a colocated Slurm job on several nodes each
    has so many; with GPUs as many as fill it, and this stays 1. The other stages of a recipe on
    Slurm fill their node, too."""

    urls: tuple[str, ...] = ()
    """URLs of servers that already run; they take the place of ``num_servers`` child processes."""

    router_url: str | None = None
    """URL of a router (``sglang-router``) in front of all of ``urls``: it chooses the server of a
    request. Everything else is said to the servers themselves, as a router cannot pass it on."""

    min_servers: int = Field(default=1, ge=1)
    """The run stops when so few servers are left that it is below this: those that are dead and
    have used up ``max_restarts`` do not count. 1 goes on, slower, as long as there is one. Of all
    servers of a run, those that a Slurm job starts on other nodes too."""

    max_restarts: int = Field(default=3, ge=0)
    """Times that one dead server is started again (or waited for, if it runs elsewhere) within
    ``restart_window_seconds``, and in a row without being ready in between."""

    restart_window_seconds: float = Field(default=3600.0, gt=0.0)
    """Restarts that lie further back than this no longer count; those in a row that lead to nothing
    do until so long after they are used up, when a run that other servers serve tries again."""

    max_samples_per_server: int = Field(default=512, ge=1)
    """Completions that one server is asked for at a time; the rest waits here, where it can still
    go to whichever server is free first."""

    health_every_seconds: float = Field(default=5.0, gt=0.0)
    """Time between two health checks of a server that owes answers."""

    health_timeout_seconds: float = Field(default=10.0, gt=1.0)
    """How long a server may take to show a sign of life; a healthy one takes a second."""

    max_failures: int = Field(default=3, ge=1)
    """Failures in a row (health checks, unusable answers) after which a server counts as dead."""

    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Precision of the engine's weights and activations; a server on a CPU always has float32."""

    tensor_parallel_size: int = Field(default=1, ge=1)
    """GPUs of each server."""

    memory_fraction: float = Field(default=0.8, gt=0.0, lt=1.0)
    """``--mem-fraction-static``: share of the GPU memory that is free when the server starts
    (beside a trainer: after its weights and gradients), for weights and KV cache."""

    deterministic: bool = False
    """Equal seeds and weights give equal completions (``--enable-deterministic-inference``).
    Slower; much slower on a CPU, where a server then computes one completion at a time."""

    host: str = "127.0.0.1"
    """Address that a started server listens on. Any but this machine's own needs an API key."""

    api_key_file: Path | None = None
    """File with the API key of the servers, in one line; None takes the environment variable
    ``PREFIXRL_SGLANG_API_KEY``, if it is set. The key itself is in no setting and no log."""

    max_kv_tokens: int | None = Field(default=None, ge=256)
    """``--max-total-tokens``: size of the KV cache; None lets SGLang choose."""

    start_timeout_seconds: float = Field(default=600.0, gt=0.0)
    """How long a server may take until it is healthy, and then until its first tokens, for which it
    may compile kernels."""

    request_timeout_seconds: float = Field(default=3600.0, gt=0.0)
    """How long one request may take before it counts as lost."""

    max_retries: int = Field(default=2, ge=0)
    """Times that a lost request is issued again, to another server where there is one. What was
    lost by the death of its server counts apart, up to the same bound."""

    sync: SyncConfig = Field(default_factory=SyncConfig)
    """How weights get to the servers."""

    extra_args: tuple[str, ...] = ()
    """Further arguments of ``sglang.launch_server``: none that has a setting or opens a port."""

    @model_validator(mode="after")
    def _servers_are_child_processes_or_run_already(self) -> "SGLangConfig":
        if self.urls and self.num_servers != 1:
            raise ValueError(
                "rollout.sglang.num_servers is for child processes, and rollout.sglang.urls for "
                f"servers that already run, got {self.num_servers} and {len(self.urls)} URL(s); "
                "leave one of them out"
            )
        if len(set(self.urls)) < len(self.urls):
            raise ValueError(f"rollout.sglang.urls names a server twice, got {list(self.urls)}")
        if self.router_url is not None and not self.urls:
            raise ValueError(
                "rollout.sglang.router_url needs rollout.sglang.urls, the servers behind the "
                "router: weights and aborts are sent to each of them; got none"
            )
        if self.urls:  # of the others a job may start more than one machine does
            self.check_min_servers(len(self.urls))
        return self

    @property
    def weight_bytes(self) -> int:
        """Bytes of a weight on the servers."""
        return 2 if self.dtype == "bfloat16" else 4

    @property
    def num_members(self) -> int:
        """Servers in all, whoever started them."""
        return len(self.urls) or self.num_servers

    def check_min_servers(self, num_servers: int) -> None:
        """Refuse a ``min_servers`` that so many servers never reach.

        Raises:
            ConfigError: with both numbers.
        """
        if self.min_servers > num_servers:
            raise ConfigError(
                "rollout.sglang.min_servers must not exceed the number of servers, got "
                f"{self.min_servers} > {num_servers}; lower it, or have more servers (num_servers, "
                "or nodes with servers of their own)"
            )

    @model_validator(mode="after")
    def _what_has_a_setting_is_not_an_extra_argument(self) -> "SGLangConfig":
        for argument in self.extra_args:
            name = argument.partition("=")[0]
            for reserved, instead in _RESERVED_ARGUMENTS.items():
                # SGLang also understands the beginning of a name.
                is_beginning = len(name) > len("--") and reserved.startswith(name)
                if is_beginning or (reserved.endswith("-") and name.startswith(reserved)):
                    raise ValueError(f"rollout.sglang.extra_args must not have {name}; {instead}")
        return self


class TransformersConfig(Config):
    """The in-process ``transformers`` generation engine."""

    max_batch_size: int = Field(default=256, ge=1)
    """Sequences decoded together."""

    dtype: Literal["float32", "bfloat16"] = "float32"
    """Precision of the engine's weights and activations."""


class ScheduleConfig(Config):
    """Which groups a step samples, and when; by default its own ones, strictly on-policy."""

    oversampling: float = Field(default=1.0, ge=1.0, le=8.0)
    """Groups begun, as a multiple of those that are needed (rounded up). The first that finish make
    the batch, the rest is aborted: shorter, but in favour of problems with short completions."""

    partial: bool = False
    """Carry aborted groups over to the next step, where they go on from their tokens, instead of
    throwing these away. Needs ``oversampling`` above 1, ``max_staleness`` of at least 1 and
    ``loss.importance``."""

    dynamic_sampling: bool = False
    """Replace groups without signal (every advantage zero) by further ones, until the batch is full
    or ``max_rounds`` are over. What was sampled is charged all the same."""

    max_rounds: int = Field(default=4, ge=2)
    """Times that a step with ``dynamic_sampling`` samples at most; what is still missing then is
    filled up with groups without signal. Another value than the default needs it."""

    overlap: bool = False
    """Sample the next step's groups during the update, from weights that are one update old. Needs
    ``max_staleness`` of at least 1 (with ``partial`` 2) and ``loss.importance``."""

    max_staleness: int = Field(default=0, ge=0)
    """Updates between the weights that sampled a token and those that are trained on it, at most;
    0 is strictly on-policy. Older tokens of a carried group are thrown away and sampled again;
    any other rollout beyond it is refused."""

    @property
    def num_rounds(self) -> int:
        """Times that a step samples at most."""
        return self.max_rounds if self.dynamic_sampling else 1

    def num_begun(self, num_wanted: int) -> int:
        """Return how many groups are begun in a round that wants ``num_wanted`` finished ones."""
        # Rounded first: 1.1 x 50 is 55.00000000000001 in binary.
        return math.ceil(round(self.oversampling * num_wanted, 9))

    @property
    def is_off_policy(self) -> bool:
        """Some rollouts may come from older weights."""
        return self.overlap or self.partial

    @model_validator(mode="after")
    def _carried_groups_were_aborted(self) -> "ScheduleConfig":
        if self.partial and self.oversampling == 1.0:
            raise ValueError(
                "rollout.schedule.partial carries aborted groups over, and with oversampling = 1 "
                "none is aborted; raise oversampling (such as 1.25) or switch partial off"
            )
        return self

    @model_validator(mode="after")
    def _rounds_are_those_of_dynamic_sampling(self) -> "ScheduleConfig":
        default = type(self).model_fields["max_rounds"].default
        if self.max_rounds != default and not self.dynamic_sampling:
            raise ValueError(
                f"rollout.schedule.max_rounds = {self.max_rounds} has no use without "
                "dynamic_sampling, because a step samples once then; switch dynamic_sampling on or "
                "leave max_rounds out"
            )
        return self

    @model_validator(mode="after")
    def _staleness_is_what_the_modes_need(self) -> "ScheduleConfig":
        needed = int(self.overlap) + int(self.partial)
        modes = [name for name in ("overlap", "partial") if getattr(self, name)]
        if self.max_staleness < needed:
            raise ValueError(
                f"rollout.schedule.max_staleness must be at least {needed} with "
                f"{' and '.join(modes)}, got {self.max_staleness}; raise it or switch them off"
            )
        if self.max_staleness and not needed:
            raise ValueError(
                f"rollout.schedule.max_staleness = {self.max_staleness} has no use without "
                "overlap or partial, because nothing is stale then; set it to 0"
            )
        return self


class RolloutConfig(Config):
    """Sampling of completions."""

    engine: Literal["sglang", "transformers"] | None = None
    """Inference engine; None takes SGLang where it starts and says so when it falls back to
    transformers."""

    colocated: bool = False
    """The engine shares the trainer's GPUs: it gives their memory back for every update, and takes
    it again, with the new weights, to sample. Not with ``schedule.overlap``. Servers that run
    already (``sglang.urls``) must be able to: started with ``--enable-memory-saver``, and awake."""

    temperature: float = Field(default=1.0, gt=0.0)
    """Sampling temperature in training; the loss uses logprobs at the same temperature."""

    max_completion_tokens: int = Field(default=16384, ge=1)
    """New tokens per rollout; independent of the prefix's length."""

    max_total_tokens: int = Field(default=36000, ge=2)
    """Prompt, prefix and completion together; a prompt + prefix that leaves no room is refused."""

    schedule: ScheduleConfig = Field(default_factory=ScheduleConfig)
    """Over-sampling, partial rollouts, dynamic sampling, overlap."""

    max_logprob_gap_mean: float | None = Field(default=0.1, gt=0.0)
    """Alarm when engine and policy differ by more than this on the mean over a step's trained
    tokens, nats; None has no such alarm. bfloat16 on both sides differs by about 0.01."""

    max_logprob_gap_p99: float | None = Field(default=1.0, gt=0.0)
    """The same for the 99th percentile."""

    on_logprob_gap: Literal["warn", "stop"] = "warn"
    """What the alarm does: log a warning and count the step, or stop the run after the step (which
    is taken and logged, and not saved)."""

    sglang: SGLangConfig = Field(default_factory=SGLangConfig)
    """Settings of the SGLang engine."""

    transformers: TransformersConfig = Field(default_factory=TransformersConfig)
    """Settings of the fallback engine."""

    @property
    def starts_servers(self) -> bool:
        """Whether the run starts SGLang servers, or tries to."""
        return self.engine != "transformers" and not self.sglang.urls

    def with_num_servers(self, number: int) -> "RolloutConfig":
        """Return the same settings for another number of servers."""
        sglang = self.sglang.model_copy(update={"num_servers": number})
        return self.model_copy(update={"sglang": sglang})

    @model_validator(mode="before")
    @classmethod
    def _all_of_the_distribution_is_sampled(cls, values: object) -> object:
        narrowed = [name for name in _NARROWED if isinstance(values, dict) and name in values]
        if narrowed:
            raise ValueError(
                f"rollout.{narrowed[0]} samples from a part of the policy's distribution, and the "
                "loss takes log-probs of the whole; leave it out (a lower rollout.temperature, "
                "which the loss takes too, prefers likely tokens)"
            )
        return values

    @model_validator(mode="after")
    def _who_shares_gpus_takes_turns(self) -> "RolloutConfig":
        if self.colocated and self.schedule.overlap:
            raise ValueError(
                "rollout.colocated puts the engine to sleep during the update, and "
                "rollout.schedule.overlap samples during it; switch one of them off: overlap needs "
                "servers on GPUs of their own"
            )
        # Where servers of sglang.urls are is known when they are connected to.
        is_distributed = self.sglang.sync.transport == "distributed"
        if self.colocated and is_distributed and not self.sglang.urls:
            raise ValueError(
                "rollout.sglang.sync.transport = 'distributed' gives each process of a broadcast a "
                "GPU of its own, and with rollout.colocated servers are on the trainer's; leave "
                "the transport out, or take 'tensor' or 'disk'"
            )
        return self
