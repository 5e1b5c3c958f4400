"""Throughput, share of time spent waiting for data, and model FLOPs utilisation."""

import contextlib
import time
from collections.abc import Iterator

import torch

# Dense bf16 peaks of the data sheets, in FLOP/s.
PEAK_FLOPS = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "L40S": 362e12, "B200": 2250e12}


def peak_flops(device_name: str) -> float | None:
    return next((peak for name, peak in PEAK_FLOPS.items() if name in device_name), None)


class Meter:
    """Counts the steps from one `read` to the next, at which the device has caught up with the host.

    The time includes all that holds up training, such as a checkpoint's copy, but not evaluations (`paused`).
    """

    def __init__(self, flops_per_image: int, peak: float | None, ranks: int):
        self.flops_per_image, self.peak, self.ranks = flops_per_image, peak, ranks
        self.total_images, self.total_seconds = 0, 0.0
        self.reset()

    def reset(self) -> None:
        self.began, self.images = time.perf_counter(), 0
        self.waited = 0.0  # seconds, in the step that is under way
        self.passes: list[float] = []  # seconds
        self.waits: list[float] = []  # seconds that each step waited for data
        self.marks: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    @contextlib.contextmanager
    def forward_pass(self) -> Iterator[None]:
        """Around a forward pass, in which no rank waits for another: its time tells a slow rank."""
        if torch.cuda.is_available():
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            yield
            end.record()
            self.marks.append((begin, end))
        else:
            began = time.perf_counter()
            yield
            self.passes.append(time.perf_counter() - began)

    def forward_seconds(self) -> list[float]:
        """Of each forward pass since the last `read`. Waits for the device: for log steps."""
        if self.marks:
            self.marks[-1][1].synchronize()
        return self.passes + [begin.elapsed_time(end) / 1000 for begin, end in self.marks]

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Around a wait for data."""
        began = time.perf_counter()
        yield
        self.waited += time.perf_counter() - began

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Around what is no training. Waits for the device, on which steps may be under way."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        began = time.perf_counter()
        try:
            yield
        finally:
            self.began += time.perf_counter() - began

    def step(self, images: int) -> None:
        """After each step, with the images that it has trained on."""
        self.images += images
        self.waits.append(self.waited)
        self.waited = 0.0

    def seconds(self) -> float:
        return time.perf_counter() - self.began

    def read(self) -> dict[str, float]:
        seconds = self.seconds()
        speed = self.images / seconds
        values = {"images_per_second": speed, "data_wait_fraction": sum(self.waits) / seconds}
        if self.peak:
            values["mfu"] = speed * self.flops_per_image / (self.peak * self.ranks)
        self.total_images += self.images
        self.total_seconds += seconds
        self.reset()
        return values
