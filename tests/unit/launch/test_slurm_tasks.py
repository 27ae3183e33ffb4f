"""What a task makes of Slurm's variables, and what is made of Slurm's words."""

import dataclasses
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from prefixrl_mcore.config.base import ConfigError, validate
from prefixrl_mcore.config.load import load_config, read_config_file, with_settings
from prefixrl_mcore.config.run import RunConfig
from prefixrl_mcore.launch.slurm import task as task_module
from prefixrl_mcore.launch.slurm.job_folder import JobFolder, TaskEnd, TaskFile
from prefixrl_mcore.launch.slurm.orphan import path_exists
from prefixrl_mcore.launch.slurm.rank_environment import (
    master_port,
    rank_variables,
    server_port,
    tasks_per_node,
)
from prefixrl_mcore.launch.slurm.rollout_task import own_gpus, server_launch
from prefixrl_mcore.launch.slurm.states import (
    JobState,
    SlurmError,
    job_state,
    job_states,
    parse_sacct,
    parse_scontrol,
)
from prefixrl_mcore.launch.slurm.task import main as task_main
from prefixrl_mcore.launch.slurm.task import server_flags, stage_arguments, train_arguments

DEMO = Path(__file__).parents[3] / "configs" / "demo" / "run.toml"
SLURM = {
    "SLURM_JOB_ID": "1234",
    "SLURM_PROCID": "9",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "2",
    "SLURM_STEP_NUM_TASKS": "10",
    "SLURM_STEP_TASKS_PER_NODE": "4(x2),2",
    "PREFIXRL_TRAINER_HOSTS": "node-a,node-b,node-c",
}


def test_ranks_come_from_slurm() -> None:
    assert rank_variables(SLURM) == {
        "RANK": "9",
        "WORLD_SIZE": "10",
        "LOCAL_RANK": "1",
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "node-a",
        "MASTER_PORT": str(20_000 + 1234 % 375 * 32),
    }


def test_what_slurm_did_not_set_is_named() -> None:
    with pytest.raises(ConfigError, match="SLURM_PROCID, PREFIXRL_TRAINER_HOSTS not set"):
        rank_variables({**SLURM, "SLURM_PROCID": "", "PREFIXRL_TRAINER_HOSTS": ""})


@pytest.mark.parametrize(
    ("text", "counts"), [("8", [8]), ("2(x3)", [2, 2, 2]), ("1,4(x2),3", [1, 4, 4, 3])]
)
def test_the_short_form_of_tasks_is_read(text: str, counts: list[int]) -> None:
    assert tasks_per_node(text) == counts


def test_ports_of_375_jobs_in_a_row_do_not_meet_and_are_not_handed_out_by_linux() -> None:
    taken = [
        port
        for job in range(700, 1075)
        for port in (master_port(str(job)), *(server_port(str(job), i) for i in range(16)))
    ]
    assert len(set(taken)) == 375 * 17
    assert min(taken) >= 20_000
    assert max(taken) < 32_000


def _arguments(run: Path, *, is_resumed: bool = False, **variables: str) -> list[str]:
    task = TaskFile(
        config="/jobs/a/config.json",
        run_folder=str(run),
        working_directory="/",
        is_resumed=is_resumed,
        num_servers=0,
        gpus_per_server=0,
    )
    return train_arguments(task, variables)


def test_only_a_restart_that_finds_a_run_resumes_it(tmp_path: Path) -> None:
    first = ["train", "/jobs/a/config.json"]
    assert _arguments(tmp_path) == first
    assert _arguments(tmp_path, SLURM_RESTART_COUNT="1") == first
    (tmp_path / "config.json").write_text("{}")
    assert _arguments(tmp_path) == first
    assert _arguments(tmp_path, SLURM_RESTART_COUNT="1") == [*first, "--resume"]
    assert _arguments(tmp_path, is_resumed=True) == [*first, "--resume"]


def test_the_trainer_is_told_when_the_job_ends(tmp_path: Path) -> None:
    arguments = _arguments(tmp_path, PREFIXRL_JOB_END_UNIX_SECONDS="1795266764")
    assert arguments[2:] == ["--trainer.end-unix-seconds", "1795266764"]


def test_a_running_job_is_read_from_slurmctld() -> None:
    state = parse_scontrol(
        "JobId=7 JobName=a UserId=root(0) JobState=RUNNING Reason=None Dependency=(null) "
        "Requeue=1 Restarts=2 BatchFlag=1 Reboot=0 ExitCode=0:0 NodeList=n[1-2] BatchHost=n1"
    )
    assert (state.state, state.reason, state.num_restarts, state.nodes) == (
        "RUNNING", "", 2, "n[1-2]",
    )  # fmt: skip
    assert not state.has_ended
    assert str(state) == "RUNNING after 2 restart(s) on n[1-2]"


@pytest.mark.parametrize(
    ("state", "code", "result"),
    [
        ("COMPLETED", "0:0", 0),
        ("FAILED", "3:0", 3),
        ("FAILED", "0:9", 137),
        ("CANCELLED", "0:0", 1),
        ("TIMEOUT", "0:0", 1),
        ("OUT_OF_MEMORY", "0:125", 253),
    ],
)
def test_only_a_completed_job_gives_0(state: str, code: str, result: int) -> None:
    told = parse_scontrol(f"JobId=7 JobState={state} Reason=None ExitCode={code} NodeList=n1")
    assert told.has_ended
    assert told.result == result
    assert parse_sacct(f"7|{state}|{code}|n1") == told


def test_accounting_tells_of_every_start() -> None:
    state = parse_sacct("7|REQUEUED|0:0|n1\n7|CANCELLED by 0|0:15|n2")
    assert (state.state, state.num_restarts, state.nodes, state.result) == (
        "CANCELLED", 1, "n2", 143,
    )  # fmt: skip


def test_accounting_tells_of_the_first_component_of_a_heterogeneous_job() -> None:
    said = "7+0|REQUEUED|0:0|n1\n7+1|REQUEUED|0:0|n2\n7+0|FAILED|3:0|n1\n7+1|CANCELLED|0:0|n2"
    state = parse_sacct(said)
    assert (state.state, state.exit_code, state.nodes, state.num_restarts) == ("FAILED", 3, "n1", 1)
    once = parse_sacct("7+0|COMPLETED|0:0|n1\n7+1|COMPLETED|0:0|n2")
    assert (once.result, once.num_restarts) == (0, 0)


def test_several_jobs_are_asked_for_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = {
        # The second component of a heterogeneous job has a number of its own.
        "squeue": "CLUSTER: a\n7|RUNNING|None|2|n[1-2]|\n8|PENDING|Dependency|0||",
        "sacct": "5|FAILED|3:0|n1\n51|COMPLETED|0:0|n1\n52+0|COMPLETED|0:0|n1",
    }
    for name, text in lines.items():
        program = tmp_path / name
        program.write_text(
            f'#!/bin/bash\necho "{name} $@ $SQUEUE_PARTITION" >>{tmp_path}/asked\necho "{text}"\n'
        )
        program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setenv("SQUEUE_PARTITION", "another")
    states = job_states(["7", "8", "5", "52", "9"], user_id=4242)
    assert {job: state.state for job, state in states.items()} == {
        "7": "RUNNING", "8": "PENDING", "5": "FAILED", "52": "COMPLETED", "9": "UNKNOWN",
    }  # fmt: skip
    assert states["7"] == JobState(state="RUNNING", num_restarts=2, nodes="n[1-2]")
    assert states["8"] == JobState(state="PENDING", reason="Dependency")
    first, second = (tmp_path / "asked").read_text().splitlines()
    assert first == (
        "squeue --noheader --states=all "
        "--Format=JobID:|,State:|,Reason:|,RestartCnt:|,NodeList:| --user=4242 "
    )
    assert "--jobs 5,52,9 " in second
    (tmp_path / "asked").unlink()
    job_states(["7"], user_id=None)
    assert (tmp_path / "asked").read_text().endswith("NodeList:| \n")  # of a team's folder


def test_a_job_whose_comment_is_in_another_encoding_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "scontrol"
    program.write_text("#!/bin/bash\nprintf 'JobId=7 JobState=RUNNING Comment=caf\\xe9\\n'\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    assert job_state("7").state == "RUNNING"


def test_a_job_that_slurm_does_not_know_is_unknown() -> None:
    assert not parse_scontrol("").is_known
    assert not parse_sacct("").is_known


@pytest.mark.parametrize("name", ["a b", "it's", "$HOME", "nemo_run", "50%j"])
def test_a_job_folder_that_nemo_run_would_break_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match="choose another folder"):
        JobFolder.make(tmp_path / name, "job")
    with pytest.raises(ConfigError, match="--name 'a b'"):
        JobFolder.make(tmp_path, "a b")
    with pytest.raises(ConfigError, match="--name 'nemo_run-1'"):
        JobFolder.make(tmp_path, "nemo_run-1")
    assert not (tmp_path / name).exists()


def test_a_task_that_cannot_enter_the_launchers_folder_says_so_and_how_it_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = JobFolder.make(tmp_path, "job")
    gone = tmp_path / "gone"
    job.write(replace(_task_with_servers(0), working_directory=str(gone)), {})
    for name, value in SLURM.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "argv", ["task", str(job.path), "report"])
    with pytest.raises(ConfigError, match=f"{gone}: .* cannot enter it .No such file"):
        task_main()
    end = job.read_end(0, "report-9")
    assert end is not None
    assert end.exit_code == 1


def test_a_task_without_its_file_says_how_it_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = JobFolder.make(tmp_path, "job")
    for name, value in SLURM.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "argv", ["task", str(job.path), "trainer"])
    with pytest.raises(ConfigError, match=f"{job.file}: does not exist"):
        task_main()
    assert job.read_end(0, "trainer-9") is not None


def test_a_task_that_cannot_write_how_it_ended_keeps_its_exit_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    job = JobFolder.make(tmp_path, "job")

    def refuse(*_: object) -> None:
        raise OSError(122, "Disk quota exceeded")

    for name, value in SLURM.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "argv", ["task", str(job.path), "trainer"])
    monkeypatch.setattr(task_module, "_run", lambda *_: 138)
    monkeypatch.setattr(JobFolder, "write_end", refuse)
    assert task_main() == 138
    said = capsys.readouterr().err
    assert "ends with exit code 138, which cannot be written to" in said
    assert "Disk quota exceeded" in said


def _task_with_servers(number: int) -> TaskFile:
    return TaskFile(
        config="c",
        run_folder="r",
        working_directory="/",
        is_resumed=False,
        num_servers=number,
        gpus_per_server=2,
    )


def test_the_trainer_is_told_all_servers_of_this_start(tmp_path: Path) -> None:
    job = JobFolder.make(tmp_path, "job")
    for start, index in ((0, 0), (0, 1), (1, 0), (1, 1)):
        file = job.server_file(start, index)
        file.parent.mkdir(exist_ok=True)
        file.write_text(f'{{"url": "http://n{index}:{start}", "max_restarts": 3}}')
    flags = server_flags(job, _task_with_servers(2), start=1, timeout_seconds=1)
    urls = ["--rollout.sglang.urls", "http://n0:1", "http://n1:1"]
    assert flags[:5] == [*urls, "--rollout.sglang.num-servers", "1"]  # what it was is of each node
    assert flags[5:] == ["--rollout.sglang.max-restarts", "4"]  # once more than their tasks


@pytest.mark.parametrize(("min_servers", "expected"), [(2, 2), (6, 3)])
def test_a_stage_on_one_node_needs_no_more_servers_than_it_starts(
    tmp_path: Path, min_servers: int, expected: int
) -> None:
    settings = ["rollout.sglang.num_servers=3", f"rollout.sglang.min_servers={min_servers}"]
    values = with_settings(read_config_file(DEMO), settings)
    config = tmp_path / "run.json"
    config.write_text(validate(RunConfig, values, where="test").model_dump_json())
    task = replace(_task_with_servers(6), config=str(config))
    name, path, *flags = stage_arguments("eval", task)
    assert (name, path) == ("eval", str(config))
    assert load_config(RunConfig, config, flags).rollout.sglang.min_servers == expected
    assert stage_arguments("report", task) == ["report", "r"]


def test_a_server_that_does_not_come_up_ends_the_wait_and_is_named(tmp_path: Path) -> None:
    job = JobFolder.make(tmp_path, "job")
    end = TaskEnd(task="rollout-1", node="node-b", exit_code=1, unix_seconds=0.0)
    job.write_end(0, end)
    with pytest.raises(SlurmError, match=r"rollout-1 on node-b ended with exit code 1 before"):
        server_flags(job, _task_with_servers(2), start=0, timeout_seconds=1)


def test_a_rollout_task_that_was_killed_before_it_said_anything_ends_the_wait(
    tmp_path: Path,
) -> None:
    job = JobFolder.make(tmp_path, "job")
    file = job.server_file(0, 0)
    file.parent.mkdir()
    file.write_text('{"url": "http://n0:1"}')
    with pytest.raises(SlurmError, match=r"^rollout-1: no address after 0 s; was it killed\?"):
        server_flags(job, _task_with_servers(2), start=0, timeout_seconds=0.05, poll_seconds=0.01)


def test_each_server_of_a_node_has_gpus_of_its_own() -> None:
    whole = {"SLURM_LOCALID": "1", "CUDA_VISIBLE_DEVICES": "4,5,6,7"}
    assert own_gpus(whole, 2) == ("6", "7")
    assert own_gpus({"SLURM_LOCALID": "3"}, 2) == ("6", "7")
    assert own_gpus({"SLURM_LOCALID": "3"}, 0) == ()


def test_a_rollout_task_serves_on_at_sigterm_and_ends_at_sigusr2(tmp_path: Path) -> None:
    job = JobFolder.make(tmp_path, "job")
    beside_ranks = replace(_task_with_servers(1), config=str(DEMO), shares_nodes=True)
    job.write(beside_ranks, {})
    environment = {
        "SLURMD_NODENAME": "node-b",
        "PREFIXRL_SGLANG_API_KEY": "k3y-0f-th3-s3rv3rs",
        **SLURM,
        "SLURM_JOB_ID": str(os.getpid()),  # of which its port is made: not another test run's
    }
    task = subprocess.Popen(
        [sys.executable, "-m", "prefixrl_mcore.launch.slurm.task", str(job.path), "rollout"],
        env={**os.environ, **environment},
    )
    with task:
        deadline = time.monotonic() + 60
        while not job.server_file(0, 9).exists():
            assert time.monotonic() < deadline
            time.sleep(0.05)
        for number in (signal.SIGTERM, signal.SIGUSR1):
            task.send_signal(number)
        with pytest.raises(subprocess.TimeoutExpired):
            task.wait(1.5)
        task.send_signal(signal.SIGUSR2)
        assert task.wait(60) == 0
    end = job.read_end(0, "rollout-9")
    assert end is not None
    assert end.exit_code == 0


def test_a_task_ends_when_a_later_start_of_its_job_exists(tmp_path: Path) -> None:
    job = JobFolder.make(tmp_path, "job")
    (job.logs / "start-1").mkdir()  # its own
    program = (
        "import sys, time; from pathlib import Path; "
        "from prefixrl_mcore.launch.slurm.job_folder import JobFolder; "
        "from prefixrl_mcore.launch.slurm.orphan import end_with_a_later_start; "
        "end_with_a_later_start(JobFolder(Path(sys.argv[1])), 1, poll_seconds=0.01); "
        "print('lives', flush=True); time.sleep(60)"
    )
    task = subprocess.Popen(
        [sys.executable, "-c", program, str(job.path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    with task:
        assert task.stdout is not None
        assert task.stderr is not None
        assert task.stdout.readline() == b"lives\n"
        (job.logs / "start-2").mkdir()
        assert task.wait(60) == 78
        assert b"start-2 exists: Slurm has lost this start" in task.stderr.read()


def test_a_file_system_that_does_not_answer_says_nothing_of_a_later_start(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def stale(_: Path) -> bool:
        raise OSError(116, "Stale file handle")

    assert path_exists(Path("/"))
    monkeypatch.setattr(Path, "exists", stale)
    assert not path_exists(Path("/"))


@pytest.mark.parametrize(
    ("shares_nodes", "gpus", "first_gpu"),
    [
        pytest.param(False, ("6", "7"), 0, id="on a node of its own"),
        # It numbers GPUs as rank 0 does, which sends it handles of memory.
        pytest.param(True, ("4", "5", "6", "7"), 2, id="beside ranks"),
    ],
)
def test_a_server_on_the_trainers_gpus_sees_all_of_them(
    shares_nodes: bool, gpus: tuple[str, ...], first_gpu: int
) -> None:
    config = load_config(RunConfig, DEMO, [])
    task = dataclasses.replace(_task_with_servers(2), shares_nodes=shares_nodes)
    environment = {**SLURM, "CUDA_VISIBLE_DEVICES": "4,5,6,7"}
    launch = server_launch(config, task, environment)
    assert (launch.gpus, launch.first_gpu, launch.device) == (gpus, first_gpu, "cuda")
    del environment["CUDA_VISIBLE_DEVICES"]
    launch = server_launch(config, task, environment)
    assert launch.gpus == (("0", "1", "2", "3") if shares_nodes else ("2", "3"))
