"""What a config would train: sizes, batch arithmetic, parameter groups, memory, and whether the shards are there."""

import weakref
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pipeline.build import check_labels, prepare_data
from pipeline.config import RunConfig, to_yaml
from pipeline.data.index import file_size, load_index
from pipeline.data.loader import Batch
from pipeline.engine import plan_batch
from pipeline.errors import UserError
from pipeline.optimizer import parameter_groups
from pipeline.runtime import Ranks
from vit.model import ViT, count_parameters, forward_flops, training_flops

GIB = 1 << 30


def state_bytes(parameters: int, zero_stage: int | None, precision: str, ranks: int) -> int:
    """Bytes of weights, gradients and optimizer on one rank (arXiv 1910.02054, section 5), without padding.

    DDP and ZeRO-0 in fp32 keep fp32 weights, gradients and two moments: 16 bytes a parameter, DDP in any precision.
    DeepSpeed in bf16 or fp16 keeps 2-byte weights and gradients, and fp32 master weights and moments; from stage 1 on
    it keeps master weights beside fp32 weights too. Stage 1 divides what only the optimizer needs by the ranks,
    stage 2 the gradients too, stage 3 also the weights.
    """
    half = zero_stage is not None and precision != "no"
    weights, gradients = (2, 2) if half else (4, 4)
    optimizer = 12 if half or zero_stage in (1, 2, 3) else 8
    divided = {None: 0, 0: 0, 1: optimizer, 2: optimizer + gradients, 3: optimizer + gradients + weights}[zero_stage]
    return round(parameters * (weights + gradients + optimizer - divided + divided / ranks))


class PeakMemory(TorchDispatchMode):
    """Adds up the bytes of all tensors that live while a computation runs, and keeps the largest sum."""

    def __init__(self) -> None:
        super().__init__()
        self.live, self.peak = 0, 0
        self.seen: set[int] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self.count(tensor)
        return result

    def count(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self.seen:
            return
        size = storage.nbytes()
        self.seen.add(key)
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self.release, key, size)

    def release(self, key: int, size: int) -> None:
        self.seen.discard(key)
        self.live -= size


def activation_bytes(config: RunConfig, micro_batch: int, device: str = "cpu") -> int:
    """Peak bytes of activations and temporaries in one micro batch's forward and backward pass, played without data.

    Weights and gradients are not in it.
    """
    half = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[config.engine.precision]
    zero = config.engine.zero_stage is not None
    size = config.model.image_size
    with FakeTensorMode():
        model = ViT(config.model)
        if zero:
            model = model.to(half)
        for parameter in model.parameters():
            parameter.grad = torch.empty_like(parameter)
        raw = torch.empty(micro_batch, 3, size, size, dtype=torch.uint8)
        labels, valid = torch.empty(micro_batch, dtype=torch.int64), torch.empty(micro_batch, dtype=torch.bool)
        with PeakMemory() as memory:
            images = raw.to(torch.float32).div_(127.5).sub_(1.0).to(half if zero else torch.float32)
            with torch.autocast(device, dtype=half, enabled=half != torch.float32 and not zero):
                loss, _ = config.objective(model, Batch(images, labels, valid, []))
            loss.backward()
    return memory.peak


def dry_run(config: RunConfig, ranks: Ranks) -> int:
    """Prints what would be trained. Returns 0, or 2 where the shards are not as they should be."""
    plan = plan_batch(config.data.global_batch_size, config.engine.micro_batch_size, ranks.world_size)
    if not ranks.is_main:
        return 0
    with torch.device("meta"):
        model = ViT(config.model)
    parameters = count_parameters(model.parameters())
    print(to_yaml(config))
    print(f"model: ViT {config.model.variant}, {parameters:,} parameters")
    print(f"  {forward_flops(config.model) / 1e9:.2f} GFLOP forward, {training_flops(config.model) / 1e9:.2f} GFLOP"
          " a training step, for one image")  # fmt: skip
    print(f"batch: {plan.global_batch} = {plan.micro_batch} micro batch x {plan.accumulation} accumulation"
          f" x {plan.ranks} ranks; {config.data.resolved_lanes} lanes")  # fmt: skip
    print("parameter groups:")
    for group in parameter_groups(model.named_parameters(), config.optimizer):
        count = count_parameters(group["params"])
        print(f"  weight decay {group['weight_decay']}: {len(group['params'])} tensors, {count:,} parameters")
    activations = activation_bytes(config, plan.micro_batch)
    print(f"memory of one rank of {plan.ranks}, precision {config.engine.precision} (model states + activations):")
    for stage in (None, 0, 1, 2, 3):
        states = state_bytes(parameters, stage, config.engine.precision, plan.ranks)
        name = "DDP   " if stage is None else f"ZeRO-{stage}"
        chosen = "  <- this config" if stage == config.engine.zero_stage else ""
        print(
            f"  {name} {states / GIB:7.3f} + {activations / GIB:.3f} = {(states + activations) / GIB:7.3f} GiB{chosen}"
        )
    return 0 if check_shards(config, ranks) else 2


def check_shards(config: RunConfig, ranks: Ranks) -> bool:
    """Prints what is there of the shards, and each (at most ten) that is not."""
    from pipeline.data.index import expand_urls

    prepare_data(config, ranks)
    fine = True
    for name, urls in (("train", config.data.train), ("val", config.data.val)):
        if not urls:
            continue
        wrong = []
        listed = expand_urls(urls)
        for url in listed:
            try:
                file_size(url)
            except UserError as error:
                wrong.append(str(error))
        try:
            if not wrong:
                index = load_index(urls)
                check_labels(index, config.model.num_classes)
                steps = config.run.total_steps(index.samples, config.data.global_batch_size)
                print(f"{name}: {len(listed)} shards, {index.samples:,} images"
                      + (f", {steps:,} steps" if name == "train" else ""))  # fmt: skip
        except UserError as error:
            wrong.append(str(error))
        for message in wrong[:10]:
            print(f"{name}: {message}")
        if len(wrong) > 10:
            print(f"{name}: ... and {len(wrong) - 10} more of {len(listed)} shards")
        fine = fine and not wrong
    return fine
