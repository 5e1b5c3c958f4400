"""No sink ends a run, and each evaluation stands once in metrics.jsonl."""

import json

import pytest

from pipeline.monitor.jsonl import Config
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
    for start in range(3):
        sink = Config().open(str(tmp_path), 4, 10)
        sink.scalars(4, {"val/top1": 0.5, "val/count": 360.0})
        for step in range(5, 5 + start):
            sink.scalars(step, {"loss": 1.0})
    assert [line["step"] for line in read(tmp_path)] == [1, 2, 3, 4, 4, 5, 6]
    assert [line["step"] for line in read(tmp_path) if "val/top1" in line] == [4]
    # Stopped again in a later evaluation, and later still: what belongs to earlier steps stays.
    sink = Config().open(str(tmp_path), 6, 10)
    sink.scalars(6, {"val/top1": 0.6})
    assert [line["step"] for line in read(tmp_path) if "val/top1" in line] == [4, 6]
    assert [line["step"] for line in read(tmp_path) if "loss" in line] == [1, 2, 3, 4, 5, 6]
