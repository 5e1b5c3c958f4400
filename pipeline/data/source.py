"""Bytes of a file, wherever it lies: exact ranges, retries with back-off, and a time limit on every read.

Local paths, `http(s)://` (urllib3), `pipe:` commands, and everything that fsspec opens (`s3://`, `gs://`, `hf://`).
"""

import contextlib
import errno
import os
import random
import re
import select
import signal
import stat
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from dataclasses import dataclass, field
from typing import Any

import fsspec
import numpy as np

from pipeline.data.web import Refused, http_chunks, http_size
from pipeline.errors import Interrupted, UserError
from pipeline.options import option
from pipeline.text import MASK, shown_url

Data = bytes | bytearray
Read = Callable[[str, int, int], Data]  # one of Source's ways to read: url, first byte, number of bytes
CHUNK = 1 << 16
POLL_SECONDS = 0.1  # between two looks for a stop request during a wait
REMOTE_PIECE = 8 << 20  # what one request of an object store brings; a failure repeats no more than that


@dataclass(frozen=True, kw_only=True)
class ReadConfig:
    timeout_seconds: float = option(30.0, "longest silence of a source before the read is tried again", may_change=True)
    deadline_seconds: float = option(300.0, "longest time for one read with all its repetitions", may_change=True)
    allow_pipe: bool = option(
        False, "run the commands of `pipe:` URLs (a shell, with your rights); never from a file", may_change=True
    )
    allow_missing_end: bool = option(
        False, "accept tars that end without two blocks of zeros, but not inside a member", may_change=True
    )
    max_image_pixels: int = option(
        89_478_485, "an image of more pixels is a bad sample; each takes 3 bytes in memory", may_change=True
    )
    redirect_hosts: tuple[str, ...] = option(
        (), "hosts to which an HTTP server may redirect, besides itself; *.example.org: a whole domain", may_change=True
    )
    threads: int = option(4, "reads that a worker has in flight, ahead of what it decodes", may_change=True)

    def __post_init__(self) -> None:
        for name in ("timeout_seconds", "deadline_seconds"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name}: must be positive, found {getattr(self, name)}")
        for name in ("threads", "max_image_pixels"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: must be at least 1, found {getattr(self, name)}")


@dataclass
class Source:
    """Reads by one set of limits. Made anew in each process that reads; its methods may be called from any thread."""

    limits: ReadConfig = field(default_factory=ReadConfig)
    board: np.ndarray | None = None  # bytes that another process may see: the read that has lasted longest
    stop: Callable[[], bool] | None = None  # asked during each wait; once it says True, the read raises Interrupted

    def __post_init__(self) -> None:
        self.pipes = Pipes(self.stop)
        self.reads: dict[int, str] = {}  # under way, by thread
        self.given_up: set[str] = set()  # what a deadline has passed for is tried only once each time after

    def size(self, url: str) -> int:
        """Bytes of the file.

        Raises:
            UserError: it can't be reached.
        """

        def ask() -> int:
            if is_local(url):
                found = os.stat(url)
                check_kind(found.st_mode)
                return found.st_size
            if is_http(url):
                return http_size(url, self.limits.timeout_seconds, self.limits.redirect_hosts)
            filesystem, path = fsspec.core.url_to_fs(url)
            return int(call(filesystem, "size", self.limits.timeout_seconds, path))

        return self._try(url, ask, lambda: 0)

    def read(self, url: str, start: int, nbytes: int) -> bytes:
        """Exactly `nbytes` bytes from `start`; after a failure it goes on at the byte that was reached.

        Raises:
            UserError: the file ends before that, can't be reached, or the deadline has passed.
        """
        data = bytearray()

        def go_on() -> bytes:
            if is_local(url):  # in one piece, without copies; after each system call the thread has to wait its turn
                file = open_local(url)
                try:
                    size = os.fstat(file).st_size
                    if size < start + nbytes:  # before memory is taken for it
                        raise Refused(f"truncated at byte {size} (expected {start + nbytes})")
                    whole = os.pread(file, nbytes, start)
                    while len(whole) < nbytes and (more := os.pread(file, nbytes - len(whole), start + len(whole))):
                        whole += more  # one call gives 2 GB at most
                finally:
                    os.close(file)
                if len(whole) < nbytes:
                    raise Refused(f"truncated at byte {start + len(whole)} (expected {start + nbytes})")
                return whole
            for chunk in self._chunks(url, start + len(data), start + nbytes, end):
                data.extend(chunk)
                if time.monotonic() > end:
                    raise TimeoutError(f"only {len(data)} of {nbytes} bytes came")
            if len(data) < nbytes:
                raise Refused(f"truncated at byte {start + len(data)} (expected {start + nbytes})")
            assert len(data) == nbytes
            return bytes(data)

        end = time.monotonic() + self.limits.deadline_seconds
        with self._shown(f"{shown_url(url)} from byte {start}"):
            return self._try(url, go_on, lambda: start + len(data))

    def read_cached(self, url: str, start: int, nbytes: int) -> Data:
        """Exactly these bytes of a local file, without waiting for a disk.

        Raises:
            BlockingIOError: they are not all in the system's memory, or it can't tell: `read` has to fetch them.
        """
        if not is_local(url) or not hasattr(os, "RWF_NOWAIT"):
            raise BlockingIOError
        with self._shown(f"{shown_url(url)} from byte {start}"):  # a network's file system may wait for its server
            try:
                file = open_local(url)
                try:
                    if os.fstat(file).st_size < start + nbytes:
                        raise BlockingIOError
                    data = bytearray(nbytes)
                    found = os.preadv(file, [data], start, os.RWF_NOWAIT)
                finally:
                    os.close(file)
            except (OSError, Refused):  # or a file system that does not know the flag; `read` says what is wrong
                raise BlockingIOError from None
        if found < nbytes:
            raise BlockingIOError
        return data

    def stream(self, url: str) -> Iterator[bytes]:
        """The whole file from its beginning, of unknown length, in one pass."""
        if is_pipe(url):
            yield from self.pipes.chunks(self.command(url), 0, None, self.limits.timeout_seconds)
            return
        nbytes = self.size(url)
        for start in range(0, nbytes, REMOTE_PIECE):
            yield self.read(url, start, min(REMOTE_PIECE, nbytes - start))

    def close(self) -> None:
        """Ends commands that still run."""
        self.pipes.close()

    @contextlib.contextmanager
    def _shown(self, text: str) -> Iterator[None]:
        if self.board is None:
            yield
            return
        self.reads[threading.get_ident()] = text
        write_board(self.board, list(self.reads.values())[0])  # noqa: RUF015  # a copy: other threads change it
        try:
            yield
        finally:
            del self.reads[threading.get_ident()]
            write_board(self.board, (list(self.reads.values()) or [""])[0])

    def _try(self, url: str, attempt: Callable[[], Any], reached: Callable[[], int]) -> Any:
        if MASK in url and not is_local(url):
            raise UserError(f"{url}: its secrets were masked when it was written; name it with its secrets")
        end, pause, before = time.monotonic() + self.limits.deadline_seconds, 0.2, reached()
        while True:
            try:
                result = self._interruptible(attempt)
                self.given_up.discard(url)
                return result
            except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
                raise UserError(f"{url}: shard not found; check data.train and data.val") from None
            except (Refused, PermissionError, ImportError, ValueError) as error:
                raise UserError(f"{url}: {error}") from None
            except (UserError, MemoryError):
                raise
            except Exception as error:  # each library of fsspec's has its own kinds
                if getattr(error, "errno", None) == errno.ENOMEM:
                    raise MemoryError(shown_url(url)) from None
                if reached() > before:  # the source gives something: start the back-off anew
                    pause, before = 0.2, reached()
                if time.monotonic() + pause > end or url in self.given_up:
                    self.given_up.add(url)
                    raise UserError(
                        f"{url}: no success at byte {reached()} within {self.limits.deadline_seconds:g} s"
                        f" (data.read.deadline_seconds): {type(error).__name__}: {error}"
                    ) from None
                self._sleep(pause * random.uniform(0.5, 1.0))  # noqa: S311  # spreads retries, no secret
                pause = min(2 * pause, 10.0)

    def _interruptible(self, attempt: Callable[[], Any]) -> Any:
        """What `attempt` returns. Where a stop counts it runs in a thread, which is left alone where it hangs."""
        if self.stop is None:
            return attempt()
        future: Future = Future()

        def run() -> None:
            try:
                future.set_result(attempt())
            except BaseException as error:
                future.set_exception(error)

        threading.Thread(target=run, name="attempt", daemon=True).start()
        while not wait([future], POLL_SECONDS).done:
            if self.stop():
                raise Interrupted
        return future.result()

    def _sleep(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0:
            if self.stop is not None and self.stop():
                raise Interrupted
            time.sleep(left if self.stop is None else min(left, POLL_SECONDS))

    def _chunks(self, url: str, start: int, stop: int, end: float) -> Iterator[bytes]:
        if is_http(url):
            limits = self.limits
            yield from http_chunks(url, start, stop, limits.timeout_seconds, end, limits.redirect_hosts)
        elif is_pipe(url):
            yield from self.pipes.chunks(self.command(url), start, stop, self.limits.timeout_seconds)
        else:
            filesystem, path = fsspec.core.url_to_fs(url)
            # The Hub's file system would fetch 5 MB ahead of each range.
            options = {"cache_type": "none"} if url.startswith("hf://") else {}
            for begin in range(start, stop, REMOTE_PIECE):
                end = min(begin + REMOTE_PIECE, stop)
                piece = call(filesystem, "cat_file", self.limits.timeout_seconds, path, start=begin, end=end, **options)
                yield piece[: end - begin]  # a server that ignores ranges sends more
                if len(piece) < end - begin:
                    return

    def command(self, url: str) -> str:
        """The shell command of a `pipe:` URL.

        Raises:
            UserError: the user has not allowed it.
        """
        if not self.limits.allow_pipe:
            raise UserError(
                f"{url}: this is a shell command; to run it, set data.read.allow_pipe=true on the command line"
            )
        return url.removeprefix("pipe:")


def open_local(path: str) -> int:
    """A descriptor of a local file, to read from.

    Raises:
        OSError: it can't be opened.
        Refused: it is a device, a named pipe or the like, on which a read might never end.
    """
    file = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)  # a named pipe would wait for its writer
    try:
        check_kind(os.fstat(file).st_mode)
    except BaseException:
        os.close(file)
        raise
    return file


def check_kind(mode: int) -> None:
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):  # reading a folder fails by itself
        raise Refused("a device, a named pipe or a socket, expected a regular file")


def write_board(board: np.ndarray, text: str) -> None:
    content = text.encode()[: len(board) - 1]
    board[: len(content) + 1] = np.frombuffer(content + b"\0", np.uint8)


def read_board(board: np.ndarray) -> str:
    return board.tobytes().split(b"\0")[0].decode(errors="replace")


def is_local(url: str) -> bool:
    return "://" not in url and not is_pipe(url)


def is_http(url: str) -> bool:
    return url.startswith(("http://", "https://"))


def is_pipe(url: str) -> bool:
    return url.startswith("pipe:")


def is_reference(url: str) -> bool:
    """Whether fsspec would fill in the Jinja templates of a file that the URL names."""
    return re.search(r"(^|::)reference:", url) is not None


def call(filesystem: Any, method: str, timeout_seconds: float, *args: Any, **kwargs: Any) -> Any:
    """Calls a method of an fsspec file system, with a time limit where it has an event loop to keep it."""
    if getattr(filesystem, "async_impl", False) and not filesystem.asynchronous:
        from fsspec.asyn import sync

        return sync(filesystem.loop, getattr(filesystem, f"_{method}"), *args, timeout=timeout_seconds, **kwargs)
    return getattr(filesystem, method)(*args, **kwargs)


class Pipes:
    """Commands that are still running, each by the byte that it has reached.

    A stream can't be entered in its middle: a read goes on with the command that has come nearest before it, or
    starts the command anew and skips.
    """

    def __init__(self, stop: Callable[[], bool] | None = None) -> None:
        self.stop = stop
        self.lock = threading.Lock()
        self.open: list[tuple[str, int, subprocess.Popen]] = []
        self.closed = False

    def chunks(self, command: str, start: int, stop: int | None, timeout_seconds: float) -> Iterator[bytes]:
        position, process = self._take(command, start)
        assert process.stdout is not None
        done = False
        try:
            while stop is None or position < stop:
                if not self._readable(process.stdout, timeout_seconds):
                    raise TimeoutError(f"the command has been silent for {timeout_seconds:g} s at byte {position}")
                chunk = os.read(process.stdout.fileno(), CHUNK if stop is None else min(CHUNK, stop - position))
                if not chunk:
                    code = process.wait()
                    if code:
                        raise OSError(f"the command ended with exit code {code} at byte {position}")
                    return
                wanted = chunk[max(start - position, 0) :]
                position += len(chunk)
                if wanted:
                    yield wanted
            done = True
        finally:
            if done:
                self._put(command, position, process)
            else:
                stop_command(process)

    def _take(self, command: str, start: int) -> tuple[int, subprocess.Popen]:
        with self.lock:
            near = [entry for entry in self.open if entry[0] == command and entry[1] <= start]
            if near:
                best = max(near, key=lambda entry: entry[1])
                self.open.remove(best)
                return best[1], best[2]
        return 0, start_command(command)

    def _put(self, command: str, position: int, process: subprocess.Popen) -> None:
        with self.lock:
            self.open.append((command, position, process))
            oldest = self.open.pop(0) if len(self.open) > 64 or self.closed else None
        if oldest:
            stop_command(oldest[2])

    def _readable(self, stream: Any, timeout_seconds: float) -> bool:
        end = time.monotonic() + timeout_seconds
        while (left := end - time.monotonic()) > 0:
            if select.select([stream], [], [], left if self.stop is None else min(left, POLL_SECONDS))[0]:
                return True
            if self.stop is not None and self.stop():
                raise Interrupted
        return False

    def close(self) -> None:
        with self.lock:
            self.closed = True
            processes = [process for _, _, process in self.open]
            self.open.clear()
        for process in processes:
            stop_command(process)


# Beside the command a shell waits for the end of its standard input, which we hold: however we end, it then kills the
# command's whole group. (A signal at the parent's death would come at the end of the thread that started the command.)
GUARDED = """
exec 3<&0 </dev/null
(read -r _ <&3; kill -KILL 0) >/dev/null 2>&1 &
guard=$!
/bin/sh -c "$0" 3<&-
code=$?
kill -KILL $guard
wait $guard 2>/dev/null
exit $code
"""


def start_command(command: str) -> subprocess.Popen:
    """Runs a shell command, in a session of its own, that does not outlive this process."""
    # Only commands that the user has allowed come here (allow_pipe).
    return subprocess.Popen(  # noqa: S603
        ["/bin/sh", "-c", GUARDED, command], stdout=subprocess.PIPE, stdin=subprocess.PIPE, bufsize=0,
        start_new_session=True,
    )  # fmt: skip


def stop_command(process: subprocess.Popen) -> None:
    """Kills the shell and all that it has started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    assert process.stdout is not None
    assert process.stdin is not None
    process.stdout.close()
    process.stdin.close()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(POLL_SECONDS * 50)
