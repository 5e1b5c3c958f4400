"""Joins the ranks, wraps the model, runs backward, clips, steps and gathers, by way of Accelerate.

One process and plain DDP; `zero.py` has DeepSpeed behind the same interface. The trainer doesn't know which it has.
"""

import contextlib
import json
import os
import socket
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, Literal

import torch
from torch import Tensor, nn

from pipeline.errors import UserError
from pipeline.optimizer import EMA, moment_names, skip_step
from pipeline.options import option
from pipeline.runtime import Ranks, local_device, read_rendezvous
from pipeline.store import open_store

MIN_LOSS_SCALE = 1.0  # of fp16; gradients that overflow at this scale are not the scale's fault
MAX_GATHERED_BYTES = 64 << 20  # of one rank, in `gather_objects`
REDUCE_BUCKET_SIZE = 25_000_000  # gradients reduced together; DeepSpeed's default holds a buffer of 5e8 numbers


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    precision: Literal["no", "bf16", "fp16"] = option("no", "mixed precision", may_change=True)
    initial_loss_scale: int = option(
        65536, "fp16: what the loss is multiplied by at first, a power of two; it falls when gradients overflow",
        may_change=True,
    )  # fmt: skip
    zero_stage: int | None = option(None, "DeepSpeed ZeRO stage 0 to 3; null: plain DDP", may_change=True)
    offload_optimizer: bool = option(
        False, "zero_stage 1 to 3: master weights, moments and the update on the CPU", may_change=True
    )
    reduce_precision: Literal["fp32", "half"] = option(
        "fp32", "precision in which gradients are reduced over ranks; half: that of engine.precision", may_change=True
    )
    micro_batch_size: int | None = option(
        None, "images of one forward pass on one rank; null: no accumulation", may_change=True
    )
    grad_clip: float | None = option(1.0, "largest global norm of the gradient; null: no clipping")
    fused: bool = option(True, "torch's fused kernels; false: the same function in plain tensor math", may_change=True)
    compile: Literal["none", "block", "model"] = option(
        "none", "torch.compile each block (gradients are reduced meanwhile) or the whole model", may_change=True
    )
    activation_checkpointing: bool = option(
        False, "keep only each block's input for the backward pass: less memory, a third more work", may_change=True
    )
    timeout_seconds: int = option(1800, "how long a rank waits for the others", may_change=True)

    def __post_init__(self) -> None:
        if self.zero_stage not in (None, 0, 1, 2, 3):
            raise ValueError(f"zero_stage: must be null, 0, 1, 2 or 3, found {self.zero_stage}")
        if self.offload_optimizer and self.zero_stage not in (1, 2, 3):
            raise ValueError(f"offload_optimizer: needs engine.zero_stage 1, 2 or 3, found {self.zero_stage}")
        if self.reduce_precision == "half" and self.precision == "no":
            raise ValueError("reduce_precision: half needs engine.precision=bf16 or fp16, found no")
        if self.precision == "fp16" and self.zero_stage == 0:
            raise ValueError(
                "precision: DeepSpeed takes a loss scale out of gradients in ZeRO-0 that it has not put in; with fp16"
                " set engine.zero_stage=1 (or null)"
            )
        if self.initial_loss_scale < 1 or self.initial_loss_scale.bit_count() != 1:
            raise ValueError(f"initial_loss_scale: must be a power of two, found {self.initial_loss_scale}")
        if self.compile == "model" and self.zero_stage == 3:
            raise ValueError("compile: zero_stage=3 gathers weights block by block; set engine.compile=block, or none")
        if self.micro_batch_size is not None and self.micro_batch_size < 1:
            raise ValueError(f"micro_batch_size: must be at least 1, found {self.micro_batch_size}")
        if self.grad_clip is not None and self.grad_clip <= 0:
            raise ValueError(f"grad_clip: must be positive or null, found {self.grad_clip}")


@dataclass(frozen=True)
class BatchPlan:
    """global_batch = micro_batch x accumulation x ranks: the one source of batch arithmetic."""

    global_batch: int
    micro_batch: int
    accumulation: int
    ranks: int


def plan_batch(global_batch: int, micro_batch: int | None, ranks: int) -> BatchPlan:
    """Raises UserError where the numbers don't divide, with the nearest that do."""
    if global_batch % ranks:
        near = [n for n in range(1, global_batch + 1) if global_batch % n == 0]
        near.sort(key=lambda n: abs(n - ranks))
        raise UserError(
            f"data.global_batch_size: {global_batch} does not divide by {ranks} ranks; nearest numbers of ranks that"
            f" divide it: {', '.join(map(str, near[:2]))}; nearest global batches:"
            f" {max(global_batch // ranks, 1) * ranks}, {(global_batch // ranks + 1) * ranks}"
        )
    rows = global_batch // ranks
    micro = micro_batch or rows
    if rows % micro:
        near = sorted((n for n in range(1, rows + 1) if rows % n == 0), key=lambda n: abs(n - micro))
        raise UserError(
            f"engine.micro_batch_size: {micro} does not divide the {rows} images of a rank (global_batch_size"
            f" {global_batch} / {ranks} ranks); nearest that do: {', '.join(map(str, near[:2]))}"
        )
    return BatchPlan(global_batch, micro, rows // micro, ranks)


def check_launcher(config: EngineConfig, plan: BatchPlan, said: dict[str, str]) -> None:
    """Holds what `accelerate launch` was told (`runtime.read_accelerate`) against our config.

    Raises:
        UserError: a contradiction, or something that only Accelerate's own configuration could ask for.
    """
    ours = {
        "engine.precision": config.precision,
        "accumulation": plan.accumulation,
        "engine.grad_clip": config.grad_clip,
        "engine.zero_stage": config.zero_stage,
        "engine.offload_optimizer": "cpu" if config.offload_optimizer else "none",
    }
    for key, value in said.items():
        if key not in ours:
            raise UserError(
                f"accelerate launch: {key}={value}: not used here; take it out of Accelerate's configuration"
                " (engine.* are this project's options, launch/accelerate/ has files that fit)"
            )
        number = value.replace(".", "", 1).isdigit()
        same = float(value) == ours[key] if number and ours[key] is not None else value == str(ours[key])
        if not same and not (key == "accumulation" and value == "1"):  # its default
            name = "gradient_accumulation_steps" if key == "accumulation" else key.removeprefix("engine.")
            fix = {"accumulation": "engine.micro_batch_size", "engine.offload_optimizer": f"{key}=true"}.get(
                key, f"{key}={value}"
            )
            raise UserError(
                f"accelerate launch was told {name}={value}, but this config has {key}="
                f"{'null' if ours[key] is None else ours[key]}; set {fix}, or mend Accelerate's configuration"
            )


@dataclass(frozen=True)
class LossScale:
    """fp16's dynamic loss scale: halved at an overflow, doubled after many steps without one."""

    scale: float
    stable_steps: int  # since the last overflow; torch's scaler counts from the last doubling, too
    hysteresis: int | None = None  # DeepSpeed: so many overflows halve it


@dataclass
class TrainingState:
    """A model and its optimizer, whatever the strategy: full fp32 tensors by parameter name, on the CPU."""

    weights: Mapping[str, Tensor]
    moments: Mapping[str, Mapping[str, Tensor]] = field(default_factory=dict)  # "exp_avg" -> name -> tensor; also "ema"
    updates: int = 0  # Adam's step counter
    loss_scale: LossScale | None = None  # of fp16


class Engine:
    """Plain DDP, or one process, through Accelerate."""

    needs_group = False  # in a single process on the CPU, too

    def __init__(self, config: EngineConfig, plan: BatchPlan, ranks: Ranks):
        self.config, self.plan, self.ranks = config, plan, ranks
        self._join()
        self.accelerator = self._connect()
        self.device: torch.device = self.accelerator.device
        if self.accelerator.num_processes != ranks.world_size:
            raise UserError(
                f"{ranks.world_size} ranks were started but {self.accelerator.num_processes} joined;"
                " start with torchrun, accelerate launch --multi_gpu, deepspeed or srun"
            )

    def _join(self) -> None:
        """Initialises the process group, unless there is one: gloo on CPUs, NCCL on this rank's GPU."""
        device = local_device(self.ranks)
        on_gpu = device.type == "cuda"
        self.backend = "nccl" if on_gpu else "gloo"
        if on_gpu:
            torch.cuda.set_device(device)
            os.environ["LOCAL_RANK"] = str(device.index)  # Accelerate and DeepSpeed take it for the device's index
        if torch.distributed.is_initialized():
            return
        rank, world_size, seconds = self.ranks.rank, self.ranks.world_size, self.config.timeout_seconds
        alone = world_size == 1
        if alone and not on_gpu and not self.needs_group:
            return  # gloo opens a port even for a single process
        if alone:
            store = torch.distributed.HashStore()
        else:
            store = open_store(read_rendezvous(os.environ), rank == 0, seconds, world_size)
        try:
            torch.distributed.init_process_group(
                self.backend, store=store, timeout=timedelta(seconds=seconds), rank=rank, world_size=world_size,
                device_id=device if on_gpu and not alone else None,  # with a device NCCL opens its ports at once
            )  # fmt: skip
        except torch.distributed.DistBackendError as error:
            if "Duplicate GPU" not in str(error):
                raise
            raise UserError(
                f"rank {self.ranks.rank} on {socket.gethostname()}: another rank has the same GPU ({device}); start at"
                " most one rank for each GPU (--nproc-per-node, --ntasks-per-node, CUDA_VISIBLE_DEVICES)"
            ) from None

    def _connect(self) -> Any:
        from accelerate import Accelerator, DistributedDataParallelKwargs
        from accelerate.utils import DDPCommunicationHookType, GradScalerKwargs

        if self.config.precision == "fp16" and not torch.cuda.is_available():
            raise UserError("engine.precision: fp16 under DDP needs a GPU; use engine.precision=bf16 or no")
        if self.config.reduce_precision == "half" and not torch.cuda.is_available():
            raise UserError("engine.reduce_precision: half under DDP needs GPUs; use engine.reduce_precision=fp32")
        half = {"no": "NO", "bf16": "BF16", "fp16": "FP16"}[self.config.precision]
        hook = DDPCommunicationHookType[half if self.config.reduce_precision == "half" else "NO"]
        handlers = [DistributedDataParallelKwargs(gradient_as_bucket_view=True, comm_hook=hook)]
        handlers.append(GradScalerKwargs(init_scale=self.config.initial_loss_scale))
        hidden = {}
        if torch.distributed.is_initialized():
            handlers.append(self._process_group())
        else:  # Accelerate joins a group where it finds a local rank
            hidden = {name: os.environ.pop(name) for name in ("LOCAL_RANK",) if name in os.environ}
        try:
            return Accelerator(
                cpu=not torch.cuda.is_available(),
                mixed_precision=self.config.precision,
                gradient_accumulation_steps=self.plan.accumulation,
                kwargs_handlers=handlers,
            )
        finally:
            os.environ.update(hidden)

    def _process_group(self) -> Any:
        from accelerate import InitProcessGroupKwargs

        return InitProcessGroupKwargs(backend=self.backend, timeout=timedelta(seconds=self.config.timeout_seconds))

    @property
    def input_dtype(self) -> torch.dtype:
        return torch.float32

    def prepare(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        state: TrainingState | None,
        ema_decay: float | None = None,
    ) -> None:
        """Wraps model and optimizer, and loads `state` into them."""
        self.module = model
        if state is not None:
            load_weights(model, state.weights)
        self.model, self.optimizer = self._wrap(model, optimizer)
        self._hold_plan()
        self.slots = moment_names(self.torch_optimizer()) + ((EMA,) if ema_decay is not None else ())
        self._create_slots(0 if state is None else state.updates)
        if state is not None:
            self.load_slots(state)
        self.ema_decay = ema_decay

    def _wrap(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[Any, Any]:
        # In "evaluation mode" Accelerate leaves DDP out, which one process does not need.
        wrapped = self.accelerator.prepare_model(model, evaluation_mode=self.ranks.world_size == 1)
        if isinstance(wrapped, nn.parallel.DistributedDataParallel):
            # Buffers are constants, the same on all ranks: no forward pass waits for a broadcast of them. The
            # constructor's argument would warn from torch 2.13 on.
            wrapped.broadcast_buffers = False
        return wrapped, self.accelerator.prepare_optimizer(optimizer)

    def _hold_plan(self) -> None:
        """Our batch arithmetic is that of the library below."""
        assert self.accelerator.gradient_accumulation_steps == self.plan.accumulation

    def warm_up(self, loss: Callable[[], Tensor]) -> None:
        """A forward and backward pass of which nothing stays, where later ones would else add up in another order.

        DDP regroups gradients after its first pass, and the sum over more than two ranks depends on the groups: a
        resume must not begin with another grouping than the step that it repeats had.
        """
        if self.ranks.world_size > 2 and isinstance(self.model, nn.parallel.DistributedDataParallel):
            self.accelerator.backward(0.0 * loss())
            self.torch_optimizer().zero_grad()

    @contextlib.contextmanager
    def micro_step(self) -> Iterator[None]:
        """Around forward and backward of one micro batch; gradients are reduced in the last of a step only."""
        with self.accelerator.accumulate(self.model):
            yield

    def autocast(self) -> contextlib.AbstractContextManager:
        """For a model that is not wrapped: the precision in which the wrapped one computes."""
        return self.accelerator.autocast()

    def backward(self, loss: Tensor) -> None:
        """`loss` is the micro batch's share of the global mean; gradients are averaged over ranks afterwards."""
        self.accelerator.backward(loss * (self.plan.accumulation * self.plan.ranks))

    def step(self, learning_rate: float) -> Tensor:
        """Clips by the global norm and updates the weights. Returns the norm before clipping, on the device.

        Where the norm is not finite, weights, moments and moving average stay as they are.
        """
        for group in self.torch_optimizer().param_groups:
            group["lr"] = learning_rate * group["lr_scale"]
        norm = self._update()
        if self.ema_decay is not None:
            self._update_average(norm.isfinite() * (1.0 - self.ema_decay))
        return norm

    @torch.no_grad()
    def _update_average(self, weight: Tensor) -> None:
        slots = self.torch_optimizer().state
        for tensor in self.masters():
            slots[tensor][EMA].lerp_(tensor, weight.to(tensor.device))

    def _update(self) -> Tensor:
        # In torch's own words: Accelerate's wrappers look for other packages at every step.
        optimizer, scaler = self.torch_optimizer(), self.accelerator.scaler
        if scaler is not None:
            scaler.unscale_(optimizer)
        norm = self._clip()
        if scaler is None:
            skip_step(optimizer, ~norm.isfinite())
            optimizer.step()
        else:
            # The scaler looks for infinities before it divides by the scale; the norm sees what the division makes.
            for found in scaler._found_inf_per_device(optimizer).values():
                found.copy_(~norm.isfinite())  # 0 or 1: the fused kernels know no other value
            scaler.step(optimizer)
            scaler.update()
            scaler._get_scale_async().clamp_(min=MIN_LOSS_SCALE)
        optimizer.zero_grad()
        return norm

    def _clip(self) -> Tensor:
        """The norm of all gradients before they are clipped."""
        return nn.utils.clip_grad_norm_(self.module.parameters(), self.config.grad_clip or float("inf"))

    def state(self, memory: dict[tuple[str | None, str], Tensor] | None = None) -> TrainingState:
        """A host copy of this rank's part of the state, without a word to other ranks: `whole` makes it a share.

        `memory` keeps the copies' memory for the next call, which writes them anew: new pages cost more than the copy.
        """
        memory = {} if memory is None else memory
        weights: dict[str, Tensor] = {}
        moments: dict[str, dict[str, Tensor]] = {key: {} for key in self.slots}
        mine = set(share_of(self.sizes(), self.ranks.rank, self.ranks.world_size))
        for name, parameter in self.module.named_parameters():
            for key, kept in ((None, weights), *moments.items()):
                value = self.part(parameter, key, name in mine)
                if value is not None:
                    if (key, name) not in memory:
                        memory[key, name] = torch.empty(value.shape, dtype=torch.float32, pin_memory=value.is_cuda)
                    kept[name] = memory[key, name].copy_(value.detach())
        return TrainingState(weights, moments, self.updates(), self.loss_scale())

    def averaged_weights(self) -> dict[str, Tensor]:
        """The moving average of all weights, in fp32 on the device of every rank. Collective."""
        return {name: self._average(parameter) for name, parameter in self.module.named_parameters()}

    def _average(self, parameter: nn.Parameter) -> Tensor:
        return self.torch_optimizer().state[parameter][EMA]

    def whole(self, state: TrainingState, group: Any) -> TrainingState:
        """This rank's share, in whole parameters, of what `state` has copied; all shares together are the whole.

        Collective on `group`, which is of the CPU; needs nothing of the model, which may be trained meanwhile.
        """
        return state

    def sizes(self) -> dict[str, int]:
        return {name: parameter_size(parameter) for name, parameter in self.module.named_parameters()}

    def torch_optimizer(self) -> torch.optim.Optimizer:
        return self.optimizer.optimizer

    def masters(self) -> list[Tensor]:
        """The fp32 tensors that this rank's optimizer updates: all parameters, or its share of them."""
        return [parameter for group in self.torch_optimizer().param_groups for parameter in group["params"]]

    def updates(self) -> int:
        steps = [int(state["step"]) for state in self.torch_optimizer().state.values() if "step" in state]
        return max(steps, default=0)

    def loss_scale(self) -> LossScale | None:
        if self.accelerator.scaler is None:
            return None
        state = self.accelerator.scaler.state_dict()
        return LossScale(state["scale"], state["_growth_tracker"])

    def part(self, parameter: nn.Parameter, key: str | None, mine: bool) -> Tensor | None:
        """What this rank copies of a parameter (key None) or of one of its moments: all of it, if it is `mine`."""
        if not mine:
            return None
        return parameter if key is None else self.torch_optimizer().state[parameter][key]

    def _create_slots(self, updates: int) -> None:
        # torch makes them in the first step, which a checkpoint or a step that is skipped may come before.
        state = self.torch_optimizer().state
        for tensor in self.masters():
            state[tensor] = {key: torch.zeros_like(tensor) for key in self.slots if key != EMA}
            if EMA in self.slots:
                state[tensor][EMA] = tensor.detach().clone()
            if isinstance(self.torch_optimizer(), torch.optim.AdamW):
                state[tensor]["step"] = torch.tensor(float(updates), device=tensor.device)

    def load_slots(self, state: TrainingState) -> None:
        """Loads moments, moving average and loss scale into a prepared engine, and fp32 weights where they are apart.

        Raises:
            UserError: the checkpoint does not have what this optimizer keeps.
        """
        missing = [key for key in self.slots if key not in state.moments]
        if missing:
            raise UserError(f"the checkpoint lacks the optimizer's {', '.join(missing)}; it is of another optimizer")
        for name, parameter in self.module.named_parameters():
            self._set(parameter, None, state.weights[name])
            for key in self.slots:
                self._set(parameter, key, state.moments[key][name])
        if state.loss_scale is not None:
            self._set_loss_scale(state.loss_scale)

    def _set(self, parameter: nn.Parameter, key: str | None, value: Tensor) -> None:
        if key is not None:
            self.torch_optimizer().state[parameter][key].copy_(value)

    def _set_loss_scale(self, found: LossScale) -> None:
        scaler = self.accelerator.scaler
        if scaler is not None:  # before a step, update() refuses
            kept = {
                "scale": max(found.scale, MIN_LOSS_SCALE),
                "_growth_tracker": found.stable_steps % scaler.get_growth_interval(),
            }
            scaler.load_state_dict({**scaler.state_dict(), **kept})

    def reduce_sum(self, values: Tensor) -> Tensor:
        """Sums over ranks, on the device."""
        if self.ranks.world_size > 1:
            torch.distributed.all_reduce(values)
        return values

    def weights_are_finite(self) -> bool:
        """On all ranks. Collective, and waits for the device."""
        wrong = sum(not master.isfinite().all() for master in self.masters())
        return not self.reduce_sum(torch.tensor([float(wrong)], device=self.device)).item()

    def gather_rows(self, values: Tensor) -> Tensor:
        """Everybody's `values` (1, n), by rank: (ranks, n). Collective, on the device."""
        rows = values.new_zeros(self.ranks.world_size, values.shape[1])
        rows[self.ranks.rank] = values[0]
        return self.reduce_sum(rows)

    def gather_objects(self, value: Any, group: Any = None) -> list[Any]:
        """Everybody's value, by rank: what JSON makes of it (tuples become lists). Collective; for rare, small things.

        `group` is one of the CPU. torch's own way would unpickle what comes over the network.
        """
        data = json.dumps(value).encode()
        if self.ranks.world_size == 1:
            return [json.loads(data)]
        device = self.device if group is None else torch.device("cpu")
        sizes = [int(size) for size in self._gather(torch.tensor([len(data)], device=device), group)]
        for rank, size in enumerate(sizes):
            if not 0 < size <= MAX_GATHERED_BYTES:
                raise RuntimeError(f"rank {rank} sends {size} bytes of JSON, expected 1 to {MAX_GATHERED_BYTES}")
        own = torch.zeros(max(sizes), dtype=torch.uint8)
        own[: len(data)] = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        rows = self._gather(own.to(device), group)
        return [json.loads(row[:size].cpu().numpy().tobytes()) for row, size in zip(rows, sizes, strict=True)]

    def _gather(self, values: Tensor, group: Any) -> list[Tensor]:
        rows = [torch.empty_like(values) for _ in range(self.ranks.world_size)]
        torch.distributed.all_gather(rows, values, group=group)
        return rows

    def device_names(self) -> list[str]:
        """Host and device of each rank. Collective."""
        device = torch.cuda.get_device_name() if self.device.type == "cuda" else "CPU"
        return self.gather_objects(f"{socket.gethostname()}: {device}")

    def barrier(self) -> None:
        if self.ranks.world_size > 1:
            torch.distributed.barrier()

    def release(self) -> None:
        """Gives up model, optimizer and Accelerate's state; another engine may follow in the same process group."""
        from accelerate.state import AcceleratorState, GradientState

        self.accelerator.free_memory()
        GradientState._reset_state()
        AcceleratorState._reset_state(reset_partial_state=True)

    def close(self) -> None:
        self.release()
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


def parameter_size(parameter: nn.Parameter) -> int:
    return getattr(parameter, "ds_numel", parameter.numel())  # ZeRO-3 leaves an empty tensor in its place


def parameter_shape(parameter: nn.Parameter) -> torch.Size:
    return getattr(parameter, "ds_shape", parameter.shape)


def share_of(sizes: dict[str, int], rank: int, world_size: int) -> list[str]:
    """The names that fall to a rank: contiguous, and about as many numbers for each."""
    total, before, mine = max(sum(sizes.values()), 1), 0, []
    for name, size in sizes.items():
        if min((before + size / 2) * world_size // total, world_size - 1) == rank:
            mine.append(name)
        before += size
    return mine


@torch.no_grad()
def load_weights(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Copies the weights one by one: those of a checkpoint are read when they are asked for.

    Raises:
        UserError: names or shapes differ.
    """
    check_weights(model, weights)
    for name, parameter in model.named_parameters():
        parameter.copy_(weights[name])


def check_weights(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Raises UserError where names or shapes differ from those of the model, which may be on the meta device."""
    own = {name: tuple(p.shape) for name, p in model.named_parameters()}
    given = {name: tuple(w.shape) for name, w in weights.items()}
    wrong = [
        f"{n}: {given.get(n, 'missing')} instead of {own.get(n, 'none')}"
        for n in own | given
        if own.get(n) != given.get(n)
    ]
    if wrong:
        raise UserError("the checkpoint is of another model: " + "; ".join(wrong[:5]))
