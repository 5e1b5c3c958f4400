"""Run under torchrun on two ranks: rank 0 goes through a forward pass while rank 1 has not begun its own.

Usage: alone.py FILE. Rank 0 writes FILE after its forward pass, rank 1 waits for it before.
"""

import os
import sys
import time

import torch

from pipeline.build import build_engine
from pipeline.engine import EngineConfig, plan_batch
from pipeline.optimizer import OptimizerConfig, build_optimizer
from pipeline.runtime import export_ranks, read_ranks
from vit.model import ViT, ViTConfig


def main():
    file = sys.argv[1]
    ranks = read_ranks(os.environ)
    export_ranks(ranks, os.environ)
    engine = build_engine(EngineConfig(), plan_batch(4, None, ranks.world_size), ranks)
    model = ViT(ViTConfig(image_size=16, patch_size=8, width=32, depth=1, heads=2, mlp_dim=64, num_classes=4,
                          position_embedding="sincos"))  # fmt: skip
    model.init_weights(torch.Generator().manual_seed(0))
    engine.prepare(model, build_optimizer(model, OptimizerConfig(), 1.0), None)
    for step in range(3):
        end = time.monotonic() + 20
        # Once, before its second pass, DDP regroups the gradients: there the ranks do meet.
        while ranks.rank == 1 and step != 1 and not os.path.exists(f"{file}-{step}"):
            if time.monotonic() > end:
                sys.exit("rank 0's forward pass waits for rank 1")
            time.sleep(0.05)
        with engine.micro_step():
            logits = engine.model(torch.ones(2, 3, 16, 16, device=engine.device))
            if ranks.rank == 0:
                open(f"{file}-{step}", "w").close()
            engine.backward(logits.square().sum() + logits.sum())
        engine.step(0.1)
    engine.barrier()
    engine.close()


if __name__ == "__main__":
    main()
