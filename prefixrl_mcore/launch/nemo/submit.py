"""Submit one job through NeMo-Run: ``<launch environment>/bin/python submit.py JOB.json``.

Runs in the launcher's own environment, so that nothing of the trainer is imported here; the trainer
writes the file and reads the answer, one JSON object on the last line of the output:
``{"script": path of the batch script, "job_id": Slurm's number or null}``.

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

_JOB: dict[str, Any] = json.loads(Path(sys.argv[1]).read_text())["submission"]
os.environ["NEMORUN_HOME"] = _JOB["home"]
os.environ.setdefault("COLUMNS", "200")

import nemo_run as run  # pyright: ignore[reportMissingImports] - another environment's
from nemo_run.core.execution import slurm  # pyright: ignore[reportMissingImports]

_TEMPLATES = str(Path(__file__).parent)


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
    """Write the batch script, submit it unless this is a dry run, and answer."""
    slurm.fill_template = _fill(slurm.fill_template)
    tasks = _JOB["tasks"]
    with run.Experiment(_JOB["title"], skip_status_at_exit=True) as experiment:
        executors = [_executor(task) for task in tasks]
        scripts = [_script(task) for task in tasks]
        if len(tasks) == 1:
            experiment.add(scripts[0], executor=executors[0], name=tasks[0]["role"])
        else:
            experiment.add(scripts, executor=executors, name=tasks[0]["role"])
        if _JOB["dry_run"]:
            experiment.dryrun(log=False, delete_exp_dir=False)
        else:
            experiment.run(detach=True)
        script = Path(experiment._exp_dir) / f"{tasks[0]['role']}_sbatch.sh"
        handle = experiment.jobs[0].handle
    # slurm_tunnel://nemo_run/<number>
    job_id = None if _JOB["dry_run"] else handle.partition("://")[2].split("/")[1].split(";")[0]
    sys.stdout.write("\n" + json.dumps({"script": str(script), "job_id": job_id}) + "\n")
    return 0


def _fill(original: Callable[..., str]) -> Callable[..., str]:
    """Return NeMo-Run's way to fill a template, with our template in place of its own."""

    def fill(name: str, variables: dict[str, Any]) -> str:
        variables = variables | _JOB["template"]
        variables["sbatch_flags"] = _flags_by_component(variables["sbatch_flags"])
        return original(name, variables, template_dir=_TEMPLATES)

    return fill


def _flags_by_component(flags: list[str]) -> list[str]:
    """Return the flags, with each component's own options in place of the first one's.

    NeMo-Run repeats the options of the first component in all others.
    """
    component, filled = 0, []
    for flag in flags:
        if flag == "#SBATCH hetjob":
            component += 1
        else:
            option = flag.removeprefix("#SBATCH --").partition("=")[0]
            value = _JOB["tasks"][component].get("options", {}).get(option)
            if value is not None:
                flag = f"#SBATCH --{option}={shlex.quote(value)}"
        filled.append(flag)
    return filled


def _executor(task: dict[str, Any]) -> run.SlurmExecutor:
    """Return the executor of one task."""
    return run.SlurmExecutor(
        **_JOB["executor"] | task["executor"],
        heterogeneous=_JOB["is_heterogeneous"],
        # NeMo-Run quotes none of them.
        srun_args=[shlex.quote(argument) for argument in task["srun_args"]],
        packager=run.Packager(),
        tunnel=run.LocalTunnel(job_dir=""),
        job_details=_Logs(job_name=_JOB["title"], logs=_JOB["logs"], role=task["role"]),
        wait_time_for_group_job=0,
        poll_estimated_start_time=False,
    )


def _script(task: dict[str, Any]) -> run.Script:
    """Return the command of one task."""
    program, *arguments = (shlex.quote(word) for word in task["command"])
    return run.Script(path=arguments[0], args=arguments[1:], entrypoint=program)


if __name__ == "__main__":
    sys.exit(main())
