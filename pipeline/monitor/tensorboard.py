"""TensorBoard: the scalars in groups, a page of those that matter most, a grid of inputs, the config as text."""

import contextlib
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from pipeline.files import new_file, partial_path
from pipeline.monitor.sink import Sink
from pipeline.text import code_block, printable

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


PROBE_BYTES = 1 << 16


@dataclass(frozen=True, kw_only=True)
class Config:
    def open(self, run_dir: str, start_step: int, total_steps: int) -> Sink:
        return TensorBoard(os.path.join(run_dir, "tensorboard"), start_step)


class TensorBoard(Sink):
    """Writes to event files. Events that can't be written are kept, and go to a new file as soon as one can.

    SummaryWriter writes in a thread that ends at its first error; from then on every call raises that error.
    """

    def __init__(self, path: str, start_step: int):
        import torch.utils.tensorboard  # noqa: F401  # if it is missing, the run fails here, at its start

        self.path, self.first_step = path, start_step + 1
        self.opened_at = 0  # seconds since the epoch
        self.writer: Any = None  # None: all that is pending must be written
        # The calls that may not have reached a file, and all others of the newest step, since a new file hides what
        # older files have from its first step on.
        self.pending: list[tuple[int, Callable[[Any], None]]] = []
        self.pending.append((self.first_step, lambda writer: writer.add_custom_scalars(LAYOUT)))

    def _write(self, step: int, add: Callable[[Any], None]) -> None:
        """Raises whatever fails; after an OSError (a full disk) the next call tries again."""
        entry = step, add
        self.pending.append(entry)
        try:
            if self.writer is None:
                self.writer = self._open()
            else:
                add(self.writer)
            self.writer.flush()
        except Exception as error:
            if not isinstance(error, OSError):
                self.pending.remove(entry)
            self._abandon()
            raise
        self.pending = [entry for entry in self.pending if entry[0] == step]

    def _open(self) -> Any:
        """A writer of a new file, with all that is pending."""
        from torch.utils.tensorboard import SummaryWriter

        os.makedirs(self.path, exist_ok=True)
        probe = partial_path(os.path.join(self.path, "probe"))  # SummaryWriter would print a traceback for each try
        try:
            with open(probe, "wb", opener=new_file) as file:
                file.write(bytes(PROBE_BYTES))
        finally:
            with contextlib.suppress(OSError):
                os.remove(probe)
        while int(time.time()) == self.opened_at:
            time.sleep(0.05)  # files are read in the order of their names, which hold the second
        self.opened_at = int(time.time())
        writer = SummaryWriter(self.path, purge_step=max(self.first_step, self.pending[0][0]))
        for _, add in self.pending:
            add(writer)
        return writer

    def _abandon(self) -> None:
        writer, self.writer = self.writer, None
        if writer is not None:
            with contextlib.suppress(Exception):  # what has failed may fail again
                writer.close()

    def scalars(self, step: int, values: dict[str, float]) -> None:
        def add(writer: Any) -> None:
            for name, value in values.items():
                tag = name if "/" in name else f"{'speed' if name in SPEED else 'train'}/{name}"
                writer.add_scalar(tag, value, step)

        self._write(step, add)

    def images(self, step: int, images: Tensor, labels: list[str]) -> None:
        count, _, side, _ = images.shape
        columns = min(8, count)
        rows = count // columns
        grid = images[: rows * columns].reshape(rows, columns, 3, side, side)
        grid = grid.permute(2, 0, 3, 1, 4).reshape(3, rows * side, columns * side)  # (3, rows*S, columns*S)
        grid = grid.cpu().clone()  # the loader uses the memory of the inputs again
        labels = [printable(label) for label in labels]
        lines = [", ".join(labels[r * columns : (r + 1) * columns]) for r in range(rows)]

        def add(writer: Any) -> None:
            writer.add_image("inputs", grid, step)
            writer.add_text("inputs/labels", code_block("\n".join(lines)), step)

        self._write(step, add)

    def text(self, name: str, text: str) -> None:
        shown = code_block(text)
        self._write(self.first_step, lambda writer: writer.add_text(name, shown, self.first_step))

    def flush(self) -> None:
        if self.writer is None and self.pending:
            try:
                self.writer = self._open()
                self.writer.flush()
            except Exception:
                self._abandon()
                raise

    def close(self) -> None:
        try:
            self.flush()
        finally:
            self._abandon()
            self.pending = []
