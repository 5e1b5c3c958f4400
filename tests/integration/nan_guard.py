"""Run under torchrun: a poisoned step on one rank must leave weights and moments of all as they are.

Every strategy and precision, one after another in the same processes. Rank 0 prints what happened, a line of JSON each.
"""

import json
import os
from typing import Literal

import torch
from accelerate.state import AcceleratorState, GradientState

from pipeline.build import build_engine
from pipeline.engine import EngineConfig, plan_batch
from pipeline.optimizer import OptimizerConfig, build_optimizer
from pipeline.runtime import Ranks, export_ranks, read_ranks
from vit.model import ViT, ViTConfig


def poison(ranks: Ranks, stage: str, precision: Literal["no", "bf16"]) -> None:
    config = EngineConfig(zero_stage=None if stage == "null" else int(stage), precision=precision)
    engine = build_engine(config, plan_batch(8, None, ranks.world_size), ranks)
    model = ViT(ViTConfig(image_size=16, patch_size=8, width=32, depth=2, heads=2, mlp_dim=64, num_classes=4))
    model.init_weights(torch.Generator().manual_seed(0))
    engine.prepare(model, build_optimizer(model, OptimizerConfig(ema_decay=0.9), 1.0), None, 0.9)
    states, norms = [], []
    for step in range(4):
        torch.manual_seed(10 * step + ranks.rank)
        images = torch.randn(8 // ranks.world_size, 3, 16, 16, device=engine.device, dtype=engine.input_dtype)
        with engine.micro_step():
            loss = (engine.model(images).float() ** 2 - engine.model(images).float()).sum() / 8
            if step == 2 and ranks.rank == ranks.world_size - 1:
                loss = loss * float("nan")
            engine.backward(loss)
        norms.append(float(engine.step(1e-2)))
        states.append(engine.gather_objects(engine.state()))
    if ranks.is_main:
        same, changed = (
            [
                torch.equal(old, new)
                for before, after in zip(states[a], states[b], strict=True)
                for part, other in (
                    (before.weights, after.weights), *((before.moments[k], after.moments[k]) for k in before.moments)
                )
                for old, new in zip(part.values(), other.values(), strict=True)
            ]
            for a, b in ((1, 2), (2, 3))
        )  # fmt: skip
        finite = all(v.isfinite().all() for share in states[3] for v in share.weights.values())
        seen = {"kept": all(same), "goes on": not all(changed), "finite": bool(finite), "norms": norms}
        print(json.dumps({"zero_stage": stage, "precision": precision, **seen}), flush=True)
    engine.barrier()
    engine.close()


if __name__ == "__main__":
    ranks = read_ranks(os.environ)
    export_ranks(ranks, os.environ)
    torch.distributed.destroy_process_group = lambda: None  # DeepSpeed remembers groups of the first one
    for stage in ("null", "0", "1", "2", "3"):
        for precision in ("no", "bf16"):
            poison(ranks, stage, precision)
            AcceleratorState._reset_state(reset_partial_state=True)
            GradientState._reset_state()
