"""Schedule, optimizer groups, objective, batch arithmetic, ranks, checkpoints, each on its own."""

import math

import pytest
import torch

from pipeline import checkpoint
from pipeline.engine import TrainingState, plan_batch
from pipeline.errors import UserError
from pipeline.objectives.classification import Config
from pipeline.optimizer import OptimizerConfig, parameter_groups
from pipeline.runtime import Ranks, read_ranks
from pipeline.schedule import ScheduleConfig, learning_rate
from vit.model import ViT, ViTConfig


def test_learning_rate_warms_up_and_falls_as_a_cosine():
    config = ScheduleConfig(peak_lr=1.0, end_lr=0.1, warmup_steps=10)
    assert [learning_rate(s, 110, config) for s in (0, 4, 9, 10)] == pytest.approx([0.1, 0.5, 1.0, 1.0])
    assert learning_rate(60, 110, config) == pytest.approx(0.55)
    assert learning_rate(110, 110, config) == pytest.approx(0.1)


def test_biases_norms_tokens_and_positions_are_not_decayed():
    with torch.device("meta"):
        model = ViT(ViTConfig())
    decayed, plain = parameter_groups(model.named_parameters(), OptimizerConfig(weight_decay=0.3))
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
    with pytest.raises(UserError, match="WORLD_SIZE: expected a number, found 'two'"):
        read_ranks({"RANK": "0", "WORLD_SIZE": "two"})


def state(value):
    weights = {"a": torch.full((3, 2), value)}
    moments = {key: {"a": torch.full((3, 2), value)} for key in ("exp_avg", "exp_avg_sq")}
    return TrainingState(weights, moments, updates=int(value))


def test_checkpoints_are_pruned_and_the_newest_whole_one_is_found(tmp_path):
    folder = str(tmp_path)
    for step in (1, 2, 3):
        checkpoint.save(folder, step, state(float(step)), {"config": {}}, keep_last=2)
    path, skipped = checkpoint.latest(folder)
    assert path.endswith("step-00000003")
    assert not skipped
    assert not (tmp_path / "step-00000001").exists()
    loaded = checkpoint.load(path, checkpoint.load_state(path)["updates"])
    assert torch.equal(loaded.moments["exp_avg"]["a"], torch.full((3, 2), 3.0))
    assert loaded.updates == 3


@pytest.mark.parametrize("damage", ["flip", "cut", "no manifest"])
def test_a_damaged_checkpoint_is_skipped_with_its_reason(tmp_path, damage):
    for step in (1, 2):
        checkpoint.save(str(tmp_path), step, state(1.0), {"config": {}}, keep_last=3)
    file = tmp_path / "step-00000002" / ("manifest.json" if damage == "no manifest" else "model.safetensors")
    content = bytearray(file.read_bytes())
    if damage == "flip":
        content[-1] ^= 1
        file.write_bytes(content)
    elif damage == "cut":
        file.write_bytes(content[:-1])
    else:
        file.unlink()
    path, skipped = checkpoint.latest(str(tmp_path))
    assert path.endswith("step-00000001")
    assert "step-00000002" in skipped[0]
    with pytest.raises(UserError, match="no whole checkpoint"):
        checkpoint.load_state(str(tmp_path / "step-00000002"))
