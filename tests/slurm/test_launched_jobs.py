"""Jobs on real Slurm, submitted as a user does it: through ``prefixrl launch`` and NeMo-Run."""

import io
import json
import logging
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from prefixrl_mcore.cli import main
from prefixrl_mcore.launch.slurm.follow import follow
from prefixrl_mcore.launch.slurm.job_folder import JobFolder, find_job, find_jobs
from prefixrl_mcore.launch.slurm.rank_environment import server_port
from prefixrl_mcore.launch.slurm.sites import load_site
from prefixrl_mcore.launch.slurm.states import job_state
from prefixrl_mcore.launch.slurm.submission import submit
from prefixrl_mcore.observability.heartbeat import stall_reports
from tests.slurm.conftest import LAUNCH_PYTHON, run_cluster
from tests.support.gate import HAS_GATE, Gate
from tests.support.launched_jobs import (
    colocated,
    end_of,
    prepare_program,
    submit_program,
    tiny_settings,
    wait_for,
)
from tests.support.tiny_run import CONFIG, ROOT, TinyTask, course_of, metrics_of, without_clock
from tests.support.wandb_records import offline_runs

pytestmark = [
    pytest.mark.slurm,
    pytest.mark.slow,
    pytest.mark.timeout(1800),  # of a loaded machine
    pytest.mark.skipif(not LAUNCH_PYTHON.exists(), reason="NeMo-Run: run make setup-launch"),
]


def test_two_nodes_with_two_tasks_each_form_one_group(jobs: Path, tmp_path: Path) -> None:
    layout = colocated(2, 2)
    out = tmp_path / "ranks"
    out.mkdir()
    command = [sys.executable, "-m", "tests.support.slurm_all_reduce", str(out)]
    before = time.time()
    job, job_id = submit_program(layout, command)
    result = follow(job, job_id, out=io.StringIO())
    logs = "\n".join(file.read_text() for file in job.logs.rglob("*.log"))
    assert result == 0, logs
    ranks = [json.loads((out / f"{rank}.json").read_text()) for rank in range(4)]
    assert [rank["sum"] for rank in ranks] == [1111.0] * 4
    assert [rank["host"] for rank in ranks] == ["n1", "n1", "n2", "n2"]
    assert len({rank["address"] for rank in ranks}) == 2
    assert [rank["local_rank"] for rank in ranks] == [0, 1, 0, 1]
    assert {rank["local_world_size"] for rank in ranks} == {2}
    assert {rank["master"] for rank in ranks} == {"n1"}
    assert before - 1 < ranks[0]["end"] - 600 < time.time() + 1  # ten minutes from its start
    assert sorted(file.name for file in job.starts()[0].glob("trainer-*.log")) == [
        f"trainer-{rank}.log" for rank in range(4)
    ]


def _settings(tiny: TinyTask, run_folder: Path) -> list[str]:
    """Return the settings of a run of eight steps."""
    return [
        *tiny_settings(tiny, run_folder),
        *("trainer.num_steps=8", "trainer.rollouts_every_steps=8", "checkpoint.every_steps=8"),
        "evaluation.every_steps=8",
    ]


def _launch(*arguments: str) -> int:
    return main(["launch", str(CONFIG), "--site", "ci-local", *arguments])


def _wait_for_steps(run: Path, number: int, *, seconds: float = 300) -> None:
    """Wait until a run has logged so many steps."""
    deadline = time.monotonic() + seconds
    while len(metrics_of(run, "train")) < number:
        assert time.monotonic() < deadline, f"{run}: no step {number} in {seconds:g} s"
        time.sleep(0.1)


def _wait_until_told(job: JobFolder, signal_name: str) -> None:
    """Wait until a job's first rank has got a signal, or Slurm has ended it already."""

    def is_told() -> bool:
        said = _read(job.starts()[-1] / "trainer-0.log")
        return f"got {signal_name}" in said or job_state(job.job_id or "").has_ended

    wait_for(is_told)


def test_a_preempted_and_a_cancelled_run_end_as_an_undisturbed_one(
    jobs: Path,
    tiny_task: TinyTask,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    undisturbed, preempted, cancelled = runs = [
        tmp_path / name for name in ("undisturbed", "preempted", "cancelled")
    ]
    more = {preempted: "metrics.wandb.mode=offline", cancelled: "checkpoint.every_steps=1"}
    gates = {run: Gate(tmp_path / f"{run.name}.gate") for run in runs}
    gates[preempted].close(1)
    gates[cancelled].close(3)
    for run in runs:
        own = [HAS_GATE, *([more[run]] if run in more else [])]
        gates[run].inherited(monkeypatch)
        assert _launch("--detach", *_settings(tiny_task, run), *own) == 0
    job = find_job(jobs, "preempted")
    assert job.job_id is not None
    _wait_for_steps(preempted, 1)
    subprocess.run(["scancel", "--signal=USR1", job.job_id], check=True)
    _wait_until_told(job, "SIGUSR1")
    gates[preempted].open()
    _cancel_in_the_middle(jobs, cancelled, gates[cancelled], caplog)
    again = [*_settings(tiny_task, cancelled), HAS_GATE, more[cancelled]]
    assert _launch("--resume", "--detach", "--name", "resumed", *again) == 0
    for other in find_jobs(jobs):
        if not other.path.name.startswith("cancelled"):
            result, said = end_of(other)
            assert result == 0, said
    assert job_state(job.job_id).num_restarts == 1
    assert [start.name for start in job.starts()] == ["start-0", "start-1"]
    for last in (job.starts()[1], find_job(jobs, "resumed").starts()[0]):
        assert "resumed from" in (last / "trainer-0.log").read_text()
    for run in (preempted, cancelled):
        for kind in ("train", "eval"):
            assert course_of(run, kind) == course_of(undisturbed, kind)
        assert [line["step"] for line in metrics_of(run, "train")] == list(range(8))
    _check_one_wandb_run(preempted, num_starts=2)


def _cancel_in_the_middle(
    jobs: Path, run: Path, gate: Gate, caplog: pytest.LogCaptureFixture
) -> None:
    """Cancel a run that saves after every step, and waits behind its third."""
    job = find_job(jobs, run.name)
    assert job.job_id is not None
    _wait_for_steps(run, 3)
    assert main(["jobs", "cancel", "--jobs", str(jobs), run.name]) == 0
    _wait_until_told(job, "SIGTERM")
    gate.open()
    assert end_of(job)[0] != 0
    assert f"job {job.job_id}: CANCELLED" in caplog.text
    assert 3 <= len(metrics_of(run, "train")) < 8


def _check_one_wandb_run(run: Path, *, num_starts: int) -> None:
    """Check that W&B has all starts as one run, with each row and each step once, in order."""
    starts = offline_runs(run)
    kept = json.loads((run / "wandb.json").read_text())
    assert [run_id for run_id, _ in starts] == [kept["id"]] * num_starts
    rows = [row for _, rows in starts for row in rows]
    assert all(rows for _, rows in starts)  # each start has logged some
    assert [row["_step"] for row in rows] == list(range(kept["num_rows"]))
    for kind, name in (
        ("train", "rollout/completion_tokens_mean"),
        ("eval", "eval/held-out/accuracy"),
    ):
        logged = [(row["step"], row[name]) for row in rows if name in row]
        assert logged == [(line["step"], line[name]) for line in metrics_of(run, kind)]


def test_a_run_goes_on_without_a_node_that_fails(
    slurm: Path, jobs: Path, tiny_task: TinyTask, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site, run = tmp_path / "ci-local.toml", tmp_path / "lost"
    site.write_text(site.read_text().replace("ranks_per_node = 2", "ranks_per_node = 1"))
    steps = ["trainer.num_steps=12", "checkpoint.every_steps=3", "evaluation.every_steps=12"]
    gate = Gate(tmp_path / "gate")
    gate.close(5)
    gate.inherited(monkeypatch)
    assert _launch("--detach", *_settings(tiny_task, run), *steps, HAS_GATE) == 0
    job = find_job(jobs, "lost")
    assert job.job_id is not None
    _wait_for_steps(run, 5)
    assert job_state(job.job_id).nodes == "n[1-2]"
    assert run_cluster("fail", slurm, "--node", "n2").returncode == 0
    gate.open()
    before = without_clock(metrics_of(run, "train"))
    said = io.StringIO()
    try:
        assert follow(job, job.job_id, out=said) == 0, said.getvalue()
    finally:
        assert run_cluster("mend", slurm, "--node", "n2").returncode == 0
    state = job_state(job.job_id)
    assert (state.num_restarts, state.nodes.count("2")) == (1, 0)
    assert "resumed from" in (job.starts()[1] / "trainer-0.log").read_text()
    after = without_clock(metrics_of(run, "train"))
    assert [line["step"] for line in after] == list(range(12))
    assert len(before) >= 5
    assert after[: len(before)] == before  # those that were taken again, too
    assert not (run / "lease.json").exists()


def test_a_start_that_slurm_has_lost_ends_before_the_next_one_writes(
    slurm: Path, jobs: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    run.mkdir()
    written = run / "written"
    program = [sys.executable, "-m", "tests.support.slurm_writer", "JOB_FOLDER", str(run)]
    job, job_id = submit_program(colocated(1, 1), program)
    wait_for(written.exists)
    assert run_cluster("fail", slurm, "--node", "n1", "--daemon-only").returncode == 0
    try:
        assert follow(job, job_id, out=io.StringIO()) == 0
    finally:
        assert run_cluster("mend", slurm, "--node", "n1").returncode == 0
    assert job_state(job_id).num_restarts == 1
    lines = [line.split() for line in written.read_text().splitlines()]
    assert len(lines) > 50  # the first one wrote on when its node was given up
    assert [start for start, _, _ in lines] == sorted(start for start, _, _ in lines)
    first, second = dict.fromkeys(map(tuple, lines))
    assert (first[:2], second[:2]) == (("0", "n1"), ("1", "n2"))
    assert [start for start, _, _ in lines].count("1") == 10
    assert not Path(f"/proc/{first[2]}").exists()
    assert "start-1 exists" in (job.starts()[0] / "trainer-0.log").read_text()


def test_a_failing_run_makes_launch_fail_and_the_cause_is_shown(
    jobs: Path, tiny_task: TinyTask, tmp_path: Path, caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    broken = tmp_path / "broken.jsonl"
    broken.write_text("no problem\n")
    settings = [*_settings(tiny_task, tmp_path / "failing"), f"data.problems={broken}"]
    with caplog.at_level(logging.INFO, logger="prefixrl_mcore"):
        assert _launch(*settings) == 2  # bad input, as without Slurm
    assert "FAILED" in caplog.text
    assert re.search("trainer-[01] on n1 was the first to report, exit code 2", caplog.text)
    assert "broken.jsonl" in caplog.text
    assert "broken.jsonl" in capsys.readouterr().out  # followed
    job = find_job(jobs, "failing")
    assert main(["jobs", "status", "--jobs", str(jobs), "failing"]) == 2
    assert main(["jobs", "list", "--jobs", str(jobs)]) == 0
    assert job.job_id in capsys.readouterr().out
    assert main(["jobs", "logs", "--jobs", str(jobs), job.job_id or "", "--task", "batch"]) == 0
    assert "ended with exit code 2" in capsys.readouterr().out


def test_a_refused_submission_says_why(
    jobs: Path, tiny_task: TinyTask, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    site = tmp_path / "ci-local.toml"
    site.write_text(site.read_text().replace('"batch"', '"nowhere"'))
    assert _launch(*_settings(tiny_task, tmp_path / "run")) == 1
    said = " ".join(capsys.readouterr().err.split())
    assert "invalid partition specified: nowhere" in said
    assert find_jobs(jobs) == []


def test_a_cancelled_job_makes_follow_fail(jobs: Path) -> None:
    layout = colocated(1, 1)
    job, job_id = submit_program(layout, ["sleep", "600"])
    assert main(["jobs", "cancel", "--jobs", str(jobs), "program"]) == 0
    assert follow(job, job_id, out=io.StringIO()) != 0
    assert job_state(job_id).state == "CANCELLED"


def test_a_run_that_hangs_ends_and_shows_where_its_ranks_were(
    jobs: Path, tiny_task: TinyTask, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = tmp_path / "hanging"
    steps = [f"{key}=200" for key in ("trainer.num_steps", "evaluation.every_steps")]
    stall = ["limit_seconds=10", "phases.rollout=10", "answer_seconds=4", "action=stop"]
    settings = [*_settings(tiny_task, run), *steps, *(f"trainer.stall.{text}" for text in stall)]
    assert _launch("--detach", *settings) == 0
    job = find_job(jobs, "hanging")
    assert job.job_id is not None
    _wait_for_steps(run, 1)
    late = _pid_of_task(job.job_id, 1)
    os.kill(late, signal.SIGSTOP)
    try:
        wait_for(lambda: stall_reports(run / "heartbeats") != [])
        wait_for(lambda: "task 0: Exited with exit code 76" in job.batch_log.read_text())
    finally:
        os.kill(late, signal.SIGCONT)  # else srun ends it, two minutes later
    assert end_of(job)[0] == 76
    assert job_state(job.job_id).num_restarts == 0
    (report,) = stall_reports(run / "heartbeats")
    assert "rank 1" in report.read_text()
    assert "trainer-0 on n1 ended because ranks hung, last seen in phase " in caplog.text
    assert f"ranks hung; their stacks, and who was late: {report}" in caplog.text


def _pid_of_task(job_id: str, rank: int) -> int:
    """Return the process of a trainer's rank."""
    own = (f"\0SLURM_JOB_ID={job_id}\0", f"\0SLURM_PROCID={rank}\0")
    (pid,) = [
        int(process.name)
        for process in Path("/proc").glob("[0-9]*")
        if "\0prefixrl_mcore.launch.slurm.task\0" in _read(process / "cmdline")
        and all(text in _read(process / "environ") for text in own)
    ]
    return pid


def _kill_server(url: str) -> None:
    """Kill the processes of the server at a URL; of one job they listen alike on every node."""
    node, _, port = url.removeprefix("http://").partition(":")
    found = [
        int(process.name)
        for process in Path("/proc").glob("[0-9]*")
        if f"--port\0{port}\0" in _read(process / "cmdline")
        and f"\0SLURMD_NODENAME={node}\0" in _read(process / "environ")
    ]
    assert found
    for pid in found:
        os.kill(pid, signal.SIGKILL)


def _read(file: Path) -> str:
    try:
        return file.read_text(errors="replace")
    except OSError:  # it has ended
        return ""


def _server_settings(tiny: TinyTask, run: Path) -> list[str]:
    """Return the settings of a short run whose rollouts come from a server on CPUs."""
    settings = [s for s in _settings(tiny, run) if not s.startswith("rollout.engine")]
    server = [f"rollout.sglang.python={ROOT / '.venv-sglang' / 'bin' / 'python'}"]
    server += ["rollout.sglang.dtype=float32", "rollout.sglang.max_kv_tokens=4096"]
    return settings + server


def test_a_heterogeneous_job_samples_in_another_partition_and_outlives_its_server(
    jobs: Path, tiny_task: TinyTask, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, site = tmp_path / "two-kinds", tmp_path / "ci-local.toml"
    site.write_text(site.read_text() + '\n[rollout_nodes]\npartition = "preemptible"\n')
    # Without a checkpoint of its own accord: what it goes on from, it saved when it was told to.
    steps = [f"{key}=12" for key in ("trainer.num_steps", "evaluation.every_steps")]
    steps += ["checkpoint.every_steps=100"]
    how = ["--shape", "heterogeneous", "--rollout-nodes", "1", "--detach"]
    how += ["rollout.sglang.max_restarts=1", HAS_GATE]
    gate = Gate(tmp_path / "gate")
    gate.close(3)
    gate.inherited(monkeypatch)
    assert _launch(*how, *_server_settings(tiny_task, run), *steps) == 0
    job = find_job(jobs, "two-kinds")
    assert job.job_id is not None
    script = job.script.read_text()
    assert "#SBATCH --partition=preemptible" in script.partition("#SBATCH hetjob")[2]
    _wait_for_steps(run, 3)
    (url,) = _urls(job, 0, 1)
    _kill_server(url)
    gate.close(8)
    version = _wait_for_late_weights(job.starts()[0] / "trainer-0.log")
    assert 2 <= version <= 4  # the third step's, at least; a server begins with others
    server = {"url": url, "num_restarts": 1, "max_restarts": 1}
    # The trainer may find the server before its task does, which writes this down.
    wait_for(lambda: json.loads(job.server_file(0, 0).read_text()) == server)
    _wait_for_steps(run, version + 2)
    assert job_state(job.job_id).num_restarts == 0
    assert sum(line["engine/num_server_restarts"] for line in metrics_of(run, "train")) == 1
    _kill_server(url)
    gate.open()
    said = io.StringIO()
    assert follow(job, job.job_id, out=said) == 0, said.getvalue()
    assert "the rollout servers ended before the trainer, with exit code 75" in said.getvalue()
    assert job_state(job.job_id).num_restarts == 1
    for number, start in enumerate(job.starts()):
        (url,) = _urls(job, number, 1)
        assert url.startswith("http://n2:")
        assert url in (start / "trainer-0.log").read_text().replace("\n", "")
    saved = json.loads((job.starts()[0] / "trainer-0.end.json").read_text())
    assert saved["exit_code"] == 138
    said_next = " ".join((job.starts()[1] / "trainer-0.log").read_text().split())
    resumed = re.search(r"resumed from .*?: (\d+) of 12 steps done", said_next)
    assert resumed is not None
    assert int(resumed[1]) >= version + 2
    assert [line["step"] for line in metrics_of(run, "train")] == list(range(12))
    served = json.loads((job.starts()[1] / "rollout-0.end.json").read_text())
    assert served["exit_code"] == 0  # told to end, not killed
    ends = [json.loads(file.read_text()) for file in job.starts()[1].glob("trainer-*.end.json")]
    assert [(end["node"], end["exit_code"]) for end in ends] == [("n1", 0)] * 2


def test_every_node_of_a_colocated_run_generates_and_sleeps_in_turn(
    jobs: Path, tiny_task: TinyTask, tmp_path: Path
) -> None:
    run, site = tmp_path / "everywhere", tmp_path / "ci-local.toml"
    site.write_text(site.read_text().replace("ranks_per_node = 2", "ranks_per_node = 1"))
    steps = ["trainer.num_steps=2", "evaluation.every_steps=2", "checkpoint.every_steps=2"]
    colocated_run = [*_server_settings(tiny_task, run), *steps, "rollout.colocated=true"]
    assert _launch("--nodes", "2", *colocated_run) == 0
    job = find_job(jobs, "everywhere")
    logs, port = job.starts()[0], server_port(job.job_id or "", 0)
    urls = [json.loads(job.server_file(0, index).read_text())["url"] for index in range(2)]
    assert urls == [f"http://n1:{port}", f"http://n2:{port}"]
    ends = [json.loads(file.read_text()) for file in sorted(logs.glob("trainer-*.end.json"))]
    assert [(end["node"], end["exit_code"]) for end in ends] == [("n1", 0), ("n2", 0)]
    for index in range(2):
        said = (logs / f"rollout-{index}.log").read_text()
        assert f"starts when the trainer looks for it on port {port}" in said
        calls = re.findall(r'"POST (/\w+)', (logs / f"sglang-{index}-0.log").read_text())
        assert calls.count("/generate") >= 3  # two steps and an evaluation
        # After each update somebody samples: the next step, or the last evaluation.
        assert calls.count("/release_memory_occupation") == 2
        assert calls.count("/resume_memory_occupation") == 2 * 2
    assert [line["step"] for line in metrics_of(run, "train")] == [0, 1]


def test_a_signal_while_the_servers_start_sends_the_job_back_into_the_queue(
    jobs: Path, tiny_task: TinyTask, tmp_path: Path
) -> None:
    run = tmp_path / "early"
    how = ["--shape", "split", "--nodes", "2", "--rollout-nodes", "1", "--detach"]
    assert _launch(*how, *_server_settings(tiny_task, run)) == 0
    job = find_job(jobs, "early")
    number = job.job_id
    assert number is not None
    logs = job.start_folder(0)
    wait_for(lambda: (logs / "begin.json").exists() and (logs / "sglang-0-0.log").exists())
    assert not job.server_file(0, 0).exists()
    subprocess.run(["scancel", "--signal=USR1", number], check=True)
    wait_for(lambda: job_state(number).num_restarts == 1)
    assert main(["jobs", "cancel", "--jobs", str(jobs), "early"]) == 0
    said = job.batch_log.read_text()
    assert f"start 0 of job {number} ended with exit code 138" in said
    assert "back into the queue, to go on from what is saved" in said
    assert not run.exists()
    assert end_of(job)[0] != 0


def _wait_for_late_weights(log: Path) -> int:
    """Wait until a server that came up late is sent weights; return their policy version."""
    late = re.compile(r"server 0: starting -> updating: to\s+'[0-9a-f]+:(\d+)'")
    wait_for(lambda: late.search(log.read_text()) is not None, seconds=300)
    found = late.search(log.read_text())
    assert found is not None
    return int(found[1])


def test_a_trainer_samples_from_servers_on_other_nodes_and_goes_on_with_those_left(
    jobs: Path, tiny_task: TinyTask, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = "k3y-0f-th3-s3rv3rs"
    monkeypatch.setenv("PREFIXRL_SGLANG_API_KEY", key)
    run = tmp_path / "split"
    steps = ["trainer.num_steps=8", "evaluation.every_steps=8", "checkpoint.every_steps=8"]
    steps += ["trainer.rollouts_every_steps=4"]
    how = ["--shape", "split", "--nodes", "3", "--rollout-nodes", "2", "--detach"]
    how += ["rollout.sglang.max_restarts=0"]  # else it would be back at the same address
    gate = Gate(tmp_path / "gate")
    gate.close(1)
    gate.inherited(monkeypatch)
    assert _launch(*how, *_server_settings(tiny_task, run), *steps, HAS_GATE) == 0
    job = find_job(jobs, "split")
    assert job.job_id is not None
    _wait_for_steps(run, 1)
    urls = _urls(job, 0, 2)
    assert urls == [f"http://{node}:{server_port(job.job_id, 0)}" for node in ("n2", "n3")]
    _kill_server(urls[0])
    wait_for((job.start_folder(0) / "rollout-0.end.json").exists)  # before it is told to end
    gate.open()
    said = io.StringIO()
    assert follow(job, job.job_id, out=said) == 0, said.getvalue()
    assert job_state(job.job_id).num_restarts == 0
    lines = metrics_of(run, "train")
    assert [line["step"] for line in lines] == list(range(8))
    assert {line["step"]: _busy_servers(line) for line in (lines[0], lines[4])} == {
        0: [0, 1],
        4: [1],
    }
    ends = {
        name: json.loads((job.starts()[0] / f"{name}.end.json").read_text())
        for name in ("trainer-0", "trainer-1", "rollout-0")
    }
    assert {name: (end["node"], end["exit_code"]) for name, end in ends.items()} == {
        "trainer-0": ("n1", 0),
        "trainer-1": ("n1", 0),
        "rollout-0": ("n2", 75),
    }
    assert main(["report", str(run)]) == 0
    page = (run / "report.html").read_text()
    found = re.search('<script type="application/json" id="data">(.*?)</script>', page)
    assert found is not None
    (shown,) = json.loads(found[1])["runs"]
    assert shown["train"]["step"] == list(range(8))
    assert shown["evals"]["step"] == [0, 8]
    assert all(0 <= value <= 1 for value in shown["evals"]["eval/held-out/accuracy"])
    written = [*jobs.rglob("*"), *run.rglob("*")]
    assert [str(f) for f in written if f.is_file() and key.encode() in f.read_bytes()] == []


def _urls(job: JobFolder, start: int, number: int) -> list[str]:
    """Return where the servers of a start said that they are."""
    files = [job.server_file(start, index) for index in range(number)]
    return [json.loads(file.read_text())["url"] for file in files]


def _busy_servers(line: dict[str, Any]) -> list[int]:
    """Return which servers answered requests of a step."""
    return [index for index in range(2) if line[f"engine/server_{index}/num_requests"]]


def test_the_job_behind_one_that_is_requeued_waits_for_its_completion(
    jobs: Path, tmp_path: Path
) -> None:
    site, order = load_site("ci-local"), tmp_path / "order"
    say = 'echo "{0} $SLURM_RESTART_COUNT" >>{1}'
    first = say.format("parent", order) + "; ((SLURM_RESTART_COUNT)) && exit 0; sleep 2; exit 75"
    one = colocated(1, 1)
    parent = prepare_program(site, one, ["bash", "-c", first], name="parent")
    then = ["bash", "-c", say.format("child", order)]
    child = prepare_program(site, one, then, name="child", after=parent)
    submit(site, [parent, child])
    assert parent.job_id is not None
    assert child.job_id is not None
    seen = set()
    while True:
        child_state, state = job_state(child.job_id), job_state(parent.job_id)
        if state.has_ended and state.num_restarts:
            break
        seen.add((child_state.state, child_state.reason))  # asked before the parent had ended
        time.sleep(0.1)
    assert seen == {("PENDING", "Dependency")}
    assert [follow(job, str(job.job_id), out=io.StringIO()) for job in (parent, child)] == [0, 0]
    assert order.read_text().splitlines() == ["parent ", "parent 1", "child "]
    assert job_state(parent.job_id).num_restarts == 1
