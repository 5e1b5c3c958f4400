"""Data workers that die, hang or outlive their rank."""

import itertools
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import torch
import webdataset

from pipeline.data.index import load_index
from pipeline.data.loader import DataConfig, Loader, evaluation_stream
from pipeline.data.source import Pipes, ReadConfig, Source
from pipeline.data.workers import Workers
from pipeline.errors import Interrupted, WorkerDied
from pipeline.runtime import Ranks
from tests.conftest import ROOT, alive, environment, until
from tests.pipeline.test_faults import Server


def open_workers(produce, count=2, ahead=2):
    return Workers(produce, count, ahead, lambda: None, lambda number: f"data worker {number}")


@pytest.fixture
def closing():
    opened = []
    yield opened.append
    for workers in opened:
        workers.close()


def test_each_pass_is_whole_and_in_order(closing):
    workers = open_workers(lambda number: iter([(number, value) for value in range(5)]))
    closing(workers)
    for _ in range(3):
        workers.begin_pass()
        for value in range(5):
            assert [workers.take(number) for number in range(2)] == [(0, value), (1, value)]
        assert [workers.take(number) for number in range(2)] == [None, None]


def test_an_exception_in_a_worker_is_told_with_its_traceback(closing):
    workers = open_workers(lambda number: (1 // (2 - value) for value in itertools.count()))
    closing(workers)
    workers.begin_pass()
    assert [workers.take(0), workers.take(0)] == [0, 1]
    with pytest.raises(RuntimeError, match=r"(?s)data worker 0 failed:\nTraceback.*ZeroDivisionError"):
        workers.take(0)


@pytest.mark.parametrize("nbytes", [10, 4_000_000])
def test_a_killed_worker_is_named_whatever_it_was_doing(closing, nbytes):
    """Idle, or in the middle of a message that does not fit into the pipe: the other one is not blocked by it."""
    workers = open_workers(lambda number: iter([bytes(nbytes)] * 3))
    closing(workers)
    workers.begin_pass()
    workers.take(0)
    time.sleep(0.2)
    os.kill(workers.processes[1].pid, signal.SIGKILL)
    workers.processes[1].join()
    with pytest.raises(WorkerDied, match=r"data worker 1 \(process \d+\) ended by signal SIGKILL \(out of memory\?"):
        workers.check()
    assert len(workers.take(0)) == nbytes
    with pytest.raises(WorkerDied, match=r"data worker 1 .*SIGKILL"):
        list(iter(lambda: workers.take(1), None))


def test_an_idle_validation_worker_is_named_with_its_rank(digits):
    config = DataConfig(val=(f"{digits}/val-{{000..001}}.tar",), workers=2, val_batch_size=50)
    stream = evaluation_stream(config, load_index(config.val), (), 16, 10, Ranks(1, 2, 0, 1))
    loader = Loader(stream, 2, torch.device("cpu"))
    try:
        loader.workers.start()
        loader.check()
        os.kill(loader.workers.processes[0].pid, signal.SIGTERM)  # which the process group may get: ignored
        time.sleep(0.3)
        loader.check()
        os.kill(loader.workers.processes[0].pid, signal.SIGKILL)
        loader.workers.processes[0].join()
        with pytest.raises(
            WorkerDied, match=r"^validation data worker 0 of rank 1, idle, \(process \d+\) ended by sign"
        ):
            loader.check()
    finally:
        loader.close()


def test_a_worker_that_waits_for_a_silent_source_is_given_up_at_a_stop_and_ended_at_once(digits):
    server = Server(digits)
    server.faults = {f"val-00{number}.tar": ["always", "hang"] for number in range(2)}
    config = DataConfig(val=(f"{server.url}/val-{{000..001}}.tar",), workers=6, val_batch_size=50)
    index = load_index([f"{digits}/val-{{000..001}}.tar"])
    index.urls[:] = [f"{server.url}/val-00{number}.tar" for number in range(2)]
    stream = evaluation_stream(config, index, (), 16, 10, Ranks(0, 1, 0, 1))
    began = time.monotonic()
    loader = Loader(stream, 6, torch.device("cpu"), stop=lambda: time.monotonic() - began > 0.5)
    loader.start()
    with pytest.raises(Interrupted):
        next(iter(loader))
    pids = [process.pid for process in loader.workers.processes]
    assert time.monotonic() - began < 2.0
    began = time.monotonic()
    loader.close()
    assert time.monotonic() - began < 2.0  # torch joined them for 5 s each
    assert not any(map(alive, pids))
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("what", ["http", "pipe", "pause"])
def test_a_stop_interrupts_every_wait_of_a_rank_that_reads_by_itself(digits, what):
    server = Server(digits)
    server.faults = {"val-000.tar": ["always", "hang" if what == "http" else 500]}
    url = "pipe:sleep 100" if what == "pipe" else f"{server.url}/val-000.tar"
    began = time.monotonic()
    source = Source(ReadConfig(timeout_seconds=60, allow_pipe=True), stop=lambda: time.monotonic() - began > 0.5)
    with pytest.raises(Interrupted):
        list(source.stream(url)) if what == "pipe" else source.read(url, 0, 10)
    assert time.monotonic() - began < 2.0
    source.close()
    server.shutdown()
    server.server_close()


def test_a_command_that_has_closed_its_output_and_goes_on_is_not_waited_for():
    began = time.monotonic()
    with pytest.raises(TimeoutError, match="silent"):
        list(Pipes().chunks("exec >&-; sleep 100", 0, None, 0.5))
    assert time.monotonic() - began < 5


# What a process that is killed leaves behind.
def script(text, environ=()):
    """Starts Python code that prints numbers of processes on its first line; returns it and the numbers."""
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(text)], stdout=subprocess.PIPE, text=True, cwd=ROOT,
        env=environment(dict(environ)),
    )  # fmt: skip
    pids = [int(word) for word in process.stdout.readline().split()]
    assert pids
    assert all(map(alive, pids))
    return process, pids


def all_gone(pids, seconds=10.0):
    until(lambda: not any(map(alive, pids)), seconds, pause=0.05)


FULL = """
    import itertools, time
    from pipeline.data.workers import Workers
    from pipeline.data.loader import _prepare_worker
    workers = Workers(lambda number: itertools.repeat("x" * 300_000), 3, 4, _prepare_worker, str)
    workers.begin_pass()
    time.sleep(1)  # all wait with full pipes
    print(*[process.pid for process in workers.processes], flush=True)
"""


def test_workers_with_full_pipes_end_with_a_killed_rank():
    process, pids = script(FULL + "    time.sleep(100)")
    process.kill()
    process.communicate()
    all_gone(pids, 3)


def test_an_exception_that_skips_close_hangs_nothing():
    process, pids = script(FULL + "    raise SystemExit(7)")
    assert process.wait(20) == 7
    process.stdout.close()
    all_gone(pids, 3)


def test_commands_end_with_a_killed_worker_and_with_a_killed_rank(tmp_path):
    """One that a thread of a pool has started, and one of the rank; with what the command itself has started."""
    process, pids = script(f"""
        import itertools, time, threading
        from concurrent.futures import ThreadPoolExecutor
        from pipeline.data.source import Pipes
        from pipeline.data.workers import Workers
        command = "echo $$ >> {tmp_path}/pids; sleep 1000 & echo $! >> {tmp_path}/pids; wait"
        def produce(number):
            pipes = Pipes()
            with ThreadPoolExecutor(1) as pool:
                for _ in itertools.count():
                    yield pool.submit(lambda: list(pipes.chunks(command, 0, None, 500))).result()
        workers = Workers(produce, 1, 1, lambda: None, str)
        workers.begin_pass()
        pipes = Pipes()
        threading.Thread(target=lambda: list(pipes.chunks(command, 0, None, 500)), daemon=True).start()
        time.sleep(1.5)
        print(*[process.pid for process in workers.processes], flush=True)
        time.sleep(100)
    """)
    commands = [int(line) for line in (tmp_path / "pids").read_text().split()]
    assert len(commands) == 4
    assert all(map(alive, commands))
    os.kill(pids[0], signal.SIGKILL)
    until(lambda: sum(map(alive, commands)) == 2, 5)
    process.kill()
    process.communicate()
    all_gone([*pids, *commands], 5)


POOLS = {
    "write and verify": """
        import os, time
        from pipeline.data.parallel import in_processes
        print(os.getpid(), flush=True)
        for _ in in_processes(time.sleep, [(100,)] * 4, 2): ...
    """,
    "index": """
        import os, sys
        from pipeline import shards
        print(os.getpid(), flush=True)
        sys.argv = ["shards", "index", "FOLDER/*.tar", "--processes", "2"]
        shards.main()
    """,
}


@pytest.mark.parametrize("command", POOLS)
def test_the_processes_of_shards_commands_end_with_their_parent(command, tmp_path):
    """Pool, fork server and the tracker of shared resources."""
    with webdataset.TarWriter(f"{tmp_path}/0.tar") as writer:
        for number in range(1000):
            writer.write({"__key__": str(number), "png": b"image", "cls": "0"})
    for number in range(1, 2000):  # minutes of work
        os.link(f"{tmp_path}/0.tar", f"{tmp_path}/{number}.tar")
    process, _ = script(POOLS[command].replace("FOLDER", str(tmp_path)), {"PIPELINE_TEST": command})
    ours = f"PIPELINE_TEST={command}".encode()

    def found():
        pids = []
        for path in Path("/proc").glob("[0-9]*/environ"):
            try:
                if ours in path.read_bytes().split(b"\0"):
                    pids.append(int(path.parent.name))
            except OSError:
                continue
        return pids

    until(lambda: len(found()) >= 5, 30)  # itself, server, tracker, two workers
    process.kill()
    process.wait()
    process.stdout.close()  # not read to its end, which orphans would hold open
    until(lambda: not found(), 10)
