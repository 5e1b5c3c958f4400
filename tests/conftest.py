"""Shared fixtures: the embedded shards, and a way to run the training command as its users do."""

import contextlib
import os
import random
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from itertools import islice
from pathlib import Path

import pytest
import torch

# A shell's background jobs ignore Ctrl-C, and so would all that the tests start.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # nohup's children ignore it

ROOT = Path(__file__).parents[1]
SMALL = ["run.epochs=null", "data.workers=1", "run.log_every_steps=1"]
# The digits at a quarter of the default's work, to some 99 % of the held-out scans.
ACCURATE = [
    "model.image_size=16", "model.depth=2", "model.width=128", "model.mlp_dim=512", "run.epochs=30",
    "augment.train=[resize, {name: shift, pixels: 1}]", "schedule.warmup_steps=30",
]  # fmt: skip


def pytest_runtest_setup(item):
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")


@pytest.fixture(scope="session")
def digits(tmp_path_factory):
    """A folder with the embedded data set."""
    from pipeline.data.digits import write_digits

    folder = tmp_path_factory.mktemp("digits")
    write_digits(str(folder))
    return folder


@pytest.fixture
def small_disk(tmp_path):
    """A real file system of 12 MB; needs the right to mount."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=12m", "tmpfs", folder], capture_output=True)
    if mounted.returncode:
        pytest.skip("mounting a small file system needs root")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


def environment(more):
    kept = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT")}
    return {**kept, **more, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}


def start(*words, launcher=("python",), script="pipeline/train.py", environ=(), **options):
    """Starts `LAUNCHER pipeline/train.py WORDS` from the repository's root."""
    command = [*launcher, str(ROOT / script), *map(str, words)]
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, **options}
    return subprocess.Popen(command, cwd=ROOT, env=environment(dict(environ)), **options)


def train(*words, launcher=("python",), **options):
    """Runs the training command to its end: (exit code, output)."""
    process = start(*words, launcher=launcher, **options)
    output, _ = process.communicate(timeout=1180)  # pytest-timeout ends ordinary tests sooner
    return process.returncode, output


def data(folder):
    return [
        f"data.train={folder}/train-{{000..003}}.tar",
        f"data.val={folder}/val-{{000..001}}.tar",
    ]


def take(loader, count=None):
    """The first batches of a loader, or all; copied, since it uses their memory again."""
    return [replace(batch, images=batch.images.clone()) for batch in islice(loader, count)]


def alive(pid):
    """Whether a process is there, and is no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


def until(happened, seconds=500.0, pause=0.002):
    end = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < end
        time.sleep(pause)


SLOW_SAVES = """
import os, time
real, file = os.fsync, os.environ["SLOW_SAVES"]
def fsync(handle):
    if os.path.exists(file) and "/checkpoints/" in os.readlink(f"/proc/self/fd/{handle}"):
        seconds = float(open(file).read())
        os.remove(file)
        time.sleep(seconds)
    return real(handle)
os.fsync = fsync
"""


def slow_saves(folder):
    """Variables of a process whose next write of a checkpoint takes as many seconds as `folder`/slow says."""
    (folder / "site").mkdir()
    (folder / "site/sitecustomize.py").write_text(SLOW_SAVES)
    return {"PYTHONPATH": f"{folder / 'site'}:{ROOT}", "SLOW_SAVES": str(folder / "slow")}


def free_port():
    """One below those that the system gives to connections: it stays free until it is listened to."""
    while True:
        port = random.randrange(20000, 32000)
        with socket.socket() as server, contextlib.suppress(OSError):
            server.bind(("", port))
            return port


def two_ranks():
    return ("torchrun", "--nproc-per-node", "2", "--master-port", str(free_port()))
