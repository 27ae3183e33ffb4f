"""A rollout task: one SGLang server, reachable from the trainer's node.

A server that dies is started again at the same address, where the trainer's pool waits for it and
sends it the current weights. One that dies too often sends the job back into the queue.
"""

import logging
import signal
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from types import FrameType
from urllib.parse import urlsplit

from prefixrl_mcore.config import exit_codes
from prefixrl_mcore.config.load import load_config
from prefixrl_mcore.config.run import RunConfig
from prefixrl_mcore.launch.slurm.first_call import wait_for_call
from prefixrl_mcore.launch.slurm.job_folder import JobFolder, TaskFile
from prefixrl_mcore.launch.slurm.rank_environment import server_port, start_number
from prefixrl_mcore.observability.atomic import write_json_atomic
from prefixrl_mcore.rollout.engine import EngineError
from prefixrl_mcore.rollout.sglang.api_key import find_api_key
from prefixrl_mcore.rollout.sglang.launch import ServerLaunch
from prefixrl_mcore.rollout.sglang.restarts import RestartAllowance
from prefixrl_mcore.rollout.sglang.server import SGLangServer

logger = logging.getLogger(__name__)

_POLL_SECONDS = 1.0


def serve(folder: JobFolder, task: TaskFile, environment: Mapping[str, str]) -> int:
    """Serve the initial model until told to end, and say where.

    On a node of its own the server starts at once, and its address is written once it is healthy.
    Beside trainer ranks the address is written at once, and the server starts when it is called.

    Returns:
        0 when told to end; 1 if the server does not come up; 75, which sends the job back into the
        queue, if it dies more often than ``rollout.sglang.max_restarts`` allows.
    """
    ending = _told_to_end()
    index, start = int(environment["SLURM_PROCID"]), start_number(environment)
    config = load_config(RunConfig, Path(task.config), [])
    launch = server_launch(config, task, environment)
    port = server_port(environment["SLURM_JOB_ID"], int(environment["SLURM_LOCALID"]))
    allowance = RestartAllowance(config.rollout.sglang)

    def tell(port: int) -> str:
        url = f"http://{environment['SLURMD_NODENAME']}:{port}"
        write_json_atomic(
            folder.server_file(start, index),
            {
                "url": url,
                "num_restarts": allowance.num_restarts,
                "max_restarts": config.rollout.sglang.max_restarts,
            },
        )
        return url

    if task.shares_nodes:
        tell(port)
    while True:
        num_restarts = allowance.num_restarts
        log_file = folder.logs / f"start-{start}" / f"sglang-{index}-{num_restarts}.log"
        is_known = task.shares_nodes or num_restarts > 0
        server = None
        if not task.shares_nodes or _was_called(launch, port, ending):
            server = _start(launch, log_file, ending, port, is_known=is_known)
        if server is not None:
            allowance.note_success()
            port = _port_of(server)
            logger.warning("%s serves at %s", launch.name, tell(port))
            _wait_for_its_end(server, launch.name, ending)
        if ending.is_set():
            return 0
        if server is None and not num_restarts:
            return 1
        if not _take_restart(allowance, ending):
            if ending.is_set():
                return 0
            logger.error("%s is not started again: %s", launch.name, allowance)
            return exit_codes.TIME_LIMIT
        logger.warning("%s is started again, with the initial weights: %s", launch.name, allowance)


def _told_to_end() -> threading.Event:
    """Return what is set when this task is told to end: by SIGUSR2, after the trainer's end.

    All tasks get SIGTERM at the beginning of a preemption's grace, and SIGUSR1 before the time
    limit: the trainer saves, and needs its servers until it has.
    """
    ending = threading.Event()

    def end(_number: int, _frame: FrameType | None) -> None:
        # In a thread, because this one may be inside the event and hold its lock.
        threading.Thread(target=ending.set).start()

    def serve_on(_number: int, _frame: FrameType | None) -> None:
        """Do nothing. Servers would inherit SIG_IGN, and are ended by SIGTERM."""

    signal.signal(signal.SIGUSR2, end)
    signal.signal(signal.SIGTERM, serve_on)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # the server inherits this
    return ending


def _was_called(launch: ServerLaunch, port: int, ending: threading.Event) -> bool:
    """Wait until the trainer looks for the server; return False if it is not to be started."""
    logger.warning("%s starts when the trainer looks for it on port %d", launch.name, port)
    try:
        key = find_api_key(launch.config)
        assert key is not None, "a server that other machines reach has one"
        return wait_for_call(port, key, is_ending=ending.is_set)
    except (EngineError, ValueError) as error:
        logger.error("%s", error)
        return False


def _start(
    launch: ServerLaunch, log_file: Path, ending: threading.Event, port: int, *, is_known: bool
) -> SGLangServer | None:
    """Start a server; return None if it does not come up, where the trainer knows it to be."""
    try:
        server = SGLangServer.start(launch, log_file, cancelled=ending, port=port)
    except (EngineError, OSError, ValueError) as error:  # a later start may find more
        if not ending.is_set():
            logger.error("%s: %s", launch.name, error)
        return None
    if is_known and _port_of(server) != port:
        logger.error("%s: who listens on port %d, where the trainer waits?", launch.name, port)
        server.stop()
        return None
    return server


def _take_restart(allowance: RestartAllowance, ending: threading.Event) -> bool:
    """Take a restart when it is due; return False if none is left, or the task is to end."""
    while not allowance.take(time.monotonic()):
        if not allowance.is_left(time.monotonic()) or ending.wait(_POLL_SECONDS):
            return False
    return True


def _port_of(server: SGLangServer) -> int:
    """Return where a server listens."""
    port = urlsplit(server.client.url).port
    assert port is not None, server.client.url
    return port


def _wait_for_its_end(server: SGLangServer, name: str, ending: threading.Event) -> None:
    """Wait until a server dies, which is logged, or is to end; nothing of it is left then."""
    while server.is_alive and not ending.is_set():
        ending.wait(_POLL_SECONDS)
    if not ending.is_set():
        logger.error("%s has died: %s; %s", name, server.cause_of_death(), server.log_tail())
    server.stop()


def server_launch(
    config: RunConfig, task: TaskFile, environment: Mapping[str, str]
) -> ServerLaunch:
    """Return how this task's server is started, every time.

    On the trainer's GPUs it sees all of them, as rank 0 does, which sends it handles of memory.
    """
    number = task.gpus_per_server
    gpus, first_gpu = own_gpus(environment, number), 0
    if task.shares_nodes:
        gpus, first_gpu = _gpus_up_to_own(environment, number), _first_gpu(environment, number)
    return ServerLaunch(
        name=f"rollout server {environment['SLURM_PROCID']}",
        model_folder=config.model.path,
        config=config.rollout.sglang.model_copy(update={"host": "0.0.0.0"}),
        logits_dtype=config.model.logits_dtype,
        device="cuda" if task.gpus_per_server else "cpu",
        gpus=gpus,
        first_gpu=first_gpu,
        max_total_tokens=config.rollout.max_total_tokens,
        weight_version="initial",
        releases_memory=config.rollout.colocated,
    )


def own_gpus(environment: Mapping[str, str], number: int) -> tuple[str, ...]:
    """Return this task's share of the node's GPUs, as entries of ``CUDA_VISIBLE_DEVICES``."""
    first = _first_gpu(environment, number)
    return _gpus_up_to_own(environment, number)[first : first + number]


def _first_gpu(environment: Mapping[str, str], number: int) -> int:
    """Return which of the node's GPUs is the first of this task's."""
    return int(environment["SLURM_LOCALID"]) * number


def _gpus_up_to_own(environment: Mapping[str, str], number: int) -> tuple[str, ...]:
    """Return the node's GPUs, at least those up to this task's last."""
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    if visible and number:
        return tuple(visible.split(","))
    return tuple(str(index) for index in range(_first_gpu(environment, number) + number))
