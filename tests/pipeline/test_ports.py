"""Which ports a run opens, and what a stranger who reaches its store can do there: no code of his runs."""

import base64
import contextlib
import os
import pickle
import socket
import subprocess
import sys
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import psutil
import pytest
import torch.distributed as dist
from torch.distributed.elastic.rendezvous import RendezvousParameters, RendezvousStateError
from torch.distributed.elastic.rendezvous.c10d_rendezvous_backend import C10dRendezvousBackend
from torch.distributed.elastic.rendezvous.dynamic_rendezvous import create_handler

from pipeline import launcher, meeting
from pipeline.drill import last_step
from pipeline.errors import UserError
from pipeline.launcher import FixedNodes, elastic, open_head
from pipeline.meeting import Meeting
from pipeline.runtime import Ranks, Rendezvous, export_ranks, read_rendezvous
from pipeline.store import SECRET
from tests.conftest import ROOT, SMALL, data, environment, free_port, until


class Touch:
    """Unpickling it makes a folder."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def parameters(port, **config):
    return RendezvousParameters("x", f"127.0.0.1:{port}", "run", 1, 2, "127.0.0.1", is_host="true", **config)


def plant(store, path):
    """What the attack does: a state of the rendezvous that runs code when it is unpickled."""
    C10dRendezvousBackend(store, "run")
    state = C10dRendezvousBackend(store, "run").get_state()
    C10dRendezvousBackend(store, "run").set_state(pickle.dumps(Touch(path)), state[1] if state else None)


def test_torchs_own_rendezvous_runs_a_strangers_code_and_ours_does_not(tmp_path, monkeypatch):
    store = dist.HashStore()
    handler = create_handler(store, C10dRendezvousBackend(store, "run"), parameters(1))
    plant(store, tmp_path / "torch")
    with pytest.raises(AttributeError):  # it is no state; its code has run before
        handler._state_holder.sync()
    assert (tmp_path / "torch").exists(), "if this fails, torch has closed the hole and SignedBackend can go"

    monkeypatch.setenv(SECRET, "a secret")
    monkeypatch.setenv("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "0")
    handler = elastic(parameters(port := free_port()))
    holder = handler._state_holder
    holder._cache_duration = 0
    holder.sync()
    holder.mark_dirty()
    assert holder.sync(), "its own state is signed"
    assert [found for found in listening(psutil.Process()) if found[1] == port] == [("127.0.0.1", port)]
    plant(dist.TCPStore("127.0.0.1", port), tmp_path / "ours")
    with pytest.raises(RendezvousStateError, match=rf"key torch.rendezvous.run, .* not signed .*{SECRET}"):
        holder.sync()
    holder.mark_dirty()
    with pytest.raises(RendezvousStateError):
        holder.sync()
    assert not (tmp_path / "ours").exists()
    assert os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] == "1"


def test_an_elastic_run_without_a_secret_says_what_that_means(monkeypatch, capfd):
    monkeypatch.delenv(SECRET, raising=False)
    monkeypatch.setenv("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    elastic(parameters(port := free_port()))
    assert (
        f"warning: {SECRET} is not set: whoever reaches 127.0.0.1:{port} can run code as you" in capfd.readouterr().err
    )


@pytest.mark.parametrize("secret", ["a secret", ""])
def test_a_strangers_word_is_not_parsed_where_there_is_a_secret(monkeypatch, secret):
    monkeypatch.setenv(SECRET, secret)
    monkeypatch.setattr(meeting, "MAX_VALUE_BYTES", 200_000)
    place = Rendezvous("127.0.0.1", free_port(), False, "meeting")
    first = Meeting(0, 2, place, 5.0)
    second = Meeting(1, 2, place, 5.0)
    first.tell("ranks", {"host": "a"})
    second.tell("ranks", {"host": "é"})
    second.announce("stop")
    assert first.collect("ranks") == {0: {"host": "a"}, 1: {"host": "é"}}
    assert first.announced("stop")
    first.answer("ranks", [0])
    assert second.hear("ranks") == [0]
    stranger = dist.PrefixStore("meeting", dist.TCPStore("127.0.0.1", place.port, timeout=timedelta(seconds=5)))
    sealed = stranger.get("ranks/0")
    for planted, reason in (
        (' {"host": "evil"}', "is not signed"),
        (sealed.decode(), "is not signed"),  # rank 0's own word, under another key
        ("{", "is not signed" if secret else "is not JSON"),
        (" " + "[" * 100_000, "is not signed" if secret else "is not JSON"),
        (" " * 300_000, "has 300000 bytes, at most 200000 are read"),
    ):
        stranger.set("ranks/1", planted)
        if secret or "host" not in planted:
            with pytest.raises(UserError, match=rf"key meeting/ranks/1, expected from rank 1, .*{reason}"):
                first.collect("ranks")
        else:
            assert 1 in first.collect("ranks"), "as without a secret before"
    stranger.set("stop", " true")
    if secret:
        with pytest.raises(UserError, match="key meeting/stop, expected from another rank"):
            first.announced("stop")


def test_ranks_of_one_machine_meet_on_loopback_whatever_MASTER_ADDR_says():
    environ = {"MASTER_ADDR": "10.1.2.3", "MASTER_PORT": "29500"}
    export_ranks(Ranks(1, 2, 1, 2), environ)
    assert (environ["GLOO_SOCKET_IFNAME"], environ["NCCL_SOCKET_IFNAME"]) == ("lo", "=lo")
    assert read_rendezvous(environ).address == "127.0.0.1"
    assert read_rendezvous({**environ, "TORCHELASTIC_USE_AGENT_STORE": "True"}).address == "10.1.2.3"
    environ = {"MASTER_ADDR": "10.1.2.3", "MASTER_PORT": "29500"}
    export_ranks(Ranks(1, 4, 1, 2), environ)
    assert "GLOO_SOCKET_IFNAME" not in environ
    assert read_rendezvous(environ).address == "10.1.2.3"
    environ = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}  # of a launcher whose only process opens no port
    export_ranks(Ranks(0, 1, 0, 1), environ)
    assert read_rendezvous(environ).port == 0


def test_each_start_of_the_ranks_has_a_fresh_store_and_one_process_has_none():
    one_machine = RendezvousParameters("fixed", "127.0.0.1:0", "run", 1, 1, None)
    rendezvous = FixedNodes(one_machine)
    first, second = (rendezvous.next_rendezvous() for _ in range(2))
    assert first.bootstrap_store_info.master_port != second.bootstrap_store_info.master_port
    first.store.set("old", "x")
    assert not second.store.check(["old"])
    alone = FixedNodes(RendezvousParameters("fixed", "127.0.0.1:0", "run", 1, 1, None, ranks="1"))
    assert isinstance(alone.next_rendezvous().store, dist.HashStore)
    assert not alone.use_agent_store


def test_nodes_that_nobody_has_numbered_are_ranked_by_address_after_the_head():
    def join(address):
        words = {"is_host": str(address == "10.0.0.7"), "ranks": "2"}
        nodes = FixedNodes(RendezvousParameters("fixed", f"127.0.0.1:{port}", "run", 3, 3, address, **words))
        return nodes.next_rendezvous()

    port = free_port()
    addresses = ("10.0.0.9", "10.0.0.2", "10.0.0.7")
    with ThreadPoolExecutor(3) as pool:
        joined = dict(zip(addresses, pool.map(join, addresses), strict=True))
    assert {address: found.rank for address, found in joined.items()} == {"10.0.0.7": 0, "10.0.0.2": 1, "10.0.0.9": 2}
    assert {found.bootstrap_store_info.master_port for found in joined.values()} == {port}


@pytest.mark.parametrize(
    ("words", "backend", "endpoint"),
    [
        ("torchrun --nproc-per-node 2", "fixed", "127.0.0.1:0"),
        ("torchrun --standalone --nproc-per-node 2", "fixed", "127.0.0.1:0"),
        ("torchrun --rdzv-backend c10d --nproc-per-node 2", "fixed", "127.0.0.1:0"),
        ("torchrun --nnodes 2 --node-rank 1 --master-addr n1 --master-port 5", "fixed", "n1:5"),
        ("torchrun --nnodes 2 --node-rank 1 --master-addr n1", "fixed", "n1:29500"),
        ("torchrun --nnodes 1:2 --rdzv-backend elastic --rdzv-endpoint n1:5", "elastic", "n1:5"),
        ("accelerate --multi_gpu --num_processes 2 --num_machines 1", "fixed", "127.0.0.1:0"),
        ("accelerate --multi_gpu --num_processes 2 --num_machines 1 --main_process_port {taken}", "fixed",
         "127.0.0.1:0"),
        ("accelerate --multi_gpu --num_processes 4 --num_machines 2 --machine_rank 1 --main_process_ip n1"
         " --main_process_port 5", "fixed", "n1:5"),
    ],
)  # fmt: skip
def test_whatever_our_launcher_is_told_it_uses_our_rendezvous(monkeypatch, words, backend, endpoint):
    """torch's own would listen on all addresses. `accelerate` takes it where its usual port is taken."""
    started = []
    monkeypatch.setattr(launcher.torchrun, "run", started.append)
    monkeypatch.setattr(sys, "argv", [])
    monkeypatch.setattr(launcher, "screen_output", lambda: None)
    with socket.create_server(("127.0.0.1", 0)) as server, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        launcher.main([*words.format(taken=server.getsockname()[1]).split(), "script.py"])
    (found,) = started
    assert (found.standalone, found.rdzv_backend, found.rdzv_endpoint) == (False, backend, endpoint)
    assert ("is_host=False,node_rank=1" in found.rdzv_conf) == (backend == "fixed" and "n1:" in endpoint)


def test_an_ipv6_address_of_the_head_will_do(monkeypatch):
    with contextlib.suppress(OSError), socket.create_server(("::1", 0), family=socket.AF_INET6):
        assert open_head("::1", free_port(), True, 5.0).port


@pytest.mark.integration
def test_a_launcher_shows_no_secret_of_the_command_that_failed():
    words = ["accelerate", "--config_file", "launch/accelerate/one_process.yaml", "pipeline/train.py",
             "data.train=http://SECRET:SECRET@h/x.tar?token=SECRET", "data.nothing=1"]  # fmt: skip
    command = [sys.executable, "-m", "pipeline.launcher", *words]
    done = subprocess.run(command, cwd=ROOT, env=environment({}), capture_output=True, text=True, timeout=100)
    assert "CalledProcessError" in done.stderr
    assert "SECRET" not in done.stdout + done.stderr


GATHER = """
import json, sys
import torch, torch.distributed as dist
from pipeline import engine
from pipeline.runtime import Ranks
def refuse(*words): raise AssertionError("an object collective")
dist.distributed_c10d._object_to_tensor = dist.distributed_c10d._tensor_to_object = refuse
rank = int(sys.argv[1])
dist.init_process_group("gloo", init_method=f"file://{sys.argv[2]}", rank=rank, world_size=2)
one = engine.Engine.__new__(engine.Engine)
one.ranks, one.device = Ranks(rank, 2, rank, 2), torch.device("cpu")
found = one.gather_objects([None, "é\\udce9" * 5] if rank else {"1": (2, 3)}, dist.new_group(backend="gloo"))
assert found == [{"1": [2, 3]}, [None, "é\\udce9" * 5]], found
assert one.gather_objects(rank or None) == [None, 1]
engine.MAX_GATHERED_BYTES = 100
try:
    one.gather_objects("x" * 200 if rank else 0)
except RuntimeError as error:
    print(error)
"""


def test_ranks_exchange_json_and_no_pickles(tmp_path):
    command = [sys.executable, "-c", GATHER]
    processes = [
        subprocess.Popen([*command, str(rank), tmp_path / "store"], cwd=ROOT, env=environment({}), text=True,
                         stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        for rank in range(2)
    ]  # fmt: skip
    said = [process.communicate(timeout=100)[0] for process in processes]
    assert said == ["rank 1 sends 202 bytes of JSON, expected 1 to 100\n"] * 2


def listening(*processes):
    """(address, port) of all sockets on which processes listen."""
    found = [connection for process in processes for connection in process.net_connections("inet")]
    return {tuple(connection.laddr) for connection in found if connection.status == "LISTEN"}


NO_PICKLES = """
import os
if "RANK" in os.environ:
    import torch.distributed.distributed_c10d as c10d
    def refuse(*words): raise AssertionError("an object collective")
    c10d._object_to_tensor = c10d._tensor_to_object = refuse
"""


@pytest.mark.integration
@pytest.mark.parametrize(("ranks", "words"), [(1, ()), (2, ()), (2, ("engine.zero_stage=2",))])
def test_a_run_on_one_machine_listens_on_loopback_only_and_one_process_not_at_all(digits, tmp_path, ranks, words):
    """A stranger on the machine plants pickles in the launcher's store meanwhile. Nobody unpickles them."""
    (tmp_path / "sitecustomize.py").write_text(NO_PICKLES)
    run, marker = tmp_path / "run", tmp_path / "marker"
    words = [*SMALL, *data(digits), "model.depth=1", "run.steps=100000", f"run.dir={run}", *words]
    process = subprocess.Popen(
        ["bash", "launch/local.sh", "--ranks", str(ranks), *words], cwd=ROOT, text=True,
        env=environment({"PYTHONPATH": f"{tmp_path}:{ROOT}"}), stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    try:
        until(lambda: last_step(str(run)) > 2 or process.poll() is not None, pause=0.1)
        assert process.poll() is None, process.communicate()[0]
        parent = psutil.Process(process.pid)
        assert {where for where, _ in listening(parent, *parent.children(recursive=True))} == (
            {"127.0.0.1"} if ranks > 1 else set()
        )
        stores = listening(parent)
        assert len(stores) == (ranks > 1)
        for address, port in stores:
            store = dist.TCPStore(address, port, timeout=timedelta(seconds=5), wait_for_workers=False)
            for key in (*store.list_keys(), "torch.rendezvous.local"):
                store.set(key, base64.b64encode(pickle.dumps(Touch(marker))).decode())
            time.sleep(2)
    finally:
        if process.poll() is None:
            (run / "STOP").touch()
        output, _ = process.communicate(timeout=60)
    assert process.returncode == 0, output
    assert "an object collective" not in output
    assert not marker.exists()
