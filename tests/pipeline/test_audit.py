"""`audit`: what it proves, and that it finds what is wrong."""

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import yaml

from pipeline.data.index import load_index, write_index
from pipeline.data.order import Order, Plan
from tests.conftest import ROOT, SMALL, data, free_port, start, train


def write_uneven(folder, counts, classes=10, sorted_by_class=False):
    """Shards of `counts` samples. Their images are not real: an audit reads none."""
    import webdataset

    total, number = sum(counts), 0
    for shard, count in enumerate(counts):
        with webdataset.TarWriter(f"{folder}/train-{shard:03d}.tar", mtime=0) as writer:
            for _ in range(count):
                label = number * classes // total if sorted_by_class else number * 7919 % classes
                writer.write({"__key__": f"{number:06d}", "png": b"x", "cls": str(label)})
                number += 1
    write_index([f"{folder}/train-{shard:03d}.tar" for shard in range(len(counts))])


def audit(folder, shards, *words, options=()):
    config = {
        "run": {"epochs": 2},
        "model": {"num_classes": 10},
        "data": {"train": f"{folder}/train-{{000..{shards - 1:03d}}}.tar", "global_batch_size": 192, **dict(options)},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    command = [sys.executable, "-m", "pipeline.shards", "audit", "--config", str(folder / "config.yaml"), *words]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    return done.returncode, done.stdout + done.stderr


WORLD_SIZES = ("1", "2", "3", "4", "8", "64")


def test_any_number_of_ranks_and_workers_sees_each_sample_once_in_the_same_batches(tmp_path):
    counts = [1, 2300, 3, 700, 57, 1, 2, 190, 5, 11]
    write_uneven(tmp_path, counts)
    words = ["--world-size", *WORLD_SIZES, "--workers", *map(str, range(1, 9))]
    code, output = audit(tmp_path, len(counts), *words)
    assert code == 0, output
    assert output.count("ok    same global batches") == 48
    assert "2 whole epochs of 3,270 samples in 10 shards" in output
    assert "ok    labels mixed" in output
    assert ": not as mixed" not in output


def test_a_resume_in_the_middle_is_audited_as_well(tmp_path):
    write_uneven(tmp_path, [300, 20, 500])
    code, output = audit(tmp_path, 3, "--world-size", "3", "--from-step", "3", "--steps", "2")
    assert code == 0, output
    assert "2 steps from 3: 0 batches differ" in output


def test_shards_sorted_by_class_in_few_lanes_are_said_to_be_badly_mixed(tmp_path):
    write_uneven(tmp_path, [400] * 10, sorted_by_class=True)
    code, output = audit(tmp_path, 10, options={"lanes": 2, "shuffle_pool": 64}.items())
    assert code == 0
    assert "not as mixed, since 2 lanes with windows of 32 meet 10 shards" in output


def test_a_world_size_that_does_not_divide_is_a_mistake(tmp_path):
    write_uneven(tmp_path, [300])
    code, output = audit(tmp_path, 1, "--world-size", "5")
    assert code == 2
    assert "5 ranks do not divide the 192 lanes" in output


def test_audit_fails_where_a_sample_comes_twice(tmp_path, monkeypatch):
    from pipeline.audit import audit as run_audit
    from pipeline.config import load_config

    write_uneven(tmp_path, [300, 200])
    assert audit(tmp_path, 2)[0] == 0
    honest = Order.shuffled

    def twice(self, window):
        order = honest(self, window)
        return np.where(order == 1, 0, order)

    monkeypatch.setattr(Order, "shuffled", twice)
    findings = run_audit(load_config(str(tmp_path / "config.yaml")), [1], [1], 0, None, None)
    assert not findings[0].fine
    assert "samples twice" in findings[0].text


def test_audit_fails_where_ranks_would_see_other_batches(tmp_path, monkeypatch):
    from pipeline.audit import audit as run_audit
    from pipeline.config import load_config

    write_uneven(tmp_path, [300, 200])
    audit(tmp_path, 2)
    honest = Plan.lanes_of

    def exchanged(self, rank, world_size, worker=0, workers=1):
        return honest(self, world_size - 1 - rank, world_size, worker, workers)

    monkeypatch.setattr(Plan, "lanes_of", exchanged)
    findings = run_audit(load_config(str(tmp_path / "config.yaml")), [1, 2], [1], 0, None, None)
    assert [finding.fine for finding in findings[:3]] == [True, True, False]


def torchrun(ranks):
    return ("torchrun", "--nproc-per-node", str(ranks), "--master-port", str(free_port()))


@pytest.mark.integration
def test_stopped_on_four_ranks_and_resumed_on_two_a_run_sees_the_planned_samples(digits, tmp_path):
    words = [*SMALL, *data(digits), f"run.dir={tmp_path / 'run'}", "data.log_samples=true", "model.depth=1"]
    process = start(*words, "run.steps=100000", launcher=torchrun(4))
    end = time.time() + 120
    while not (tmp_path / "run/metrics.jsonl").exists() or not (tmp_path / "run/metrics.jsonl").read_text():
        assert time.time() < end
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=120)
    stopped = json.loads((tmp_path / "run/exit.json").read_text())
    assert stopped["status"] == "saved: start me again", output
    steps = stopped["step"] + 20
    code, output = train(*words, f"run.steps={steps}", launcher=torchrun(2))
    assert code == 0, output
    command = [sys.executable, "-m", "pipeline.shards", "audit", "--config", "configs/digits.yaml", "--world-size", "2",
               "--steps", str(steps), "--run", str(tmp_path / "run"), "--set", *data(digits)]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"4 ranks, {steps} steps compared, 0 differ" in done.stdout

    # One sample exchanged in the log is found.
    log = tmp_path / "run/samples-rank1.jsonl"
    lines = log.read_text().splitlines()
    entry = json.loads(lines[-1])
    entry["samples"][:2] = entry["samples"][1::-1]
    log.write_text("\n".join([*lines[:-1], json.dumps(entry)]))
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 1
    assert f"1 differ, the first is {steps - 1}" in done.stdout


def test_a_billion_samples_are_planned_in_a_moment(tmp_path):
    """A made-up index of 100,000 shards with 10,000 samples each: start of one worker's plan, and its memory."""
    script = """
import resource, time
import numpy as np
from pipeline.data.index import Index
from pipeline.data.order import Order, Plan
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
began = time.perf_counter()
shards = 100_000
counts = np.full(shards, 10_000)
columns = np.stack([counts * 110_000, counts, np.cumsum(counts) - 10_000, counts * 0, counts * 0 + 999, counts * 0], 1)
urls = [f"s3://bucket/imagenet-22k/train-{n:06d}.tar" for n in range(shards)]
checks = np.zeros(shards * 3, np.uint32)
index = Index(urls, columns, ["s3://bucket/imagenet-22k"], np.zeros(shards, np.int32), checks)
assert len(index.shard(99_999).checks) == 3
plan, order = Plan(1024, 4), Order(index.counts, 0, 1024, 16384)
for row in plan.rows(plan.lanes_of(7, 64, 3, 8), 123_456):
    window, slot = order.locate(row.lane, row.position)
    pieces, places = list(order.pieces(window)), order.shuffled(window)
seconds = time.perf_counter() - began
print(seconds, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024, index.samples)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT)
    seconds, mebibytes, samples = map(float, done.stdout.split())
    assert samples == 1e9
    assert seconds < 2
    assert mebibytes < 200


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda text: text.replace('"format": 3', '"format": 2'), "written in format 2, expected 3"),
        (lambda text: "{", "damaged: its content does not match its checksum"),
        (lambda text: text.replace('"samples": 3', '"samples": 2'), "damaged: its content does not match its checksum"),
        (lambda text: text[:-3], "damaged: its content does not match its checksum"),
    ],
    ids=["format", "garbage", "changed", "cut"],
)
def test_a_damaged_index_or_one_of_another_format_is_refused_with_the_command(tmp_path, spoil, message):
    from pipeline.errors import UserError

    write_uneven(tmp_path, [3])
    path = tmp_path / "index.json"
    path.write_text(spoil(path.read_text()))
    with pytest.raises(UserError, match=rf"index.json: {message}; run: python -m pipeline.shards index"):
        load_index(str(tmp_path / "train-000.tar"))
    assert os.path.exists(tmp_path / "index.bin")
