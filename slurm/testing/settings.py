"""What the local cluster is made of, and the configuration files that its daemons read."""

import json
import socket
import zlib
from dataclasses import asdict, dataclass
from pathlib import Path

_SLURM = """\
ClusterName=local
SlurmctldHost={controller}({controller_address})
SlurmctldPort={controller_port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
# The second number is also how long a requeued job waits before it may start again.
AuthInfo=socket={folder}/run/munge.socket,cred_expire=10
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/run/slurmctld.pid
SlurmdPidFile={folder}/run/slurmd-%n.pid
SlurmctldLogFile={folder}/log/slurmctld.log
SlurmdLogFile={folder}/log/slurmd-%n.log
MpiDefault=none
SelectType=select/cons_tres
# Nodes claim more than this machine has; without this they would be refused.
SlurmdParameters=config_overrides
ReturnToService=2
# A node that does not answer for so long is DOWN and its jobs are requeued; by default 300.
SlurmdTimeout=10
KillWait=5
MinJobAge=3600
# Heterogeneous jobs are started by the backfill scheduler alone, by default every 30 s.
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=1,sched_interval=2,batch_sched_delay=0
# A job that is preempted gets the signal that it asked for with --signal, then goes back.
SlurmctldParameters=preempt_send_user_signal
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobRequeue=1
{tracking}
{accounting}
GresTypes=gpu
NodeName={nodes} {node_addresses} CPUs={cpus} RealMemory={memory_mb} {gres} State=UNKNOWN
PartitionName=batch Nodes=ALL Default=YES PriorityTier=10 PreemptMode=OFF MaxTime=INFINITE State=UP
PartitionName=preemptible Nodes=ALL PriorityTier=1 GraceTime=60 MaxTime=INFINITE State=UP
"""

_PLUGINS = """\
required {container_plugin} root={folder}/root log={folder}/log/containers.log
"""

_WITH_CGROUPS = """\
ProctrackType=proctrack/cgroup
TaskPlugin=task/cgroup
JobAcctGatherType=jobacct_gather/cgroup
SelectTypeParameters=CR_Core_Memory"""

_WITHOUT_CGROUPS = """\
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/linux
SelectTypeParameters=CR_Core"""

_CGROUP = """\
CgroupAutomount=no
ConstrainRAMSpace=yes
ConstrainCores=no
"""

# Clients of slurmdbd take munge's socket from the password and not from AuthInfo.
_WITH_ACCOUNTING = """\
AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost={controller_address}
AccountingStoragePort={database_port}
AccountingStoragePass={folder}/run/munge.socket
AccountingStorageEnforce=associations,limits,qos
AccountingStorageTRES=gres/gpu"""

_WITHOUT_ACCOUNTING = """\
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/filetxt
JobCompLoc={folder}/log/jobs.txt"""

_SLURMDBD = """\
AuthType=auth/munge
AuthInfo=socket={folder}/run/munge.socket
DbdHost={controller}
DbdAddr={controller_address}
DbdPort={database_port}
SlurmUser=root
LogFile={folder}/log/slurmdbd.log
PidFile={folder}/run/slurmdbd.pid
StorageType=accounting_storage/mysql
StorageHost=127.0.0.1
StoragePort={mariadb_port}
StorageUser=slurm
StoragePass=slurm
StorageLoc=slurm
"""


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """One local cluster, as it was asked for."""

    folder: Path
    """All state: configuration, key, logs, spools, process ids."""

    nodes: int
    """Compute nodes ``n1`` to ``nN``, one slurmd each."""

    cpus: int
    """CPUs that each node claims."""

    memory_mb: int
    """Memory that each node claims; a limit for jobs with ``has_cgroups``."""

    gpus: int
    """GPUs of each node: device files that no driver answers."""

    has_networks: bool
    """Each node has a network namespace with a host name and an address of its own."""

    has_accounting: bool
    """slurmdbd with a private MariaDB: sacct, accounts, QOS."""

    has_cgroups: bool
    """Signals, memory limits and clean-up as on real clusters."""

    controller_port: int
    """slurmctld's."""

    node_port: int
    """slurmd's; without networks that of the first node, the others follow."""

    database_port: int
    """slurmdbd's."""

    mariadb_port: int
    """MariaDB's."""

    subnet: int
    """Third number of all addresses, of 256; no other cluster's on this machine."""

    @property
    def mark(self) -> str:
        """Four hexadecimal digits of the folder's path, so that clusters do not meet."""
        return f"{zlib.crc32(str(self.folder).encode()) & 0xFFFF:04x}"

    @property
    def container_plugin(self) -> Path:
        """What stands in for Pyxis."""
        return self.folder / "lib" / "pyxis_stand_in.so"

    @property
    def bridge(self) -> str:
        """Network interface that connects the nodes with this machine."""
        return f"slurm{self.mark}"

    @property
    def node_names(self) -> list[str]:
        """Names of the nodes."""
        return [f"n{number}" for number in range(1, self.nodes + 1)]

    @property
    def controller_address(self) -> str:
        """Where slurmctld and slurmdbd listen."""
        return self._address(1) if self.has_networks else "127.0.0.1"

    def node_address(self, number: int) -> str:
        """Return the address of node ``number``, from 1."""
        return self._address(10 + number) if self.has_networks else "127.0.0.1"

    def network_of(self, node: str) -> str:
        """Return the name of a node's network namespace."""
        return f"{self.bridge}-{node}"

    def _address(self, last: int) -> str:
        return f"10.231.{self.subnet}.{last}"


def write_settings(cluster: Cluster) -> None:
    """Write the configuration files of all daemons."""
    controller = socket.gethostname()
    values = {
        "folder": cluster.folder,
        "controller": controller,
        "controller_address": cluster.controller_address,
        "controller_port": cluster.controller_port,
        "database_port": cluster.database_port,
        "mariadb_port": cluster.mariadb_port,
    }
    accounting = _WITH_ACCOUNTING if cluster.has_accounting else _WITHOUT_ACCOUNTING
    etc = cluster.folder / "etc"
    (etc / "slurm.conf").write_text(
        _SLURM.format(
            **values,
            tracking=_WITH_CGROUPS if cluster.has_cgroups else _WITHOUT_CGROUPS,
            accounting=accounting.format(**values),
            nodes=f"n[1-{cluster.nodes}]",
            node_addresses=_node_addresses(cluster, controller),
            cpus=cluster.cpus,
            memory_mb=cluster.memory_mb,
            gres=f"Gres=gpu:fake:{cluster.gpus}" if cluster.gpus else "",
        )
    )
    (etc / "plugstack.conf").write_text(
        _PLUGINS.format(container_plugin=cluster.container_plugin, folder=cluster.folder)
    )
    devices = cluster.folder / "dev" / f"gpu[0-{cluster.gpus - 1}]"
    gres = f"NodeName=n[1-{cluster.nodes}] Name=gpu Type=fake File={devices}\n"
    (etc / "gres.conf").write_text(gres if cluster.gpus else "")
    if cluster.has_cgroups:
        (etc / "cgroup.conf").write_text(_CGROUP)
    if cluster.has_accounting:
        slurmdbd = etc / "slurmdbd.conf"
        slurmdbd.write_text(_SLURMDBD.format(**values))
        slurmdbd.chmod(0o600)  # refused otherwise
    hosts = ["127.0.0.1 localhost", f"{cluster.controller_address} {controller}"]
    hosts += [
        f"{cluster.node_address(number)} {name}"
        for number, name in enumerate(cluster.node_names, start=1)
    ]
    (etc / "hosts").write_text("\n".join(hosts) + "\n")
    (cluster.folder / "cluster.json").write_text(
        json.dumps({**asdict(cluster), "folder": str(cluster.folder)}, indent=2) + "\n"
    )


def read_cluster(folder: Path) -> Cluster | None:
    """Return what was started in ``folder``; None if nothing was."""
    file = folder / "cluster.json"
    if not file.exists():
        return None
    values = json.loads(file.read_text())
    return Cluster(**{**values, "folder": Path(values["folder"])})


def _node_addresses(cluster: Cluster, controller: str) -> str:
    """Return how slurmctld reaches the nodes."""
    if cluster.has_networks:
        first, last = cluster.node_address(1), 10 + cluster.nodes
        address = f"{first.rpartition('.')[0]}.[11-{last}]"
        return f"NodeAddr={address} Port={cluster.node_port}"
    ports = f"{cluster.node_port}-{cluster.node_port + cluster.nodes - 1}"
    return f"NodeHostname={controller} NodeAddr=127.0.0.1 Port=[{ports}]"
