"""What a run must survive, with real processes and real signals: the fire drill, signals at any moment, hangs, slow
ranks. Nothing is lost: each step exactly once, the same samples, the same final weights bit by bit."""

import contextlib
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest

from pipeline import checkpoint
from pipeline.drill import DRILLS, main
from pipeline.job import Job
from pipeline.rehearsal import compare, last_step, newest_checkpoint, read_result
from tests.conftest import ROOT, data, environment, free_port, slow_saves, start, until
from tests.pipeline.test_faults import Server

TINY = ["model.width=32", "model.depth=2", "model.heads=2", "model.mlp_dim=64", "schedule.warmup_steps=5"]
WORDS = [*TINY, "data.workers=1", "run.epochs=null", "run.log_every_steps=1", "data.log_samples=true",
         "monitor=[jsonl]", "run.deterministic=true"]  # fmt: skip
CONFIG = ["--config", str(ROOT / "configs/digits.yaml")]
ONE_THREAD = {"OMP_NUM_THREADS": "1"}


def drill(digits, folder, *words):
    """Holds a drill as a user would: (exit code, output, table)."""
    command = [sys.executable, "-m", "pipeline.drill", *CONFIG, *TINY, "data.workers=1", *data(digits), *words]
    command += ["--dir", str(folder / "drill"), "--json", str(folder / "drill.json")]
    done = subprocess.run(
        command, cwd=ROOT, env=environment({}), timeout=1700, text=True, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )  # fmt: skip
    rows = json.loads((folder / "drill.json").read_text()) if (folder / "drill.json").exists() else []
    return done.returncode, done.stdout, {row.get("drill", row.get("number")): row for row in rows}


@pytest.mark.survival
@pytest.mark.timeout(1800)
def test_the_whole_drill_loses_nothing(digits, tmp_path):
    code, output, rows = drill(digits, tmp_path, "--steps", "36", "--kills", "6")
    assert code == 0, output
    assert list(rows) == ["kill", "sigterm", "disk", "nan", "stop", "fewer-ranks", "kills"]
    assert all(row["lost"] == [] for row in rows.values())
    assert rows["sigterm"]["repeated_steps"] == 0
    assert rows["kills"]["done"] == "6 SIGKILLs at random moments"
    assert "nothing was lost" in output


@pytest.mark.survival
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    ("zero_stage", "drills"),
    [
        (0, ["fewer-ranks"]),
        (1, ["fewer-ranks"]),
        (2, ["fewer-ranks"]),
        (3, ["kill", "nan"]),
        pytest.param(3, list(DRILLS), marks=pytest.mark.slow),
    ],
)
def test_drills_lose_nothing_under_zero(digits, tmp_path, zero_stage, drills):
    words = [f"engine.zero_stage={zero_stage}", "--steps", "24", "--only", *drills]
    code, output, rows = drill(digits, tmp_path, *words)
    assert code == 0, output
    assert list(rows) == drills


@pytest.mark.survival
@pytest.mark.timeout(1200)
def test_three_minutes_of_chaos_lose_nothing(tmp_path):
    """Its data set does not exist yet, as on a fresh machine."""
    code, output, rounds = drill(tmp_path / "digits", tmp_path, "--chaos", "3", "--seed", "0")
    assert code == 0, output
    print(output)
    assert all(played["lost"] == [] for played in rounds.values())
    faults = [kind for played in rounds.values() for kind in played["struck"]]
    assert len(rounds) >= 3
    assert len(faults) >= len(rounds), "some faults come too late: the run is over before them"
    assert f"{len(rounds)} rounds, {len(faults)} faults" in output


@pytest.mark.parametrize("minutes", ["nan", "inf", "0", "-1"])
def test_chaos_takes_a_number_of_minutes(minutes, capsys):
    assert main(["--chaos", minutes]) == 2
    assert "--chaos: expected a number of minutes above 0" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_fifty_sigkills_in_a_row_lose_nothing(digits, tmp_path):
    code, output, rows = drill(digits, tmp_path, "--steps", "600", "--kills", "50", "--only", "kills")
    assert code == 0, output
    assert rows["kills"]["done"] == "50 SIGKILLs at random moments"


def test_a_drill_that_loses_something_says_so(tmp_path):
    """The comparison itself: a step twice, another loss, other samples, a weight that is one bit off."""
    import torch
    from safetensors.torch import save_file

    def result(folder, losses, keys, weight):
        run = tmp_path / folder
        whole = run / "checkpoints/step-00000003"
        whole.mkdir(parents=True)
        lines = [{"step": step, "loss": loss, "learning_rate": 0.1} for step, loss in losses]
        (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        for rank, name in enumerate(keys):
            rows = "".join(json.dumps({"step": step, "samples": [f"{name}{step}"]}) + "\n" for step in (1, 2, 3))
            (run / f"samples-rank{rank}.jsonl").write_text(rows)
        save_file({"head": torch.tensor([1.0, weight])}, whole / "model-00001-of-00001.safetensors")
        (whole / "state.json").write_text(json.dumps({"step": 3, "updates": 3}))
        facts = {name: checkpoint._facts(str(whole / name)) for name in os.listdir(whole)}
        (whole / "manifest.json").write_text(json.dumps({"format": 2, "files": facts}))
        return read_result(str(run))

    losses = [(1, 3.0), (2, 2.0), (3, 1.0)]
    expected = result("expected", losses, "ab", 1.0)
    assert compare(result("same", losses, "ba", 1.0), expected, 3) == []
    other = result("other", [*losses[:2], (2, 2.0), (3, 1.0001)], "ac", 1.0 + 2**-23)
    lost = "\n".join(compare(other, expected, 3))
    assert "steps not exactly once: 2: 2" in lost
    assert "losses differ (here, without the fault): 3: (1.0001, 1.0)" in lost
    assert "other samples in steps 1: differ" in lost
    assert "1 of 1 final tensors differ: weights/head" in lost
    lost = "\n".join(compare(other, expected, 3, tolerance=1e-2))
    assert "tensors" not in lost
    assert "losses" not in lost
    assert "weights differ by" in "\n".join(compare(result("far", losses, "ab", 1.5), expected, 3, tolerance=1e-2))


@pytest.mark.survival
def test_ctrl_c_ends_a_drill_with_all_its_processes(digits, tmp_path):
    command = [sys.executable, "-m", "pipeline.drill", *CONFIG, *WORDS[:6], *data(digits), "--dir", str(tmp_path / "d")]
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment({"PIPELINE_TEST": str(tmp_path)}), text=True, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )  # fmt: skip
    until(lambda: len(marked(f"PIPELINE_TEST={tmp_path}")) >= 4)  # itself, the launcher, two ranks
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 130, output
    assert "interrupted; its processes are ended" in output
    assert marked(f"PIPELINE_TEST={tmp_path}") == []


def marked(variable):
    """The processes with a variable of this value."""
    found = []
    for name in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError):
            if variable.encode() in Path("/proc", name, "environ").read_bytes().split(b"\0"):
                found.append(int(name))
    return found


# Signals at any moment. One run of one process, stopped again and again, then compared with one that nothing befell.
LENGTH = [*WORDS, "run.steps=240", "checkpoint.every_steps=3", "run.evaluate_every_steps=3", "data.val_batch_size=8"]
SENDERS = ["SIGTERM", "SIGINT", "SIGUSR1", "STOP file"]


class Chain:
    """A run, started again and again; each start is stopped at a moment of our choice."""

    def __init__(self, folder, words, environ=ONE_THREAD):
        self.run, self.words, self.environ, self.starts = folder / "run", words, environ, 0

    def start(self):
        self.starts += 1
        self.run.parent.mkdir(exist_ok=True)
        output = str(self.run.parent / f"output-{self.starts}.txt")
        return Job([*CONFIG, *self.words, f"run.dir={self.run}"], 1, output, self.environ)

    def stop(self, job, how, whole_group=True):
        if how == "STOP file":
            self.run.mkdir(exist_ok=True)
            (self.run / "STOP").touch()
        else:
            job.send(signal.Signals[how], None if whole_group else [job.process.pid])

    def check_saved(self, job, how):
        """In order, nothing lost, and every checkpoint whole. Returns whether the run goes on."""
        assert job.wait(500) == 0, f"{how}: {job.said()}"
        ended = json.loads((self.run / "exit.json").read_text())
        if ended["status"] != "finished":
            assert (ended["status"], ended["reason"]) == ("saved: start me again", how), job.said()
        assert ended["step"] == last_step(str(self.run)) == newest_checkpoint(str(self.run)), job.said()
        for path in (self.run / "checkpoints").glob("step-*"):
            assert checkpoint.verify(str(path)) is None
        return ended["status"] != "finished"

    def lines(self):
        return [json.loads(line) for line in (self.run / "metrics.jsonl").read_text().splitlines()]

    def finish(self):
        job = self.start()
        assert job.wait(500) == 0, job.said()
        return read_result(str(self.run))


def catches_signals(job):
    """Whether a process blocks SIGTERM: its first lines have run."""
    with contextlib.suppress(OSError, StopIteration):
        lines = Path(f"/proc/{job.process.pid}/status").read_text().splitlines()
        blocked = int(next(line for line in lines if line.startswith("SigBlk")).split()[1], 16)
        return bool(blocked >> (signal.SIGTERM - 1) & 1)
    return False


def evaluates(run):
    """Whether the last line of the metrics is of a step that is being evaluated at this moment."""
    lines = (run / "metrics.jsonl").read_text().splitlines() if (run / "metrics.jsonl").exists() else []
    with contextlib.suppress(ValueError, IndexError):
        last = json.loads(lines[-1])
        return last["step"] % 3 == 0 and "learning_rate" in last
    return False


@pytest.fixture(scope="module")
def uninterrupted(digits, tmp_path_factory):
    return Chain(tmp_path_factory.mktemp("uninterrupted"), [*LENGTH, *data(digits)]).finish()


@pytest.mark.survival
@pytest.mark.timeout(1800)
def test_signals_at_random_moments_lose_no_step(digits, tmp_path, uninterrupted):
    """20 moments: 8 in start-up, 4 in evaluation, 4 in saving, 4 in training; to the process or its whole group."""
    with ThreadPoolExecutor(2) as pool:  # a start has one busy thread
        chains = [pool.submit(stop_again_and_again, digits, tmp_path / name, name) for name in "ab"]
        results = [chain.result() for chain in chains]
    for result in results:
        assert compare(result, uninterrupted, 240) == []


def stop_again_and_again(digits, folder, seed):
    draw = random.Random(seed)
    chain = Chain(folder, [*LENGTH, *data(digits)])
    moments = ["start-up"] * 4 + ["evaluation"] * 2 + ["saving"] * 2 + ["training"] * 2
    draw.shuffle(moments)
    for number, moment in enumerate(moments):
        how, before = SENDERS[(number + len(moments) * (seed == "b")) % 4], last_step(str(chain.run))
        job = chain.start()
        until(lambda job=job: catches_signals(job))
        if moment == "start-up":
            time.sleep(draw.choice([0.0, draw.uniform(0.0, 1.0), draw.uniform(0.0, 3.0)]))
        else:
            until(lambda before=before: last_step(str(chain.run)) > before)
            if moment == "evaluation":
                until(lambda: evaluates(chain.run))
            elif moment == "saving":
                until(lambda job=job: list((chain.run / "checkpoints").glob(".part-*")) or not job.running())
            else:
                time.sleep(draw.uniform(0.0, 0.1))
        chain.stop(job, how, whole_group=draw.random() < 0.7)
        assert chain.check_saved(job, how), f"the run was over after {number + 1} signals"
    return chain.finish()


@pytest.mark.integration
@pytest.mark.timeout(600)
@pytest.mark.parametrize("steps", [3, 5])
def test_a_long_evaluation_is_broken_off_and_made_up_for(digits, tmp_path, steps):
    """In the middle of a run and at its end: a batch system waits for seconds, an evaluation may take minutes."""
    words = [*WORDS, *data(digits), f"data.val={digits}/train-{{000..003}}.tar", "data.val_batch_size=1"]
    chain = Chain(tmp_path, [*words, f"run.steps={steps}", "run.evaluate_every_steps=3", "optimizer.ema_decay=0.9"])
    job = chain.start()
    until(lambda: evaluates(chain.run))
    chain.stop(job, "SIGTERM")
    assert chain.check_saved(job, "SIGTERM")
    assert newest_checkpoint(str(chain.run)) == 3
    assert not [line for line in chain.lines() if "val/top1" in line]
    chain.finish()
    evaluations = [line for line in chain.lines() if "val/top1" in line]
    assert [line["step"] for line in evaluations] == sorted({3, steps})
    assert all(line["val/count"] == line["val_ema/count"] == 1437 for line in evaluations)
    assert [line["step"] for line in chain.lines() if "loss" in line] == list(range(1, steps + 1))
    job = chain.start()
    assert job.wait(100) == 0
    assert f"the run is complete: finished after step {steps} of {steps}" in job.said()


@pytest.mark.survival
@pytest.mark.timeout(1200)
def test_a_signal_to_the_group_while_it_compiles_loses_no_step(digits, tmp_path):
    """While g++ runs: the signal reaches the compilers and their pool as well."""
    words = [*WORDS, *data(digits), "run.steps=12", "checkpoint.every_steps=4", "engine.compile=block"]
    cold = {**ONE_THREAD, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    chain = Chain(tmp_path / "chain", words, cold)
    job = chain.start()
    until(lambda: compilers(job) or not job.running())
    assert job.running(), job.said()
    chain.stop(job, "SIGTERM")
    assert chain.check_saved(job, "SIGTERM")
    result = chain.finish()
    reference = Chain(tmp_path / "reference", words, cold).finish()
    assert compare(result, reference, 12) == []


def compilers(job):
    """The processes that compile a kernel; those before them only try what the compiler can do."""
    found = []
    for pid in job.processes():
        with contextlib.suppress(OSError):
            words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
            if b"cc1plus" in words[0] and any(word.endswith(b".main.cpp") for word in words):
                found.append(pid)
    return found


@pytest.mark.survival
def test_a_third_signal_ends_a_run_at_once_and_what_a_launcher_repeats_is_one(digits, tmp_path):
    environ = {**ONE_THREAD, **slow_saves(tmp_path)}
    chain = Chain(tmp_path, [*WORDS, *data(digits), "run.steps=100000"], environ)
    job = chain.start()
    until(lambda: last_step(str(chain.run)) > 0)
    (tmp_path / "slow").write_text("100")  # so that it can't end before
    for _ in range(2):
        for _ in range(3):
            job.send(signal.SIGINT, [job.process.pid])
            time.sleep(0.05)
        time.sleep(0.7)
    assert job.running(), job.said()
    job.send(signal.SIGINT, [job.process.pid])
    assert job.wait(20) == 130
    ended = json.loads((chain.run / "exit.json").read_text())
    assert ended["status"] == "failed"
    assert ended["reason"] == "SIGINT, the third signal: ended without saving"


@pytest.mark.survival
def test_a_log_on_a_full_disk_ends_no_training(digits, tmp_path):
    words = [*WORDS, *data(digits), f"run.dir={tmp_path}", "run.steps=6", "monitor=[jsonl,progress]"]
    with open("/dev/full", "w") as full:
        process = start(*words, "health.nan_at_step=3", stdout=full, stderr=full)
        assert process.wait(200) == 0
    assert json.loads((tmp_path / "exit.json").read_text())["status"] == "finished"
    assert json.loads((tmp_path / "health.jsonl").read_text())["step"] == 4


# Ranks that die, stand still or are slow.
def two(digits, run, *words, environ=()):
    """Two ranks without a launcher that would end one when the other is gone."""
    common = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), **dict(environ)}
    words = [*WORDS, *(data(digits) if digits else []), f"run.dir={run}", "run.steps=100000", *words]
    return [start(*words, environ={**common, "RANK": rank, "LOCAL_RANK": rank}) for rank in ("0", "1")]


@pytest.mark.survival
def test_a_rank_that_dies_takes_the_other_down_within_seconds_without_a_launcher(digits, tmp_path):
    ranks = two(digits, tmp_path / "run")
    until(lambda: last_step(str(tmp_path / "run")) > 2)
    ranks[1].kill()
    began = time.monotonic()
    output, _ = ranks[0].communicate(timeout=60)
    assert time.monotonic() - began < 20
    assert ranks[0].returncode == 1, output
    assert "rank 0: another rank ended and this one can't go on" in output
    ranks[1].communicate()
    assert newest_checkpoint(str(tmp_path / "run")) == 0
    assert json.loads((tmp_path / "run/exit.json").read_text())["status"] == "failed"


@pytest.mark.survival
@pytest.mark.timeout(600)
def test_a_shard_that_hangs_is_named(digits, tmp_path):
    server = Server(digits)
    words = [f"data.train={server.url}/train-{{000..003}}.tar", "data.shuffle_pool=64", "data.val=null"]
    words += ["health.hang_seconds=6", "data.read.timeout_seconds=200", "data.read.deadline_seconds=500"]
    ranks = two(None, tmp_path / "run", *words)
    until(lambda: last_step(str(tmp_path / "run")) > 2)
    server.faults |= {f"train-{number:03d}.tar": ["always", "hang"] for number in range(4)}
    outputs = [rank.communicate(timeout=120)[0] for rank in ranks]
    server.shutdown()
    server.server_close()
    assert any(
        re.search(r"error: rank \d: got nowhere for 6 s in phase 'data' of step \d+, reading \S+/train-00\d.tar", text)
        for text in outputs
    ), outputs
    assert 3 in [rank.returncode for rank in ranks]


def slow_down(processes, share, seconds):
    """Has processes stand still for 3 ms again and again, a share of their time."""
    began, stopped = time.perf_counter(), 0.0
    while time.perf_counter() < began + seconds:
        stopping = time.perf_counter()
        for process in processes:
            process.send_signal(signal.SIGSTOP)
        time.sleep(0.003)
        for process in processes:
            process.send_signal(signal.SIGCONT)
        stopped += time.perf_counter() - stopping
        time.sleep(max(0.0, began + stopped / share - time.perf_counter()))


@pytest.mark.survival
@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("what", "share", "words", "reason"),
    [
        (
            "rank", 0.3, ["model.width=192", "model.depth=6", "model.heads=3", "model.mlp_dim=768"],
            r"its forward pass takes [\d.]+ ms, [\d.]+ times the ranks' median",
        ),
        (
            "workers", 0.95, [],
            r"it waits [\d.]+ of a step's [\d.]+ ms for data, the ranks' median [\d.]+ ms",
        ),
    ],
    ids=["rank", "workers"],
)  # fmt: skip
def test_a_rank_slowed_by_30_percent_is_named_at_the_next_log_step(digits, tmp_path, what, share, words, reason):
    """Rank 1, or its data workers, stand still 3 ms at a time: a forward pass, or a step without data, takes longer."""
    words = [*words, "run.log_every_steps=20", "monitor=[jsonl]", "data.global_batch_size=128"]
    for trial in range(3):
        run = tmp_path / f"run{trial}"
        ranks = two(digits, run, *words, environ=ONE_THREAD)
        until(lambda: last_step(str(run)) >= 20, pause=0.5)  # noqa: B023  # or it would be us who slow a rank down
        rank = psutil.Process(ranks[1].pid)
        processes = [rank] if what == "rank" else rank.children()
        slowed = first = last_step(str(run))
        while first == slowed:
            slow_down(processes, share, seconds=0.2)
            first = last_step(str(run))
        while last_step(str(run)) < first + 20:  # an interval in which it was slow all the time
            slow_down(processes, share, seconds=0.5)
        for process in ranks:
            process.send_signal(signal.SIGTERM)
        output = ranks[0].communicate(timeout=120)[0]
        ranks[1].communicate(timeout=120)
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        told = re.findall(rf"step (\d+): rank (\d) \(\S+: CPU\) is slow: {reason}", output)
        named = {rank for step, rank in told if slowed < int(step) <= first + 20}
        if not any(rank == "1" and int(step) <= slowed for step, rank in told):
            break  # else this machine had slowed it before, and a rank that stays slow is named once
    assert named == {"1"}, (slowed, first, output, lines)
    line = next(line for line in lines if line["step"] == first + 20)
    if what == "rank":
        assert line["slowest_rank"] == 1
        assert 1.2 < line["slowest_rank_ratio"] < 1.8
    else:
        assert line["longest_data_wait_rank"] == 1
        assert line["longest_data_wait_seconds"] > 0.01
