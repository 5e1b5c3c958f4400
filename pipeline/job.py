"""A training job on this machine, as its users start it, and what can befall its processes. Linux only."""

import contextlib
import os
import resource
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path

TRAIN = Path(__file__).with_name("train.py")
MARK = "PIPELINE_JOB"  # this variable tells a job's processes, those of a launcher that was killed as well
# Its processes end with us, even if we are killed: a launcher's ranks notice its death.
GUARDED = """
import ctypes, os, signal, sys
ctypes.CDLL(None).prctl(1, int(signal.SIGKILL), 0, 0, 0)  # PR_SET_PDEATHSIG
if os.getppid() == int(sys.argv[1]):
    os.execv(sys.argv[2], sys.argv[2:])
"""
OF_LAUNCHERS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


class Job:
    """`torchrun pipeline/train.py WORDS` on several ranks, `python pipeline/train.py WORDS` on one.

    It is killed when the thread ends that has started it.
    """

    def __init__(self, words: Sequence[str], ranks: int, output: str, environ: Mapping[str, str] | None = None):
        launcher = ["-m", "pipeline.launcher", "torchrun", "--nproc-per-node", str(ranks)]
        command = [sys.executable, *(launcher if ranks > 1 else []), str(TRAIN), *words]
        self.ranks, self.output, self.mark = ranks, output, uuid.uuid4().hex
        kept = {name: value for name, value in os.environ.items() if name not in OF_LAUNCHERS}
        self.began = time.monotonic()
        self.process = subprocess.Popen(  # noqa: S603  # the drill's own command
            [sys.executable, "-S", "-c", GUARDED, str(os.getpid()), *command],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            env={**kept, **(environ or {}), MARK: self.mark},
            start_new_session=True,  # Ctrl-C is ours
        )
        Path(output).touch()
        self.writer = threading.Thread(target=self._write_output, daemon=True)
        self.writer.start()

    def _write_output(self) -> None:
        """A job whose files can't grow can still say so: we write its output."""
        assert self.process.stdout is not None
        with self.process.stdout as pipe, open(self.output, "wb", buffering=0) as file:
            while data := os.read(pipe.fileno(), 1 << 16):
                file.write(data)

    def said(self) -> str:
        with open(self.output, errors="replace") as file:
            return file.read()

    def running(self) -> bool:
        return self.process.poll() is None

    def processes(self) -> list[int]:
        """All of its processes: launcher, ranks, data workers, compilers."""
        wanted = f"{MARK}={self.mark}".encode()
        found = []
        for name in filter(str.isdigit, os.listdir("/proc")):
            with contextlib.suppress(OSError):  # it has ended, or is another user's
                if wanted in Path("/proc", name, "environ").read_bytes().split(b"\0") and not _is_zombie(name):
                    found.append(int(name))
        return found

    def rank_processes(self) -> dict[int, int]:
        """The process of each rank that has been started."""
        if self.ranks == 1:
            return {0: self.process.pid}
        found = {}
        for pid in self.processes():
            with contextlib.suppress(OSError, ValueError, KeyError):
                if _parent(pid) == self.process.pid:
                    variables = Path(f"/proc/{pid}/environ").read_text().split("\0")
                    found[int(dict(v.split("=", 1) for v in variables if "=" in v)["RANK"])] = pid
        return found

    def workers(self) -> list[int]:
        """The data workers: what the ranks have started, compilers included."""
        ranks = set(self.rank_processes().values())
        found = []
        for pid in self.processes():
            with contextlib.suppress(OSError):
                if _parent(pid) in ranks:
                    found.append(pid)
        return found

    def send(self, number: int, pids: Sequence[int] | None = None) -> None:
        """Sends a signal to these processes, or to all of its."""
        for pid in self.processes() if pids is None else pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    def limit_file_size(self, nbytes: int | None) -> None:
        """From now on the kernel fails what its ranks write beyond `nbytes` of a file (EFBIG); None: no more."""
        for pid in self.rank_processes().values():
            _, hard = resource.prlimit(pid, resource.RLIMIT_FSIZE)
            resource.prlimit(pid, resource.RLIMIT_FSIZE, (hard if nbytes is None else nbytes, hard))

    def wait(self, seconds: float) -> int | None:
        """The launcher's exit code once all processes have ended; None if they do not within this time."""
        end = time.monotonic() + seconds
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(seconds)
            while self.processes():
                if time.monotonic() > end:
                    return None
                time.sleep(0.05)
            self.writer.join()  # all that it has said
        return self.process.returncode

    def kill(self) -> None:
        """Ends all of its processes at once, as the loss of power does."""
        while pids := self.processes():
            self.send(signal.SIGKILL, pids)
            time.sleep(0.01)
        self.process.wait()
        self.writer.join()


def _status(pid: int | str) -> list[str]:
    """The fields of /proc/PID/stat behind the name: state, parent, ..."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()


def _is_zombie(pid: int | str) -> bool:
    return _status(pid)[0] == "Z"


def _parent(pid: int) -> int:
    return int(_status(pid)[1])
