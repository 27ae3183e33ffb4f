"""The local cluster: nodes with names and addresses of their own, and nothing left behind."""

import json
import os
import subprocess
import sys
import zlib
from pathlib import Path

import pytest

from tests.slurm.conftest import CLUSTER, run_cluster, skip_unless_it_can_run
from tests.support.launched_jobs import wait_for

pytestmark = pytest.mark.slurm


def _srun(*arguments: str, environment: dict[str, str] | None = None) -> str:
    done = subprocess.run(
        ["srun", *arguments],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, **(environment or {})},
        timeout=180,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def _running(environment: dict[str, str]) -> str:
    """Return the jobs that run on a cluster."""
    asked = ["squeue", "--noheader", "--states=RUNNING"]
    return subprocess.run(
        asked, env={**os.environ, **environment}, capture_output=True, text=True, check=True
    ).stdout


def _processes_of(folder: Path) -> list[str]:
    """Return the command lines of processes that were started for a cluster."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            environment = (process / "environ").read_bytes()
            command = (process / "cmdline").read_bytes().replace(b"\0", b" ").decode()
        except OSError:
            continue
        if str(folder) in command or str(folder).encode() in environment:
            found.append(command)
    return found


def test_two_nodes_have_names_and_addresses_of_their_own(slurm: Path) -> None:
    said = _srun("--nodes=2", "bash", "-c", "echo $(hostname) $(hostname --ip-address)")
    names, addresses = zip(*(line.split() for line in said.splitlines()), strict=True)
    assert sorted(names) == ["n1", "n2"]
    assert len(set(addresses)) == 2
    assert all(address.startswith("10.231.") for address in addresses)


def test_two_nodes_listen_on_the_same_port(slurm: Path) -> None:
    listen = "import socket, time; s = socket.create_server(('', 8000)); time.sleep(1); print(1)"
    assert _srun("--nodes=2", "python3", "-c", listen).split() == ["1", "1"]


def test_a_job_gets_the_gpus_that_it_asks_for(slurm: Path) -> None:
    said = _srun("--nodes=1", "--gpus-per-node=2", "bash", "-c", "echo $CUDA_VISIBLE_DEVICES")
    assert said.strip() == "0,1"


def test_down_leaves_no_process_and_no_network(tmp_path: Path) -> None:
    folder = tmp_path / "c"
    skip_unless_it_can_run(folder, "--no-cgroups")
    up = run_cluster("up", folder, "--nodes", "2", "--no-cgroups")
    assert up.returncode == 0, up.stderr
    assert "2 nodes are idle" in up.stderr
    daemons = [daemon["name"] for daemon in json.loads((folder / "pids.json").read_text())]
    assert daemons == ["munged", "slurmctld", "slurmd-n1", "slurmd-n2"]
    environment = {"SLURM_CONF": str(folder / "etc" / "slurm.conf")}
    job = subprocess.Popen(
        ["srun", "--nodes=2", "sleep", "600"],
        env={**os.environ, **environment},
        stderr=subprocess.DEVNULL,
    )
    try:
        # What comes to the controller while it goes down would outlive it.
        wait_for(lambda: "sleep" in _running(environment))
    except BaseException:
        job.kill()
        run_cluster("wipe", folder)
        raise
    networks = json.loads((folder / "cluster.json").read_text())
    assert networks["has_networks"] is True
    down = run_cluster("down", folder)
    assert down.returncode == 0, down.stderr
    job.wait(timeout=60)
    wait_for(lambda: _processes_of(folder) == [], seconds=10)
    assert not list(Path("/sys/class/net").glob(f"slurm{_mark(folder)}*"))
    assert not list(Path("/run/netns").glob(f"slurm{_mark(folder)}*"))
    assert run_cluster("up", folder, "--nodes", "2", "--no-cgroups").returncode == 0  # again
    assert run_cluster("wipe", folder).returncode == 0
    assert not folder.exists()


def test_a_second_cluster_with_control_groups_is_refused(slurm: Path, tmp_path: Path) -> None:
    for command in ("check", "up"):
        second = run_cluster(command, tmp_path / "second")
        assert second.returncode == 1
        assert "another cluster with control groups runs here: slurmd of n" in second.stderr
        assert f"of {slurm}/etc/slurm.conf" in second.stderr
        assert not (tmp_path / "second").exists()


def test_a_second_cluster_would_have_addresses_of_its_own(slurm: Path) -> None:
    asks = "import cluster; print(cluster._free_subnet())"
    command = [sys.executable, "-c", asks]
    done = subprocess.run(command, cwd=CLUSTER.parent, capture_output=True, text=True, check=True)
    assert int(done.stdout) != json.loads((slurm / "cluster.json").read_text())["subnet"]


@pytest.mark.usefixtures("slurm")  # the machine can do it
def test_what_a_dead_cluster_left_blocks_only_while_its_tasks_run() -> None:
    root = Path("/sys/fs/cgroup")
    controller = root / "freezer" if (root / "freezer").is_dir() else root
    group = controller / "slurm_n9" / "uid_0" / "job_1"
    group.mkdir(parents=True, exist_ok=True)
    # Not through `up`: the cluster of the other tests may run.
    asks = "import cgroups; cgroups.check_unused(['n9']); cgroups.remove(['n9'])"
    command = [sys.executable, "-c", asks]
    task = subprocess.Popen(["sleep", "600"])
    try:
        (group / "cgroup.procs").write_text(str(task.pid))
        refused = subprocess.run(
            command, cwd=CLUSTER.parent, capture_output=True, text=True, check=False
        )
    finally:
        task.kill()
        task.wait()
    assert refused.returncode == 1
    assert f"nodes with these names: processes {task.pid}." in refused.stderr
    assert subprocess.run(command, cwd=CLUSTER.parent, check=False).returncode == 0
    assert not (controller / "slurm_n9").exists()


def _mark(folder: Path) -> str:
    """Return the part of names that is the cluster's own."""
    return f"{zlib.crc32(str(folder).encode()) & 0xFFFF:04x}"


@pytest.mark.parametrize("command", ["check", "up"])
def test_what_is_missing_is_named(tmp_path: Path, command: str) -> None:
    environment = {"PATH": str(tmp_path)}
    done = subprocess.run(
        [os.path.realpath("/proc/self/exe"), "slurm/testing/cluster.py", command, "--dir", "x"],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
        cwd=Path(__file__).parents[2],
    )
    assert done.returncode == 1
    if os.geteuid() == 0:
        assert "not installed: munged, slurmctld" in done.stderr
        assert "run slurm/testing/install.sh" in done.stderr
    else:
        assert "the local cluster must be started as root" in done.stderr
