"""Losses that are not finite, spikes, slow ranks, hangs: what is told and what is done."""

import json
import re
import subprocess
import sys
import time
from collections import deque
from types import SimpleNamespace

import pytest
import torch

from pipeline import checkpoint
from pipeline.build import steps_left_out
from pipeline.engine import Engine, EngineConfig
from pipeline.errors import UserError
from pipeline.health import Health, HealthConfig, SpikeDetector
from pipeline.monitor.jsonl import Lines, restore_logs
from pipeline.runtime import Ranks
from tests.conftest import ROOT, SMALL, data, environment, start, train
from tests.pipeline.test_faults import Server

SHORT = [*SMALL, "run.log_every_steps=4", "checkpoint.every_steps=8", "schedule.warmup_steps=0"]


def lines(run, name="metrics.jsonl"):
    return [json.loads(line) for line in (run / name).read_text().splitlines()]


def last_weights(run):
    path, skipped = checkpoint.latest(str(run / "checkpoints"))
    assert not skipped
    return checkpoint.load(path)


def assert_same(left, right):
    assert left.updates == right.updates
    for key in left.weights:
        assert torch.equal(left.weights[key], right.weights[key]), key
        assert torch.equal(left.moments["exp_avg_sq"][key], right.moments["exp_avg_sq"][key]), key


@pytest.fixture(scope="module")
def without_step_26(digits, tmp_path_factory):
    """A run of 32 steps that leaves out the batch of step 26, counted from 0."""
    run = tmp_path_factory.mktemp("without")
    (run / "skipped.json").write_text(json.dumps([{"first": 26, "last": 26, "reason": "the reference"}]))
    code, output = train(*SHORT, *data(digits), f"run.dir={run}", "run.steps=32")
    assert code == 0, output
    return run


def poisoned(digits, run, *words, steps="26"):
    command = [sys.executable, str(ROOT / "tests/pipeline/poisoned.py"), steps, *SHORT, *data(digits), *words]
    command += [f"run.dir={run}", *([] if any(w.startswith("run.steps") for w in words) else ["run.steps=32"])]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment({}), timeout=200)
    return done.returncode, done.stdout + done.stderr


def test_a_loss_that_is_not_finite_leaves_its_step_out_and_names_it(digits, tmp_path, without_step_26):
    code, output = train(*SHORT, *data(digits), f"run.dir={tmp_path}", "run.steps=32", "health.nan_at_step=26")
    assert code == 0, output
    assert re.search(r"step 27: the loss was not finite on rank 0: .*train-00\d.tar: sample .* more", output), output
    assert_same(last_weights(tmp_path), last_weights(without_step_26))
    (entry,) = lines(tmp_path, "health.jsonl")
    assert (entry["step"], entry["what"], len(entry["ranks"]["0"])) == (27, "not finite", 64)
    assert lines(tmp_path)[-2]["nonfinite_steps"] == 1
    assert all(line["loss"] < 10 for line in lines(tmp_path) if "loss" in line)


def test_too_many_steps_without_an_update_end_the_run_with_finite_weights(digits, tmp_path):
    words = ["health.nan_at_step=26", "health.max_nonfinite_steps=0"]
    code, output = train(*SHORT, *data(digits), f"run.dir={tmp_path}", "run.steps=32", *words)
    assert code == 2, output
    assert "health.max_nonfinite_steps=0; the weights are finite: lower schedule.peak_lr" in output
    assert all(weight.isfinite().all() for weight in last_weights(tmp_path).weights.values())


@pytest.mark.parametrize("action", ["skip", "rollback"])
def test_a_spike_ends_where_a_run_without_its_batch_does(digits, tmp_path, without_step_26, action):
    code, output = poisoned(digits, tmp_path, f"health.on_spike={action}")
    assert code == 0, output
    assert re.search(r"warning: spike: loss \d+.* at step 27, above", output)
    assert_same(last_weights(tmp_path), last_weights(without_step_26))
    if action == "rollback":
        assert "back to the checkpoint before step 27" in output
        assert json.loads((tmp_path / "skipped.json").read_text())[0]["first"] == 26
        assert lines(tmp_path)[-2]["skipped_steps"] == 1
        assert [line["step"] for line in lines(tmp_path) if "loss" in line] == list(range(4, 33, 4))
        assert "left in memory: nothing\nresuming from" in output, "the first run was gone before the second was built"
        code, output = poisoned(digits, tmp_path, "health.on_spike=rollback", "run.steps=36")
        assert code == 0, output
        (entry,) = lines(tmp_path, "health.jsonl")  # that the rollback has not dropped, nor the resume
        assert (entry["step"], entry["what"]) == (27, "spike: rollback")
        assert lines(tmp_path)[-2]["spikes"] == 1
    else:
        assert lines(tmp_path)[-2]["spikes"] == 1


def test_a_spike_is_told_and_no_more_by_default(digits, tmp_path, without_step_26):
    code, output = poisoned(digits, tmp_path)
    assert code == 0, output
    assert "at step 27" in output
    assert "nothing is done (health.on_spike)" in output
    assert lines(tmp_path)[-2]["spikes"] == 1
    assert last_weights(tmp_path).updates == 32


def test_spikes_have_a_limit_that_counts_those_before_a_rollback_and_a_resume(digits, tmp_path):
    words = ["health.on_spike=rollback", "health.max_spikes=1", "data.val=[]"]
    code, output = poisoned(digits, tmp_path, *words, steps="26,29")
    assert code == 2, output
    assert "the 2. spike, and health.max_spikes=1; lower schedule.peak_lr" in output
    code, output = poisoned(digits, tmp_path, *words, "run.log_every_steps=8", steps="29")
    assert code == 2, output
    assert "the 2. spike" in output, "the count of the first start"
    assert [entry["step"] for entry in lines(tmp_path, "health.jsonl")] == [27, 30]


@pytest.mark.integration
def test_a_rollback_under_zero_3_leaves_no_model_behind(digits, tmp_path):
    words = ["health.on_spike=rollback", "engine.zero_stage=3", "data.val=[]"]
    code, output = poisoned(digits, tmp_path, *words, steps="26,29")
    assert code == 0, output
    assert output.count("left in memory: nothing\nresuming from") == 2, output


def test_notes_of_steps_that_are_repeated_are_dropped_and_those_of_steps_that_are_left_out_are_not(tmp_path):
    file = tmp_path / "health.jsonl"
    file.write_text("".join(json.dumps({"step": step, "what": "spike: rollback"}) + "\n" for step in (3, 9, 12, 14)))
    left_out = steps_left_out([{"first": 10, "last": 11}, {"first": 8, "last": 8}])
    restore_logs(str(tmp_path), {}, 8, left_out)
    assert [entry["step"] for entry in lines(tmp_path, "health.jsonl")] == [3, 9, 12]  # counted from 1


@pytest.mark.parametrize("finite", [True, False])
def test_the_last_message_does_not_call_weights_finite_that_are_not(tmp_path, finite):
    engine = SimpleNamespace(
        ranks=Ranks(0, 1, 0, 1), config=EngineConfig(), reduce_sum=lambda values: values,
        gather_objects=lambda value: [value], weights_are_finite=lambda: finite, loss_scale=lambda: None,
    )  # fmt: skip
    config = HealthConfig(max_nonfinite_steps=0)
    health = Health(config, engine, SpikeDetector.resume(config, None), Lines(str(tmp_path / "health.jsonl")), {})
    health.add(0, torch.tensor(float("nan")), torch.tensor(1.0), torch.tensor(1.0), ["sample"])
    with pytest.raises(UserError, match=f"the weights are {'finite' if finite else 'not finite'}: lower"):
        health.read()


def test_an_engine_knows_whether_its_weights_are_finite():
    layer = torch.nn.Linear(2, 2)
    engine = SimpleNamespace(masters=lambda: list(layer.parameters()), device="cpu", reduce_sum=lambda values: values)
    assert Engine.weights_are_finite(engine)
    layer.bias.data[1] = float("inf")
    assert not Engine.weights_are_finite(engine)


def test_a_detector_resumes_as_it_was_and_ignores_a_falling_loss():
    config = HealthConfig(spike_window_steps=20)
    detector = SpikeDetector.resume(config, None)
    for number in range(40):
        assert not detector.add(5.0 - 0.1 * number)
        detector.renew()
    again = SpikeDetector.resume(config, json.loads(json.dumps(detector.saved())))
    assert again == SpikeDetector(10.0, deque(detector.window, 20), detector.threshold)
    assert again.add(50.0)
    assert not again.add(1.0)
    assert max(again.window) < 5.0


def test_a_hang_is_explained_with_phase_and_stacks_and_ends_the_process(digits, tmp_path):
    words = [*SMALL, *data(digits), f"run.dir={tmp_path / 'run'}", "run.steps=100000", "health.hang_seconds=4"]
    process = start(*words, "data.workers=1")
    while not (tmp_path / "run/metrics.jsonl").exists() or not (tmp_path / "run/metrics.jsonl").read_text():
        assert process.poll() is None
        time.sleep(0.1)
    children = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()
    for child in children:
        subprocess.run(["kill", "-STOP", child], check=True)
    began = time.monotonic()
    output, _ = process.communicate(timeout=60)  # which ends when the workers have ended, too
    assert process.returncode == 3, output
    assert time.monotonic() - began < 25
    assert re.search(r"error: rank 0: got nowhere for 4 s in phase 'data' of step \d+", output)
    assert "in fit" in output
    assert "in fit" in (tmp_path / "run/hang-rank0.txt").read_text()
    ended = json.loads((tmp_path / "run/exit.json").read_text())
    assert ended["status"] == "failed"
    assert "got nowhere" in ended["reason"]


def test_a_hang_before_the_first_step_is_explained_too(digits, tmp_path):
    """Its data workers stand still from the moment they start."""
    process = start(*SMALL, *data(digits), f"run.dir={tmp_path / 'run'}", "run.steps=100", "health.hang_seconds=4")
    children: list[str] = []
    while not children:
        assert process.poll() is None
        found = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()
        children = [pid for pid in found if len(found) >= 2]
    for child in children:
        subprocess.run(["kill", "-STOP", child], check=False)
    output, _ = process.communicate(timeout=90)
    assert process.returncode == 3, output
    assert re.search(r"error: rank 0: got nowhere for 4 s in phase '(data|evaluate)' of step 1,", output), output


def test_a_hang_in_evaluation_names_the_shard_and_shows_where_the_worker_is(digits, tmp_path):
    server = Server(digits)
    server.faults = {f"val-00{number}.tar": ["always", "hang"] for number in range(2)}
    words = [*SMALL, data(digits)[0], f"data.val={server.url}/val-{{000..001}}.tar", "data.workers=1", "run.steps=3"]
    words += ["health.hang_seconds=6", "data.read.timeout_seconds=100", f"run.dir={tmp_path / 'run'}"]
    code, output = train(*words)
    server.shutdown()
    server.server_close()
    assert code == 3, output
    told = r"got nowhere for 6 s in phase 'evaluate' of step 4, reading http://\S+/val-000.tar from byte"
    assert re.search(told, output), output
    stacks = output.partition("stacks of data worker ")[2]
    assert "in http_chunks" in stacks
    assert "in _serve" in stacks


def test_two_deterministic_runs_have_the_same_losses(digits, tmp_path):
    found = []
    for name in ("a", "b"):
        run = tmp_path / name
        words = [*SMALL, *data(digits), f"run.dir={run}", "run.steps=6", "run.deterministic=true", "data.workers=2"]
        code, output = train(*words)
        assert code == 0, output
        found.append([line["loss"] for line in lines(run) if "loss" in line])
        assert json.loads((run / "manifest.json").read_text())["deterministic"]["torch.use_deterministic_algorithms"]
    assert found[0] == found[1]
    assert len(found[0]) == 6
