"""Order -> worker processes -> uint8 batches on the device.

The lanes of a rank are dealt to its workers; each worker yields its lanes' part of every batch, in turn, and the
rank joins the parts. So a batch is the same for any number of workers.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from pipeline.data.decode import decode
from pipeline.data.index import (
    IMAGE_SUFFIXES,
    INDEX_COMMAND,
    Index,
    label_of,
    load_records,
    parse_tar,
    read_range,
    sample_digest,
)
from pipeline.data.order import AUGMENT, Order, Piece, Window, auto_lanes, share
from pipeline.errors import UserError
from pipeline.options import option
from pipeline.runtime import Ranks, ignore_signals


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    train: tuple[str, ...] = option((), "training shards: URLs or brace patterns", may_change=True)
    val: tuple[str, ...] = option((), "validation shards; none: no evaluation", may_change=True)
    prepare: str | None = option(None, "embedded data set to write where the shards are missing: digits")
    global_batch_size: int = option(64, "images of one optimizer step, over all ranks")
    val_batch_size: int = option(256, "images of one evaluation batch, over all ranks", may_change=True)
    workers: int = option(2, "worker processes of each rank that read and decode; 0 reads in the rank", may_change=True)
    lanes: int | None = option(None, "independent streams of samples; null: the batch's largest divisor up to 1024")
    shuffle_pool: int = option(16384, "compressed samples in memory, over all ranks, among which is shuffled")

    def __post_init__(self) -> None:
        for name, least in (("global_batch_size", 1), ("val_batch_size", 1), ("workers", 0), ("shuffle_pool", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}: must be at least {least}, found {getattr(self, name)}")
        if self.prepare not in (None, "digits"):
            raise ValueError(f"prepare: unknown data set {self.prepare!r}; known is digits")
        if self.lanes is not None and (self.lanes < 1 or self.global_batch_size % self.lanes):
            raise ValueError(f"lanes: {self.lanes} does not divide global_batch_size {self.global_batch_size}")

    @property
    def resolved_lanes(self) -> int:
        return self.lanes or auto_lanes(self.global_batch_size)


@dataclass
class Batch:
    """A rank's rows of one global batch."""

    images: Tensor  # (B, 3, S, S), uint8
    labels: Tensor  # (B,), int64
    valid: Tensor  # (B,), bool: False for rows that only pad
    keys: list[str]
    targets: Tensor | None = None  # (B, classes), float32: set on the device where images are mixed

    def __len__(self) -> int:
        return len(self.labels)

    def to(self, device: torch.device) -> "Batch":
        images, labels, valid = (t.to(device, non_blocking=True) for t in (self.images, self.labels, self.valid))
        return Batch(images, labels, valid, self.keys)

    def pin_memory(self) -> "Batch":
        return Batch(self.images.pin_memory(), self.labels.pin_memory(), self.valid.pin_memory(), self.keys)

    def split(self, rows: int) -> list["Batch"]:
        """Micro batches of `rows` rows each."""
        images, labels, valid = self.images.split(rows), self.labels.split(rows), self.valid.split(rows)
        keys = [self.keys[begin : begin + rows] for begin in range(0, len(self), rows)]
        return [Batch(*parts) for parts in zip(images, labels, valid, keys, strict=True)]


@dataclass(frozen=True)
class Stream:
    """All that says what a rank reads; a worker takes its part of it."""

    index: Index
    order: Order
    rows_per_lane: int
    lanes: range  # of this rank
    start_step: int
    stop_step: int | None
    policies: tuple[Any, ...]
    image_size: int
    num_classes: int


def train_stream(
    config: DataConfig, index: Index, policies: Sequence[Any], image_size: int, num_classes: int, seed: int,
    ranks: Ranks, start_step: int,
) -> Stream:  # fmt: skip
    """The endless training stream of one rank, from `start_step` on.

    Raises:
        UserError: the number of ranks does not divide the lanes.
    """
    lanes = config.resolved_lanes
    if lanes % ranks.world_size:
        near = [n for n in range(1, lanes + 1) if lanes % n == 0]
        near.sort(key=lambda n: abs(n - ranks.world_size))
        raise UserError(
            f"data.lanes: {ranks.world_size} ranks do not divide {lanes} lanes (of global_batch_size"
            f" {config.global_batch_size}); the nearest numbers of ranks that do: {', '.join(map(str, near[:2]))}"
        )
    order = Order(index.counts, seed, lanes, config.shuffle_pool)
    mine = share(lanes, ranks.world_size, ranks.rank)
    rows = config.global_batch_size // lanes
    return Stream(index, order, rows, mine, start_step, None, tuple(policies), image_size, num_classes)


def evaluation_stream(
    config: DataConfig, index: Index, policies: Sequence[Any], image_size: int, num_classes: int, ranks: Ranks
) -> Stream:
    """Every sample once, on any number of ranks: all ranks yield equally many batches, padded with masked rows."""
    workers = max(config.workers, 1)
    lanes = ranks.world_size * workers
    order = Order(index.counts, 0, lanes, pool=64 * lanes, shuffle=False)
    rows = max(config.val_batch_size // lanes, 1)
    longest_lane = math.ceil(index.samples / lanes)
    steps = math.ceil(longest_lane / rows)
    mine = share(lanes, ranks.world_size, ranks.rank)
    return Stream(index, order, rows, mine, 0, steps, tuple(policies), image_size, num_classes)


class Reader(IterableDataset):
    """Reads, decodes and augments a worker's lanes; yields their part of each batch, or a UserError."""

    def __init__(self, stream: Stream):
        self.stream = stream

    def __iter__(self) -> Iterator[Batch | UserError]:
        worker = get_worker_info()
        part, parts = (worker.id, worker.num_workers) if worker else (0, 1)
        mine = self.stream.lanes
        lanes = [mine[i] for i in share(len(mine), parts, part)]
        # A worker's exception would reach the rank wrapped in tracebacks: the user's errors travel as values.
        try:
            yield from self._batches(lanes)
        except UserError as error:
            yield error

    def _batches(self, lanes: list[int]) -> Iterator[Batch]:
        stream, rows = self.stream, self.stream.rows_per_lane
        windows: dict[int, tuple[Window, list[dict | None]]] = {}
        records: dict[int, np.ndarray] = {}
        step = stream.start_step
        while stream.stop_step is None or step < stream.stop_step:
            count, size = len(lanes) * rows, stream.image_size
            images = torch.zeros(count, size, size, 3, dtype=torch.uint8)
            pixels = images.numpy()
            labels, valid = torch.zeros(count, dtype=torch.int64), torch.zeros(count, dtype=torch.bool)
            keys = [""] * count
            for row in range(count):
                lane = lanes[row // rows]
                place = stream.order.locate(lane, step * rows + row % rows)
                if place is None:
                    continue
                window, slot = place
                if lane not in windows or windows[lane][0] != window:
                    windows.pop(lane, None)
                    windows[lane] = window, self._read_window(window, records)
                sample = windows[lane][1][slot]
                assert sample is not None
                windows[lane][1][slot] = None  # each sample is used once: free its bytes
                pixels[row] = self._pixels(sample, window.epoch)
                labels[row], valid[row], keys[row] = sample["label"], True, sample["where"]
            yield Batch(images.permute(0, 3, 1, 2), labels, valid, keys)  # (B, 3, S, S) in channels-last memory
            step += 1

    def _read_window(self, window: Window, records: dict[int, np.ndarray]) -> list[dict | None]:
        """The window's samples in the order in which they are used."""
        line: list[dict] = []
        for piece in self.stream.order.pieces(window):
            line.extend(self._read_piece(piece, records))
        return [line[place] for place in self.stream.order.shuffled(window)]

    def _read_piece(self, piece: Piece, records: dict[int, np.ndarray]) -> Iterator[dict]:
        shard = self.stream.index.shards[piece.shard]
        if piece.shard not in records:
            if len(records) >= 64:
                records.pop(next(iter(records)))
            records[piece.shard] = load_records(shard)
        rows = records[piece.shard][piece.begin : piece.end]
        start = int(rows["offset"][0])
        data = read_range(shard.url, start, int(rows["offset"][-1]) + int(rows["nbytes"][-1]) - start)
        try:
            samples = list(parse_tar(data, shard.url))
        except Exception as error:
            raise self._mismatch(shard.url, start, str(error)) from None
        if len(samples) != len(rows):
            raise self._mismatch(shard.url, start, f"{len(samples)} samples, the index says {len(rows)}")
        for number, (sample, row) in enumerate(zip(samples, rows, strict=True)):
            where = f"{shard.url}: sample {sample['__key__']}"
            if sample_digest(sample) != int(row["digest"]):
                raise self._mismatch(
                    shard.url, int(row["offset"]), f"sample {sample['__key__']} is not the indexed one"
                )
            label = label_of(sample, where)
            if label >= self.stream.num_classes:
                raise UserError(
                    f"{where}: label {label} is out of range for model.num_classes={self.stream.num_classes}"
                )
            if label < 0:
                raise UserError(f"{where}: no label; expected a member cls with the class as a whole number")
            suffix = next(s for s in IMAGE_SUFFIXES if s in sample)
            # Augmentation is keyed by the sample's place in the data set, whatever the order that it comes in.
            yield {
                "image": sample[suffix],
                "label": label,
                "where": where,
                "id": (piece.shard, piece.begin + number),
            }

    def _mismatch(self, url: str, byte: int, found: str) -> UserError:
        return UserError(
            f"{url}: damaged at byte {byte}: {found}; run: python -m pipeline.shards verify {url}"
            f" (or, if the shard was changed on purpose, {INDEX_COMMAND} {url})"
        )

    def _pixels(self, sample: dict, epoch: int) -> np.ndarray:
        stream = self.stream
        image = decode(sample["image"], sample["where"])
        rng = np.random.Generator(
            np.random.Philox(np.random.SeedSequence([stream.order.seed, AUGMENT, epoch, *sample["id"]]))
        )
        for policy in stream.policies:
            image = policy(image, stream.image_size, rng)
        expected = (stream.image_size, stream.image_size, 3)
        if image.shape != expected:
            raise UserError(
                f"{sample['where']}: {image.shape} after the augmentation, expected {expected};"
                " add a policy that resizes (resize, inception_crop, center_crop)"
            )
        return image


class Loader:
    """Joins the workers' parts and brings them to the device. Iterate once for training, any times for evaluation."""

    def __init__(self, stream: Stream, workers: int, device: torch.device):
        self.device = device
        self.workers = min(workers, len(stream.lanes))
        self.loader = DataLoader(
            Reader(stream),
            batch_size=None,
            num_workers=self.workers,
            persistent_workers=self.workers > 0,
            prefetch_factor=4 if self.workers else None,
            pin_memory=device.type == "cuda",
            worker_init_fn=_start_worker,
        )

    def __iter__(self) -> Iterator[Batch]:
        parts: list[Batch] = []
        for part in self.loader:
            if isinstance(part, UserError):
                raise part
            parts.append(part)
            if len(parts) == max(self.workers, 1):
                yield self._join(parts).to(self.device)
                parts = []

    def _join(self, parts: list[Batch]) -> Batch:
        if len(parts) == 1:
            return parts[0]
        images, labels, valid = (torch.cat([getattr(p, name) for p in parts]) for name in ("images", "labels", "valid"))
        return Batch(images, labels, valid, [key for p in parts for key in p.keys])

    def close(self) -> None:
        """Ends the worker processes."""
        iterator = getattr(self.loader, "_iterator", None)
        if iterator is not None and self.workers:
            iterator._shutdown_workers()


def _start_worker(worker: int) -> None:
    ignore_signals()
    torch.set_num_threads(1)
