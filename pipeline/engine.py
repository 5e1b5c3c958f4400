"""Accelerate and DeepSpeed: joins the ranks, wraps the model, runs backward, clips, steps and gathers.

One class for each strategy, with one interface; the trainer doesn't know which it has.
"""

import contextlib
import os
import socket
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, Literal

import torch
from torch import Tensor, nn

from pipeline.errors import UserError
from pipeline.optimizer import skip_step
from pipeline.options import option
from pipeline.runtime import Ranks

MOMENTS = ("exp_avg", "exp_avg_sq")
REDUCE_BUCKET_SIZE = 25_000_000  # gradients reduced together; DeepSpeed's default holds a buffer of 5e8 numbers


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    precision: Literal["no", "bf16", "fp16"] = option("no", "mixed precision", may_change=True)
    zero_stage: int | None = option(None, "DeepSpeed ZeRO stage 0 to 3; null: plain DDP", may_change=True)
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


@dataclass
class TrainingState:
    """A model and its optimizer, whatever the strategy: full fp32 tensors by parameter name, on the CPU."""

    weights: dict[str, Tensor]
    moments: dict[str, dict[str, Tensor]] = field(default_factory=dict)  # "exp_avg" -> name -> tensor
    updates: int = 0  # Adam's step counter


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

        handlers = [self._process_group(), DistributedDataParallelKwargs(gradient_as_bucket_view=True)]
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

    def prepare(self, model: nn.Module, optimizer: torch.optim.Optimizer, state: TrainingState | None) -> None:
        """Wraps model and optimizer, after loading `state` into them."""
        self.module = model
        if state is not None:
            load_weights(model, state.weights)
        self.model, self.optimizer = self.accelerator.prepare(model, optimizer)
        if state is not None and state.updates:
            self.load_moments(state)

    @contextlib.contextmanager
    def micro_step(self) -> Iterator[None]:
        """Around forward and backward of one micro batch; gradients are reduced in the last of a step only."""
        with self.accelerator.accumulate(self.model):
            yield

    def backward(self, loss: Tensor) -> None:
        """`loss` is the micro batch's share of the global mean; gradients are averaged over ranks afterwards."""
        self.accelerator.backward(loss * (self.plan.accumulation * self.plan.ranks))

    def step(self, learning_rate: float) -> Tensor:
        """Clips by the global norm and updates the weights. Returns the norm before clipping, on the device.

        Where the norm is not finite, weights and moments stay as they are.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        norm = self.accelerator.clip_grad_norm_(self.module.parameters(), self.config.grad_clip or float("inf"))
        if self.config.precision != "fp16":  # whose loss scaler skips by itself
            skip_step(self.torch_optimizer(), ~norm.isfinite())
        self.optimizer.step()
        self.optimizer.zero_grad()
        return norm

    def state(self) -> TrainingState:
        """A host copy of this rank's part of the state, without a word to other ranks: `whole` makes it a share."""
        weights, moments = {}, {key: {} for key in MOMENTS}  # type: ignore[var-annotated]
        mine = set(share_of(self.sizes(), self.ranks.rank, self.ranks.world_size))
        for name, parameter in self.module.named_parameters():
            for key, kept in ((None, weights), *moments.items()):
                value = self.part(parameter, key, name in mine)
                if value is not None:
                    kept[name] = value.detach().to("cpu", torch.float32, copy=True)
        return TrainingState(weights, moments, self.updates())

    def whole(self, state: TrainingState, group: Any) -> TrainingState:
        """This rank's share, in whole parameters, of what `state` has copied; all shares together are the whole.

        Collective on `group`, which is of the CPU; needs nothing of the model, which may be trained meanwhile.
        """
        return state

    def sizes(self) -> dict[str, int]:
        return {name: parameter_size(parameter) for name, parameter in self.module.named_parameters()}

    def torch_optimizer(self) -> torch.optim.Optimizer:
        return self.optimizer.optimizer

    def updates(self) -> int:
        steps = [int(state["step"]) for state in self.torch_optimizer().state.values() if "step" in state]
        return max(steps, default=0)

    def part(self, parameter: nn.Parameter, key: str | None, mine: bool) -> Tensor | None:
        """What this rank copies of a parameter (key None) or of one of its moments: all of it, if it is `mine`."""
        if not mine:
            return None
        return parameter if key is None else self.torch_optimizer().state[parameter][key]

    def load_moments(self, state: TrainingState) -> None:
        slots = self.torch_optimizer().state
        for name, parameter in self.module.named_parameters():
            slots[parameter] = {"step": torch.tensor(float(state.updates))}
            for key in MOMENTS:
                slots[parameter][key] = state.moments[key][name].to(parameter.device, copy=True)

    def reduce_sum(self, values: Tensor) -> Tensor:
        """Sums over ranks, on the device."""
        if self.ranks.world_size > 1:
            torch.distributed.all_reduce(values)
        return values

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

    def close(self) -> None:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


class DeepSpeedEngine(Engine):
    """DeepSpeed's ZeRO 0 to 3 through Accelerate's plugin."""

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

        own_clip = self.config.zero_stage == 0 and self.config.precision == "no"  # DeepSpeed drops the norm there
        config = {
            "train_micro_batch_size_per_gpu": self.plan.micro_batch,
            "gradient_accumulation_steps": self.plan.accumulation,
            "train_batch_size": self.plan.global_batch,
            "gradient_clipping": 0.0 if own_clip else self.config.grad_clip or 0.0,
            "zero_allow_untested_optimizer": True,
            "zero_optimization": {"stage": self.config.zero_stage, "reduce_bucket_size": REDUCE_BUCKET_SIZE},
            "bf16": {"enabled": self.config.precision == "bf16"},
            "fp16": {"enabled": self.config.precision == "fp16"},
            "steps_per_print": 10**9,
        }
        os.environ.setdefault("DEEPSPEED_LOG_LEVEL", "warning")
        accelerator = Accelerator(deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=config), kwargs_handlers=handlers)
        assert accelerator.distributed_type == DistributedType.DEEPSPEED
        return accelerator

    @property
    def input_dtype(self) -> torch.dtype:
        return {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[self.config.precision]

    def prepare(self, model: nn.Module, optimizer: torch.optim.Optimizer, state: TrainingState | None) -> None:
        super().prepare(model, optimizer, state)
        self.zero = self.model.optimizer  # DeepSpeed's, around ours
        assert self.model.train_micro_batch_size_per_gpu() == self.plan.micro_batch
        assert self.model.train_batch_size() == self.plan.global_batch

    @contextlib.contextmanager
    def micro_step(self) -> Iterator[None]:
        self.accelerator._do_sync()
        yield

    def backward(self, loss: Tensor) -> None:
        self.model.set_gradient_accumulation_boundary(is_boundary=self.accelerator.sync_gradients)
        self.model.backward(loss * (self.plan.accumulation * self.plan.ranks))

    def step(self, learning_rate: float) -> Tensor:
        for group in self.zero.param_groups:
            group["lr"] = learning_rate
        norm = None
        if self.zero is self.torch_optimizer():  # plain torch optimizer: ZeRO-0 in fp32
            norm = nn.utils.clip_grad_norm_(self.module.parameters(), self.config.grad_clip or float("inf"))
            skip_step(self.zero, ~norm.isfinite())
        self.model.step()
        if norm is None:
            norm = self.model.get_global_grad_norm()
        return torch.as_tensor(0.0 if norm is None else norm, dtype=torch.float32, device=self.device)

    def torch_optimizer(self) -> torch.optim.Optimizer:
        optimizer = self.model.optimizer
        return getattr(optimizer, "optimizer", optimizer)

    def state(self) -> TrainingState:
        if self._in_pieces():
            self._link_moments()
        return super().state()

    def part(self, parameter: nn.Parameter, key: str | None, mine: bool) -> Tensor | None:
        """In ZeRO 1 to 3: the piece of the flattened parameter that lies on this rank."""
        if not self._in_pieces():
            return super().part(self._master(parameter) if self._has_masters() else parameter, key, mine)
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
        if not self._in_pieces():
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
        return TrainingState(kept[0], dict(zip(state.moments, kept[1:], strict=True)), state.updates)

    def _in_pieces(self) -> bool:
        return self.zero is not self.torch_optimizer() and not self._has_masters()

    def _has_masters(self) -> bool:
        """ZeRO-0 with master weights"""
        return hasattr(self.zero, "fp16_groups") and hasattr(self.zero, "fp32_groups")

    def _master(self, parameter: nn.Parameter) -> nn.Parameter:
        for low, high in zip(self.zero.fp16_groups, self.zero.fp32_groups, strict=True):
            for half, master in zip(low, high, strict=True):
                if half is parameter:
                    return master
        raise AssertionError("a parameter without master weights")

    def _link_moments(self) -> None:
        # DeepSpeed links moments to parameters after the first group's update, when those of the others don't exist.
        if hasattr(self.zero, "_lazy_init_hp_params_optimizer_state"):
            self.zero._hp_optimizer_states_linked = False
            self.zero._lazy_init_hp_params_optimizer_state()

    def load_moments(self, state: TrainingState) -> None:
        self.zero = self.model.optimizer
        inner = self.torch_optimizer()
        if self.zero is inner:
            return super().load_moments(state)
        if self._has_masters():
            for name, parameter in self.module.named_parameters():
                master = self._master(parameter)
                master.data.copy_(state.weights[name])
                inner.state[master] = {"step": torch.tensor(float(state.updates))}
                for key in MOMENTS:
                    inner.state[master][key] = state.moments[key][name].to(master.device, copy=True)
            return None
        three = self.config.zero_stage == 3
        flats = self.zero.fp32_partitioned_groups_flat if three else self.zero.single_partition_of_fp32_groups
        for flat in flats:
            inner.state[flat] = {"step": torch.tensor(float(state.updates))}
            for key in MOMENTS:
                inner.state[flat][key] = torch.zeros_like(flat.data)
        self._link_moments()
        for name, parameter in self.module.named_parameters():
            self._set(parameter, state.weights[name], None)
            for key in MOMENTS:
                self._set(parameter, state.moments[key][name], key)
        return None

    def _set(self, parameter: nn.Parameter, value: Tensor, key: str | None) -> None:
        from deepspeed import utils

        value = value.to(self.device)
        if self.config.zero_stage != 3:
            if key is None:
                utils.safe_set_full_fp32_param(parameter, value)
            else:
                utils.safe_set_full_optimizer_state(parameter, value, key)
            return
        # ZeRO-3 pads a parameter's last partition; its own setter for full values fails there.
        size = parameter.ds_tensor.ds_numel  # type: ignore[attr-defined]
        padded = value.new_zeros(size * self.ranks.world_size)
        padded[: value.numel()] = value.flatten()
        local = padded[size * self.ranks.rank : size * (self.ranks.rank + 1)]
        if key is None:
            utils.safe_set_local_fp32_param(parameter, local)
        else:
            utils.safe_set_local_optimizer_state(parameter, local, key)

    def close(self) -> None:
        self.model.destroy()
        super().close()


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
