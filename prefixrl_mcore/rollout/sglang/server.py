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
from pathlib import Path

from prefixrl_mcore.rollout.engine import EngineError
from prefixrl_mcore.rollout.sglang.api_key import (
    address_of,
    find_api_key,
    hand_over,
)
from prefixrl_mcore.rollout.sglang.client import SGLangClient
from prefixrl_mcore.rollout.sglang.environment import find_interpreter
from prefixrl_mcore.rollout.sglang.faults import ServerFault
from prefixrl_mcore.rollout.sglang.launch import (
    ServerLaunch,
    server_arguments,
    server_environment,
)
from prefixrl_mcore.rollout.sglang.precision import refused_flags
from prefixrl_mcore.rollout.sglang.supervisor import describe_exit

logger = logging.getLogger(__name__)

_SUPERVISOR = Path(__file__).resolve().parent / "supervisor.py"

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


class SGLangServer:
    """One running server; ``start`` makes it, ``stop`` ends all of its processes."""

    def __init__(
        self,
        name: str,
        process: subprocess.Popen[bytes],
        client: SGLangClient,
        log_file: Path,
        *,
        start_bytes: int = 0,
    ) -> None:
        """Own a server that was just started; use ``start``.

        Args:
            name: of the server, for logs.
            process: its supervisor.
            client: calls to it.
            log_file: gets its output.
            start_bytes: size that the log had before.
        """
        self._name = name
        self._process = process
        self._owner_pid = os.getpid()
        self.client = client
        self.log_file = log_file
        self._log_start_bytes = start_bytes
        atexit.register(self.stop)

    @classmethod
    def start(
        cls,
        launch: ServerLaunch,
        log_file: Path,
        *,
        cancelled: threading.Event,
        port: int | None = None,
    ) -> "SGLangServer":
        """Start a server and return when it is healthy; may be called in any thread.

        Another process may take the port between its choice and its use: then it gets another one.

        Args:
            launch: how.
            log_file: gets the server's output; its folder is made.
            cancelled: when set, the server is ended and the wait given up.
            port: tried first; None takes a free one.

        Raises:
            EngineError: if SGLang's environment is missing; if the server dies or is not healthy in
                time, with the end of its log; if it was cancelled.
            OSError: if this machine has no memory, file or space left for it.
            ValueError: if its API key cannot be read, or is missing.
        """
        for _ in range(_PORT_ATTEMPTS):
            server = cls._spawn(launch, _free_port() if port is None else port, log_file)
            port = None
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
        python = find_interpreter(launch.config.python)
        api_key = find_api_key(launch.config)
        command = [
            str(python),
            str(_SUPERVISOR),
            str(os.getpid()),
            str(python),
            *server_arguments(launch, port, has_key=api_key is not None),
        ]
        log_file.parent.mkdir(parents=True, exist_ok=True)
        logger.info(
            "SGLang: starting %s for %s on port %d%s; its output goes to %s",
            *(launch.name, launch.model_folder, port),
            *(f", GPUs {','.join(launch.gpus)}" if launch.gpus else "", log_file),
        )
        with log_file.open("ab") as log:  # behind what a start on a port that was taken left
            start_bytes = log.tell()
            log.write((" ".join(command) + "\n").encode())
            log.flush()
            process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=server_environment(launch),
                start_new_session=True,
            )
        hand_over(api_key, process)
        client = SGLangClient(
            address_of(launch.config.host, port),
            request_timeout_seconds=launch.config.request_timeout_seconds,
            api_key=api_key,
            max_connections=launch.config.max_samples_per_server,
        )
        return cls(launch.name, process, client, log_file, start_bytes=start_bytes)

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
        """Return the end of what it wrote: that grows for as long as the server lives."""
        try:
            with self.log_file.open("rb") as log:
                size = log.seek(0, os.SEEK_END)
                log.seek(max(self._log_start_bytes, size - _LOG_BYTES))
                return log.read().decode(errors="replace")
        except OSError as error:  # a death is told without its log, too
            return f"the log cannot be read: {error}"

    def _kill_group(self) -> None:
        """Kill what is left of the process group; it keeps its id as long as a member lives."""
        try:
            os.killpg(self._process.pid, signal.SIGKILL)
        except ProcessLookupError:
            return


class _PortTaken(RuntimeError):  # noqa: N818 -- not an error as long as there are other ports
    """Another process has the port that the server was to have."""


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]
