"""`launch/torchrun.sh` on two hosts with addresses of their own, and what becomes of a run when the network fails."""

import os
import re
import shutil
import signal
import subprocess
import time

import pytest

from tests.cluster.cluster import Machines, can_isolate, power_off, ranks_of, wait_for
from tests.cluster.conftest import Run
from tests.cluster.test_slurm import SMALL
from tests.conftest import ACCURATE

NODES = ("n1", "n2")
pytestmark = [pytest.mark.cluster, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def machines(tmp_path_factory):
    if not can_isolate():
        pytest.skip("needs namespaces: root, and a system that allows them")
    machines = Machines(tmp_path_factory.mktemp("machines"))
    yield machines
    machines.close()


@pytest.fixture(scope="module")
def ssh(machines):
    """A real sshd on each host."""
    sshd = shutil.which("sshd") or "/usr/sbin/sshd"
    if not os.path.exists(sshd):
        pytest.skip("no sshd here; as root: apt-get install openssh-server (make test-cluster does)")
    folder = machines.folder
    for name in ("host", "user"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / name], check=True)
    (folder / "sshd.conf").write_text(
        f"HostKey {folder}/host\nAuthorizedKeysFile {folder}/user.pub\nStrictModes no\nPermitRootLogin yes\n"
        f"PidFile none\n"
    )
    (folder / "ssh.conf").write_text(
        f"IdentityFile {folder}/user\nUserKnownHostsFile /dev/null\nStrictHostKeyChecking no\nLogLevel ERROR\n"
    )
    prepare = f"mkdir -p /run/sshd; mount --bind '{folder}/ssh.conf' /etc/ssh/ssh_config"
    subprocess.run([*machines.prefix, "bash", "-ec", prepare], check=True)
    for node in NODES:
        machines.start(node, sshd, "-D", "-e", "-f", folder / "sshd.conf", stderr=subprocess.DEVNULL)
    reached = [*machines.prefix, "ssh", "n2", "hostname"]
    wait_for(lambda: subprocess.run(reached, capture_output=True, text=True).stdout == "n2\n", 30, "sshd")


@pytest.fixture
def run(tree, tmp_path):
    return Run(None, tree, tmp_path)


@pytest.fixture
def launch(run, machines):
    """Starts launch/torchrun.sh on a node (None: on a third machine); what still runs at the end of the test goes."""
    started = []

    def start(node, *words):
        with open(run.output, "a") as output:
            words = (f"{run.tree}/launch/torchrun.sh", *words, f"run.dir={run.path}")
            started.append(machines.start(node, *words, stdout=output, stderr=output))
        return started[-1]

    yield start
    for process in started:
        if process.poll() is None:
            power_off(process)


def on_each_host(launch, *words):
    return [launch(node, "--nodes", "2", "--head", "n1", *words) for node in NODES]


def test_two_hosts_over_ssh_reach_97_percent(run, launch, ssh):
    process = launch(None, "--hosts", "n1,n2", *ACCURATE, "data.workers=1")
    assert process.wait(600) == 0, run.said()
    assert run.metric("val/top1") >= 0.97
    assert re.search(r"^n1: .*all is fine, in ", run.said(), re.M)
    assert re.search(r"^n1: .*finished after step 674 of 674", run.said(), re.M)
    devices = (run.path / "manifest.json").read_text()
    assert '"n1: CPU"' in devices
    assert '"n2: CPU"' in devices


def test_an_interrupt_saves_on_all_hosts(run, launch, ssh):
    process = launch(None, "--hosts", "n1,n2", *SMALL, "run.steps=100000")
    run.wait_for_step(20)
    starter = next(p for p in ranks_of(run, "launch/torchrun.sh") if "--hosts" in p.cmdline())
    starter.send_signal(signal.SIGINT)
    assert process.wait(90) == 0, run.said()
    assert run.ended() == {"status": "saved: start me again", "step": run.last_step(), "reason": "STOP file"}


def test_a_cut_link_ends_both_sides_in_time_and_the_run_resumes(run, launch, machines):
    words = (*SMALL, "engine.timeout_seconds=15", "checkpoint.every_steps=25")
    processes = on_each_host(launch, *words)
    try:
        run.wait_for_step(60)
        machines.link("n2", "down")
        cut = time.monotonic()
        codes = [process.wait(150) for process in processes]
        took = time.monotonic() - cut
    finally:
        machines.link("n2", "up")
    assert 0 not in codes
    assert took < 120, f"{took} s"
    assert run.ended()["status"] == "failed"
    for rank in (0, 1):
        assert re.search(rf"rank {rank}: no answer from another rank within engine.timeout_seconds=15", run.said())
    for process in on_each_host(launch, *words):
        assert process.wait(300) == 0, run.said()
    assert "resuming from" in run.said()
    assert run.ended()["status"] == "finished"
    assert len(run.losses()) == 200
    assert len(run.samples()) == 200 * 64


@pytest.mark.parametrize("restarts", ["0", "3"])
def test_two_hosts_listen_on_one_address_each(run, launch, machines, restarts):
    """A fixed set of nodes, and an elastic one: nothing listens on all addresses."""
    processes = on_each_host(launch, "--max-restarts", restarts, *SMALL, "run.steps=100000")
    run.wait_for_step(5)
    for node, address in zip(NODES, ("10.77.0.11", "10.77.0.12"), strict=True):
        command = [*machines.prefix, "ip", "netns", "exec", node, "ss", "-ltnH"]
        lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
        found = {line.split()[3].rpartition(":")[::2] for line in lines} - {("0.0.0.0", "22"), ("[::]", "22")}  # sshd
        assert {where for where, _ in found} == {address}, lines
        assert ((address, "29400") in found) == (node == "n1"), lines
    (run.path / "STOP").touch()
    assert [process.wait(120) for process in processes] == [0, 0], run.said()
    assert (run.path / "logs/.rendezvous-secret").stat().st_mode & 0o077 == 0
    assert not list((run.path / "logs").glob(".rendezvous-secret.*"))


def test_the_ranks_start_again_after_a_killed_one(run, launch):
    processes = on_each_host(launch, "--max-restarts", "3", *SMALL, "checkpoint.every_steps=25")
    run.wait_for_step(60)
    ranks_of(run)[0].kill()
    assert [process.wait(300) for process in processes] == [0, 0], run.said()
    assert run.said().count("resuming from") == 1
    assert len(run.samples()) == 200 * 64


def test_local_trains_on_all_ranks_of_this_machine(run):
    command = [f"{run.tree}/launch/local.sh", "--ranks", "2", *SMALL, f"run.dir={run.path}"]
    for launcher, steps in (("torchrun", 8), ("accelerate", 12)):
        run.site(LAUNCHER=launcher)
        done = subprocess.run([*command, f"run.steps={steps}"], capture_output=True, text=True, timeout=200)
        assert done.returncode == 0, done.stdout + done.stderr
        assert "all is fine, in" in done.stdout
        assert f"finished after step {steps} of {steps}" in done.stdout
        assert run.last_step() == steps


def test_a_container_is_what_the_ranks_of_a_machine_are_put_behind(run):
    """A host name of its own stands for a container, which the sites have."""
    if not can_isolate():
        pytest.skip("another host name needs root")
    run.site("""CONTAINER=(unshare --uts bash -c 'hostname "$0"; exec "$@"' boxed)""", "PREFLIGHT=no")
    command = [f"{run.tree}/launch/local.sh", *SMALL, "run.steps=2", f"run.dir={run.path}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "all is fine" not in done.stdout
    assert '"boxed: CPU"' in (run.path / "manifest.json").read_text()
