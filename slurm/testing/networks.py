"""A network namespace for each node, connected by a bridge; nothing leaves the machine."""

import os
import signal
import subprocess
import time
from contextlib import suppress
from pathlib import Path

from settings import Cluster

_NAMESPACES = Path("/run/netns")
_KILL_ATTEMPTS, _KILL_SECONDS = 100, 0.1


def make_networks(cluster: Cluster) -> None:
    """Make the bridge, and for each node a namespace with an address."""
    bridge = cluster.bridge
    _ip("link", "add", bridge, "type", "bridge")
    _ip("address", "add", f"{cluster.controller_address}/24", "dev", bridge)
    _ip("link", "set", bridge, "up")
    for number, node in enumerate(cluster.node_names, start=1):
        network, outside = cluster.network_of(node), f"{bridge}-{number}"
        _ip("netns", "add", network)
        _ip("link", "add", outside, "type", "veth", "peer", "name", "eth0", "netns", network)
        _ip("link", "set", outside, "master", bridge, "up")
        _ip("-n", network, "address", "add", f"{cluster.node_address(number)}/24", "dev", "eth0")
        _ip("-n", network, "link", "set", "lo", "up")
        _ip("-n", network, "link", "set", "eth0", "up")


def remove_networks(cluster: Cluster) -> None:
    """Remove what ``make_networks`` made, whatever of it is there."""
    for number, node in enumerate(cluster.node_names, start=1):
        if (_NAMESPACES / cluster.network_of(node)).exists():
            _ip("netns", "delete", cluster.network_of(node))
        with suppress(RuntimeError):  # it may be going with the namespace at this moment
            _ip("link", "delete", f"{cluster.bridge}-{number}")
    if Path("/sys/class/net", cluster.bridge).exists():
        _ip("link", "delete", cluster.bridge)


def kill_network(cluster: Cluster, node: str) -> None:
    """Kill all processes of a node's network until there are none; some may be starting others."""
    command = ["ip", "netns", "pids", cluster.network_of(node)]
    for _ in range(_KILL_ATTEMPTS):
        found = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
        if not found:
            return
        for pid in found:
            with suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)
        time.sleep(_KILL_SECONDS)
    raise RuntimeError(f"{node}: processes {', '.join(found)} do not die")


def inside(cluster: Cluster, node: str, command: list[str]) -> list[str]:
    """Return a command that runs ``command`` with a node's network, host name and host table.

    ``ip netns exec`` would mount /sys anew and hide the control groups.
    """
    script = 'hostname "$1" && mount --bind "$2" /etc/hosts && shift 2 && exec "$@"'
    return [
        *("nsenter", f"--net={_NAMESPACES / cluster.network_of(node)}"),
        *("unshare", "--uts", "--mount", "sh", "-c", script, "sh", node),
        *(str(cluster.folder / "etc" / "hosts"), *command),
    ]


def _ip(*arguments: str) -> None:
    """Run ``ip``.

    Raises:
        RuntimeError: with what it said.
    """
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"ip {' '.join(arguments)}: {done.stderr.strip()}")
