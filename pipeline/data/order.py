"""Which sample comes when: a pure function of (seed, step).

For each epoch the shards are permuted; their samples, laid end to end, make one line, which is cut into `lanes`.
Global batch t takes the next `global_batch_size / lanes` samples of every lane. Inside a lane, samples are shuffled
within windows that are contiguous on the line, so a window is read as a few byte ranges. Lanes run on from epoch to
epoch: every sample comes exactly once an epoch, no tail is dropped, and ranks and workers only divide the lanes.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np

# One number for each use of the seed, so that no two of them share their random numbers.
SHARDS, WINDOW, AUGMENT, DROPOUT, MIX, RESAMPLE = range(6)

WORD = (1 << 64) - 1


def random_order(n: int, *key: int) -> np.ndarray:
    """A permutation of 0..n-1 drawn from a key alone.

    Sorting raw 64-bit draws keeps the result the same in all NumPy releases: their raw streams are fixed, the methods
    of Generator are not.
    """
    raw = np.random.Philox(np.random.SeedSequence(key)).random_raw(n)
    return np.argsort(raw, kind="stable")


class KeyedGenerator:
    """Random numbers for one copy of one sample in one epoch, from a counter-based generator: nothing is carried."""

    def __init__(self, seed: int, use: int):
        self.bits = np.random.Philox(key=np.array([seed & WORD, use], np.uint64))
        self.generator = np.random.Generator(self.bits)
        self.state = self.bits.state

    def at(self, epoch: int, sample: tuple[int, int], copy: int) -> np.random.Generator:
        """That of Philox(key=(seed, use), counter=(0, epoch << 32 | copy, *sample)), until the next call.

        One generator is set anew for each sample: making one asks the system for entropy that nobody uses, and takes
        a twentieth of a small image's time.
        """
        # The lowest word counts the numbers that are drawn.
        self.state["state"]["counter"][:] = 0, epoch << 32 | copy, *sample
        self.bits.state = self.state
        return self.generator


@dataclass(frozen=True)
class Window:
    """A run of samples on an epoch's line that one lane shuffles and reads together."""

    lane: int
    epoch: int
    number: int
    begin: int  # on the epoch's line
    samples: int


@dataclass(frozen=True)
class Piece:
    """A window's part in one shard: samples `begin` to `end` of it."""

    shard: int
    begin: int
    end: int


class Order:
    """The plan of a stream over shards with `counts` samples each.

    With `shuffle` the stream is endless. Without it, it is one epoch in the order of the shards, as evaluation wants
    it, and lanes end.
    """

    def __init__(self, counts: np.ndarray, seed: int, lanes: int, pool: int, shuffle: bool = True):
        self.counts = np.asarray(counts, dtype=np.int64)
        self.total = int(self.counts.sum())
        assert self.total > 0
        self.seed, self.lanes, self.shuffle = seed, lanes, shuffle
        self.window = max(pool // lanes, 1)
        self._line = lru_cache(maxsize=2)(self._make_line)

    def locate(self, lane: int, position: int) -> tuple[Window, int] | None:
        """The window, and the place in it as it is laid on the line, of a lane's sample number `position`."""
        # Epochs 0..e-1 give lane l floor((e N + l) / L) samples; the epoch of a position is the last that starts
        # at or before it.
        epoch = -(-((position + 1) * self.lanes - lane) // self.total) - 1
        if not self.shuffle and epoch > 0:
            return None
        place = position - (epoch * self.total + lane) // self.lanes
        begin, end = self._before(epoch, lane), self._before(epoch, lane + 1)
        # The first window is shortened by another amount in each lane, or all lanes would read at the same step.
        stagger = lane * self.window // self.lanes if self.shuffle else 0
        number, slot = divmod(place + stagger, self.window)
        window_begin = max(begin, begin + number * self.window - stagger)
        window_end = min(end, begin + (number + 1) * self.window - stagger)
        slot -= stagger if number == 0 else 0
        window = Window(lane, epoch, number, window_begin, window_end - window_begin)
        return window, slot

    def shuffled(self, window: Window) -> np.ndarray:
        """For each slot of the window, which of its samples (in the order of the line) comes there."""
        if not self.shuffle:
            return np.arange(window.samples)
        return random_order(window.samples, self.seed, WINDOW, window.epoch, window.lane, window.number)

    def pieces(self, window: Window) -> Iterator[Piece]:
        """Where the window's samples lie, in the order of the line."""
        permutation, ends = self._line(window.epoch)
        begin, end = window.begin, window.begin + window.samples
        index = int(np.searchsorted(ends, begin, side="right"))
        while begin < end:
            shard = int(permutation[index])
            shard_begin = int(ends[index] - self.counts[shard])
            stop = min(end, int(ends[index]))
            if stop > begin:
                yield Piece(shard, begin - shard_begin, stop - shard_begin)
            begin, index = stop, index + 1

    def _make_line(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        shards = len(self.counts)
        permutation = random_order(shards, self.seed, SHARDS, epoch) if self.shuffle else np.arange(shards)
        return permutation, np.cumsum(self.counts[permutation])

    def _before(self, epoch: int, lane: int) -> int:
        """How many samples of the epoch's line belong to the lanes below `lane`."""

        def up_to(samples: int) -> int:  # sum over l < lane of floor((samples + l) / lanes)
            return lane * (samples // self.lanes) + max(0, lane - self.lanes + samples % self.lanes)

        return up_to((epoch + 1) * self.total) - up_to(epoch * self.total)


class Row(NamedTuple):
    """One row of a global batch: a lane's next sample (or its next copy)."""

    lane: int
    position: int  # of the sample in its lane
    copy: int  # 0 to repeats - 1


@dataclass(frozen=True)
class Plan:
    """Which rows make a global batch, and which rank and worker reads them.

    Row r of global batch t belongs to lane r // rows_per_lane. A rank has contiguous lanes, and deals them to its
    workers; so a global batch is the same for any number of either.
    """

    lanes: int
    rows_per_lane: int
    repeats: int = 1  # how often a sample comes in a row (repeated augmentation, arXiv 1901.09335)

    def rows(self, lanes: range, step: int) -> Iterator[Row]:
        """The rows of some lanes in global batch `step`."""
        for lane in lanes:
            for number in range(step * self.rows_per_lane, (step + 1) * self.rows_per_lane):
                yield Row(lane, *divmod(number, self.repeats))

    def lanes_of(self, rank: int, world_size: int, worker: int = 0, workers: int = 1) -> range:
        """The lanes that a worker of a rank reads."""
        mine = share(self.lanes, world_size, rank)
        part = share(len(mine), workers, worker)
        return mine[part.start : part.stop]


def auto_lanes(global_batch_size: int) -> int:
    """The largest divisor of the global batch up to 1,024: it must not depend on the number of ranks."""
    return max(n for n in range(1, min(global_batch_size, 1024) + 1) if global_batch_size % n == 0)


def share(items: int, parts: int, part: int) -> range:
    """The `part`-th of `parts` contiguous shares of range(items), as even as they go."""
    return range(items * part // parts, items * (part + 1) // parts)
