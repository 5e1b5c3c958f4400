"""Run under torchrun: a poisoned step on one rank must leave weights and moments of all as they are.

Every strategy and precision, one after another in the same processes; three ways to poison: the loss, and the gradient
of the first layer alone by NaN and by infinity. Rank 0 prints what happened, a line of JSON each.
"""

import json
import os
from typing import Literal

import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState, GradientState

from pipeline.build import build_engine
from pipeline.engine import EngineConfig, plan_batch
from pipeline.optimizer import OptimizerConfig, build_optimizer
from pipeline.runtime import Ranks, export_ranks, read_ranks
from vit.model import ViT, ViTConfig

STEPS = 8
POISONED = {2: "loss", 4: "nan", 6: "inf"}


class Poison(torch.autograd.Function):
    """Changes nothing in the forward pass, and makes the gradient not finite."""

    @staticmethod
    def forward(ctx, values, poison):
        ctx.poison = poison
        return values.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient + ctx.poison, None


def gather(value):
    """Everybody's value, tensors included, by rank."""
    values = [value] * (dist.get_world_size() if dist.is_initialized() else 1)
    if len(values) > 1:
        dist.all_gather_object(values, value)
    return values


def poison(ranks: Ranks, stage: str, precision: Literal["no", "bf16", "fp16"]) -> None:
    config = EngineConfig(
        zero_stage=None if stage == "null" else int(stage), precision=precision, micro_batch_size=2,
        initial_loss_scale=1024,
    )  # fmt: skip
    engine = build_engine(config, plan_batch(8, 2, ranks.world_size), ranks)
    model = ViT(ViTConfig(image_size=16, patch_size=8, width=32, depth=2, heads=2, mlp_dim=64, num_classes=4))
    model.init_weights(torch.Generator().manual_seed(0))
    added = None  # to the gradient of the patches
    model.patch.register_forward_hook(lambda *call: None if added is None else Poison.apply(call[-1], added))
    engine.prepare(model, build_optimizer(model, OptimizerConfig(ema_decay=0.9), 1.0), None, 0.9)
    states = []
    for step in range(STEPS):
        for micro in range(engine.plan.accumulation):
            way = POISONED.get(step) if ranks.rank == ranks.world_size - 1 and micro == 0 else None
            added = float(way) if way in ("nan", "inf") else None
            torch.manual_seed(100 * step + 10 * micro + ranks.rank)
            images = torch.randn(2, 3, 16, 16, device=engine.device, dtype=engine.input_dtype)
            with engine.micro_step():
                logits = engine.model(images).float()
                loss = (logits**2 - logits).sum() / 8
                engine.backward(loss * float("nan") if way == "loss" else loss)
        engine.step(1e-2)
        states.append(gather(engine.state()))
    scales = []
    if precision == "fp16":
        scales.append(engine.loss_scale().scale)
        for _ in range(30):
            for _ in range(engine.plan.accumulation):
                with engine.micro_step():
                    engine.backward(engine.model(images).float().sum() * float("inf"))
            engine.step(1e-2)
        scales.append(engine.loss_scale().scale)
        states[-1] = gather(engine.state())
    if ranks.is_main:
        same, changed = [], []
        for step in range(1, STEPS):
            pairs = zip(states[step - 1], states[step], strict=True)
            equal = all(
                torch.equal(old, new)
                for before, after in pairs
                for part, other in (
                    (before.weights, after.weights), *((before.moments[k], after.moments[k]) for k in before.moments)
                )
                for old, new in zip(part.values(), other.values(), strict=True)
            )  # fmt: skip
            (same if step in POISONED else changed).append(equal)
        finite = all(v.isfinite().all() for share in states[-1] for v in share.weights.values())
        seen = {"kept": all(same), "goes on": not any(changed), "finite": bool(finite), "scales": scales}
        print(json.dumps({"zero_stage": stage, "precision": precision, **seen}), flush=True)
    engine.barrier()
    engine.close()


if __name__ == "__main__":
    from fp16 import allow_fp16

    ranks = read_ranks(os.environ)
    export_ranks(ranks, os.environ)
    allow_fp16()
    torch.distributed.destroy_process_group = lambda: None  # DeepSpeed remembers groups of the first one
    for stage in ("null", "0", "1", "2", "3"):
        for precision in ("no", "bf16", "fp16"):
            if precision != "fp16" or stage in ("1", "2", "3"):
                poison(ranks, stage, precision)
                AcceleratorState._reset_state(reset_partial_state=True)
                GradientState._reset_state()
    os._exit(0)
