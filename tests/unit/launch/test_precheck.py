"""The pre-check: what a node finds, how it tells the first one, and what that makes of it."""

import json
import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from prefixrl_mcore.config.site import SiteConfig
from prefixrl_mcore.launch.slurm.job_folder import JobFolder, TaskEnd
from prefixrl_mcore.launch.slurm.precheck.exchange import Listener, ask, clock_offset
from prefixrl_mcore.launch.slurm.precheck.gpus import check_gpus
from prefixrl_mcore.launch.slurm.precheck.node import (
    check_canary,
    check_free,
    check_needed,
    check_ports,
)
from prefixrl_mcore.launch.slurm.precheck.verdict import Finding, Verdict, decide
from prefixrl_mcore.launch.slurm.rank_environment import master_port

NODES = ["a", "b", "c"]


def _decide(findings: dict[str, Finding], nodes: list[str] = NODES, **more: Any) -> Verdict:
    limits = {"max_clock_skew_seconds": 5.0, "num_excluded_before": 0, "max_excluded": 4}
    return decide(nodes, findings, timeout_seconds=60, **{**limits, **more})


def _good(*nodes: str, **more: Any) -> dict[str, Finding]:
    return {node: Finding(node=node, role="trainer", **more) for node in nodes}


def test_good_nodes_go_on() -> None:
    verdict = _decide(_good(*NODES, facts={"driver": ["550"]}))
    assert (verdict.outcome, verdict.bad) == ("go", {})


def test_a_silent_node_is_bad() -> None:
    verdict = _decide(_good("a", "c"))
    assert verdict.outcome == "exclude"
    assert list(verdict.bad) == ["b"]
    assert "said nothing to a within 60 s" in verdict.bad["b"][0]


def test_the_node_whose_clock_is_far_from_the_others_is_bad_be_it_the_first() -> None:
    findings = _good("a") | _good("b", "c", clock_offset_seconds=-7.0)  # a's own offset is 0
    assert _decide(findings).bad == {
        "a": ["its clock is 7.0 s ahead of the other nodes', 5 s are allowed"]
    }
    assert _decide(findings, max_clock_skew_seconds=7.5).outcome == "go"


def test_the_node_that_differs_from_most_is_bad_and_of_a_tie_the_later_one() -> None:
    findings = _good("a", "b", facts={"driver": ["550"], "nccl": "2.27"})
    findings |= _good("c", facts={"driver": ["560"], "nccl": "2.27"})
    assert _decide(findings).bad == {"c": ["driver is 560, on the other trainer nodes 550"]}
    assert list(_decide(findings, ["b", "c"]).bad) == ["c"]


def test_nodes_of_another_role_may_differ() -> None:
    findings = _good("a", "b", facts={"gpus": ["H100"]})
    findings["c"] = Finding(node="c", role="rollout", facts={"gpus": ["L40"]})
    assert _decide(findings).outcome == "go"


def test_the_same_fault_everywhere_is_the_sites_and_excludes_nobody() -> None:
    assert _decide(_good(*NODES, faults=["no GPU"])).outcome == "fail"
    assert _decide(_good("a", faults=["no GPU"]), ["a"]).outcome == "exclude"


def test_a_path_that_the_only_node_lacks_is_the_sites_and_that_of_one_node_the_nodes() -> None:
    assert _decide(_good("a", site_faults=["no model"]), ["a"]).outcome == "fail"
    findings = _good("a", "b") | _good("c", site_faults=["no model"])
    verdict = _decide(findings)
    assert (verdict.outcome, verdict.bad) == ("exclude", {"c": ["no model"]})


def test_a_path_that_is_not_on_a_node_is_named_with_its_setting(tmp_path: Path) -> None:
    (tmp_path / "here").mkdir()
    needed = {"run_folder": f"{tmp_path}/here", "data.problems": f"{tmp_path}/gone"}
    (fault,) = check_needed(needed, is_in_container=False)
    assert fault == f"data.problems {tmp_path}/gone is not there"
    (fault,) = check_needed(needed, is_in_container=True)
    assert fault.endswith(f'; container.mounts of the site lacks "{tmp_path}/gone:{tmp_path}/gone"')


def test_a_link_of_a_model_that_leads_nowhere_is_named_others_are_nobodys(tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    (model / "weights").symlink_to("../blobs/1f")
    (fault,) = check_needed({"model.path": str(model)}, is_in_container=False)
    assert fault == f"model.path {model} has a link to {tmp_path}/blobs/1f, which is not there"
    assert check_needed({"the working directory": str(model)}, is_in_container=False) == []


def test_a_job_leaves_out_so_many_nodes_and_no_more() -> None:
    findings = _good("a", "b") | _good("c", faults=["broken"])
    assert _decide(findings, num_excluded_before=3).outcome == "exclude"
    verdict = _decide(findings, num_excluded_before=4)
    assert verdict.outcome == "fail"
    assert "precheck.max_excluded_nodes" in verdict.why


def _port() -> int:
    with socket.socket() as free:
        free.bind(("", 0))
        return free.getsockname()[1]


def test_a_clock_that_is_behind_is_measured_and_strangers_get_no_answer() -> None:
    port = _port()
    with Listener(port, "t0ken", lambda _: {"unix_seconds": time.time() + 100}) as listener:
        threading.Thread(target=listener.serve_forever, daemon=True).start()
        deadline = time.monotonic() + 10
        offset, _ = clock_offset("localhost", port, "t0ken", deadline=deadline)
        assert -101 < offset < -99
        with pytest.raises(RuntimeError, match=f"localhost:{port} does not answer"):
            ask("localhost", port, "guess", {}, deadline=time.monotonic())
        listener.shutdown()


def test_a_missing_and_another_canary_are_named(tmp_path: Path) -> None:
    (missing,) = check_canary(tmp_path, "x", seconds=0)
    assert "is not there" in missing
    (tmp_path / "canary").write_text("y")
    (other,) = check_canary(tmp_path, "x", seconds=0)
    assert "is another one" in other
    assert check_canary(tmp_path, "y", seconds=0) == []


def test_a_port_in_use_and_a_full_disk_are_named(tmp_path: Path) -> None:
    with socket.create_server(("", 0)) as server:
        port = server.getsockname()[1]
        (fault,) = check_ports([port])
    assert fault.startswith(f"port {port}, which the job needs")
    assert check_ports([port]) == []
    (fault,) = check_free(tmp_path, "job_folder", 1e9)
    assert fault.startswith("job_folder has ")
    assert check_free(tmp_path / "not" / "there", "job_folder", 0) == []


def _driver(folder: Path, monkeypatch: pytest.MonkeyPatch, *lines: str) -> None:
    """Let nvidia-smi be a script."""
    program = folder / "nvidia-smi"
    program.write_text("\n".join(["#!/bin/bash", *lines]) + "\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")


def _check(num: int, probe: dict[str, Any] | str | None = None) -> tuple[dict[str, Any], list[str]]:
    good = {"torch": "2", "cuda": "12.9", "nccl": "2.27", "num_gpus": num, "faults": {}}
    said = probe if isinstance(probe, str) else json.dumps({**good, **(probe or {})})
    command = ["bash", "-c", said if isinstance(probe, str) else f"echo '{said}'"]
    return check_gpus(num, max_memory_used_gib=2, probe_seconds=5, probe=command)


def test_good_gpus_tell_their_versions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _driver(tmp_path, monkeypatch, "echo '0, H100, 550.1, 4, 0'", "echo '1, H100, 550.1, 4, [N/A]'")
    facts, faults = _check(2)
    assert faults == []
    versions = {"torch": "2", "cuda": "12.9", "nccl": "2.27"}
    assert facts == {"gpus": ["H100"], "driver": ["550.1"], **versions}


@pytest.mark.parametrize(
    ("lines", "fault"),
    [
        pytest.param(
            ["echo 'NVIDIA-SMI has failed' >&2; exit 9"],
            "nvidia-smi fails with exit code 9: NVIDIA-SMI has failed",
            id="driver",
        ),
        pytest.param(["echo '0, H100, 550.1, 4, 0'"], "1 GPUs, 2 were asked for", id="lost"),
        pytest.param(
            ["echo '0, H100, 550.1, 4, 0'", "echo '1, H100, 550.1, [Unknown Error], 0'"],
            "GPU 1: the driver cannot read memory.used",
            id="unknown-error",
        ),
        pytest.param(
            ["echo '0, H100, 550.1, 4, 0'", "echo '1, H100, 550.1, 4, 3'"],
            "GPU 1: 3 uncorrected memory errors",
            id="memory-errors",
        ),
        pytest.param(
            ["echo '0, H100, 550.1, 30720, 0'", "echo '1, H100, 550.1, 4, 0'"],
            "GPU 0: 30.0 GiB are in use, at most 2 may be",
            id="in-use",
        ),
    ],
)
def test_bad_gpus_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lines: list[str], fault: str
) -> None:
    _driver(tmp_path, monkeypatch, *lines)
    (said,) = _check(2)[1]
    assert said.startswith(fault)


@pytest.mark.parametrize(
    ("probe", "fault"),
    [
        ({"num_gpus": 1}, "torch sees 1 GPUs, 2 were asked for"),
        ({"faults": {"1": "CUDA error: uncorrectable"}}, "GPU 1: CUDA error: uncorrectable"),
        ("echo no module named torch >&2; exit 1", "torch fails with exit code 1: no module"),
        ("sleep 60", "torch does not end within 5 s"),
    ],
)
def test_gpus_that_do_not_compute_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, probe: dict[str, Any] | str, fault: str
) -> None:
    _driver(tmp_path, monkeypatch, "echo '0, H100, 5, 4, 0'", "echo '1, H100, 5, 4, 0'")
    (said,) = _check(2, probe)[1]
    assert fault in said


def test_a_probe_that_says_something_else_is_a_fault_and_no_silence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _driver(tmp_path, monkeypatch, "echo '0, H100, 5, 4, 0'")
    for said in ("echo Segmentation fault", "echo '[]'", "echo '{}'"):
        (fault,) = _check(1, said)[1]
        assert "torch answers what was not asked" in fault


def test_only_the_jobs_own_gpus_are_asked_about(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    busy = 'if [[ "$*" == *--id=2,3\\ * ]]; then used=4; else used=30720; fi'
    lines = [busy, 'echo "2, H100, 5, $used, 0"', 'echo "3, H100, 5, $used, 0"']
    _driver(tmp_path, monkeypatch, *lines)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert len(_check(2)[1]) == 2
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,3")
    assert _check(2)[1] == []
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "MIG-1,MIG-2")  # nvidia-smi takes no such name
    assert len(_check(2)[1]) == 2


def test_the_probe_answers_without_a_gpu_and_a_site_of_cpus_asks_nothing() -> None:
    command = [sys.executable, "-m", "prefixrl_mcore.policy.device_probe"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)["num_gpus"] == 0
    assert check_gpus(0, max_memory_used_gib=0, probe_seconds=0) == ({}, [])


JOB_ID = "374"


def _run_tasks(
    folder: JobFolder,
    nodes: list[str],
    hosts: str,
    *,
    seconds: float = 8.0,
    pause_seconds: float = 0.0,
    **limits: Any,
) -> list[int]:
    """Run the pre-check's task for each of ``nodes``, all on this machine; return exit codes."""
    site = SiteConfig(gpus_per_node=0, ranks_per_node=1)
    small = {"min_free_gib": 0, "min_temporary_gib": 0, "min_shared_memory_gib": 0, **limits}
    precheck = {
        "limits": site.precheck.model_copy(update=small).model_dump(exclude={"enabled"}),
        "roles": {"trainer": {"gpus": 0, "num_server_ports": 0}},
        "needed": {},
        "is_in_container": False,
    }
    folder.file.write_text(json.dumps({"submission": {"precheck": precheck}}))
    tasks = []
    for node in nodes:
        tasks.append(_start_task(folder, node, hosts, seconds))
        time.sleep(pause_seconds)
    return [task.wait(timeout=120) for task in tasks]


def _start_task(
    folder: JobFolder, node: str, hosts: str, seconds: float
) -> "subprocess.Popen[bytes]":
    return subprocess.Popen(
        [
            *(sys.executable, "-m", "prefixrl_mcore.launch.slurm.precheck.task"),
            *(str(folder.path), f"{seconds:g}", "60"),
        ],
        env={
            **os.environ,
            "SLURM_JOB_ID": JOB_ID,
            "SLURMD_NODENAME": node,
            "PREFIXRL_TRAINER_HOSTS": hosts,
            "PREFIXRL_ROLLOUT_HOSTS": "",
            "PREFIXRL_PRECHECK_TOKEN": "t0ken",
        },
    )


@pytest.fixture
def folder(tmp_path: Path) -> JobFolder:
    made = JobFolder(tmp_path / "job")
    (made.logs / "start-0").mkdir(parents=True)
    return made


def test_nodes_tell_the_first_one_which_lets_the_job_go_on(folder: JobFolder) -> None:
    assert _run_tasks(folder, ["localhost", "b"], "localhost,b") == [0, 0]
    report = json.loads((folder.logs / "start-0" / "precheck.json").read_text())
    assert sorted(report["findings"]) == ["b", "localhost"]
    assert abs(report["findings"]["b"]["clock_offset_seconds"]) < 1
    assert json.loads((folder.logs / "start-0" / "precheck" / "b.json").read_text())["faults"] == []


def test_a_node_without_a_task_is_left_out_after_the_deadline(folder: JobFolder) -> None:
    assert _run_tasks(folder, ["localhost"], "localhost,b") == [77]
    assert (folder.logs / "start-0" / "precheck.bad").read_text() == "b\n"
    failure = folder.first_failure()
    assert isinstance(failure, TaskEnd)
    assert (failure.task, failure.node, failure.exit_code) == ("precheck", "b", 77)


def test_a_rendezvous_port_in_use_makes_the_first_node_bad(folder: JobFolder) -> None:
    with socket.create_server(("", master_port(JOB_ID))):
        assert _run_tasks(folder, ["localhost"], "localhost,b") == [77]
    assert (folder.logs / "start-0" / "precheck.bad").read_text() == "localhost\n"


def test_nodes_wait_for_a_first_one_that_starts_later(
    folder: JobFolder, capfd: pytest.CaptureFixture[str]
) -> None:
    nodes = ["b", "localhost"]
    codes = _run_tasks(folder, nodes, "localhost,b", seconds=5, pause_seconds=7)
    assert codes == [0, 0]
    report = json.loads((folder.logs / "start-0" / "precheck.json").read_text())
    assert (report["outcome"], sorted(report["findings"])) == ("go", ["b", "localhost"])
    assert "does not answer: [Errno 111] Connection refused; tried again" in capfd.readouterr().out


def test_a_first_node_that_accuses_itself_is_counted(folder: JobFolder) -> None:
    told = {"outcome": "exclude", "bad": {"x": [], "y": []}}
    (folder.logs / "start-1").mkdir()
    (folder.logs / "start-1" / "precheck.json").write_text(json.dumps(told))
    with socket.create_server(("", master_port(JOB_ID))):
        assert _run_tasks(folder, ["localhost"], "localhost,b", max_excluded_nodes=2) == [78]
    assert not (folder.logs / "start-0" / "precheck.bad").exists()


def test_a_folder_that_cannot_be_written_is_said(
    folder: JobFolder, capfd: pytest.CaptureFixture[str]
) -> None:
    (folder.logs / "start-0" / "precheck").write_text("no folder")  # root may write anywhere
    assert _run_tasks(folder, ["localhost"], "localhost,b") == [77]
    assert "bad node localhost: job_folder cannot be written" in capfd.readouterr().out
