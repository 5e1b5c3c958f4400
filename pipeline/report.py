"""What a config would train: sizes, batch arithmetic, parameter groups, memory, and whether the shards are there."""

import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pipeline.build import check_labels, prepare_data
from pipeline.config import RunConfig, to_yaml
from pipeline.data.index import expand_urls, load_index
from pipeline.data.loader import Batch
from pipeline.data.mix import check_blocks
from pipeline.data.source import Source, is_pipe
from pipeline.engine import REDUCE_BUCKET_SIZE, BatchPlan, plan_batch
from pipeline.errors import UserError
from pipeline.optimizer import parameter_groups
from pipeline.runtime import Ranks
from pipeline.weights import fit_weights
from vit.model import ViT, count_parameters, forward_flops, training_flops

GIB = 1 << 30


def optimizer_tensors(config: RunConfig) -> int:
    """Numbers that the optimizer keeps for a parameter: its moments, and the moving average."""
    moments = 2 if config.optimizer.name == "adamw" else int(config.optimizer.momentum > 0)
    return moments + (config.optimizer.ema_decay is not None)


def checkpoint_bytes(parameters: int, config: RunConfig) -> int:
    """Bytes of a checkpoint: weights, moments and moving average in fp32."""
    return 4 * parameters * (1 + optimizer_tensors(config))


def state_bytes(parameters: int, zero_stage: int | None, config: RunConfig, ranks: int) -> int:
    """Bytes of weights, gradients and optimizer on one rank's device (arXiv 1910.02054, section 5), without padding.

    DDP in any precision and ZeRO-0 in fp32 keep fp32 weights, gradients and AdamW's two moments, 16 bytes a parameter.
    DeepSpeed in bf16 or fp16 keeps 2-byte weights and gradients (4-byte gradients where micro batches accumulate), and
    fp32 master weights and moments; from stage 1 on it keeps master weights beside fp32 weights too. Stage 1 divides
    what only the optimizer needs by the ranks (or moves it to the CPU), stage 2 the gradients too, stage 3 also the
    weights.
    """
    half = zero_stage is not None and config.engine.precision != "no"
    micro_batch = config.engine.micro_batch_size
    accumulates = micro_batch is not None and micro_batch * ranks < config.data.global_batch_size
    weights = 2 if half else 4
    gradients = 2 if half and not accumulates else 4
    optimizer = 4 * (optimizer_tensors(config) + (half or zero_stage in (1, 2, 3)))
    if config.engine.offload_optimizer and zero_stage in (1, 2, 3):
        optimizer = 0
    divided = {None: 0, 0: 0, 1: optimizer, 2: optimizer + gradients, 3: optimizer + gradients + weights}[zero_stage]
    return round(parameters * (weights + gradients + optimizer - divided + divided / ranks))


class PeakMemory(TorchDispatchMode):
    """Adds up the bytes of all tensors that a computation makes, while they live, and keeps the largest sum.

    Views of the tensors in `given` and writes into them cost nothing.
    """

    def __init__(self, given: Iterable[Tensor]) -> None:
        super().__init__()
        self.live, self.peak = 0, 0
        self.given = [tensor.untyped_storage() for tensor in given]  # kept, so that no address comes again
        self.seen = {storage._cdata for storage in self.given}

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


def activation_bytes(config: RunConfig, micro_batch: int, zero: bool) -> int:
    """Peak bytes of activations and temporaries in one micro batch's forward and backward pass, played without data.

    Weights and gradients are not in it. With `zero` the model itself is in the lower precision, else autocast is used.
    """
    half = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[config.engine.precision]
    size = config.model.image_size
    with FakeTensorMode():
        torch.set_default_dtype(half if zero else torch.float32)  # `Module.to` does not work on fake tensors
        engine = config.engine
        model = ViT(config.model, fused=engine.fused, activation_checkpointing=engine.activation_checkpointing)
        torch.set_default_dtype(torch.float32)
        for parameter in model.parameters():
            parameter.grad = torch.empty_like(parameter)
        held = [tensor for p in model.parameters() for tensor in (p, p.grad) if tensor is not None]
        with PeakMemory(held) as memory:
            raw = torch.empty(micro_batch, 3, size, size, dtype=torch.uint8)
            labels, valid = torch.empty(micro_batch, dtype=torch.int64), torch.empty(micro_batch, dtype=torch.bool)
            images = raw.to(torch.float32).div_(127.5).sub_(1.0).to(half if zero else torch.float32)
            with torch.autocast("cpu", dtype=half, enabled=half != torch.float32 and not zero):
                loss, _ = config.objective(model, Batch(images, labels, valid, [], micro_batch))
            loss.backward()
    return memory.peak


def dry_run(config: RunConfig, ranks: Ranks) -> int:
    """Prints what would be trained. Returns 0, or 2 where the shards are not as they should be."""
    plan = plan_batch(config.data.global_batch_size, config.engine.micro_batch_size, ranks.world_size)
    check_blocks(config.mix, plan.micro_batch, plan.micro_batch * plan.accumulation)
    if not ranks.is_main:
        return 0
    with torch.device("meta"):
        model = ViT(config.model)
    parameters = count_parameters(model.parameters())
    print(to_yaml(config))
    print(f"model: ViT {config.model.variant}, {parameters:,} parameters")
    print(f"  {forward_flops(config.model) / 1e9:.2f} GFLOP forward, {training_flops(config.model) / 1e9:.2f} GFLOP"
          " a training step, for one image")  # fmt: skip
    if config.model.init_from is not None:
        fit_weights(model, config.model.init_from, config.model.new_head)
        print(f"  starts from {config.model.init_from}: every tensor fits")
    print(f"batch: {plan.global_batch} = {plan.micro_batch} micro batch x {plan.accumulation} accumulation"
          f" x {plan.ranks} ranks; {config.data.plan.lanes} lanes")  # fmt: skip
    print("parameter groups:")
    for group in parameter_groups(model.named_parameters(), config.optimizer, config.schedule.peak_lr):
        count = count_parameters(group["params"])
        print(f"  weight decay {group['weight_decay']:g}, learning rate x {group['lr_scale']:.3g}:"
              f" {len(group['params'])} tensors, {count:,} parameters")  # fmt: skip
    print_memory(config, plan, parameters)
    return 0 if check_shards(config, ranks) else 2


def print_memory(config: RunConfig, plan: BatchPlan, parameters: int) -> None:
    """A table of strategies by numbers of ranks, at this config's micro batch."""
    columns = sorted({plan.ranks, 8, 64})
    print(f"memory of a rank in GiB, by number of ranks, at micro batch {plan.micro_batch} and precision"
          f" {config.engine.precision}:")  # fmt: skip
    print(
        "           activations"
        + "".join(f"{f'states of {n}':>15}" for n in columns)
        + f"{'sum of ' + str(plan.ranks):>12}"
    )
    for stage in (None, 0, 1, 2, 3):
        activations = activation_bytes(config, plan.micro_batch, stage is not None)
        states = [state_bytes(parameters, stage, config, n) for n in columns]
        if stage == 3:  # its buffer for reducing gradients stays
            states = [size + REDUCE_BUCKET_SIZE * (2 if config.engine.precision != "no" else 4) for size in states]
        total = activations + states[columns.index(plan.ranks)]
        print(f"  {'DDP' if stage is None else f'ZeRO-{stage}':8} {activations / GIB:11.3f}"
              + "".join(f"{size / GIB:15.3f}" for size in states) + f"{total / GIB:12.3f}"
              + ("  <- this config" if stage == config.engine.zero_stage else ""))  # fmt: skip


def check_shards(config: RunConfig, ranks: Ranks) -> bool:
    """Prints what is there of the shards, and each (at most ten) that is not."""
    prepare_data(config, ranks)
    source, fine = Source(config.data.read), True
    for name, urls in (("train", config.data.train), ("val", config.data.val)):
        if not urls:
            continue
        wrong, listed = [], expand_urls(urls)
        for url in listed:
            try:
                if is_pipe(url):
                    source.command(url)  # refused here; a dry run runs no commands
                else:
                    source.size(url)
            except UserError as error:
                wrong.append(str(error))
        try:
            if not wrong and not (config.data.resampled and name == "train"):
                index = load_index(urls, folder=config.data.index, source=source)
                check_labels(index, config.model.num_classes, config.data.max_bad_fraction)
                steps = config.run.total_steps(index.samples * config.data.repeats, config.data.global_batch_size)
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
