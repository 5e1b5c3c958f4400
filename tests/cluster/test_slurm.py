"""`sbatch launch/pretrain.slurm` on a real Slurm cluster."""

import pytest

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(400)]

SMALL = ("run.epochs=null", "model.depth=1", "data.workers=1", "run.log_every_steps=1", "data.log_samples=true",
         "run.evaluate_every_steps=null", "schedule.warmup_steps=5", "engine.timeout_seconds=60")  # fmt: skip
TWO_RANKS = "--gpus-per-node=2"


@pytest.mark.parametrize("launcher", ["torchrun", "accelerate"])
def test_two_nodes_with_two_ranks_each_reach_97_percent(run, launcher):
    run.site(LAUNCHER=launcher)
    job = run.submit(TWO_RANKS)
    run.wait(job, "COMPLETED", 300)
    assert run.ended()["status"] == "finished"
    assert run.metric("val/top1") >= 0.97
    assert run.metric("val/count") == 360
