"""Order -> worker processes -> uint8 batches on the device.

The lanes of a rank are dealt to its workers; each worker yields its lanes' part of every batch, in turn, and the
rank joins the parts. So a batch is the same for any number of workers.
"""

import contextlib
import ctypes
import math
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from pipeline.data.decode import decode
from pipeline.data.index import Index, expand_urls
from pipeline.data.order import AUGMENT, KeyedGenerator, Order, Plan, auto_lanes
from pipeline.data.reader import OrderedSamples, ResampledSamples, Sample
from pipeline.data.source import ReadConfig, Source, is_reference, read_board
from pipeline.data.workers import Workers
from pipeline.errors import Interrupted, UserError, is_out_of_memory
from pipeline.options import option
from pipeline.runtime import Ranks, settle_signals

BOARD_BYTES = 512
PREFETCH = 4  # batches that the workers have under way
HELD = 2  # batches whose images the rank may hold: the one it computes with, and the next
SLOTS = PREFETCH + HELD  # batches for which there is shared memory


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    train: tuple[str, ...] = option((), "training shards: URLs or brace patterns", may_change=True)
    val: tuple[str, ...] = option((), "validation shards; none: no evaluation", may_change=True)
    index: str | None = option(None, "folder of the shards' index; null: beside the shards", may_change=True)
    prepare: str | None = option(None, "embedded data set to write where the shards are missing: digits")
    resampled: bool = option(False, "draw shards with replacement, without an index and without exact resume")
    global_batch_size: int = option(64, "images of one optimizer step, over all ranks")
    val_batch_size: int = option(256, "images of one evaluation batch, over all ranks", may_change=True)
    repeats: int = option(1, "rows that each sample gives in a row, differently augmented; an epoch has as many more")
    workers: int = option(2, "worker processes of each rank that read and decode; 0 reads in the rank", may_change=True)
    lanes: int | None = option(None, "independent streams of samples; null: the batch's largest divisor up to 1024")
    shuffle_pool: int = option(16384, "compressed samples in memory, over all ranks, among which is shuffled")
    max_bad_fraction: float = option(
        0.0, "share of distinct samples that may be bad (masked, and listed in quarantine.jsonl)", may_change=True
    )
    log_samples: bool = option(
        False, "write the samples of each step to samples-rank<N>.jsonl in the run directory", may_change=True
    )
    read: ReadConfig = option(ReadConfig(), "how sources are read", may_change=True)

    def __post_init__(self) -> None:
        for name, least in (
            ("global_batch_size", 1), ("val_batch_size", 1), ("workers", 0), ("shuffle_pool", 1), ("repeats", 1)
        ):  # fmt: skip
            if getattr(self, name) < least:
                raise ValueError(f"{name}: must be at least {least}, found {getattr(self, name)}")
        for name, urls in (("train", self.train), ("val", self.val), ("index", (self.index or "",))):
            for url in urls:
                if is_reference(url):
                    raise ValueError(f"{name}: {url}: reference file systems are not read; name the shards themselves")
        if self.prepare not in (None, "digits"):
            raise ValueError(f"prepare: unknown data set {self.prepare!r}; known is digits")
        if self.lanes is not None and (self.lanes < 1 or self.global_batch_size % self.lanes):
            raise ValueError(f"lanes: {self.lanes} does not divide global_batch_size {self.global_batch_size}")
        if not 0.0 <= self.max_bad_fraction < 1.0:
            raise ValueError(f"max_bad_fraction: must lie in [0, 1), found {self.max_bad_fraction}")

    @property
    def plan(self) -> Plan:
        """The rows of every global batch; nothing in it depends on the number of ranks."""
        size = self.global_batch_size
        whole = size // self.repeats if size % self.repeats == 0 else size  # a sample's copies in one batch, if it goes
        lanes = self.lanes or auto_lanes(whole)
        return Plan(lanes, size // lanes, self.repeats)


class Bad(NamedTuple):
    """A row without an image."""

    where: str  # shard and key of the sample
    reason: str
    place: tuple[int, int]  # the shard's number in the data set, and the sample's in it


@dataclass
class Batch:
    """A rank's rows of one global batch. On a CPU the images are the workers' memory: see `Loader`."""

    images: Tensor  # (B, 3, S, S), uint8
    labels: Tensor  # (B,), int64
    valid: Tensor  # (B,), bool: False for rows that only pad, or stand for a bad sample
    keys: list[str]
    valid_rows: int  # known on the host, without asking the device
    bad: list[Bad] = field(default_factory=list)
    targets: Tensor | None = None  # (B, classes), float32: set on the device where images are mixed

    def __len__(self) -> int:
        return len(self.labels)

    def to(self, device: torch.device) -> "Batch":
        images, labels, valid = (t.to(device, non_blocking=True) for t in (self.images, self.labels, self.valid))
        return Batch(images, labels, valid, self.keys, self.valid_rows, self.bad)

    def split(self, rows: int) -> list["Batch"]:
        """Micro batches of `rows` rows each."""
        images, labels, valid = self.images.split(rows), self.labels.split(rows), self.valid.split(rows)
        keys = [self.keys[begin : begin + rows] for begin in range(0, len(self), rows)]
        # Of the micro batches nobody asks which rows are bad.
        return [Batch(*parts, valid_rows=rows) for parts in zip(images, labels, valid, keys, strict=True)]


@dataclass
class Part:
    """A worker's rows of a batch. Their pixels lie in shared memory."""

    slot: int
    labels: np.ndarray  # (rows,), int64
    valid: np.ndarray  # (rows,), bool
    keys: list[str]
    bad: list[Bad]


@dataclass(frozen=True)
class Stream:
    """All that says what a rank reads; a worker takes its part of it."""

    index: Index | None  # None: shards are drawn with replacement
    urls: list[str]
    order: Order
    plan: Plan
    ranks: Ranks
    start_step: int
    stop_step: int | None
    policies: tuple[Any, ...]
    image_size: int
    num_classes: int
    limits: ReadConfig


def train_stream(
    config: DataConfig, index: Index | None, policies: Sequence[Any], image_size: int, num_classes: int, seed: int,
    ranks: Ranks, start_step: int,
) -> Stream:  # fmt: skip
    """The endless training stream of one rank, from `start_step` on.

    Raises:
        UserError: the number of ranks does not divide the lanes, or the seed is negative.
    """
    plan = config.plan
    if seed < 0:
        raise UserError(f"run.seed: must not be negative, found {seed}")
    if plan.lanes % ranks.world_size:
        near = [n for n in range(1, plan.lanes + 1) if plan.lanes % n == 0]
        near.sort(key=lambda n: abs(n - ranks.world_size))
        raise UserError(
            f"data.lanes: {ranks.world_size} ranks do not divide {plan.lanes} lanes (of global_batch_size"
            f" {config.global_batch_size}); the nearest numbers of ranks that do: {', '.join(map(str, near[:2]))}"
        )
    urls = index.urls if index else expand_urls(config.train)
    order = Order(index.counts if index else np.ones(1), seed, plan.lanes, config.shuffle_pool)
    return Stream(
        index, urls, order, plan, ranks, start_step, None, tuple(policies), image_size, num_classes, config.read
    )


def evaluation_stream(
    config: DataConfig, index: Index, policies: Sequence[Any], image_size: int, num_classes: int, ranks: Ranks
) -> Stream:
    """Every sample once, on any number of ranks: all ranks yield equally many batches, padded with masked rows."""
    lanes = ranks.world_size * max(config.workers, 1)
    rows = max(config.val_batch_size // lanes, 1)
    order = Order(index.counts, 0, lanes, pool=64 * lanes, shuffle=False)
    longest_lane = math.ceil(index.samples / lanes)
    steps = math.ceil(longest_lane / rows)
    return Stream(
        index, index.urls, order, Plan(lanes, rows), ranks, 0, steps, tuple(policies), image_size, num_classes,
        config.read,
    )  # fmt: skip


class Reader:
    """Reads, decodes and augments a worker's lanes; yields their part of each batch, or a UserError.

    `ring` is shared memory for some batches of the rank, (SLOTS, B, S, S, 3), in which each worker writes its rows;
    `boards` has one of bytes for each worker, where it says what it is reading. `stop` is asked while a read waits.
    """

    def __init__(self, stream: Stream, ring: Tensor, boards: list[Tensor], stop: Callable[[], bool] | None = None):
        self.stream, self.ring, self.boards, self.stop = stream, ring, boards, stop

    def parts(self, part: int) -> Iterator[Part | UserError]:
        """The parts of worker `part`, from the beginning."""
        self.random = KeyedGenerator(self.stream.order.seed, AUGMENT)
        parts = len(self.boards)
        samples = self._samples(part, parts)
        # A worker's exception would reach the rank wrapped in tracebacks: the user's errors travel as values.
        try:
            yield from self._parts(samples, self._lanes(part, parts))
        except UserError as error:
            yield error
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            yield UserError(
                f"rank {self.stream.ranks.rank}, data worker {part} of {parts}: out of host memory at"
                f" {str(error) or 'reading'}; set data.workers (now {parts} of each rank) or data.shuffle_pool lower,"
                " or give the job more memory"
            )
        finally:
            samples.close()

    def _lanes(self, worker: int, workers: int) -> range:
        ranks = self.stream.ranks
        return self.stream.plan.lanes_of(ranks.rank, ranks.world_size, worker, workers)

    def _samples(self, worker: int, workers: int) -> OrderedSamples | ResampledSamples:
        stream, source = self.stream, Source(self.stream.limits, self.boards[worker].numpy(), self.stop)
        if stream.index is not None:
            return OrderedSamples(stream.index, stream.order, source, stream.num_classes)
        pool = stream.order.window * len(self._lanes(worker, workers))
        key = (stream.order.seed, stream.start_step, stream.ranks.rank, worker)
        return ResampledSamples(stream.urls, source, stream.num_classes, pool, key)

    def _parts(self, samples: OrderedSamples | ResampledSamples, lanes: range) -> Iterator[Part]:
        stream, plan = self.stream, self.stream.plan
        first = (lanes.start - self._lanes(0, 1).start) * plan.rows_per_lane
        for row in plan.rows(lanes, stream.start_step):
            samples.expect(row.lane, row.position)
        decoded: tuple[Any, np.ndarray | None] = None, None  # the copies of a sample follow each other
        count, step, ring = len(lanes) * plan.rows_per_lane, stream.start_step, self.ring.numpy()
        while stream.stop_step is None or step < stream.stop_step:
            slot = (step - stream.start_step) % SLOTS
            pixels = ring[slot, first : first + count]  # (rows, S, S, 3)
            labels, valid = np.zeros(count, np.int64), np.zeros(count, np.bool_)
            keys: list[str] = [""] * count
            bad: list[Bad] = []
            rows = list(plan.rows(lanes, step))
            # All are taken before the first is decoded: reading and parsing in a row have the processor's caches.
            taken = [samples.get(row.lane, row.position, last=row.copy == plan.repeats - 1) for row in rows]
            for number, (row, found) in enumerate(zip(rows, taken, strict=True)):
                if found is not None:
                    sample, epoch = found
                    keys[number] = sample.where
                    try:
                        if decoded[0] != (row.lane, row.position):
                            decoded = None, None  # its memory is used again at once
                            decoded = (row.lane, row.position), self._decoded(sample)
                        if decoded[1] is not None:
                            pixels[number] = self._augmented(decoded[1], sample, epoch, row.copy)
                            labels[number], valid[number] = sample.label, True
                            continue
                    except Exception as error:
                        if is_out_of_memory(error) and not isinstance(error, UserError):
                            raise MemoryError(sample.where) from error  # no fault of the sample's
                        raise
                    bad.append(Bad(sample.where, sample.bad or "", sample.key))
                pixels[number] = 0
            yield Part(slot, labels, valid, keys, bad)
            step += 1

    def _decoded(self, sample: Sample) -> np.ndarray | None:
        """Pixels (H, W, 3), or None for a bad sample, which then says why."""
        if sample.bad is None:
            try:
                return decode(sample.image, sample.where, self.stream.limits.max_image_pixels)
            except UserError as error:
                sample.bad = str(error).removeprefix(f"{sample.where}: ")
        return None

    def _augmented(self, image: np.ndarray, sample: Sample, epoch: int, copy: int) -> np.ndarray:
        stream = self.stream
        rng = self.random.at(epoch, sample.key, copy)
        for policy in stream.policies:
            image = policy(image, stream.image_size, rng)
        expected = (stream.image_size, stream.image_size, 3)
        if image.shape != expected:
            raise UserError(
                f"{sample.where}: {image.shape} after the augmentation, expected {expected};"
                " add a policy that resizes (resize, inception_crop, center_crop)"
            )
        return image


class Loader:
    """Joins the workers' parts on the device. Iterate once for training, any times for evaluation.

    On a CPU nothing is copied: the images of a batch stay as they are until the next but one is asked for. While a
    batch does not come, `stop` is asked: once it says True, the iteration ends with Interrupted.
    """

    def __init__(self, stream: Stream, workers: int, device: torch.device, stop: Callable[[], bool] = lambda: False):
        self.device, self.stop = device, stop
        self.ranks, plan, size = stream.ranks, stream.plan, stream.image_size
        lanes = len(plan.lanes_of(self.ranks.rank, self.ranks.world_size))
        count = min(workers, lanes)
        self.parts = max(count, 1)
        # No slot is written before its time: a worker is asked for a part when it has given the one PREFETCH before.
        # The pages are used again and again: new ones for each batch would cost more than the decoding of a few images.
        shape = (SLOTS, lanes * plan.rows_per_lane, size, size, 3)
        self.ring = torch.empty(shape, dtype=torch.uint8).share_memory_()
        self.boards = [torch.zeros(BOARD_BYTES, dtype=torch.uint8).share_memory_() for _ in range(self.parts)]
        self.reader = Reader(stream, self.ring, self.boards, None if count else stop)
        self.split = "training" if stream.stop_step is None else "validation"
        self.workers = Workers(self.reader.parts, count, PREFETCH, _prepare_worker, self._describe) if count else None
        self.started = False

    def start(self) -> None:
        """Starts the workers, which read the first batches ahead; the first iteration would do it otherwise.

        To be called while no other thread is at work: a forked process has the locks that they hold, for ever.
        """
        if self.workers is not None:
            self.workers.begin_pass()
            self.started = True

    def __iter__(self) -> Iterator[Batch]:
        given: list[weakref.ref] = []  # the images of the last HELD batches
        read = self._from_rank() if self.workers is None else self._from_workers(self.workers)
        for parts in read:
            images = self.ring[parts[0].slot].numpy()
            given = [*given[1 - HELD :], weakref.ref(images)]
            batch = self._join(parts, torch.from_numpy(images))
            del images
            yield batch
            del batch
            assert len(given) < HELD or given[0]() is None, "a batch was held too long: copy its images"

    def _from_rank(self) -> Iterator[list[Part]]:
        for part in self.reader.parts(0):
            if isinstance(part, UserError):
                raise part
            yield [part]

    def _from_workers(self, workers: Workers) -> Iterator[list[Part]]:
        if not self.started:
            workers.begin_pass()
        self.started = False
        while True:
            parts = []
            for number in range(self.parts):
                part = workers.take(number, self._give_up)
                if isinstance(part, UserError):
                    raise part
                parts.append(part)
            if None in parts:  # all have equally many
                return
            yield parts

    def _give_up(self) -> None:
        if self.stop():
            raise Interrupted

    def _join(self, parts: list[Part], images: Tensor) -> Batch:
        if self.device.type == "cuda":
            images = torch.empty(images.shape, dtype=torch.uint8, pin_memory=True).copy_(images)  # (B, S, S, 3)
        labels, valid = (
            torch.from_numpy(np.concatenate([getattr(part, name) for part in parts])) for name in ("labels", "valid")
        )
        keys, bad = [key for part in parts for key in part.keys], [entry for part in parts for entry in part.bad]
        chunk = images.permute(0, 3, 1, 2)  # (B, 3, S, S) in channels-last memory
        return Batch(chunk, labels, valid, keys, int(valid.sum()), bad).to(self.device)

    def reading(self) -> list[str]:
        """What the workers are reading at this moment, those that are."""
        return [text for board in self.boards if (text := read_board(board.numpy()))]

    def check(self) -> None:
        """Raises WorkerDied where a worker has ended, whether or not something is read."""
        if self.workers is not None:
            self.workers.check()

    def close(self) -> None:
        """Ends the worker processes."""
        if self.workers is not None:
            self.workers.close()

    def _describe(self, number: int) -> str:
        rank = f" of rank {self.ranks.rank}" if self.ranks.world_size > 1 else ""
        reading = read_board(self.boards[number].numpy())
        return f"{self.split} data worker {number}{rank}, {f'reading {reading}' if reading else 'idle'},"


def _prepare_worker() -> None:
    settle_signals()
    torch.set_num_threads(1)
    keep_freed_memory()


def keep_freed_memory() -> None:
    """Has glibc reuse the megabytes of each window: new pages from the system for each cost a tenth of the decoding."""
    mmap_threshold, trim_threshold = -3, -1  # numbers of malloc.h
    with contextlib.suppress(OSError, AttributeError):  # another C library
        libc = ctypes.CDLL(None)
        libc.mallopt(mmap_threshold, 1 << 30)
        libc.mallopt(trim_threshold, (1 << 31) - 1)
