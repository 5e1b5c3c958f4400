"""Which device a rank takes, what wraps its model, and what preflight tries of both networks."""

from types import SimpleNamespace

import pytest
import torch

from pipeline import checks, engine
from pipeline.config import load_config
from pipeline.engine import Engine, EngineConfig, plan_batch
from pipeline.errors import UserError
from pipeline.optimizer import OptimizerConfig, build_optimizer
from pipeline.report import checkpoint_bytes, state_bytes
from pipeline.runtime import Ranks, export_ranks, local_device
from tests.conftest import ROOT


def see_gpus(monkeypatch, count):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)


@pytest.mark.parametrize(
    ("gpus", "local_rank", "expected"),
    [(0, 3, "cpu"), (8, 0, "cuda:0"), (8, 3, "cuda:3"), (1, 0, "cuda:0"), (1, 3, "cuda:0")],
)
def test_a_rank_takes_the_gpu_of_its_local_rank_or_the_only_one_it_sees(monkeypatch, gpus, local_rank, expected):
    """srun --gpus-per-task=1 shows each of four ranks one GPU, which is number 0 to all of them."""
    see_gpus(monkeypatch, gpus)
    assert local_device(Ranks(local_rank, 4, local_rank, 4)) == torch.device(expected)


def test_more_ranks_than_gpus_are_refused(monkeypatch):
    see_gpus(monkeypatch, 2)
    with pytest.raises(UserError, match=r"rank 2 on .* local rank is 2, but it sees 2 GPUs; start at most one rank"):
        local_device(Ranks(2, 4, 2, 4))


def test_ranks_are_told_apart_by_their_gpus_identity(monkeypatch):
    see_gpus(monkeypatch, 1)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1 << 34, 1 << 35))
    seen = []
    for rank, uuid in enumerate(["a", "b", "b"]):
        properties = SimpleNamespace(name="GPU", uuid=uuid)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device, properties=properties: properties)
        seen.append(checks.look_at_process(Ranks(rank, 3, rank, 3)))
    assert [finding.fine for finding in checks.check_devices(seen[:2])] == [True]
    (finding,) = checks.check_devices(seen)
    assert "has the same GPU as rank 1 (local rank 2 and 1)" in finding.text


class Group:
    """torch.distributed, without any other rank: remembers what was asked of it."""

    DistBackendError = torch.distributed.DistBackendError

    def __init__(self, error=None):
        self.error, self.asked, self.initialized = error, [], False

    def is_initialized(self):
        return self.initialized

    def init_process_group(self, backend, **options):
        self.asked.append((backend, options["device_id"]))
        if self.error is not None:
            raise self.error
        self.initialized = True

    def new_group(self, ranks=None, backend="nccl", timeout=None):
        self.asked.append((backend, ranks))
        return backend

    def PrefixStore(self, prefix, store):
        return store

    def destroy_process_group(self):
        self.initialized = False


@pytest.fixture
def one_gpu(monkeypatch):
    see_gpus(monkeypatch, 1)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setenv("LOCAL_RANK", "3")
    return torch.device("cuda", 0)


def test_preflight_on_gpus_tries_gloo_too(monkeypatch, one_gpu):
    group, reduced = Group(), []
    monkeypatch.setattr(checks, "dist", group)

    def all_reduce(rank, device, members, group):
        reduced.append((device.type, group))
        if group == "gloo":
            raise RuntimeError("[gloo/pair.cc] connect to 127.0.1.1 refused")
        return {"wrong": [], "speed": 1e9}

    monkeypatch.setattr(checks, "all_reduce", all_reduce)
    seen = checks.measure(Ranks(3, 4, 3, 4), [0], None, 5.0)
    assert reduced == [("cuda", None), ("cpu", "gloo")]
    assert group.asked == [("nccl", one_gpu), ("gloo", None)]
    looks = [{"rank": rank, "host": "node", **seen} for rank in range(4)]
    fine, *refused = checks.check_all_reduce(looks, 1000)
    assert (fine.name, fine.fine) == ("all-reduce", True)
    assert {(finding.name, finding.fine) for finding in refused} == {("all-reduce by gloo", False)}
    assert "connect to 127.0.1.1 refused; check that the nodes reach each other" in refused[0].text


def test_the_process_group_is_bound_to_the_ranks_gpu(monkeypatch, one_gpu):
    group = Group()
    monkeypatch.setattr(engine.torch, "distributed", group)
    monkeypatch.setattr(engine, "open_store", lambda *place: None)
    monkeypatch.setattr(engine, "read_rendezvous", lambda environ: None)
    rank = Engine.__new__(Engine)
    rank.config, rank.ranks = EngineConfig(), Ranks(3, 4, 3, 4)
    rank._join()
    assert group.asked == [("nccl", one_gpu)]
    assert engine.os.environ["LOCAL_RANK"] == "0", "Accelerate and DeepSpeed take the device of this number"
    group = Group(torch.distributed.DistBackendError("NCCL error ... Duplicate GPU detected : rank 3 and rank 2 both"))
    monkeypatch.setattr(engine.torch, "distributed", group)
    with pytest.raises(UserError, match=r"rank 3 on .*: another rank has the same GPU"):
        rank._join()


def test_a_single_process_is_not_wrapped(monkeypatch):
    environ = {"OMP_NUM_THREADS": "1"}
    export_ranks(Ranks(0, 1, 0, 1), environ)
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    alone = Engine(EngineConfig(precision="bf16"), plan_batch(4, 2, 1), Ranks(0, 1, 0, 1))
    layer = torch.nn.Linear(3, 2)
    alone.prepare(layer, build_optimizer(layer, OptimizerConfig(), 0.1), None)
    assert alone.model is layer
    before = layer.weight.detach().clone()
    for _ in range(2):  # micro batches
        with alone.micro_step():
            output = alone.model(torch.ones(2, 3))
            alone.backward(output.square().sum() / 4)
    assert output.dtype == torch.float32, "computed in bf16, returned in fp32"
    assert alone.step(0.1) > 0
    assert not torch.equal(layer.weight, before)
    alone.close()


@pytest.mark.parametrize(
    ("words", "bytes_each"),
    [([], 12), (["optimizer.ema_decay=0.9"], 16), (["optimizer.name=sgd"], 8),
     (["optimizer.name=sgd", "optimizer.momentum=0"], 4)],
)  # fmt: skip
def test_preflight_knows_what_a_checkpoint_holds(words, bytes_each, tmp_path):
    config = load_config(str(ROOT / "configs/digits.yaml"), [*words, "checkpoint.keep_last=2", f"run.dir={tmp_path}"])
    assert checkpoint_bytes(1000, config) == bytes_each * 1000
    looks = [{"rank": 0, "host": "node", "run_dir": {"free": 3 * bytes_each * 1000}}]
    assert [finding.fine for finding in checks.check_disk(looks, config, 1000)] == [True]
    looks[0]["run_dir"]["free"] -= 1
    assert [finding.fine for finding in checks.check_disk(looks, config, 1000)] == [False]


def test_memory_counts_gradients_that_accumulate_in_fp32():
    words = ["engine.precision=bf16", "data.global_batch_size=64"]
    plain, accumulating = (
        load_config(str(ROOT / "configs/digits.yaml"), [*words, f"engine.micro_batch_size={micro}"])
        for micro in (32, 8)
    )
    assert state_bytes(1000, 1, accumulating, 2) == state_bytes(1000, 1, plain, 2) + 2000
    assert state_bytes(1000, None, accumulating, 2) == state_bytes(1000, None, plain, 2)
