"""A lease on a folder: at most one process writes there, on any number of machines that share the file system.

A lease is a small file `.<name>.lease-<generation>` that names its holder. The holder renews it by touching it every
few seconds. Whoever wants a lease that has expired creates the file of the next generation, which the file system
grants to exactly one contender; the old holder finds a newer generation and must stop (fencing). A released file stays,
so that generations only ever grow.

Ages are differences between modification times that the same file server has set: clocks of machines don't matter.
"""

import contextlib
import errno
import json
import os
import re
import secrets
import socket
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from pipeline.errors import Interrupted, UserError
from pipeline.files import new_file, no_link
from pipeline.text import mask_secrets, shown

BEAT_SECONDS = 3.0
EXPIRES_SECONDS = 30.0  # a lease that has not been renewed for so long may be taken over
POLL_SECONDS = 0.2
RECORD_CHARACTERS = 1 << 16  # no holder's record is longer


class LeaseLost(UserError):
    """Another process has taken over: this one must not write any more."""


@dataclass
class Lease:
    """Held from `acquire` to `release`. Other ranks of the holder's job use `observe` to be fenced with it."""

    path: str
    what: str
    renews: bool

    def __post_init__(self) -> None:
        self.lost = False
        self.ended = threading.Event()

    def start(self) -> "Lease":
        """Renews the lease from now on, in the background."""
        threading.Thread(target=self._renew, name="lease", daemon=True).start()
        return self

    def check(self) -> None:
        """To be called before writing.

        Raises:
            LeaseLost: another process has taken over.
            OSError: the file system does not answer, so nobody knows.
        """
        if not self.lost:
            try:
                if self.renews:
                    os.utime(self.path)
                else:
                    os.stat(self.path)
                self.lost = os.path.exists(_path_of_generation(self.path, _generation(self.path) + 1))
            except FileNotFoundError:  # the one that took over has removed it
                self.lost = True
        if self.lost:
            raise LeaseLost(
                f"{self.what}: another process has taken over while this one stood still for more than"
                f" {EXPIRES_SECONDS:g} s; this one stops without writing anything more"
            )

    def release(self) -> None:
        """Lets others in at once."""
        self.ended.set()
        if self.renews and not self.lost:
            with contextlib.suppress(OSError, LeaseLost):
                self.check()
                _write(self.path, {**_describe_this_process(), "released": True}, no_link)

    def __enter__(self) -> "Lease":
        return self

    def __exit__(self, *_: Any) -> None:
        self.release()

    def _renew(self) -> None:
        while not self.ended.wait(BEAT_SECONDS):
            try:
                self.check()
            except LeaseLost:
                return
            except OSError:  # it may come back in time
                continue


def acquire(
    folder: str, name: str, what: str, wait_seconds: float = 0.0, stopped: Callable[[], bool] = lambda: False
) -> Lease:
    """Takes the lease `name` on a local folder, which exists.

    A lease whose holder is known to be dead, or that has expired, is taken over. Where neither can be told, this waits
    until it can, or until `stopped` says True. A live holder is waited for up to `wait_seconds`.

    Raises:
        UserError: another process holds it; `what` names the thing that it writes to, for the message.
        Interrupted: `stopped` said True while this waited.
        OSError: the folder can't be written to.
    """
    began = time.monotonic()
    seen: tuple[str, float] | None = None  # a file, and its modification time when last looked at
    unchanged_since = began
    told = False
    while True:
        generation, path = _newest(folder, name)
        holder = None if path is None else _read(path)
        state = "free" if path is None or holder is None else _state(holder)
        if state == "unknown":
            assert path is not None
            try:
                changed = os.lstat(path).st_mtime
                age = _server_time(folder, name) - changed
            except FileNotFoundError:
                continue  # it has just been taken over
            if seen != (path, changed):
                state = "alive" if seen is not None and seen[0] == path else "unknown"
                seen, unchanged_since = (path, changed), time.monotonic()
            # The second condition is for a time that lies in the future: a server's clock may have been set back.
            if state == "unknown" and max(age, time.monotonic() - unchanged_since) > EXPIRES_SECONDS:
                state = "dead"
        if state in ("free", "dead", "released"):
            mine = os.path.join(folder, f".{name}.lease-{generation + 1:08d}")
            if _create(mine):
                if _newest(folder, name)[1] == mine:
                    if path is not None:
                        with contextlib.suppress(OSError):
                            os.remove(path)
                    return Lease(mine, what, renews=True).start()
                os.remove(mine)  # others have come, and one may have gone, since this one looked
            continue
        assert holder is not None
        if state == "alive" and time.monotonic() - began >= wait_seconds:
            raise UserError(f"{what}: {_words(holder)} is writing there already; wait for it to end, or end it first")
        if stopped():
            raise Interrupted
        if not told and time.monotonic() - began > 1.0:
            told = True
            print(
                f"{what}: waiting for {_words(holder)} to end, or for its lease to expire", file=sys.stderr, flush=True
            )
        time.sleep(POLL_SECONDS)


def observe(path: str, what: str) -> Lease:
    """The lease that another process of the same job holds and renews."""
    return Lease(path, what, renews=False)


def holder_of(folder: str, name: str) -> str | None:
    """The process that certainly holds a lease, in words. One on another machine can't be told without waiting."""
    _, path = _newest(folder, name)
    holder = None if path is None else _read(path)
    return _words(holder) if holder is not None and _state(holder) == "alive" else None


def _newest(folder: str, name: str) -> tuple[int, str | None]:
    pattern = re.compile(rf"\.{re.escape(name)}\.lease-(\d+)")
    found = [int(match[1]) for entry in os.listdir(folder) if (match := pattern.fullmatch(entry))]
    if not found:
        return 0, None
    return max(found), os.path.join(folder, f".{name}.lease-{max(found):08d}")


def _generation(path: str) -> int:
    return int(path.rpartition("-")[2])


def _path_of_generation(path: str, generation: int) -> str:
    return f"{path.rpartition('-')[0]}-{generation:08d}"


def _describe_this_process() -> dict[str, Any]:
    return {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "started": _process_start(os.getpid()),
        "processes": _process_space(),
        "command": mask_secrets(" ".join(sys.argv))[:200],
    }


def _process_space() -> str | None:
    """What process numbers are comparable with: this boot of this machine, and its process namespace."""
    try:
        with open("/proc/sys/kernel/random/boot_id") as file:
            return f"{file.read().strip()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:  # no Linux
        return None


def _process_start(pid: int) -> int | None:
    """In clock ticks since the boot; None where there is no such process, or it has ended."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            fields = file.read().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else int(fields[19])


def _state(holder: dict[str, Any]) -> str:
    if holder.get("released"):
        return "released"
    if holder.get("processes") is not None and holder["processes"] == _process_space():
        return "alive" if _process_start(int(holder["pid"])) == holder["started"] else "dead"
    return "unknown"


def _words(holder: dict[str, Any]) -> str:
    return shown(
        f"process {holder.get('pid', '?')} on {holder.get('host', 'an unknown host')} ({holder.get('command', '?')})"
    )


def _read(path: str) -> dict[str, Any] | None:
    """None where the lease has gone; an empty record, whose age decides, where there is none (yet) or a link."""
    try:
        with open(path, opener=no_link) as file:
            record = json.loads(file.read(RECORD_CHARACTERS))
        return record if isinstance(record, dict) else {}
    except FileNotFoundError:
        return None
    except (ValueError, RecursionError):
        return {}
    except OSError as error:
        if error.errno == errno.ELOOP:
            return {}
        raise


def _create(path: str) -> bool:
    """Whether this process has created the file, whole; False where it is there already."""
    partial = f"{path}.{secrets.token_hex(8)}"
    try:
        _write(partial, _describe_this_process(), new_file)
        try:
            os.link(partial, path)
        except FileExistsError:
            return False
        except OSError:  # a file system without hard links
            try:
                _write(path, _describe_this_process(), new_file)
            except FileExistsError:
                return False
        return True
    finally:
        with contextlib.suppress(OSError):
            os.remove(partial)


def _server_time(folder: str, name: str) -> float:
    """The file server's time, in seconds."""
    path = os.path.join(folder, f".{name}.time.{secrets.token_hex(8)}")
    try:
        with open(path, "w", opener=new_file) as file:
            file.write("now")
            file.flush()
            os.fsync(file.fileno())
            return os.fstat(file.fileno()).st_mtime
    finally:
        with contextlib.suppress(OSError):
            os.remove(path)


def _write(path: str, record: dict[str, Any], opener: Callable[[str, int], int]) -> None:
    with open(path, "w", opener=opener) as file:
        json.dump(record, file)
        file.flush()
        os.fsync(file.fileno())
