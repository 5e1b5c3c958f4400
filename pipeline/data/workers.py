"""Processes that each produce a stream of values ahead of their use.

Every worker has a pipe of its own, which torch's DataLoader has not: one that is killed while it writes leaves no lock
and no half message behind that the others would wait for.
"""

import contextlib
import multiprocessing
import os
import queue
import signal
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from multiprocessing.util import Finalize
from typing import Any

from pipeline.errors import WorkerDied
from pipeline.runtime import die_with_parent

POLL_SECONDS = 0.1  # between two looks at workers and stop requests while a value does not come
JOIN_SECONDS = 5.0  # for processes that were killed
BEGIN, NEXT = b"b", b"n"  # what a worker is asked for: a new pass, the next value of the pass


@dataclass(frozen=True)
class Failure:
    """An exception in a worker."""

    traceback: str


class Workers:
    """`produce(number)` runs in worker `number`, anew for each pass; at most `ahead` values wait to be taken."""

    def __init__(
        self, produce: Callable[[int], Iterator[Any]], count: int, ahead: int, prepare: Callable[[], None],
        describe: Callable[[int], str],
    ):  # fmt: skip
        self.produce, self.count, self.ahead, self.prepare, self.describe = produce, count, ahead, prepare, describe
        self.processes: list[BaseProcess] = []
        self.pipes: list[Connection] = []
        self.in_pass = False

    def start(self) -> None:
        """Forks the workers: nothing that they share with this process is copied."""
        context = multiprocessing.get_context("fork")
        for number in range(self.count):
            ours, theirs = context.Pipe()
            self.pipes.append(ours)
            process = context.Process(target=self._serve, args=(number, theirs, os.getpid()), daemon=True)
            process.start()
            theirs.close()
            self.processes.append(process)
        # Before multiprocessing, at exit, sends them SIGTERM, which they ignore, and waits for them.
        self.end = Finalize(self, kill, [self.processes], exitpriority=10)

    def begin_pass(self) -> None:
        """Has all workers produce their streams from the beginning; the pass before has come to its end."""
        assert not self.in_pass
        self.in_pass = True
        if not self.processes:
            self.start()
        for number in range(self.count):
            self._ask(number, BEGIN)
            for _ in range(self.ahead):
                self._ask(number, NEXT)

    def take(self, number: int, on_wait: Callable[[], None] = lambda: None) -> Any:
        """The next value of a worker, None at the end of the pass. `on_wait` is called while it does not come.

        Raises:
            WorkerDied: a worker has ended.
            RuntimeError: it failed; with its traceback.
        """
        pipe = self.pipes[number]
        while not pipe.poll(POLL_SECONDS):
            self.check()
            on_wait()
        try:
            value = pipe.recv()
        except (EOFError, OSError):
            self.processes[number].join(JOIN_SECONDS)
            raise WorkerDied(self._obituary(number)) from None
        if isinstance(value, Failure):
            raise RuntimeError(f"{self.describe(number)} failed:\n{value.traceback}")
        self.in_pass = value is not None
        self._ask(number, NEXT)
        return value

    def check(self) -> None:
        """Raises WorkerDied where a worker has ended."""
        for number, process in enumerate(self.processes):
            if process.exitcode is not None:
                raise WorkerDied(self._obituary(number))

    def close(self) -> None:
        """Ends the workers, all at once: they have nothing to save."""
        kill(self.processes)
        for pipe in self.pipes:
            pipe.close()
        self.processes.clear()
        self.pipes.clear()

    def _ask(self, number: int, what: bytes) -> None:
        with contextlib.suppress(OSError):  # it has ended, which is found out when a value is taken
            self.pipes[number].send_bytes(what)

    def _obituary(self, number: int) -> str:
        process = self.processes[number]
        code = process.exitcode
        how = f"exit code {code}"
        if code is not None and code < 0:
            how = f"signal {signal.Signals(-code).name}"
            if -code == signal.SIGKILL:
                how += " (out of memory? The kernel's log tells: dmesg)"
        return f"{self.describe(number)} (process {process.pid}) ended by {how}"

    def _serve(self, number: int, pipe: Connection, parent: int) -> None:
        die_with_parent(parent)
        for other in self.pipes:  # the rank's ends, which a fork copies
            other.close()
        self.prepare()
        outbox: queue.SimpleQueue = queue.SimpleQueue()
        # A thread of its own sends: the worker goes on while the rank does not take what it has.
        threading.Thread(target=_send, args=(pipe, outbox), daemon=True).start()
        values: Iterator[Any] | None = None
        try:
            while True:
                request = pipe.recv_bytes()
                try:
                    if request == BEGIN:
                        values = self.produce(number)
                    elif values is not None:
                        value = next(values, None)
                        values = None if value is None else values
                        outbox.put(value)
                except Exception:
                    values = None
                    outbox.put(Failure(traceback.format_exc()))
        except (EOFError, OSError):  # the rank has closed its end
            os._exit(0)


def _send(pipe: Connection, outbox: queue.SimpleQueue) -> None:
    try:
        while True:
            pipe.send(outbox.get())
    except OSError:
        os._exit(0)


def kill(processes: list[BaseProcess]) -> None:
    """Returns when they have ended, or after a few seconds: a system call that hangs keeps one."""
    for process in processes:
        process.kill()
    end = time.monotonic() + JOIN_SECONDS
    for process in processes:
        process.join(max(end - time.monotonic(), 0.0))
