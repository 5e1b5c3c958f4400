"""Accelerate and DeepSpeed: joins the ranks, wraps the model, runs backward, clips, steps and gathers.

One class for each strategy, with one interface; the trainer doesn't know which it has.
"""

import contextlib
import os
import socket
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, Literal

import torch
from torch import Tensor, nn

from pipeline.errors import UserError
from pipeline.optimizer import EMA, moment_names, skip_step
from pipeline.options import option
from pipeline.runtime import Ranks

REDUCE_BUCKET_SIZE = 25_000_000  # gradients reduced together; DeepSpeed's default holds a buffer of 5e8 numbers


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    precision: Literal["no", "bf16", "fp16"] = option("no", "mixed precision", may_change=True)
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


@dataclass
class TrainingState:
    """A model and its optimizer, whatever the strategy: full fp32 tensors by parameter name, on the CPU."""

    weights: dict[str, Tensor]
    moments: dict[str, dict[str, Tensor]] = field(default_factory=dict)  # "exp_avg" -> name -> tensor; also "ema"
    updates: int = 0  # Adam's step counter
    loss_scale: float | None = None  # of fp16


class Engine:
    """Plain DDP, or one process, through Accelerate."""

    def __init__(self, config: EngineConfig, plan: BatchPlan, ranks: Ranks):
        self.config, self.plan, self.ranks = config, plan, ranks
        self.accelerator = self._connect()
        self.device: torch.device = self.accelerator.device
        if self.accelerator.num_processes != ranks.world_size:
            raise UserError(
                f"{ranks.world_size} ranks were started but {self.accelerator.num_processes} joined;"
                " start with torchrun, accelerate launch --multi_gpu, deepspeed or srun"
            )

    def _connect(self) -> Any:
        from accelerate import Accelerator, DistributedDataParallelKwargs
        from accelerate.utils import DDPCommunicationHookType

        if self.config.reduce_precision == "half" and not torch.cuda.is_available():
            raise UserError("engine.reduce_precision: half under DDP needs GPUs; use engine.reduce_precision=fp32")
        half = {"no": "NO", "bf16": "BF16", "fp16": "FP16"}[self.config.precision]
        hook = DDPCommunicationHookType[half if self.config.reduce_precision == "half" else "NO"]
        handlers = [self._process_group(), DistributedDataParallelKwargs(gradient_as_bucket_view=True, comm_hook=hook)]
        return Accelerator(
            cpu=not torch.cuda.is_available(),
            mixed_precision=self.config.precision,
            gradient_accumulation_steps=self.plan.accumulation,
            kwargs_handlers=handlers,
        )

    def _process_group(self) -> Any:
        from accelerate import InitProcessGroupKwargs

        if self.config.precision == "fp16" and not torch.cuda.is_available():
            raise UserError("engine.precision: fp16 needs a GPU; use engine.precision=bf16 or no")
        backend = "nccl" if torch.cuda.is_available() else "gloo"
        return InitProcessGroupKwargs(backend=backend, timeout=timedelta(seconds=self.config.timeout_seconds))

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
        self.model, self.optimizer = self.accelerator.prepare(model, optimizer)
        self._hold_plan()
        self.slots = moment_names(self.torch_optimizer()) + ((EMA,) if ema_decay is not None else ())
        self._create_slots(0 if state is None else state.updates)
        if state is not None:
            self.load_slots(state)
        self.ema_decay = ema_decay

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
            self.optimizer.zero_grad()

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
        norm = self.accelerator.clip_grad_norm_(self.module.parameters(), self.config.grad_clip or float("inf"))
        if self.config.precision != "fp16":  # whose loss scaler skips by itself
            skip_step(self.torch_optimizer(), ~norm.isfinite())
        self.optimizer.step()
        self.optimizer.zero_grad()
        return norm

    def state(self) -> TrainingState:
        """A host copy of this rank's part of the state, without a word to other ranks: `whole` makes it a share."""
        weights, moments = {}, {key: {} for key in self.slots}  # type: ignore[var-annotated]
        mine = set(share_of(self.sizes(), self.ranks.rank, self.ranks.world_size))
        for name, parameter in self.module.named_parameters():
            for key, kept in ((None, weights), *moments.items()):
                value = self.part(parameter, key, name in mine)
                if value is not None:
                    kept[name] = value.detach().to("cpu", torch.float32, copy=True)
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

    def loss_scale(self) -> float | None:
        return None if self.accelerator.scaler is None else self.accelerator.scaler.get_scale()

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

    def _set_loss_scale(self, scale: float) -> None:
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.update(scale)

    def reduce_sum(self, values: Tensor) -> Tensor:
        """Sums over ranks, on the device."""
        if self.ranks.world_size > 1:
            torch.distributed.all_reduce(values)
        return values

    def gather_rows(self, values: Tensor) -> Tensor:
        """Everybody's `values` (1, n), by rank: (ranks, n). Collective, on the device."""
        rows = values.new_zeros(self.ranks.world_size, values.shape[1])
        rows[self.ranks.rank] = values[0]
        return self.reduce_sum(rows)

    def gather_objects(self, value: Any, group: Any = None) -> list[Any]:
        """Everybody's value, by rank. Collective; for rare and small things."""
        if self.ranks.world_size == 1:
            return [value]
        gathered: list[Any] = [None] * self.ranks.world_size
        torch.distributed.all_gather_object(gathered, value, group=group)
        return gathered

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


class DeepSpeedEngine(Engine):
    """DeepSpeed's ZeRO 0 to 3 through Accelerate's plugin.

    What DeepSpeed keeps, by stage: 0 in fp32, the parameters themselves; 0 in bf16 or fp16, an fp32 copy of each;
    1 and 2, a flat fp32 tensor for each parameter group's share of this rank; 3, flat tensors of parameters' shares.
    """

    def _connect(self) -> Any:
        handlers = [self._process_group()]
        if not torch.cuda.is_available():
            os.environ.setdefault("DS_ACCELERATOR", "cpu")  # or it warns that it has found no GPU
        try:
            import deepspeed.ops
        except ImportError:
            raise UserError(
                f"engine.zero_stage={self.config.zero_stage} needs DeepSpeed; run: pip install"
                " 'vit-pretrain[deepspeed]', or set engine.zero_stage=null"
            ) from None
        if not torch.cuda.is_available():  # its shared-memory op would be compiled at start, for over a minute
            deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        from accelerate import Accelerator
        from accelerate.utils import DeepSpeedPlugin, DistributedType

        self.linear = nn.functional.linear  # ZeRO-3 puts its own in torch's place
        os.environ.setdefault("DEEPSPEED_LOG_LEVEL", "warning")
        # DeepSpeed calls them by their older names, in each step.
        warnings.filterwarnings("ignore", r"`?torch\.distributed\..* is deprecated", FutureWarning)
        plugin = DeepSpeedPlugin(hf_ds_config=self._deepspeed_config())
        accelerator = Accelerator(
            deepspeed_plugin=plugin, gradient_accumulation_steps=self.plan.accumulation, kwargs_handlers=handlers
        )
        assert accelerator.distributed_type == DistributedType.DEEPSPEED
        return accelerator

    def _deepspeed_config(self) -> dict[str, Any]:
        stage, precision = self.config.zero_stage, self.config.precision
        zero: dict[str, Any] = {"stage": stage, "reduce_bucket_size": REDUCE_BUCKET_SIZE}
        if self.config.offload_optimizer:
            zero["offload_optimizer"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
        own_clip = stage == 0 and precision == "no"  # DeepSpeed drops the norm there
        config = {
            "train_micro_batch_size_per_gpu": self.plan.micro_batch,
            "gradient_accumulation_steps": self.plan.accumulation,
            "train_batch_size": self.plan.global_batch,
            "gradient_clipping": 0.0 if own_clip else self.config.grad_clip or 0.0,
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,  # torch's fused AdamW runs on CPUs too, and needs no compiler
            "zero_optimization": zero,
            "bf16": {"enabled": precision == "bf16"},
            "fp16": {"enabled": precision == "fp16"},
            "steps_per_print": 10**9,
        }
        if self.config.reduce_precision == "fp32":
            config["communication_data_type"] = "fp32"
        return config

    @property
    def input_dtype(self) -> torch.dtype:
        return {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[self.config.precision]

    @property
    def zero(self) -> Any:
        """DeepSpeed's optimizer, around ours."""
        return self.model.optimizer

    def _hold_plan(self) -> None:
        super()._hold_plan()
        assert self.model.train_micro_batch_size_per_gpu() == self.plan.micro_batch
        assert self.model.gradient_accumulation_steps() == self.plan.accumulation
        assert self.model.train_batch_size() == self.plan.global_batch

    @contextlib.contextmanager
    def micro_step(self) -> Iterator[None]:
        self.accelerator._do_sync()
        yield

    def backward(self, loss: Tensor) -> None:
        self.model.set_gradient_accumulation_boundary(is_boundary=self.accelerator.sync_gradients)
        self.model.backward(loss * (self.plan.accumulation * self.plan.ranks))

    def _update(self) -> Tensor:
        norm = None
        if self.zero is self.torch_optimizer():
            norm = nn.utils.clip_grad_norm_(self.module.parameters(), self.config.grad_clip or float("inf"))
            skip_step(self.zero, ~norm.isfinite())
        self.model.step()
        if norm is None:
            norm = self.model.get_global_grad_norm()
        return torch.as_tensor(0.0 if norm is None else norm, dtype=torch.float32, device=self.device)

    def torch_optimizer(self) -> torch.optim.Optimizer:
        return getattr(self.zero, "optimizer", self.zero)

    def masters(self) -> list[Tensor]:
        if self.config.zero_stage == 3:
            return list(self.zero.fp32_partitioned_groups_flat)
        if self.config.zero_stage in (1, 2):
            return list(self.zero.single_partition_of_fp32_groups)
        return super().masters()

    def loss_scale(self) -> float | None:
        return float(self.zero.cur_scale) if self.config.precision == "fp16" else None

    def _set_loss_scale(self, scale: float) -> None:
        if self.config.precision == "fp16":
            self.zero.loss_scaler.cur_scale = scale

    def _create_slots(self, updates: int) -> None:
        super()._create_slots(updates)
        if self.config.zero_stage in (1, 2):
            self.zero._hp_optimizer_states_linked = False
            self.zero._lazy_init_hp_params_optimizer_state()

    def part(self, parameter: nn.Parameter, key: str | None, mine: bool) -> Tensor | None:
        """In ZeRO 1 to 3: the piece of the flattened parameter that lies on this rank."""
        if self.config.zero_stage == 0:
            return super().part(self._master(parameter), key, mine)
        _, length = self._piece(parameter)
        if length == 0:
            return None
        if self.config.zero_stage == 3:  # where the last rank's piece is padded
            return parameter._z3_optimizer.get_local_fp32_param(parameter, key)[:length]  # type: ignore[attr-defined]
        return parameter._hp_mapping.get_hp_fragment(key)  # type: ignore[attr-defined]

    def _piece(self, parameter: nn.Parameter) -> tuple[int, int]:
        """Where this rank's piece of the flattened parameter begins, and its length."""
        if self.config.zero_stage == 3:
            size, total = parameter.ds_tensor.ds_numel, parameter_size(parameter)  # type: ignore[attr-defined]
            begin = min(size * self.ranks.rank, total)
            return begin, min(size, total - begin)
        mapping = parameter._hp_mapping  # type: ignore[attr-defined]
        return (mapping.lp_fragment_address.start, mapping.lp_fragment_address.numel) if mapping else (0, 0)

    def whole(self, state: TrainingState, group: Any) -> TrainingState:
        if self.config.zero_stage == 0:
            return state
        sizes, world_size = self.sizes(), self.ranks.world_size
        parameters = dict(self.module.named_parameters())
        shares = [share_of(sizes, rank, world_size) for rank in range(world_size)]
        found = [[(name, *self._piece(parameters[name])) for name in share] for share in shares]
        mine = [[piece for piece in pieces if piece[2]] for pieces in found]  # by the rank that they go to
        theirs = [pieces[self.ranks.rank] for pieces in self.gather_objects(mine, group)]  # by the rank they come from
        kept = []
        for values in (state.weights, *state.moments.values()):
            joined = {name: torch.empty(sizes[name]) for name in shares[self.ranks.rank]}
            sent = torch.cat(
                [values.pop(name).flatten() for pieces in mine for name, _, _ in pieces] or [torch.empty(0)]
            )
            coming, going = ([sum(length for _, _, length in pieces) for pieces in way] for way in (theirs, mine))
            received = sent if world_size == 1 else torch.empty(sum(coming))
            if world_size > 1:
                torch.distributed.all_to_all_single(received, sent, coming, going, group)
            lengths = [length for pieces in theirs for _, _, length in pieces]
            places = [(name, begin, length) for pieces in theirs for name, begin, length in pieces]
            for (name, begin, length), piece in zip(places, received.split(lengths), strict=True):
                joined[name][begin : begin + length] = piece
            assert sum(lengths) == sum(t.numel() for t in joined.values()), "pieces are missing"
            kept.append({name: t.view(parameter_shape(parameters[name])) for name, t in joined.items()})
        return TrainingState(kept[0], dict(zip(state.moments, kept[1:], strict=True)), state.updates, state.loss_scale)

    def _average(self, parameter: nn.Parameter) -> Tensor:
        if self.config.zero_stage == 0:
            return super()._average(self._master(parameter))
        from deepspeed.utils import safe_get_full_optimizer_state

        return safe_get_full_optimizer_state(parameter, EMA)

    def _master(self, parameter: nn.Parameter) -> nn.Parameter:
        """ZeRO-0: the fp32 copy of a parameter, or itself."""
        if self.zero is self.torch_optimizer():
            return parameter
        for low, high in zip(self.zero.fp16_groups, self.zero.fp32_groups, strict=True):
            for half, master in zip(low, high, strict=True):
                if half is parameter:
                    return master
        raise AssertionError("a parameter without master weights")

    def _set(self, parameter: nn.Parameter, key: str | None, value: Tensor) -> None:
        from deepspeed import utils

        value = value.to(self.device)
        if self.config.zero_stage == 0:
            master = self._master(parameter)
            (master.data if key is None else self.torch_optimizer().state[master][key]).copy_(value)
        elif self.config.zero_stage in (1, 2):
            if key is None:
                utils.safe_set_full_fp32_param(parameter, value)
            else:
                utils.safe_set_full_optimizer_state(parameter, value, key)
        else:  # ZeRO-3 pads a parameter's last partition; its own setter for full values fails there
            size = parameter.ds_tensor.ds_numel  # type: ignore[attr-defined]
            padded = value.new_zeros(size * self.ranks.world_size)
            padded[: value.numel()] = value.flatten()
            local = padded[size * self.ranks.rank : size * (self.ranks.rank + 1)]
            if key is None:
                utils.safe_set_local_fp32_param(parameter, local)
            else:
                utils.safe_set_local_optimizer_state(parameter, local, key)

    def release(self) -> None:
        self.model.destroy()
        nn.functional.linear = self.linear
        super().release()
        os.environ.pop("ACCELERATE_USE_DEEPSPEED", None)  # Accelerate's own, which would make the next engine one too


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


def build_engine(config: EngineConfig, plan: BatchPlan, ranks: Ranks) -> Engine:
    return (Engine if config.zero_stage is None else DeepSpeedEngine)(config, plan, ranks)


def load_weights(model: nn.Module, weights: dict[str, Tensor]) -> None:
    """Raises UserError where names or shapes differ."""
    own = {name: tuple(p.shape) for name, p in model.named_parameters()}
    given = {name: tuple(w.shape) for name, w in weights.items()}
    wrong = [
        f"{n}: {given.get(n, 'missing')} instead of {own.get(n, 'none')}"
        for n in own | given
        if own.get(n) != given.get(n)
    ]
    if wrong:
        raise UserError("the checkpoint is of another model: " + "; ".join(wrong[:5]))
    model.load_state_dict(weights)
