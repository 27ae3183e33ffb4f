"""One task on each node: ``python -m ...precheck.task FOLDER SECONDS START_SECONDS``.

Before the first collective. The first node's task listens, all (it too) check their node and tell
it, and it decides: exit code 0 to go on, 77 to leave the bad nodes out of the next start, 78 to end
the job. The batch script reads their names from the folder. ``SECONDS`` is what the nodes have from
when the first one listens, ``START_SECONDS`` what it may take until it does.
"""

import json
import os
import signal
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from types import FrameType
from typing import Any

from prefixrl_mcore.config import exit_codes
from prefixrl_mcore.launch.slurm.job_folder import JobFolder, TaskEnd
from prefixrl_mcore.launch.slurm.layout import ROLLOUT, TRAINER
from prefixrl_mcore.launch.slurm.precheck.exchange import Listener, ask, clock_offset
from prefixrl_mcore.launch.slurm.precheck.node import check_needed, check_node
from prefixrl_mcore.launch.slurm.precheck.verdict import Finding, Verdict, decide
from prefixrl_mcore.launch.slurm.rank_environment import master_port, server_port, start_number
from prefixrl_mcore.observability.atomic import write_json_atomic, write_text_atomic

_EXIT_CODES = {"go": 0, "exclude": exit_codes.EXCLUDE_NODES, "fail": exit_codes.GIVE_UP}

_SEEN_SECONDS = 20.0
_POLL_SECONDS = 0.2


class Job:
    """Where this task is: its node, the others, and the folder of this start."""

    def __init__(self, path: Path, environment: Mapping[str, str]) -> None:
        """Read Slurm's variables, and those of the batch script."""
        self.folder = JobFolder(path)
        self.start = start_number(environment)
        self.logs = self.folder.logs / f"start-{self.start}"
        self.findings = self.logs / "precheck"
        self.id = environment["SLURM_JOB_ID"]
        self.token = environment["PREFIXRL_PRECHECK_TOKEN"]
        self.roles = {
            node: role
            for role in (TRAINER, ROLLOUT)
            for node in environment[f"PREFIXRL_{role.upper()}_HOSTS"].split(",")
            if node
        }
        self.nodes = list(self.roles)
        self.node = environment["SLURMD_NODENAME"]
        self.port = master_port(self.id)

    @property
    def is_first(self) -> bool:
        """Whether this node decides."""
        return self.node == self.nodes[0]


def main() -> int:
    """Check this node; on the first one decide for all."""
    job, seconds = Job(Path(sys.argv[1]), os.environ), float(sys.argv[2])
    if job.is_first:
        return _decide_for_all(job, seconds)
    return _tell(job, seconds, start_seconds=float(sys.argv[3]))


def _reach_first(job: Job, seconds: float, *, start_seconds: float) -> None:
    """Wait for the first node, whose task may start later than this one; say once what is wrong.

    Raises:
        RuntimeError: if it does not answer in the time that it has for its start, and all for
            their checks.
    """
    hello = (job.nodes[0], job.port, job.token, {"what": "hello"})
    now = time.monotonic()
    try:
        ask(*hello, deadline=now + seconds / 2)
    except RuntimeError as error:
        sys.stdout.write(f"{job.node}: {error}; tried again\n")
        sys.stdout.flush()
        ask(*hello, deadline=now + start_seconds + seconds)


def _tell(job: Job, seconds: float, *, start_seconds: float = 0.0) -> int:
    """Check this node and tell the first; what it cannot be told is said in the log."""
    try:
        _reach_first(job, seconds, start_seconds=start_seconds)
        deadline = time.monotonic() + seconds
        offset, expected = clock_offset(job.nodes[0], job.port, job.token, deadline=deadline)
        role = job.roles[job.node]
        own = expected["roles"][role]
        facts, faults = check_node(
            job.findings,
            limits=expected["limits"],
            canary=expected["canary"],
            num_gpus=own["gpus"],
            ports=[server_port(job.id, index) for index in range(own["num_server_ports"])],
        )
        absent = check_needed(expected["needed"], is_in_container=expected["is_in_container"])
        finding = Finding(
            node=job.node,
            role=role,
            clock_offset_seconds=offset,
            facts=facts,
            faults=faults if expected["is_in_container"] else [*faults, *absent],
            site_faults=absent if expected["is_in_container"] else [],
        )
        try:
            write_json_atomic(job.findings / f"{job.node}.json", asdict(finding))
        except OSError as error:
            finding.faults.append(f"job_folder cannot be written: {error.strerror}")
        ask(
            *(job.nodes[0], job.port, job.token),
            {"what": "finding", "finding": asdict(finding)},
            deadline=deadline,
        )
    except RuntimeError as error:
        sys.stdout.write(f"{job.node}: {error}\n")
        return 0
    sys.stdout.write(f"{job.node}: {'; '.join([*faults, *absent]) or 'good'}\n")
    return 0


def _decide_for_all(job: Job, seconds: float) -> int:
    """Listen, check the own node, wait for the others, decide, and say so; return the exit code."""
    try:
        expected = json.loads(job.folder.file.read_text())["submission"]["precheck"]
    except OSError as error:
        return _accuse_self(job, f"job_folder is not shared: {job.folder.file}: {error.strerror}")
    limits, canary = expected["limits"], os.urandom(16).hex()
    try:
        write_text_atomic(job.findings / "canary", canary)
    except OSError as error:
        return _accuse_self(job, f"job_folder cannot be written: {error.strerror}", limits)
    findings: dict[str, Finding] = {}

    def answer(request: dict[str, Any]) -> dict[str, Any]:
        if request["what"] == "finding":
            finding = Finding(**request["finding"])
            findings[finding.node] = finding
        return {"unix_seconds": time.time(), "canary": canary, **expected}

    deadline = time.monotonic() + seconds
    try:
        listener = Listener(job.port, job.token, answer)
    except OSError as error:
        fault = f"port {job.port}, which the job needs, cannot be used: {error.strerror}"
        return _accuse_self(job, fault, limits)
    is_ending = threading.Event()

    def end(_number: int, _frame: FrameType | None) -> None:
        is_ending.set()

    # srun gives up when a node cannot start its task. In a preemption, which SIGTERM says too, the
    # batch script does not act upon what is decided.
    signal.signal(signal.SIGTERM, end)
    with listener:
        threading.Thread(target=listener.serve_forever, daemon=True).start()
        threading.Thread(target=_tell, args=(job, seconds), daemon=True).start()
        while len(findings) < len(job.nodes) and time.monotonic() < deadline:
            if is_ending.wait(_POLL_SECONDS):
                break
        listener.shutdown()
    said = dict(findings)
    _check_written(job, said)
    return _say(job, _decide(job, job.nodes, said, limits), said)


def _accuse_self(job: Job, fault: str, limits: Mapping[str, Any] | None = None) -> int:
    """Say that this node, the first, cannot hear the others; return the exit code.

    ``limits`` are those of the site; None if they cannot be read here, and nothing is counted.
    """
    found = {job.node: Finding(node=job.node, role=job.roles[job.node], faults=[fault])}
    if limits is None:
        bad = {job.node: [fault]}
        return _say(job, Verdict(outcome="exclude", bad=bad, why="the first node is bad"), found)
    return _say(job, _decide(job, [job.node], found, limits), found)


def _decide(
    job: Job, nodes: Sequence[str], findings: Mapping[str, Finding], limits: Mapping[str, Any]
) -> Verdict:
    """Return what becomes of the job, with what its earlier starts excluded."""
    return decide(
        nodes,
        findings,
        max_clock_skew_seconds=limits["max_clock_skew_seconds"],
        num_excluded_before=_num_excluded_before(job),
        max_excluded=limits["max_excluded_nodes"],
        timeout_seconds=limits["timeout_seconds"],
    )


def _check_written(job: Job, findings: dict[str, Finding]) -> None:
    """Add a fault to nodes whose file is not seen here: what they write, others do not see."""
    deadline = time.monotonic() + _SEEN_SECONDS
    unseen = {name for name, finding in findings.items() if not finding.faults}
    while unseen and time.monotonic() < deadline:
        unseen = {name for name in unseen if not (job.findings / f"{name}.json").exists()}
        if unseen:
            time.sleep(_POLL_SECONDS)
    for name in unseen:
        findings[name].faults.append(
            f"job_folder is not shared: {job.nodes[0]} does not see what is written here to "
            f"{job.findings}"
        )


def _num_excluded_before(job: Job) -> int:
    """Return how many nodes the earlier starts excluded."""
    files = [start / "precheck.json" for start in job.folder.starts() if start != job.logs]
    told = [json.loads(file.read_text()) for file in files if file.exists()]
    return sum(len(verdict["bad"]) for verdict in told if verdict["outcome"] == "exclude")


def _say(job: Job, verdict: Verdict, findings: Mapping[str, Finding]) -> int:
    """Write the verdict where the batch script and people find it; return the exit code."""
    exit_code = _EXIT_CODES[verdict.outcome]
    sys.stdout.write(f"pre-check: {verdict.why}\n")
    for name, faults in verdict.bad.items():
        sys.stdout.write(f"bad node {name}: {'; '.join(faults)}\n")
    sys.stdout.flush()
    try:
        _write(job, verdict, findings, exit_code)
    except OSError as error:  # the batch script knows whose verdict it is
        sys.stdout.write(f"{job.node} cannot write to {job.logs}: {error.strerror}\n")
    return exit_code


def _write(job: Job, verdict: Verdict, findings: Mapping[str, Finding], exit_code: int) -> None:
    """Write a verdict to the folder of this start.

    Raises:
        OSError: if that cannot be.
    """
    report = {
        **asdict(verdict),
        "findings": {name: asdict(finding) for name, finding in findings.items()},
    }
    write_json_atomic(job.logs / "precheck.json", report)
    if verdict.outcome == "exclude":
        write_text_atomic(job.logs / "precheck.bad", ",".join(verdict.bad) + "\n")
    if exit_code:
        end = TaskEnd(
            task="precheck",
            node=next(iter(verdict.bad)),
            exit_code=exit_code,
            unix_seconds=time.time(),
        )
        job.folder.write_end(job.start, end)


if __name__ == "__main__":
    sys.exit(main())
