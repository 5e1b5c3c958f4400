"""Exact metrics across ranks: sums stay on the device until they are read."""

from torch import Tensor

from pipeline.engine import Engine


class Sums:
    """Adds up metrics on the device; `read` is the one host sync."""

    def __init__(self, engine: Engine):
        self.engine = engine
        self.sums: dict[str, Tensor] = {}

    def add(self, values: dict[str, Tensor]) -> None:
        for name, value in values.items():
            value = value.detach().double()
            self.sums[name] = self.sums[name] + value if name in self.sums else value

    def read(self) -> dict[str, float]:
        """Sums over all ranks since the last call. Collective. Means are per valid row; `count` stays a sum."""
        import torch

        names = sorted(self.sums)
        total = self.engine.reduce_sum(torch.stack([self.sums[name] for name in names])).tolist()
        self.sums = {}
        read = dict(zip(names, total, strict=True))
        count = read.pop("count")
        return {**{name: value / max(count, 1.0) for name, value in read.items()}, "count": count}
