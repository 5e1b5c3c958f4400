"""Plays the plan of all ranks and workers without reading an image, and checks what the stream promises."""

import glob
import io
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from pipeline.config import RunConfig
from pipeline.data.archive import Archive
from pipeline.data.index import Index, load_index, load_records
from pipeline.data.order import Order, Plan, Row, random_order
from pipeline.data.source import Source
from pipeline.data.tar import grouped
from pipeline.errors import UserError, shorten
from pipeline.monitor.jsonl import read_lines
from pipeline.text import printable, shown_url

SIMULATIONS = 200
MOST_STEPS = 10_000_000  # of a log: each that is missing is counted


class Resolver:
    """Which sample a row is: (epoch, shard, number in it, copy); and what had to be fetched for it."""

    def __init__(self, index: Index, config: RunConfig):
        self.index = index
        data = config.data
        self.order = Order(index.counts, config.run.seed, data.plan.lanes, data.shuffle_pool)
        self.windows: dict[int, tuple] = {}
        self.fetched: list[tuple[int, int, int]] = []  # runs of samples: shard, begin, end

    def __call__(self, row: Row) -> tuple[int, int, int, int]:
        place = self.order.locate(row.lane, row.position)
        assert place is not None
        window, slot = place
        if row.lane not in self.windows or self.windows[row.lane][0] != window:
            pieces = list(self.order.pieces(window))
            self.fetched += [(p.shard, p.begin, p.end) for p in pieces]
            line = [(p.shard, number) for p in pieces for number in range(p.begin, p.end)]
            self.windows[row.lane] = window, line, self.order.shuffled(window)
        _, line, order = self.windows[row.lane]
        return window.epoch, *line[order[slot]], row.copy


def played(plan: Plan, resolver: Resolver, lanes: list[range], start: int, stop: int) -> Iterator[np.ndarray]:
    """Each step's rows (rows, 4), joined over the parts in their order."""
    for step in range(start, stop):
        yield np.array([resolver(row) for part in lanes for row in plan.rows(part, step)], dtype=np.int64)


@dataclass
class Finding:
    name: str
    fine: bool
    text: str
    note: bool = False  # to be read, but neither a check that was passed nor one that failed

    @property
    def word(self) -> str:
        return "note" if self.note and self.fine else "ok" if self.fine else "FAIL"


def audit(
    config: RunConfig, world_sizes: list[int], workers: list[int], start: int, steps: int | None, run: str | None
) -> list[Finding]:
    """Checks the stream for each number of ranks and of workers of a rank, over `steps` steps from `start`.

    Without `steps`: up to the end of the second epoch after `start`.

    Raises:
        UserError: the ranks don't divide the lanes, or the shards and their index don't fit.
    """
    if config.data.resampled:
        raise UserError("data.resampled: shards that are drawn with replacement have no plan to audit")
    plan, source = config.data.plan, Source(config.data.read)
    for world_size in world_sizes:
        if plan.lanes % world_size:
            raise UserError(f"--world-size: {world_size} ranks do not divide the {plan.lanes} lanes")
    index = load_index(config.data.train, folder=config.data.index, source=source)
    rows_of_epoch, batch = index.samples * plan.repeats, config.data.global_batch_size
    stop = start + steps if steps is not None else -(-((start * batch // rows_of_epoch + 2) * rows_of_epoch) // batch)
    alone = Resolver(index, config)
    reference = list(played(plan, alone, [range(plan.lanes)], start, stop))
    findings = [once(np.concatenate(reference), index, plan, start * batch)]
    for world_size in world_sizes:
        for count in workers:
            findings.append(same(reference, index, config, world_size, max(count, 1), start))
    findings.append(mixing(reference, index, source, plan, config))
    findings.append(traffic(alone, reference, index, source))
    if run is not None:
        findings.append(logged(run, index, source, config, start, steps))
    return findings


def same(
    reference: list[np.ndarray], index: Index, config: RunConfig, world_size: int, workers: int, start: int
) -> Finding:
    """Whether the joined parts of all workers of all ranks are the batches of one rank."""
    plan = config.data.plan
    parts = [
        plan.lanes_of(rank, world_size, worker, workers) for rank in range(world_size) for worker in range(workers)
    ]
    # Each worker has a plan of its own, so that nothing passes between them.
    streams = [played(plan, Resolver(index, config), [part], start, start + len(reference)) for part in parts if part]
    differing = sum(
        not np.array_equal(expected, np.concatenate(found))
        for expected, *found in zip(reference, *streams, strict=True)
    )
    text = f"{world_size} ranks x {workers} workers, {len(reference)} steps from {start}: {differing} batches differ"
    return Finding("same global batches as 1 rank", not differing, text)


def once(rows: np.ndarray, index: Index, plan: Plan, first_row: int) -> Finding:
    """Every sample of each whole epoch comes exactly `repeats` times, and none twice in part of one."""
    name = "each sample once an epoch"
    offsets = np.concatenate([[0], np.cumsum(index.counts)])
    whole, wrong = 0, []
    for epoch in np.unique(rows[:, 0]):
        mine = rows[rows[:, 0] == epoch]
        counts = np.bincount(
            (offsets[mine[:, 1]] + mine[:, 2]) * plan.repeats + mine[:, 3], minlength=index.samples * plan.repeats
        )
        complete = len(mine) == index.samples * plan.repeats
        whole += complete
        if (counts > 1).any() or (complete and (counts != 1).any()):
            wrong.append(f"epoch {epoch}: {(counts > 1).sum()} samples twice, {(counts == 0).sum()} missing")
    text = f"{len(rows):,} rows, {whole} whole epochs of {index.samples:,} samples in {len(index)} shards"
    return Finding(name, not wrong, text + "".join(f"; {w}" for w in wrong))


def mixing(batches: list[np.ndarray], index: Index, source: Source, plan: Plan, config: RunConfig) -> Finding:
    """The labels' chi-squared against its distribution over true shuffles of the same rows."""
    name = "labels mixed as in a shuffle"
    labels_of = [load_records(shard, source.read)["label"] for shard in index.shards]
    labels = np.stack([np.array([labels_of[shard][number] for _, shard, number, _ in rows]) for rows in batches])
    shards = np.mean([len(np.unique(rows[:, 1])) for rows in batches])
    classes, counts = np.unique(labels, return_inverse=True)
    codes = counts.reshape(labels.shape)
    if len(classes) < 2 or len(batches) < 2:
        return Finding(name, True, f"{len(classes)} classes in {len(batches)} batches: nothing to compare", note=True)

    def chi_squared(codes: np.ndarray) -> float:
        steps = len(codes)
        cells = (codes + np.arange(steps)[:, None] * len(classes)).ravel()
        found = np.bincount(cells, minlength=steps * len(classes)).reshape(steps, len(classes))
        expected = found.sum(0) / steps
        return float(((found - expected) ** 2 / expected).sum() / steps)

    drawn = sorted(
        chi_squared(codes.ravel()[random_order(codes.size, n, len(batches))].reshape(codes.shape))
        for n in range(SIMULATIONS)
    )
    value, low, high = chi_squared(codes), drawn[SIMULATIONS // 100], drawn[-1 - SIMULATIONS // 100]
    text = f"chi-squared {value:.3f}, shuffles {low:.3f} to {high:.3f} (1-99 %); {shards:.1f} shards in a batch"
    if low <= value <= high:
        return Finding(name, True, text)
    if value < low:
        return Finding(name, True, text + ": more even than a shuffle")
    window = max(config.data.shuffle_pool // plan.lanes, 1)
    return Finding(
        name,
        True,
        text + f": not as mixed, since {plan.lanes} lanes with windows of {window} meet {len(index)} shards that hold"
        " few classes each; raise data.shuffle_pool or data.lanes, or write the shards shuffled",
        note=True,
    )


def traffic(resolver: Resolver, batches: list[np.ndarray], index: Index, source: Source) -> Finding:
    sizes = [load_records(shard, source.read)["nbytes"].astype(np.int64) for shard in index.shards]
    fetched = sum(int(sizes[shard][begin:end].sum()) for shard, begin, end in resolver.fetched)
    used = sum(int(sizes[shard][number]) for rows in batches for _, shard, number, copy in rows if copy == 0)
    # Windows that the last step has entered are read whole.
    text = f"{fetched / max(used, 1):.3f} ({fetched:,} / {used:,})"
    return Finding("bytes fetched for each byte used", True, text, note=True)


def logged(run: str, index: Index, source: Source, config: RunConfig, start: int, steps: int | None) -> Finding:
    """Compares all that a run has logged (data.log_samples=true) from step `start` on, or `steps` steps of it.

    Steps are named as the log has them, counted from 1. The shards may lie in another folder than during the run.
    """
    pattern = os.path.join(glob.escape(run), "samples-rank*.jsonl")
    found_ranks = ((re.search(r"-rank(\d{1,9})\.jsonl$", path), path) for path in glob.glob(pattern))
    ranks = {int(match[1]): path for match, path in found_ranks if match}
    if not ranks:
        raise UserError(f"{run}: no samples-rank*.jsonl; run with data.log_samples=true")
    plan, batch = config.data.plan, config.data.global_batch_size
    resolver = Resolver(index, config)
    names = Names(index, source)
    rows: Counter[int] = Counter()  # by step
    twice: set[int] = set()
    differing: set[int] = set()
    for rank, path in sorted(ranks.items()):
        mine: set[int] = set()
        for step, samples in logged_samples(path):
            if step <= start or (steps is not None and step > start + steps):
                continue
            (twice if step in mine else mine).add(step)
            rows[step] += len(samples)
            world_size = batch // max(len(samples), 1)  # at that time
            if rank >= world_size or len(samples) * world_size != batch or plan.lanes % world_size:
                differing.add(step)
                continue
            expected = played(plan, resolver, [plan.lanes_of(rank, world_size)], step - 1, step)
            if not all(map(names.match, samples, next(expected).tolist())):
                differing.add(step)
    newest = max(rows, default=start)
    told = last_step(run)
    end = max(newest, told or 0)
    missing = [step for step in range(start + 1, min(end, start + (steps or end)) + 1) if step not in rows]
    # When a run is killed, some ranks may not have written what metrics.jsonl does not have yet.
    whole = newest if told is None else told
    partly = [step for step, count in rows.items() if count < batch and step <= whole]
    twice |= {step for step, count in rows.items() if count > batch}
    text = f"{len(ranks)} ranks, {len(rows)} steps compared, {len(differing)} differ"
    wrong = [
        f"{what}: {spans(found)}"
        for what, found in (
            ("other samples than planned in steps", differing),
            ("logged twice: steps", twice),
            ("not logged: steps", missing),
            ("logged by some of the ranks only: steps", partly),
        )
        if found
    ]
    if rows and min(rows) > start + 1:
        wrong.append(f"if data.log_samples was set later, add --from-step {min(rows) - 1}")
    return Finding("as the run has logged", bool(rows) and not wrong, "; ".join([text, *wrong]))


class Names:
    """Compares what a log says of a sample with its row in the plan. The shards may have moved, all of a folder."""

    def __init__(self, index: Index, source: Source):
        self.index, self.source = index, source
        self.counts = index.counts.tolist()
        self.bases = [os.path.basename(shown_url(url)) for url in index.urls]
        self.keys: dict[int, list[str]] = {}
        self.urls: dict[str, int] = {}  # which shard a URL in the log is

    def match(self, logged: str, row: list[int]) -> bool:
        _, shard, number, _ = row
        if shard not in self.keys:
            self.keys[shard] = shard_keys(self.index.urls[shard], self.source)
        # The second is what a sample is called that could not be read.
        for key in (self.keys[shard][number], f"{number} of {self.counts[shard]}"):
            end = f"{self.bases[shard]}: sample {printable(key)}"
            folder = logged.removesuffix(end)
            if len(folder) < len(logged) and folder[-1:] in ("", "/"):
                return self.urls.setdefault(folder + self.bases[shard], shard) == shard
        return False


def logged_samples(path: str) -> Iterator[tuple[int, list[str]]]:
    """The steps of a log with the names of their samples.

    Raises:
        UserError: it holds something else.
    """
    for entry in read_lines(path):
        step, samples = entry["step"], entry.get("samples")
        if not isinstance(samples, list) or not all(isinstance(s, str) for s in samples) or not 1 <= step <= MOST_STEPS:
            raise UserError(
                f"{path}: found {shorten(entry)}, expected a step from 1 to {MOST_STEPS} and the names of its samples;"
                " audit another run"
            )
        yield step, samples


def last_step(run: str) -> int | None:
    """The last step that all ranks of a run have logged: what metrics.jsonl has was written after it."""
    steps = [entry["step"] for entry in read_lines(os.path.join(run, "metrics.jsonl")) if entry["step"] <= MOST_STEPS]
    return max(steps, default=None)


def spans(steps: Iterable[int], most: int = 5) -> str:
    """1, 2, 3, 7 -> "1-3, 7"."""
    found: list[list[int]] = []
    for step in sorted(steps):
        if found and found[-1][1] == step - 1:
            found[-1][1] = step
        else:
            found.append([step, step])
    texts = [str(first) if first == last else f"{first}-{last}" for first, last in found[:most]]
    return ", ".join(texts) + (f" and {len(found) - most} more spans" if len(found) > most else "")


def shard_keys(url: str, source: Source) -> list[str]:
    """The keys of a shard's samples, read from the tar itself."""
    data = source.read(url, 0, source.size(url))
    return [sample.key for sample in grouped(Archive(io.BytesIO(data), url, True), lambda suffix, nbytes: False)]
