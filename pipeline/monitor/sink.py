"""What every sink can do; each overrides what it cares for. `Sinks` calls all of a run's."""

import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from pipeline.text import shown

if TYPE_CHECKING:
    from pipeline.monitor.jsonl import Lines


class Sink:
    def step(self, step: int) -> None:
        """After every step; must be cheap."""

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """At log steps and after an evaluation; `step` steps are done."""

    def images(self, step: int, images: Tensor, labels: list[str]) -> None:
        """A grid of the inputs of step `step` (counted from 1), as the model sees them: (B, 3, S, S), uint8."""

    def text(self, name: str, text: str) -> None: ...

    def flush(self) -> None:
        """Before a checkpoint: a resume does not repeat the steps before it."""

    def logs(self) -> "list[Lines]":
        """The logs of which a checkpoint keeps the state."""
        return []

    def close(self) -> None: ...


class Sinks(Sink):
    """Passes every call on to all sinks. A sink that raises gets one warning and is called again next time."""

    def __init__(self, sinks: Sequence[Sink] = ()):
        self.sinks = list(sinks)
        self.failing: dict[tuple[int, str], type[Exception]] = {}  # by sink and method

    def step(self, step: int) -> None:
        self._each("step", lambda sink: sink.step(step))

    def scalars(self, step: int, values: dict[str, float]) -> None:
        self._each("scalars", lambda sink: sink.scalars(step, values))

    def images(self, step: int, images: Tensor, labels: list[str]) -> None:
        self._each("images", lambda sink: sink.images(step, images, labels))

    def text(self, name: str, text: str) -> None:
        self._each("text", lambda sink: sink.text(name, text))

    def flush(self) -> None:
        self._each("flush", lambda sink: sink.flush())

    def logs(self) -> "list[Lines]":
        return [log for sink in self.sinks for log in sink.logs()]

    def close(self) -> None:
        self._each("close", lambda sink: sink.close())

    def _each(self, method: str, call: Callable[[Sink], None]) -> None:
        for number, sink in enumerate(self.sinks):
            place, name = (number, method), type(sink).__name__
            try:
                call(sink)
            except Exception as error:  # no sink is worth the training
                if self.failing.get(place) is not type(error):
                    what = f"{type(error).__name__}: {error}"
                    _warn(f"{name}.{method} failed: {what}; training goes on, the next call tries again")
                self.failing[place] = type(error)
            else:
                if self.failing.pop(place, None) is not None:
                    _warn(f"{name}.{method} works again")


def _warn(message: str) -> None:
    print(f"\nwarning: {shown(message)}", file=sys.stderr, flush=True)
