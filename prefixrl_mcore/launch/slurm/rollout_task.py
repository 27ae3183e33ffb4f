"""The task of a rollout node: one SGLang server, reachable from the trainer's node."""

import logging
import signal
import socket
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from types import FrameType
from urllib.parse import urlsplit

from prefixrl_mcore.config.load import load_config
from prefixrl_mcore.config.run import TIME_LIMIT_EXIT_CODE, RunConfig
from prefixrl_mcore.launch.slurm.job_folder import JobFolder, TaskFile
from prefixrl_mcore.launch.slurm.rank_environment import server_port
from prefixrl_mcore.observability.atomic import write_json_atomic
from prefixrl_mcore.rollout.engine import EngineError
from prefixrl_mcore.rollout.sglang.launch import ServerLaunch
from prefixrl_mcore.rollout.sglang.server import SGLangServer

logger = logging.getLogger(__name__)

_POLL_SECONDS = 1.0


def serve(folder: JobFolder, task: TaskFile, environment: Mapping[str, str]) -> int:
    """Serve the initial model until told to end, and say where once the server is healthy.

    Returns:
        0 when told to end; 1 if the server does not come up; 75, which sends the job back into the
        queue, if it dies later.
    """
    ending: list[int] = []

    def remember(number: int, _frame: FrameType | None) -> None:
        ending.append(number)

    signal.signal(signal.SIGTERM, remember)
    # It is the trainer that saves; the server inherits this, and serves until the trainer ends.
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    index, start = int(environment["SLURM_PROCID"]), environment.get("SLURM_RESTART_COUNT") or "0"
    config = load_config(RunConfig, Path(task.config), [])
    try:
        launch = ServerLaunch(
            name=f"rollout server {index}",
            model_folder=config.model.path,
            config=config.rollout.sglang.model_copy(update={"host": "0.0.0.0"}),
            logits_dtype=config.model.logits_dtype,
            device="cuda" if task.gpus_per_server else "cpu",
            gpus=own_gpus(environment, task.gpus_per_server),
            max_total_tokens=config.rollout.max_total_tokens,
            weight_version="initial",
        )
        log_file = folder.logs / f"start-{start}" / f"sglang-{index}.log"
        planned = server_port(environment["SLURM_JOB_ID"], int(environment["SLURM_LOCALID"]))
        server = SGLangServer.start(launch, log_file, cancelled=threading.Event(), port=planned)
    except (EngineError, ValueError) as error:
        logger.error("%s", error)
        return 1
    port = urlsplit(server.client.url).port
    url = f"http://{socket.gethostname()}:{port}"
    write_json_atomic(folder.server_file(int(start), index), {"url": url})
    logger.warning("rollout server %d serves at %s", index, url)
    while server.is_alive and not ending:
        time.sleep(_POLL_SECONDS)
    if ending:
        server.stop()
        return 0
    logger.error("rollout server %d has died:\n%s", index, server.log_tail())
    return TIME_LIMIT_EXIT_CODE


def own_gpus(environment: Mapping[str, str], number: int) -> tuple[str, ...]:
    """Return this task's share of the node's GPUs, as entries of ``CUDA_VISIBLE_DEVICES``."""
    first = int(environment["SLURM_LOCALID"]) * number
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    gpus = visible.split(",") if visible else [str(index) for index in range(first + number)]
    return tuple(gpus[first : first + number])
