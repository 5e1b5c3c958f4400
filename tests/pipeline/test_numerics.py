"""fp16's loss scale: nothing that is not finite reaches the weights, and skipped steps are counted."""

import re

import pytest
import torch

from pipeline.engine import MIN_LOSS_SCALE, Engine, EngineConfig, LossScale, TrainingState, plan_batch
from pipeline.errors import UserError
from pipeline.health import Health, HealthConfig, SpikeDetector
from pipeline.monitor.jsonl import Lines
from pipeline.optimizer import OptimizerConfig, build_optimizer
from pipeline.runtime import Ranks, export_ranks
from pipeline.zero import OLDEST_DEEPSPEED, ZeroEngine
from tests.integration.nan_guard import Poison
from tests.oldest import oldest


@pytest.fixture
def launched(monkeypatch):
    """The environment of a single process."""
    environ = {"OMP_NUM_THREADS": "1"}
    export_ranks(Ranks(0, 1, 0, 1), environ)
    for name, value in environ.items():
        monkeypatch.setenv(name, value)


def scaled_engine(scale, state=None):
    """The engine with fp16's scaler at work. Accelerate has one on GPUs only; torch's own for the CPU stands in."""
    layer = torch.nn.Linear(3, 2)
    torch.nn.init.constant_(layer.weight, 0.5)
    torch.nn.init.constant_(layer.bias, 0.0)
    engine = Engine(EngineConfig(grad_clip=1.0), plan_batch(4, None, 1), Ranks(0, 1, 0, 1))
    engine.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=scale)
    engine.prepare(layer, build_optimizer(layer, OptimizerConfig(), peak_lr=0.1), state)
    return engine


IMAGES = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))


def step(engine, added=0.0):
    """One step, whose gradient `added` is added to: its loss (which stays finite) and its gradient's norm."""
    loss = Poison.apply(engine.model(IMAGES), added).square().mean()
    engine.backward(loss)
    return loss.detach(), engine.step(0.1)


def test_a_loss_scale_changes_no_step_falls_at_an_overflow_and_is_kept(launched):
    found = {}
    for scale in (2.0, 1024.0):
        engine = scaled_engine(scale)
        norms, weights = [], []
        for added in (0.0, float("inf"), 0.0):
            norms.append(float(step(engine, added)[1]))
            weights.append(engine.module.weight.detach().clone())
        assert torch.equal(weights[0], weights[1]), "the step that overflows is left out"
        assert not torch.equal(weights[1], weights[2])
        saved = engine.state()
        assert (saved.loss_scale, saved.updates) == (LossScale(scale / 2, stable_steps=1), 2)
        found[scale] = torch.stack(weights), norms[0], norms[2]
        engine.close()
    for left, right in zip(found[2.0], found[1024.0], strict=True):
        torch.testing.assert_close(left, right)  # powers of two: the scale is gone before clipping
    resumed = scaled_engine(1024.0, saved)
    assert resumed.loss_scale() == saved.loss_scale
    resumed.close()


def test_after_any_number_of_overflows_the_next_good_step_is_applied(launched):
    engine = scaled_engine(65536.0)
    before = engine.module.weight.detach().clone()
    for _ in range(200):
        step(engine, float("inf"))
    assert torch.equal(engine.module.weight, before)
    assert engine.loss_scale().scale == MIN_LOSS_SCALE
    _, norm = step(engine)
    assert norm.isfinite()
    assert engine.module.weight.isfinite().all()
    assert not torch.equal(engine.module.weight, before)
    engine.close()


def test_a_nan_that_only_the_division_by_the_scale_makes_is_not_applied(launched):
    """A scale of 0, as old checkpoints may have it, and one that overflows when it is inverted."""
    for scale in (0.0, 1e-45):
        engine = scaled_engine(1024.0)
        scaler = engine.accelerator.scaler
        scaler.load_state_dict({**scaler.state_dict(), "scale": scale})
        before = engine.module.weight.detach().clone()
        step(engine)
        assert torch.equal(engine.module.weight, before)
        assert engine.loss_scale().scale == MIN_LOSS_SCALE, "and the scale has recovered"
        step(engine)
        assert engine.module.weight.isfinite().all()
        assert not torch.equal(engine.module.weight, before)
        engine.close()
    weights = {name: p.detach() for name, p in engine.module.named_parameters()}
    zeros = {name: torch.zeros_like(p) for name, p in weights.items()}
    state = TrainingState(weights, {"exp_avg": zeros, "exp_avg_sq": zeros}, 3, LossScale(0.0, 0))
    resumed = scaled_engine(1024.0, state)
    assert resumed.loss_scale().scale == MIN_LOSS_SCALE
    resumed.close()


def watched(engine, folder, **options):
    config = HealthConfig(**options)
    return Health(config, engine, SpikeDetector.resume(config, None), Lines(str(folder / "health.jsonl")), {})


def play(health, steps):
    """Steps one after another, each read at once; `steps` are what is added to their gradients."""
    for number, added in enumerate(steps):
        loss, norm = step(health.engine, added)
        health.add(number, 4 * loss, torch.tensor(4), norm, ["a", "b", "c", "d"])
        health.read()


def test_overflows_that_seek_the_loss_scale_are_usual_but_not_too_many_in_a_row(launched, tmp_path):
    engine = scaled_engine(65536.0)
    health = watched(engine, tmp_path, max_nonfinite_steps=5)
    inf = float("inf")
    play(health, [inf] * 5)
    assert health.counts == {"overflows_in_a_row": 5}
    play(health, [0.0, inf, inf, 0.0, inf])
    assert health.counts == {"overflows_in_a_row": 1}
    told = "step 5: the gradient has overflowed in 6 steps in a row, the loss scale is down to 8"
    with pytest.raises(UserError, match=f"{told}.*health.max_nonfinite_steps=5.*set engine.precision=bf16"):
        play(health, [inf] * 5)
    assert engine.module.weight.isfinite().all()
    engine.close()


def test_an_overflow_at_the_smallest_loss_scale_counts_as_any_step_that_is_not_finite(launched, tmp_path):
    engine = scaled_engine(2.0)
    health = watched(engine, tmp_path, max_nonfinite_steps=3)
    with pytest.raises(UserError, match=r"4 steps by now, and health\.max_nonfinite_steps=3; the weights are finite"):
        play(health, [float("inf"), 0.0] * 10)
    assert health.counts["nonfinite_steps"] == 4
    assert (tmp_path / "health.jsonl").read_text().count('"not finite"') == 4
    engine.close()


@pytest.mark.parametrize("precision", ["no", "fp16"])
def test_a_spike_whose_gradient_is_not_finite_is_counted_too(launched, tmp_path, precision):
    """A run that has diverged to a huge, but finite, loss makes no update any more, and must end."""
    engine = scaled_engine(65536.0)
    if precision == "no":
        engine.accelerator.scaler = None
    health = watched(engine, tmp_path, max_nonfinite_steps=5)
    health.detector.threshold = 0.0
    with pytest.raises(UserError, match=re.escape("health.max_nonfinite_steps=5")):
        play(health, [float("inf")] * 6)
    engine.close()


def test_a_deepspeed_that_lets_nan_into_the_weights_is_refused(launched, monkeypatch, tmp_path):
    assert oldest()["deepspeed"] == OLDEST_DEEPSPEED
    (tmp_path / "deepspeed-0.18.5.dist-info").mkdir()
    (tmp_path / "deepspeed-0.18.5.dist-info/METADATA").write_text("Name: deepspeed\nVersion: 0.18.5\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(UserError, match=r"zero_stage=2: DeepSpeed 0.18.5 lets NaN .* pip install 'deepspeed>=0.19.8'"):
        ZeroEngine(EngineConfig(zero_stage=2), plan_batch(4, None, 1), Ranks(0, 1, 0, 1))
    torch.distributed.destroy_process_group()
