"""`metrics.jsonl`: one JSON object a log interval."""

import json
import os
import sys
from collections.abc import Container
from dataclasses import dataclass
from typing import Any

from pipeline.files import write_durably
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
            self.failed = False
        except OSError as error:
            if not self.failed:
                print(f"\nwarning: {self.path}: {error.strerror}; tried again later", file=sys.stderr, flush=True)
            self.failed = True


class JsonLines(Sink):
    def __init__(self, path: str, start_step: int):
        drop_lines_after(path, start_step)
        self.lines = Lines(path)

    def scalars(self, step: int, values: dict[str, float]) -> None:
        self.lines.write({"step": step, **values})
        self.lines.flush()

    def close(self) -> None:
        self.lines.flush()


def drop_lines_after(path: str, step: int, keep: Container[int] = ()) -> None:
    """A resumed run repeats the steps after its checkpoint, but for those to `keep`: no line must stand twice."""
    if not os.path.exists(path):
        return
    kept = []
    with open(path) as file:
        for line in file:
            try:
                found = json.loads(line)["step"]
                if found <= step or found in keep:
                    kept.append(line)
            except (ValueError, KeyError):
                continue  # half a line of a killed run
    write_durably(path, "".join(kept))
