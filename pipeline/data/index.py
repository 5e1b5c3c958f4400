"""Tar shards and their index: what lies where, so that any sample can be read without reading those before it.

Beside the shards lies one index for each folder: `index.json` names the shards with their sizes and sample counts;
`index.bin` holds one fixed-size record for each sample, so that a worker loads only the records of a shard it reads.
"""

import hashlib
import io
import json
import os
import re
import tarfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import fsspec
import numpy as np

from pipeline.errors import UserError

IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp")
RECORD = np.dtype([("offset", "<u8"), ("nbytes", "<u4"), ("label", "<i4"), ("digest", "<u8")])
INDEX_COMMAND = "python -m pipeline.shards index"


@dataclass(frozen=True)
class Shard:
    url: str
    nbytes: int  # size of the whole tar
    samples: int
    first_record: int  # where this shard's records start in index.bin
    labels: tuple[int, int]  # smallest and largest; (-1, -1) without labels


@dataclass(frozen=True)
class Index:
    """The shards of one data set, in the order in which they were named."""

    shards: tuple[Shard, ...]

    @property
    def counts(self) -> np.ndarray:
        return np.array([shard.samples for shard in self.shards], dtype=np.int64)

    @property
    def samples(self) -> int:
        return int(self.counts.sum())

    def identity(self) -> str:
        """A digest of the data, whatever the folder it lies in: names, sizes and sample counts of the shards."""
        facts = [[os.path.basename(s.url), s.nbytes, s.samples] for s in self.shards]
        return hashlib.blake2b(json.dumps(facts).encode(), digest_size=8).hexdigest()


def expand_urls(urls: str | Sequence[str]) -> list[str]:
    """Expands braces (`train-{000..127}.tar`) in one pattern or each of a list.

    Raises:
        UserError: no shard, or the same shard twice.
    """
    from braceexpand import braceexpand

    listed = [urls] if isinstance(urls, str) else list(urls)
    expanded = [url for pattern in listed for url in braceexpand(pattern)]
    if not expanded:
        raise UserError("data: no shard is named; set data.train and data.val")
    repeated = (
        [url for url in dict.fromkeys(expanded) if expanded.count(url) > 1]
        if len(set(expanded)) < len(expanded)
        else []
    )
    if repeated:
        raise UserError(f"{repeated[0]}: named twice; each sample would come twice an epoch")
    return expanded


def file_size(url: str) -> int:
    """Raises UserError where the file can't be reached."""
    try:
        filesystem, path = fsspec.core.url_to_fs(url)
        return int(filesystem.size(path))
    except (FileNotFoundError, IsADirectoryError, TypeError):
        raise UserError(f"{url}: shard not found; check data.train and data.val") from None
    except (OSError, ImportError, ValueError) as error:
        raise UserError(f"{url}: can't be reached: {error}") from None


def read_range(url: str, start: int, nbytes: int) -> bytes:
    """Reads exactly `nbytes` bytes from `start`.

    Raises:
        UserError: the source gives fewer bytes.
    """
    try:
        filesystem, path = fsspec.core.url_to_fs(url)
        with filesystem.open(path, "rb", cache_type="none") as file:
            file.seek(start)
            data = file.read(nbytes)
    except OSError as error:
        raise UserError(f"{url}: can't be read at byte {start}: {error}") from None
    if len(data) != nbytes:
        raise UserError(
            f"{url}: truncated at byte {start + len(data)} (the index says there are {start + nbytes});"
            f" restore the shard, or write its index anew: {INDEX_COMMAND} {url}"
        )
    return data


def parse_tar(data: bytes, url: str) -> Iterator[dict[str, Any]]:
    """Samples of a run of whole tar members, by webdataset's own conventions: {"__key__": ..., "png": bytes, ...}."""
    from webdataset.tariterators import group_by_keys, tar_file_iterator

    members = tar_file_iterator(io.BytesIO(data))
    return group_by_keys({**member, "__url__": url} for member in members)


def sample_digest(sample: dict[str, Any]) -> int:
    """A 64-bit digest of a sample's key and the names and sizes of its members: what the index promises of it."""
    facts = [sample["__key__"], sorted((k, len(v)) for k, v in sample.items() if not k.startswith("__"))]
    return int.from_bytes(hashlib.blake2b(json.dumps(facts).encode(), digest_size=8).digest(), "little")


def label_of(sample: dict[str, Any], where: str) -> int:
    """The class of a sample, or -1 where it has none.

    Raises:
        UserError: `cls` is no whole number.
    """
    if "cls" not in sample:
        return -1
    text = bytes(sample["cls"]).decode(errors="replace").strip()
    if not re.fullmatch(r"\d{1,9}", text):
        raise UserError(f"{where}: the member cls holds {text[:40]!r}, expected the class as a whole number")
    return int(text)


def scan_shard(url: str) -> tuple[int, np.ndarray]:
    """Reads one whole shard and returns its size and its records.

    Raises:
        UserError: missing, empty, truncated, no tar, or without a sample that has an image.
    """
    nbytes = file_size(url)
    if nbytes == 0:
        raise UserError(f"{url}: empty file; write the shard anew")
    rows: list[tuple[int, int, int, int]] = []
    key: str | None = None
    sample: dict[str, Any] = {}
    begin = end = 0

    def finish() -> None:
        where = f"{url}: sample {key}"
        if not any(suffix in sample for suffix in IMAGE_SUFFIXES):
            raise UserError(
                f"{where}: no image among its members ({', '.join(sorted(sample))}); expected one of "
                f"{', '.join(IMAGE_SUFFIXES)}"
            )
        rows.append((begin, end - begin, label_of(sample, where), sample_digest({"__key__": key, **sample})))

    filesystem, path = fsspec.core.url_to_fs(url)
    try:
        with filesystem.open(path, "rb") as file, tarfile.open(fileobj=file, mode="r:") as tar:
            position = 0
            for member in tar:
                following = member.offset_data + (member.size + 511) // 512 * 512
                if following > nbytes:
                    raise UserError(
                        f"{url}: truncated at byte {nbytes}: the member {member.name} ends at {following};"
                        " copy or write the shard anew"
                    )
                stem, _, suffix = os.path.basename(member.name).partition(".")
                folder = os.path.dirname(member.name)
                name = f"{folder}/{stem}" if folder else stem
                if member.isreg() and suffix and not re.match(r"__[^/]*__($|/)", member.name):
                    if name != key:
                        if key is not None:
                            finish()
                        key, sample, begin = name, {}, position
                    content = tar.extractfile(member)
                    assert content is not None
                    sample[suffix.lower()] = content.read()
                    end = following
                position = following
            if key is not None:
                finish()
    except tarfile.TarError as error:
        raise UserError(f"{url}: no readable tar: {error}; write the shard anew") from None
    if not rows:
        raise UserError(f"{url}: a tar without samples; expected members such as 000001.jpg and 000001.cls")
    return nbytes, np.array(rows, dtype=RECORD)


def write_index(urls: Iterable[str], progress: Any = None) -> int:
    """Writes `index.json` and `index.bin` beside the shards, one for each folder. Returns the number of samples.

    Raises:
        UserError: a bad shard; nothing is written then.
    """
    folders: dict[str, list[tuple[str, int, np.ndarray]]] = {}
    for url in urls:
        folder, name = os.path.split(url)
        folders.setdefault(folder, []).append((name, *scan_shard(url)))
        if progress is not None:
            progress.update()
    for folder, scanned in folders.items():
        table, first = [], 0
        for name, nbytes, records in scanned:
            labels = [int(records["label"].min()), int(records["label"].max())]
            table.append(
                {"name": name, "nbytes": nbytes, "samples": len(records), "first_record": first, "labels": labels}
            )
            first += len(records)
        write_file(f"{folder}/index.bin", b"".join(records.tobytes() for _, _, records in scanned))
        write_file(f"{folder}/index.json", json.dumps({"format": 1, "shards": table}, indent=1).encode())
    return sum(len(records) for scanned in folders.values() for _, _, records in scanned)


def write_file(url: str, data: bytes) -> None:
    """Writes to a temporary name and renames, so that nobody reads half a file."""
    filesystem, path = fsspec.core.url_to_fs(url)
    with filesystem.open(path + ".part", "wb") as file:
        file.write(data)
    filesystem.mv(path + ".part", path)


def load_index(urls: str | Sequence[str], check_sizes: bool = True) -> Index:
    """Looks up each shard in the index beside it.

    Raises:
        UserError: a shard is missing, its index is missing, or they don't fit each other; names the command that
            writes the index.
    """
    shards = []
    tables: dict[str, dict[str, dict]] = {}
    for url in expand_urls(urls):
        size = file_size(url) if check_sizes else None
        folder, name = os.path.split(url)
        if folder not in tables:
            tables[folder] = _read_table(folder, url)
        row = tables[folder].get(name)
        command = f"run: {INDEX_COMMAND} '{folder}/*.tar'"
        if size == 0:
            raise UserError(f"{url}: empty file; write the shard anew")
        if row is None:
            raise UserError(f"{url}: not in {folder}/index.json; {command}")
        if size is not None and size != row["nbytes"]:
            kind = "truncated" if size < row["nbytes"] else "changed"
            raise UserError(
                f"{url}: {kind}: it has {size} bytes, its index says {row['nbytes']}; restore the shard,"
                f" or if the change is meant, {command}"
            )
        shards.append(Shard(url, row["nbytes"], row["samples"], row["first_record"], tuple(row["labels"])))
    return Index(tuple(shards))


def _read_table(folder: str, url: str) -> dict[str, dict]:
    path = f"{folder}/index.json"
    try:
        with fsspec.open(path, "rb") as file:
            table = json.load(file)
        return {row["name"]: row for row in table["shards"]}
    except FileNotFoundError:
        raise UserError(f"{url}: no index beside it ({path}); run: {INDEX_COMMAND} '{folder}/*.tar'") from None
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{path}: not a readable index; run: {INDEX_COMMAND} '{folder}/*.tar'") from None


def load_records(shard: Shard) -> np.ndarray:
    """The records of one shard's samples."""
    url = f"{os.path.dirname(shard.url)}/index.bin"
    data = read_range(url, shard.first_record * RECORD.itemsize, shard.samples * RECORD.itemsize)
    return np.frombuffer(data, dtype=RECORD)


def read_classes(urls: str | Sequence[str]) -> list[str] | None:
    """The labels' names from `classes.json` beside the first shard, or None where there is none."""
    path = f"{os.path.dirname(expand_urls(urls)[0])}/classes.json"
    try:
        with fsspec.open(path, "rb") as file:
            classes = json.load(file)
    except FileNotFoundError:
        return None
    except ValueError:
        classes = None
    if not isinstance(classes, list) or not all(isinstance(name, str) for name in classes):
        raise UserError(f"{path}: expected a JSON list with the name of each class")
    return classes
