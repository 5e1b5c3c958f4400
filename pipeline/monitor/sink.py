"""What every sink can do; each overrides what it cares for."""

from torch import Tensor


class Sink:
    def step(self, step: int) -> None:
        """After every step; must be cheap."""

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """At log steps and after an evaluation."""

    def images(self, step: int, images: Tensor, labels: list[str]) -> None:
        """A grid of inputs as the model sees them: (B, 3, S, S), uint8."""

    def text(self, name: str, text: str) -> None: ...

    def close(self) -> None: ...
