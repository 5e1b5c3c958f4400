"""Whole runs of the training command: launchers, strategies, kill and resume."""

import json
import os
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.conftest import ROOT, SMALL, data, environment, free_port, start, train, two_ranks


def losses(run_dir):
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line["loss"] for line in lines if "loss" in line}


def status(run_dir):
    return json.loads((run_dir / "exit.json").read_text())


@pytest.fixture(scope="module")
def single(digits, tmp_path_factory):
    """One process, 30 steps, accumulation 1: the reference."""
    run_dir = tmp_path_factory.mktemp("single")
    code, output = train(*SMALL, *data(digits), f"run.dir={run_dir}", "run.steps=30", "schedule.warmup_steps=5")
    assert code == 0, output
    return losses(run_dir)


# The same global batch in fp32: only the order of sums differs.
@pytest.mark.integration
@pytest.mark.timeout(600)
@pytest.mark.parametrize("zero_stage", ["null", 0, 1, 2, 3])
def test_two_ranks_have_the_losses_of_one(digits, tmp_path, single, zero_stage):
    words = [*SMALL, *data(digits), f"run.dir={tmp_path}", "schedule.warmup_steps=5", "engine.micro_batch_size=16"]
    words += [f"engine.zero_stage={zero_stage}", "checkpoint.every_steps=10"]
    code, output = train(*words, "run.steps=20", "run.steps=30", launcher=two_ranks())
    assert code == 0, output
    assert losses(tmp_path) == pytest.approx(single, abs=2e-5)
    assert status(tmp_path)["status"] == "finished"


@pytest.mark.integration
@pytest.mark.parametrize(
    "launcher",
    [
        ("accelerate", "launch", "--multi_gpu", "--num_processes", "2", "--main_process_port", "PORT"),
        ("deepspeed", "--num_gpus", "2", "--master_port", "PORT"),
    ],
    ids=lambda words: words[0],
)
def test_every_launcher_trains_the_same(digits, tmp_path, single, launcher):
    launcher = [str(free_port()) if word == "PORT" else word for word in launcher]
    words = [*SMALL, *data(digits), f"run.dir={tmp_path}", "schedule.warmup_steps=5", "run.steps=30"]
    code, output = train(*words, launcher=launcher)
    assert code == 0, output
    assert losses(tmp_path) == pytest.approx(single, abs=2e-5)
    assert len(json.loads((tmp_path / "manifest.json").read_text())["devices"]) == 2
    assert output.count("finished after step 30 of 30") == 1


@pytest.mark.integration
@pytest.mark.parametrize("zero_stage", ["null", 1])
def test_one_task_per_rank_as_srun_starts_them(digits, tmp_path, single, zero_stage):
    """Only the variables of a step of srun: a stand-in for Slurm, which the cluster tests run for real."""
    words = [*SMALL, *data(digits), f"run.dir={tmp_path}", "schedule.warmup_steps=5", "run.steps=30"]
    common = {"SLURM_JOB_ID": "77", "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "2", "MASTER_PORT": str(free_port()),
              "SLURM_STEP_TASKS_PER_NODE": "2", "SLURM_LAUNCH_NODE_IPADDR": "127.0.0.1"}  # fmt: skip
    ranks = [
        start(
            *words, f"engine.zero_stage={zero_stage}", environ={**common, "SLURM_PROCID": rank, "SLURM_LOCALID": rank}
        )
        for rank in ("0", "1")
    ]
    outputs = [process.communicate(timeout=200)[0] for process in ranks]
    assert [process.returncode for process in ranks] == [0, 0], outputs
    assert "finished after step 30" in outputs[0]
    assert "finished" not in outputs[1]
    assert losses(tmp_path) == pytest.approx(single, abs=2e-5)


@pytest.mark.integration
@pytest.mark.parametrize("zero_stage", ["null", 2])
def test_a_broken_shard_on_one_rank_ends_the_job_with_its_name(digits, tmp_path, zero_stage):
    shutil.copytree(digits, tmp_path / "data")
    path = tmp_path / "data/train-003.tar"
    path.write_bytes(path.read_bytes().replace(b"\x89PNG", b"nope", 1))
    words = [*SMALL, *data(tmp_path / "data"), f"run.dir={tmp_path / 'run'}", f"engine.zero_stage={zero_stage}"]
    code, output = train(*words, "run.steps=40", launcher=two_ranks())
    assert code != 0
    assert re.search(r"error: rank \d: .*train-003.tar: sample \d+: can't be decoded: no image", output), output
    assert "pipeline/session.py" not in output, "a traceback of ours"
    assert re.search(r"rank \d: .*train-003.tar", status(tmp_path / "run")["reason"])
    assert status(tmp_path / "run")["status"] == "failed"


@pytest.mark.integration
@pytest.mark.parametrize("zero_stage", ["null", 3])
def test_a_signal_to_one_rank_stops_all_at_the_same_step_and_loses_none(digits, tmp_path, zero_stage):
    words = [*SMALL, *data(digits), f"run.dir={tmp_path}", f"engine.zero_stage={zero_stage}", "run.steps=100000"]
    process = start(*words, launcher=two_ranks())
    wait_for(tmp_path / "metrics.jsonl")
    while "\n" not in (tmp_path / "metrics.jsonl").read_text():  # the file is opened before the first step
        assert process.poll() is None
        time.sleep(0.05)
    workers = [int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]
    assert len(workers) == 2
    os.kill(workers[1], signal.SIGUSR1)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output
    ended = status(tmp_path)
    assert ended["status"] == "saved: start me again"
    assert max(losses(tmp_path)) == ended["step"]
    assert (tmp_path / f"checkpoints/step-{ended['step']:08d}/manifest.json").exists()


@pytest.mark.integration
@pytest.mark.timeout(600)
@pytest.mark.parametrize(("first", "second"), [("1", "3"), ("3", "null"), ("2", "0"), ("null", "2"), ("0", "1")])
def test_a_stopped_run_resumes_under_another_strategy(digits, tmp_path, single, first, second):
    words = [*SMALL, *data(digits), f"run.dir={tmp_path}", "schedule.warmup_steps=5", "run.steps=30"]
    words += ["checkpoint.every_steps=5"]
    process = start(*words, f"engine.zero_stage={first}", launcher=two_ranks())
    wait_for(tmp_path / "checkpoints/step-00000010")
    os.kill(process.pid, signal.SIGTERM)
    process.wait(120)
    process.stdout.close()
    assert status(tmp_path)["status"] in ("saved: start me again", "finished")
    assert max(losses(tmp_path)) == status(tmp_path)["step"]
    code, output = train(*words, f"engine.zero_stage={second}")
    assert code == 0, output
    assert losses(tmp_path) == pytest.approx(single, abs=2e-5)


@pytest.mark.integration
def test_sigkill_resumes_from_the_last_checkpoint_with_the_same_losses(digits, tmp_path, single):
    words = [*SMALL, *data(digits), f"run.dir={tmp_path}", "schedule.warmup_steps=5", "run.steps=30"]
    words += ["checkpoint.every_steps=7"]
    process = start(*words)
    wait_for(tmp_path / "checkpoints/step-00000014")
    process.kill()
    process.wait(60)
    process.stdout.close()
    code, output = train(*words)
    assert code == 0, output
    assert "resuming from" in output
    assert losses(tmp_path) == pytest.approx(single, abs=1e-6)


def wait_for(path, seconds=120):
    end = time.time() + seconds
    while not path.exists():
        assert time.time() < end, f"{path} did not appear"
        time.sleep(0.01)


@pytest.mark.integration
@pytest.mark.timeout(600)
@pytest.mark.parametrize("zero_stage", ["one process", "null", 1, 2, 3])
def test_the_default_run_reaches_97_percent(digits, tmp_path, zero_stage):
    words = [*data(digits), f"run.dir={tmp_path}"]
    if zero_stage == "one process":
        code, output = train(*words, launcher=("accelerate", "launch"))
    else:
        code, output = train(
            *words,
            f"engine.zero_stage={zero_stage}",
            launcher=two_ranks(),
        )
    assert code == 0, output
    assert_accurate(tmp_path)


@pytest.mark.integration
@pytest.mark.timeout(600)
def test_a_run_killed_in_the_middle_resumes_and_reaches_97_percent(digits, tmp_path):
    words = [*data(digits), f"run.dir={tmp_path}"]
    process = start(*words)
    wait_for(tmp_path / "checkpoints/step-00000337")
    process.kill()
    process.wait(60)
    process.stdout.close()
    assert not (tmp_path / "exit.json").exists()
    code, output = train(*words)
    assert code == 0, output
    assert "resuming from" in output
    assert_accurate(tmp_path)


def assert_accurate(run_dir):
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    final = [line for line in lines if "val/top1" in line][-1]
    assert final["val/count"] == 360
    assert final["val/top1"] >= 0.97


@pytest.mark.integration
@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.parametrize("zero_stage", ["null", "0", "1", "2", "3"])
def test_a_gradient_that_is_not_finite_on_one_rank_never_reaches_the_weights(zero_stage, precision):
    script = str(ROOT / "tests/integration/nan_guard.py")
    command = [*two_ranks(), script, zero_stage, precision]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment({}), timeout=280)
    found = json.loads(next(line for line in done.stdout.splitlines() if line.startswith("{")))
    assert found["kept"], found
    assert found["goes on"], found
    assert found["finite"], found
