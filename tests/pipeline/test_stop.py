"""What stops a run, and what ends a process that does not end by itself."""

import os
import subprocess
import sys
import textwrap
import threading
import time

import pytest

from pipeline import runtime, watchdog
from pipeline.runtime import Ranks, Rendezvous, StopSignal, has_launcher, launcher_patience
from pipeline.watchdog import Watchdog
from tests.conftest import ROOT, alive, environment, until


def orphan(text, environ):
    """Runs Python code in a process whose parent ends as soon as the code has printed a line; returns its number."""
    code = "import signal, time\nfrom pipeline import runtime\n" + textwrap.dedent(text)
    parent = f"import subprocess, sys; p = subprocess.Popen([sys.executable, '-c', {code!r}], stdout=subprocess.PIPE);"
    parent += "p.stdout.readline(); print(p.pid)"
    done = subprocess.run(
        [sys.executable, "-c", parent],
        cwd=ROOT,
        env=environment(environ),
        stdout=subprocess.PIPE,
        text=True,
        timeout=60,
    )
    return int(done.stdout)


HANGS = """
    runtime.ORPHAN_SECONDS = 2.0
    stop = runtime.StopSignal().install()
    stop.training = {training}
    stop.progress = lambda: time.monotonic() if {grows} else float("-inf")
    stop.on_end = lambda reason: open({file!r}, "w").write(reason)
    print(flush=True)
    time.sleep(100)
"""


def test_a_rank_that_hangs_when_its_launcher_dies_is_ended_hard(tmp_path):
    pid = orphan(HANGS.format(file=str(tmp_path / "end"), grows=False, training=True), {"TORCHELASTIC_RUN_ID": "x"})
    until(lambda: not alive(pid), 10, 0.05)
    assert "the launcher has died, and nothing was saved for 2 s" in (tmp_path / "end").read_text()


def test_a_rank_that_is_still_starting_ends_with_its_launcher_at_once(tmp_path):
    pid = orphan(HANGS.format(file=str(tmp_path / "end"), grows=True, training=False), {"TORCHELASTIC_RUN_ID": "x"})
    until(lambda: not alive(pid), 5, 0.05)
    assert "while the run was starting" in (tmp_path / "end").read_text()


def test_a_rank_whose_checkpoint_still_grows_outlives_its_launcher(tmp_path):
    pid = orphan(HANGS.format(file=str(tmp_path / "end"), grows=True, training=True), {"TORCHELASTIC_RUN_ID": "x"})
    time.sleep(4)
    assert alive(pid)
    os.kill(pid, 9)


def test_a_shell_that_is_gone_stops_nothing(tmp_path):
    pid = orphan(HANGS.format(file=str(tmp_path / "end"), grows=False, training=True), {})
    time.sleep(4)
    assert alive(pid)
    os.kill(pid, 9)


def test_launchers_are_told_by_what_they_set():
    assert has_launcher({"TORCHELASTIC_RUN_ID": "none"})
    assert has_launcher({"ACCELERATE_DYNAMO_MODE": "default"})
    assert not has_launcher({"RANK": "0", "ACCELERATE_MIXED_PRECISION": "bf16"})


def test_the_patience_of_a_launcher_is_its_option_or_its_variable():
    assert launcher_patience({}) is None
    assert launcher_patience({"TORCHELASTIC_RUN_ID": "x"}) == 30.0
    assert launcher_patience({"TORCHELASTIC_RUN_ID": "x", "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "600"}) == 600.0
    ask = "import os; from pipeline.runtime import launcher_patience; print(launcher_patience(os.environ))"
    for words in (["--shutdown-timeout", "77"], ["--shutdown_timeout=77"]):
        launcher = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {ask!r}])"
        command = [sys.executable, "-c", launcher, *words]
        environ = environment({"TORCHELASTIC_RUN_ID": "x", "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "600"})
        assert subprocess.check_output(command, cwd=ROOT, env=environ, text=True) == "77.0\n"


def test_a_process_that_does_not_end_by_itself_is_ended():
    code = "import time; from pipeline.runtime import end_within; end_within(0.5, 5); time.sleep(100)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment({}), timeout=20).returncode == 5


def test_a_stop_file_is_seen_while_the_main_thread_is_busy(tmp_path, monkeypatch):
    monkeypatch.setattr(runtime, "LOOK_SECONDS", 0.05)
    stop = StopSignal()
    stop.watch(str(tmp_path / "STOP"))
    assert not stop.wanted()
    (tmp_path / "STOP").touch()
    until(lambda: stop.name == "STOP file", 5)


# A checkpoint that is slow, and one that hangs.
@pytest.fixture
def watched(tmp_path, monkeypatch):
    """A watchdog of 0.5 s that says how the process would have ended."""
    ended = []
    monkeypatch.setattr(Watchdog, "_end", lambda self, text: (ended.append(text), self.stopped.set()))
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    place = Rendezvous("127.0.0.1", 1, False, "x")
    dog = Watchdog(0.5, Ranks(0, 1, 0, 1), place, str(tmp_path), lambda: [], lambda message: None)
    yield dog, folder, ended
    dog.stop()


@pytest.mark.parametrize("phase", ["save", "backward"])
def test_a_slow_checkpoint_that_grows_is_no_hang(watched, phase):
    """By whichever rank, and wherever this one waits for it."""
    dog, folder, ended = watched
    part = folder / ".part-00000010-x"
    part.mkdir()
    dog.beat(phase, 9)
    dog.start()
    dog.arm()
    for _ in range(15):
        with open(part / "model-00002-of-00002.safetensors", "ab") as file:
            file.write(b"x" * 5000)
        time.sleep(0.1)
    assert not ended
    until(lambda: ended, 3)  # it does not grow any more
    assert "got nowhere for 0.5 s in phase" in ended[0]


@pytest.mark.parametrize("what", ["nothing", "a part of an earlier start", "a whole checkpoint"])
def test_a_checkpoint_that_does_not_grow_is_a_hang(watched, what):
    dog, folder, ended = watched
    if what != "nothing":
        part = folder / (".part-00000010-x" if "part" in what else "step-00000010")
        part.mkdir()
        (part / "model-00001-of-00001.safetensors").write_bytes(b"x" * 5000)
    began = time.monotonic()
    dog.beat("save", 9)
    dog.start()
    dog.arm()
    until(lambda: ended, 5)
    assert time.monotonic() - began < 2.0


def test_a_file_system_that_hangs_hides_no_hang(watched, monkeypatch):
    dog, _, ended = watched
    monkeypatch.setattr(watchdog.Growth, "_sizes", lambda self: threading.Event().wait())
    dog.beat("save", 9)
    dog.start()
    dog.arm()
    until(lambda: ended, 5)


def test_before_the_first_step_only_waits_for_data_are_watched(watched):
    """The first forward pass may compile for as long as it takes."""
    dog, _, ended = watched
    dog.beat("forward", 0)
    dog.start()
    time.sleep(1.2)
    assert not ended
    dog.beat("data", 0)
    until(lambda: ended, 5)
    assert "got nowhere for 0.5 s in phase 'data' of step 1" in ended[0]
