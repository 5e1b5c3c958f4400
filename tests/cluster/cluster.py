"""A Slurm cluster on this machine: a real slurmctld, and slurmd nodes with networks and host names of their own.

As root, and where the system allows it, everything lives in namespaces (`isolated`): each node has its own address,
host name, processes and /dev/shm, can be powered off and loses its network when told to. Elsewhere all slurmd share
the host. The namespaces end with this process, however it ends, and with them whatever was started or mounted.
"""

import contextlib
import os
import shutil
import socket
import subprocess
import time
from pathlib import Path

import psutil

NODES = ("n1", "n2", "n3")
SPACES = ("--mount", "--uts", "--ipc", "--pid", "--fork", "--kill-child", "--mount-proc")
FREEZER = Path("/sys/fs/cgroup/freezer")  # with it Slurm finds processes whose parents are gone

SLURM_CONF = """
ClusterName=test
SlurmctldHost={head}({head_address})
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/none
CredType=cred/none
AuthInfo=cred_expire=5
SlurmctldPort=17800
SlurmdPort=17801
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType={proctrack}
TaskPlugin=task/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
GresTypes=gpu
SchedulerParameters=sched_interval=1,sched_min_interval=200000,bf_interval=1,batch_sched_delay=0
SlurmdParameters=config_overrides
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
ReturnToService=2
SlurmdTimeout=15
KillWait=20
OverTimeLimit=2
{nodes}
PartitionName=main Nodes={names} Default=YES PriorityTier=10 GraceTime=60
PartitionName=high Nodes={names} PriorityTier=100 PreemptMode=off
"""


def can_isolate() -> bool:
    probe = ["unshare", "--net", *SPACES, "sh", "-c", "mount -t tmpfs tmpfs /run && ip link add br0 type bridge"]
    return os.geteuid() == 0 and subprocess.run(probe, capture_output=True).returncode == 0


class Machines:
    """Hosts n1, n2, n3 with networks of their own (10.77.0.11 and on), and another, "ctl", that joins them.

    `folder`/full is a file system of 2 MB that all of them share.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        addresses = [f"10.77.0.{11 + number} {name}" for number, name in enumerate(NODES)]
        self.hosts = folder / "hosts"
        self.hosts.write_text("\n".join(["127.0.0.1 localhost", "10.77.0.1 ctl", *addresses, ""]))
        # The first process of the space waits for the end of its standard input, which is ours.
        outer = ["unshare", "--net", *SPACES, "bash", "-c", "read -r _"]
        self.outer = subprocess.Popen(outer, stdin=subprocess.PIPE, text=True)
        self.started: list[subprocess.Popen] = []
        wait_for(lambda: psutil.Process(self.outer.pid).children(), 30, "namespaces")
        inner = psutil.Process(self.outer.pid).children()[0]
        wait_for(lambda: inner.name() == "bash", 30, "namespaces")
        self.prefix = ["nsenter", "-t", str(inner.pid), "-m", "-n", "-u", "-i", "-p"]
        lines = [
            "mount -t tmpfs tmpfs /run; hostname ctl; ip link set lo up",
            f"mount --bind '{self.hosts}' /etc/hosts",
            f"mkdir '{folder}/full'; mount -t tmpfs -o size=2m tmpfs '{folder}/full'",
            "ip link add br0 type bridge; ip addr add 10.77.0.1/24 dev br0; ip link set br0 up",
        ]
        for number, name in enumerate(NODES):
            lines += [
                f"ip netns add {name}; ip link add v{name} type veth peer name eth0 netns {name}",
                f"ip link set v{name} master br0 up; ip -n {name} link set lo up",
                f"ip -n {name} addr add 10.77.0.{11 + number}/24 dev eth0; ip -n {name} link set eth0 up",
            ]
        subprocess.run([*self.prefix, "bash", "-ec", "\n".join(lines)], check=True)

    def on(self, node: str) -> list[str]:
        """What to put before a command that runs on a node: in its network, as a machine of its own."""
        mine = f'hostname {node}; mount -t tmpfs tmpfs /dev/shm; "$@" & wait $!'
        space = ["nsenter", f"--net=/run/netns/{node}", "unshare", *SPACES]
        return [*self.prefix, *space, "bash", "-c", mine, "node"]

    def start(self, node: str | None, *command, **options) -> subprocess.Popen:
        """Starts a command on a node, or on "ctl"."""
        where = self.on(node) if node else self.prefix
        process = subprocess.Popen([*where, *command], stdin=subprocess.DEVNULL, **options)
        self.started.append(process)
        return process

    def inside(self, process: subprocess.Popen, *command: str) -> None:
        """Runs a command as root of the node on which `process` was started, with its mounts and its network."""
        below = psutil.Process(process.pid).children(recursive=True)
        pid = next(child.pid for child in below if child.name() not in ("unshare", "nsenter", "setpriv"))
        subprocess.run(["nsenter", "-t", str(pid), "-m", "-n", "-u", *command], check=True)

    def link(self, node: str, state: str) -> None:
        subprocess.run([*self.prefix, "ip", "link", "set", f"v{node}", state], check=True)

    def close(self) -> None:
        assert self.outer.stdin is not None
        self.outer.stdin.close()
        for process in [self.outer, *self.started]:
            process.wait(30)


def power_off(process: subprocess.Popen) -> None:
    """Ends everything that runs on a node, as pulling its plug does. Returns when all of it is gone."""
    children = psutil.Process(process.pid).children(recursive=True)
    for child in children:
        with contextlib.suppress(psutil.NoSuchProcess):  # those below one go with it
            if child.name() == "unshare":
                child.kill()
    process.wait(30)
    assert not (left := psutil.wait_procs(children, 30)[1]), left


class Cluster:
    def __init__(self, folder: Path):
        self.folder = folder
        self.isolated = can_isolate()
        self.machines = Machines(folder) if self.isolated else None
        self.prefix = self.machines.prefix if self.machines else []
        host = socket.gethostname().split(".")[0]
        nodes = [
            f"NodeName={name} CPUs=4 CoresPerSocket=4 RealMemory=8000 Gres=gpu:2 State=UNKNOWN"
            + (
                f" NodeAddr=10.77.0.{11 + number}"
                if self.isolated
                else f" NodeHostname={host} NodeAddr=127.0.0.1 Port={17801 + number}"
            )
            for number, name in enumerate(NODES)
        ]
        self.cgroups = self.isolated and FREEZER.exists()
        self.conf = folder / "slurm.conf"
        self.conf.write_text(
            SLURM_CONF.format(
                head="ctl" if self.isolated else host,
                head_address="10.77.0.1" if self.isolated else "127.0.0.1",
                user=psutil.Process().username(),
                folder=folder,
                proctrack="proctrack/cgroup" if self.cgroups else "proctrack/linuxproc",
                nodes="\n".join(nodes),
                names=",".join(NODES),
            )
        )
        (folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\nCgroupMountpoint=/sys/fs/cgroup\n")
        gpus = "".join(f"NodeName={name} Name=gpu File=/dev/tty[0-1]\n" for name in NODES)  # any two devices will do
        (folder / "gres.conf").write_text(gpus)
        (folder / "state").mkdir()
        self.slurmd: dict[str, subprocess.Popen] = {}
        self.slurmctld = self.daemon([*self.prefix, "slurmctld", "-D", "-f", str(self.conf)])
        for node in NODES:
            self.power_on(node)
        self.wait_until_up()

    def wait_until_up(self) -> None:
        """Until every node has come: idle, or at work again, as a job that has waited for it starts at once."""
        up = {"idle", "mixed", "allocated"}

        def all_up() -> bool:
            states = self.run("sinfo", "-h", "-N", "-o", "%T").split()  # a line for each node and partition
            return len(states) == 2 * len(NODES) and set(states) <= up

        wait_for(all_up, 60, "nodes that are all up")

    def daemon(self, command: list[str]) -> subprocess.Popen:
        log = open(self.folder / "daemons.log", "a")  # noqa: SIM115
        with log:
            return subprocess.Popen(
                ["setpriv", "--pdeathsig", "KILL", *command], stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )

    def power_on(self, node: str) -> None:
        where = self.machines.on(node) if self.machines else []
        if self.machines:
            self.machines.link(node, "up")
        self.slurmd[node] = self.daemon([*where, "slurmd", "-D", "-N", node, "-f", str(self.conf)])

    def power_off(self, node: str) -> None:
        assert self.machines is not None
        self.machines.link(node, "down")
        power_off(self.slurmd[node])

    def run(self, *words: str, cwd: str | Path = "/", environ: dict[str, str] | None = None) -> str:
        """Runs one of Slurm's commands and returns what it prints."""
        variables = [f"SLURM_CONF={self.conf}", *(f"{k}={v}" for k, v in (environ or {}).items())]
        command = [*self.prefix, "env", "-C", str(cwd), *variables, *words]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, f"{words}: {done.stdout}{done.stderr}"
        return done.stdout + done.stderr

    def job(self, number: str) -> dict[str, str]:
        """What Slurm knows of a job."""
        words = self.run("scontrol", "-o", "show", "job", number).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def state(self, number: str) -> str:
        return self.job(number)["JobState"]

    def close(self) -> None:
        """Ends all jobs and daemons, and sees to it that nothing stays but the folder."""
        try:
            self.run("scancel", "--user", psutil.Process().username())
            self.run("scancel", "--user", psutil.Process().username(), "--signal=KILL")
            wait_for(lambda: not self.run("squeue", "-h"), 60, "end of all jobs")
        finally:
            daemons = [*self.slurmd.values(), self.slurmctld]
            for process in daemons:
                process.terminate()
            if self.machines:
                self.machines.close()
            for process in daemons:
                process.wait(30)
            if self.cgroups:
                for path, _, _ in os.walk(FREEZER, topdown=False):
                    if "slurm" in path:
                        os.rmdir(path)
        assert not (
            left := [process.info for process in psutil.process_iter(["pid", "cmdline"]) if self.owns(process)]
        ), left
        assert str(self.folder) not in Path("/proc/self/mounts").read_text()
        assert not {f"v{name}" for name in NODES} & set(psutil.net_if_addrs())

    def owns(self, process: psutil.Process) -> bool:
        with contextlib.suppress(psutil.Error):
            words = " ".join(process.cmdline())
            return str(self.folder) in words or process.environ().get("SLURM_CONF") == str(self.conf)
        return False


def wait_for(true, seconds: float, what: str):
    """Returns what `true` returns, once that is true."""
    end = time.monotonic() + seconds
    while not (found := true()):
        assert time.monotonic() < end, f"no {what} after {seconds} s"
        time.sleep(0.2)
    return found


def ranks_of(run, script: str = "pipeline/train.py") -> list[psutil.Process]:
    """The processes of a run that run a script, without those that they have started."""
    found = {}
    for process in psutil.process_iter(["cmdline", "ppid"]):  # attributes that stay when a process ends
        words = process.info["cmdline"] or []
        if f"run.dir={run.path}" in words and any(word.endswith(script) for word in words[:3]):
            found[process.pid] = process
    return [process for process in found.values() if process.info["ppid"] not in found]


def copy_tree(root: Path, tree: Path) -> None:
    for name in ("configs", "launch", "pipeline", "vit"):
        shutil.copytree(root / name, tree / name, ignore=shutil.ignore_patterns("__pycache__", "site.env"))
