"""TensorBoard: the scalars in groups, a page of those that matter most, a grid of inputs, the config as text."""

import os
from dataclasses import dataclass

from torch import Tensor

from pipeline.monitor.sink import Sink

SPEED = ("images_per_second", "data_wait_fraction", "mfu", "slowest_rank", "slowest_rank_ratio",
         "longest_data_wait_rank", "longest_data_wait_seconds")  # fmt: skip

# The page "Custom Scalars": what to look at first. Each chart names the tags that it draws together.
LAYOUT = {
    "Is it learning?": {
        "loss": ["Multiline", ["train/loss", "val/loss"]],
        "accuracy": ["Multiline", ["train/top1", "val/top1"]],
    },
    "Is it fast?": {
        "images per second": ["Multiline", ["speed/images_per_second"]],
        "shares: waiting for data, peak FLOP/s (MFU)": ["Multiline", ["speed/data_wait_fraction", "speed/mfu"]],
    },
    "Is it healthy?": {
        "norm of the gradient": ["Multiline", ["train/grad_norm"]],
        "learning rate": ["Multiline", ["train/learning_rate"]],
        "what went wrong (empty: nothing)": [
            "Multiline",
            ["train/bad_samples", "train/nonfinite_steps", "train/spikes", "train/skipped_steps"],
        ],
        "slowest rank's forward pass, to the median": ["Multiline", ["speed/slowest_rank_ratio"]],
    },
}


@dataclass(frozen=True, kw_only=True)
class Config:
    def open(self, run_dir: str, start_step: int, total_steps: int) -> Sink:
        return TensorBoard(os.path.join(run_dir, "tensorboard"), start_step)


class TensorBoard(Sink):
    def __init__(self, path: str, start_step: int):
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(path, purge_step=start_step + 1 if start_step else None)
        self.writer.add_custom_scalars(LAYOUT)

    def scalars(self, step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            tag = name if "/" in name else f"{'speed' if name in SPEED else 'train'}/{name}"
            self.writer.add_scalar(tag, value, step)

    def images(self, step: int, images: Tensor, labels: list[str]) -> None:
        count, _, side, _ = images.shape
        columns = min(8, count)
        rows = count // columns
        grid = images[: rows * columns].reshape(rows, columns, 3, side, side)
        grid = grid.permute(2, 0, 3, 1, 4).reshape(3, rows * side, columns * side)  # (3, rows*S, columns*S)
        self.writer.add_image("inputs", grid.cpu(), step)
        lines = [", ".join(labels[r * columns : (r + 1) * columns]) for r in range(rows)]
        self.writer.add_text("inputs/labels", "\n\n".join(lines), step)

    def text(self, name: str, text: str) -> None:
        self.writer.add_text(name, "    " + text.replace("\n", "\n    "))

    def close(self) -> None:
        self.writer.close()
