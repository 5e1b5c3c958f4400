"""Run under torchrun: the ranks' shares of the state are what DeepSpeed itself says the whole parameters are.

Usage: share_guard.py ZERO_STAGE PRECISION. Prints on rank 0, as one JSON line, the names that each rank has, and those
that differ in weights or moments.
"""

import json
import os
import sys

import torch
import torch.distributed as dist
from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

from pipeline.build import build_engine
from pipeline.engine import EngineConfig, plan_batch
from pipeline.optimizer import OptimizerConfig, build_optimizer
from pipeline.runtime import export_ranks, read_ranks
from vit.model import ViT, ViTConfig


def main() -> None:
    stage, precision = sys.argv[1:3]
    ranks = read_ranks(os.environ)
    export_ranks(ranks, os.environ)
    config = EngineConfig(zero_stage=int(stage), precision=precision)
    engine = build_engine(config, plan_batch(6, None, ranks.world_size), ranks)
    group = dist.new_group(backend="gloo")
    # Sizes that don't divide by the ranks.
    model = ViT(ViTConfig(image_size=16, patch_size=8, width=28, depth=2, heads=2, mlp_dim=50, num_classes=5))
    model.init_weights(torch.Generator().manual_seed(0))
    engine.prepare(model, build_optimizer(model, OptimizerConfig(ema_decay=0.9), 1.0), None, 0.9)

    def train(step: int) -> None:
        torch.manual_seed(10 * step + ranks.rank)
        images = torch.randn(6 // ranks.world_size, 3, 16, 16, device=engine.device, dtype=engine.input_dtype)
        with engine.micro_step():
            logits = engine.model(images).float()
            engine.backward((logits**2 - logits).sum() / 6)  # not flat at the head's zeros
        engine.step(1e-2)

    train(0)
    train(1)
    copied = engine.state()
    expected = {
        name: [safe_get_full_fp32_param(p).cpu().clone()]
        + [safe_get_full_optimizer_state(p, key).cpu().clone() for key in engine.slots]
        for name, p in engine.module.named_parameters()
    }
    train(2)  # what is written must not see it
    share = engine.whole(copied, group)
    wrong = [
        name
        for name, weight in share.weights.items()
        for value, true in zip(
            [weight, *(share.moments[key][name] for key in engine.slots)], expected[name], strict=True
        )
        if value.shape != true.shape or not torch.equal(value, true)
    ]
    gathered = engine.gather_objects((list(share.weights), wrong))
    if ranks.is_main:
        names, wrong = ([found[n] for found in gathered] for n in (0, 1))
        moved = any(t.any() for t in share.moments["exp_avg"].values())
        print(json.dumps({"names": names, "wrong": wrong, "all": list(expected), "moved": moved}))
    engine.barrier()
    engine.close()


if __name__ == "__main__":
    main()
