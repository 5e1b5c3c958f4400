"""Tar shards and their index: what lies where, so that any sample can be read without reading those before it.

Beside the shards lies one index for each folder: `index.json` names the shards with their sizes and sample counts;
`index.bin` holds one fixed-size record for each sample, so that a worker loads only the records of a shard it reads.
index.json holds a checksum of itself, and one of each block of records in index.bin.
"""

import contextlib
import glob
import hashlib
import json
import os
import re
import zlib
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from typing import Any
from urllib.parse import urlsplit

import fsspec
import numpy as np

from pipeline.data.parallel import in_processes
from pipeline.data.source import Read, ReadConfig, Source, is_http, is_local, is_pipe, is_reference
from pipeline.data.tar import MAX_LABEL, MAX_SAMPLE_BYTES, RECORD, UNLABELLED, Scan, scan_shard
from pipeline.errors import UserError, shorten
from pipeline.files import is_partial_of, write_durably
from pipeline.lease import Lease, acquire
from pipeline.parsing import MAX_JSON_BYTES, check_size, check_size_of, parse_json, read_small
from pipeline.text import base_name, folder_of, has_login, inside, mask_secrets

FORMAT = 3
BLOCK = 4096  # records that are read, and checked, together
INDEX_COMMAND = "python -m pipeline.shards index"
MAX_INDEX_BYTES = 128 << 20  # of index.json: about 400,000 shards
MEMBER_BYTES = 512  # the least that a sample takes in a tar
LEASE_WAIT_SECONDS = 120.0  # for another process that writes the same index, which takes seconds
Rows = dict[str, tuple[dict[str, Any], np.ndarray]]  # of index.json by the shards' names, with their records


@dataclass(frozen=True)
class Shard:
    url: str
    nbytes: int  # size of the whole tar
    samples: int
    first_record: int  # where this shard's records start in index.bin
    labels: tuple[int, int]  # smallest and largest; (-1, -1) without labels
    bad: int  # samples without an image or without a label
    index: str  # the folder of its index
    checks: list[int]  # CRC-32 of each block of its records


@dataclass(frozen=True)
class Index:
    """The shards of one data set, in the order in which they were named.

    Columns instead of objects: a hundred thousand shards take a few megabytes, and workers get them at once.
    """

    urls: list[str]
    columns: np.ndarray  # (shards, 6): nbytes, samples, first_record, smallest and largest label, bad
    folders: list[str]
    folder_numbers: np.ndarray  # (shards,)
    checks: np.ndarray  # (blocks of all shards,), uint32

    def __len__(self) -> int:
        return len(self.urls)

    def shard(self, number: int) -> Shard:
        nbytes, samples, first, low, high, bad = self.columns[number].tolist()
        folder = self.folders[self.folder_numbers[number]]
        end = int(self._check_ends[number])
        checks = self.checks[end - blocks_of(samples) : end].tolist()
        return Shard(self.urls[number], nbytes, samples, first, (low, high), bad, folder, checks)

    @property
    def shards(self) -> Iterator[Shard]:
        return (self.shard(number) for number in range(len(self)))

    @property
    def counts(self) -> np.ndarray:
        return self.columns[:, 1]

    @cached_property
    def samples(self) -> int:
        return int(self.counts.sum())

    @cached_property
    def _check_ends(self) -> np.ndarray:
        return np.cumsum(blocks_of(self.counts))  # (shards,)

    def identity(self) -> str:
        """A digest of the data, whatever the folder it lies in: names, sizes and sample counts of the shards."""
        digest = hashlib.blake2b(self.columns[:, :2].astype("<i8").tobytes(), digest_size=8)
        digest.update("\n".join(map(base_name, self.urls)).encode())
        return digest.hexdigest()


def blocks_of(samples: Any) -> Any:
    """The number of blocks that hold so many records, of one shard or of several (an array)."""
    return -(-samples // BLOCK)


def expand_urls(urls: str | Sequence[str]) -> list[str]:
    """Expands braces (`train-{000..127}.tar`) in one pattern or each of a list.

    Raises:
        UserError: no shard, the same shard twice, or a URL whose password is in the wrong place.
    """
    from braceexpand import braceexpand

    listed = [urls] if isinstance(urls, str) else list(urls)
    expanded = [url for text in listed for url in ([text] if is_pipe(text) else braceexpand(text))]
    if not expanded:
        raise UserError("data: no shard is named; set data.train and data.val")
    seen: set[str] = set()
    for url in expanded:
        if is_reference(url):  # braces may have hidden it from the check of the config
            raise UserError(f"{url}: reference file systems are not read; name the shards themselves")
        if url in seen:
            raise UserError(f"{url}: named twice; each sample would come twice an epoch")
        seen.add(url)
        check_login(url)
    return expanded


def check_login(url: str) -> None:
    """Raises UserError where a library would take a password for something else, and print it."""
    if url.startswith(("s3://", "gs://", "gcs://")) and has_login(url):
        raise UserError(
            f"{url}: no user name or key can stand there; set it in the environment (AWS_ACCESS_KEY_ID, ...)"
        )
    if is_http(url):
        try:
            urlsplit(url).port  # noqa: B018  # reading it checks it
        except ValueError:
            raise UserError(
                f"{url}: no host and port stand there; in a password write / as %2F, ? as %3F and # as %23"
            ) from None


@dataclass(frozen=True)
class Indexed:
    samples: int
    missing_ends: int  # shards without an end mark


def write_index(
    urls: Sequence[str],
    progress: Any = None,
    processes: int = 1,
    folder: str | None = None,
    limits: ReadConfig | None = None,
) -> "Indexed":
    """Writes `index.json` and `index.bin` beside the shards (or all to `folder`).

    Shards that the index had before, and that are not named now, stay in it: of two processes that write the same local
    index, one waits for the other. In remote folders nothing does that: write their indexes one after the other.
    With more than one of `processes`, shards are read at the same time. `progress` has a method `update`.

    Raises:
        UserError: a bad shard, a count that differs from `_info.json` or `sizes.json` beside it, or an index that
            is damaged and has other shards, too; nothing is written then.
    """
    urls = expand_urls(list(urls))
    homes = [home_of(url, folder) for url in urls]
    for url, place in zip(urls, homes, strict=True):
        if is_http(place[0]):
            raise UserError(f"{url}: an index can't be written there; write it elsewhere: index --to FOLDER, and set"
                            " data.index=FOLDER")  # fmt: skip
    if len(set(homes)) < len(homes):
        twice = next(url for url, place in zip(urls, homes, strict=True) if homes.count(place) > 1)
        why = " (of a query only what names a file counts, such as file=)" if is_http(twice) and "?" in twice else ""
        raise UserError(
            f"{twice}: another shard has the same name{why}, and {folder} can hold only one; index them apart"
        )
    scans: dict[str, Scan] = {}
    with contextlib.closing(_scans(urls, processes, limits)) as found:
        for scan in found:
            scans[scan.url] = scan
            if progress is not None:
                progress.update()
    scanned = [scans[url] for url in urls]
    tables: dict[str, Rows] = {}
    for (home, name), shard in zip(homes, scanned, strict=True):
        named = tables.setdefault(home, {})
        labels = shard.records["label"][shard.records["label"] != UNLABELLED]
        low, high = (int(labels.min()), int(labels.max())) if len(labels) else (UNLABELLED, UNLABELLED)
        row = {"name": name, "nbytes": shard.nbytes, "samples": len(shard.records), "labels": [low, high],
               "bad": shard.bad}  # fmt: skip
        named[name] = row, shard.records
    try:
        with contextlib.ExitStack() as stack:
            leases = [_lease(home, stack) for home in sorted(tables)]  # between reading and writing, nobody else writes
            merged = {home: _merged(home, named, limits, beside=folder is None) for home, named in tables.items()}
            for home, shards in merged.items():
                _cross_check(home, {name: row["samples"] for name, (row, _) in shards.items()})
            for home, lease in zip(sorted(tables), leases, strict=True):
                if lease is not None:
                    lease.check()
                    remove_partials(home, r"index\.(json|bin)")
            for home, shards in merged.items():
                _write_table(home, shards)
    except OSError as error:
        raise UserError(
            f"{', '.join(sorted(tables))}: the index can't be written: {error.strerror or error}; free some space, or"
            " write it elsewhere: index --to FOLDER, and set data.index=FOLDER"
        ) from None
    return Indexed(sum(len(shard.records) for shard in scanned), sum(shard.missing_end for shard in scanned))


def _scans(urls: list[str], processes: int, limits: ReadConfig | None) -> Generator[Scan, None, None]:
    """Reads the shards; gives them as they are done."""
    tasks = [(url, limits) for url in urls]
    if processes == 1:
        yield from (scan_shard(*task) for task in tasks)
    else:
        yield from in_processes(scan_shard, tasks, processes)


def _lease(home: str, stack: contextlib.ExitStack) -> Lease | None:
    if not is_local(home):
        return None
    os.makedirs(home, exist_ok=True)
    return stack.enter_context(acquire(home, "index", inside(home, "index.json"), LEASE_WAIT_SECONDS))


def _write_table(home: str, shards: Rows) -> None:
    first, table, blocks = 0, [], []
    for row, records in shards.values():
        parts = [records[begin : begin + BLOCK].tobytes() for begin in range(0, len(records), BLOCK)]
        table.append({**row, "first_record": first, "checks": [zlib.crc32(part) for part in parts]})
        first += len(records)
        blocks += parts
    write_file(inside(home, "index.bin"), b"".join(blocks))
    content = {"format": FORMAT, "check": _check_of(table), "shards": table}
    write_file(inside(home, "index.json"), json.dumps(content, indent=1).encode())


def _check_of(table: list[dict]) -> str:
    return hashlib.blake2b(json.dumps(table).encode(), digest_size=8).hexdigest()


def home_of(url: str, folder: str | None) -> tuple[str, str]:
    """The folder of a shard's index, and the shard's name there."""
    home, name = ("", mask_secrets(url)) if is_pipe(url) else (folder_of(url), base_name(url))
    if folder is None and is_pipe(url):
        raise UserError(f"{url}: a command has no folder for its index; name one: index --to FOLDER, data.index=FOLDER")
    return (folder.rstrip("/") if folder else home or "."), name


def _merged(home: str, named: Rows, limits: ReadConfig | None, beside: bool) -> Rows:
    """The rows of `named`, and those that the index of a folder has of other shards.

    `beside`: the shards lie beside the index, so those that are no longer there are left out.

    Raises:
        UserError: rows of other shards can't be read, and so would be lost.
    """
    source = Source(limits or ReadConfig())
    try:
        table = _read_table(home, source)
    except FileNotFoundError:
        return named
    except UserError as error:
        if not (beside and is_local(home)):  # nobody knows which shards it had
            raise UserError(f"{error}; or remove it and index all of its shards again") from None
        others = {os.path.basename(path) for path in glob.glob(f"{glob.escape(home)}/*.tar")} - set(named)
        if others:
            raise UserError(f"{error} (it may have shards that are not named now, such as {min(others)})") from None
        return named
    rows: Rows = {}
    for name, row in table.items():
        if name in named:
            rows[name] = named[name]
        elif not (beside and is_local(home)) or os.path.exists(f"{home}/{name}"):
            shard = Shard(
                name, row["nbytes"], row["samples"], row["first_record"], row["labels"], row["bad"], home, row["checks"]
            )
            rows[name] = row, load_records(shard, source.read)
    return {**rows, **named}


def _cross_check(home: str, counts: dict[str, int]) -> None:
    """Compares with what timm (`_info.json`) and open_clip (`sizes.json`) have counted, where that lies there."""
    claims: dict[str, dict[str, int]] = {}
    for source, counts_in in (("sizes.json", _open_clip_counts), ("_info.json", _timm_counts)):
        try:
            claims[source] = counts_in(parse_json(_read_all(f"{home}/{source}", Source())))
        except FileNotFoundError:
            pass
        except UserError:
            raise
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError):
            raise UserError(f"{home}/{source}: no readable sample counts; mend or remove it") from None
    for source, claimed in claims.items():
        for name, count in claimed.items():
            if name in counts and counts[name] != count:
                raise UserError(
                    f"{home}/{name}: {counts[name]} samples, but {source} beside it says {count}; mend the shard, or"
                    f" {source} if that is stale"
                )


def _open_clip_counts(content: Any) -> dict[str, int]:
    return {str(name): int(count) for name, count in content.items()}


def _timm_counts(content: Any) -> dict[str, int]:
    return {
        name: int(count)
        for split in content["splits"].values()
        for name, count in zip(split["filenames"], split["shard_lengths"], strict=True)
    }


def remove_partials(folder: str, final: str) -> None:
    """Removes what killed processes have left of local files (a regular expression), which nobody writes now."""
    for name in os.listdir(folder):
        if is_partial_of(name, final):
            with contextlib.suppress(OSError):
                os.remove(os.path.join(folder, name))


def write_file(url: str, data: bytes) -> None:
    """Writes so that nobody reads half a file: a local one is renamed when it is whole, an object appears then."""
    if not is_local(url):
        filesystem, path = fsspec.core.url_to_fs(url)
        filesystem.pipe_file(path, data)
        return
    os.makedirs(os.path.dirname(url) or ".", exist_ok=True)
    write_durably(url, data)


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
    checks: list[int] = []
    numbers = np.empty(len(listed), dtype=np.int32)
    seen: set[tuple[str, str]] = set()
    for place, (url, size) in enumerate(zip(listed, sizes, strict=True)):
        home, name = home_of(url, folder)
        if home not in tables:
            try:
                tables[home] = _read_table(home, source)
            except FileNotFoundError as error:
                raise UserError(f"{url}: no index beside it ({error}); {_rewrite(home)}") from None
        if (home, name) in seen:
            raise UserError(
                f"{url}: another shard has the same name in {inside(home, 'index.json')}; rename one of them"
            )
        seen.add((home, name))
        row = tables[home].get(name)
        command = _rewrite(home)
        if size == 0:
            raise UserError(f"{url}: empty file; write the shard anew")
        if row is None:
            raise UserError(f"{url}: not in {inside(home, 'index.json')}; {command}")
        if size is not None and size != row["nbytes"]:
            kind = "truncated" if size < row["nbytes"] else "changed"
            raise UserError(
                f"{url}: {kind}: it has {size} bytes, its index says {row['nbytes']}; restore the shard,"
                f" or if the change is meant, {command}"
            )
        columns[place] = row["nbytes"], row["samples"], row["first_record"], *row["labels"], row["bad"]
        checks += row["checks"]
        numbers[place] = list(tables).index(home)
    return Index(listed, columns, list(tables), numbers, np.array(checks, dtype=np.uint32))


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


def _rewrite(home: str) -> str:
    return f"run: {INDEX_COMMAND} '{inside(home, '*.tar')}'"


def _read_table(home: str, source: Source) -> dict[str, dict]:
    """The rows of index.json by the names of their shards.

    Raises:
        UserError: damaged, or of another format.
        FileNotFoundError: there is none.
    """
    path = inside(home, "index.json")
    problem = "its content does not match its checksum"
    try:
        content = parse_json(_read_all(path, source, MAX_INDEX_BYTES), MAX_INDEX_BYTES)
        found, table = content["format"], content["shards"]
        if found == FORMAT and content["check"] == _check_of(table):
            wrong = next(filter(None, map(_wrong_in, table)), None)
            if wrong is None:
                return {row["name"]: row for row in table}
            problem = wrong
    except FileNotFoundError:
        raise FileNotFoundError(path) from None
    except UserError:
        raise
    except (KeyError, TypeError, RecursionError, json.JSONDecodeError, UnicodeDecodeError):
        found = FORMAT
    except ValueError as error:
        found, problem = FORMAT, str(error)
    if found != FORMAT:
        raise UserError(f"{path}: written in format {shorten(found)}, expected {FORMAT}; {_rewrite(home)}")
    raise UserError(f"{path}: damaged: {problem}; {_rewrite(home)}")


def _wrong_in(row: dict[str, Any]) -> str | None:
    """What in a row of index.json no index of ours has. Its checksum is no proof: anyone can compute one."""
    name, nbytes, samples, checks = row["name"], row["nbytes"], row["samples"], row["checks"]
    numbers = [nbytes, samples, row["first_record"], row["bad"], *row["labels"], *checks]
    if type(name) is not str or any(type(number) is not int for number in numbers):
        return f"a shard's row is not as expected: {shorten(row, 200)}"
    low, high = row["labels"]
    # So many samples need so many bytes: counts that would take all memory show before it is taken.
    fits = 0 <= nbytes < 1 << 62 and 0 <= samples <= nbytes // MEMBER_BYTES and 0 <= row["bad"] <= samples
    fits = fits and UNLABELLED <= low <= high <= MAX_LABEL and 0 <= row["first_record"] < 1 << 56
    if not fits or len(checks) != blocks_of(samples) or not all(0 <= check < 1 << 32 for check in checks):
        return f"impossible numbers for {shorten(name)}: {shorten({**row, 'checks': len(checks)}, 200)}"
    return None


def _read_all(path: str, source: Source, most: int = MAX_JSON_BYTES) -> bytes:
    """The content of a small file.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it has more than `most` bytes.
        UserError: it can't be read.
    """
    if is_http(path):
        try:
            nbytes = source.size(path)
            check_size(nbytes, most)
            return source.read(path, 0, nbytes)
        except UserError as error:
            # A signature for the shard alone gives no access to the files next to it, whether or not they exist.
            if "not found" in str(error) or ("?" in path and re.search(r"the server says 40[13]\b", str(error))):
                raise FileNotFoundError(path) from None
            raise
    try:
        if is_local(path):
            return read_small(path, most)
        with fsspec.open(path, "rb") as file:
            return check_size_of(file.read(most + 1), most)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise UserError(f"{path}: can't be read: {error.strerror or error}") from None


def load_records(shard: Shard, read: Read | None = None, block: int | None = None) -> np.ndarray:
    """The records of one shard's samples, or those of one block of them, read by `read`.

    Raises:
        UserError: they can't be read, or don't match their checksums.
    """
    blocks = range(blocks_of(shard.samples)) if block is None else range(block, block + 1)
    begin, end = blocks.start * BLOCK, min(blocks.stop * BLOCK, shard.samples)
    path, size = inside(shard.index, "index.bin"), RECORD.itemsize
    try:
        data = (read or Source().read)(path, (shard.first_record + begin) * size, (end - begin) * size)
    except UserError as error:
        for reason in ("not found", "truncated"):
            if reason in str(error):
                raise UserError(f"{path}: {reason}; {_rewrite(shard.index)}") from None
        raise
    for place, number in enumerate(blocks):
        part = memoryview(data)[place * BLOCK * size : (place + 1) * BLOCK * size]
        if zlib.crc32(part) != shard.checks[number]:
            raise UserError(
                f"{path}: damaged between bytes {(shard.first_record + number * BLOCK) * size} and"
                f" {(shard.first_record + number * BLOCK) * size + len(part)}: the records of {shard.url} don't match"
                f" their checksum in index.json; {_rewrite(shard.index)}"
            )
    records = np.frombuffer(data, dtype=RECORD)
    _check_records(path, shard, records, begin)
    return records


def _check_records(path: str, shard: Shard, records: np.ndarray, first: int) -> None:
    """Raises UserError where samples don't lie in their shard, one after the other, or are larger than one may be."""
    offsets, nbytes = records["offset"], records["nbytes"]
    outside = (offsets > shard.nbytes) | (nbytes > shard.nbytes - np.minimum(offsets, shard.nbytes))
    wrong = outside | (nbytes > MAX_SAMPLE_BYTES) | (records["label"] < UNLABELLED) | (records["label"] > MAX_LABEL)
    wrong[1:] |= offsets[1:] < offsets[:-1] + nbytes[:-1]
    if wrong.any():
        place = int(wrong.argmax())
        row = records[place]
        raise UserError(
            f"{path}: damaged: record {first + place} of {shard.url} has {row['nbytes']} bytes at byte {row['offset']}"
            f" and label {row['label']}; expected at most {MAX_SAMPLE_BYTES} bytes, behind the sample before it and"
            f" within the shard's {shard.nbytes} bytes; {_rewrite(shard.index)}"
        )


def read_classes(urls: str | Sequence[str], source: Source | None = None) -> list[str] | None:
    """The labels' names from `classes.json` beside the first shard, or None where there is none."""
    first = expand_urls(urls)[0]
    if is_pipe(first):
        return None
    path = inside(folder_of(first), "classes.json")
    try:
        classes = parse_json(_read_all(path, source or Source()))
    except FileNotFoundError:
        return None
    except UserError:
        raise
    except ValueError as error:
        raise UserError(f"{path}: expected a JSON list with the name of each class: {error}") from None
    if not isinstance(classes, list) or not all(isinstance(name, str) for name in classes):
        raise UserError(f"{path}: expected a JSON list with the name of each class")
    return classes
