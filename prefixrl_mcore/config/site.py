"""A site profile: what a cluster wants to be told, apart from what is run on it."""

import re
from pathlib import Path
from typing import Literal

from pydantic import Field, field_validator, model_validator

from prefixrl_mcore.config import exit_codes
from prefixrl_mcore.config.base import Config

_TIME = re.compile(r"(\d+-)?\d+:\d{2}:\d{2}")
_OWN_SETTINGS = {
    "account": "account",
    "partition": "partition",
    "qos": "qos",
    "time": "time",
    "mem": "memory",
    "cpus-per-task": "cpus_per_task",
    "constraint": "constraint",
    "exclusive": "exclusive",
    "gres": "gpu_request",
    "gpus-per-node": "gpus_per_node",
    "ntasks-per-node": "ranks_per_node",
    "signal": "requeue.signal_seconds",
    "requeue": "requeue",
    "output": "job_folder",
}
"""Options of sbatch that have a setting of their own."""

_LAUNCHERS = {
    **dict.fromkeys(("nodes", "ntasks", "gpus", "gpus-per-task"), "follows from the run's layout"),
    "ntasks-per-gpu": "follows from the run's layout",
    "job-name": "is --name of prefixrl launch",
    "chdir": "the job runs in the folder that it is launched from",
    **dict.fromkeys(("error", "open-mode"), "the job's log is found and read by prefixrl"),
    "dependency": "the stages of a recipe wait for each other by it",
    "kill-on-invalid-dep": "a stage would wait for ever for one that failed",
    "array": "a job is one run; --sweep submits several",
    "no-requeue": "a preempted run could not go on; requeue.max_restarts = 0 requeues none",
    "no-kill": "a run cannot go on without one of its nodes",
    **dict.fromkeys(
        ("export", "export-file"),
        "tasks inherit what they need; setup_lines export more, or SBATCH_EXPORT where you launch",
    ),
    **dict.fromkeys(("wrap", "wait", "test-only"), "prefixrl launch submits, and waits"),
}
"""Options of sbatch that are the launcher's, and why."""

_REFUSED = {
    **{option: f"has a setting of its own, {name}" for option, name in _OWN_SETTINGS.items()},
    **{option: f"is the launcher's: {why}" for option, why in _LAUNCHERS.items()},
}

_SIGNAL_EARLY_SECONDS = 60
"""How much earlier than asked Slurm may send a signal."""

_SAVED = (exit_codes.TIME_LIMIT, exit_codes.SAVED_AFTER_USR1)

_NOT_FOR_TRAINERS = {
    exit_codes.EXCLUDE_NODES: "the pre-check's, for nodes to leave out",
    exit_codes.GIVE_UP: "the pre-check's, for a job to end",
    exit_codes.HUNG: "a pre-check's that hangs",
}

_SECRET = re.compile(
    r"""\b(?!\w*TOKENS=["']?\d+\b)"""
    r"""((?:\w*_)?(?:API)?(?:KEY|TOKEN|SECRET|PASSWORD|PASSWD|PAT|KEY_ID)S?)"""
    r"""=["']?(?![$`"'\s;&|)]|$)""",
    re.IGNORECASE,
)
"""A variable whose name is a secret's, and a value that is written out; a number of tokens is
none."""

_VARIABLE = re.compile(r"[A-Za-z_]\w*", re.ASCII)
NEMO_RUN_REWRITES = "/nemo_run"
"""What NeMo-Run replaces in a batch script without a container, wherever it stands."""


class ContainerConfig(Config):
    """A container image that every task runs in, through Pyxis (``srun --container-image``)."""

    image: str = Field(min_length=1)
    """What Enroot knows it by: ``registry#name:tag``, or the path of a ``.sqsh`` file."""

    mounts: tuple[str, ...] = ()
    """``host:container[:options]``; the working directory, the job folder and the folders that the
    config names must be among them, at the same path on both sides."""

    environment: tuple[str, ...] = ()
    """Names of variables whose value from outside wins over the image's own."""

    @field_validator("mounts")
    @classmethod
    def _a_mount_has_two_sides(cls, mounts: tuple[str, ...]) -> tuple[str, ...]:
        for mount in mounts:
            sides = mount.split(":")
            if len(sides) not in (2, 3) or not all(side.startswith("/") for side in sides[:2]):
                raise ValueError(
                    f"{mount!r} must be host:container or host:container:flags, both absolute"
                )
        return mounts


class RequeueConfig(Config):
    """When a job goes back into the queue instead of ending."""

    max_restarts: int = Field(default=20, ge=0)
    """Restarts of one job at most, those after preemptions and failed nodes included: a job that
    Slurm starts more often ends at once. 0 allows none."""

    exit_codes: tuple[int, ...] = _SAVED
    """Exit codes of the trainer that requeue the job: by default those that say that everything
    was saved, before the time limit (75) and after SIGUSR1 (138). Adding 76 starts a stalled run
    again from its last checkpoint. A preempted job goes back whatever its exit code but 0."""

    signal_seconds: int | None = Field(default=180, ge=1)
    """Seconds before the end at which Slurm sends SIGUSR1 to all tasks (it may be up to a minute
    earlier); long enough for an update and a save: sampling is interrupted. None sends none."""

    @field_validator("exit_codes")
    @classmethod
    def _exit_codes_are_a_trainers(cls, codes: tuple[int, ...]) -> tuple[int, ...]:
        for code in codes:
            if not 1 <= code <= 255:
                raise ValueError(f"{code} is no exit code of a failure: they are 1 to 255")
            if code in _NOT_FOR_TRAINERS:
                raise ValueError(f"{code} is {_NOT_FOR_TRAINERS[code]}")
        return codes


class PrecheckConfig(Config):
    """What every node must have before the first collective; a bad one is left out of the job."""

    enabled: bool = True
    """Check the nodes at each start of a job."""

    timeout_seconds: float = Field(default=300.0, gt=0.0)
    """How long nodes have, from when the first one is ready; one that says nothing is bad. Nodes
    that fetch their container image later than the first one do so in this time, the first one in
    this and ten minutes more: raise it for images that come from a registry."""

    max_excluded_nodes: int = Field(default=4, ge=0)
    """Nodes that one job may leave out, over all its starts; with more the job fails."""

    max_clock_skew_seconds: float = Field(default=5.0, gt=0.0)
    """How far the clock of a node may be from the median of all."""

    min_free_gib: float = Field(default=20.0, ge=0.0)
    """Free on the file system of ``job_folder``, GiB."""

    min_temporary_gib: float = Field(default=1.0, ge=0.0)
    """Free in the folder for temporary files of each node, GiB."""

    min_shared_memory_gib: float = Field(default=1.0, ge=0.0)
    """Free in ``/dev/shm`` of each node, GiB; NCCL and data loaders live there."""

    max_gpu_memory_used_gib: float = Field(default=2.0, ge=0.0)
    """In use on each GPU before the job begins, GiB; more is left of another job."""


class RolloutNodesConfig(Config):
    """What differs for the rollout nodes of a heterogeneous job."""

    partition: str | None = None
    """Partition; None is that of the trainer."""

    qos: str | None = None
    """QOS; None is that of the trainer."""

    constraint: str | None = None
    """Features that the nodes must have; None is none, whatever the trainer's must have."""

    gpus_per_node: int | None = Field(default=None, ge=0)
    """GPUs; None is as many as trainer nodes have."""

    gpu_type: str | None = None
    """Type of the GPUs; None is that of the trainer."""

    cpus_per_task: int | None = Field(default=None, ge=1)
    """CPUs of one server; None is the trainer's ``cpus_per_task`` for each of its GPUs."""

    memory: str | None = None
    """Memory of a node; None is that of the trainer."""


class CpuStagesConfig(Config):
    """What differs for the stages of a recipe that need no GPU, prefixes and report.

    ``constraint`` of the site, which is of nodes with GPUs, is not for them.
    """

    partition: str | None = None
    """Partition; None is that of the site, which must take jobs without GPUs then."""

    qos: str | None = None
    """QOS; None is that of the site."""

    memory: str | None = None
    """Memory of the one task; None is the cluster's default."""

    exclusive: bool = False
    """Have the node alone."""


class SiteConfig(Config):
    """One cluster, as one user uses it."""

    account: str | None = None
    """``--account``; None leaves it to the cluster."""

    partition: str | None = None
    """``--partition``; None is the cluster's default."""

    qos: str | None = None
    """``--qos``; None is the account's default."""

    time: str = Field(default="04:00:00")
    """``--time``, ``[days-]hours:minutes:seconds``; a longer run goes on after a requeue."""

    gpus_per_node: int = Field(ge=0)
    """GPUs of a node; 0 is a site of CPUs."""

    gpu_request: Literal["gpus-per-node", "gres", "none"] = "gpus-per-node"
    """How a job asks for them. ``none`` is only for clusters where Slurm knows no GPUs (``sinfo -o
    %G`` shows ``(null)``): where it does, tasks see none that the job has not asked for."""

    gpu_type: str | None = None
    """Type in that request, such as ``h100`` (``gpu:h100:8``); None takes any."""

    ranks_per_node: int | None = Field(default=None, ge=1)
    """Trainer ranks that one node takes; None is ``gpus_per_node``, one rank per GPU."""

    cpus_per_task: int | None = Field(default=None, ge=1)
    """``--cpus-per-task``, CPUs of one rank; a rollout server on a node of its own has as many for
    each of its GPUs, a stage of the recipe those of all ranks of a node. None is the cluster's
    default."""

    memory: str | None = None
    """``--mem``, memory of a node, such as ``900G``; ``"0"`` is all of it; None is the cluster's
    default."""

    exclusive: bool = True
    """``--exclusive``: no other job on the nodes."""

    constraint: str | None = None
    """``--constraint``: features that the nodes must have."""

    sbatch: dict[str, str | Literal[True]] = Field(default_factory=dict)
    """Further options of sbatch, without dashes: ``{ mail-type = "FAIL" }``; ``true`` is an option
    without a value."""

    srun_args: tuple[str, ...] = ()
    """Further arguments of every srun, such as ``--mpi=pmix`` or ``--no-container-mount-home``."""

    setup_lines: tuple[str, ...] = ()
    """Lines of bash that each job runs on its first node before the tasks, whose exported variables
    the tasks inherit: ``module load``, ``export NCCL_...``, ``source ~/.secrets``. The file that
    they end up in is no place for secrets themselves."""

    python: Path | None = None
    """Interpreter that has the trainer, on the nodes or in the image; None is the one that
    ``prefixrl launch`` runs under."""

    launch_python: Path = Path(".venv-launch/bin/python")
    """Interpreter of the environment that has NeMo-Run (``make setup-launch``)."""

    job_folder: Path = Path("runs/jobs")
    """Each job has a folder of its own in it; it must be on a file system that all nodes share."""

    container: ContainerConfig | None = None
    """Container of the tasks; None runs on the nodes themselves."""

    requeue: RequeueConfig = Field(default_factory=RequeueConfig)
    """When a job goes back into the queue."""

    precheck: PrecheckConfig = Field(default_factory=PrecheckConfig)
    """What every node must have before the first collective."""

    rollout_nodes: RolloutNodesConfig = Field(default_factory=RolloutNodesConfig)
    """What differs for the rollout nodes of a heterogeneous job."""

    cpu_stages: CpuStagesConfig = Field(default_factory=CpuStagesConfig)
    """What differs for the stages of a recipe that need no GPU."""

    def without_gpus(self) -> "SiteConfig":
        """Return the profile for a stage that needs no GPU."""
        own = self.cpu_stages
        update = {
            "gpus_per_node": 0,
            "partition": own.partition or self.partition,
            "qos": own.qos or self.qos,
            "memory": own.memory,
            "exclusive": own.exclusive,
            "constraint": None,
        }
        return self.model_copy(update=update)

    @property
    def node_ranks(self) -> int:
        """Trainer ranks of a node."""
        return self.gpus_per_node if self.ranks_per_node is None else self.ranks_per_node

    @field_validator("time")
    @classmethod
    def _time_is_a_duration(cls, time: str) -> str:
        if not _TIME.fullmatch(time):
            raise ValueError("must be [days-]hours:minutes:seconds, such as 04:00:00")
        return time

    @field_validator("setup_lines", "srun_args")
    @classmethod
    def _a_line_is_one_line(cls, lines: tuple[str, ...]) -> tuple[str, ...]:
        if any("\n" in line for line in lines):
            raise ValueError("each entry must be one line")
        return lines

    @field_validator("python", "launch_python", "job_folder")
    @classmethod
    def _a_path_is_written_out(cls, path: Path | None) -> Path | None:
        if path is not None and (path.parts[:1] == ("~",) or "$" in str(path)):
            raise ValueError("must be written out: neither ~ nor $VARIABLES are replaced")
        return path

    @model_validator(mode="after")
    def _cpu_site_says_its_ranks(self) -> "SiteConfig":
        if self.gpus_per_node == 0 and self.ranks_per_node is None:
            raise ValueError(
                "ranks_per_node is required where gpus_per_node = 0: there is no GPU to count"
            )
        return self

    @model_validator(mode="after")
    def _a_rank_has_a_gpu(self) -> "SiteConfig":
        if self.gpus_per_node and self.node_ranks > self.gpus_per_node:
            raise ValueError(
                f"ranks_per_node = {self.node_ranks} must not exceed gpus_per_node = "
                f"{self.gpus_per_node}: each trainer rank needs a GPU"
            )
        return self

    @model_validator(mode="after")
    def _options_of_sbatch_have_one_place(self) -> "SiteConfig":
        for option in self.sbatch:
            if option.startswith("-"):
                raise ValueError(f"sbatch.{option}: write it without dashes in front")
            name = option.replace("_", "-")
            # sbatch takes the beginning of a name for the whole.
            known = [name] if name in _REFUSED else [k for k in _REFUSED if k.startswith(name)]
            if known:
                short = "" if known == [name] else f"short for {known[0]}, which "
                raise ValueError(f"sbatch.{option}: {short}{_REFUSED[known[0]]}")
        return self

    @model_validator(mode="after")
    def _the_signal_comes_after_the_start(self) -> "SiteConfig":
        signal, seconds = self.requeue.signal_seconds, _seconds_of(self.time)
        if signal is not None and signal + _SIGNAL_EARLY_SECONDS >= seconds:
            raise ValueError(
                f"requeue.signal_seconds = {signal} must be less than time = {self.time} "
                f"({seconds} s) by more than {_SIGNAL_EARLY_SECONDS} s, by which Slurm may send "
                "the signal early: each start of the job would be told at once to save and end"
            )
        return self

    @model_validator(mode="after")
    def _secrets_are_not_written_out(self) -> "SiteConfig":
        # No validator of a field: its error would show the value.
        environment = self.container.environment if self.container else ()
        for index, name in enumerate(environment):
            if not _VARIABLE.fullmatch(name):
                raise ValueError(
                    f"container.environment: entry {index} is not the name of a variable; values "
                    "come from the shell that you launch from, or from a setup line"
                )
        for where, text in self._texts():
            found = _SECRET.search(text)
            if found is not None:
                raise ValueError(
                    f"{where}: gives {found[1]} a value, which would be written to batch scripts "
                    "and logs; export it in the shell that you launch from, or let a setup line "
                    "`source` a file of yours (chmod 600)"
                )
        return self

    @model_validator(mode="after")
    def _nemo_run_rewrites_nothing(self) -> "SiteConfig":
        for where, text in self._texts():
            if self.container is None and NEMO_RUN_REWRITES in text:
                raise ValueError(
                    f"{where}: contains {NEMO_RUN_REWRITES}, which NeMo-Run replaces in a batch "
                    "script by a folder of its own; name it in another way, by a link or a variable"
                )
        return self

    def _texts(self) -> list[tuple[str, str]]:
        """Return what goes into a batch script as it is, with the setting that it is from."""
        return [
            *(("setup_lines", line) for line in self.setup_lines),
            *(("srun_args", argument) for argument in self.srun_args),
            *((f"sbatch.{key}", str(value)) for key, value in self.sbatch.items()),
            *([("python", str(self.python))] if self.python else []),
        ]


def _seconds_of(time: str) -> int:
    """Return the seconds of ``[days-]hours:minutes:seconds``."""
    days, _, clock = time.rpartition("-")
    hours, minutes, seconds = map(int, clock.split(":"))
    return int(days or 0) * 86400 + hours * 3600 + minutes * 60 + seconds
