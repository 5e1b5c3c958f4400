"""Compiled blocks under ZeRO-3, whose hooks gather each block's weights: they train the same, and resume."""

import json
import shutil

import pytest

from pipeline import checkpoint
from tests.conftest import SMALL, data, two_ranks
from tests.integration.test_runs import losses, train_several

DEEP = ["model.image_size=16", "model.width=32", "model.depth=4", "model.heads=2", "model.mlp_dim=64"]


@pytest.fixture(scope="module")
def compiled(digits, tmp_path_factory):
    """Six steps in ZeRO-3: plain, compiled, compiled with activation checkpointing, compiled and resumed at step 4."""
    folder = tmp_path_factory.mktemp("compiled")
    words = [*SMALL, *DEEP, *data(digits), "data.workers=0", "run.steps=6", "schedule.warmup_steps=2",
             "engine.micro_batch_size=16", "engine.zero_stage=3", "checkpoint.every_steps=4"]  # fmt: skip
    ways = {"plain": [], "block": ["engine.compile=block"]}
    ways["checkpointing"] = ["engine.compile=block", "engine.activation_checkpointing=true"]
    train_several(
        folder, *([*words, *more, f"run.dir={folder / way}"] for way, more in ways.items()), launcher=two_ranks()
    )
    shutil.copytree(folder / "block", folder / "resumed")
    (folder / "resumed/exit.json").unlink()
    shutil.rmtree(folder / "resumed/checkpoints/step-00000006")
    resumed = [*words, "engine.compile=block", f"run.dir={folder / 'resumed'}"]
    assert "resuming from" in train_several(folder, resumed, launcher=two_ranks())
    return folder


@pytest.mark.integration
@pytest.mark.timeout(900)
@pytest.mark.parametrize("way", ["block", "checkpointing"])
def test_compiled_blocks_in_zero_3_have_the_losses_of_plain_ones(compiled, way):
    assert losses(compiled / way) == pytest.approx(losses(compiled / "plain"), abs=1e-5)
    evaluations = [json.loads((compiled / name / "metrics.jsonl").read_text().splitlines()[-1])["val/loss"]
                   for name in (way, "plain")]  # fmt: skip
    assert evaluations[0] == pytest.approx(evaluations[1], abs=1e-5)


@pytest.mark.integration
@pytest.mark.timeout(900)
def test_compiled_blocks_in_zero_3_resume_bit_for_bit(compiled):
    assert losses(compiled / "resumed") == losses(compiled / "block")
    mine, theirs = (checkpoint.load(str(compiled / way / "checkpoints/step-00000006")) for way in ("resumed", "block"))
    assert all(mine.weights[name].equal(theirs.weights[name]) for name in theirs.weights)
    for key, moments in theirs.moments.items():
        assert all(mine.moments[key][name].equal(moments[name]) for name in moments)
