"""TensorBoard's page: what a run logs is what the page draws, and one command opens it on several runs."""

import contextlib
import json
import subprocess
import time
import urllib.request

import pytest
import torch
from tensorboard.summary.writer.event_file_writer import AtomicCounter

from pipeline.monitor.sink import Sinks
from pipeline.monitor.tensorboard import LAYOUT, Config
from tests.conftest import ROOT, environment, free_port

LOGGED = ["loss", "top1", "learning_rate", "grad_norm", "images_per_second", "data_wait_fraction", "mfu", "bad_samples"]
LOGGED += ["nonfinite_steps", "spikes", "skipped_steps", "slowest_rank_ratio"]


def write_run(folder):
    folder.mkdir(parents=True)
    sink = Config().open(str(folder), 0, 10)
    for step in (1, 2):
        sink.scalars(step, dict.fromkeys([*LOGGED, "val/loss", "val/top1"], step))
    sink.close()


def test_every_chart_of_the_first_page_draws_what_a_run_logs(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    write_run(tmp_path / "run")
    events = EventAccumulator(str(tmp_path / "run/tensorboard")).Reload()
    drawn = [tag for charts in LAYOUT.values() for _, tags in charts.values() for tag in tags]
    assert sorted(drawn) == sorted(events.Tags()["scalars"])
    assert [event.value for event in events.Scalars("speed/mfu")] == [1, 2]
    assert "custom_scalars__config__" in events.Tags()["tensors"]


def read_events(run):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run / "tensorboard")).Reload()
    return events, {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def fill(path):
    """Writes until the file system is full."""
    with contextlib.suppress(OSError), path.open("wb", buffering=0) as file:
        while True:
            file.write(bytes(1 << 12))


# SummaryWriter's thread ends with the error.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_all_scalars_are_there_after_a_full_disk_has_space_again(small_disk, capfd):
    filler = small_disk / "filler"
    sinks = Sinks([Config().open(str(small_disk / "run"), 0, 100)])
    sinks.text("config", "a: 1")
    for step in range(1, 101):
        if step in (30, 70):  # twice
            fill(filler)
        if step in (50, 90):
            filler.unlink()
        sinks.scalars(step, {"loss": step, "top1": 0.5})
        if step % 10 == 0:
            sinks.scalars(step, {"val/top1": step})
    sinks.close()
    events, scalars = read_events(small_disk / "run")
    assert scalars["train/loss"] == [(step, step) for step in range(1, 101)]
    assert scalars["train/top1"] == [(step, 0.5) for step in range(1, 101)]
    assert scalars["val/top1"] == [(step, step) for step in range(10, 101, 10)]
    assert {"custom_scalars__config__", "config/text_summary"} <= set(events.Tags()["tensors"])
    told = [line for line in capfd.readouterr().err.splitlines() if line.startswith("warning")]
    assert len(told) == 4, told
    assert len(list((small_disk / "run/tensorboard").iterdir())) == 3


def test_a_disk_that_is_full_at_the_start_and_free_at_the_end(small_disk):
    run = small_disk / "run"
    sinks = Sinks([Config().open(str(run), 0, 100)])
    fill(small_disk / "filler")
    sinks.text("config", "a: 1")
    sinks.scalars(1, {"loss": 1.0})
    (small_disk / "filler").unlink()
    sinks.close()
    sinks.close()
    assert read_events(run)[1] == {"train/loss": [(1, 1.0)]}


def test_a_resume_hides_the_steps_that_it_repeats(tmp_path):
    for start, steps in ((0, 3), (0, 5), (4, 6)):  # the second start finds no checkpoint
        sink = Config().open(str(tmp_path), start, 10)
        sink.text("config", f"start: {start}")
        sink.images(start + 1, torch.zeros(8, 3, 4, 4, dtype=torch.uint8), ["a"] * 8)
        for step in range(start + 1, steps + 1):
            sink.scalars(step, {"loss": float(steps)})
        sink.close()
    events, scalars = read_events(tmp_path)
    assert scalars["train/loss"] == [(1, 5.0), (2, 5.0), (3, 5.0), (4, 5.0), (5, 6.0), (6, 6.0)]
    assert [event.step for event in events.Images("inputs")] == [1, 5]


def test_what_tensorboard_cannot_take_is_left_out(tmp_path, monkeypatch):
    """In a process that has opened nine files before: the tenth has a name that sorts before that of the ninth."""
    count = AtomicCounter(9)
    monkeypatch.setattr("tensorboard.summary.writer.event_file_writer._global_uid", count)
    sinks = Sinks([Config().open(str(tmp_path), 0, 10)])
    for step, value in ((1, 1.0), (2, "no number"), (3, 3.0)):
        sinks.scalars(step, {"loss": value})
    sinks.close()
    assert read_events(tmp_path)[1] == {"train/loss": [(1, 1.0), (3, 3.0)]}


@pytest.mark.integration
def test_one_command_shows_several_runs_side_by_side(tmp_path):
    for name in ("first", "second"):
        write_run(tmp_path / name)
    port = free_port()
    command = [ROOT / "launch/tensorboard.sh", "--port", str(port), "first", "second"]
    server = subprocess.Popen(command, cwd=tmp_path, env=environment({}), stderr=subprocess.PIPE, text=True)
    try:
        end = time.time() + 60
        runs = {}
        while set(runs) != {"first/.", "second/."}:
            assert time.time() < end, runs
            time.sleep(0.5)
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/data/plugin/scalars/tags", timeout=10) as answer:
                    runs = json.load(answer)
            except OSError:
                continue
        assert "train/loss" in runs["second/."]
    finally:
        server.terminate()
        server.communicate(timeout=30)


def test_a_folder_that_is_no_run_is_named(tmp_path):
    done = subprocess.run([ROOT / "launch/tensorboard.sh", str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 2
    assert f"{tmp_path}: no run directory" in done.stderr
