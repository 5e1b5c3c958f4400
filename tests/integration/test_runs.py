"""Whole runs of the training command: launchers, strategies, kill and resume."""

import json
import os
import signal
import time

import pytest

from tests.conftest import SMALL, data, start, train, two_ranks


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
    if (tmp_path / "exit.json").exists():
        assert status(tmp_path)["status"] in ("saved: start me again", "finished")
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
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    final = [line for line in lines if "val/top1" in line][-1]
    assert final["val/count"] == 360
    assert final["val/top1"] >= 0.97
