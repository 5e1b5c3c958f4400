"""--dry-run's memory: activations against a measured peak."""

import json

import pytest
import torch

from pipeline.config import load_config
from pipeline.data.loader import Batch
from pipeline.report import activation_bytes
from pipeline.trainer import normalised
from tests.conftest import ROOT
from vit.model import ViT


def measured_peak(config, rows, folder):
    """Bytes that torch's CPU allocator held at most during one micro batch, beyond weights and gradients."""
    half = {"no": torch.float32, "bf16": torch.bfloat16}[config.engine.precision]
    zero = config.engine.zero_stage is not None
    engine = config.engine
    model = ViT(config.model, fused=engine.fused, activation_checkpointing=engine.activation_checkpointing)
    model.init_weights()
    model = model.to(half) if zero else model
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    size = config.model.image_size
    with torch.profiler.profile(profile_memory=True) as profile:
        raw = Batch(
            torch.zeros(rows, 3, size, size, dtype=torch.uint8),
            torch.zeros(rows, dtype=torch.int64),
            torch.ones(rows, dtype=torch.bool),
            [],
            rows,
        )
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=half != torch.float32 and not zero):
            loss, _ = config.objective(model, normalised(raw, half if zero else torch.float32))
        loss.backward()
    profile.export_chrome_trace(str(folder / "trace.json"))
    events = json.loads((folder / "trace.json").read_text())["traceEvents"]
    memory = sorted((e["ts"], e["args"]["Bytes"]) for e in events if e.get("name") == "[memory]")
    assert memory
    held = peak = 0
    for _, nbytes in memory:
        held += nbytes
        peak = max(peak, held)
    return peak


@pytest.mark.parametrize(
    "words",
    [
        ["data.global_batch_size=64"],
        ["data.global_batch_size=64", "engine.precision=bf16"],
        ["data.global_batch_size=64", "engine.precision=bf16", "engine.zero_stage=2"],
        ["data.global_batch_size=64", "engine.fused=false"],
        ["data.global_batch_size=64", "engine.activation_checkpointing=true"],
        ["data.global_batch_size=8", "model.variant=Ti/16", "model.image_size=224"],
        ["data.global_batch_size=8", "model.variant=S/32", "model.image_size=224", "model.dropout=0.1"],
    ],
    ids=" ".join,
)
def test_activations_are_within_10_percent_of_a_measured_peak(tmp_path, words):
    config = load_config(str(ROOT / "configs/digits.yaml"), words)
    rows = config.data.global_batch_size
    zero = config.engine.zero_stage is not None
    assert activation_bytes(config, rows, zero) == pytest.approx(measured_peak(config, rows, tmp_path), rel=0.1)


def test_activations_grow_with_the_micro_batch():
    config = load_config(str(ROOT / "configs/digits.yaml"))
    assert activation_bytes(config, 32, False) > 1.7 * activation_bytes(config, 16, False)
