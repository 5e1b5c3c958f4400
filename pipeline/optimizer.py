"""AdamW and its parameter groups."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pipeline.options import option


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    weight_decay: float = option(0.05, "decoupled weight decay, multiplied by the learning rate, of matrices only")
    beta1: float = option(0.9, "decay of the first moment")
    beta2: float = option(0.999, "decay of the second moment")
    eps: float = option(1e-8, "epsilon of the denominator")

    def __post_init__(self) -> None:
        for name in ("beta1", "beta2"):
            if not 0.0 <= getattr(self, name) < 1.0:
                raise ValueError(f"{name}: must lie in [0, 1), found {getattr(self, name)}")


def is_decayed(name: str, parameter: Tensor) -> bool:
    """Whether weight decay applies: to matrices and kernels, not to biases, norms, tokens or positions."""
    return parameter.ndim >= 2 and name.rsplit(".", 1)[-1] not in ("class_token", "positions", "registers")


def parameter_groups(named: Iterable[tuple[str, nn.Parameter]], config: OptimizerConfig) -> list[dict]:
    """Two groups: decayed and not. Each keeps the parameters' `names` beside them, in the model's order."""
    named = list(named)
    groups = []
    for decayed in (True, False):
        members = [(name, p) for name, p in named if is_decayed(name, p) == decayed]
        groups.append(
            {
                "params": [p for _, p in members],
                "names": [name for name, _ in members],
                "weight_decay": config.weight_decay if decayed else 0.0,
            }
        )
    return [group for group in groups if group["params"]]


def build_optimizer(model: nn.Module, config: OptimizerConfig) -> torch.optim.AdamW:
    """AdamW (arXiv 1711.05101, algorithm 2) over the model's parameter groups; the learning rate is set each step.

    The fused kernel is one pass over the memory, and can leave a step out without asking the device (`skip_step`).
    """
    groups = parameter_groups(model.named_parameters(), config)
    return torch.optim.AdamW(groups, lr=0.0, betas=(config.beta1, config.beta2), eps=config.eps, fused=True)


def skip_step(optimizer: torch.optim.Optimizer, skip: Tensor) -> None:
    """Has the next step of a fused optimizer do nothing where `skip`, a scalar on the device, is true."""
    optimizer.found_inf = skip.float()  # type: ignore[attr-defined]
    optimizer.grad_scale = None  # type: ignore[attr-defined]
