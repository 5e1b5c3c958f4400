"""Schedule, optimizer groups, objective, batch arithmetic, ranks, each on its own."""

import math
import os
import subprocess
import sys
import time

import pytest
import torch

from pipeline.engine import EngineConfig, check_launcher, plan_batch, share_of
from pipeline.errors import UserError
from pipeline.objectives.classification import Config
from pipeline.optimizer import OptimizerConfig, build_optimizer, moment_names, parameter_groups, skip_step
from pipeline.runtime import Ranks, StopSignal, export_ranks, process_began, read_accelerate, read_ranks
from pipeline.schedule import ScheduleConfig, learning_rate
from tests.conftest import ROOT
from vit.model import ViT, ViTConfig


def test_learning_rate_warms_up_and_falls_as_a_cosine():
    config = ScheduleConfig(peak_lr=1.0, end_lr=0.1, warmup_steps=10)
    assert [learning_rate(s, 110, config) for s in (0, 4, 9, 10)] == pytest.approx([0.1, 0.5, 1.0, 1.0])
    assert learning_rate(60, 110, config) == pytest.approx(0.55)
    assert learning_rate(110, 110, config) == pytest.approx(0.1)


def test_other_schedules_fall_as_they_say():
    linear = ScheduleConfig(shape="linear", peak_lr=1.0, end_lr=0.5, warmup_steps=10)
    assert [learning_rate(s, 110, linear) for s in (4, 10, 60, 110)] == pytest.approx([0.5, 1.0, 0.75, 0.5])
    constant = ScheduleConfig(shape="constant", peak_lr=1.0, end_lr=0.2, warmup_steps=10, cooldown_steps=20)
    assert [learning_rate(s, 110, constant) for s in (4, 10, 90, 100, 110)] == pytest.approx([0.5, 1.0, 1.0, 0.6, 0.2])
    with pytest.raises(ValueError, match="cooldown_steps: shape=cosine falls all the way"):
        ScheduleConfig(cooldown_steps=5)
    with pytest.raises(ValueError, match="end_lr: shape=constant never reaches it"):
        ScheduleConfig(shape="constant", end_lr=1e-5)


def test_layer_decay_lowers_the_learning_rate_from_block_to_block():
    model = ViT(ViTConfig(image_size=16, patch_size=8, width=8, depth=3, heads=2, mlp_dim=8, num_classes=2))
    groups = parameter_groups(model.named_parameters(), OptimizerConfig(layer_decay=0.5), 1.0)
    scales = {name: group["lr_scale"] for group in groups for name in group["names"]}
    assert scales["head.weight"] == scales["norm.bias"] == 1.0
    assert scales["blocks.2.attention_norm.weight"] == 0.5
    assert scales["blocks.0.attention_norm.weight"] == 0.125
    assert scales["class_token"] == scales["positions"] == 0.0625
    assert set(scales) == {name for name, _ in model.named_parameters()}
    assert sum(len(group["params"]) for group in groups) == len(scales)


@pytest.mark.parametrize("layer_decay", [1.0, 0.5])
def test_weight_decay_can_be_a_share_of_the_peak_learning_rate(layer_decay):
    """big_vision's: weights lose weight_decay x learning_rate / peak_lr a step, whatever the learning rate itself."""
    weight = torch.nn.Linear(2, 2, bias=False)
    before = weight.weight.detach().clone()
    config = OptimizerConfig(weight_decay=0.01, decay_times_lr=False, layer_decay=layer_decay)
    optimizer = build_optimizer(weight, config, peak_lr=0.3)
    for group in optimizer.param_groups:
        group["lr"] = 0.15 * group["lr_scale"]  # at half of the peak
    weight.weight.grad = torch.zeros(2, 2)
    optimizer.step()
    torch.testing.assert_close(weight.weight, before * (1 - 0.01 * 0.5))


def test_sgd_equals_the_formula_and_leaves_out_a_step():
    layer = torch.nn.Linear(2, 2, bias=False)
    weight, gradient = layer.weight.detach().clone(), torch.ones(2, 2)
    optimizer = build_optimizer(layer, OptimizerConfig(name="sgd", momentum=0.5, weight_decay=0.1), peak_lr=1.0)
    assert moment_names(optimizer) == ("momentum_buffer",)
    momentum = torch.zeros(2, 2)
    for step in range(3):
        for group in optimizer.param_groups:
            group["lr"] = 0.2
        layer.weight.grad = gradient.clone()
        skip_step(optimizer, torch.tensor(step == 1))
        optimizer.step()
        if step != 1:
            momentum = 0.5 * momentum + gradient + 0.1 * weight
            weight = weight - 0.2 * momentum
    torch.testing.assert_close(layer.weight.detach(), weight)


def test_impossible_optimizers_are_refused():
    with pytest.raises(ValueError, match="decay_times_lr: sgd adds the decay"):
        OptimizerConfig(name="sgd", decay_times_lr=False)
    with pytest.raises(ValueError, match="ema_decay: must lie in"):
        OptimizerConfig(ema_decay=1.5)
    with pytest.raises(ValueError, match=r"offload_optimizer: needs engine\.zero_stage 1, 2 or 3"):
        EngineConfig(offload_optimizer=True)
    with pytest.raises(ValueError, match="reduce_precision: half needs"):
        EngineConfig(reduce_precision="half")
    with pytest.raises(ValueError, match=r"precision: .* ZeRO-0 .* with fp16 set engine\.zero_stage=1"):
        EngineConfig(precision="fp16", zero_stage=0)
    with pytest.raises(ValueError, match="initial_loss_scale: must be a power of two, found 1000"):
        EngineConfig(initial_loss_scale=1000)
    with pytest.raises(ValueError, match="compile: zero_stage=3"):
        EngineConfig(zero_stage=3, compile="model")


ACCELERATE = {"ACCELERATE_MIXED_PRECISION": "no", "ACCELERATE_USE_DEEPSPEED": "true"}


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({}, "told zero_stage=2, but this config has engine.zero_stage=1; set engine.zero_stage=2"),
        ({"ACCELERATE_DEEPSPEED_ZERO_STAGE": "1"}, None),
        ({"ACCELERATE_DEEPSPEED_ZERO_STAGE": "1", "ACCELERATE_MIXED_PRECISION": "fp16"}, "engine.precision=bf16"),
        ({"ACCELERATE_DEEPSPEED_ZERO_STAGE": "1", "ACCELERATE_GRADIENT_CLIPPING": "1.0"}, None),
        ({"ACCELERATE_DEEPSPEED_ZERO_STAGE": "1", "ACCELERATE_GRADIENT_CLIPPING": "0.5"}, "engine.grad_clip=0.5"),
        ({"ACCELERATE_DEEPSPEED_ZERO_STAGE": "1", "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "1"}, None),
        (
            {"ACCELERATE_DEEPSPEED_ZERO_STAGE": "1", "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "3"},
            "gradient_accumulation_steps=3, but this config has accumulation=4; set engine.micro_batch_size",
        ),
        ({"ACCELERATE_DEEPSPEED_ZERO_STAGE": "1", "ACCELERATE_USE_FSDP": "true"}, "use_fsdp=true: not used here"),
        ({"ACCELERATE_DEEPSPEED_ZERO_STAGE": "1", "ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": "none"}, None),
        (
            {"ACCELERATE_DEEPSPEED_ZERO_STAGE": "1", "ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": "cpu"},
            "this config has engine.offload_optimizer=none; set engine.offload_optimizer=true",
        ),
    ],
)  # fmt: skip
def test_what_accelerate_was_told_is_held_against_the_config(said, message):
    config, plan = EngineConfig(zero_stage=1, precision="bf16", micro_batch_size=8), plan_batch(64, 8, 2)
    environ = {**ACCELERATE, **said, "OTHER": "stays"}
    found = read_accelerate(environ)
    assert environ == {"OTHER": "stays"}, "Accelerate itself does not see it"
    if message is None:
        check_launcher(config, plan, found)
    else:
        with pytest.raises(UserError, match=message):
            check_launcher(config, plan, found)


def test_of_equal_logits_the_first_counts():
    from pipeline.data.loader import Batch

    batch = Batch(torch.zeros(2, 3), torch.tensor([0, 2]), torch.tensor([True, True]), ["", ""], 2)
    _, metrics = Config()(lambda images: images, batch)
    assert metrics["top1"] == 1


def test_biases_norms_tokens_and_positions_are_not_decayed():
    with torch.device("meta"):
        model = ViT(ViTConfig())
    decayed, plain = parameter_groups(model.named_parameters(), OptimizerConfig(weight_decay=0.3), 1.0)
    assert decayed["weight_decay"] == 0.3
    assert plain["weight_decay"] == 0.0
    assert all(name.endswith("weight") and "norm" not in name for name in decayed["names"])
    assert {"class_token", "positions", "head.bias", "norm.weight", "blocks.0.attention_norm.weight"} <= set(
        plain["names"]
    )
    assert len(decayed["params"]) + len(plain["params"]) == len(list(model.parameters()))


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("loss", ["softmax", "sigmoid"])
def test_losses_equal_torch(loss, smoothing):
    logits, labels = torch.randn(5, 7, dtype=torch.float64) * 4, torch.tensor([0, 6, 3, 3, 1])
    ours = Config(loss=loss, label_smoothing=smoothing).per_row(logits, labels)
    f = torch.nn.functional
    if loss == "softmax":
        theirs = f.cross_entropy(logits, labels, label_smoothing=smoothing, reduction="none")
    else:
        target = f.one_hot(labels, 7).double() * (1.0 - smoothing) + smoothing / 7
        theirs = f.binary_cross_entropy_with_logits(logits, target, reduction="none").sum(1)
    torch.testing.assert_close(ours, theirs)


def test_masked_rows_count_nowhere():
    from pipeline.data.loader import Batch

    logits = torch.tensor([[3.0, 0.0], [0.0, 3.0], [math.nan, 0.0]])
    batch = Batch(logits, torch.tensor([0, 0, 1]), torch.tensor([True, True, False]), ["", "", ""], 2)
    finite = batch.images.nan_to_num()
    _, metrics = Config()(lambda images: finite, batch)
    assert {k: v.item() for k, v in metrics.items() if k != "loss"} == {"top1": 1, "top5": 2, "count": 2}


def test_batch_arithmetic():
    assert plan_batch(64, 8, 2).accumulation == 4
    with pytest.raises(UserError, match=r"64 does not divide by 3 ranks.*: 2, 4; .*: 63, 66"):
        plan_batch(64, None, 3)
    with pytest.raises(UserError, match=r"micro_batch_size: 12 does not divide the 32 images.*: 8, 16"):
        plan_batch(64, 12, 2)


def test_ranks_are_read_from_each_launcher():
    assert read_ranks({}) == Ranks(0, 1, 0, 1)
    torchrun = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}
    assert read_ranks(torchrun) == Ranks(3, 4, 1, 2)
    srun = {"SLURM_STEP_ID": "0", "SLURM_PROCID": "2", "SLURM_STEP_NUM_TASKS": "4", "SLURM_LOCALID": "0",
            "SLURM_STEP_TASKS_PER_NODE": "2(x2)"}  # fmt: skip
    assert read_ranks(srun) == Ranks(2, 4, 0, 2)
    for nodes, address in (("localhost,x[01-03]", "localhost"), ("no-such-host[07-09]n[1-2],x", "10.0.0.7")):
        environ = {"SLURM_STEP_NODELIST": nodes, "SLURM_LAUNCH_NODE_IPADDR": "10.0.0.7"}
        export_ranks(read_ranks(srun), environ)
        assert environ["MASTER_ADDR"] == address
    with pytest.raises(UserError, match="WORLD_SIZE: expected a number, found 'two'"):
        read_ranks({"RANK": "0", "WORLD_SIZE": "two"})


def test_a_stop_file_counts_if_it_was_made_since_the_process_was_started(tmp_path):
    late = "import time; time.sleep(0.5); from pipeline.runtime import process_began; print(process_began())"
    before = time.time()
    began = float(subprocess.check_output([sys.executable, "-c", late], cwd=ROOT))
    assert before - 0.02 <= began <= before + 0.3
    began = process_began()
    file = tmp_path / "STOP"
    file.touch()
    os.utime(file, (began - 0.1, began - 0.1))
    stop = StopSignal()
    stop.watch(str(file))
    assert not file.exists()
    assert not stop.wanted()
    file.touch()
    os.utime(file, (began + 0.1, began + 0.1))  # while it still imported
    stop = StopSignal()
    stop.watch(str(file))
    assert stop.wanted()
    assert stop.name == "STOP file"


def test_every_rank_writes_about_as_much():
    sizes = {f"p{n}": size for n, size in enumerate([7, 1, 1, 50, 3, 30, 30, 4])}
    shares = [share_of(sizes, rank, 3) for rank in range(3)]
    assert [name for mine in shares for name in mine] == list(sizes)
    assert all(20 < sum(sizes[name] for name in mine) < 70 for mine in shares)
    assert share_of({"only": 5}, 0, 2) + share_of({"only": 5}, 1, 2) == ["only"]
