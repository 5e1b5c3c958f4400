"""No sink ends a run, and each evaluation stands once in metrics.jsonl."""

import json

import pytest

from pipeline.errors import UserError
from pipeline.monitor.jsonl import Config, Lines, read_lines, restore_logs
from pipeline.monitor.sink import Sink, Sinks


class Broken(Sink):
    error: Exception | None = None

    def __init__(self):
        self.got = []

    def scalars(self, step, values):
        if self.error is not None:
            raise self.error
        self.got.append(step)


@pytest.mark.parametrize("error", [OSError(28, "full"), ValueError("nan"), AttributeError("x"), RuntimeError("dead")])
def test_a_sink_that_fails_is_told_once_and_tried_again(capfd, error):
    broken, other = Broken(), Broken()
    sinks = Sinks([broken, other])
    for step in range(1, 101):
        broken.error = error if 10 <= step < 60 else None
        sinks.step(step)
        sinks.scalars(step, {"loss": 1.0})
    sinks.close()
    assert broken.got == [*range(1, 10), *range(60, 101)]
    assert other.got == list(range(1, 101))
    told = [line for line in capfd.readouterr().err.splitlines() if line]
    assert len(told) == 2, told
    assert told[0].startswith(f"warning: Broken.scalars failed: {type(error).__name__}: {error}")
    assert told[1] == "warning: Broken.scalars works again"


def test_errors_of_another_kind_are_told_too(capfd):
    broken = Broken()
    sinks = Sinks([broken])
    for error in (OSError("full"), OSError("full"), ValueError("nan"), ValueError("nan")):
        broken.error = error
        sinks.scalars(1, {})
    assert capfd.readouterr().err.count("warning") == 2


def read(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_an_evaluation_that_is_caught_up_again_stands_once(tmp_path):
    """A start is stopped during the evaluation of step 4; the next ones catch up on it and crash before they save."""
    sink = Config().open(str(tmp_path), 0, 10)
    for step in range(1, 5):
        sink.scalars(step, {"loss": 1.0})
    saved = saved_states(sink)
    for start in range(3):
        restore_logs(str(tmp_path), saved, 4)
        sink = Config().open(str(tmp_path), 4, 10)
        sink.scalars(4, {"val/top1": 0.5, "val/count": 360.0})
        for step in range(5, 5 + start):
            sink.scalars(step, {"loss": 1.0})
    assert [line["step"] for line in read(tmp_path)] == [1, 2, 3, 4, 4, 5, 6]
    assert [line["step"] for line in read(tmp_path) if "val/top1" in line] == [4]


def saved_states(sink):
    return {"metrics.jsonl": sink.logs()[0].state()}


@pytest.fixture
def logs(tmp_path):
    """A run of ten steps with a checkpoint after the sixth: its directory, and what the checkpoint has of its logs."""
    run = tmp_path / "run [1]"
    run.mkdir()
    sink = Config().open(str(run), 0, 10)
    for step in range(1, 11):
        sink.scalars(step, {"loss": 1.0 / step})
        if step == 6:
            saved = saved_states(sink)
    return run, json.loads(json.dumps(saved))


def test_a_log_is_what_it_was_at_the_checkpoint(logs):
    run, saved = logs
    before = (run / "metrics.jsonl").read_bytes()
    (run / "metrics.jsonl").write_bytes(before[:-5])  # killed
    restore_logs(str(run), saved, 6)
    assert [line["step"] for line in read(run)] == [1, 2, 3, 4, 5, 6]
    sink = Config().open(str(run), 6, 10)
    for step in range(7, 11):
        sink.scalars(step, {"loss": 1.0 / step})
    assert (run / "metrics.jsonl").read_bytes() == before
    restore_logs(str(run), saved_states(sink), 10)
    assert (run / "metrics.jsonl").read_bytes() == before


def test_a_damaged_log_is_refused_wherever_it_is_damaged(logs):
    run, saved = logs
    path = run / "metrics.jsonl"
    whole = path.read_bytes()
    held = saved["metrics.jsonl"]["nbytes"]
    for at in range(len(whole)):
        for damaged in (whole[:at], whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :]):
            path.write_bytes(damaged)
            if at >= held:
                restore_logs(str(run), saved, 6)
                assert path.read_bytes() == whole[:held]
            else:
                with pytest.raises(UserError, match=r"metrics.jsonl: damaged: .*since the checkpoint of step 6"):
                    restore_logs(str(run), saved, 6)
                assert path.read_bytes() == damaged, "it must not be changed"
    path.unlink()
    restore_logs(str(run), saved, 6)  # moved away: a new one begins


def test_lines_that_a_full_disk_did_not_take_before_a_checkpoint_are_in_it(logs, monkeypatch):
    run, _ = logs
    sink = Config().open(str(run), 10, 20)
    whole = (run / "metrics.jsonl").read_bytes()
    sink.scalars(11, {"loss": 11.0})
    sink.lines.write({"step": 12, "loss": 12.0})  # the disk is full
    saved = saved_states(sink)
    sink.scalars(13, {"loss": 13.0})
    restore_logs(str(run), saved, 12)
    assert (run / "metrics.jsonl").read_bytes() == whole + b'{"step": 11, "loss": 11.0}\n{"step": 12, "loss": 12.0}\n'


def test_a_spike_that_was_rolled_back_stays_in_the_log(tmp_path):
    log = Lines(str(tmp_path / "health.jsonl"))
    log.write({"step": 3, "what": "not finite"})
    log.flush()
    saved = {"health.jsonl": log.state()}
    for step in (8, 9, 10):
        log.write({"step": step, "what": "spike"})
    log.flush()
    restore_logs(str(tmp_path), saved, 6, left_out={9})
    assert [entry["step"] for entry in read_lines(log.path)] == [3, 9]


def test_a_log_that_was_moved_away_may_begin_anew_more_than_once(tmp_path, capfd):
    """A crash before the next checkpoint leaves a short new log, which must not be held against the old one."""
    path = tmp_path / "metrics.jsonl"
    log = Lines(str(path))
    for step in (1, 2, 3):
        log.write({"step": step})
    log.flush()
    known = {"metrics.jsonl": log.state()}
    path.unlink()
    restore_logs(str(tmp_path), known, 3)
    assert f"{path}: is gone; a new one begins after step 3" in capfd.readouterr().err
    for _ in range(2):
        log = Lines(str(path))
        log.write({"step": 4})
        log.flush()  # killed
        restore_logs(str(tmp_path), known, 3)
        assert path.read_text() == ""
    log = Lines(str(path))
    log.write({"step": 4})
    log.flush()
    known = {"metrics.jsonl": log.state()}
    path.write_text(path.read_text().replace("4", "5"))
    with pytest.raises(UserError, match="have changed since the checkpoint of step 4"):
        restore_logs(str(tmp_path), known, 4)


def test_a_start_that_was_replaced_touches_no_log(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n')

    def replaced():
        raise UserError("another process has taken over")

    with pytest.raises(UserError, match="taken over"):
        restore_logs(str(tmp_path), {}, 1, guard=replaced)
    assert path.read_text().count("step") == 2
