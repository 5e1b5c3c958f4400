"""DeepSpeed's ZeRO stages behind the interface of `engine.py`."""

import contextlib
import inspect
import os
import warnings
from collections.abc import Iterator
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.engine import (
    MIN_LOSS_SCALE,
    REDUCE_BUCKET_SIZE,
    Engine,
    LossScale,
    TrainingState,
    parameter_shape,
    parameter_size,
    share_of,
)
from pipeline.errors import UserError
from pipeline.optimizer import EMA, skip_step
from vit.layers import EncoderBlock

OLDEST_DEEPSPEED = "0.19.8"  # as in pyproject.toml; earlier ones let gradients that are not finite into the weights


class ZeroEngine(Engine):
    """DeepSpeed's ZeRO 0 to 3 through Accelerate's plugin.

    What DeepSpeed keeps, by stage: 0 in fp32, the parameters themselves; 0 in bf16, an fp32 copy of each;
    1 and 2, a flat fp32 tensor for each parameter group's share of this rank; 3, flat tensors of parameters' shares.
    """

    needs_group = True

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
        from accelerate.utils import compare_versions
        from deepspeed.accelerator import get_accelerator

        if compare_versions("deepspeed", "<", OLDEST_DEEPSPEED):
            raise UserError(
                f"engine.zero_stage={self.config.zero_stage}: DeepSpeed {version('deepspeed')} lets NaN into the"
                f" weights; run: pip install 'deepspeed>={OLDEST_DEEPSPEED}', or set engine.zero_stage=null"
            )
        if self.config.precision == "fp16" and not get_accelerator().is_fp16_supported():
            raise UserError("engine.precision: this machine can't compute in fp16; use engine.precision=bf16 or no")
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
            "fp16": {
                "enabled": precision == "fp16",
                "initial_scale_power": self.config.initial_loss_scale.bit_length() - 1,
                "min_loss_scale": MIN_LOSS_SCALE,
            },
            "steps_per_print": 10**9,
        }
        if self.accumulates_in_fp32 and stage != 0:
            config["data_types"] = {"grad_accum_dtype": "fp32"}
        if self.config.reduce_precision == "fp32":
            config["communication_data_type"] = "fp32"
        return config

    def _wrap(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[Any, Any]:
        if self.config.zero_stage == 3 and self.config.compile == "block":
            from deepspeed.utils import set_z3_leaf_modules

            set_z3_leaf_modules(model, [EncoderBlock])  # no hooks inside of what is compiled
        engine, wrapped = self.accelerator.prepare(model, optimizer)
        if self.accumulates_in_fp32 and self.config.zero_stage == 0:
            for parameter in model.parameters():
                parameter.grad_dtype = torch.float32  # DeepSpeed's own option is for the other stages
        if self.config.precision == "fp16":
            engine.optimizer.loss_scaler.raise_error_at_min_scale = False  # `Health` counts such steps
        return engine, wrapped

    @property
    def accumulates_in_fp32(self) -> bool:
        """Whether gradients are computed in half precision, and those of several micro batches summed in fp32."""
        return self.config.precision != "no" and self.plan.accumulation > 1

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
            norm = self._clip()
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
        return super().masters()

    def loss_scale(self) -> LossScale | None:
        if self.config.precision != "fp16":
            return None
        scaler = self.zero.loss_scaler
        stable_steps = scaler.cur_iter - scaler.last_overflow_iter - 1
        return LossScale(float(scaler.cur_scale), stable_steps, scaler.cur_hysteresis)

    def _set_loss_scale(self, found: LossScale) -> None:
        if self.config.precision == "fp16":
            scaler = self.zero.loss_scaler
            scaler.cur_scale = max(found.scale, MIN_LOSS_SCALE)
            scaler.cur_iter, scaler.last_overflow_iter = found.stable_steps, -1
            scaler.cur_hysteresis = found.hysteresis or scaler.cur_hysteresis

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
            sent = torch.cat([values[name].flatten() for pieces in mine for name, _, _ in pieces] or [torch.empty(0)])
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

        if self.config.zero_stage == 0:
            master = self._master(parameter)
            (master.data if key is None else self.torch_optimizer().state[master][key]).copy_(value)
        elif self.config.zero_stage in (1, 2):
            if key is None:
                utils.safe_set_full_fp32_param(parameter, value)
            else:
                utils.safe_set_full_optimizer_state(parameter, value, key)
        else:  # ZeRO-3 pads a parameter's last partition; its own setter for full values fails there
            begin, length = self._piece(parameter)
            local = value.new_zeros(parameter.ds_tensor.ds_numel)  # type: ignore[attr-defined]
            local[:length] = value.flatten()[begin : begin + length]
            if key is None:
                utils.safe_set_local_fp32_param(parameter, local)
            else:
                utils.safe_set_local_optimizer_state(parameter, local, key)

    def release(self) -> None:
        self.model.destroy()
        if self.config.zero_stage == 3:
            forget_models()
        nn.functional.linear = self.linear
        super().release()
        os.environ.pop("ACCELERATE_USE_DEEPSPEED", None)  # Accelerate's own, which would make the next engine one too


def forget_models() -> None:
    """ZeRO-3 keeps each model of the process alive in a list, and in the cache of a method."""
    from deepspeed.runtime.zero import parameter_offload
    from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator

    parameter_offload.FWD_MODULE_STACK.clear()
    method = vars(PartitionedParameterCoordinator)["_PartitionedParameterCoordinator__params_to_release"]
    for cached in (method, *inspect.getclosurevars(method).nonlocals.values()):  # another decorator hides it
        if hasattr(cached, "cache_clear"):
            cached.cache_clear()
