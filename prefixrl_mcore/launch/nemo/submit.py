"""Submit jobs through NeMo-Run: ``<launch environment>/bin/python submit.py JOB.json...``.

Runs in the launcher's own environment, so that nothing of the trainer is imported here, and once
for all jobs of a launch: NeMo-Run takes seconds to import. The trainer writes the files, and reads
one line of the output for each job that is submitted: ``ANSWER``, then a JSON object ``{"file": of
the job, "script": path of the batch script, "job_id": Slurm's number or null}``.

NeMo-Run is asked for the batch script and the submission, not to wait: its waiting needs sacct,
loses the job's exit code, and ends at a requeue.
"""

# ruff: noqa: E402 - NeMo-Run reads NEMORUN_HOME when it is imported

import dataclasses
import json
import os
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ANSWER = "prefixrl-submitted: "

_JOBS: dict[str, dict[str, Any]] = {
    file: json.loads(Path(file).read_text())["submission"] for file in sys.argv[1:]
}
os.environ["NEMORUN_HOME"] = next(iter(_JOBS.values()))["home"]
os.environ.setdefault("COLUMNS", "200")

import nemo_run as run  # pyright: ignore[reportMissingImports] - another environment's
from nemo_run.config import set_nemorun_home  # pyright: ignore[reportMissingImports]
from nemo_run.core.execution import slurm  # pyright: ignore[reportMissingImports]

_TEMPLATES = str(Path(__file__).parent)
_BETWEEN = "#SBATCH hetjob"
"""Parts the flags of two components."""

_NEMO_FILL = slurm.fill_template


@dataclasses.dataclass(kw_only=True)
class _Logs(slurm.SlurmJobDetails):
    """One log of the batch script, and one of each task and start."""

    logs: str = ""
    role: str = ""

    @property
    def stdout(self) -> Path:
        """Return the log of the batch script."""
        return Path(self.logs) / "batch.log"

    @property
    def srun_stdout(self) -> Path:
        """Return the log of a task; bash and srun fill the names in."""
        return Path(self.logs) / "start-$start" / f"{self.role}-%t.log"


def main() -> int:
    """Submit the jobs in their order, each behind the one that it names; answer for each."""
    numbers: dict[str, str] = {}
    for file, job in _JOBS.items():
        if job["after"] is not None:
            job["executor"]["additional_parameters"]["dependency"] = (
                f"afterok:{numbers[job['after']]}"
            )
        script, job_id = _submit(job)
        numbers[file] = job_id or f"JOB_OF_{job['tasks'][0]['role'].upper()}"  # of a dry run
        answer = {"file": file, "script": script, "job_id": job_id}
        sys.stdout.write(f"\n{ANSWER}{json.dumps(answer)}\n")
        sys.stdout.flush()  # whoever reads it may have to cancel the job
    return 0


def _submit(job: dict[str, Any]) -> tuple[str, str | None]:
    """Write a batch script, submit it unless this is a dry run; return its path and the number."""
    set_nemorun_home(job["home"])
    slurm.fill_template = _fill(job)
    tasks = job["tasks"]
    with run.Experiment(job["title"], skip_status_at_exit=True) as experiment:
        executors = [_executor(job, task) for task in tasks]
        scripts = [_script(task) for task in tasks]
        if len(tasks) == 1:
            experiment.add(scripts[0], executor=executors[0], name=tasks[0]["role"])
        else:
            experiment.add(scripts, executor=executors, name=tasks[0]["role"])
        if job["dry_run"]:
            experiment.dryrun(log=False, delete_exp_dir=False)
        else:
            experiment.run(detach=True)
        script = str(Path(experiment._exp_dir) / f"{tasks[0]['role']}_sbatch.sh")
        if job["dry_run"]:
            return script, None
        # slurm_tunnel://nemo_run/<number>
        handle = experiment.jobs[0].handle
        return script, handle.partition("://")[2].split("/")[1].split(";")[0]


def _fill(job: dict[str, Any]) -> Callable[..., str]:
    """Return NeMo-Run's way to fill a template, with our template in place of its own."""

    def fill(name: str, variables: dict[str, Any]) -> str:
        variables = variables | job["template"]
        variables["sbatch_flags"] = _flags_by_component(variables["sbatch_flags"], job["tasks"])
        return _NEMO_FILL(name, variables, template_dir=_TEMPLATES)

    return fill


def _flags_by_component(flags: list[str], tasks: list[dict[str, Any]]) -> list[str]:
    """Return the flags, with each component's own options in place of the first one's.

    NeMo-Run repeats the options of the first component in all others, and those alone. An option
    that is None is not given.
    """
    filled, left = [], flags
    for task in tasks:
        size = left.index(_BETWEEN) if _BETWEEN in left else len(left)
        own = task.get("options", {})
        kept = [f for f in left[:size] if f.removeprefix("#SBATCH --").partition("=")[0] not in own]
        given = [(name, value) for name, value in own.items() if value is not None]
        filled += sorted([*kept, *(f"#SBATCH --{n}={shlex.quote(str(v))}" for n, v in given)])
        filled += left[size : size + 1]
        left = left[size + 1 :]
    return filled


def _executor(job: dict[str, Any], task: dict[str, Any]) -> run.SlurmExecutor:
    """Return the executor of one task."""
    return run.SlurmExecutor(
        **job["executor"] | task["executor"],
        heterogeneous=job["is_heterogeneous"],
        # NeMo-Run quotes none of them.
        srun_args=[shlex.quote(argument) for argument in task["srun_args"]],
        packager=run.Packager(),
        tunnel=run.LocalTunnel(job_dir=""),
        job_details=_Logs(job_name=job["title"], logs=job["logs"], role=task["role"]),
        wait_time_for_group_job=0,
        poll_estimated_start_time=False,
    )


def _script(task: dict[str, Any]) -> run.Script:
    """Return the command of one task."""
    program, *arguments = (shlex.quote(word) for word in task["command"])
    return run.Script(path=arguments[0], args=arguments[1:], entrypoint=program)


if __name__ == "__main__":
    sys.exit(main())
