"""Tar shards as webdataset reads them, and the records that say where each sample lies.

Members whose names agree up to the first dot of the file name are one sample: `n01/17.jpg` and `n01/17.cls`.
"""

import hashlib
import io
import os
import re
import tarfile
from collections.abc import Iterator
from json.encoder import encode_basestring_ascii as quoted
from typing import Any

import numpy as np

from pipeline.data.source import Data, ReadConfig, Source, is_local, is_pipe
from pipeline.errors import UserError

IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp")
RECORD = np.dtype([("offset", "<u8"), ("nbytes", "<u4"), ("label", "<i4"), ("digest", "<u8")])
# Key and suffix in a header's first 100 bytes, cut at the first dot of the file name.
PLAIN_NAME = re.compile(rb"(?!__)(?=[ -~]{1,100}\0)((?:[^\0]*/)?[^.\0/]+)\.([^/\0]*)\0")
PAX_TIMES = re.compile(rb"(?:\d+ [amc]time=[\d.]+\n)+")  # a header that changes neither name nor size
MAX_SAMPLE_BYTES = 1 << 28  # a larger sample is not read: it is a bad one
UNLABELLED = -1


def parse_tar(data: Data, url: str) -> Iterator[dict[str, Any]]:
    """Samples of a run of whole tar members, by webdataset's own conventions: {"__key__": ..., "png": bytes, ...}."""
    samples = plain_samples(data)
    return parse_stream(io.BytesIO(data), url) if samples is None else iter(samples)


def plain_samples(data: Data) -> list[dict[str, Any]] | None:
    """The samples of a run of plain ustar files, as webdataset's writer makes them; None where anything else is there.

    Their members are views of `data`. webdataset's own stages take 80 us a sample for the same (150 with times in pax
    headers, as its writer leaves them), a fifth of a small image's decoding; what is read is compared with the index,
    so a damaged header shows.
    """
    samples: list[dict[str, Any]] = []
    sample: dict[str, Any] = {}
    begin, view = 0, memoryview(data)
    while begin < len(data):
        header = data[begin : begin + 512]
        size, kind = header[124:135], header[156:157]
        if header[257:262] != b"ustar" or header[345:346] != b"\0" or not size.isdigit():  # 345: a prefix to the name
            return None
        begin += 512
        end = begin + int(size, 8)
        if end > len(data):
            return None
        if kind == b"0":
            found = PLAIN_NAME.match(header)
            if found is None:
                return None
            key, suffix = found[1].decode(), found[2].decode().lower()
            if key != sample.get("__key__"):
                sample = {"__key__": key}
                samples.append(sample)
            elif suffix in sample:
                return None
            sample[suffix] = view[begin:end]
        elif kind != b"x" or not PAX_TIMES.fullmatch(data, begin, end):
            return None
        begin = (end + 511) // 512 * 512
    return samples


def parse_stream(file: Any, url: str) -> Iterator[dict[str, Any]]:
    """The same of an open file."""
    from webdataset.tariterators import group_by_keys, tar_file_iterator

    return group_by_keys({**member, "__url__": url} for member in tar_file_iterator(file))


def sample_digest(sample: dict[str, Any]) -> int:
    """A 64-bit digest of a sample's key and the names and sizes of its members: what the index promises of it."""
    return digest_of(sample["__key__"], {k: len(v) for k, v in sample.items() if not k.startswith("__")})


def digest_of(key: str, sizes: dict[str, int]) -> int:
    # As json.dumps writes [key, [[name, size], ...]], in a third of its time.
    members = ", ".join([f"[{quoted(name)}, {size}]" for name, size in sorted(sizes.items())])
    facts = f"[{quoted(key)}, [{members}]]"
    return int.from_bytes(hashlib.blake2b(facts.encode(), digest_size=8).digest(), "little")


def label_of(sample: dict[str, Any], where: str) -> int:
    """The class of a sample.

    Raises:
        UserError: it has no `cls`, or one that is no whole number.
    """
    if "cls" not in sample:
        raise UserError(f"{where}: no label; expected a member cls with the class as a whole number")
    text = bytes(sample["cls"]).strip()
    if not text.isdigit() or len(text) > 9:
        found = text[:40].decode(errors="replace")
        raise UserError(f"{where}: the member cls holds {found!r}, expected the class as a whole number")
    return int(text)


class RangeFile(io.RawIOBase):
    """A remote file as tarfile wants it: seeking costs nothing, reading fetches ranges."""

    def __init__(self, source: Source, url: str, nbytes: int):
        self.source, self.url, self.nbytes, self.position = source, url, nbytes, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self.position = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self.position, os.SEEK_END: self.nbytes}[whence]
        return self.position

    def readinto(self, buffer: Any) -> int:
        wanted = min(len(buffer), max(self.nbytes - self.position, 0))
        if wanted:
            buffer[:wanted] = self.source.read(self.url, self.position, wanted)
        self.position += wanted
        return wanted


class StreamFile(io.RawIOBase):
    """A file of unknown length that can only be read once, from its beginning."""

    def __init__(self, chunks: Iterator[bytes]):
        self.chunks, self.rest, self.nbytes = chunks, b"", 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        self.rest = self.rest or next(self.chunks, b"")
        count = min(len(buffer), len(self.rest))
        buffer[:count], self.rest = self.rest[:count], self.rest[count:]
        self.nbytes += count
        return count


def scan_shard(url: str, limits: ReadConfig | None = None) -> tuple[int, np.ndarray, int]:
    """Reads one shard's headers and classes (all of it, where it can only be streamed).

    Returns its size, its records and the number of its samples that lack an image or a readable class.

    Raises:
        UserError: missing, empty, truncated, no tar, or without a sample that has an image.
    """
    source = Source(limits or ReadConfig())
    if is_pipe(url):
        stream = StreamFile(source.stream(url))
        records, bad = _scan(url, io.BufferedReader(stream, 1 << 20), "r|", None)
        while stream.read(1 << 20):  # what follows the tar's end mark belongs to the file's size
            pass
        return stream.nbytes, records, bad
    nbytes = source.size(url)
    if nbytes == 0:
        raise UserError(f"{url}: empty file; write the shard anew")
    if is_local(url):
        with open(url, "rb") as local:
            return nbytes, *_scan(url, local, "r:", nbytes)
    return nbytes, *_scan(url, io.BufferedReader(RangeFile(source, url, nbytes), 1 << 20), "r:", nbytes)


def member_key(member: tarfile.TarInfo) -> tuple[str | None, str]:
    """Key and suffix of a member as webdataset splits its name; no key where webdataset passes over it."""
    from webdataset.tariterators import base_plus_ext

    key, suffix = base_plus_ext(member.name)
    if not member.isreg() or key is None or re.match(r"__[^/]*__($|/)", member.name):
        return None, ""
    return key, suffix.lower()


def _scan(url: str, file: Any, mode: str, nbytes: int | None) -> tuple[np.ndarray, int]:
    rows: list[tuple[int, int, int, int]] = []
    lacking: list[str] = []
    key: str | None = None
    sizes: dict[str, int] = {}
    label, begin, end = UNLABELLED, 0, 0

    def finish() -> None:
        where = f"{url}: sample {key}"
        if not any(suffix in sizes for suffix in IMAGE_SUFFIXES):
            lacking.append(
                f"{where}: no image among its members ({', '.join(sorted(sizes))}); expected one of"
                f" {', '.join(IMAGE_SUFFIXES)}"
            )
        elif label == UNLABELLED:
            lacking.append(f"{where}: no label; expected a member cls with the class as a whole number")
        stored = end - begin if end - begin <= MAX_SAMPLE_BYTES else 0
        rows.append((begin, stored, label, digest_of(str(key), sizes)))

    try:
        with tarfile.open(fileobj=file, mode=mode) as tar:  # type: ignore[call-overload]
            position = 0
            for member in tar:
                following = member.offset_data + (member.size + 511) // 512 * 512
                if nbytes is not None and following > nbytes:
                    raise UserError(
                        f"{url}: truncated at byte {nbytes}: the member {member.name} ends at {following};"
                        " copy or write the shard anew"
                    )
                stem, suffix = member_key(member)
                if stem is not None:
                    if stem != key or suffix in sizes:
                        if key is not None:
                            finish()
                        key, sizes, label, begin = stem, {}, UNLABELLED, position
                    sizes[suffix] = member.size
                    end = following
                    if suffix == "cls" and member.size < 64:
                        content = tar.extractfile(member)
                        assert content is not None
                        text = content.read().strip()
                        label = int(text) if re.fullmatch(rb"\d{1,9}", text) else UNLABELLED
                position = following
                tar.members = []  # or a large shard's headers pile up
            if key is not None:
                finish()
    except tarfile.TarError as error:
        raise UserError(f"{url}: no readable tar: {error}; write the shard anew") from None
    if not rows:
        raise UserError(f"{url}: a tar without samples; expected members such as 000001.jpg and 000001.cls")
    if len(lacking) == len(rows):
        raise UserError(lacking[0])
    return np.array(rows, dtype=RECORD), len(lacking)
