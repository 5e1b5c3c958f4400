"""AdamW and SGD: parameter groups, and what each keeps for a parameter."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from pipeline.options import option

EMA = "ema"  # the moving average of a parameter, kept in the optimizer's state beside its moments


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    name: Literal["adamw", "sgd"] = option("adamw", "AdamW, or SGD with momentum")
    weight_decay: float = option(0.05, "decoupled weight decay of matrices only (sgd: added to their gradient)")
    decay_times_lr: bool = option(
        True, "multiply weight_decay by the learning rate; false: by its share of schedule.peak_lr, as big_vision does"
    )
    layer_decay: float = option(
        1.0, "a block's learning rate is this share of the next one's (fine-tuning, arXiv 2106.08254); 1: all alike"
    )
    beta1: float = option(0.9, "adamw: decay of the first moment")
    beta2: float = option(0.999, "adamw: decay of the second moment")
    eps: float = option(1e-8, "adamw: epsilon of the denominator")
    momentum: float = option(0.9, "sgd: momentum")
    ema_decay: float | None = option(
        None, "decay of a moving average of the weights, evaluated beside them (val_ema/...); null: none"
    )

    def __post_init__(self) -> None:
        for name in ("beta1", "beta2", "momentum", "ema_decay"):
            value = getattr(self, name)
            if value is not None and not 0.0 <= value < 1.0:
                raise ValueError(f"{name}: must lie in [0, 1), found {value}")
        if self.eps < torch.finfo(torch.float32).tiny:  # a gradient that is always 0 would be divided by 0
            raise ValueError(f"eps: must be a positive number of single precision, found {self.eps}")
        if not 0.0 < self.layer_decay <= 1.0:
            raise ValueError(f"layer_decay: must lie in (0, 1], found {self.layer_decay}")
        if self.name == "sgd" and not self.decay_times_lr:
            raise ValueError("decay_times_lr: sgd adds the decay to the gradient; set true, or optimizer.name=adamw")


def is_decayed(name: str, parameter: Tensor) -> bool:
    """Whether weight decay applies: to matrices and kernels, not to biases, norms, tokens or positions."""
    return parameter.ndim >= 2 and name.rsplit(".", 1)[-1] not in ("class_token", "positions", "registers")


def layers_above(names: list[str]) -> dict[str, int]:
    """How many layers lie above each parameter's: 0 for norm and head, depth + 1 for patches, tokens, positions."""
    blocks = {name: int(found[1]) for name in names if (found := re.match(r"blocks\.(\d+)\.", name))}
    depth = max(blocks.values(), default=-1) + 1
    above = {name: 0 if name.split(".")[0] in ("norm", "representation", "head") else depth + 1 for name in names}
    return above | {name: depth - number for name, number in blocks.items()}


def parameter_groups(
    named: Iterable[tuple[str, nn.Parameter]], config: OptimizerConfig, peak_lr: float
) -> list[dict[str, Any]]:
    """Groups of one weight decay and one share of the learning rate (`lr_scale`), with the parameters' `names`."""
    named = list(named)
    above = layers_above([name for name, _ in named])
    groups: dict[tuple[bool, int], dict[str, Any]] = {}
    for decayed in (True, False):
        for name, parameter in named:
            if is_decayed(name, parameter) == decayed:
                layers = above[name] if config.layer_decay < 1.0 else 0
                scale = config.layer_decay**layers
                # torch multiplies the decay by the group's learning rate: divided by its peak, the share is left.
                decay = config.weight_decay / (1.0 if config.decay_times_lr else peak_lr * scale)
                empty = {"params": [], "names": [], "lr_scale": scale, "weight_decay": decay if decayed else 0.0}
                group = groups.setdefault((decayed, layers), empty)
                group["params"].append(parameter)
                group["names"].append(name)
    return list(groups.values())


def build_optimizer(model: nn.Module, config: OptimizerConfig, peak_lr: float) -> torch.optim.Optimizer:
    """AdamW (arXiv 1711.05101, algorithm 2) or SGD over the parameter groups; the learning rate is set each step.

    The fused kernels are one pass over the memory, and can leave a step out without asking the device (`skip_step`).
    """
    groups = parameter_groups(model.named_parameters(), config, peak_lr)
    if config.name == "sgd":
        return torch.optim.SGD(groups, lr=0.0, momentum=config.momentum, fused=True)
    return torch.optim.AdamW(groups, lr=0.0, betas=(config.beta1, config.beta2), eps=config.eps, fused=True)


def moment_names(optimizer: torch.optim.Optimizer) -> tuple[str, ...]:
    """The tensors that an optimizer keeps for each parameter."""
    if isinstance(optimizer, torch.optim.AdamW):
        return ("exp_avg", "exp_avg_sq")
    return ("momentum_buffer",) if optimizer.defaults["momentum"] else ()


def skip_step(optimizer: torch.optim.Optimizer, skip: Tensor) -> None:
    """Has the next step of a fused optimizer do nothing where `skip`, a scalar on the device, is true."""
    optimizer.found_inf = skip.float()  # type: ignore[attr-defined]
    optimizer.grad_scale = None  # type: ignore[attr-defined]
