"""A SGLang HTTP server as a child process: started, watched, ended.

The server lives in an environment of its own, since SGLang pins torch and transformers; nothing
of it is imported here.
"""

import atexit
import logging
import os
import signal
import socket
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path

from prefixrl_mcore.config.policy import LogitsDtype
from prefixrl_mcore.config.rollout import SGLangConfig
from prefixrl_mcore.rollout.engine import EngineError
from prefixrl_mcore.rollout.sglang.api_key import (
    API_KEY_VARIABLE,
    address_of,
    find_api_key,
    hand_over,
)
from prefixrl_mcore.rollout.sglang.client import SGLangClient
from prefixrl_mcore.rollout.sglang.determinism import deterministic_flags
from prefixrl_mcore.rollout.sglang.precision import logits_flags, refused_flags
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

_CPU_KV_BYTES = 1024**3
_CPU_MAX_KV_TOKENS = 65536
"""Size of the KV cache on a CPU machine without ``max_kv_tokens``: SGLang would take a share
of all memory."""

_CONTEXT_MARGIN = 16
"""SGLang cuts a completion a few tokens before its context length, without a word."""

_PRIVATE_VARIABLES = (
    *("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "ROLE_RANK"),
    *("MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT"),
    API_KEY_VARIABLE,  # the server gets it through its standard input
    *("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV", "PYTHONDONTWRITEBYTECODE"),
)
"""The trainer's own: the server would join its process group, import its packages, show its key."""


class SGLangServer:
    """One running server; ``start`` makes it, ``stop`` ends all of its processes."""

    def __init__(
        self, process: subprocess.Popen[bytes], client: SGLangClient, log_file: Path
    ) -> None:
        """Own a server that was just started; use ``start``."""
        self._process = process
        self._owner_pid = os.getpid()
        self.client = client
        self.log_file = log_file
        atexit.register(self.stop)

    @classmethod
    def start(
        cls,
        model_folder: Path,
        config: SGLangConfig,
        *,
        logits_dtype: LogitsDtype,
        device: str,
        max_total_tokens: int,
        weight_version: str,
        log_file: Path,
    ) -> "SGLangServer":
        """Start a server and return when it is healthy.

        Args:
            model_folder: Hugging Face folder that it serves.
            config: its settings.
            logits_dtype: precision of a bfloat16 model's logits.
            device: ``cpu`` or ``cuda``.
            max_total_tokens: longest context and completion together.
            weight_version: name of the weights in the folder, stamped on completions.
            log_file: gets the server's output; its folder is made.

        Raises:
            EngineError: if SGLang's environment is missing; if the server dies or is not healthy in
                time, with the end of its log.
        """
        # Not resolved: an environment's interpreter is a link, and finds its packages by the link.
        python = config.python.absolute()
        if not os.access(python, os.X_OK):
            raise EngineError(
                f"its interpreter {python} does not exist; run `make setup-sglang`, or set "
                "rollout.sglang.python to an environment that has SGLang"
            )
        port = _free_port()
        api_key = find_api_key(config)
        command = [
            str(python),
            str(_SUPERVISOR),
            str(os.getpid()),
            str(python),
            *_server_arguments(
                model_folder,
                config,
                logits_dtype=logits_dtype,
                device=device,
                port=port,
                has_key=api_key is not None,
                max_total_tokens=max_total_tokens,
            ),
            f"--weight-version={weight_version}",
        ]
        log_file.parent.mkdir(parents=True, exist_ok=True)
        logger.info("SGLang: starting a server for %s on port %d", model_folder, port)
        with log_file.open("wb") as log:
            log.write((" ".join(command) + "\n").encode())
            log.flush()
            process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=_environment(device),
                start_new_session=True,
            )
        hand_over(api_key, process)
        client = SGLangClient(
            address_of(config.host, port),
            request_timeout_seconds=config.request_timeout_seconds,
            api_key=api_key,
        )
        server = cls(process, client, log_file)
        try:
            server._wait_until_healthy(config.start_timeout_seconds)
            client.check_guard()
        except BaseException:
            server.stop()
            raise
        return server

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
                logger.warning("SGLang: the server did not end in time; killing it")
        self._kill_group()
        self._process.wait()
        self.client.close()

    def log_tail(self) -> str:
        """Return the last lines of the server's output."""
        lines = self._log_text().splitlines()
        tail = "\n".join(f"  | {line}" for line in lines[-_TAIL_LINES:])
        return f"end of {self.log_file}:\n{tail}"

    def _wait_until_healthy(self, timeout_seconds: float) -> None:
        started = time.monotonic()
        reported = started
        while not self.client.is_healthy():
            now = time.monotonic()
            if not self.is_alive:
                cause = refused_flags(self._log_text())
                raise EngineError(
                    f"SGLang: the server died while it started{cause}; {self.log_tail()}"
                )
            if now - started > timeout_seconds:
                raise EngineError(
                    f"SGLang: the server was not healthy after {timeout_seconds:.0f} s; raise "
                    f"rollout.sglang.start_timeout_seconds if it is only slow; {self.log_tail()}"
                )
            if now - reported > _REPORT_SECONDS:
                reported = now
                logger.info(
                    "SGLang: waiting for the server to be healthy, %.0f of at most %.0f s; its "
                    "output is in %s",
                    *(now - started, timeout_seconds, self.log_file),
                )
            time.sleep(_POLL_SECONDS)
        logger.info("SGLang: healthy after %.1f s", time.monotonic() - started)

    def _log_text(self) -> str:
        return self.log_file.read_text(encoding="utf-8", errors="replace")

    def _kill_group(self) -> None:
        """Kill what is left of the process group; it keeps its id as long as a member lives."""
        try:
            os.killpg(self._process.pid, signal.SIGKILL)
        except ProcessLookupError:
            return


def _server_arguments(
    model_folder: Path,
    config: SGLangConfig,
    *,
    logits_dtype: LogitsDtype,
    device: str,
    port: int,
    has_key: bool,
    max_total_tokens: int,
) -> list[str]:
    """Return what the interpreter is given to run."""
    is_stock = device != "cpu" and not has_key
    launcher = ["-m", "sglang.launch_server"] if is_stock else [str(LAUNCHER)]
    arguments: dict[str, str] = {
        "--model-path": str(model_folder),
        "--host": config.host,
        "--port": str(port),
        "--device": device,
        "--dtype": config.dtype,
        "--tensor-parallel-size": str(config.tensor_parallel_size),
        "--mem-fraction-static": str(config.memory_fraction),
        "--context-length": str(max_total_tokens + _CONTEXT_MARGIN),
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
            str(_cpu_kv_tokens(model_folder, max_total_tokens + _CONTEXT_MARGIN)),
        )
        # The scheduler otherwise polls all the time, on a core that the trainer needs.
        flags += ["--disable-overlap-schedule", "--sleep-on-idle"]
    flags += logits_flags(config, logits_dtype, device=device)
    flags += deterministic_flags(config, device=device)
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


def _environment(device: str) -> Mapping[str, str]:
    """Return the server's environment: the trainer's, without what would confuse it."""
    environment = {
        name: value for name, value in os.environ.items() if name not in _PRIVATE_VARIABLES
    }
    environment["HF_HUB_OFFLINE"] = "1"  # the model is a folder
    # The margin may go past the model's positions; the requests do not.
    environment["SGLANG_ALLOW_OVERWRITE_LONGER_CONTEXT_LEN"] = "1"
    # /health answers from the HTTP process instead of sampling a token.
    environment["SGLANG_ENABLE_HEALTH_ENDPOINT_GENERATION"] = "0"
    if device == "cpu":
        environment["SGLANG_USE_CPU_ENGINE"] = "1"
        environment["CUDA_VISIBLE_DEVICES"] = ""
        environment["PYTHONPATH"] = str(_STAND_INS)
        environment.setdefault("OMP_NUM_THREADS", "1")
    return environment


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]
