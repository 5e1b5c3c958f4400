"""Exact metrics across ranks: sums stay on the device until they are read."""

import torch
from torch import Tensor

from pipeline.engine import Engine


class Sums:
    """Adds up metrics on the device; `read` is the one host sync."""

    def __init__(self, engine: Engine):
        self.engine = engine
        self.sums: dict[str, Tensor] = {}

    @classmethod
    def resume(cls, engine: Engine, saved: dict[str, list[float]]) -> "Sums":
        """The sums that `saved` has returned; on another number of ranks, rank 0 takes them all."""
        sums, ranks = cls(engine), engine.ranks
        for name, by_rank in saved.items():
            if len(by_rank) != ranks.world_size:
                by_rank = [sum(by_rank)] + [0.0] * (ranks.world_size - 1)
            sums.sums[name] = torch.tensor(by_rank[ranks.rank], dtype=torch.float64, device=engine.device)
        return sums

    def add(self, values: dict[str, Tensor]) -> None:
        for name, value in values.items():
            value = value.detach().double()
            self.sums[name] = self.sums[name] + value if name in self.sums else value

    def read(self) -> dict[str, float]:
        """Sums over all ranks since the last call. Collective. Means are per valid row; `count` stays a sum."""
        if not self.sums:
            return {"count": 0.0}
        names = sorted(self.sums)
        total = self.engine.reduce_sum(torch.stack([self.sums[name] for name in names])).tolist()
        self.sums = {}
        read = dict(zip(names, total, strict=True))
        count = read.pop("count")
        return {**{name: value / max(count, 1.0) for name, value in read.items()}, "count": count}

    def saved(self) -> dict[str, list[float]]:
        """Each rank's sums since the last `read`, for a checkpoint. Collective, and a host sync.

        By rank, since sums of floats depend on their order: a resume on as many ranks finds the same means, bit by bit.
        """
        if not self.sums:
            return {}
        names = sorted(self.sums)
        mine = torch.stack([self.sums[name] for name in names])
        by_rank = self.engine.gather_rows(mine[None]).T.tolist()
        return dict(zip(names, by_rank, strict=True))
