"""A live progress bar on the terminal."""

import sys
from dataclasses import dataclass
from typing import Any

from pipeline.monitor.sink import Sink

SHOWN = {"loss": ".3f", "val/top1": ".2%", "images_per_second": ".0f"}


@dataclass(frozen=True, kw_only=True)
class Config:
    def open(self, run_dir: str, start_step: int, total_steps: int) -> Sink:
        return Progress(start_step, total_steps)


class Progress(Sink):
    def __init__(self, start_step: int, total_steps: int):
        from tqdm import tqdm

        seconds = 0.5 if sys.stderr.isatty() else 30.0  # each is a line in a batch job's log
        self.bar: Any = tqdm(
            total=total_steps, initial=start_step, unit="step", dynamic_ncols=True, mininterval=seconds
        )
        self.shown: dict[str, str] = {}

    def step(self, step: int) -> None:
        self.bar.update(step - self.bar.n)

    def scalars(self, step: int, values: dict[str, float]) -> None:
        self.shown |= {name: format(values[name], form) for name, form in SHOWN.items() if name in values}
        self.bar.set_postfix(self.shown, refresh=False)

    def close(self) -> None:
        self.bar.close()
