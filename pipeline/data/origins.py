"""What shards are written from: an image folder, a list of files, or other shards."""

import csv
import hashlib
import json
import os
import re
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from pipeline.data.index import INDEX_COMMAND, load_index, load_records, read_classes
from pipeline.data.source import Source
from pipeline.data.tar import IMAGE_SUFFIXES, MAX_SAMPLE_BYTES, RECORD, sample_digest, strict_samples
from pipeline.errors import UserError
from pipeline.parsing import check_size, open_regular
from pipeline.text import base_name, shown, shown_url


class Origin(Protocol):
    """Samples that can be read in any order."""

    @property
    def sizes(self) -> np.ndarray:
        """The bytes of each sample in a tar, (N,)."""

    def take(self, chosen: np.ndarray) -> "Origin":
        """Some of the samples, in the order of `chosen`."""

    def identity(self) -> str:
        """A digest of the samples' names and sizes, whatever the folder they lie in."""

    def place(self, number: int) -> str:
        """Where a sample lies, for messages."""

    def read(self, number: int) -> tuple[str, dict[str, bytes]]:
        """A sample's name, and its members by suffix: {"jpg": ..., "cls": ...}.

        Raises:
            UserError: it can't be read.
        """


class Rejects:
    """Bad inputs: the first one is an error, or, with `skip`, all are listed in `rows`."""

    def __init__(self, skip: bool):
        self.skip = skip
        self.rows: list[dict[str, str]] = []

    def add(self, place: str, reason: str) -> None:
        if not self.skip:
            raise UserError(f"{place}: {reason}; --skip-bad leaves bad samples out")
        self.rows.append({"sample": shown(place), "reason": shown(reason)})


@dataclass(frozen=True)
class Files:
    """Image files with their classes."""

    root: str
    paths: list[str]  # relative to the root
    labels: np.ndarray  # (N,)
    nbytes: np.ndarray  # (N,)

    @property
    def sizes(self) -> np.ndarray:
        return 512 + -(-self.nbytes // 512) * 512 + 1024  # header and whole blocks of the image; the same of cls

    def take(self, chosen: np.ndarray) -> "Files":
        return Files(self.root, [self.paths[i] for i in chosen], self.labels[chosen], self.nbytes[chosen])

    def identity(self) -> str:
        facts = json.dumps([self.paths, self.labels.tolist(), self.nbytes.tolist()])
        return hashlib.blake2b(facts.encode(), digest_size=8).hexdigest()

    def place(self, number: int) -> str:
        return os.path.join(self.root, self.paths[number])

    def read(self, number: int) -> tuple[str, dict[str, bytes]]:
        path = self.place(number)
        try:
            with open_regular(path) as file:
                check_size(os.fstat(file.fileno()).st_size, MAX_SAMPLE_BYTES)
                image = file.read(MAX_SAMPLE_BYTES)
        except OSError as error:
            raise UserError(f"{path}: can't be read: {error.strerror}") from None
        except ValueError as error:
            raise UserError(f"{path}: {error}") from None
        return self.paths[number], {suffix_of(path): image, "cls": str(self.labels[number]).encode()}


@dataclass(frozen=True)
class Samples:
    """Samples of indexed shards, by their byte ranges."""

    urls: list[str]
    shards: np.ndarray  # (N,): which of the urls
    records: np.ndarray  # (N,), RECORD

    @property
    def sizes(self) -> np.ndarray:
        return self.records["nbytes"].astype(np.int64)

    def take(self, chosen: np.ndarray) -> "Samples":
        return Samples(self.urls, self.shards[chosen], self.records[chosen])

    def identity(self) -> str:
        facts = json.dumps([base_name(url) for url in self.urls]).encode()
        return hashlib.blake2b(facts + self.shards.tobytes() + self.records.tobytes(), digest_size=8).hexdigest()

    def place(self, number: int) -> str:
        return f"{shown_url(self.urls[self.shards[number]])}: sample at byte {self.records['offset'][number]}"

    def read(self, number: int) -> tuple[str, dict[str, bytes]]:
        url, record = self.urls[self.shards[number]], self.records[number]
        if not record["nbytes"]:
            raise UserError(f"{self.place(number)}: larger than {MAX_SAMPLE_BYTES} bytes")
        samples, problem = parse_run(Source().read(url, int(record["offset"]), int(record["nbytes"])), record)
        if problem:
            raise UserError(f"{self.place(number)}: {problem}")
        name = f"{base_name(url)}:{samples[0]['__key__']}"
        return name, {suffix: bytes(data) for suffix, data in samples[0].items() if not suffix.startswith("__")}


def parse_run(data: bytes, record: Any) -> tuple[list[dict[str, Any]], str | None]:
    """Parses the byte range of one record: the samples in it, and what is wrong if it isn't just the indexed one."""
    try:
        samples = strict_samples(data, "", int(record["offset"]))
    except UserError as error:
        return [], str(error).removeprefix(": ")
    if len(samples) == 1 and sample_digest(samples[0]) == int(record["digest"]):
        return samples, None
    found = " and ".join(
        f"{sample['__key__']} ({', '.join(s for s in sample if not s.startswith('__'))})" for sample in samples
    )
    return samples, (
        f"found {found or 'no sample'}, the index says otherwise: a damaged header; restore the shard, or if it was"
        f" changed on purpose, run: {INDEX_COMMAND}"
    )


def suffix_of(path: str) -> str:
    return os.path.splitext(path)[1][1:].lower()


def open_origin(
    places: Sequence[str], known: list[str] | None, columns: tuple[str, str], rejects: Rejects
) -> tuple[Origin, list[str] | None]:
    """Recognises a folder, a list or shards, and lists its samples and the classes' names (None: plain numbers).

    `known` are the names that the destination has already: they keep their numbers.

    Raises:
        UserError: nothing there, none of these kinds, or (without `skip`) something in it that is no sample.
    """
    place = places[0]
    source: Origin
    if all(place.endswith(".tar") for place in places):
        source, classes = read_shards(places)
    elif len(places) > 1:
        raise UserError(f"{place}: several sources; expected tars, or one folder or list")
    elif os.path.isdir(place):
        source, classes = read_folder(place, known, rejects)
    elif not os.path.exists(place):
        raise UserError(f"{place}: not found; expected an image folder, a .csv or .parquet list, or .tar shards")
    elif suffix_of(place) in ("csv", "parquet"):
        source, classes = read_list(place, columns, known, rejects)
    else:
        raise UserError(f"{place}: expected an image folder, a .csv or .parquet list, or .tar shards")
    if not len(source.sizes):
        raise UserError(f"{place}: no images in it; expected files ending in {', '.join(IMAGE_SUFFIXES)}")
    if known is not None and classes is not None and classes != known:
        raise UserError(f"{place}: its classes.json differs from the destination's; write to another folder")
    return source, classes if classes is not None else known


def read_shards(urls: Sequence[str]) -> tuple[Samples, list[str] | None]:
    shards = list(load_index(list(urls)).shards)
    records = [load_records(shard) for shard in shards]
    numbers = np.repeat(np.arange(len(shards)), [len(rows) for rows in records])
    classes = read_classes(list(urls))
    for shard in shards:
        if classes is not None and shard.labels[1] >= len(classes):
            raise UserError(f"{shard.url}: label {shard.labels[1]}, but classes.json beside it names {len(classes)}")
    return Samples([shard.url for shard in shards], numbers, np.concatenate(records).astype(RECORD)), classes


def read_folder(root: str, known: list[str] | None, rejects: Rejects) -> tuple[Files, list[str]]:
    """One sub-folder a class, with images at any depth. Hidden files are left out.

    Links are followed within the folder only: one in a stranger's archive may lead to any file of the user's.
    """
    real_root = os.path.realpath(root)
    entries = sorted(entry.name for entry in os.scandir(root) if not entry.name.startswith("."))
    names = [name for name in entries if os.path.isdir(os.path.join(root, name))]
    classes = known or names
    rows: list[tuple[str, int]] = []
    for name in entries:
        if name not in names:
            if suffix_of(name) in IMAGE_SUFFIXES:
                rejects.add(os.path.join(root, name), "an image without a class; move it into its class's folder")
            continue
        label = class_number(name, classes, os.path.join(root, name))
        before = len(rows)
        rejected = len(rejects.rows)
        rows += [(path, label) for path in files_below(root, name, real_root, rejects)]
        if len(rows) == before and len(rejects.rows) == rejected:
            raise UserError(f"{os.path.join(root, name)}: no images in this class; remove the folder")
    return checked_files(root, rows, rejects), classes


def files_below(root: str, name: str, real_root: str, rejects: Rejects) -> Iterator[str]:
    """The files in a folder of `root` at any depth, relative to `root`. Each folder is entered once."""
    entered: set[str] = set()
    waiting = [name]
    while waiting:
        inside = waiting.pop()
        path = os.path.join(root, inside)
        real = os.path.realpath(path)
        if not is_below(real, real_root):
            rejects.add(path, LEAVES.format(real))
        elif real in entered:
            rejects.add(path, "a link to a folder that its class has already; remove it")
        else:
            entered.add(real)
            folders = []
            for entry in sorted(os.scandir(path), key=lambda entry: entry.name):
                child = os.path.join(inside, entry.name)
                if entry.is_dir():
                    folders.append(child)
                elif entry.name.startswith("."):
                    continue
                elif entry.is_symlink() and not is_below(real := os.path.realpath(entry.path), real_root):
                    rejects.add(entry.path, LEAVES.format(real))
                else:
                    yield child
            waiting += reversed(folders)


LEAVES = "a link to {}, outside of the folder; copy it there, or name the files in a .csv list"


def is_below(path: str, root: str) -> bool:
    return os.path.commonpath([path, root]) == root


def read_list(
    path: str, columns: tuple[str, str], known: list[str] | None, rejects: Rejects
) -> tuple[Files, list[str] | None]:
    """Paths relative to the list's folder, and labels that are all whole numbers, or all names."""
    table = read_parquet(path, columns) if suffix_of(path) == "parquet" else read_csv(path, columns)
    labels = list(dict.fromkeys(label for _, label in table))
    numeric = [label for label in labels if re.fullmatch(r"[+-]?\d+(\.\d*)?", label)]
    if numeric and len(numeric) < len(labels):
        name = next(label for label in labels if label not in numeric)
        raise UserError(f"{path}: label {numeric[0]!r} is a number, {name!r} is a name; use one kind")
    classes = None if numeric else known or sorted(labels)
    numbers = {}
    for label in labels:
        if classes is not None:
            numbers[label] = class_number(label, classes, path)
        elif not re.fullmatch(r"\d{1,9}", label) or (known is not None and int(label) >= len(known)):
            expected = f"0 to {len(known) - 1} (classes.json)" if known else "a whole number from 0 on"
            raise UserError(
                f"{path}: label {label} of {next(p for p, of in table if of == label)}: expected {expected}"
            )
        else:
            numbers[label] = int(label)
    return checked_files(os.path.dirname(path), [(file, numbers[label]) for file, label in table], rejects), classes


def read_csv(path: str, columns: tuple[str, str]) -> list[tuple[str, str]]:
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file, strict=True)
            check_columns(path, columns, reader.fieldnames or [])
            return [checked_row(f"{path}: line {reader.line_num}", [row[c] for c in columns]) for row in reader]
    except (csv.Error, UnicodeDecodeError) as error:
        raise UserError(f"{path}: no readable CSV in UTF-8: {error}") from None


def read_parquet(path: str, columns: tuple[str, str]) -> list[tuple[str, str]]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise UserError(f"{path}: Parquet needs pyarrow; run: pip install 'vit-pretrain[parquet]'") from None
    try:
        check_columns(path, columns, pyarrow.parquet.read_schema(path).names)
        table = pyarrow.parquet.read_table(path, columns=list(columns))
    except pyarrow.ArrowInvalid as error:
        raise UserError(f"{path}: no readable Parquet: {error}") from None
    rows = zip(*(table[column].to_pylist() for column in columns), strict=True)
    return [checked_row(f"{path}: row {number}", row) for number, row in enumerate(rows)]


def check_columns(path: str, columns: tuple[str, str], found: Sequence[str]) -> None:
    for column, flag in zip(columns, ("--path-column", "--label-column"), strict=True):
        if column not in found:
            raise UserError(f"{path}: no column {column!r} among {', '.join(found)}; name it with {flag}")


def checked_row(where: str, row: Sequence[Any]) -> tuple[str, str]:
    image, label = ("" if value is None else str(value).strip() for value in row)
    if not image or not label:
        raise UserError(f"{where}: no {'label' if image else 'path'}")
    return image, label


def class_number(name: str, classes: list[str], where: str) -> int:
    if name not in classes:
        raise UserError(f"{where}: class {name!r} is not in classes.json of the destination; write to another folder")
    return classes.index(name)


def checked_files(root: str, rows: list[tuple[str, int]], rejects: Rejects) -> Files:
    """Leaves out what is no image by its ending, missing or empty."""
    kept: list[tuple[str, int, int]] = []
    for path, label in rows:
        whole = os.path.join(root, path)
        if suffix_of(path) not in IMAGE_SUFFIXES:
            rejects.add(whole, f"expected an ending among {', '.join(IMAGE_SUFFIXES)}; convert or remove it")
            continue
        try:
            found = os.stat(whole)
        except (OSError, ValueError) as error:  # the latter: a zero byte in the path
            rejects.add(whole, getattr(error, "strerror", None) or str(error))
            continue
        size = found.st_size
        if not stat.S_ISREG(found.st_mode):
            rejects.add(whole, "not a regular file; remove it")
        elif size > MAX_SAMPLE_BYTES:
            rejects.add(whole, f"larger than {MAX_SAMPLE_BYTES} bytes")
        elif size:
            kept.append((path, label, size))
        else:
            rejects.add(whole, "empty file; restore or remove it")
    labels, nbytes = (np.array([row[i] for row in kept], dtype=np.int64) for i in (1, 2))
    return Files(root, [row[0] for row in kept], labels, nbytes)
