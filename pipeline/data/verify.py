"""Reads and decodes all samples of shards, and holds them against their index."""

import contextlib
import io
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from pipeline.data.archive import Archive
from pipeline.data.decode import MAX_IMAGE_PIXELS, decode
from pipeline.data.index import INDEX_COMMAND, Shard, load_index, load_records, read_classes
from pipeline.data.origins import parse_run
from pipeline.data.parallel import check_stop, in_processes
from pipeline.data.source import ReadConfig, Source
from pipeline.data.tar import (
    IMAGE_SUFFIXES,
    MAX_SAMPLE_BYTES,
    RangeFile,
    digest_of,
    grouped,
    label_of,
    leaves_folder,
)
from pipeline.errors import UserError
from pipeline.text import printable, shown, shown_url

BLOCK_NBYTES = 64 << 20  # read at once


@dataclass
class ShardReport:
    """What one shard holds."""

    shard: Shard
    bad: list[dict[str, Any]] = field(default_factory=list)  # {"shard", "key", "reason"}; key null: the whole shard
    keys: list[str] = field(default_factory=list)
    labels: Counter[int] = field(default_factory=Counter)  # -1: none
    sizes: Counter[tuple[int, int]] = field(default_factory=Counter)  # (height, width) in pixels
    missing_end: bool = False

    def add(self, key: str | None, reason: str) -> None:
        url = shown_url(self.shard.url)
        reason = shown(reason).removeprefix(f"{url}: ").removeprefix(f"sample {printable(key or '')}: ")
        self.bad.append({"shard": url, "key": key, "reason": reason})


def verify_shards(
    urls: list[str],
    processes: int | None,
    progress: Any = None,
    index: str | None = None,
    allow_missing_end: bool = False,
    max_image_pixels: int = MAX_IMAGE_PIXELS,
) -> dict[str, Any]:
    """Everything that is bad, and a summary: "bad", "duplicate_keys", "shards", "samples", "labels", "sizes".

    `index` is the folder of their index; by default it lies beside them. With `allow_missing_end`, shards without an
    end mark are not bad, but counted: "missing_ends".

    Raises:
        UserError: there is no index, or it doesn't know a shard.
    """
    shards = list(load_index(urls, check_sizes=False, folder=index).shards)
    classes = read_classes(urls)
    if progress is not None:
        progress.reset(total=sum(shard.samples for shard in shards))
    tasks = [(shard, len(classes) if classes else None, allow_missing_end, max_image_pixels) for shard in shards]
    reports: dict[str, ShardReport] = {}
    with contextlib.closing(in_processes(verify_shard, tasks, processes)) as results:
        for report in results:
            reports[report.shard.url] = report
            if progress is not None:
                progress.update(report.shard.samples)
    ordered = [reports[shard.url] for shard in shards]
    labels = sum((report.labels for report in ordered), Counter())
    counts = sum((report.sizes for report in ordered), Counter())
    sizes = np.repeat(np.array(list(counts)).reshape(-1, 2), list(counts.values()), axis=0)  # (N, 2)
    return {
        "shards": len(shards),
        "samples": sum(shard.samples for shard in shards),
        "bad": [row for report in ordered for row in report.bad],
        "duplicate_keys": duplicate_keys(ordered),
        "missing_ends": sum(report.missing_end for report in ordered),
        "labels": [
            {"label": label, "name": classes[label] if classes and label >= 0 else None, "samples": labels[label]}
            for label in sorted(labels)
        ],
        "sizes": {
            side: {"min": int(of.min()), "median": int(np.median(of)), "max": int(of.max())}
            for side, of in zip(("height", "width"), sizes.T, strict=True)
            if len(of)
        },
    }


def duplicate_keys(reports: list[ShardReport]) -> list[dict[str, Any]]:
    """Keys that come more than once, with the shards of each: [{"key", "shards"}]."""
    counts = Counter(key for report in reports for key in report.keys)
    places: dict[str, list[str]] = {key: [] for key, count in sorted(counts.items()) if count > 1}
    for report in reports:
        for key in report.keys:
            if key in places:
                places[key].append(shown_url(report.shard.url))
    return [{"key": key, "shards": urls} for key, urls in places.items()]


def verify_shard(
    shard: Shard, classes: int | None, allow_missing_end: bool, max_image_pixels: int = MAX_IMAGE_PIXELS
) -> ShardReport:
    """Checks each sample by itself, so that one bad sample hides no other, then all bytes that belong to none.

    `classes` is the number of class names.
    """
    report = ShardReport(shard)
    source = Source(ReadConfig(allow_missing_end=allow_missing_end))
    try:
        nbytes = source.size(shard.url)
        source.read(shard.url, 0, min(nbytes, 1))
        records = load_records(shard)
        if nbytes == 0:
            raise UserError(f"{shard.url}: empty file")
    except UserError as error:
        report.add(None, str(error))
        return report
    if nbytes != shard.nbytes:
        kind = "truncated" if nbytes < shard.nbytes else "changed"
        report.add(None, f"{kind}: it has {nbytes} bytes, the index says {shard.nbytes}")
    for number, (record, data) in enumerate(runs(shard.url, records)):
        check_stop()
        if isinstance(data, UserError):
            report.add(f"(number {number})", str(data))
            continue
        samples, problem = parse_run(data, record)
        key = samples[0]["__key__"] if samples else f"(number {number})"
        if problem:
            report.add(key, f"at byte {record['offset']}: {problem}")
            continue
        report.keys.append(key)
        try:
            check_sample(samples[0], record, classes, report, max_image_pixels)
        except UserError as error:
            report.add(key, str(error))
    check_rest(source, shard, records, nbytes, report)
    found = (min(report.labels, default=-1), max(report.labels, default=-1))
    if not report.bad and found != tuple(shard.labels):
        report.add(None, f"labels {found[0]} to {found[1]}, the index says {shard.labels[0]} to {shard.labels[1]}")
    return report


def check_sample(
    sample: dict[str, Any], record: Any, classes: int | None, report: ShardReport, max_image_pixels: int
) -> None:
    where = f"{report.shard.url}: sample {sample['__key__']}"
    if leaves_folder(sample["__key__"]):
        raise UserError("its name leaves the shard's folder")
    encoded = next((sample[s] for s in IMAGE_SUFFIXES if s in sample), None)
    if encoded is None:
        raise UserError(f"no image among its members; expected one of {', '.join(IMAGE_SUFFIXES)}")
    image = decode(encoded, where, max_image_pixels)  # (H, W, 3)
    label = label_of(sample, where)
    if label != int(record["label"]):
        raise UserError(f"label {label}, the index says {record['label']}")
    if classes is not None and label >= classes:
        raise UserError(f"label {label} is out of range: classes.json names {classes} classes")
    report.labels[label] += 1
    report.sizes[image.shape[0], image.shape[1]] += 1


def check_rest(source: Source, shard: Shard, records: np.ndarray, nbytes: int, report: ShardReport) -> None:
    """Checks the bytes that belong to no indexed sample: other members between and behind them, and the end."""
    records = records[np.argsort(records["offset"], kind="stable")]
    offsets = records["offset"].astype(np.int64)
    stops = np.append(offsets, nbytes)  # of what lies before each sample, and behind the last
    starts = np.concatenate([[0], np.maximum.accumulate(offsets + records["nbytes"])])
    large = {(int(row["offset"]), int(row["digest"])) for row in records if not row["nbytes"]}
    for start, stop in zip(starts.tolist(), stops.tolist(), strict=True):
        if start < stop or start == nbytes:
            try:
                check_gap(source, shard, start, stop, stop < nbytes, large, report)
            except UserError as error:
                report.add(None, str(error))


def check_gap(
    source: Source, shard: Shard, start: int, stop: int, inside: bool, large: set[tuple[int, int]], report: ShardReport
) -> None:
    file = io.BufferedReader(RangeFile(source, shard.url, stop), 1 << 16)
    file.seek(start)
    archive = Archive(file, shard.url, inside or source.limits.allow_missing_end)
    for sample in grouped(archive, lambda suffix, nbytes: False):
        if (sample.begin, digest_of(sample.key, sample.sizes)) not in large:
            report.add(sample.key, f"at byte {sample.begin}: not in the index; run: {INDEX_COMMAND} {shard.url}")
    if not inside:
        report.missing_end = archive.missing_end
    elif archive.end < stop:
        report.add(None, f"damaged at byte {archive.end}: zeros where a tar header was expected; restore the shard")


def runs(url: str, records: np.ndarray) -> Iterator[tuple[Any, bytes | UserError]]:
    """The bytes of each record. Reads many at once; where that fails, one at a time."""
    offsets, ends = records["offset"].tolist(), (records["offset"] + records["nbytes"]).tolist()
    begin = 0
    while begin < len(records):
        start, stop = offsets[begin], begin + 1
        if ends[begin] == start:
            yield records[begin], UserError(f"{url}: larger than {MAX_SAMPLE_BYTES} bytes")
            begin += 1
            continue
        while (
            stop < len(records) and ends[stop] > offsets[stop] >= ends[stop - 1] and ends[stop] - start <= BLOCK_NBYTES
        ):
            stop += 1
        try:
            block = Source().read(url, start, ends[stop - 1] - start)
        except UserError:
            block = None
        for i in range(begin, stop):
            if block is not None:
                yield records[i], block[offsets[i] - start : ends[i] - start]
                continue
            try:
                yield records[i], Source().read(url, offsets[i], ends[i] - offsets[i])
            except UserError as error:
                yield records[i], error
        begin = stop


def summary(report: dict[str, Any], most: int = 20) -> str:
    """The report as text: what is there, then up to `most` bad things."""
    lines = []
    for row in report["bad"]:
        key = f"sample {printable(row['key'])}: " if row["key"] else ""
        lines.append(f"{row['shard']}: {key}{row['reason']}")
    for row in report["duplicate_keys"]:
        lines.append(f"key {printable(row['key'])}: in {len(row['shards'])} samples: {', '.join(row['shards'])}")
    bad = len(lines)
    if bad > most:
        lines[most:] = [f"... and {bad - most} more (--json FILE lists all)"]
    lines += [f"{report['samples']:,} samples in {report['shards']} shards"]
    if report["missing_ends"]:
        lines += [f"{report['missing_ends']} of the shards have no end mark"]
    for side, of in report["sizes"].items():
        lines.append(f"{side:<6} min {of['min']}, median {of['median']}, max {of['max']} pixels")
    rows = sorted(report["labels"], key=lambda row: (-row["samples"], row["label"]))
    lines += [f"{len(rows)} labels:", f"{'label':>6} {'samples':>9}  name"] if rows else []
    shown = rows if len(rows) <= 20 else [*rows[:10], None, *rows[-10:]]
    for row in shown:
        text = (
            f"{row['label']:>6} {row['samples']:>9}  {printable(row['name'] or '')}".rstrip() if row else f"{'...':>6}"
        )
        lines.append(text.replace("    -1", "  none"))
    return "\n".join([*lines, f"{bad} things are bad" if bad else "all shards are whole"])
