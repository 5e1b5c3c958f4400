"""Ends of a run with real processes: stops while nothing comes, killed ranks, workers and launchers, slow saves.

Nothing is lost, and ten seconds later no process and no shared memory is left.
"""

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from pipeline.drill import last_step, newest_checkpoint
from tests.conftest import ROOT, data, environment, free_port, slow_saves, start, two_ranks, until
from tests.integration.test_survival import CONFIG, TINY, WORDS, marked, two
from tests.pipeline.test_faults import Server

pytestmark = [pytest.mark.survival, pytest.mark.timeout(600)]
LONG = "run.steps=100000"


class Run:
    """Processes that are found by a variable, whoever is their parent."""

    def __init__(self, folder):
        self.path, self.mark = folder / "run", f"PIPELINE_TEST={folder}"
        self.environ = {"PIPELINE_TEST": str(folder)}
        self.processes = []

    def start(self, *words, environ=(), **options):
        environ = {**self.environ, **dict(environ)}
        self.processes.append(start(*WORDS, *words, f"run.dir={self.path}", environ=environ, **options))
        return self.processes[-1]

    def wait_for_step(self, step, *processes):
        until(
            lambda: last_step(str(self.path)) >= step or any(process.poll() is not None for process in processes),
            300,
            0.05,
        )
        assert last_step(str(self.path)) >= step, [process.communicate()[0] for process in processes]

    def all_gone(self, seconds=10.0):
        pids = marked(self.mark)
        until(lambda: not marked(self.mark), seconds, pause=0.05)
        assert not [
            name for name in os.listdir("/dev/shm") if any(str(pid) in re.findall(r"\d+", name) for pid in pids)
        ]

    def ended(self):
        return json.loads((self.path / "exit.json").read_text())

    def check_saved(self, reason):
        assert self.ended()["status"] == "saved: start me again"
        assert re.fullmatch(reason, self.ended()["reason"])
        assert self.ended()["step"] == last_step(str(self.path)) == newest_checkpoint(str(self.path))

    def check_steps(self, steps):
        lines = [json.loads(line) for line in (self.path / "metrics.jsonl").read_text().splitlines()]
        assert [line["step"] for line in lines if "loss" in line] == list(range(1, steps + 1))

    def finish(self, steps, *words):
        process = self.start(*words, f"run.steps={steps}")
        assert process.wait(300) == 0, process.communicate()[0]
        self.check_steps(steps)


@pytest.fixture
def run(tmp_path):
    run = Run(tmp_path)
    yield run
    for pid in marked(run.mark):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    for process in run.processes:
        process.wait()
        process.stdout.close()


@pytest.fixture
def silent(digits):
    """A server of the digits; `silent.fall()` and it answers no more."""
    server = Server(digits)
    server.fall = lambda: server.faults.update(
        {path.name: ["always", "hang"] for path in digits.iterdir() if path.suffix != ".json"}
        | {"index.json": ["always", "hang"]}
    )
    server.words = ["data.shuffle_pool=64", "data.read.timeout_seconds=200", "data.read.deadline_seconds=500"]
    yield server
    server.shutdown()
    server.server_close()


def from_server(server, val="null"):
    return [f"data.train={server.url}/train-{{000..003}}.tar", f"data.val={val}", *server.words]


# Stops while nothing comes.
@pytest.mark.parametrize("workers", [0, 1])
def test_a_stop_while_storage_is_silent_saves_within_seconds(digits, run, silent, workers):
    process = run.start(*from_server(silent), LONG, f"data.workers={workers}")
    run.wait_for_step(3, process)
    silent.fall()
    until(lambda: time.time() - (run.path / "metrics.jsonl").stat().st_mtime > 2.0, pause=0.2)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=15)
    assert process.returncode == 0, output
    run.check_saved("SIGTERM")
    run.all_gone()
    run.finish(run.ended()["step"] + 2, *data(digits)[:1], "data.val=null", "data.shuffle_pool=64")


@pytest.mark.parametrize("told", [0, 1])
def test_a_stop_is_heard_on_the_rank_whose_storage_is_silent(digits, run, silent, told):
    """The signal comes to one rank only: the silent one, or the other one, which waits for its vote."""
    urls = [f"{silent.url}/train-{{000..003}}.tar", f"{digits}/train-{{000..003}}.tar"]
    common = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), **run.environ}
    words = [*WORDS, *silent.words, "data.val=null", LONG, f"run.dir={run.path}"]
    ranks = [
        start(*words, f"data.train={urls[rank]}", environ={**common, "RANK": str(rank), "LOCAL_RANK": str(rank)})
        for rank in range(2)
    ]
    run.wait_for_step(3, *ranks)
    silent.fall()
    until(lambda: time.time() - (run.path / "metrics.jsonl").stat().st_mtime > 2.0, pause=0.2)
    ranks[told].send_signal(signal.SIGTERM)
    outputs = [rank.communicate(timeout=20)[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], outputs
    run.check_saved("SIGTERM|a stop on another rank")
    run.all_gone()


@pytest.mark.parametrize("split", ["train", "val"])
def test_a_stop_while_an_index_is_read_ends_the_start_at_once(digits, run, silent, split):
    run.finish(2, *data(digits))
    silent.fall()
    url = f"data.{split}={silent.url}/{split}-{{000..001}}.tar"
    words = [*data(digits), url, *silent.words[1:], LONG]  # but the size of the pool, which may not change
    process = run.start(*words)
    until(lambda: silent.requests or process.poll() is not None, 60, 0.1)
    time.sleep(0.5)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=10)
    assert process.returncode == 0, output
    run.check_saved("SIGTERM")
    assert run.ended()["step"] == 2
    run.all_gone()


def test_an_evaluation_whose_storage_is_silent_is_broken_off_and_made_up_for(digits, run, silent):
    silent.faults = {f"val-00{number}.tar": ["always", "hang"] for number in range(2)}
    words = ["run.evaluate_every_steps=3", "data.val_batch_size=8"]
    process = run.start(
        data(digits)[0], f"data.val={silent.url}/val-{{000..001}}.tar", *silent.words, *words, LONG, "data.workers=2"
    )
    run.wait_for_step(3, process)
    time.sleep(1)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=15)
    assert process.returncode == 0, output
    run.check_saved("SIGTERM")
    run.finish(5, *data(digits), "data.shuffle_pool=64", *words)
    lines = [json.loads(line) for line in (run.path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "val/top1" in line] == [3, 5]


@pytest.mark.parametrize("name", ["SIGHUP", "SIGUSR2"])
def test_a_signal_that_batch_systems_and_terminals_send_saves(digits, run, name):
    process = run.start(*data(digits), LONG)
    run.wait_for_step(2, process)
    process.send_signal(signal.Signals[name])
    output, _ = process.communicate(timeout=30)
    assert process.returncode == 0, output
    run.check_saved(name)


def test_a_hangup_that_is_ignored_ends_nothing(digits, run):
    process = run.start(*data(digits), LONG, launcher=("nohup", "python"))
    run.wait_for_step(2, process)
    process.send_signal(signal.SIGHUP)
    run.wait_for_step(last_step(str(run.path)) + 20, process)
    process.terminate()
    output, _ = process.communicate(timeout=30)
    assert process.returncode == 0, output
    run.check_saved("SIGTERM")


# What is killed.
def test_a_killed_rank_takes_its_workers_along_and_the_other_rank_notices(digits, run):
    """With more keys waiting than a pipe holds: the ranks compute for longer than their workers read."""
    words = ["data.global_batch_size=1024", "model.width=192", "model.depth=6", "model.heads=3", "data.workers=2"]
    ranks = two(digits, run.path, *words, environ=run.environ)
    run.wait_for_step(3, *ranks)
    ranks[1].kill()
    began = time.monotonic()
    output, _ = ranks[0].communicate(timeout=30)
    assert time.monotonic() - began < 10
    assert ranks[0].returncode == 1, output
    assert "rank 0: another rank ended and this one can't go on" in output
    run.all_gone()
    ranks[1].communicate()


@pytest.mark.parametrize(
    "launcher", ["torchrun", "torchrun with preflight", "accelerate", "accelerate of one process", "deepspeed"]
)
def test_the_ranks_of_a_killed_launcher_save_and_end(digits, run, launcher):
    accelerate = ("accelerate", "launch", "--config_file", str(ROOT / "launch/accelerate/one_process.yaml"))
    command = {
        "torchrun": two_ranks(),
        "torchrun with preflight": two_ranks(),
        "accelerate": (*accelerate, "--multi_gpu", "--num_processes", "2", "--main_process_port", str(free_port())),
        "accelerate of one process": accelerate,
        "deepspeed": ("deepspeed", "--num_gpus", "2", "--master_port", str(free_port())),
    }[launcher]
    if launcher == "deepspeed":
        pytest.importorskip("deepspeed")
    script = "launch/start.py" if "preflight" in launcher else "pipeline/train.py"
    process = run.start(*data(digits), LONG, launcher=command, script=script)
    run.wait_for_step(5, process)
    for pid in marked(run.mark):
        if pid == process.pid or "deepspeed.launcher.launch" in words_of(pid):
            os.kill(pid, signal.SIGKILL)
    process.wait(10)
    run.all_gone(20)
    run.check_saved("the launcher has died|a stop on another rank")


def words_of(pid):
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_text().rstrip("\0").split("\0")
    return []


@pytest.mark.parametrize("when", ["it is idle", "it evaluates"])
def test_a_killed_validation_worker_is_named_and_costs_nothing(digits, run, when):
    """Between evaluations nobody waits for it. On rank 1: all ranks save, then that one says why."""
    words = [*data(digits), "run.evaluate_every_steps=5", "data.val_batch_size=8", "data.workers=2", "run.steps=40"]
    before = 0
    for _ in range(3 if when == "it is idle" else 1):
        common = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        ranks = [run.start(*words, environ={**common, "RANK": str(n), "LOCAL_RANK": str(n)}) for n in range(2)]
        run.wait_for_step(before + 2, *ranks)
        workers = psutil.Process(ranks[1].pid).children()  # two for training, then two for validation
        if when == "it evaluates":
            run.wait_for_step(5, *ranks)
        workers[-1].kill()
        outputs = [rank.communicate(timeout=30)[0] for rank in ranks]
        told = r"error: rank 1: validation data worker 1 of rank 1, (idle|reading \S+ from byte \d+), \(process \d+\)"
        assert re.search(told + " ended by signal SIGKILL", outputs[1]), outputs
        assert [rank.returncode for rank in ranks] == [0, 1], outputs
        assert run.ended()["status"] == "failed"
        assert "rank 1: validation data worker 1" in run.ended()["reason"]
        before = run.ended()["step"]
        assert before == last_step(str(run.path)) == newest_checkpoint(str(run.path))
        run.all_gone()
    run.finish(40, *words)


@pytest.mark.parametrize("workers", [1, 2])
def test_a_killed_training_worker_is_named_and_costs_nothing(digits, run, workers):
    process = run.start(*data(digits), LONG, f"data.workers={workers}")
    run.wait_for_step(5, process)
    psutil.Process(process.pid).children()[0].kill()
    output, _ = process.communicate(timeout=30)
    assert process.returncode == 1, output
    assert re.search(r"error: rank 0: training data worker 0, .*\(process \d+\) ended by signal SIGKILL", output)
    step = run.ended()["step"]
    assert step == last_step(str(run.path)) == newest_checkpoint(str(run.path))
    run.all_gone()
    run.finish(step + 2, *data(digits))


def test_the_compilers_of_a_killed_rank_end(digits, run, tmp_path):
    """While g++ runs, and of a pool that waits for more."""
    run.environ |= {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache"), "TORCHINDUCTOR_COMPILE_THREADS": "2"}
    for step in (0, 1):
        process = run.start(*data(digits), LONG, "engine.compile=block")
        if step:
            run.wait_for_step(step, process)
        else:
            until(lambda: any("cc1plus" in words_of(pid)[0] for pid in marked(run.mark) if words_of(pid)), 500, 0.02)
        assert process.poll() is None
        process.kill()
        run.all_gone()


def test_a_killed_drill_takes_its_job_along(digits, run, tmp_path):
    command = [sys.executable, "-m", "pipeline.drill", *CONFIG, *TINY, *data(digits), "--dir", str(tmp_path / "drill")]
    command += ["--steps", "100000"]
    drill = subprocess.Popen(
        command, cwd=ROOT, env=environment(run.environ), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    run.processes.append(drill)
    until(lambda: last_step(str(tmp_path / "drill/reference/run")) > 2 or drill.poll() is not None, 100, 0.05)
    drill.kill()
    run.all_gone()


def test_ranks_in_preflight_end_with_their_launcher(digits, run):
    """While they wait for storage."""
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        silent.settimeout(100)
        words = [*CONFIG, *TINY, f"data.train=http://127.0.0.1:{silent.getsockname()[1]}/train.tar", "data.val=null"]
        words += ["data.resampled=true", "run.epochs=null", LONG, f"run.dir={run.path}"]
        process = start(*words, launcher=two_ranks(), script="launch/start.py", environ=run.environ)
        run.processes.append(process)
        connection, _ = silent.accept()
        assert process.poll() is None, process.stdout.read()
        process.kill()
        run.all_gone()
        connection.close()


def test_evaluate_ends_whatever_fails(digits, run):
    run.finish(2, *data(digits))

    def evaluate(*words):
        config = ["--config", str(run.path / "config.yaml")]
        command = [sys.executable, "-m", "pipeline.evaluate", str(run.path), *config, "--workers", "2", *words]
        done = subprocess.run(
            command, cwd=ROOT, env=environment(run.environ), timeout=60, capture_output=True, text=True
        )  # fmt: skip
        run.all_gone()
        return done.returncode, done.stdout + done.stderr

    code, output = evaluate("--predictions", str(run.path / "none/predictions.csv"))
    assert code == 2
    assert f"there is no folder {run.path / 'none'}; name a file in a folder that exists" in output
    assert "image/s" not in output
    code, output = evaluate("--predictions", "/dev/full")  # found out at the end only
    assert code == 1
    assert "No space left on device" in output


# Launchers that lose patience.
@pytest.fixture
def slow_save(run, tmp_path):
    """A file with the seconds that the next write of a checkpoint takes."""
    run.environ |= slow_saves(tmp_path)
    return tmp_path / "slow"


def test_a_save_of_35_seconds_under_a_launch_script_is_not_cut_short(digits, run, slow_save):
    words = ["--ranks", "2", *WORDS, *data(digits), LONG, f"run.dir={run.path}"]
    process = start(*words, launcher=("bash",), script="launch/local.sh", environ=run.environ)
    run.processes.append(process)
    run.wait_for_step(5, process)
    slow_save.write_text("35")
    process.terminate()
    process.wait(90)
    run.check_saved("SIGTERM")
    run.all_gone()


def test_a_launcher_that_would_cut_a_save_short_is_told_of(digits, run, slow_save):
    """At the start, and when a checkpoint has taken more than half of its time: the rank can't change the limit."""
    process = run.start(*data(digits), LONG, "checkpoint.every_steps=20", launcher=two_ranks(),
                        environ={"TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "25"})  # fmt: skip
    run.wait_for_step(5, process)
    slow_save.write_text("13")
    run.wait_for_step(last_step(str(run.path)) + 60, process)
    process.terminate()
    output, _ = process.communicate(timeout=60)
    assert "warning: the launcher kills ranks that still save 25 s after a signal" in output
    told = re.findall(
        r"warning: a checkpoint took (\d+) s, and the launcher kills the ranks 25 s after a signal", output
    )
    assert len(told) == 1, output
    assert output.count("set TORCH_ELASTIC_SHUTDOWN_TIMEOUT=3600 for it") == 2
    run.check_saved("SIGTERM")
