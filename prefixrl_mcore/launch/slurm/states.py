"""What Slurm says of a job, from slurmctld while it remembers the job, else from accounting."""

import os
import re
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass

from prefixrl_mcore.config import exit_codes

_FIELD = re.compile(r"(\w+)=(\S*)")
_ENDED = {
    *("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY"),
    *("BOOT_FAIL", "DEADLINE", "PREEMPTED", "REVOKED"),
}
_UNKNOWN = "UNKNOWN"
_COLUMNS = ("JobID", "State", "Reason", "RestartCnt", "NodeList")
_SQUEUE = (
    *("squeue", "--noheader", "--states=all"),
    f"--Format={','.join(f'{column}:|' for column in _COLUMNS)}",
)


class SlurmError(RuntimeError):
    """Slurm, or NeMo-Run on the way to it, refused; the message has its words."""


@dataclass(frozen=True, kw_only=True, slots=True)
class JobState:
    """One job at one moment."""

    state: str
    """Slurm's word, such as RUNNING; UNKNOWN if Slurm does not answer, or not know the job."""

    reason: str = ""
    """Why it waits or ended, in Slurm's words; empty if Slurm says none."""

    exit_code: int = 0
    """Exit code of the batch script, or 128 + the signal that it died of."""

    num_restarts: int = 0
    """Times that it went back into the queue."""

    nodes: str = ""
    """Nodes that it has, in Slurm's short form."""

    partition: str = ""
    """Where it runs or waits."""

    num_nodes: int = 0
    """Nodes that it asks for; 0 if Slurm does not say."""

    excluded: str = ""
    """Nodes that it may not have, in Slurm's short form."""

    @property
    def has_ended(self) -> bool:
        """Whether it will not go on, unless it is requeued at this moment."""
        return self.state in _ENDED

    @property
    def is_known(self) -> bool:
        """Whether Slurm knows the job."""
        return self.state != _UNKNOWN

    @property
    def result(self) -> int:
        """Exit code of a command that waited for the job: 0 only if it completed."""
        if not self.is_known:
            return exit_codes.SLURM_IS_SILENT
        return 0 if self.state == "COMPLETED" else self.exit_code or 1

    def __str__(self) -> str:
        """Return the state with what explains it."""
        parts = [self.state]
        if self.reason:
            parts.append(f"({self.reason})")
        if self.exit_code:
            parts.append(f"exit code {self.exit_code}")
        if self.num_restarts:
            parts.append(f"after {self.num_restarts} restart(s)")
        return " ".join(parts) + (f" on {self.nodes}" if self.nodes else "")


def job_state(job_id: str) -> JobState:
    """Return the state of a job; of a heterogeneous one that of its first component."""
    said = _ask(["scontrol", "--oneliner", "show", "job", job_id])
    return parse_scontrol(said) if said else parse_sacct(_ask(_sacct(job_id)))


def job_states(job_ids: Sequence[str], *, user_id: int | None) -> dict[str, JobState]:
    """Return the states of several jobs, from one question to slurmctld and one to accounting.

    Args:
        job_ids: Slurm's numbers. squeue is not asked for them: it would ask for the jobs of all
            users, and refuse if the one that is left is forgotten.
        user_id: whose jobs they are, for slurmctld to send no others; None if several users'.

    Returns:
        State by number, without the exit codes of those that slurmctld knows.
    """
    of_user = [] if user_id is None else [f"--user={user_id}"]
    known = parse_squeue(_ask([*_SQUEUE, *of_user]))
    forgotten = [job_id for job_id in job_ids if job_id not in known]
    told = _ask(_sacct(",".join(forgotten))).splitlines() if forgotten else []
    states = {}
    for job_id in job_ids:
        own = [line for line in told if re.match(rf"{job_id}[+|]", line)]
        states[job_id] = known.get(job_id) or parse_sacct("\n".join(own))
    return states


def parse_squeue(said: str) -> dict[str, JobState]:
    """Return what ``squeue`` says of each job, by number."""
    lines = [line.split("|") for line in said.splitlines() if line.count("|") == len(_COLUMNS)]
    return {
        number: JobState(
            state=state,
            reason=_unless_empty(reason),
            num_restarts=int(restarts),
            nodes=_unless_empty(nodes),
        )
        for number, state, reason, restarts, nodes, _ in lines
    }


def parse_scontrol(said: str) -> JobState:
    """Return what ``scontrol --oneliner show job`` says in its first line."""
    lines = said.splitlines()
    fields = dict(_FIELD.findall(lines[0])) if lines else {}
    return JobState(
        state=fields.get("JobState", _UNKNOWN),
        reason=_unless_empty(fields.get("Reason", "")),
        exit_code=_exit_code(fields.get("ExitCode", "0:0")),
        num_restarts=int(fields.get("Restarts", "0")),
        nodes=_unless_empty(fields.get("NodeList", "")),
        partition=_unless_empty(fields.get("Partition", "")),
        num_nodes=int(fields.get("NumNodes", "0").partition("-")[0]),
        excluded=_unless_empty(fields.get("ExcNodeList", "")),
    )


def parse_sacct(said: str) -> JobState:
    """Return what ``sacct`` says of a job's last start, and of its first component."""
    lines = [line.split("|") for line in said.splitlines() if line.count("|") == 3]
    starts = [fields for number, *fields in lines if number.partition("+")[2] in ("", "0")]
    if not starts:
        return JobState(state=_UNKNOWN)
    state, code, nodes = starts[-1]
    return JobState(
        state=state.split()[0],
        exit_code=_exit_code(code),
        num_restarts=len(starts) - 1,
        nodes=_unless_empty(nodes),
    )


def cancel_job(job_id: str) -> None:
    """Cancel a job.

    Raises:
        SlurmError: if Slurm refuses.
    """
    done = subprocess.run(["scancel", job_id], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SlurmError(f"scancel {job_id}: {done.stderr.strip()}")


def _sacct(job_ids: str) -> list[str]:
    """Return the command that asks accounting; with --duplicates for the starts before the last."""
    return [
        *("sacct", "--allocations", "--noheader", "--parsable2", "--duplicates"),
        *("--jobs", job_ids, "--format=JobID,State,ExitCode,NodeList"),
    ]


def _ask(command: Sequence[str]) -> str:
    """Return what Slurm says; nothing if it does not answer."""
    # Which jobs squeue shows would be the user's choice, of a variable such as SQUEUE_PARTITION.
    env = {name: value for name, value in os.environ.items() if not name.startswith("SQUEUE_")}
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            errors="replace",  # of a comment in another encoding
            check=False,
            timeout=60,
            env=env,
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def _exit_code(text: str) -> int:
    """Return ``code:signal`` as a shell gives it."""
    code, _, signal = text.partition(":")
    return 128 + int(signal) if int(signal or 0) else int(code)


def _unless_empty(text: str) -> str:
    """Return nothing for Slurm's words for it."""
    return "" if text in ("(null)", "None", "None assigned") else text
