"""`sbatch launch/pretrain.slurm` on a real Slurm cluster: from start to accuracy, and through all that ends a job."""

import contextlib
import json
import re
import subprocess
import sys
import time

import pytest

from tests.cluster.cluster import ranks_of, wait_for
from tests.cluster.conftest import Run
from tests.conftest import ACCURATE, data, free_port

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(900)]  # on machines that have other things to do

SMALL = ("run.epochs=null", "run.steps=200", "model.depth=1", "data.workers=1", "run.log_every_steps=1",
         "data.log_samples=true", "run.evaluate_every_steps=null", "checkpoint.every_steps=1000",
         "schedule.warmup_steps=5", "engine.timeout_seconds=60")  # fmt: skip


@pytest.fixture(scope="module")
def whole(cluster, tree, tmp_path_factory):
    """An uninterrupted run on two nodes with a rank each: what the others must come to."""
    run = Run(cluster, tree, tmp_path_factory.mktemp("whole"))
    job = run.submit(words=SMALL)
    run.wait(job, "COMPLETED")
    assert len(run.losses()) == 200
    assert len(run.samples()) == 200 * 64
    return run


def assert_nothing_lost(run, whole, within=1e-6):
    """Every step once, with the batches and, to rounding where ranks or strategy differ, the losses of `whole`."""
    assert run.ended()["status"] == "finished"
    assert run.samples() == whole.samples()
    assert run.losses() == pytest.approx(whole.losses(), abs=within)


def test_two_nodes_with_two_ranks_each_reach_97_percent(run):
    """From nothing: the first start writes the embedded data set."""
    job = run.submit("--gpus-per-node=2", words=(*ACCURATE, *data(run.folder / "digits"), "data.workers=1"))
    run.wait(job, "COMPLETED", 600)
    assert run.ended()["status"] == "finished"
    assert run.metric("val/top1") >= 0.97
    assert run.metric("val/count") == 360
    logs = {str(path.relative_to(run.path)) for path in run.path.glob(f"logs/{job}-0/n?/*/attempt_0/*/stderr.log")}
    assert {log.split("/")[2] for log in logs} == {"n1", "n2"}
    assert len(logs) == 4, logs  # one for each rank of each node
    assert "ok     all-reduce of nodes" in run.said()
    assert "all is fine, in" in run.said()


def test_accelerate_and_zero_2_train_the_same(run, whole):
    run.site(LAUNCHER="accelerate")
    run.path.mkdir()
    (run.path / "STOP").touch()  # of an earlier job
    job = run.submit(words=(*SMALL, "engine.zero_stage=2"))
    run.wait(job, "COMPLETED")
    assert_nothing_lost(run, whole, within=1e-3)


def test_the_time_limit_saves_requeues_and_resumes(run, whole):
    """Slurm's own signal before its shortest time limit, a minute; it comes up to half a minute early."""
    job = run.submit("--time=10", "--signal=B:USR1@15", words=SMALL)
    run.wait_for_step(20)
    with run.paused():
        run.cluster.run("scontrol", "update", f"JobId={job}", "TimeLimit=1")
        wait_for((run.path / "STOP").exists, 90, "signal")
    wait_for(lambda: run.cluster.job(job)["Restarts"] == "1", 60, f"requeue; {run.said()}")
    run.cluster.run("scontrol", "update", f"JobId={job}", "TimeLimit=10")
    stopped_at = run.last_step()
    run.wait(job, "COMPLETED")
    assert 20 <= stopped_at < 200
    assert "step ended with saved: start me again (STOP file)" in run.said()
    assert f"requeueing from step {stopped_at}" in run.said()
    assert f"resuming from {run.path}/checkpoints/step-{stopped_at:08d}" in run.said()
    assert_nothing_lost(run, whole)


def test_a_preempted_job_saves_waits_and_resumes(run, whole):
    job = run.submit("--exclusive", words=SMALL)
    run.wait_for_step(20)
    with run.paused():
        urgent = run.cluster.run("sbatch", "--parsable", "--partition=high", "--nodes=3", "--exclusive",
                                 "--output=/dev/null", "--wrap=sleep 3").strip()  # fmt: skip
        wait_for((run.path / "STOP").exists, 60, "signal")
    run.wait(job, "PENDING", 55)  # before the minute of grace is over
    stopped_at = run.last_step()
    assert f"requeueing from step {stopped_at}" in run.said()
    run.wait(urgent, "COMPLETED")
    run.wait(job, "COMPLETED")
    assert 20 <= stopped_at < 200
    assert run.said().count("resuming from") == 1
    assert_nothing_lost(run, whole, within=1e-3)  # a whole node has two GPUs, and so two ranks


def test_a_cancelled_job_saves_and_stays_cancelled(run):
    job = run.submit(words=SMALL)
    run.wait_for_step(20)
    with run.paused():
        run.cluster.run("scancel", job)
        wait_for((run.path / "STOP").exists, 30, "signal")
    run.wait(job, "CANCELLED", 60)
    wait_for(lambda: not run.cluster.run("squeue", "-h", "-j", job), 60, "end")
    assert run.ended()["status"] == "saved: start me again"
    assert (run.path / f"checkpoints/step-{run.last_step():08d}/manifest.json").exists()
    assert run.cluster.job(job)["Restarts"] == "0"


def test_a_killed_worker_ends_the_step_in_seconds_and_costs_the_steps_since_the_last_checkpoint(run, whole):
    job = run.submit(words=(*SMALL, "checkpoint.every_steps=25"))
    run.wait_for_step(60)
    ranks = ranks_of(run)
    assert len(ranks) == 2
    ranks[0].kill()
    began = time.monotonic()
    wait_for(lambda: "requeueing from step" in run.said(), 60, "end of the step")
    print(f"the step ended {time.monotonic() - began:.1f} s after the kill")
    assert not ranks_of(run)
    run.wait(job, "COMPLETED")
    assert run.cluster.job(job)["Restarts"] == "1"
    assert run.said().count("resuming from") == 1
    assert_nothing_lost(run, whole)


def test_a_job_that_gets_nowhere_stops(run):
    run.site(MAX_RESTARTS=1)
    job = run.submit(words=(*SMALL, "data.train=data/digits/train-{000..007}.tar"))
    run.wait(job, "FAILED")
    assert run.cluster.job(job)["Restarts"] == "1"
    assert len(re.findall(r"\d+ problems", run.said())) == 2
    assert "step ended with failed (preflight: shards: rank 0 on n1: " in run.said()
    assert "shard not found; check data.train" in run.said()
    assert "no newer checkpoint than step 0 after 1 restarts: giving up" in run.said()


def test_mistakes_fail_at_once(run):
    job = run.submit(words=("optimizer.lrr=1",))
    run.wait(job, "FAILED", 120)
    assert "optimizer.lrr: unknown key" in run.said()
    assert run.cluster.job(job)["Restarts"] == "0"
    assert not run.path.exists()
    run.site(NETWORK_INTERFACE="ib7")
    job = run.submit()
    run.wait(job, "FAILED", 120)
    assert "NETWORK_INTERFACE=ib7: no such interface with an IPv4 address on n1" in run.said()
    assert run.cluster.job(job)["Restarts"] == "0"


def test_a_node_that_loses_power_is_waited_for_or_done_without(cluster, tree, tmp_path_factory, whole):
    """Two jobs lose n2: one its second node, one its head, where its shell runs."""
    if not cluster.isolated:
        pytest.skip("needs namespaces: root, and a system that allows them")
    fewer, same = (Run(cluster, tree, tmp_path_factory.mktemp(name)) for name in ("fewer", "same"))
    jobs = [
        fewer.submit("--nodes=1-2", "--exclude=n3", words=(*SMALL, "checkpoint.every_steps=25")),
        same.submit("--nodes=2", "--nodelist=n2,n3", words=(*SMALL, "checkpoint.every_steps=25")),
    ]
    with contextlib.ExitStack() as halted:
        for run, job, nodes in zip((fewer, same), jobs, ("n[1-2]", "n[2-3]"), strict=True):
            wait_for(lambda: cluster.job(job)["NodeList"] == nodes, 30, f"job on {nodes}")  # noqa: B023
            run.wait_for_step(60)
            halted.enter_context(run.paused())  # the other one has still to come there
        cluster.power_off("n2")
    try:
        fewer.wait(jobs[0], "COMPLETED")
        assert cluster.job(jobs[0])["NodeList"] == "n1"
        assert_nothing_lost(fewer, whole, within=1e-3)
        same.wait(jobs[1], "PENDING", 60)
    finally:
        cluster.power_on("n2")
        cluster.wait_until_up()
    same.wait(jobs[1], "COMPLETED")
    assert cluster.job(jobs[1])["NodeList"] == "n[2-3]"
    assert_nothing_lost(same, whole)
    assert [cluster.job(job)["Restarts"] for job in jobs] == ["1", "1"]
    assert [run.said().count("resuming from") for run in (fewer, same)] == [1, 1]


def test_each_task_of_an_array_has_a_run_of_its_own_without_the_environment_of_sbatch(run):
    options = ("--nodes=1", "--array=3-4", "--export=NONE")
    job = run.submit(*options, words=(*SMALL, "run.seed=%a"), environ={"PYTHONPATH": "/nowhere"})
    tasks = [Run(run.cluster, run.tree, run.folder) for _ in range(2)]
    for number, task in zip((3, 4), tasks, strict=True):
        task.path = run.path.with_name(f"run-{number}")
    tasks[1].wait_for_step(20)
    run.cluster.run("scancel", "--batch", "--signal=USR1", f"{job}_4")  # its requeue leaves the other one alone
    for number, task in zip((3, 4), tasks, strict=True):
        task.wait(f"{job}_{number}", "COMPLETED")
        assert task.ended()["status"] == "finished"
        assert f"seed: {number}" in (task.path / "config.yaml").read_text()
        assert run.cluster.job(f"{job}_{number}")["Restarts"] == str(number - 3)


def test_a_head_node_that_does_not_resolve_is_found_by_its_address(cluster, tree, tmp_path_factory):
    """Of two jobs one has a head that takes its own name for 127.0.1.1, as Debian has it, one a head without a name."""
    if cluster.machines:  # elsewhere the nodes have no names anyway
        names = cluster.machines.hosts.read_text()
        cluster.machines.hosts.write_text("127.0.0.1 localhost\n127.0.1.1 n1\n")
    runs = [Run(cluster, tree, tmp_path_factory.mktemp("head")) for _ in range(2)]
    try:
        words = (*SMALL, "run.steps=8")
        jobs = [
            run.submit("--ntasks-per-node=2", f"--nodelist={nodes}", words=words)
            for run, nodes in zip(runs, ("n1,n2", "n2,n3"), strict=True)
        ]
        for run, job in zip(runs, jobs, strict=True):
            run.wait(job, "COMPLETED")
            assert run.ended()["status"] == "finished"
            assert len((run.path / "manifest.json").read_text().split("CPU")) == 5, "four ranks"
    finally:
        if cluster.machines:
            cluster.machines.hosts.write_text(names)


def test_slurm_accepts_the_script_unseen(run):
    said = run.cluster.run("sbatch", "--test-only", "--nodes=3", f"{run.tree}/launch/pretrain.slurm")
    assert "to start at" in said
    assert "n[1-3]" in said


class Preflight:
    """`srun python -m pipeline.preflight --json` on two nodes with two ranks each, after a line of shell on each."""

    def __init__(self, cluster, tree, *words, before="", port=None):
        self.began = time.monotonic()
        variables = {"SLURM_CONF": cluster.conf, "PYTHONPATH": tree, "MASTER_PORT": port or free_port()}
        command = [*cluster.prefix, "env", "-C", tree, *(f"{name}={value}" for name, value in variables.items())]
        command += ["srun", "--nodes=2", "--nodelist=n1,n2", "--ntasks-per-node=2", "--quiet", "bash", "-c"]
        command += [f'{before}\n"$@"', "bash", sys.executable, "-m", "pipeline.preflight", "--json", *words]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        self.process = subprocess.Popen([str(word) for word in command], **pipes)

    def end(self):
        """What was wrong, by check, and what the ranks have said on stderr; keeps the rest."""
        out, errors = self.process.communicate(timeout=200)
        assert out.startswith("{"), out + errors
        self.report = json.loads(out)
        print(f"{self.report['seconds']} s, {time.monotonic() - self.began:.1f} s from srun on")
        wrong: dict[str, list[str]] = {}
        for check in self.report["checks"]:
            if not check["fine"]:
                wrong.setdefault(check["name"], []).append(check["text"])
        assert self.report["fine"] == (not wrong) == (self.process.returncode == 0)
        return wrong, errors


def test_preflight_is_fine_with_sound_nodes_within_20_seconds(cluster, tree, tmp_path):
    for _ in range(3):  # a machine may have other things to do
        check = Preflight(cluster, tree, f"run.dir={tmp_path}/run")
        wrong, _ = check.end()
        assert not wrong
        if check.report["seconds"] < 20:
            break
    assert check.report["seconds"] < 20
    found = {line["name"]: line["text"] for line in check.report["checks"]}
    assert found["all-reduce of nodes"].startswith("2 ranks, correct; ")
    if cluster.isolated:
        assert found["ranks and devices"] == "n1: rank 0-1 on 2 x CPU; n2: rank 2-3 on 2 x CPU"


def test_preflight_names_what_is_wrong_with_a_node(cluster, tree, tmp_path):
    """Another torch on one rank, a shard that one node may not read, a full disk: all in one go."""
    if not cluster.isolated:
        pytest.skip("needs namespaces: root, and a system that allows them")
    other = tmp_path / "torch-1.13.0.dist-info/METADATA"
    other.parent.mkdir()
    other.write_text("Metadata-Version: 2.1\nName: torch\nVersion: 1.13.0\n")
    cluster.run("bash", "-c", f"head -c 1900000 /dev/zero >'{cluster.machines.folder}/full/filler'")
    no_rights = "setpriv --bounding-set=-dac_override,-dac_read_search --inh-caps=-dac_override,-dac_read_search"
    before = f"""
        if ((SLURM_PROCID == 3)); then export PYTHONPATH='{tmp_path}':$PYTHONPATH; fi
        if ((SLURM_NODEID == 1)); then set -- {no_rights} "$@"; fi"""
    shard = tree / "data/digits/train-002.tar"
    shard.chmod(0)
    try:
        check = Preflight(cluster, tree, f"run.dir={cluster.machines.folder}/full/run", before=before)
        wrong, _ = check.end()
    finally:
        shard.chmod(0o644)
    assert set(wrong) == {"versions", "shards", "disk"}
    assert re.match(r"rank 3 on n2: torch 1\.13\.0, the others have 2\.", wrong["versions"][0]), wrong
    assert re.match(r"rank 2 on n2: data/digits/train-002\.tar: .*Permission denied", wrong["shards"][0]), wrong
    assert re.match(r"rank 0 on n1: run.dir=.*/full/run: 0\.\d MiB free, 7\.\d MiB needed", wrong["disk"][0]), wrong
    assert [len(found) for found in wrong.values()] == [1, 1, 1]


def test_preflight_names_ranks_that_do_not_come_and_a_blocked_port(cluster, tree, tmp_path):
    if not cluster.isolated:
        pytest.skip("needs namespaces: root, and a system that allows them")
    port, limit = free_port(), ("--timeout-seconds", "15")
    rule = ("ip", "rule", "add", "ipproto", "tcp", "dport", str(port), "prohibit")
    cluster.machines.inside(cluster.slurmd["n2"], *rule)
    try:
        blocked = Preflight(cluster, tree, *limit, f"run.dir={tmp_path}/blocked", port=port)
        missing = Preflight(cluster, tree, *limit, f"run.dir={tmp_path}/missing",
                            before="if ((SLURM_PROCID == 3)); then sleep 45; exit; fi")  # fmt: skip
        wrong, errors = blocked.end()
        not_come = r"missing after 15 s: rank 2-3 of 4; arrived: n1: rank 0-1; .* whether their node reaches rank 0's"
        assert re.match(not_come, wrong["ranks"][0]), wrong
        no_answer = (
            rf"rank [23] on n2: MASTER_ADDR=\S+ MASTER_PORT={port}: no answer from rank 0 within 15 s; .*open between"
        )
        assert len(re.findall(no_answer, errors)) == 2, errors
        wrong, _ = missing.end()
        not_come = "missing after 15 s: rank 3 of 4; arrived: n1: rank 0-1; n2: rank 2;"
        assert wrong["ranks"][0].startswith(not_come), wrong
    finally:
        cluster.machines.inside(cluster.slurmd["n2"], "ip", "rule", "del", *rule[3:])
