"""Preflight on real processes, started as srun starts them: each planted fault is found, and its node is named."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time

import pytest

from tests.conftest import ROOT, SMALL, data, environment, free_port, two_ranks

NAMESPACES = subprocess.run(["unshare", "--uts", "--mount", "true"], capture_output=True).returncode == 0
needs_namespaces = pytest.mark.skipif(not NAMESPACES, reason="another host name on this machine needs root")


class Job:
    """Ranks of a job, each with an environment, and if wanted a shell command before it on a node of its own."""

    def __init__(self, *words, world_size=1, timeout=30, port=None):
        self.words = [*map(str, words), "--json", "--timeout-seconds", str(timeout)]
        self.world_size, self.port, self.processes = world_size, port or free_port(), []

    def start(self, rank, environ=(), node=None, first="true"):
        command = [sys.executable, "-m", "pipeline.preflight", *self.words]
        if node is not None:
            script = f'hostname {node} && {first} && exec "$@"'
            command = ["unshare", "--uts", "--mount", "sh", "-c", script, "sh", *command]
        own = {"RANK": str(rank), "WORLD_SIZE": str(self.world_size), "MASTER_PORT": str(self.port)}
        own |= {"MASTER_ADDR": "127.0.0.1", "LOCAL_RANK": "0", **dict(environ)}
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        self.processes.append(subprocess.Popen(command, cwd=ROOT, env=environment(own), **pipes))
        return self

    def end(self):
        """Exit codes, rank 0's checks by name, and all of stderr."""
        outputs = [process.communicate(timeout=120) for process in self.processes]
        report = json.loads(outputs[0][0])
        checks = {}
        for check in report["checks"]:
            checks.setdefault(check["name"], []).append((check["fine"], check["text"]))
        codes = [process.returncode for process in self.processes]
        return codes, checks, "".join(error for _, error in outputs)


def failed(checks):
    """name -> what was wrong"""
    return {name: [text for fine, text in found if not fine] for name, found in checks.items() if not found[0][0]}


@needs_namespaces
def test_two_sound_nodes_pass_every_check_and_leave_nothing(digits, tmp_path):
    job = Job(*data(digits), f"run.dir={tmp_path / 'runs/new'}", world_size=2)
    codes, checks, errors = job.start(0, node="alpha").start(1, node="beta").end()
    assert codes == [0, 0], (checks, errors)
    assert not failed(checks)
    assert set(checks) == {
        "ranks and devices", "versions", "batch", "clocks", "shards", "disk", "shared memory", "memory",
        "run directory", "all-reduce",
    }  # fmt: skip
    assert checks["ranks and devices"][0][1] == "alpha: rank 0 on 1 x CPU; beta: rank 1 on 1 x CPU"
    assert "written and seen by 2 nodes" in checks["run directory"][0][1]
    assert "64 = 32 micro batch x 1 accumulation x 2 ranks; 64 lanes, 32 a rank" in checks["batch"][0][1]
    assert os.listdir(tmp_path) == []


def shim(folder, name, text):
    """A folder for PYTHONPATH that holds one file."""
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return {"PYTHONPATH": f"{folder}:{ROOT}"}


@needs_namespaces
def test_what_differs_on_one_node_is_named_with_its_fix(digits, tmp_path):
    """Another torch, a late clock, an empty shard, a small /dev/shm and a run directory of its own, all on one node."""
    shim(tmp_path / "shim", "torch-1.13.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: torch\nVersion: 1.13.0\n")
    environ = shim(
        tmp_path / "shim", "sitecustomize.py", "import time\nnow = time.time\ntime.time = lambda: now() - 90\n"
    )
    (tmp_path / "own").mkdir()
    (tmp_path / "shared").mkdir()
    (tmp_path / "empty").touch()
    mounts = f"mount --bind {tmp_path}/empty {digits}/train-002.tar && mount --bind {tmp_path}/own {tmp_path}/shared"
    mounts += " && mount -t tmpfs -o size=1m tmpfs /dev/shm"
    job = Job(*data(digits), f"run.dir={tmp_path / 'shared/run'}", world_size=2)
    codes, checks, _ = job.start(0, node="alpha").start(1, environ, node="beta", first=mounts).end()
    assert codes == [1, 1]
    wrong = failed(checks)
    assert set(wrong) == {"versions", "clocks", "shards", "shared memory", "run directory"}
    torch = "rank 1 on beta: torch 1.13.0, the others have 2."
    assert wrong["versions"][0].startswith(torch), wrong
    assert "pip install -c constraints.txt" in wrong["versions"][0]
    assert wrong["clocks"][0].startswith("rank 1 on beta: its clock is -90.")
    assert wrong["shards"] == [f"rank 1 on beta: {digits}/train-002.tar: empty file; write the shard anew"]
    assert wrong["shared memory"][0].startswith("rank 1 on beta: /dev/shm has 1 MiB free")
    assert "rank 1 on beta: does not see what rank 0 on alpha has written into run.dir=" in "".join(
        wrong["run directory"]
    )
    assert not [name for _, _, names in os.walk(tmp_path) for name in names if "preflight" in name]


def test_a_rank_that_never_comes_is_named_within_the_time_limit(digits, tmp_path):
    began = time.monotonic()
    job = Job(*data(digits), f"run.dir={tmp_path}", world_size=3, timeout=6)
    codes, checks, errors = job.start(0).start(2).end()
    assert time.monotonic() - began < 60
    assert codes == [1, 1]
    host = socket.gethostname()
    assert f"missing after 6 s: rank 1 of 3; arrived: {host}: rank 0,2;" in checks["ranks"][0][1]
    assert "rank 2: not all ranks have come; rank 0 says which" in errors


@pytest.mark.integration
@needs_namespaces
def test_a_rank_that_hangs_on_its_way_is_named_and_ends(digits, tmp_path):
    environ = shim(tmp_path, "sitecustomize.py", "import os, time\nos.fsync = lambda file: time.sleep(1000)\n")
    job = Job(*data(digits), f"run.dir={tmp_path / 'run'}", world_size=2, timeout=6)
    codes, checks, errors = job.start(0).start(1, environ, node="beta").end()
    assert codes == [1, 1]
    host = socket.gethostname()
    assert f"missing after 6 s: rank 1 on beta of 2; arrived: {host}: rank 0;" in checks["storage"][0][1]
    assert "rank 1 on beta: it hangs: no end within 14 s; check the storage of run.dir" in errors
    assert not (tmp_path / "run").exists()


@pytest.mark.integration
def test_a_port_that_another_program_has_is_named(digits, tmp_path):
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        port = server.getsockname()[1]
        job = Job(*data(digits), f"run.dir={tmp_path}", world_size=2, timeout=6, port=port)
        codes, checks, errors = job.start(0).start(1).end()
    assert codes == [1, 1]
    assert f"MASTER_PORT={port}: another program listens on this port; end it" in checks["ranks"][0][1]
    assert f"rank 1 on {socket.gethostname()}: it hangs: no end within 14 s; a program other than rank 0" in errors


def test_a_missing_index_a_wrong_batch_a_silent_server_and_a_full_disk_are_found_together(digits, small_disk):
    (small_disk / "filler").write_bytes(bytes(10_000_000))
    folder = small_disk.parent / "data"
    shutil.copytree(digits, folder)
    (folder / "index.json").unlink()
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        url = f"http://127.0.0.1:{silent.getsockname()[1]}/val.tar"
        words = ["data.global_batch_size=10", "engine.micro_batch_size=4", f"data.val={url}"]
        codes, checks, _ = Job(*data(folder), f"run.dir={small_disk / 'run'}", *words, timeout=8).start(0).end()
    assert codes == [1]
    wrong = failed(checks)
    assert set(wrong) == {"batch", "shards", "disk"}
    assert "engine.micro_batch_size: 4 does not divide the 10 images of a rank" in wrong["batch"][0]
    assert f"no index beside it ({folder}/index.json); run: python -m pipeline.shards index" in wrong["shards"][0]
    assert any(f"{url}: no success at byte 0 within 2 s" in message for message in wrong["shards"])
    assert "MiB needed for checkpoints of 2.5 MiB; free some space" in wrong["disk"][0]


@pytest.mark.integration
def test_a_run_directory_that_cannot_be_written_is_named(digits, small_disk):
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    codes, checks, _ = Job(*data(digits), f"run.dir={small_disk / 'run'}").start(0).end()
    assert codes == [1]
    assert "can't be written: Read-only file system; choose another run.dir" in failed(checks)["run directory"][0]


def test_a_run_directory_in_which_another_start_trains_is_refused_and_left_alone(digits, tmp_path):
    from pipeline import lease

    run = tmp_path / "run"
    run.mkdir()
    with lease.acquire(str(run), "run", "run.dir"):
        job = Job(*SMALL, *data(digits), f"run.dir={run}", "run.steps=2", "--then-train").start(0)
        codes, checks, _ = job.end()
    assert codes == [1]
    assert re.search(rf"process {os.getpid()} on \S+ \(.*\) is writing there already", checks["run directory"][0][1])
    assert [path.name for path in run.iterdir()] == [".run.lease-00000001"], "it writes no exit.json over the other's"


@pytest.mark.integration
def test_torchrun_starts_it_and_a_mistake_of_the_users_is_exit_code_2(digits, tmp_path):
    command = ["torchrun", "--nproc-per-node", "2", "--master-port", str(free_port()), "-m", "pipeline.preflight"]
    words = [*data(digits), f"run.dir={tmp_path}"]
    options = {"cwd": ROOT, "env": environment({}), "capture_output": True, "text": True, "timeout": 120}
    done = subprocess.run([*command, *words], **options)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "ok     all-reduce" in done.stdout
    assert "all is fine" in done.stdout
    done = subprocess.run([sys.executable, "-m", "pipeline.preflight", "optimizer.lrr=1"], **options)
    assert done.returncode == 2
    assert "optimizer.lrr: unknown key; known here are" in done.stderr


@pytest.mark.integration
def test_it_goes_on_as_the_training_command_only_if_all_is_fine(digits, tmp_path):
    words = ["-m", "pipeline.preflight", "--then-train", *SMALL, *data(digits), f"run.dir={tmp_path}", "run.steps=2"]
    options = {"cwd": ROOT, "env": environment({}), "capture_output": True, "text": True, "timeout": 120}
    done = subprocess.run([*two_ranks(), *words, "data.global_batch_size=63"], **options)
    assert done.returncode == 1
    assert "FAILED batch                    data.global_batch_size: 63 does not divide by 2 ranks" in done.stdout
    assert "1 problems" in done.stdout
    end = json.loads((tmp_path / "exit.json").read_text())
    assert end["status"] == "failed"
    assert end["reason"].startswith("preflight: batch: data.global_batch_size: 63 does not divide")
    assert [path.name for path in tmp_path.glob("[!.]*")] == ["exit.json"]
    done = subprocess.run([*two_ranks(), *words], **options)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"all is fine, in .*finished after step 2 of 2", done.stdout, re.S)
    assert json.loads((tmp_path / "exit.json").read_text())["status"] == "finished"
