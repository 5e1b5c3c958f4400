"""Run under torchrun: how far the sum of many micro batches' gradients is from its sum in fp32.

Every strategy and half precision, one after another in the same processes. Of a step of many micro batches, rank 0
prints the relative errors of the gradient's norm and of the first update (SGD's, which is the gradient).
"""

import copy
import json
import os

import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState, GradientState

from pipeline.build import build_engine
from pipeline.engine import EngineConfig, plan_batch
from pipeline.optimizer import OptimizerConfig, build_optimizer
from pipeline.runtime import export_ranks, read_ranks
from vit.model import ViT, ViTConfig

MICRO_BATCHES = 256  # of all ranks together


def gather(value):
    """Everybody's value, tensors included, by rank."""
    values = [value] * (dist.get_world_size() if dist.is_initialized() else 1)
    if len(values) > 1:
        dist.all_gather_object(values, value)
    return values


def micro_loss(model, number, dtype):
    generator = torch.Generator().manual_seed(number)
    images = torch.randn(2, 3, 16, 16, generator=generator).to(model.head.weight.device if dtype is None else "cpu")
    logits = model(images.to(dtype)).float()
    return (logits - torch.randn(2, 4, generator=generator) - 0.5).square().mean() / MICRO_BATCHES


def reference(model, dtype, scale):
    """Each micro batch's gradient in half precision, all summed in fp64."""
    model = copy.deepcopy(model).to(dtype)
    sums = {name: torch.zeros(p.shape, dtype=torch.float64) for name, p in model.named_parameters()}
    for number in range(MICRO_BATCHES):
        model.zero_grad()
        (micro_loss(model, number, dtype) * scale).backward()
        for name, p in model.named_parameters():
            sums[name] += p.grad.double() / scale
    return sums


def measure(ranks, stage, precision, offload=False):
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    config = EngineConfig(
        zero_stage=stage, precision=precision, micro_batch_size=2, grad_clip=None, initial_loss_scale=1024,
        offload_optimizer=offload,
    )  # fmt: skip
    engine = build_engine(config, plan_batch(2 * MICRO_BATCHES, 2, ranks.world_size), ranks)
    model = ViT(ViTConfig(image_size=16, patch_size=8, width=32, depth=2, heads=2, mlp_dim=64, num_classes=4))
    model.init_weights(torch.Generator().manual_seed(0))
    torch.nn.init.normal_(model.head.weight, std=0.1, generator=torch.Generator().manual_seed(1))
    expected = reference(model, dtype, 1024.0 if precision == "fp16" else 1.0)
    engine.prepare(model, build_optimizer(model, OptimizerConfig(name="sgd", weight_decay=0.0), 1.0), None)
    before = gather(engine.whole(engine.state(), None).weights)
    for micro in range(engine.plan.accumulation):
        with engine.micro_step():
            engine.backward(micro_loss(engine.model, micro * ranks.world_size + ranks.rank, dtype))
    norm = float(engine.step(1.0))
    after = gather(engine.whole(engine.state(), None).weights)
    if ranks.is_main:
        wanted = torch.cat([t.flatten() for t in expected.values()]).norm()
        pairs = [
            (name, old, new[name]) for share, new in zip(before, after, strict=True) for name, old in share.items()
        ]
        found = {name: (old - new).double() for name, old, new in pairs}
        difference = torch.cat([(found[name].view(t.shape) - t).flatten() for name, t in expected.items()]).norm()
        errors = {"norm": abs(norm - wanted.item()) / wanted.item(), "update": (difference / wanted).item()}
        print(json.dumps({"zero_stage": stage, "precision": precision, "offload": offload, **errors}), flush=True)
    engine.barrier()
    engine.close()


if __name__ == "__main__":
    from fp16 import allow_fp16

    ranks = read_ranks(os.environ)
    export_ranks(ranks, os.environ)
    allow_fp16()
    torch.distributed.destroy_process_group = lambda: None  # DeepSpeed remembers groups of the first one
    for precision in ("bf16", "fp16"):
        for stage in (0, 1, 2, 3):
            for offload in (False, True) if stage == 2 else (False,):
                if precision != "fp16" or stage != 0:
                    measure(ranks, stage, precision, offload)
                    AcceleratorState._reset_state(reset_partial_state=True)
                    GradientState._reset_state()
    os._exit(0)
