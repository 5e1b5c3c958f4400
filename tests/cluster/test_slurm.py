"""`sbatch launch/pretrain.slurm` on a real Slurm cluster: from start to accuracy, and through all that ends a job."""

import time

import pytest

from tests.cluster.cluster import ranks_of, wait_for
from tests.cluster.conftest import Run

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(600)]

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
    job = run.submit("--gpus-per-node=2")
    run.wait(job, "COMPLETED", 400)
    assert run.ended()["status"] == "finished"
    assert run.metric("val/top1") >= 0.97
    assert run.metric("val/count") == 360
    logs = {str(path.relative_to(run.path)) for path in run.path.glob(f"logs/{job}-0/*/*/attempt_0/*/stderr.log")}
    assert len(logs) == 4, logs  # one for each rank of each node


def test_accelerate_and_zero_2_train_the_same(run, whole):
    run.site(LAUNCHER="accelerate")
    job = run.submit(words=(*SMALL, "engine.zero_stage=2"))
    run.wait(job, "COMPLETED")
    assert_nothing_lost(run, whole, within=1e-3)


def test_usr1_before_the_time_limit_saves_requeues_and_resumes(run, whole):
    job = run.submit(words=SMALL)
    run.wait_for_step(20)
    run.cluster.run("scancel", "--batch", "--signal=USR1", job)
    wait_for(lambda: run.cluster.job(job)["Restarts"] == "1", 60, f"requeue; {run.said()}")
    stopped_at = run.last_step()
    assert stopped_at < 200
    run.wait(job, "COMPLETED")
    assert f"requeueing from step {stopped_at}" in run.said()
    assert f"resuming from {run.path}/checkpoints/step-{stopped_at:08d}" in run.said()
    assert_nothing_lost(run, whole)


def test_a_preempted_job_saves_waits_and_resumes(run, whole):
    job = run.submit("--exclusive", words=SMALL)
    run.wait_for_step(20)
    urgent = run.cluster.run("sbatch", "--parsable", "--partition=high", "--nodes=2", "--exclusive",
                             "--output=/dev/null", "--wrap=sleep 3").strip()  # fmt: skip
    run.wait(job, "PENDING", 60)
    assert 20 <= run.last_step() < 200
    run.wait(urgent, "COMPLETED")
    run.wait(job, "COMPLETED")
    assert run.said().count("resuming from") == 1
    assert_nothing_lost(run, whole)


def test_a_cancelled_job_saves_and_stays_cancelled(run):
    job = run.submit(words=SMALL)
    run.wait_for_step(20)
    run.cluster.run("scancel", job)
    run.wait(job, "CANCELLED", 60)
    wait_for(lambda: not run.cluster.run("squeue", "-h", "-j", job), 60, "end")
    assert run.ended()["status"] == "saved: start me again"
    assert (run.path / f"checkpoints/step-{run.last_step():08d}/manifest.json").exists()
    assert run.cluster.job(job)["Restarts"] == "0"


def test_a_killed_worker_ends_the_job_in_seconds(run):
    run.site(MAX_RESTARTS=0)
    job = run.submit(words=(*SMALL, "run.steps=100000"))
    run.wait_for_step(20)
    ranks = ranks_of(run)
    assert len(ranks) == 2
    ranks[0].kill()
    began = time.monotonic()
    run.wait(job, "FAILED", 60)
    assert time.monotonic() - began < 45
    wait_for(lambda: not ranks_of(run), 30, "end of the other ranks")
    assert "giving up" in run.said()


def test_a_killed_worker_costs_the_steps_since_the_last_checkpoint(run, whole):
    job = run.submit(words=(*SMALL, "checkpoint.every_steps=25"))
    run.wait_for_step(60)
    ranks_of(run)[0].kill()
    run.wait(job, "COMPLETED")
    assert run.cluster.job(job)["Restarts"] == "1"
    assert run.said().count("resuming from") == 1
    assert_nothing_lost(run, whole)


def test_a_job_that_gets_nowhere_stops(run):
    run.site(MAX_RESTARTS=1)
    job = run.submit(words=(*SMALL, "data.train=data/digits/train-{000..007}.tar"))
    run.wait(job, "FAILED", 180)
    assert run.cluster.job(job)["Restarts"] == "1"
    assert "shard not found; check data.train" in run.said()
    assert "no newer checkpoint than step 0 after 1 restarts: giving up" in run.said()


def test_a_misspelt_option_fails_at_once(run):
    job = run.submit(words=("optimizer.lrr=1",))
    run.wait(job, "FAILED", 60)
    assert "optimizer.lrr: unknown key" in run.said()
    assert run.cluster.job(job)["Restarts"] == "0"
    assert not run.path.exists()


def test_a_node_that_loses_power_is_done_without(run, whole):
    if not run.cluster.isolated:
        pytest.skip("needs namespaces: root, and a system that allows them")
    job = run.submit("--nodes=1-2", words=(*SMALL, "checkpoint.every_steps=25"))
    run.wait_for_step(60)
    assert run.cluster.job(job)["NumNodes"] == "2"
    run.cluster.power_off("n2")
    try:
        run.wait(job, "COMPLETED", 240)
        assert run.cluster.job(job)["Restarts"] == "1"
        assert run.cluster.job(job)["NumNodes"] == "1"
        assert_nothing_lost(run, whole, within=1e-3)
    finally:
        run.cluster.power_on("n2")
        wait_for(lambda: run.cluster.run("sinfo", "-h", "-o", "%T %D").split() == ["idle", "2"], 60, "idle nodes")


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


def test_a_head_node_without_a_name_is_found_by_its_address(run):
    if run.cluster.machines:  # elsewhere the nodes have no names anyway
        names = run.cluster.machines.hosts.read_text()
        run.cluster.machines.hosts.write_text("127.0.0.1 localhost\n127.0.1.1 n1 n2\n")
    try:
        job = run.submit("--ntasks-per-node=2", words=(*SMALL, "run.steps=8"))
        run.wait(job, "COMPLETED")
        assert run.ended()["status"] == "finished"
        assert len((run.path / "manifest.json").read_text().split("CPU")) == 5, "four ranks"
    finally:
        if run.cluster.machines:
            run.cluster.machines.hosts.write_text(names)


def test_slurm_accepts_the_script_unseen(run):
    said = run.cluster.run("sbatch", "--test-only", "--nodes=2", f"{run.tree}/launch/pretrain.slurm")
    assert "to start at" in said
    assert "n[1-2]" in said
