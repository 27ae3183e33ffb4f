"""A Slurm cluster of several nodes on this machine, for trying and testing launches.

    python3 slurm/testing/cluster.py up [--nodes 4 ...]    starts it and waits until it is idle
                                     check                 only says why ``up`` would refuse
    eval "$(python3 slurm/testing/cluster.py env)"         lets srun, sbatch, ... of a shell find it
    python3 slurm/testing/cluster.py fail --node n2        as if its power went; mend: it is back
                                     ... --daemon-only     what it runs lives on, unseen by Slurm
    python3 slurm/testing/cluster.py status | down | wipe

It needs root and what install.sh installs, and no more of Python than its standard library. All
state is in one folder; ``down`` ends exactly the processes that ``up`` started.
"""

import argparse
import os
import secrets
import shlex
import shutil
import socket
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import cgroups
from networks import inside, kill_network, make_networks, remove_networks
from processes import Daemons, say, wait_for
from settings import Cluster, read_cluster, write_settings

_PROGRAMS = ("munged", "slurmctld", "slurmd", "sinfo", "gcc")
_DATABASE_PROGRAMS = ("slurmdbd", "mariadbd", "mariadb-install-db", "mariadb")
_SOCKET_PATH_BYTES = 107
_CONTAINERS = Path(__file__).resolve().parent / "pyxis" / "stand_in.c"
_SPANK = Path("/usr/include/slurm/spank.h")


def main() -> int:
    """Carry out one command and return its exit code."""
    arguments = _parse()
    folder = arguments.dir.resolve()
    try:
        if arguments.command in ("check", "up"):
            _check_machine(arguments, folder)
            cluster = _cluster(arguments, folder)
            if arguments.command == "up":
                _up(cluster)
            return 0
        cluster = read_cluster(folder)
        if cluster is None:
            say(f"no cluster in {folder}")
            return 0 if arguments.command in ("down", "wipe") else 1
        if arguments.command == "env":
            sys.stdout.write(f"export SLURM_CONF={shlex.quote(str(_slurm_conf(cluster)))}\n")
            return 0
        if arguments.command == "status":
            return _status(cluster)
        if arguments.command == "fail":
            node = _known_node(cluster, arguments.node)
            _fail(cluster, node, daemon_only=arguments.daemon_only)
            return 0
        if arguments.command == "mend":
            _mend(cluster, _known_node(cluster, arguments.node))
            return 0
        _down(cluster)
        if arguments.command == "wipe":
            shutil.rmtree(folder)
    except RuntimeError as error:
        say(f"error: {error}")
        return 1
    return 0


def _parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description="A Slurm cluster on this machine.")
    commands = ("check", "up", "env", "status", "fail", "mend", "down", "wipe")
    parser.add_argument("command", choices=commands)
    parser.add_argument("--dir", type=Path, default=Path("runs/slurm-cluster"), help="its folder")
    parser.add_argument("--nodes", type=int, default=4, help="nodes n1, n2, ... (4)")
    parser.add_argument("--node", help="which one fails or is mended")
    parser.add_argument(
        "--daemon-only", action="store_true", help="of a node that fails; its jobs' processes live"
    )
    parser.add_argument("--cpus", type=int, default=4, help="CPUs that a node claims (4)")
    parser.add_argument("--memory-mb", type=int, default=8000, help="memory that it claims (8000)")
    parser.add_argument("--gpus", type=int, default=0, help="pretended GPUs of a node (0)")
    parser.add_argument(
        "--no-networks", action="store_true", help="no host names and addresses of the nodes' own"
    )
    parser.add_argument(
        "--no-cgroups", action="store_true", help="no memory limits, and signals reach all children"
    )
    parser.add_argument(
        "--accounting", action="store_true", help="with slurmdbd: sacct, accounts, QOS"
    )
    return parser.parse_args()


def _cluster(arguments: argparse.Namespace, folder: Path) -> Cluster:
    """Return the cluster to start.

    Raises:
        RuntimeError: if another one has the control groups that it needs.
    """
    ports = _free_ports(3 + arguments.nodes)
    cluster = Cluster(
        folder=folder,
        nodes=arguments.nodes,
        cpus=arguments.cpus,
        memory_mb=arguments.memory_mb,
        gpus=arguments.gpus,
        has_networks=not arguments.no_networks,
        has_accounting=arguments.accounting,
        has_cgroups=not arguments.no_cgroups,
        controller_port=ports,
        database_port=ports + 1,
        mariadb_port=ports + 2,
        subnet=0 if arguments.no_networks else _free_subnet(),
        node_port=6818 if not arguments.no_networks else ports + 3,
    )
    if cluster.has_cgroups:
        cgroups.check_unused(cluster.node_names)
    return cluster


def _free_ports(number: int) -> int:
    """Return the first of so many ports in a row that nobody listens on."""
    for first in range(26800, 32000, number):
        with suppress(OSError):
            for port in range(first, first + number):
                with socket.socket() as free:
                    free.bind(("0.0.0.0", port))
            return first
    raise RuntimeError(f"no {number} free ports in a row between 26800 and 32000")


def _free_subnet() -> int:
    """Return a third number of addresses of which no bridge of this machine has the first."""
    for number in range(256):
        try:
            with socket.socket() as own:
                own.bind((f"10.231.{number}.1", 0))
        except OSError:  # not an address of this machine
            return number
    raise RuntimeError("all of 10.231.0.0/16 is in use on this machine; take a cluster down first")


def _check_machine(arguments: argparse.Namespace, folder: Path) -> None:
    """Refuse a machine that lacks something, and a folder that is in use.

    Raises:
        RuntimeError: naming what is missing, and the remedy.
    """
    if os.geteuid() != 0:
        raise RuntimeError("the local cluster must be started as root")
    programs = _PROGRAMS + (_DATABASE_PROGRAMS if arguments.accounting else ())
    missing = [program for program in programs if shutil.which(program) is None]
    missing += [] if _SPANK.exists() else [str(_SPANK)]
    if missing:
        raise RuntimeError(f"not installed: {', '.join(missing)}; run slurm/testing/install.sh")
    if not arguments.no_networks:
        tried = subprocess.run(["unshare", "--net", "true"], capture_output=True, check=False)
        if tried.returncode or shutil.which("ip") is None:
            raise RuntimeError("this machine has no network namespaces; say --no-networks")
    if not arguments.no_cgroups and not cgroups.can_use():
        raise RuntimeError("control groups cannot be written on this machine; say --no-cgroups")
    length = len(bytes(folder / "run" / "mariadb.socket"))
    if length > _SOCKET_PATH_BYTES:
        raise RuntimeError(f"--dir {folder}: too long for the path of a socket; choose a shorter")
    if any(character.isspace() for character in str(folder)):
        raise RuntimeError(f"--dir {folder}: Slurm takes no path with a space in it")
    running = Daemons(folder).alive()
    if running:
        raise RuntimeError(f"{folder}: {', '.join(running)} run already; say down first")


def _up(cluster: Cluster) -> None:
    """Start all daemons, each when the one before answers; nothing is left if one does not."""
    folder = cluster.folder
    if cluster.has_cgroups:
        cgroups.remove(cluster.node_names)  # of a cluster that died
    for name in ("etc", "run", "log", "state", "spool", "dev", "lib", "root"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    for number in range(cluster.gpus):
        device = folder / "dev" / f"gpu{number}"
        if not device.exists():
            os.mknod(device, 0o020666, os.makedev(195, number))
    write_settings(cluster)
    _build_containers(cluster)
    say(f"starting a Slurm cluster of {cluster.nodes} nodes in {folder}")
    daemons = Daemons(folder)
    try:
        _start_munge(cluster, daemons)
        if cluster.has_networks:
            remove_networks(cluster)
            make_networks(cluster)
        if cluster.has_accounting:
            _start_database(cluster, daemons)
        _start_slurm(cluster, daemons)
    except BaseException:
        _down(cluster)
        raise
    say(f'ready; for a shell: eval "$(python3 {sys.argv[0]} env --dir {folder})"')


def _build_containers(cluster: Cluster) -> None:
    """Compile the plugin that gives ``srun --container-image`` a meaning; settings name it."""
    flags = ("-shared", "-fPIC", "-O2", "-Wall", "-Wextra", "-Werror")
    _run(["gcc", *flags, "-o", str(cluster.container_plugin), str(_CONTAINERS)])


def _start_munge(cluster: Cluster, daemons: Daemons) -> None:
    """Start the daemon that signs the messages of all others."""
    run, key = cluster.folder / "run", cluster.folder / "etc" / "munge.key"
    if not key.exists():
        key.touch(mode=0o400)
        key.chmod(0o600)
        key.write_bytes(secrets.token_bytes(128))
        key.chmod(0o400)
    daemons.start(
        "munged",
        [
            *("munged", "--foreground", "--force", f"--key-file={key}"),
            *(f"--socket={run}/munge.socket", f"--pid-file={run}/munged.pid"),
            *(f"--log-file={cluster.folder}/log/munged.log", f"--seed-file={run}/munged.seed"),
        ],
    )
    wait_for(
        "munge signs",
        lambda: _succeeds(["munge", "-n", "-S", f"{run}/munge.socket"]),
        seconds=30,
        log=cluster.folder / "log" / "munged.out",
    )


def _start_database(cluster: Cluster, daemons: Daemons) -> None:
    """Start MariaDB and slurmdbd, and register the cluster with an account of root."""
    folder, data = cluster.folder, cluster.folder / "database"
    client = ["mariadb", "--no-defaults", f"--socket={folder}/run/mariadb.socket", "--user=root"]
    if not data.exists():
        say("  making a database ...")
        _run(
            [
                *("mariadb-install-db", "--no-defaults", f"--datadir={data}", "--user=root"),
                *("--auth-root-authentication-method=normal", "--skip-test-db"),
            ]
        )
    daemons.start(
        "mariadbd",
        [
            *("mariadbd", "--no-defaults", f"--datadir={data}", "--user=root"),
            *(f"--socket={folder}/run/mariadb.socket", f"--port={cluster.mariadb_port}"),
            *("--bind-address=127.0.0.1", f"--pid-file={folder}/run/mariadbd.pid"),
        ],
    )
    wait_for(
        "MariaDB answers",
        lambda: _succeeds([*client, "--execute=select 1"]),
        seconds=60,
        log=folder / "log" / "mariadbd.out",
    )
    _run(
        [
            *client,
            "--execute=create database if not exists slurm; "
            "create user if not exists slurm@'127.0.0.1' identified by 'slurm'; "
            "create user if not exists slurm@'localhost' identified by 'slurm'; "
            "grant all on slurm.* to slurm@'127.0.0.1'; "
            "grant all on slurm.* to slurm@'localhost';",
        ]
    )
    daemons.start("slurmdbd", ["slurmdbd", "-D"], environment=_environment(cluster))
    wait_for(
        "slurmdbd answers",
        lambda: _succeeds(["sacctmgr", "--noheader", "show", "cluster"], cluster),
        seconds=60,
        log=folder / "log" / "slurmdbd.log",
    )
    for words in ("cluster local", "account ci", "user root account=ci"):
        _run(["sacctmgr", "--immediate", "add", *words.split()], cluster)


def _start_slurm(cluster: Cluster, daemons: Daemons) -> None:
    """Start the controller and the nodes, and wait until all are idle."""
    log = cluster.folder / "log" / "slurmctld.log"
    daemons.start("slurmctld", ["slurmctld", "-D", "-i"], environment=_environment(cluster))
    wait_for(
        "slurmctld answers", lambda: _succeeds(["scontrol", "ping"], cluster), seconds=60, log=log
    )
    for node in cluster.node_names:
        _start_node(cluster, daemons, node)
    wait_for(
        f"{cluster.nodes} nodes are idle",
        lambda: _idle_nodes(cluster) == cluster.nodes,
        seconds=90,
        log=log,
    )


def _start_node(cluster: Cluster, daemons: Daemons, node: str) -> None:
    """Start the daemon of a node."""
    command = ["slurmd", "-D", "-N", node]
    if cluster.has_networks:
        command = inside(cluster, node, command)
    daemons.start(f"slurmd-{node}", command, environment=_environment(cluster))


def _known_node(cluster: Cluster, node: str | None) -> str:
    """Return the node that was named.

    Raises:
        RuntimeError: if there is none of that name.
    """
    if node not in cluster.node_names:
        raise RuntimeError(f"--node {node}: expected one of {', '.join(cluster.node_names)}")
    return node


def _fail(cluster: Cluster, node: str, *, daemon_only: bool) -> None:
    """Kill a node's slurmd and, as if its power went, all that runs in its network.

    Without networks of their own the nodes' jobs cannot be told apart: they go on as orphans.
    """
    Daemons(cluster.folder).kill(f"slurmd-{node}")
    if cluster.has_networks and not daemon_only:
        kill_network(cluster, node)
    say(f"{node} has failed; Slurm marks it DOWN when it has not answered for SlurmdTimeout")


def _mend(cluster: Cluster, node: str) -> None:
    """Start a failed node's slurmd again, and wait until Slurm uses the node."""
    _start_node(cluster, Daemons(cluster.folder), node)
    state = ["sinfo", "--noheader", "--partition=batch", f"--nodes={node}", "-o", "%t"]
    wait_for(
        f"{node} is back",
        lambda: _output(state, cluster) in ("idle", "mix", "alloc"),
        seconds=90,
        log=cluster.folder / "log" / "slurmctld.log",
    )


def _down(cluster: Cluster) -> None:
    """Cancel all jobs, then end the daemons from the last to the first."""
    daemons = Daemons(cluster.folder)
    if "slurmctld" in daemons.alive() and _output(["squeue", "--noheader"], cluster):
        # What a job has started outlives the slurmd that started it.
        for state in ("PENDING", "RUNNING", "SUSPENDED"):
            _succeeds(["scancel", f"--state={state}"], cluster)
        with suppress(RuntimeError):
            wait_for(
                "jobs end",
                lambda: not _output(["squeue", "--noheader"], cluster),
                seconds=60,
                log=cluster.folder / "log" / "slurmctld.log",
            )
    for prefix in ("slurmd-", "slurmctld", "slurmdbd", "mariadbd", "munged"):
        daemons.stop(prefix)
    if cluster.has_networks:
        remove_networks(cluster)
    if cluster.has_cgroups:
        cgroups.remove(cluster.node_names)
    say(f"the cluster of {cluster.folder} is down")


def _status(cluster: Cluster) -> int:
    """Show processes and nodes; exit code 1 if not all nodes are up."""
    alive = Daemons(cluster.folder).alive()
    say(f"{cluster.folder}: {', '.join(alive) or 'nothing'} running")
    if "slurmctld" not in alive:
        return 1
    sys.stdout.write(_output(["sinfo", "--Node", "--long"], cluster) + "\n")
    return 0


def _idle_nodes(cluster: Cluster) -> int:
    """Return how many nodes are idle."""
    states = _output(["sinfo", "--noheader", "--Node", "--partition=batch", "-o", "%t"], cluster)
    return states.split().count("idle")


def _slurm_conf(cluster: Cluster) -> Path:
    return cluster.folder / "etc" / "slurm.conf"


def _environment(cluster: Cluster) -> dict[str, str]:
    return {"SLURM_CONF": str(_slurm_conf(cluster))}


def _output(command: list[str], cluster: Cluster) -> str:
    """Return what a command of Slurm prints; nothing if it fails."""
    done = subprocess.run(
        command,
        env={**os.environ, **_environment(cluster)},
        capture_output=True,
        text=True,
        check=False,
    )
    return done.stdout.strip() if done.returncode == 0 else ""


def _succeeds(command: list[str], cluster: Cluster | None = None) -> bool:
    """Return whether a command ends well."""
    environment = {**os.environ, **(_environment(cluster) if cluster else {})}
    done = subprocess.run(command, env=environment, capture_output=True, check=False)
    return done.returncode == 0


def _run(command: list[str], cluster: Cluster | None = None) -> None:
    """Run a command that must succeed.

    Raises:
        RuntimeError: with what it said.
    """
    environment = {**os.environ, **(_environment(cluster) if cluster else {})}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode and "Nothing new added" not in done.stdout:
        said = (done.stderr + done.stdout).strip()
        raise RuntimeError(f"{shlex.join(command)}: exit code {done.returncode}: {said}")


if __name__ == "__main__":
    sys.exit(main())
