"""Work spread over processes, which ends in order: at an error, at Ctrl-C, and when the parent is killed."""

import contextlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.synchronize import Event
from typing import Any

from pipeline.errors import UserError

_stop: Event | None = None


class Stopped(Exception):
    """The parent has given up the work."""


def check_stop() -> None:
    """For workers, between two samples. Raises Stopped where the parent has given up the work."""
    if _stop is not None and _stop.is_set():
        raise Stopped


def in_processes(function: Callable, tasks: Sequence[tuple], processes: int | None) -> Generator[Any, None, None]:
    """Yields `function(*task)` of each task as they are done; `processes` is by default the number of cores.

    Close the iterator (contextlib.closing) to give up the rest.

    Raises:
        UserError: what a function raised, a process was killed or ran out of memory, or `processes` is below 1.
    """
    if not tasks:
        return
    if processes is not None and processes < 1:
        raise UserError(f"--processes: expected at least 1, found {processes}")
    # A fork server imports once and has no threads, unlike this process.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([function.__module__, "webdataset"])
    stop = context.Event()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    executor = ProcessPoolExecutor(min(processes or cores, len(tasks)), context, initializer=_start, initargs=(stop,))
    try:
        with _uninterrupted():
            futures = [executor.submit(function, *task) for task in tasks]
        for future in as_completed(futures):
            yield future.result()
    except MemoryError:
        raise UserError("a worker process ran out of memory; start again with fewer --processes") from None
    except BrokenProcessPool:
        raise UserError("a worker process was killed (out of memory?); start again with fewer --processes") from None
    finally:
        stop.set()
        executor.shutdown(cancel_futures=True)


@contextlib.contextmanager
def _uninterrupted() -> Iterator[None]:
    """Ctrl-C takes effect after the block; the processes that start within it never see it."""
    caught: list[int] = []
    handler = signal.signal(signal.SIGINT, lambda number, frame: caught.append(number))
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # child processes inherit it
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        signal.signal(signal.SIGINT, handler)
    if caught:
        raise KeyboardInterrupt


def _start(stop: Event) -> None:
    global _stop
    _stop = stop
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
