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
    assert "note  labels mixed" in output
    assert "note  bytes fetched" in output


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
    log.write_text("\n".join([*lines[:-1], json.dumps(entry), ""]))
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 1
    assert f"1 differ; other samples than planned in steps: {steps}" in done.stdout


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


STEPS = 100


@pytest.fixture
def logged_run(tmp_path):
    """Shards, and the log of a run that was stopped on four ranks and went on on two: (folder, run, findings of it)."""
    from pipeline.audit import Resolver, logged, played
    from pipeline.config import load_config
    from pipeline.data.source import Source

    shards, run = tmp_path / "shards", tmp_path / "run [1]"
    shards.mkdir()
    run.mkdir()
    write_uneven(shards, [300, 20, 500])
    (tmp_path / "config.yaml").write_text(
        yaml.safe_dump({"run": {"epochs": 2}, "data": {"train": "TRAIN", "global_batch_size": 64}})
    )

    def plan(folder):
        words = [f"data.train={folder}/train-{{000..002}}.tar"]
        config = load_config(str(tmp_path / "config.yaml"), words)
        source = Source(config.data.read)
        return config, load_index(config.data.train, source=source), source

    config, index, _ = plan(shards)
    names = [f"{index.urls[shard]}: sample" for shard in range(3)]
    first = np.concatenate([[0], np.cumsum(index.counts)])
    for ranks, begin, end in ((4, 0, 40), (2, 40, STEPS)):
        for rank in range(ranks):
            lanes = [config.data.plan.lanes_of(rank, ranks)]
            with open(run / f"samples-rank{rank}.jsonl", "a") as file:
                for step, rows in enumerate(played(config.data.plan, Resolver(index, config), lanes, begin, end)):
                    samples = [f"{names[s]} {first[s] + n:06d}" for _, s, n, _ in rows.tolist()]
                    file.write(json.dumps({"step": begin + step + 1, "samples": samples}) + "\n")

    def find(start=0, steps=None, folder=shards):
        config, index, source = plan(folder)
        return logged(str(run), index, source, config, start, steps)

    return shards, run, find


def edit(path, change):
    entries = change([json.loads(line) for line in path.read_text().splitlines()])
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries))


def falsified(step, sample):
    def change(entries):
        entry = next(entry for entry in entries if entry["step"] == step)
        entry["samples"][5] = sample(entry["samples"][5])
        return entries

    return change


def test_all_logged_steps_are_compared(logged_run):
    _, run, find = logged_run
    assert (find().word, find().text) == ("ok", "4 ranks, 100 steps compared, 0 differ")
    edit(run / "samples-rank1.jsonl", falsified(97, lambda sample: sample[:-6] + "000001"))
    assert find().text == "4 ranks, 100 steps compared, 1 differ; other samples than planned in steps: 97"
    assert not find().fine
    assert find(steps=90).text == "4 ranks, 90 steps compared, 0 differ"
    assert find(start=97).fine
    assert not find(start=96, steps=1).fine


def test_steps_that_are_missing_or_stand_twice_or_lack_a_rank_are_found(logged_run):
    _, run, find = logged_run
    for rank in range(4):
        edit(run / f"samples-rank{rank}.jsonl", lambda lines: [e for e in lines if e["step"] not in (3, 7, 8, 9)])
    edit(run / "samples-rank2.jsonl", lambda lines: [entry for entry in lines if entry["step"] != 20])
    edit(run / "samples-rank0.jsonl", lambda lines: [*lines[:50], lines[49], *lines[50:]])
    finding = find()
    assert finding.word == "FAIL"
    for text in (
        "96 steps compared, 0 differ", "; not logged: steps: 3, 7-9;", "; logged twice: steps: 54;",
        "; logged by some of the ranks only: steps: 20",
    ):  # fmt: skip
        assert text in finding.text + ";", finding.text


def test_the_log_must_reach_as_far_as_the_metrics(logged_run):
    _, run, find = logged_run
    (run / "metrics.jsonl").write_text('{"step": 95}\n{"step": 102}\n')
    assert "not logged: steps: 101-102" in find().text
    # A kill: rank 1 had not written its last steps yet, and rank 0 was about to.
    (run / "metrics.jsonl").write_text('{"step": 95}\n')
    edit(run / "samples-rank1.jsonl", lambda lines: [entry for entry in lines if entry["step"] <= 96])
    (run / "samples-rank0.jsonl").write_bytes((run / "samples-rank0.jsonl").read_bytes()[:-100])
    assert find().fine, find().text
    (run / "metrics.jsonl").write_text('{"step": 97}\n')
    assert "logged by some of the ranks only: steps: 97" in find().text


def test_a_log_that_begins_later_says_how_to_check_the_rest(logged_run):
    _, run, find = logged_run
    for rank in range(4):
        edit(run / f"samples-rank{rank}.jsonl", lambda lines: [entry for entry in lines if entry["step"] > 30])
    assert find().text.endswith("not logged: steps: 1-30; if data.log_samples was set later, add --from-step 30")
    assert find(start=30).fine


def test_shards_that_have_moved_are_the_same_and_others_are_not(logged_run, tmp_path):
    shards, run, find = logged_run
    os.rename(shards, tmp_path / "elsewhere")
    assert find(folder=tmp_path / "elsewhere").fine
    for other in (
        lambda sample: sample.replace("train-002", "train-001"),
        lambda sample: sample.replace("/train-", "/other-train-"),
        lambda sample: sample + " ",
        lambda sample: sample.replace(": sample ", ": sample x: sample "),
    ):
        before = (run / "samples-rank1.jsonl").read_bytes()
        edit(run / "samples-rank1.jsonl", falsified(50, other))
        assert "1 differ" in find(folder=tmp_path / "elsewhere").text
        (run / "samples-rank1.jsonl").write_bytes(before)


def test_two_folders_with_shards_of_one_name_are_told_apart():
    from types import SimpleNamespace

    from pipeline.audit import Names

    index = SimpleNamespace(urls=["/a/train-0.tar", "/b/train-0.tar"], counts=np.array([2, 2]))
    names = Names(index, None)
    names.keys = {0: ["x", "key: sample 7"], 1: ["x", "key: sample 7"]}
    for folder, shard in (("a", 0), ("b", 1)):  # also where the folders have moved
        assert names.match(f"/new/{folder}/train-0.tar: sample x", [0, shard, 0, 0])
        assert names.match(f"/new/{folder}/train-0.tar: sample key: sample 7", [0, shard, 1, 0])
        assert names.match(f"/new/{folder}/train-0.tar: sample 1 of 2", [0, shard, 1, 0])
        assert not names.match(f"/new/{folder}/train-0.tar: sample 0 of 2", [0, shard, 1, 0])
        assert not names.match(f"/new/{folder}/train-0.tar: sample 7", [0, shard, 1, 0])
        assert not names.match(f"/new/{folder}/train-0.tar: sample x", [0, 1 - shard, 0, 0])


def test_thousands_of_steps_are_compared_in_seconds(logged_run):
    *_, find = logged_run
    began = time.perf_counter()
    find()
    assert (time.perf_counter() - began) / STEPS * 2470 < 30, "seconds for 2,470 steps of 64 samples"
