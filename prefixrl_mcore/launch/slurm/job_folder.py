"""What is kept of a job: its config, its batch script, its logs, its number."""

import json
import logging
import re
import shlex
import time
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from prefixrl_mcore.config.base import ConfigError
from prefixrl_mcore.config.json_files import read_json_object
from prefixrl_mcore.launch.slurm.states import JobState
from prefixrl_mcore.observability.atomic import write_json_atomic

logger = logging.getLogger(__name__)

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_REMEDY = "launch the job again"


@dataclass(frozen=True, kw_only=True, slots=True)
class TaskFile:
    """What a task reads: the one thing that it is given."""

    config: str
    """The resolved config, JSON."""

    run_folder: str
    """Where the run is written."""

    working_directory: str
    """What relative paths of the config are relative to."""

    is_resumed: bool
    """The run was begun by an earlier job, or elsewhere."""

    num_servers: int
    """Rollout tasks, a server each; 0 if the trainer starts its own."""

    gpus_per_server: int
    """GPUs of each of them; 0 is a server on CPUs."""

    shares_nodes: bool = False
    """Rollout tasks run beside trainer ranks, on their GPUs."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TaskEnd:
    """How a task ended, in its own words; a task that was killed has none."""

    task: str
    """Role and rank, ``trainer-0``: the name of its log, too."""

    node: str
    """Host name."""

    exit_code: int
    """What the task returned."""

    unix_seconds: float
    """When."""


class JobFolder:
    """The folder of one job."""

    def __init__(self, path: Path) -> None:
        """Name the folder's parts; nothing is made."""
        self.path = path
        self.config = path / "config.json"
        self.file = path / "job.json"
        self.script = path / "batch.sh"
        self.logs = path / "logs"
        self.home = path / "nemo"
        self._submitted = path / "submitted.json"
        self.final = path / "final.json"

    @classmethod
    def make(cls, jobs: Path, name: str) -> "JobFolder":
        """Make the folder of a new job, named after it and the time.

        Raises:
            ConfigError: if the name or the path cannot be used.
        """
        if not _NAME.fullmatch(name):
            raise ConfigError(
                f"--name {name!r}: must be letters, digits, '.', '_' and '-', and begin with a "
                "letter or digit"
            )
        jobs = jobs.absolute()
        if name.startswith("nemo_run"):
            raise ConfigError(f"--name {name!r}: NeMo-Run replaces /nemo_run; choose another name")
        if shlex.quote(str(jobs)) != str(jobs) or "/nemo_run" in str(jobs) or "%" in str(jobs):
            raise ConfigError(
                f"job_folder {jobs}: NeMo-Run takes no path with a space or another character that "
                "means something to a shell, and replaces /nemo_run; Slurm replaces %; choose "
                "another folder"
            )
        stamp = datetime.now().strftime("%Y%m%d-%H%M%S")
        for attempt in range(100):
            folder = jobs / (f"{name}-{stamp}" + (f"-{attempt}" if attempt else ""))
            try:
                folder.mkdir(parents=True)
            except FileExistsError:
                continue
            except OSError as error:
                raise ConfigError(
                    f"job_folder {jobs}: cannot be written: {error.strerror}"
                ) from None
            job = cls(folder)
            job.logs.mkdir()
            return job
        raise ConfigError(f"job_folder {jobs}: 100 jobs of the name {name} in one second")

    def write(self, task: TaskFile, submission: dict[str, Any]) -> None:
        """Write what tasks and the submission read."""
        write_json_atomic(self.file, {"task": asdict(task), "submission": submission})

    def read_task(self) -> TaskFile:
        """Return what tasks are told.

        Raises:
            ConfigError: if the file cannot be used.
        """
        return TaskFile(**read_json_object(self.file, remedy=_REMEDY)["task"])

    def write_submitted(self, job_id: str) -> None:
        """Keep the number that Slurm gave the job."""
        now = datetime.now().astimezone().isoformat(timespec="seconds")
        write_json_atomic(self._submitted, {"job_id": job_id, "submitted": now})

    @property
    def job_id(self) -> str | None:
        """Slurm's number; None if the job was never submitted."""
        try:
            return str(json.loads(self._submitted.read_text())["job_id"])
        except (OSError, ValueError, KeyError):
            return None

    def write_final(self, state: JobState) -> None:
        """Keep how the job ended: Slurm forgets it, in minutes where there is no accounting.

        Where it cannot be written, which may be why the job failed, this is logged.
        """
        try:
            write_json_atomic(self.final, asdict(state))
        except OSError as error:
            logger.warning("%s: cannot be written: %s", self.final, error.strerror)

    @property
    def final_state(self) -> JobState | None:
        """How the job ended, if somebody saw it."""
        if not self.final.exists():
            return None
        return JobState(**read_json_object(self.final, remedy="delete it"))

    @property
    def first_task(self) -> str:
        """The first task of the job's first step, a trainer's or a stage's, as its log is named.

        Raises:
            ConfigError: if the job's file cannot be used.
        """
        tasks = read_json_object(self.file, remedy=_REMEDY)["submission"]["tasks"]
        return f"{tasks[0]['role']}-0"

    @property
    def batch_log(self) -> Path:
        """What the batch script says."""
        return self.logs / "batch.log"

    def start_folder(self, start: int) -> Path:
        """Return where the tasks' logs of a start are."""
        return self.logs / f"start-{start}"

    def server_file(self, start: int, index: int) -> Path:
        """Return where rollout task ``index`` of a start says the address of its server.

        And how often it was started again, and how often it may be.
        """
        return self.start_folder(start) / f"rollout-{index}.server.json"

    def write_begin(self, start: int) -> None:
        """Keep when the first task of a start began."""
        file = self.start_folder(start) / "begin.json"
        write_json_atomic(file, {"unix_seconds": time.time()})

    def begin_of(self, start: Path) -> float | None:
        """Return when a start's first task began; None if none did."""
        file = start / "begin.json"
        return json.loads(file.read_text())["unix_seconds"] if file.exists() else None

    def write_end(self, start: int, end: TaskEnd) -> None:
        """Keep how a task of a start ended."""
        write_json_atomic(self._end_file(start, end.task), asdict(end))

    def read_end(self, start: int, task: str) -> TaskEnd | None:
        """Return how a task of a start ended; None if it runs, or was killed."""
        file = self._end_file(start, task)
        return TaskEnd(**json.loads(file.read_text())) if file.exists() else None

    def _end_file(self, start: int, task: str) -> Path:
        return self.start_folder(start) / f"{task}.end.json"

    def bad_nodes(self) -> list[str]:
        """Return the nodes that pre-checks left out, of all starts, in order."""
        files = [start / "precheck.bad" for start in self.starts()]
        told = [file.read_text().strip() for file in files if file.exists()]
        return list(dict.fromkeys(node for text in told for node in text.split(",") if node))

    def first_failure(self) -> TaskEnd | None:
        """Return which task of the last start was the first to report that it failed."""
        starts = self.starts()
        if not starts:
            return None
        ends = [TaskEnd(**json.loads(file.read_text())) for file in starts[-1].glob("*.end.json")]
        failed = [end for end in ends if end.exit_code]
        return min(failed, key=lambda end: end.unix_seconds, default=None)

    def starts(self) -> list[Path]:
        """Return the folders of the tasks' logs, one per start, in order."""
        found = self.logs.glob("start-*")
        return sorted(found, key=lambda path: int(path.name.removeprefix("start-")))


def find_jobs(jobs: Path) -> list[JobFolder]:
    """Return the submitted jobs of a folder, the oldest first."""
    files = list(jobs.absolute().glob("*/submitted.json"))
    return [JobFolder(file.parent) for file in sorted(files, key=lambda f: f.stat().st_mtime_ns)]


def find_job(jobs: Path, which: str) -> JobFolder:
    """Return a job by Slurm's number, by the name of its folder, or by the beginning of it.

    Raises:
        ConfigError: if it is none, or several.
    """
    known = find_jobs(jobs)
    exact = [job for job in known if which in (job.job_id, job.path.name)]
    found = exact or [job for job in known if job.path.name.startswith(which)]
    if len(found) != 1:
        names = ", ".join(f"{job.job_id} ({job.path.name})" for job in found or known[-5:])
        what = "several jobs" if found else "no job"
        known_names = f"{'they are' if found else 'known'}: {names or 'none'}"
        raise ConfigError(
            f"{which}: {what} of {jobs}; {known_names}. Jobs lie in job_folder of their site: say "
            "--site SITE, or --jobs FOLDER"
        )
    return found[0]
