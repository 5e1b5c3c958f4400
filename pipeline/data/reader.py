"""From lanes to samples: what one worker reads, a window of samples at a time, ahead of what it decodes."""

from collections import OrderedDict
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from io import BufferedReader
from threading import Lock
from typing import Any

import numpy as np

from pipeline.data.archive import Archive
from pipeline.data.index import BLOCK, INDEX_COMMAND, Index, Shard, load_records
from pipeline.data.order import RESAMPLE, WINDOW, Order, Piece, Window, random_order
from pipeline.data.source import Data, Read, Source
from pipeline.data.tar import (
    IMAGE_SUFFIXES,
    MAX_SAMPLE_BYTES,
    NO_SAMPLES,
    UNLABELLED,
    StreamFile,
    grouped,
    label_of,
    leaves_folder,
    parse_tar,
    sample_digest,
)
from pipeline.errors import UserError, is_out_of_memory
from pipeline.text import printable, shown, shown_url

CACHED_BLOCKS = 256
MAX_GAP_BYTES = 64 << 20  # between a window's samples; where other members take more, each sample is read alone


@dataclass(slots=True)
class Sample:
    """An encoded image with its label; or why there is none."""

    where: str  # shard and key, for messages
    key: tuple[int, int]  # what its augmentation is drawn by, whatever the order that it comes in
    label: int = 0
    image: bytes | memoryview = b""  # a view keeps its window in memory
    bad: str | None = None


def to_sample(
    members: dict[str, Any], url: str, key: tuple[int, int], num_classes: int, indexed: int | None = None
) -> Sample:
    """Takes image and class from a sample's members; whatever is wrong with them makes it a bad sample.

    `indexed` is the label that the index has.
    """
    name = members["__key__"]
    sample = Sample(f"{shown_url(url)}: sample {printable(name)}", key)
    suffix = next((s for s in IMAGE_SUFFIXES if s in members), None)
    if leaves_folder(name):
        sample.bad = "its name leaves the shard's folder"
    elif suffix is None:
        found = ", ".join(sorted(k for k in members if not k.startswith("__")))
        sample.bad = f"no image among its members ({printable(found)}); expected one of {', '.join(IMAGE_SUFFIXES)}"
    else:
        try:
            sample.label = label_of(members, sample.where)
            sample.image = members[suffix]
            if indexed is not None and sample.label != indexed:
                sample.bad = differing_label(sample.label, indexed)
            elif sample.label >= num_classes:
                sample.bad = f"label {sample.label} is out of range for model.num_classes={num_classes}"
        except UserError as error:
            sample.bad = str(error).removeprefix(f"{sample.where}: ")
    return sample


def differing_label(found: int, indexed: int) -> str:
    return (
        f"label {found}, the index says {'none' if indexed == UNLABELLED else indexed}; restore the shard, or if it was"
        f" changed on purpose, run: {INDEX_COMMAND}"
    )


Fetched = tuple[Piece, Shard, np.ndarray, Data | UserError]  # a part of a window: its records, and its bytes


class OrderedSamples:
    """Samples by lane and position, as the order has them. Each lane's next window is read ahead.

    What lies in the system's memory is read at once: handing it to a thread, and waiting for the interpreter until it
    comes back, takes longer than the copy. For all else there are threads.
    """

    def __init__(self, index: Index, order: Order, source: Source, num_classes: int):
        self.index, self.order, self.source, self.num_classes = index, order, source, num_classes
        self.threads = ThreadPoolExecutor(source.limits.threads, thread_name_prefix="read")
        # By lane: the window's first position, its samples in the order in which they are used, its epoch.
        self.windows: dict[int, tuple[int, list[Sample | None], int]] = {}
        self.ahead: dict[int, tuple[int, Callable[[], list[Fetched]]]] = {}
        self.blocks: OrderedDict[tuple[int, int], np.ndarray] = OrderedDict()
        self.lock = Lock()

    def expect(self, lane: int, position: int) -> None:
        """Starts to read the window of a lane's position."""
        place = self.order.locate(lane, position)
        if place is not None:
            window, slot = place
            self.ahead[lane] = position - slot, self._begin(window)

    def get(self, lane: int, position: int, last: bool = True) -> tuple[Sample, int] | None:
        """The sample and its epoch, or None where the lane has ended. With `last` its bytes are not kept."""
        first, samples, epoch = self.windows.get(lane, (0, [], 0))
        if not first <= position < first + len(samples):
            place = self.order.locate(lane, position)
            if place is None:
                return None
            window, slot = place
            first, epoch = position - slot, window.epoch
            self.windows.pop(lane, None)
            if lane not in self.ahead or self.ahead[lane][0] != first:
                self.expect(lane, position)
            samples = self._parse_window(window, self.ahead.pop(lane)[1]())
            self.windows[lane] = first, samples, epoch
        slot = position - first
        if 2 * slot >= len(samples) and lane not in self.ahead:
            self.expect(lane, first + len(samples))
        sample = samples[slot]
        assert sample is not None
        if last:
            samples[slot] = None
        return sample, epoch

    def close(self) -> None:
        self.threads.shutdown(wait=False, cancel_futures=True)  # a source may hang
        self.source.close()

    def _begin(self, window: Window) -> Callable[[], list[Fetched]]:
        try:
            fetched = self._fetch(window, self.source.read_cached)
        except BlockingIOError:
            return self.threads.submit(self._fetch, window, self.source.read).result
        return lambda: fetched

    def _fetch(self, window: Window, read: Read) -> list[Fetched]:
        """A thread's part of the work: only what waits. Python beside the decoding would wait for the interpreter."""
        return [self._fetch_piece(piece, read) for piece in self.order.pieces(window)]

    def _fetch_piece(self, piece: Piece, read: Read) -> Fetched:
        shard = self.index.shard(piece.shard)
        rows = self._records(piece.shard, shard, piece.begin, piece.end, read)
        start = int(rows["offset"][0])
        nbytes = int(rows["offset"][-1]) + int(rows["nbytes"][-1]) - start
        together = int(rows["nbytes"].sum(dtype=np.int64))
        if not rows["nbytes"].all() or not together <= nbytes <= together + MAX_GAP_BYTES:
            return piece, shard, rows, b""  # each on its own
        try:
            return piece, shard, rows, read(shard.url, start, nbytes)
        except UserError as error:
            return piece, shard, rows, error
        except MemoryError:
            raise MemoryError(
                f"{shown_url(shard.url)}, samples {piece.begin} to {piece.end - 1} ({nbytes} bytes)"
            ) from None

    def _parse_window(self, window: Window, fetched: list[Fetched]) -> list[Sample | None]:
        """The window's samples in the order in which they are used."""
        line: list[Sample] = []
        for piece, shard, rows, data in fetched:
            try:
                line += self._parse_piece(piece, shard, rows, data)
            except MemoryError:
                raise MemoryError(f"{shown_url(shard.url)}, samples {piece.begin} to {piece.end - 1}") from None
        return [line[place] for place in self.order.shuffled(window)]

    def _parse_piece(self, piece: Piece, shard: Shard, rows: np.ndarray, data: Data | UserError) -> list[Sample]:
        keys = [(piece.shard, number) for number in range(piece.begin, piece.end)]
        if isinstance(data, UserError):
            return [self._bad(shard, row, key, str(data)) for row, key in zip(rows, keys, strict=True)]
        found = self._parse(data, shard.url)
        if [sample_digest(members) for members in found] == rows["digest"].tolist():
            labels = rows["label"].tolist()
            return [
                to_sample(members, shard.url, key, self.num_classes, label)
                for members, key, label in zip(found, keys, labels, strict=True)
            ]
        # Something in it differs from the index: look at each sample on its own, so that none is lost beside it.
        return [self._read_one(shard, row, key) for row, key in zip(rows, keys, strict=True)]

    def _read_one(self, shard: Shard, row: np.ndarray, key: tuple[int, int]) -> Sample:
        if not row["nbytes"]:
            return self._bad(shard, row, key, f"larger than {MAX_SAMPLE_BYTES} bytes")
        try:
            found = self._parse(self.source.read(shard.url, int(row["offset"]), int(row["nbytes"])), shard.url)
        except UserError as error:
            return self._bad(shard, row, key, str(error))
        if len(found) == 1 and sample_digest(found[0]) == row["digest"]:
            return to_sample(found[0], shard.url, key, self.num_classes, int(row["label"]))
        message = f"damaged at byte {row['offset']}: not the indexed sample; run: python -m pipeline.shards verify"
        return self._bad(shard, row, key, f"{message} {shard.url} (or, if it was changed on purpose, {INDEX_COMMAND})")

    def _parse(self, data: Data, url: str) -> list[dict[str, Any]]:
        try:
            return parse_tar(data, url)
        except UserError:  # damaged
            return []

    def _bad(self, shard: Shard, row: np.ndarray, key: tuple[int, int], reason: str) -> Sample:
        url = shown_url(shard.url)
        return Sample(f"{url}: sample {key[1]} of {shard.samples}", key, bad=shown(reason).removeprefix(f"{url}: "))

    def _records(self, number: int, shard: Shard, begin: int, end: int, read: Read) -> np.ndarray:
        """Records `begin` to `end`, by way of a small cache of blocks: a shard may have millions."""
        parts = []
        for block in range(begin // BLOCK, (end - 1) // BLOCK + 1):
            with self.lock:
                found = self.blocks.get((number, block))
            if found is None:
                found = load_records(shard, read, block)
                with self.lock:
                    self.blocks[number, block] = found
                    if len(self.blocks) > CACHED_BLOCKS:
                        self.blocks.popitem(last=False)
            parts.append(found[max(begin - block * BLOCK, 0) : end - block * BLOCK])
        return np.concatenate(parts)


class ResampledSamples:
    """Samples of shards that are drawn with replacement, without an index: one endless stream for each worker.

    What comes depends on the seed, the number of ranks and workers and the step of the start; nothing is promised
    of a resume but other draws than before.
    """

    def __init__(self, urls: list[str], source: Source, num_classes: int, pool: int, key: tuple[int, ...]):
        self.urls, self.source, self.num_classes = urls, source, num_classes
        self.pool, self.key = max(pool, 1), key
        # Streams have numbers far apart, so that no two draws of a shard are augmented alike.
        self.first = int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0]) >> 1
        self.samples = self._shuffled()
        self.copied: Sample | None = None  # of which more copies are to come

    def expect(self, lane: int, position: int) -> None:
        """Nothing can be said in advance."""

    def get(self, lane: int, position: int, last: bool = True) -> tuple[Sample, int]:
        sample = self.copied or next(self.samples)
        self.copied = None if last else sample
        return sample, 0

    def close(self) -> None:
        self.samples.close()
        self.source.close()

    def _shuffled(self) -> Generator[Sample, None, None]:
        stream, number = self._drawn(), 0
        while True:
            pool = [next(stream) for _ in range(self.pool)]
            for place in random_order(self.pool, *self.key, WINDOW, number):
                yield pool[place]
            number += 1

    def _drawn(self) -> Iterator[Sample]:
        draw = failures = 0
        while True:
            rng = np.random.Philox(np.random.SeedSequence([*self.key, RESAMPLE, draw]))
            url = self.urls[int(rng.random_raw() % len(self.urls))]
            number = 0
            try:
                file = BufferedReader(StreamFile(self.source.stream(url)), 1 << 16)
                archive = Archive(file, url, self.source.limits.allow_missing_end)
                for found in grouped(archive, lambda suffix, nbytes: nbytes <= MAX_SAMPLE_BYTES):
                    members = {"__key__": found.key, **found.contents}
                    sample = to_sample(members, url, (self.first + draw, number), self.num_classes)
                    if len(found.contents) < len(found.sizes):
                        sample.bad = f"larger than {MAX_SAMPLE_BYTES} bytes"
                    yield sample
                    number, failures = number + 1, 0
                if number == 0:
                    raise UserError(f"{url}: {NO_SAMPLES}")
            except (UserError, OSError) as error:  # the rest of this shard is lost: said once, as one bad sample
                if is_out_of_memory(error):
                    raise
                reason = shown(str(error)).removeprefix(f"{shown_url(url)}: ")
                failures += 1
                if failures > 100:
                    raise UserError(
                        f"{url}: the last 100 shards that were drawn failed; the last one by: {reason}"
                    ) from None
                yield Sample(f"{shown_url(url)}: from sample {number} on", (self.first + draw, number), bad=reason)
            draw += 1
