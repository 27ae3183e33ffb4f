"""The pre-check: what a node finds, how it tells the first one, and what that makes of it."""

import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from prefixrl_mcore.config.site import SiteConfig
from prefixrl_mcore.launch.slurm.job_folder import JobFolder, TaskEnd
from prefixrl_mcore.launch.slurm.precheck.exchange import Listener, ask, clock_offset
from prefixrl_mcore.launch.slurm.precheck.node import (
    check_canary,
    check_free,
    check_needed,
    check_ports,
)
from prefixrl_mcore.launch.slurm.precheck.verdict import Finding, Verdict, decide
from prefixrl_mcore.launch.slurm.rank_environment import master_port
from tests.support.ports import free_port
from tests.support.waiting import wait_until

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
    (fault,) = check_needed({"model.path": str(model)}, is_in_container=True)
    assert fault.endswith(
        f'; container.mounts of the site lacks "{tmp_path}/blobs:{tmp_path}/blobs"'
    )
    assert check_needed({"the working directory": str(model)}, is_in_container=False) == []


def test_a_job_leaves_out_so_many_nodes_and_no_more() -> None:
    findings = _good("a", "b") | _good("c", faults=["broken"])
    assert _decide(findings, num_excluded_before=3).outcome == "exclude"
    verdict = _decide(findings, num_excluded_before=4)
    assert verdict.outcome == "fail"
    assert "precheck.max_excluded_nodes" in verdict.why


def test_a_clock_that_is_behind_is_measured_and_strangers_get_no_answer() -> None:
    port = free_port()
    with Listener(port, "t0ken", lambda _: {"unix_seconds": time.time() + 100}) as listener:
        threading.Thread(target=listener.serve_forever, daemon=True).start()
        deadline = time.monotonic() + 10
        offset, _ = clock_offset("localhost", port, "t0ken", deadline=deadline)
        assert -105 < offset < -95
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
    port = free_port()
    with socket.create_server(("", port)):
        (fault,) = check_ports([port])
    assert fault.startswith(f"port {port}, which the job needs")
    assert check_ports([port]) == []
    (fault,) = check_free(tmp_path, "job_folder", 1e9)
    assert fault.startswith("job_folder has ")
    assert check_free(tmp_path / "not" / "there", "job_folder", 0) == []


JOB_ID = str(os.getpid())  # the port is made of it: another test run has another


def _run_tasks(
    folder: JobFolder,
    nodes: list[str],
    hosts: str,
    *,
    seconds: float = 8.0,
    before_last: Callable[[], object] = lambda: None,
    **limits: Any,
) -> list[int]:
    """Run the pre-check's task for each of ``nodes``, all on this machine; return exit codes.

    ``before_last`` is called before the last one is started.
    """
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
        if node == nodes[-1]:
            before_last()
        tasks.append(_start_task(folder, node, hosts, seconds))
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
    assert _run_tasks(folder, ["localhost", "b"], "localhost,b", seconds=60) == [0, 0]
    report = json.loads((folder.logs / "start-0" / "precheck.json").read_text())
    assert sorted(report["findings"]) == ["b", "localhost"]
    assert abs(report["findings"]["b"]["clock_offset_seconds"]) < 5
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
    said: list[str] = []

    def has_tried() -> bool:
        said.append(capfd.readouterr().out)
        return "does not answer: [Errno 111] Connection refused; tried again" in "".join(said)

    waits = partial(wait_until, has_tried)
    nodes = ["b", "localhost"]
    codes = _run_tasks(folder, nodes, "localhost,b", seconds=10, before_last=waits)
    assert codes == [0, 0]
    report = json.loads((folder.logs / "start-0" / "precheck.json").read_text())
    assert (report["outcome"], sorted(report["findings"])) == ("go", ["b", "localhost"])


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
