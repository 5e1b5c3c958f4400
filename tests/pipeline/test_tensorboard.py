"""TensorBoard's page: what a run logs is what the page draws, and one command opens it on several runs."""

import json
import subprocess
import time
import urllib.request

import pytest

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
