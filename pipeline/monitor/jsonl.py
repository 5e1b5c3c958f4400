"""`metrics.jsonl`: one JSON object a log interval."""

import json
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from pipeline.files import replacing
from pipeline.monitor.sink import Sink


@dataclass(frozen=True, kw_only=True)
class Config:
    def open(self, run_dir: str, start_step: int, total_steps: int) -> Sink:
        return JsonLines(os.path.join(run_dir, "metrics.jsonl"), start_step)


class Lines:
    """Appends JSON objects to a file. What a full disk does not take is kept, and tried again at the next `flush`."""

    def __init__(self, path: str):
        self.path, self.pending, self.failed = path, b"", False

    def write(self, entry: dict[str, Any]) -> None:
        self.pending += json.dumps(entry).encode() + b"\n"

    def flush(self) -> None:
        try:
            if self.pending:
                with open(self.path, "ab", buffering=0) as file:
                    while self.pending:
                        self.pending = self.pending[file.write(self.pending) or 0 :]
            if self.failed:
                print(f"\nwarning: {self.path}: can be written again", file=sys.stderr, flush=True)
            self.failed = False
        except OSError as error:
            if not self.failed:
                print(f"\nwarning: {self.path}: {error.strerror}; tried again later", file=sys.stderr, flush=True)
            self.failed = True


class JsonLines(Sink):
    def __init__(self, path: str, start_step: int):
        self.start_step = start_step
        drop_lines_after(path, start_step)
        self.lines = Lines(path)

    def scalars(self, step: int, values: dict[str, float]) -> None:
        self.lines.write({"step": step, **values})
        if step == self.start_step:
            # The evaluation in which the last start was stopped. If a start has caught up on it already and crashed
            # before its next checkpoint, its line is there.
            keep_lines(self.lines.path, lambda entry: entry["step"] < step or entry.keys().isdisjoint(values))
        self.lines.flush()

    def flush(self) -> None:
        self.lines.flush()

    def close(self) -> None:
        self.lines.flush()


def read_lines(path: str) -> Iterator[dict[str, Any]]:
    """The objects of a file of JSON lines that have a step, if there is such a file. Damaged lines are left out."""
    for _, entry in _lines(path):
        if entry is not None:
            yield entry


def drop_lines_after(path: str, step: int) -> None:
    """A resumed run repeats the steps after its checkpoint: their lines must not stand twice."""
    keep_lines(path, lambda entry: entry["step"] <= step)


def keep_lines(path: str, wanted: Callable[[dict[str, Any]], bool]) -> None:
    """Removes all other lines of a file, and damaged ones: a killed process may leave half a line at the end."""
    if not os.path.exists(path):
        return
    damaged = 0
    with replacing(path) as file:
        for line, entry in _lines(path):
            if entry is not None and wanted(entry):
                file.write(line)
            damaged += entry is None and line.endswith(b"\n")
    if damaged:
        print(f"\nwarning: {path}: removed {damaged} lines that are not readable", file=sys.stderr, flush=True)


def _lines(path: str) -> Iterator[tuple[bytes, dict[str, Any] | None]]:
    """Each line with its object; None where it is damaged."""
    if not os.path.exists(path):
        return
    with open(path, "rb") as file:
        for line in file:
            try:
                entry = json.loads(line)
                whole = line.endswith(b"\n") and isinstance(entry["step"], int)
            except (ValueError, KeyError, TypeError):
                whole = False
            yield line, entry if whole else None
