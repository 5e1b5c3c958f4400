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

from tests.conftest import ACCURATE, ROOT, SMALL, data, environment, free_port, start, train, two_ranks

SEVERAL = "tests/integration/several.py"
STAGES = ["null", "0", "1", "2", "3"]
CHANGES = {"1": "3", "3": "null", "2": "0", "null": "2", "0": "1"}


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


def train_several(tmp_path, *commands, launcher=("python",)):
    """Training commands one after another in the same processes: their output."""
    file = tmp_path / "commands.json"
    file.write_text(json.dumps([[str(word) for word in words] for words in commands]))
    command = [*launcher, str(ROOT / SEVERAL), str(file)]
    done = subprocess.run(command, cwd=ROOT, env=environment({}), capture_output=True, text=True, timeout=1180)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def on_two_ranks(digits, tmp_path_factory):
    """`single` on two ranks with accumulation 2 under each strategy: the run directories."""
    folder = tmp_path_factory.mktemp("two")
    words = [*SMALL, *data(digits), "run.steps=30", "schedule.warmup_steps=5", "engine.micro_batch_size=16"]
    words += ["checkpoint.every_steps=10", "checkpoint.keep_last=3"]
    commands = [[*words, f"run.dir={folder / stage}", f"engine.zero_stage={stage}"] for stage in STAGES]
    train_several(folder, *commands, launcher=two_ranks())
    return {stage: folder / stage for stage in STAGES}


# The same global batch in fp32: only the order of sums differs.
@pytest.mark.integration
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("zero_stage", STAGES)
def test_two_ranks_have_the_losses_of_one(on_two_ranks, single, zero_stage):
    assert losses(on_two_ranks[zero_stage]) == pytest.approx(single, abs=2e-5)
    assert status(on_two_ranks[zero_stage])["status"] == "finished"


@pytest.fixture(scope="module")
def on_one_rank(digits, on_two_ranks, tmp_path_factory):
    """Copies of these runs as if killed after the checkpoint of step 10, resumed under another strategy by one rank."""
    folder, commands = tmp_path_factory.mktemp("one"), []
    for first, second in CHANGES.items():
        run_dir = folder / first
        shutil.copytree(on_two_ranks[first], run_dir)
        (run_dir / "exit.json").unlink()
        for step in (20, 30):
            shutil.rmtree(run_dir / f"checkpoints/step-{step:08d}")
        words = [*SMALL, *data(digits), "run.steps=30", "schedule.warmup_steps=5", "checkpoint.every_steps=10"]
        commands.append([*words, f"run.dir={run_dir}", f"engine.zero_stage={second}"])
    output = train_several(folder, *commands)
    return {first: folder / first for first in CHANGES}, output


@pytest.mark.integration
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("first", STAGES)
def test_a_run_resumes_under_another_strategy_on_another_number_of_ranks(on_one_rank, single, first):
    run_dirs, output = on_one_rank
    assert f"resuming from {run_dirs[first]}/checkpoints/step-00000010" in output
    assert losses(run_dirs[first]) == pytest.approx(single, abs=2e-5)
    assert status(run_dirs[first])["status"] == "finished"
    assert len(json.loads((run_dirs[first] / "manifest.json").read_text())["devices"]) == 1


@pytest.mark.integration
def test_a_log_interval_that_a_resume_cuts_is_logged_whole(digits, tmp_path):
    """Log lines of four steps, resumed from the checkpoint of step 3 on as many ranks and on fewer."""
    words = [*SMALL, *data(digits), "run.steps=8", "schedule.warmup_steps=5", "run.log_every_steps=4", "data.val=[]"]
    words += ["checkpoint.every_steps=3", "checkpoint.keep_last=9", "run.deterministic=true"]
    train_several(tmp_path, [*words, f"run.dir={tmp_path / 'whole'}"], launcher=two_ranks())
    for ranks in (2, 1):
        run_dir = tmp_path / f"resumed-{ranks}"
        shutil.copytree(tmp_path / "whole", run_dir)
        (run_dir / "exit.json").unlink()
        for step in (6, 8):
            shutil.rmtree(run_dir / f"checkpoints/step-{step:08d}")
        launcher = two_ranks() if ranks == 2 else ("python",)
        output = train_several(tmp_path, [*words, f"run.dir={run_dir}"], launcher=launcher)
        assert "step-00000003" in output

    def logged(name):
        """All but times."""
        lines = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        names = ("step", "loss", "top1", "top5", "grad_norm", "learning_rate", "epoch")
        return [{name: line[name] for name in names} for line in lines]

    expected = logged("whole")
    assert [line["step"] for line in expected] == [4, 8]
    assert logged("resumed-2") == expected
    for found, line in zip(logged("resumed-1"), expected, strict=True):
        assert found == pytest.approx(line, abs=2e-5)


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
def test_one_task_per_rank_as_srun_starts_them(digits, tmp_path, single):
    """Only the variables of a step of srun: a stand-in for Slurm, which the cluster tests run for real."""
    words = [*SMALL, *data(digits), "schedule.warmup_steps=5", "run.steps=30"]
    stages = ("null", "1")
    file = tmp_path / "commands.json"
    file.write_text(
        json.dumps([[*words, f"run.dir={tmp_path / stage}", f"engine.zero_stage={stage}"] for stage in stages])
    )
    common = {"SLURM_JOB_ID": "77", "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "2", "MASTER_PORT": str(free_port()),
              "SLURM_STEP_TASKS_PER_NODE": "2", "SLURM_LAUNCH_NODE_IPADDR": "127.0.0.1"}  # fmt: skip
    ranks = [
        start(
            file, script="tests/integration/several.py", environ={**common, "SLURM_PROCID": rank, "SLURM_LOCALID": rank}
        )
        for rank in ("0", "1")
    ]
    outputs = [process.communicate(timeout=200)[0] for process in ranks]
    assert [process.returncode for process in ranks] == [0, 0], outputs
    assert outputs[0].count("finished after step 30") == 2
    assert "finished" not in outputs[1]
    for stage in stages:
        assert losses(tmp_path / stage) == pytest.approx(single, abs=2e-5)


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
@pytest.mark.timeout(1200)
def test_the_default_run_reaches_97_percent(digits, tmp_path):
    code, output = train(*data(digits), f"run.dir={tmp_path}", launcher=("accelerate", "launch"))
    assert code == 0, output
    assert_accurate(tmp_path)


@pytest.fixture(scope="module")
def accurate(digits, tmp_path_factory):
    """Whole runs to the accuracy on two ranks, one strategy after another: the run directories."""
    folder, stages = tmp_path_factory.mktemp("accurate"), ("null", "1", "2", "3")
    words = [*ACCURATE, *data(digits)]
    commands = [[*words, f"run.dir={folder / stage}", f"engine.zero_stage={stage}"] for stage in stages]
    train_several(folder, *commands, launcher=two_ranks())
    return {stage: folder / stage for stage in stages}


@pytest.mark.integration
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("zero_stage", ["null", "1", "2", "3"])
def test_two_ranks_reach_97_percent(accurate, zero_stage):
    assert_accurate(accurate[zero_stage])


@pytest.mark.integration
@pytest.mark.timeout(1200)
def test_a_run_killed_in_the_middle_resumes_and_reaches_97_percent(digits, tmp_path):
    words = [*ACCURATE, *data(digits), f"run.dir={tmp_path}", "checkpoint.every_steps=200"]
    process = start(*words)
    wait_for(tmp_path / "checkpoints/step-00000200")
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
def test_a_forward_pass_waits_for_no_other_rank(tmp_path):
    """Fixed positions are a buffer, which DDP would broadcast from rank 0 in every forward pass."""
    command = [*two_ranks(), str(ROOT / "tests/integration/alone.py"), str(tmp_path / "done")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment({}), timeout=120)
    assert done.returncode == 0, done.stderr
