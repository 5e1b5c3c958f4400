"""`metrics.jsonl`, and what all logs of JSON lines have in common: nothing in them is lost, stands twice or is damaged.

A checkpoint keeps the size and checksum of each log of the run directory. A resume refuses a log that does not begin
with what it held then, and removes what came later, since the steps after the checkpoint are repeated.
"""

import contextlib
import fnmatch
import glob
import hashlib
import io
import json
import os
import sys
from collections.abc import Callable, Container, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, BinaryIO

from pipeline.errors import UserError
from pipeline.files import no_link, sync, write_durably
from pipeline.monitor.sink import Sink
from pipeline.parsing import NotRegular, open_regular, read_json

HEALTH = "health.jsonl"
PATTERNS = ("metrics.jsonl", HEALTH, "quarantine.jsonl", "samples-rank*.jsonl")
RESTARTED = "restarted-logs.json"
CHUNK = 1 << 22
MAX_LINE_BYTES = 16 << 20  # a rank's samples of a step take 200 bytes each
BEGINNING = {"nbytes": 0, "blake2b": hashlib.blake2b(digest_size=16).hexdigest(), "pending": ""}


@dataclass(frozen=True, kw_only=True)
class Config:
    def open(self, run_dir: str, start_step: int, total_steps: int) -> Sink:
        return JsonLines(os.path.join(run_dir, "metrics.jsonl"))


class Lines:
    """Appends JSON objects to a file. What a full disk does not take is kept, and tried again at the next `flush`."""

    def __init__(self, path: str):
        self.path, self.pending, self.failed = path, b"", False
        self.nbytes, self.digest = 0, hashlib.blake2b(digest_size=16)  # of what the file holds
        self.begun = False

    def write(self, entry: dict[str, Any]) -> None:
        self.pending += json.dumps(entry).encode() + b"\n"

    def flush(self) -> None:
        try:
            if self.pending:
                self._begin()
                with open(self.path, "ab", buffering=0, opener=no_link) as file:
                    while self.pending:
                        count = file.write(self.pending) or 0
                        self._took(self.pending[:count])
                        self.pending = self.pending[count:]
            if self.failed:
                print(f"\nwarning: {self.path}: can be written again", file=sys.stderr, flush=True)
            self.failed = False
        except OSError as error:
            if not self.failed:
                print(f"\nwarning: {self.path}: {error.strerror}; tried again later", file=sys.stderr, flush=True)
            self.failed = True

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps of the log, which is on the disk then, too."""
        self._begin()
        if os.path.exists(self.path):
            with contextlib.suppress(OSError):  # what is lost of it will be noticed
                sync(self.path)
        return {"nbytes": self.nbytes, "blake2b": self.digest.hexdigest(), "pending": self.pending.decode()}

    def _begin(self) -> None:
        if not self.begun and os.path.exists(self.path):
            with _open_log(self.path) as file:
                while chunk := file.read(CHUNK):
                    self._took(chunk)
        self.begun = True

    def _took(self, data: bytes) -> None:
        self.nbytes += len(data)
        self.digest.update(data)


class JsonLines(Sink):
    def __init__(self, path: str):
        self.lines = Lines(path)

    def scalars(self, step: int, values: dict[str, float]) -> None:
        self.lines.write({"step": step, **values})
        self.lines.flush()

    def flush(self) -> None:
        self.lines.flush()

    def logs(self) -> list[Lines]:
        return [self.lines]

    def close(self) -> None:
        self.lines.flush()


def read_lines(path: str) -> Iterator[dict[str, Any]]:
    """The objects of a file of JSON lines that have a step, if there is such a file. Damaged lines are left out."""
    if os.path.exists(path):
        with _open_log(path) as file:
            while line := file.readline(MAX_LINE_BYTES):
                entry = _parsed(line)
                if entry is not None:
                    yield entry


def _open_log(path: str) -> BinaryIO:
    """Raises UserError where a log is a device or a named pipe, on which a read might never end."""
    try:
        return open_regular(path)
    except NotRegular as error:
        raise UserError(f"{path}: {error.strerror}; move it away") from None


def restore_logs(
    folder: str,
    known: Mapping[str, dict[str, Any]],
    step: int,
    left_out: Container[int] = (),
    guard: Callable[[], None] = lambda: None,
) -> None:
    """Brings the logs of a run back to what they were at its checkpoint of `step`, which holds their states `known`.

    A log that the checkpoint does not know keeps its lines up to `step`. health.jsonl also keeps those of the steps
    that are `left_out`: they are not repeated. `guard` is called before each file is written.

    A log that was moved away begins anew. `restarted-logs.json` remembers the step of the checkpoint whose state no
    longer holds for it.

    Raises:
        UserError: a log is damaged, or the checkpoint names a file that is no log; then nothing has been changed.
    """
    for name in known:  # a stranger's checkpoint may name any path
        if os.path.basename(name) != name or not any(fnmatch.fnmatchcase(name, pattern) for pattern in PATTERNS):
            raise UserError(f"{folder}: its checkpoint of step {step} names {name!r} as a log; name another run.dir")
    paths = {path for pattern in PATTERNS for path in glob.glob(os.path.join(glob.escape(folder), pattern))}
    names = sorted({os.path.basename(path) for path in paths} | set(known))
    record = os.path.join(folder, RESTARTED)
    restarted = _read_restarted(record)
    gone = {name: step for name in known if known[name]["nbytes"] and name not in map(os.path.basename, paths)}
    known = {name: state if {**restarted, **gone}.get(name) != step else BEGINNING for name, state in known.items()}
    for name, expected in known.items():
        _check(os.path.join(folder, name), expected, step)
    if gone:
        guard()
        write_durably(record, json.dumps({**restarted, **gone}))
    for name in gone:
        path = os.path.join(folder, name)
        print(f"\nwarning: {path}: is gone; a new one begins after step {step}", file=sys.stderr, flush=True)
    for name in names:
        guard()
        path, state = os.path.join(folder, name), known.get(name)
        if os.path.exists(path) or (state and state["pending"]):
            write_durably(path, _kept(path, state, step, left_out if name == HEALTH else ()))


def _kept(path: str, state: dict[str, Any] | None, step: int, left_out: Container[int]) -> Iterator[bytes]:
    """What stays of a log."""
    with contextlib.ExitStack() as stack:
        file = stack.enter_context(_open_log(path)) if os.path.exists(path) else io.BytesIO()
        left = state["nbytes"] if state else 0
        while chunk := file.read(min(left, CHUNK)):
            yield chunk
            left -= len(chunk)
        yield state["pending"].encode() if state else b""
        while line := file.readline(MAX_LINE_BYTES):
            entry = _parsed(line)
            if entry is not None and (entry["step"] in left_out or (state is None and entry["step"] <= step)):
                yield line


def _check(path: str, state: dict[str, Any], step: int) -> None:
    if not os.path.exists(path):
        return
    digest, left = hashlib.blake2b(digest_size=16), state["nbytes"]
    with _open_log(path) as file:
        while left and (chunk := file.read(min(left, CHUNK))):
            digest.update(chunk)
            left -= len(chunk)
    if left or digest.hexdigest() != state["blake2b"]:
        nbytes = state["nbytes"]
        what = f"it ends at byte {nbytes - left} of {nbytes}" if left else f"its first {nbytes} bytes have changed"
        raise UserError(
            f"{path}: damaged: {what} since the checkpoint of step {step}; restore it, or move it away to go on"
            " without these lines"
        )


def _read_restarted(path: str) -> dict[str, int]:
    try:
        found = read_json(path)
    except FileNotFoundError:
        return {}
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise UserError(f"{path}: damaged: expected a JSON object with steps; remove it if no log was moved away")
    return found


def _parsed(line: bytes) -> dict[str, Any] | None:
    """None: half a line of a killed process, or a damaged one."""
    try:
        entry = json.loads(line)
        return entry if line.endswith(b"\n") and isinstance(entry["step"], int) else None
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
