"""From a run, a site and a layout to a job of Slurm, through NeMo-Run."""

import json
import logging
import os
import re
import shlex
import shutil
import signal
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from prefixrl_mcore.config import exit_codes
from prefixrl_mcore.config.base import ConfigError
from prefixrl_mcore.config.site import SiteConfig
from prefixrl_mcore.launch.slurm.job_folder import JobFolder
from prefixrl_mcore.launch.slurm.layout import ROLLOUT, TRAINER, JobLayout
from prefixrl_mcore.launch.slurm.precheck.step import expectations, precheck_step
from prefixrl_mcore.launch.slurm.srun import cpu_words, cpus_of_first, cpus_of_server, interpreter
from prefixrl_mcore.launch.slurm.states import SlurmError, cancel_job
from prefixrl_mcore.observability.signal_handlers import handled_by

logger = logging.getLogger(__name__)

_SUBMIT = Path(__file__).resolve().parents[1] / "nemo" / "submit.py"
_ANSWER = "prefixrl-submitted: "
"""Begins a line of its output that says which job has which number."""

_TASK = "prefixrl_mcore.launch.slurm.task"
_END_SECONDS = 120
"""How long tasks may go on after the first of their step has ended. They are not killed at once:
ranks that have saved together do not end at the same moment (rank 0 may upload metrics), and a
killed one would change the job's exit code. Rollout servers that are left serve on."""

_CLIENTS = {"SLURM_CONF", "SLURM_CONF_SERVER", "SLURM_CLUSTERS", "SLURM_JWT"}
"""Variables by which Slurm's commands find and enter a cluster."""

_ANOTHER_JOBS = re.compile(
    "(SLURM|SRUN|SPANK|PMI|PMIX)[0-9]*_.*|CUDA_VISIBLE_DEVICES"
    "|PREFIXRL_(TRAINER_HOSTS|ROLLOUT_HOSTS|JOB_END_UNIX_SECONDS|PRECHECK_TOKEN)"
)
"""Variables that tell a task of Slurm where it is."""

_SBATCH_OPTIONS = re.compile("(SBATCH|SALLOC)_(?!EXPORT$).*")
"""Variables that stand for options, of which sbatch would believe them before the script's."""


def describe(
    name: str,
    site: SiteConfig,
    layout: JobLayout,
    folder: JobFolder,
    *,
    dry_run: bool,
    role: str = TRAINER,
    after: JobFolder | None = None,
    needed: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Return what ``nemo/submit.py`` is asked to submit.

    Args:
        name: of the job.
        site: where.
        layout: its nodes and tasks.
        folder: its folder.
        dry_run: write the batch script alone.
        role: of the first step's tasks.
        after: the job that must have completed before, submitted together with this one.
        needed: paths that every node must have, by setting; None checks none.
    """
    return {
        "title": name,
        "home": str(folder.home),
        "logs": str(folder.logs),
        "dry_run": dry_run,
        "is_heterogeneous": layout.shape == "heterogeneous",
        "after": None if after is None else str(after.file),
        "executor": _executor(site),
        "tasks": _tasks(site, layout, folder, role),
        "precheck": expectations(site, layout, needed or {}),
        "template": {
            "logs": str(folder.logs),
            "trainer_nodes": layout.trainer_nodes,
            "num_tasks": [
                (role, layout.trainer_nodes * layout.ranks_per_node),
                (ROLLOUT, layout.server_nodes * layout.servers_per_node),
            ],
            "requeue_codes": list(site.requeue.exit_codes) if site.requeue.max_restarts else [],
            "max_restarts": site.requeue.max_restarts,
            "give_up_code": exit_codes.GIVE_UP,
            "nodes_by_partition": _nodes_by_partition(site, layout),
            "lost_code": exit_codes.TIME_LIMIT,
            "save_seconds": site.requeue.signal_seconds or _END_SECONDS,
            "precheck": precheck_step(site, layout, folder),
        },
    }


def submit(site: SiteConfig, jobs: Sequence[JobFolder]) -> None:
    """Let NeMo-Run write the batch scripts and, unless this is a dry run, submit them, in order.

    Args:
        site: where.
        jobs: all jobs of one launch, each behind those that it waits for.

    Raises:
        ConfigError: if there is no environment with NeMo-Run, or no Slurm.
        SlurmError: if a submission failed, with what was said; none is left in the queue then.
        KeyboardInterrupt: after all are submitted and cancelled again, if Ctrl-C comes meanwhile.
    """
    python = site.launch_python.absolute()
    if not os.access(python, os.X_OK):
        raise ConfigError(
            f"launch_python {python}: does not exist; run `make setup-launch`, or let the "
            "site's launch_python name an environment that has NeMo-Run"
        )
    is_dry_run = json.loads(jobs[0].file.read_text())["submission"]["dry_run"]
    if not is_dry_run and shutil.which("sbatch") is None:
        raise ConfigError(
            "sbatch is not on PATH: launch from a login node of the cluster, or say --dry-run"
        )
    try:
        with _interrupts_held_back():
            _run_nemo(python, jobs)
    except BaseException:
        _take_back(jobs)
        raise


@contextmanager
def _interrupts_held_back() -> Iterator[None]:
    """Raise KeyboardInterrupt behind the block, and inside only at the second Ctrl-C.

    The number of a job that is being submitted is not known yet: nobody could cancel it.
    """
    held: list[int] = []

    def hold(number: int, _frame: FrameType | None) -> None:
        if held:
            raise KeyboardInterrupt
        held.append(number)
        logger.warning("interrupted: jobs are cancelled again as soon as they are submitted")

    with handled_by(hold, [signal.SIGINT]):
        yield
    if held:
        raise KeyboardInterrupt


def _take_back(jobs: Sequence[JobFolder]) -> None:
    """Cancel what was submitted; of one that Slurm does not cancel say so, and go on."""
    unanswered = iter(_unanswered(jobs))
    for job in jobs:
        number = job.job_id or next(unanswered, None)
        if number is None:
            continue
        try:
            cancel_job(number)
        except SlurmError as error:
            logger.error("job %s (%s) is still submitted: %s", number, job.path.name, error)
        else:
            logger.error("job %s (%s) is cancelled again", number, job.path.name)


def _run_nemo(python: Path, jobs: Sequence[JobFolder]) -> None:
    """Submit all jobs in one process, and keep the number of each as soon as it is known.

    Raises:
        SlurmError: if a submission failed.
    """
    # -E: PYTHONPATH is the trainer's, and the job's, which inherits this environment with its
    # secrets; they are written nowhere.
    process = subprocess.Popen(
        [str(python), "-W", "ignore", "-E", str(_SUBMIT), *(str(job.file) for job in jobs)],
        env=job_environment(os.environ),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,  # Ctrl-C is not for it: sbatch would die before it says a number
    )
    by_file, said = {str(job.file): job for job in jobs}, []
    with process, _ended_by_interrupt(process):
        assert process.stdout is not None, "it is a pipe"
        for line in process.stdout:
            if not line.startswith(_ANSWER):
                said.append(line)
                continue
            answer = json.loads(line.removeprefix(_ANSWER))
            job = by_file.pop(answer["file"])
            if answer["job_id"] is not None:
                job.write_submitted(answer["job_id"])
            shutil.copyfile(answer["script"], job.script)
            if job.job_id is not None:
                logger.info("job %s is submitted; its folder is %s", job.job_id, job.path)
            (job.path / "nemo.log").write_text("".join(said))
            said.clear()
    if by_file:
        failed = next(iter(by_file.values()))
        log = failed.path / "nemo.log"
        log.write_text("".join(said))
        raise SlurmError(
            f"the submission of {failed.path.name} failed: {_cause(''.join(said))}\n"
            f"All that NeMo-Run said is in {log}"
        )


@contextmanager
def _ended_by_interrupt(process: "subprocess.Popen[str]") -> Iterator[None]:
    """End the leader of a session, and the sbatch that it runs, at the second Ctrl-C."""
    try:
        yield
    except KeyboardInterrupt:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        logger.warning("interrupted: `squeue --me` shows whether a job was just being submitted")
        raise


def _unanswered(jobs: Sequence[JobFolder]) -> list[str]:
    """Return the jobs that NeMo-Run has submitted and not told of, in order.

    It keeps numbers in the home that it was imported with, one line each: ``7 = ...``.
    """
    kept = jobs[0].home / ".slurm_jobs"
    lines = kept.read_text().splitlines() if kept.exists() else []
    numbers = [line.partition(" =")[0].partition(";")[0] for line in lines]
    known = {job.job_id for job in jobs}
    return [number for number in numbers if number.isdigit() and number not in known]


def job_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """Return what a job may inherit.

    Not what another job, in which this one is launched, is; and no options of sbatch, which would
    silently win over the site's: they belong into ``sbatch`` of the site.
    """
    return {
        name: value
        for name, value in environment.items()
        if name in _CLIENTS
        or not (_ANOTHER_JOBS.fullmatch(name) or _SBATCH_OPTIONS.fullmatch(name))
    }


def _cause(said: str) -> str:
    """Return the line that tells why, sbatch's own if there are some, each once."""
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    told = [line for line in lines if line.startswith("sbatch: error:")]
    return "; ".join(dict.fromkeys(told)) or (lines[-1] if lines else "nothing was said")


def _nodes_by_partition(site: SiteConfig, layout: JobLayout) -> list[tuple[str, int]]:
    """Return the nodes that a job needs of each partition, as a word of bash."""
    own = "$SLURM_JOB_PARTITION" if site.partition is None else site.partition
    other = site.rollout_nodes.partition if layout.shape == "heterogeneous" else None
    if other in (None, own):
        needs = {own: layout.num_nodes}
    else:
        needs = {own: layout.trainer_nodes, other: layout.rollout_nodes}
    return [
        (f'"{name}"' if name.startswith("$") else shlex.quote(name), nodes)
        for name, nodes in needs.items()
    ]


def _executor(site: SiteConfig) -> dict[str, Any]:
    """Return what all tasks of a job share, in the names of NeMo-Run's SlurmExecutor."""
    seconds = site.requeue.signal_seconds
    container = site.container
    return {
        "account": site.account,
        "partition": site.partition,
        "qos": site.qos,
        "time": site.time,
        "mem": site.memory,
        "exclusive": site.exclusive or None,
        "constraint": site.constraint,
        "signal": None if seconds is None else f"USR1@{seconds}",
        "setup_lines": "\n".join(site.setup_lines) or None,
        # A child of a failed job would wait for ever.
        "additional_parameters": {**site.sbatch, "kill_on_invalid_dep": "yes"},
        "job_name_prefix": "prefixrl.",  # else it is made of the account, which may be None
        "container_image": shlex.quote(container.image) if container else None,
        "container_mounts": [shlex.quote(m) for m in container.mounts] if container else [],
        "container_env": (list(container.environment) or None) if container else None,
    }


def _tasks(
    site: SiteConfig, layout: JobLayout, folder: JobFolder, first_role: str
) -> list[dict[str, Any]]:
    """Return the steps of a job, the trainer's or the stage's first."""
    is_split = layout.shape == "split"
    cpus = cpu_words(cpus_of_first(site, first_role))
    if cpus and not layout.server_nodes:
        # Servers run on the CPUs of the task that starts them: let that be all of the node.
        cpus.append("--cpu-bind=none")
    first = _task(
        site,
        folder,
        role=first_role,
        nodes=layout.trainer_nodes,
        per_node=layout.ranks_per_node,
        cpus=cpus,
        first_node=0 if is_split else None,
    )
    first["executor"] = {
        "nodes": layout.num_nodes if is_split else layout.trainer_nodes,
        "ntasks_per_node": layout.ranks_per_node,
        "cpus_per_task": cpus_of_first(site, first_role),
        **_gpu_request(site, site.gpus_per_node, site.gpu_type),
    }
    if not layout.server_nodes:
        return [first]
    rollout = _task(
        site,
        folder,
        role=ROLLOUT,
        nodes=layout.server_nodes,
        per_node=layout.servers_per_node,
        cpus=cpu_words(cpus_of_server(site, layout)),
        first_node=(
            None if layout.shape == "heterogeneous" else layout.num_nodes - layout.server_nodes
        ),
    )
    if layout.shares_nodes:
        # CPUs, memory and GPUs of the trainer's step, for whose end it would have to wait else.
        rollout["srun_args"].insert(0, "--overlap")
    rollout["executor"] = {
        "nodes": layout.server_nodes,
        "ntasks_per_node": layout.servers_per_node,
    }
    if layout.shape == "heterogeneous":
        rollout["options"] = _rollout_options(site, layout)
    return [first, rollout]


def _rollout_options(site: SiteConfig, layout: JobLayout) -> dict[str, Any]:
    """Return all options in which the component of the rollout nodes may differ; None is none."""
    own = site.rollout_nodes
    gpus = _gpu_request(site, layout.rollout_gpus_per_node, own.gpu_type or site.gpu_type)
    return {
        "partition": own.partition or site.partition,
        "qos": own.qos or site.qos,
        "constraint": own.constraint,
        "mem": own.memory or site.memory,
        "cpus-per-task": cpus_of_server(site, layout),
        "gpus-per-node": gpus.get("gpus_per_node"),
        "gres": gpus.get("gres"),
    }


def _task(
    site: SiteConfig,
    folder: JobFolder,
    *,
    role: str,
    nodes: int,
    per_node: int,
    cpus: list[str],
    first_node: int | None,
) -> dict[str, Any]:
    """Return one step; with ``first_node`` on some of the job's nodes only."""
    end_seconds = _END_SECONDS if role == TRAINER else 0  # 0 is for ever
    arguments = ["--kill-on-bad-exit=0", f"--wait={end_seconds}", *cpus]
    if first_node is not None:
        arguments += [
            *(f"--nodes={nodes}", f"--ntasks={nodes * per_node}"),
            *(f"--ntasks-per-node={per_node}", f"--relative={first_node}"),
        ]
    return {
        "role": role,
        "srun_args": [*arguments, *site.srun_args],
        "command": [interpreter(site), "-m", _TASK, str(folder.path), role],
    }


def _gpu_request(site: SiteConfig, gpus: int, gpu_type: str | None) -> dict[str, Any]:
    """Return how a job asks for the GPUs of a node; nothing where it does not."""
    if gpus == 0 or site.gpu_request == "none":
        return {}
    words = [*([gpu_type] if gpu_type else []), str(gpus)]
    if site.gpu_request == "gres":
        return {"gres": ":".join(["gpu", *words])}
    return {"gpus_per_node": ":".join(words) if gpu_type else gpus}
