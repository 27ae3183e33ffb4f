"""A SGLang HTTP server as a child process: started, watched, ended.

The server lives in an environment of its own, since SGLang pins torch and transformers; nothing
of it is imported here.
"""

import atexit
import logging
import os
import re
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from prefixrl_mcore.config.policy import LogitsDtype
from prefixrl_mcore.config.rollout import SGLangConfig
from prefixrl_mcore.rollout.engine import EngineError
from prefixrl_mcore.rollout.sglang.api_key import (
    API_KEY_VARIABLE,
    address_of,
    find_api_key,
    hand_over,
)
from prefixrl_mcore.rollout.sglang.client import ServerFault, SGLangClient
from prefixrl_mcore.rollout.sglang.determinism import deterministic_flags
from prefixrl_mcore.rollout.sglang.precision import logits_flags, refused_flags
from prefixrl_mcore.rollout.sglang.supervisor import describe_exit
from prefixrl_mcore.rollout.weight_names import read_config_number

logger = logging.getLogger(__name__)

_HERE = Path(__file__).resolve().parent
_SUPERVISOR = _HERE / "supervisor.py"
LAUNCHER = _HERE / "launcher" / "serve.py"
_STAND_INS = _HERE / "cpu" / "stand_ins"

_POLL_SECONDS = 0.1
_REPORT_SECONDS = 10.0
"""Time between two log lines that say what a start waits for."""

_STOP_SECONDS = 5.0
"""How long the supervisor may take to end the server before the group is killed."""

_TAIL_LINES = 25

_LOG_BYTES = 64 * 1024
"""End of a log that is read."""

_SUPERVISOR_SAYS = "supervisor: "
"""Begins the supervisor's line in the log."""

_CRASH = re.compile(r"Subprocess (\S+) \(pid=\d+\) crashed with exit code (-?\d+)")
"""What SGLang's watchdog says of a process of its own (``srt/utils/watchdog.py``)."""

_PORT_ATTEMPTS = 3
_PORT_TAKEN_WORDS = ("address already in use", "errno 98")

_CPU_KV_BYTES = 1024**3
_CPU_MAX_KV_TOKENS = 65536
"""Size of the KV cache on a CPU machine without ``max_kv_tokens``: SGLang would take a share
of all memory."""

_CONTEXT_MARGIN = 16
"""SGLang cuts a completion a few tokens before its context length, without a word."""

_PRIVATE_VARIABLES = frozenset(
    {
        *("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"),
        API_KEY_VARIABLE,  # the server gets it through its standard input
        *("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV", "PYTHONDONTWRITEBYTECODE"),
        "CUDA_DEVICE_MAX_CONNECTIONS",  # Megatron's order of launches
        "SGLANG_RETURN_ORIGINAL_LOGPROB",  # would give logprobs at temperature 1
    }
)
_PRIVATE_BEGINNINGS = ("TORCHELASTIC_", "TORCH_NCCL_", "LOCAL_", "GROUP_", "ROLE_")
"""The trainer's own: the server would join its process group, import its packages, show its key.
Under torchrun, TORCHELASTIC_USE_AGENT_STORE alone has its rank 0 wait for a store for ever."""

_ALLOCATOR_VARIABLES = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF")


@dataclass(frozen=True, kw_only=True, slots=True)
class ServerLaunch:
    """How one server is started, every time that it is."""

    name: str
    """``server 0``; names it in logs and errors."""

    model_folder: Path
    """Hugging Face folder that it serves."""

    config: SGLangConfig
    """Its settings."""

    logits_dtype: LogitsDtype
    """Precision of a bfloat16 model's logits."""

    device: str
    """``cpu`` or ``cuda``."""

    gpus: tuple[str, ...]
    """Its entries of CUDA_VISIBLE_DEVICES; empty on a CPU machine."""

    max_total_tokens: int
    """Longest context and completion together."""

    weight_version: str
    """Name of the weights in the folder, stamped on completions."""

    releases_memory: bool = False
    """Its GPU memory can be released and taken again."""


class SGLangServer:
    """One running server; ``start`` makes it, ``stop`` ends all of its processes."""

    def __init__(
        self, name: str, process: subprocess.Popen[bytes], client: SGLangClient, log_file: Path
    ) -> None:
        """Own a server that was just started; use ``start``."""
        self._name = name
        self._process = process
        self._owner_pid = os.getpid()
        self.client = client
        self.log_file = log_file
        atexit.register(self.stop)

    @classmethod
    def start(
        cls, launch: ServerLaunch, log_file: Path, *, cancelled: threading.Event
    ) -> "SGLangServer":
        """Start a server and return when it is healthy; may be called in any thread.

        Another process may take the port between its choice and its use: then it gets another one.

        Args:
            launch: how.
            log_file: gets the server's output; its folder is made.
            cancelled: when set, the server is ended and the wait given up.

        Raises:
            EngineError: if SGLang's environment is missing; if the server dies or is not healthy in
                time, with the end of its log; if it was cancelled.
        """
        for _ in range(_PORT_ATTEMPTS):
            server = cls._spawn(launch, _free_port(), log_file)
            try:
                server._wait_until_healthy(launch.config.start_timeout_seconds, cancelled)
                server._check_identity(launch.weight_version)
                server.client.check_guard()
            except _PortTaken as taken:
                server.stop()
                logger.warning("SGLang: %s: %s; it gets another port", launch.name, taken)
            except BaseException:
                server.stop()
                raise
            else:
                return server
        raise EngineError(
            f"SGLang: {launch.name} found its port taken {_PORT_ATTEMPTS} times; is this machine "
            "out of free ports?"
        )

    @classmethod
    def _spawn(cls, launch: ServerLaunch, port: int, log_file: Path) -> "SGLangServer":
        # Not resolved: an environment's interpreter is a link, and finds its packages by the link.
        python = launch.config.python.absolute()
        if not os.access(python, os.X_OK):
            raise EngineError(
                f"its interpreter {python} does not exist; run `make setup-sglang`, or set "
                "rollout.sglang.python to an environment that has SGLang"
            )
        api_key = find_api_key(launch.config)
        command = [
            str(python),
            str(_SUPERVISOR),
            str(os.getpid()),
            str(python),
            *_server_arguments(launch, port, has_key=api_key is not None),
        ]
        log_file.parent.mkdir(parents=True, exist_ok=True)
        logger.info(
            "SGLang: starting %s for %s on port %d%s; its output goes to %s",
            *(launch.name, launch.model_folder, port),
            *(f", GPUs {','.join(launch.gpus)}" if launch.gpus else "", log_file),
        )
        with log_file.open("wb") as log:
            log.write((" ".join(command) + "\n").encode())
            log.flush()
            process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=_environment(launch),
                start_new_session=True,
            )
        hand_over(api_key, process)
        client = SGLangClient(
            address_of(launch.config.host, port),
            request_timeout_seconds=launch.config.request_timeout_seconds,
            api_key=api_key,
            max_connections=launch.config.max_samples_per_server,
        )
        return cls(launch.name, process, client, log_file)

    @property
    def supervisor_pid(self) -> int:
        """Process id of the supervisor, also the id of the server's process group."""
        return self._process.pid

    @property
    def is_alive(self) -> bool:
        """Whether the server's processes are still there."""
        return self._process.poll() is None

    def stop(self) -> None:
        """End all processes of the server; safe to call twice."""
        if os.getpid() != self._owner_pid:
            return  # a fork of the trainer that ends must not take the server with it
        atexit.unregister(self.stop)
        if self.is_alive:
            self._process.send_signal(signal.SIGTERM)
            try:
                self._process.wait(_STOP_SECONDS)
            except subprocess.TimeoutExpired:
                logger.warning("SGLang: %s did not end in time; killing it", self._name)
        self._kill_group()
        self._process.wait()
        self.client.close()

    def log_tail(self) -> str:
        """Return the last lines of the server's output."""
        lines = self._log_text().splitlines()
        tail = "\n".join(f"  | {line}" for line in lines[-_TAIL_LINES:])
        return f"end of {self.log_file}:\n{tail}"

    def cause_of_death(self) -> str:
        """Return why the server ended, as far as its log says; or that it still runs."""
        text = self._log_text()
        crash = _CRASH.search(text)
        if crash is not None:
            return f"its process {crash[1]} {describe_exit(int(crash[2]))}"
        said = [line for line in text.splitlines() if line.startswith(_SUPERVISOR_SAYS)]
        if said:
            return said[-1].removeprefix(_SUPERVISOR_SAYS)
        if self.is_alive:
            return "its processes still run"
        return f"its supervisor {describe_exit(self._process.returncode)}"

    def _wait_until_healthy(self, timeout_seconds: float, cancelled: threading.Event) -> None:
        started = time.monotonic()
        reported = started
        while not self.client.is_healthy():
            now = time.monotonic()
            if cancelled.is_set():
                raise EngineError(f"SGLang: {self._name} is no longer wanted")
            if not self.is_alive:
                text = self._log_text()
                if any(words in text.lower() for words in _PORT_TAKEN_WORDS):
                    raise _PortTaken("its port was taken while it started")
                raise EngineError(
                    f"SGLang: {self._name} died while it started{refused_flags(text)}; "
                    f"{self.cause_of_death()}; {self.log_tail()}"
                )
            if now - started > timeout_seconds:
                raise EngineError(
                    f"SGLang: {self._name} was not healthy after {timeout_seconds:.0f} s; raise "
                    f"rollout.sglang.start_timeout_seconds if it is only slow; {self.log_tail()}"
                )
            if now - reported > _REPORT_SECONDS:
                reported = now
                logger.info(
                    "SGLang: waiting for %s to be healthy, %.0f of at most %.0f s; its output is "
                    "in %s",
                    *(self._name, now - started, timeout_seconds, self.log_file),
                )
            cancelled.wait(_POLL_SECONDS)
        logger.info("SGLang: %s is healthy after %.1f s", self._name, time.monotonic() - started)

    def _check_identity(self, weight_version: str) -> None:
        """Make sure that it is this server, and not another one, that answers at its port."""
        try:
            served = self.client.weight_version()
        except ServerFault as fault:
            raise EngineError(f"SGLang: {self._name}: {fault}; {self.log_tail()}") from fault
        if served != weight_version:
            raise _PortTaken(f"another server, with weights {served!r}, answers at its port")

    def _log_text(self) -> str:
        """Return the end of the log: it grows for as long as the server lives."""
        with self.log_file.open("rb") as log:
            size = log.seek(0, os.SEEK_END)
            log.seek(max(0, size - _LOG_BYTES))
            return log.read().decode(errors="replace")

    def _kill_group(self) -> None:
        """Kill what is left of the process group; it keeps its id as long as a member lives."""
        try:
            os.killpg(self._process.pid, signal.SIGKILL)
        except ProcessLookupError:
            return


class _PortTaken(RuntimeError):  # noqa: N818 -- not an error as long as there are other ports
    """Another process has the port that the server was to have."""


def gpus_of_servers(config: SGLangConfig, device: str) -> list[tuple[str, ...]]:
    """Return each child process's GPUs, as entries of CUDA_VISIBLE_DEVICES; empty on a CPU machine.

    Raises:
        EngineError: if there are too few for all servers.
    """
    if device == "cpu":
        return [()] * config.num_servers
    entries, size = _visible_gpus(), config.tensor_parallel_size
    if config.num_servers * size > len(entries):
        raise EngineError(
            f"SGLang: {config.num_servers} server(s) of {size} GPU(s) each need "
            f"{config.num_servers * size} GPUs, this machine shows {len(entries)} "
            f"(CUDA_VISIBLE_DEVICES = {os.environ.get('CUDA_VISIBLE_DEVICES')!r}); lower "
            "rollout.sglang.num_servers or rollout.sglang.tensor_parallel_size"
        )
    return [tuple(entries[i * size : (i + 1) * size]) for i in range(config.num_servers)]


def gpu_numbers(gpus: Sequence[str]) -> tuple[int, ...] | None:
    """Return the numbers that this process has for a server's GPUs; None for a server without."""
    visible = _visible_gpus() if gpus else []
    return tuple(visible.index(gpu) for gpu in gpus) or None


def _visible_gpus() -> list[str]:
    """Return the entries of CUDA_VISIBLE_DEVICES, in the order of this process's GPU numbers."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return [str(index) for index in range(torch.cuda.device_count())]
    return [entry.strip() for entry in visible.split(",") if entry.strip()]


def _server_arguments(launch: ServerLaunch, port: int, *, has_key: bool) -> list[str]:
    """Return what the interpreter is given to run."""
    config, device = launch.config, launch.device
    is_stock = device != "cpu" and not has_key
    launcher = ["-m", "sglang.launch_server"] if is_stock else [str(LAUNCHER)]
    arguments: dict[str, str] = {
        "--model-path": str(launch.model_folder),
        "--weight-version": launch.weight_version,
        "--host": config.host,
        "--port": str(port),
        "--device": device,
        "--dtype": config.dtype,
        "--tensor-parallel-size": str(config.tensor_parallel_size),
        "--mem-fraction-static": str(config.memory_fraction),
        "--context-length": str(launch.max_total_tokens + _CONTEXT_MARGIN),
        # Structured output is not used, and its library takes seconds to load.
        "--grammar-backend": "none",
    }
    if config.max_kv_tokens is not None:
        arguments["--max-total-tokens"] = str(config.max_kv_tokens)
    flags = ["--skip-server-warmup", "--skip-tokenizer-init"]
    if device == "cpu":
        arguments["--attention-backend"] = "torch_native"
        arguments["--sampling-backend"] = "pytorch"
        arguments["--dtype"] = "float32"
        # A bound only, and a loose one: other programs take memory while the server looks at it.
        arguments["--mem-fraction-static"] = "0.5"
        arguments.setdefault(
            "--max-total-tokens",
            str(_cpu_kv_tokens(launch.model_folder, launch.max_total_tokens + _CONTEXT_MARGIN)),
        )
        # The scheduler otherwise polls all the time, on a core that the trainer needs.
        flags += ["--disable-overlap-schedule", "--sleep-on-idle"]
    flags += logits_flags(config, launch.logits_dtype, device=device)
    flags += deterministic_flags(config, device=device)
    if launch.releases_memory and device != "cpu":
        flags.append("--enable-memory-saver")
    pairs = [part for pair in arguments.items() for part in pair]
    return [*launcher, *pairs, *flags, *config.extra_args]


def _cpu_kv_tokens(model_folder: Path, min_tokens: int) -> int:
    """Return how many tokens of float32 KV cache fit into its share, at least ``min_tokens``."""
    heads = read_config_number(model_folder, "num_attention_heads")
    hidden_size = read_config_number(model_folder, "hidden_size")
    head_dim = read_config_number(model_folder, "head_dim", hidden_size // heads)
    kv_heads = read_config_number(model_folder, "num_key_value_heads", heads)
    numbers_per_token = 2 * read_config_number(model_folder, "num_hidden_layers") * kv_heads
    tokens = _CPU_KV_BYTES // (numbers_per_token * head_dim * 4)
    return max(min(tokens, _CPU_MAX_KV_TOKENS), min_tokens)


def _environment(launch: ServerLaunch) -> Mapping[str, str]:
    """Return the server's environment: the trainer's, without what would confuse it."""
    environment = {
        name: value
        for name, value in os.environ.items()
        if name not in _PRIVATE_VARIABLES and not name.startswith(_PRIVATE_BEGINNINGS)
    }
    environment["HF_HUB_OFFLINE"] = "1"  # the model is a folder
    # The margin may go past the model's positions; the requests do not.
    environment["SGLANG_ALLOW_OVERWRITE_LONGER_CONTEXT_LEN"] = "1"
    # For those who watch it from outside: /health answers without sampling a token.
    environment["SGLANG_ENABLE_HEALTH_ENDPOINT_GENERATION"] = "0"
    environment["CUDA_VISIBLE_DEVICES"] = ",".join(launch.gpus)
    if launch.releases_memory:
        # The memory saver cannot release segments that expand.
        for name in _ALLOCATOR_VARIABLES:
            environment.pop(name, None)
    if launch.device == "cpu":
        environment["SGLANG_USE_CPU_ENGINE"] = "1"
        environment["PYTHONPATH"] = str(_STAND_INS)
        environment.setdefault("OMP_NUM_THREADS", "1")
    return environment


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]
