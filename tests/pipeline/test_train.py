"""The training command as its users meet it: a short run, signals, bad input, --help, --dry-run."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest

from pipeline import checkpoint
from pipeline.monitor.jsonl import Lines
from tests.conftest import ROOT, SMALL, data, start, train

SHORT = [*SMALL, "run.steps=4"]


def test_a_short_run_leaves_what_the_readme_promises(digits, tmp_path):
    words = [*SHORT, *data(digits), f"run.dir={tmp_path / 'run'}", "run.profile.steps=1", "run.profile.start_step=2"]
    code, output = train(*words)
    assert code == 0, output
    run = tmp_path / "run"
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    named = {"step", "epoch", "loss", "learning_rate", "grad_norm", "images_per_second", "data_wait_fraction"}
    assert named <= set(lines[0])
    assert {"val/top1", "val/top5", "val/loss", "val/count"} <= set(lines[-1])
    assert json.loads((run / "exit.json").read_text())["status"] == "finished"
    assert json.loads((run / "manifest.json").read_text())["exit"].startswith("finished")
    assert len(json.loads((run / "classes.json").read_text())) == 10
    assert list((run / "tensorboard").iterdir())
    assert list((run / "profile").glob("*.pt.trace.json"))
    assert "held-out top-1" in output

    code, output = train(*words)
    assert code == 0, output
    assert "the run is complete" in output

    code, output = train(*words, "model.depth=3")
    assert code == 2
    assert "holds another run; it differs in model.depth: there 4, now 3" in output

    command = [sys.executable, "-m", "pipeline.evaluate", str(run), "--config", str(run / "config.yaml")]
    command += ["--predictions", str(tmp_path / "p.csv")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert "val/count 360" in done.stdout, done.stderr
    assert len((tmp_path / "p.csv").read_text().splitlines()) == 361


def test_workers_are_forked_before_the_threads_of_training(digits, tmp_path):
    """A forked process has the locks that other threads hold, for ever: the workers of evaluation are no exception."""
    words = [*SHORT, *data(digits), f"run.dir={tmp_path}", "checkpoint.every_steps=1", "run.evaluate_every_steps=2"]
    code, output = train(*words, script="tests/pipeline/forks.py")
    assert code == 0, output
    forks = json.loads(output.rpartition("threads at forks: ")[2])
    assert len(forks) == 2, "one worker reads for training, one for evaluation"
    threads = {name for names in forks for name in names}
    assert not [name for name in threads if name.startswith(("save", "watchdog"))], threads


def test_an_evaluation_leaves_dropout_as_it_was(digits, tmp_path):
    def losses(name, *words):
        code, output = train(*SHORT, *data(digits), f"run.dir={tmp_path / name}", "model.dropout=0.3", *words)
        assert code == 0, output
        lines = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        return {line["step"]: line["loss"] for line in lines if "loss" in line}

    expected = losses("without")
    assert len(expected) == 4
    assert losses("with", "run.evaluate_every_steps=2", "data.val_batch_size=360") == expected


TIMED = ("images_per_second", "data_wait_fraction")


def test_a_resumed_run_logs_what_one_that_was_not_stopped_does(digits, tmp_path):
    """Stopped inside of a log interval and during an evaluation; the next start catches up on it and crashes."""
    first, second = tmp_path / "run [1]", tmp_path / "run [2]"
    words = [*SMALL, *data(digits), "run.steps=8", "run.log_every_steps=4", "checkpoint.every_steps=3",
             "checkpoint.keep_last=9", "run.evaluate_every_steps=3", "data.log_samples=true", "monitor=[jsonl]",
             "data.global_batch_size=16", "data.val_batch_size=360"]  # fmt: skip
    code, output = train(*words, f"run.dir={first}")
    assert code == 0, output
    shutil.copytree(first, second)
    (second / "exit.json").unlink()
    for step in (6, 8):
        shutil.rmtree(second / f"checkpoints/step-{step:08d}")
    path = second / "checkpoints/step-00000003"
    state = json.loads((path / "state.json").read_text())
    state["evaluation_due"] = True
    state["logs"]["metrics.jsonl"] = Lines("none").state()  # as before the evaluation's line, which is the first
    (path / "state.json").write_text(json.dumps(state))
    manifest = json.loads((path / "manifest.json").read_text())
    del manifest["blake2b"]
    manifest["files"]["state.json"] = checkpoint._facts(str(path / "state.json"))
    (path / "manifest.json").write_text(json.dumps(manifest))
    code, output = train(*words, f"run.dir={second}")
    assert code == 0, output
    assert "step-00000003" in output
    expected, found = ([json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
                       for run in (first, second))  # fmt: skip
    assert [line["step"] for line in expected] == [3, 4, 6, 8, 8]
    for line in [*expected, *found]:
        if "loss" in line:
            assert line["images_per_second"] > 0
            assert 0 <= line["data_wait_fraction"] <= 1
        for name in TIMED:
            line.pop(name, None)
    assert found == expected
    samples = [(run / "samples-rank0.jsonl").read_text() for run in (first, second)]
    assert samples[0].count("\n") == 8
    assert samples[0] == samples[1]

    path = second / "metrics.jsonl"
    path.write_bytes(damaged := path.read_bytes()[:-20])
    code, output = train(*words, f"run.dir={second}", "run.steps=10")
    assert code == 2, output
    assert f"error: {path}: damaged: it ends at byte {len(damaged)} of {len(damaged) + 20}" in output
    assert "Traceback" not in output
    assert path.read_bytes() == damaged


def test_each_log_line_of_one_step_has_a_speed(digits, tmp_path):
    code, output = train(*SHORT, *data(digits), f"run.dir={tmp_path}", "data.val=[]", "monitor=[jsonl]")
    assert code == 0, output
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert all(line["images_per_second"] > 0 for line in lines), lines


def wait_for_steps(run, steps):
    end = time.time() + 120
    while not (run / "metrics.jsonl").exists() or (run / "metrics.jsonl").read_text().count("grad_norm") < steps:
        assert time.time() < end
        time.sleep(0.05)


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGUSR1", "STOP file"])
def test_a_signal_saves_the_step_and_exits_in_order(digits, tmp_path, name):
    process = start(*SMALL, *data(digits), f"run.dir={tmp_path}", "run.steps=100000")
    wait_for_steps(tmp_path, 1)
    if name == "STOP file":
        (tmp_path / "STOP").touch()
    else:
        process.send_signal(signal.Signals[name])
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 0, output
    status = json.loads((tmp_path / "exit.json").read_text())
    assert status["status"] == "saved: start me again"
    assert status["reason"] == name
    assert (tmp_path / f"checkpoints/step-{status['step']:08d}/manifest.json").exists()
    last = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["step"] == status["step"], "a step was lost"


def copied(digits, tmp_path):
    folder = tmp_path / "data"
    shutil.copytree(digits, folder)
    return folder


def truncate(folder):
    path = folder / "train-001.tar"
    path.write_bytes(path.read_bytes()[:20000])


BAD = {
    "missing": (lambda f: (f / "train-002.tar").unlink(), [], "train-002.tar: shard not found; check data.train"),
    "empty": (lambda f: (f / "train-002.tar").write_bytes(b""), [], "train-002.tar: empty file; write the shard anew"),
    "truncated": (truncate, [], "train-001.tar: truncated: it has 20000 bytes"),
    "no index": (lambda f: (f / "index.json").unlink(), [], "no index beside it"),
    "label": (lambda f: None, ["model.num_classes=9"], "label 9 is out of range: model.num_classes=9; set"),
    "batch": (lambda f: None, ["engine.micro_batch_size=5"], "engine.micro_batch_size: 5 does not divide"),
    "patch": (lambda f: None, ["model.image_size=33"], "image_size: 33 is no multiple of patch_size 8"),
    "wrong type": (lambda f: None, ["data.workers=many"], "data.workers: expected a whole number, found 'many'"),
    "command": (
        lambda f: None,
        ["data.train=pipe:cat train-000.tar", f"data.index={ROOT}"],
        "set data.read.allow_pipe=true",
    ),
    "misspelt": (lambda f: None, ["optimizer.lrr=1"], "optimizer.lrr: unknown key"),
    "fp16": (lambda f: None, ["engine.precision=fp16"], "fp16 under DDP needs a GPU; use engine.precision=bf16"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_mistake_is_one_clear_line_and_exit_code_2(digits, tmp_path, name):
    spoil, words, message = BAD[name]
    folder = copied(digits, tmp_path)
    spoil(folder)
    code, output = train(*SHORT, *data(folder), f"run.dir={tmp_path / 'run'}", *words)
    assert code == 2, output
    assert message in output
    assert "Traceback" not in output
    assert not (tmp_path / "run/checkpoints").exists() or not os.listdir(tmp_path / "run/checkpoints")


def test_a_file_that_is_no_image_names_its_sample(digits, tmp_path):
    folder = copied(digits, tmp_path)
    path = folder / "train-001.tar"
    path.write_bytes(path.read_bytes().replace(b"\x89PNG", b"nope"))
    code, output = train(*SHORT, *data(folder), f"run.dir={tmp_path / 'run'}")
    assert code == 2, output
    assert "can't be decoded: no image" in output
    assert "train-001.tar: sample" in output
    assert "Traceback" not in output
    assert json.loads((tmp_path / "run/exit.json").read_text())["status"] == "failed"


def test_bad_samples_are_masked_and_counted_and_listed_once(digits, tmp_path):
    folder, run = copied(digits, tmp_path), tmp_path / "run"
    for name, count in (("train-001.tar", 3), ("val-000.tar", 1)):
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content.replace(b"\x89PNG", b"nope", count))
    words = [*SMALL, *data(folder), f"run.dir={run}", "data.global_batch_size=479", "checkpoint.every_steps=1"]
    # Two epochs of 3 steps, with a stop and a resume in the first. Bad are 3 of 1,437 samples, and 1 of 360.
    for fraction, steps in ((0, 6), (0.003, 2), (0.003, 6)):
        code, output = train(*words, f"run.steps={steps}", f"data.max_bad_fraction={fraction}")
        assert code == (0 if fraction else 2), output
        if fraction == 0:
            assert "of 1437 training samples are bad by now, data.max_bad_fraction=0 allows 0" in output
            assert json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])["bad_samples"] > 0
        if steps == 2:  # what a killed run leaves: a line of a step that no checkpoint has
            with open(run / "quarantine.jsonl", "a") as file:
                file.write(json.dumps({"step": 3, "split": "train", "rank": 0, "sample": "stale", "reason": ""}) + "\n")
    entries = [json.loads(line) for line in (run / "quarantine.jsonl").read_text().splitlines()]
    named = sorted(e["sample"] for e in entries if e["split"] == "train")
    assert len(named) == len(set(named)) == 3
    assert len([e for e in entries if e["split"] == "val"]) == 1
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3, 4, 5, 6]
    counted = [line for line in lines if "bad_samples" in line][-1]
    assert counted["bad_samples"] == counted["bad_samples/rank0"] == 3
    assert lines[-1]["val/count"] == 359
    assert lines[-1]["val/bad"] == 1


def test_shards_can_be_drawn_with_replacement_without_an_index(digits, tmp_path):
    folder = copied(digits, tmp_path)
    (folder / "index.bin").unlink()
    words = [*SHORT, *data(folder), f"run.dir={tmp_path / 'run'}", "data.resampled=true", "data.log_samples=true"]
    code, output = train(*words, "data.val=[]", "run.steps=30")
    assert code == 0, output
    with open(tmp_path / "run/samples-rank0.jsonl") as file:
        samples = [sample for line in file for sample in json.loads(line)["samples"]]
    assert len(samples) == 30 * 64
    assert len(set(samples)) > 900
    code, output = train(*[w for w in words if not w.startswith("run.")], "run.epochs=3")
    assert code == 2
    assert "data.resampled=true has no epochs; set run.steps" in output


def test_a_full_disk_leaves_earlier_checkpoints_whole(digits, small_disk):
    run = small_disk / "run"
    words = ["checkpoint.every_steps=2", "checkpoint.keep_last=9", "monitor=[jsonl]", "run.steps=40"]
    code, output = train(*SMALL, *words, *data(digits), f"run.dir={run}")
    assert code == 2, output
    assert "can't write the checkpoint" in output
    assert "free some space" in output
    assert "finished" not in output
    path, skipped = checkpoint.latest(str(run / "checkpoints"))
    assert path is not None
    assert not skipped


def test_training_goes_on_while_the_disk_is_full_and_saves_when_it_is_not(digits, small_disk):
    run = small_disk / "run"
    filler = small_disk / "filler"
    filler.write_bytes(bytes(11_000_000))
    process = start(*SMALL, *data(digits), f"run.dir={run}", "checkpoint.every_steps=2", "run.steps=60")
    wait_for_steps(run, 6)
    filler.unlink()
    output, _ = process.communicate(timeout=200)
    assert process.returncode == 0, output
    assert "warning: " in output
    assert "can't write the checkpoint" in output
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert any(line.get("checkpoint_failed") for line in lines)
    path, skipped = checkpoint.latest(str(run / "checkpoints"))
    assert path.endswith("step-00000060")
    assert not skipped


def test_a_run_directory_without_write_permission_is_named(digits, small_disk):
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    code, output = train(*SHORT, *data(digits), f"run.dir={small_disk / 'run'}")
    assert code == 2, output
    assert "can't be written: Read-only file system; choose another run.dir" in output


def test_out_of_memory_names_the_micro_batch_and_its_half(digits, tmp_path):
    words = ["data.global_batch_size=4096", "model.width=1024", "model.mlp_dim=4096", "data.workers=0"]
    code, output = train(*SHORT, *data(digits), f"run.dir={tmp_path}", *words, preexec_fn=limit_memory)
    assert code == 2, output
    assert "engine.micro_batch_size=4096; set engine.micro_batch_size=2048" in output


def limit_memory():
    import resource

    resource.setrlimit(resource.RLIMIT_AS, (3 << 30, 3 << 30))


def test_a_tar_without_images_is_refused_with_its_sample(tmp_path):
    import webdataset

    with webdataset.TarWriter(str(tmp_path / "train-000.tar")) as writer:
        writer.write({"__key__": "a7", "txt": b"hello", "cls": b"1"})
    command = [sys.executable, "-m", "pipeline.shards", "index", str(tmp_path / "*.tar")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 2
    assert "train-000.tar: sample a7: no image among its members (cls, txt); expected one of jpg" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "index.json").exists()


COMMANDS = [
    ["pipeline/train.py"],
    *(["-m", f"pipeline.{name}"] for name in ("evaluate", "checkpoint", "export", "preflight", "shards")),
    *(["-m", "pipeline.shards", command] for command in ("digits", "write", "index", "verify", "audit")),
]  # fmt: skip


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_help_explains_itself(words):
    done = subprocess.run([sys.executable, *words, "--help"], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0
    assert "usage:" in done.stdout
    if words == ["pipeline/train.py"]:
        for option in ("schedule.peak_lr", "engine.zero_stage", "configs/vit_b16_in1k.yaml", "{name: inception_crop}"):
            assert option in done.stdout


def test_dry_run_of_vit_b16_counts_parameters_and_names_missing_shards():
    words = ["engine.micro_batch_size=2", "mix.block_rows=2"]
    code, output = train("--dry-run", "--config", "configs/vit_b16_in1k.yaml", *words)
    assert code == 2
    assert "86,567,656 parameters" in output
    assert "105.15 GFLOP" in output
    assert "train: data/imagenet/train-0000.tar: shard not found" in output
    assert "val: ... and 54 more of 64 shards" in output


def test_scripts_are_told_the_run_directory_and_nothing_is_made(tmp_path):
    code, output = train("--print-run-dir", "--config", "configs/vit_b16_in1k.yaml", "engine.precision=no")
    assert (code, output) == (0, f"700 {ROOT}/runs/vit_b16_in1k\n")
    code, output = train("--print-run-dir", f"run.dir={tmp_path}/a run", "run.mode=750")
    assert (code, output) == (0, f"750 {tmp_path}/a run\n")
    assert not list(tmp_path.iterdir())


def test_a_second_start_in_the_same_run_directory_is_refused(digits, tmp_path):
    """Both used to train, and to write each step twice."""
    words = [*SHORT, *data(digits), f"run.dir={tmp_path / 'run'}", "run.steps=100000"]
    first = start(*words)
    try:
        end = time.monotonic() + 60
        while not (tmp_path / "run/metrics.jsonl").exists():
            assert time.monotonic() < end
            time.sleep(0.05)
        code, output = train(*words)
        assert code == 2
        assert re.search(rf"run: process {first.pid} on \S+ \(.*train.py.*\) is writing there already; wait", output)
        first.send_signal(signal.SIGTERM)
        output = first.communicate(timeout=60)[0]
        assert first.returncode == 0, output
    finally:
        first.kill()
    steps = [json.loads(line)["step"] for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(1, len(steps) + 1))
    ended = json.loads((tmp_path / "run/exit.json").read_text())
    assert ended["status"].startswith("saved")


def test_a_start_that_stood_still_and_was_replaced_writes_nothing_more(digits, tmp_path):
    """As a virtual machine that is paused: it wakes up when another machine has gone on with its run."""
    run = tmp_path / "run"
    words = [*SHORT, *data(digits), f"run.dir={run}", "run.steps=100000", "run.log_every_steps=100"]
    first = start(*words)
    end = time.monotonic() + 60
    while not (run / "metrics.jsonl").exists():
        assert time.monotonic() < end
        time.sleep(0.05)
    first.send_signal(signal.SIGSTOP)
    time.sleep(0.2)
    lines = (run / "metrics.jsonl").read_text()
    (held,) = run.glob(".run.lease-*")
    held.rename(run / ".run.lease-00000009")  # what a start on another machine does once the lease has expired
    first.send_signal(signal.SIGCONT)
    output = first.communicate(timeout=60)[0]
    assert first.returncode == 2, output
    assert "another process has taken over while this one stood still" in output
    assert (run / "metrics.jsonl").read_text() == lines
    assert not (run / "exit.json").exists()
    assert not list((run / "checkpoints").glob("step-*"))
