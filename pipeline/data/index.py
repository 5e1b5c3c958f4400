"""Tar shards and their index: what lies where, so that any sample can be read without reading those before it.

Beside the shards lies one index for each folder: `index.json` names the shards with their sizes and sample counts;
`index.bin` holds one fixed-size record for each sample, so that a worker loads only the records of a shard it reads.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import fsspec
import numpy as np

from pipeline.data.source import Read, ReadConfig, Source, is_http, is_local, is_pipe
from pipeline.data.tar import RECORD, UNLABELLED, scan_shard
from pipeline.errors import UserError

FORMAT = 2
INDEX_COMMAND = "python -m pipeline.shards index"


@dataclass(frozen=True)
class Shard:
    url: str
    nbytes: int  # size of the whole tar
    samples: int
    first_record: int  # where this shard's records start in index.bin
    labels: tuple[int, int]  # smallest and largest; (-1, -1) without labels
    bad: int  # samples without an image or without a label
    index: str  # the folder of its index


@dataclass(frozen=True)
class Index:
    """The shards of one data set, in the order in which they were named.

    Columns instead of objects: a hundred thousand shards take a few megabytes, and workers get them at once.
    """

    urls: list[str]
    columns: np.ndarray  # (shards, 6): nbytes, samples, first_record, smallest and largest label, bad
    folders: list[str]
    folder_numbers: np.ndarray  # (shards,)

    def __len__(self) -> int:
        return len(self.urls)

    def shard(self, number: int) -> Shard:
        nbytes, samples, first, low, high, bad = self.columns[number].tolist()
        folder = self.folders[self.folder_numbers[number]]
        return Shard(self.urls[number], nbytes, samples, first, (low, high), bad, folder)

    @property
    def shards(self) -> Iterator[Shard]:
        return (self.shard(number) for number in range(len(self)))

    @property
    def counts(self) -> np.ndarray:
        return self.columns[:, 1]

    @cached_property
    def samples(self) -> int:
        return int(self.counts.sum())

    def identity(self) -> str:
        """A digest of the data, whatever the folder it lies in: names, sizes and sample counts of the shards."""
        digest = hashlib.blake2b(self.columns[:, :2].astype("<i8").tobytes(), digest_size=8)
        digest.update("\n".join(os.path.basename(url) for url in self.urls).encode())
        return digest.hexdigest()


def expand_urls(urls: str | Sequence[str]) -> list[str]:
    """Expands braces (`train-{000..127}.tar`) in one pattern or each of a list.

    Raises:
        UserError: no shard, or the same shard twice.
    """
    from braceexpand import braceexpand

    listed = [urls] if isinstance(urls, str) else list(urls)
    expanded = [url for text in listed for url in ([text] if is_pipe(text) else braceexpand(text))]
    if not expanded:
        raise UserError("data: no shard is named; set data.train and data.val")
    seen: set[str] = set()
    for url in expanded:
        if url in seen:
            raise UserError(f"{url}: named twice; each sample would come twice an epoch")
        seen.add(url)
    return expanded


def write_index(
    urls: Sequence[str],
    progress: Any = None,
    processes: int = 1,
    folder: str | None = None,
    limits: ReadConfig | None = None,
) -> int:
    """Writes `index.json` and `index.bin` beside the shards (or all to `folder`). Returns the number of samples.

    Shards that the index had before, and that are not named now, stay in it. `progress` has a method `update`.

    Raises:
        UserError: a bad shard, or a count that differs from `_info.json` or `sizes.json` beside it; nothing is
            written then.
    """
    urls = expand_urls(list(urls))
    homes = [home_of(url, folder) for url in urls]
    for url, place in zip(urls, homes, strict=True):
        if is_http(place[0]):
            raise UserError(f"{url}: an index can't be written there; write it elsewhere: index --to FOLDER, and set"
                            " data.index=FOLDER")  # fmt: skip
    if len(set(homes)) < len(homes):
        twice = next(url for url, place in zip(urls, homes, strict=True) if homes.count(place) > 1)
        raise UserError(f"{twice}: another shard has the same name, and {folder} can hold only one; index them apart")
    scanned: list[tuple[int, np.ndarray, int]] = []
    workers = ProcessPoolExecutor(processes) if processes > 1 else None
    try:
        found: Iterable[Any] = (
            workers.map(scan_shard, urls, [limits] * len(urls), chunksize=1)
            if workers
            else (scan_shard(url, limits) for url in urls)
        )
        for shard in found:
            scanned.append(shard)
            if progress is not None:
                progress.update()
    finally:
        if workers:
            workers.shutdown(cancel_futures=True)
    tables: dict[str, dict[str, tuple[dict, np.ndarray]]] = {}
    for (home, name), (nbytes, records, bad) in zip(homes, scanned, strict=True):
        if home not in tables:
            tables[home] = _existing(home)
        labels = records["label"][records["label"] != UNLABELLED]
        low, high = (int(labels.min()), int(labels.max())) if len(labels) else (UNLABELLED, UNLABELLED)
        row = {"name": name, "nbytes": nbytes, "samples": len(records), "labels": [low, high], "bad": bad}
        tables[home][name] = row, records
    for home, shards in tables.items():
        _cross_check(home, {name: row["samples"] for name, (row, _) in shards.items()})
    for home, shards in tables.items():
        first, table = 0, []
        for row, records in shards.values():
            table.append({**row, "first_record": first})
            first += len(records)
        write_file(f"{home}/index.bin", b"".join(records.tobytes() for _, records in shards.values()))
        write_file(f"{home}/index.json", json.dumps({"format": FORMAT, "shards": table}, indent=1).encode())
    return sum(len(records) for _, records, _ in scanned)


def home_of(url: str, folder: str | None) -> tuple[str, str]:
    """The folder of a shard's index, and the shard's name there."""
    home, name = ("", url) if is_pipe(url) else os.path.split(url)
    if folder is None and is_pipe(url):
        raise UserError(f"{url}: a command has no folder for its index; name one: index --to FOLDER, data.index=FOLDER")
    return (folder.rstrip("/") if folder else home or "."), name


def _existing(home: str) -> dict[str, tuple[dict, np.ndarray]]:
    """What the index of a folder says of shards that are still there."""
    kept = {}
    try:
        with fsspec.open(f"{home}/index.json", "rb") as file:
            table = json.load(file)["shards"]
        with fsspec.open(f"{home}/index.bin", "rb") as file:
            records = np.frombuffer(file.read(), dtype=RECORD)
        for row in table:
            rows = records[row["first_record"] : row["first_record"] + row["samples"]]
            path = f"{home}/{row['name']}"
            if len(rows) == row["samples"] and (not is_local(path) or os.path.exists(path)):
                kept[row["name"]] = row, rows
    except (OSError, ValueError, KeyError, TypeError):
        return {}
    return kept


def _cross_check(home: str, counts: dict[str, int]) -> None:
    """Compares with what timm (`_info.json`) and open_clip (`sizes.json`) have counted, where that lies there."""
    claims: dict[str, dict[str, int]] = {}
    try:
        with fsspec.open(f"{home}/sizes.json", "rb") as file:
            claims["sizes.json"] = {str(name): int(count) for name, count in json.load(file).items()}
    except FileNotFoundError:
        pass
    try:
        with fsspec.open(f"{home}/_info.json", "rb") as file:
            splits = json.load(file)["splits"].values()
        claims["_info.json"] = {
            name: int(count)
            for split in splits
            for name, count in zip(split["filenames"], split["shard_lengths"], strict=True)
        }
    except FileNotFoundError:
        pass
    for source, claimed in claims.items():
        for name, count in claimed.items():
            if name in counts and counts[name] != count:
                raise UserError(
                    f"{home}/{name}: {counts[name]} samples, but {source} beside it says {count}; mend the shard, or"
                    f" {source} if that is stale"
                )


def write_file(url: str, data: bytes) -> None:
    """Writes so that nobody reads half a file: a local one is renamed when it is whole, an object appears then."""
    if not is_local(url):
        filesystem, path = fsspec.core.url_to_fs(url)
        filesystem.pipe_file(path, data)
        return
    os.makedirs(os.path.dirname(url) or ".", exist_ok=True)
    with open(url + ".part", "wb") as file:
        file.write(data)
    os.replace(url + ".part", url)


def load_index(
    urls: str | Sequence[str], check_sizes: bool = True, folder: str | None = None, source: Source | None = None
) -> Index:
    """Looks up each shard in the index beside it (or in `folder`).

    Raises:
        UserError: a shard is missing, its index is missing, or they don't fit each other; names the command that
            writes the index.
    """
    listed, source = expand_urls(urls), source or Source()
    sizes = file_sizes(listed, source) if check_sizes else [None] * len(listed)
    tables: dict[str, dict[str, dict]] = {}
    columns = np.empty((len(listed), 6), dtype=np.int64)
    numbers = np.empty(len(listed), dtype=np.int32)
    for place, (url, size) in enumerate(zip(listed, sizes, strict=True)):
        home, name = home_of(url, folder)
        if home not in tables:
            tables[home] = _read_table(home, url, source)
        row = tables[home].get(name)
        command = f"run: {INDEX_COMMAND} '{home}/*.tar'"
        if size == 0:
            raise UserError(f"{url}: empty file; write the shard anew")
        if row is None:
            raise UserError(f"{url}: not in {home}/index.json; {command}")
        if size is not None and size != row["nbytes"]:
            kind = "truncated" if size < row["nbytes"] else "changed"
            raise UserError(
                f"{url}: {kind}: it has {size} bytes, its index says {row['nbytes']}; restore the shard,"
                f" or if the change is meant, {command}"
            )
        columns[place] = row["nbytes"], row["samples"], row["first_record"], *row["labels"], row["bad"]
        numbers[place] = list(tables).index(home)
    return Index(listed, columns, list(tables), numbers)


def file_sizes(urls: list[str], source: Source) -> list[int | None]:
    """The size of each file; None for a command, which has none.

    Raises:
        UserError: one can't be reached.
    """

    def ask(url: str) -> int | None:
        if is_pipe(url):
            source.command(url)  # refused here, before anything starts
            return None
        return source.size(url)

    if all(is_local(url) for url in urls):
        return [ask(url) for url in urls]
    with ThreadPoolExecutor(32) as threads:
        return list(threads.map(ask, urls))


def _read_table(home: str, url: str, source: Source) -> dict[str, dict]:
    path = f"{home}/index.json"
    try:
        table = json.loads(_read_all(path, source))
        if table["format"] != FORMAT:
            raise ValueError
        return {row["name"]: row for row in table["shards"]}
    except FileNotFoundError:
        raise UserError(f"{url}: no index beside it ({path}); run: {INDEX_COMMAND} '{home}/*.tar'") from None
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{path}: not a readable index; run: {INDEX_COMMAND} '{home}/*.tar'") from None


def _read_all(path: str, source: Source) -> bytes:
    """Raises FileNotFoundError where there is no such file."""
    if is_http(path):
        try:
            return source.read(path, 0, source.size(path))
        except UserError as error:
            if "not found" in str(error):
                raise FileNotFoundError(path) from None
            raise
    with fsspec.open(path, "rb") as file:
        return file.read()


def load_records(shard: Shard, read: Read | None = None, begin: int = 0, end: int | None = None) -> np.ndarray:
    """The records of one shard's samples, or of `begin` to `end` of them, read by `read`."""
    first = shard.first_record + begin
    count = (shard.samples if end is None else end) - begin
    read = read or Source().read
    data = read(f"{shard.index}/index.bin", first * RECORD.itemsize, count * RECORD.itemsize)
    return np.frombuffer(data, dtype=RECORD)


def read_classes(urls: str | Sequence[str], source: Source | None = None) -> list[str] | None:
    """The labels' names from `classes.json` beside the first shard, or None where there is none."""
    first = expand_urls(urls)[0]
    if is_pipe(first):
        return None
    path = f"{os.path.dirname(first) or '.'}/classes.json"
    try:
        classes = json.loads(_read_all(path, source or Source()))
    except FileNotFoundError:
        return None
    except ValueError:
        classes = None
    if not isinstance(classes, list) or not all(isinstance(name, str) for name in classes):
        raise UserError(f"{path}: expected a JSON list with the name of each class")
    return classes
