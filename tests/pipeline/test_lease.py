"""One writer a folder: leases are refused, waited for, taken over, and fenced."""

import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from pipeline import lease
from pipeline.errors import Interrupted, UserError
from tests.conftest import ROOT, environment

HOLD = """
import sys, time
from pipeline import lease
held = lease.acquire(sys.argv[1], "run", "run.dir=x")
print("held", flush=True)
while True:
    time.sleep(0.05)
    held.check()
"""


@pytest.fixture
def quick(monkeypatch):
    """Leases that expire after a second."""
    monkeypatch.setattr(lease, "BEAT_SECONDS", 0.1)
    monkeypatch.setattr(lease, "EXPIRES_SECONDS", 1.0)


@pytest.fixture
def elsewhere(monkeypatch):
    """Makes holders look as if they ran on another machine, where process numbers mean nothing."""
    spaces = iter(range(10**6))
    monkeypatch.setattr(lease, "_process_space", lambda: f"machine {next(spaces)}")


def holder(folder):
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(folder)], cwd=ROOT, env=environment({}), text=True, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )  # fmt: skip
    assert process.stdout.readline() == "held\n"
    return process


def test_a_live_holder_is_named_and_a_dead_one_is_replaced_at_once(tmp_path):
    process = holder(tmp_path)
    with pytest.raises(UserError, match=rf"run.dir=x: process {process.pid} on \S+ .* is writing there already"):
        lease.acquire(str(tmp_path), "run", "run.dir=x")
    assert str(process.pid) in lease.holder_of(str(tmp_path), "run")
    process.kill()
    process.communicate()
    assert lease.holder_of(str(tmp_path), "run") is None
    began = time.monotonic()
    with lease.acquire(str(tmp_path), "run", "run.dir=x") as held:
        held.check()
    assert time.monotonic() - began < 1.0


def test_a_stopped_holder_of_this_machine_is_alive(tmp_path, quick):
    process = holder(tmp_path)
    process.send_signal(signal.SIGSTOP)
    time.sleep(1.2)
    with pytest.raises(UserError, match="is writing there already"):
        lease.acquire(str(tmp_path), "run", "run.dir=x")
    process.kill()
    process.communicate()


def test_a_live_holder_elsewhere_is_told_by_its_beat(tmp_path, quick, elsewhere):
    with (
        lease.acquire(str(tmp_path), "run", "x"),
        pytest.raises(UserError, match=rf"process {os.getpid()} on \S+ .* is writing there already"),
    ):
        lease.acquire(str(tmp_path), "run", "x")


def test_a_silent_holder_elsewhere_expires_and_is_fenced(tmp_path, quick, elsewhere):
    stalled = lease.acquire(str(tmp_path), "run", "x")
    other_rank = lease.observe(stalled.path, "x")
    stalled.ended.set()  # it renews nothing any more
    began = time.monotonic()
    with lease.acquire(str(tmp_path), "run", "x") as held:
        assert 0.5 < time.monotonic() - began < 5.0
        held.check()
        for fenced in (stalled, other_rank):
            with pytest.raises(lease.LeaseLost, match="another process has taken over"):
                fenced.check()
        stalled.release()  # and that changes nothing for the new holder
        held.check()


def test_a_clock_that_is_wrong_changes_nothing(tmp_path, quick, elsewhere, monkeypatch):
    now = time.time
    with lease.acquire(str(tmp_path), "run", "x"):
        monkeypatch.setattr(time, "time", lambda: now() + 1e6)
        with pytest.raises(UserError, match="is writing there already"):
            lease.acquire(str(tmp_path), "run", "x")


def test_generations_grow_and_a_released_lease_is_free_at_once(tmp_path, elsewhere):
    for generation in (1, 2, 3):
        with lease.acquire(str(tmp_path), "run", "x") as held:
            assert held.path.endswith(f".run.lease-{generation:08d}")
    assert os.listdir(tmp_path) == [".run.lease-00000003"]
    assert json.loads((tmp_path / ".run.lease-00000003").read_text())["released"]


def test_a_fenced_contender_of_long_ago_cannot_take_a_released_lease_back(tmp_path, quick, elsewhere):
    """It has judged generation 1 to be dead; meanwhile 2 was taken and released."""
    first = lease.acquire(str(tmp_path), "run", "x")
    first.ended.set()
    lease.acquire(str(tmp_path), "run", "x").release()
    assert not lease._create(str(tmp_path / ".run.lease-00000002"))


def test_of_many_contenders_one_wins(tmp_path):
    """Processes that find a dead holder at the same moment."""
    process = holder(tmp_path)
    process.kill()
    process.communicate()
    script = HOLD.replace("while True", "time.sleep(3)\nwhile False")

    def contend(_):
        return subprocess.run(
            [sys.executable, "-c", script, str(tmp_path)], cwd=ROOT, env=environment({}), text=True,
            capture_output=True,
        )  # fmt: skip

    with ThreadPoolExecutor(6) as pool:
        ended = list(pool.map(contend, range(6)))
    assert [done.stdout for done in ended].count("held\n") == 1, [done.stderr[-300:] for done in ended]
    assert sum("is writing there already" in done.stderr for done in ended) == 5


def test_a_live_holder_is_waited_for(tmp_path):
    held = lease.acquire(str(tmp_path), "index", "x")
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(lease.acquire, str(tmp_path), "index", "x", wait_seconds=20.0)
        time.sleep(0.5)
        assert not waiting.done()
        held.release()
        waiting.result(timeout=5).release()


def test_two_names_are_two_leases(tmp_path):
    with lease.acquire(str(tmp_path), "write-val", "x"), lease.acquire(str(tmp_path), "write-val-small", "y") as held:
        held.check()


def test_a_half_written_record_is_judged_by_its_age(tmp_path, quick):
    (tmp_path / ".run.lease-00000007").write_text('{"host": "a"')
    began = time.monotonic()
    with lease.acquire(str(tmp_path), "run", "x") as held:
        assert held.path.endswith("-00000008")
    assert time.monotonic() - began > 0.5


def test_a_file_system_without_hard_links_will_do(tmp_path, monkeypatch):
    def refuse(*_):
        raise PermissionError("no links here")

    monkeypatch.setattr(os, "link", refuse)
    with lease.acquire(str(tmp_path), "run", "x"), pytest.raises(UserError, match="is writing there already"):
        lease.acquire(str(tmp_path), "run", "x")


def test_a_check_that_cannot_ask_says_so_and_recovers(tmp_path, monkeypatch):
    held = lease.acquire(str(tmp_path), "run", "x")

    def fail(*_):
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as broken:
        broken.setattr(os, "utime", fail)
        with pytest.raises(OSError, match="Input/output"):
            held.check()
    held.check()
    held.release()


def test_waiting_for_a_lease_to_expire_can_be_stopped(tmp_path, elsewhere):
    lease.acquire(str(tmp_path), "run", "x").ended.set()  # its holder is silent from now on
    began = time.monotonic()
    with pytest.raises(Interrupted):
        lease.acquire(str(tmp_path), "run", "x", stopped=lambda: time.monotonic() > began + 0.5)
    assert time.monotonic() - began < 3.0


def test_a_lease_from_the_future_expires_as_well(tmp_path, quick, elsewhere):
    """A server's clock was set back, or the folder was copied."""
    lease.acquire(str(tmp_path), "run", "x").ended.set()
    os.utime(tmp_path / ".run.lease-00000001", (time.time() + 7200,) * 2)
    began = time.monotonic()
    lease.acquire(str(tmp_path), "run", "x", stopped=lambda: time.monotonic() > began + 10.0).release()
    assert 0.5 < time.monotonic() - began < 5.0


def test_a_contender_that_comes_late_gets_no_lease_below_the_live_one(tmp_path, monkeypatch):
    """Between its look and its attempt, one start came and went and another one took over."""
    lease.acquire(str(tmp_path), "run", "x").release()
    create, held = lease._create, []

    def delayed(path):
        if not held:
            held.append(None)
            lease.acquire(str(tmp_path), "run", "x").release()
            held[0] = lease.acquire(str(tmp_path), "run", "x")
        return create(path)

    monkeypatch.setattr(lease, "_create", delayed)
    with pytest.raises(UserError, match="is writing there already"):
        lease.acquire(str(tmp_path), "run", "x")
    held[0].check()
    assert os.listdir(tmp_path) == [".run.lease-00000003"]
