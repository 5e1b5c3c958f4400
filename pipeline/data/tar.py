"""Tar shards as webdataset reads them, and the records that say where each sample lies.

Members whose names agree up to the first dot of the file name are one sample: `n01/17.jpg` and `n01/17.cls`.
"""

import hashlib
import io
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from json.encoder import encode_basestring_ascii as quoted
from typing import Any

import numpy as np

from pipeline.data.archive import FILE, FOLDER, Archive, Member
from pipeline.data.parallel import check_stop
from pipeline.data.source import Data, ReadConfig, Source, is_local, is_pipe
from pipeline.errors import UserError

IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp")
RECORD = np.dtype([("offset", "<u8"), ("nbytes", "<u4"), ("label", "<i4"), ("digest", "<u8")])
# Size and type of a file or a pax header in ustar's format, without a prefix to its name.
PLAIN_HEADER = re.compile(rb"(?s).{124}([0-7]{11})[\0 ].{20}([0x]).{100}ustar.{83}\0")
# Key and suffix in a header's first 100 bytes, cut at the first dot of the file name.
PLAIN_NAME = re.compile(rb"(?!__)(?=[ -~]{1,100}\0)((?:[^\0]*/)?[^.\0/]+)\.([^/\0]*)\0")
PAX_TIMES = re.compile(rb"(?:\d+ [amc]time=[\d.]+\n)+")  # a header that changes neither name nor size
MAX_SAMPLE_BYTES = 1 << 28  # a larger sample is not read: it is a bad one
MAX_LABEL_BYTES = 64  # of a member cls
UNLABELLED = -1
MAX_LABEL = 999_999_999
NO_SAMPLES = "a tar without samples; expected members such as 000001.jpg and 000001.cls"


def parse_tar(data: Data, url: str) -> list[dict[str, Any]]:
    """Samples of a run of whole tar members, by webdataset's conventions: {"__key__": ..., "png": bytes, ...}.

    Raises:
        UserError: damaged headers.
    """
    samples = plain_samples(data)
    return strict_samples(data, url) if samples is None else samples


def strict_samples(data: Data, url: str, origin: int = 0) -> list[dict[str, Any]]:
    """The same of any kind of tar. Checks each header's checksum, too; `origin` is where `data` begins in the file."""
    archive = Archive(io.BytesIO(data), url, allow_missing_end=True, origin=origin)
    return [{"__key__": found.key, **found.contents} for found in grouped(archive, lambda suffix, nbytes: True)]


def plain_samples(data: Data) -> list[dict[str, Any]] | None:
    """The samples of a run of plain ustar files, as webdataset's writer makes them; None where anything else is there.

    Their members are views of `data`. webdataset's own stages take 80 us a sample for the same (150 with times in pax
    headers, as its writer leaves them), a fifth of a small image's decoding. Header checksums are not verified: what is
    read is compared with the index, so a damaged name or size shows.
    """
    samples: list[dict[str, Any]] = []
    sample: dict[str, Any] = {}
    last, begin, view = b"", 0, memoryview(data)
    while begin < len(data):
        header = PLAIN_HEADER.match(data, begin)
        if header is None:
            return None
        start = begin + 512
        end = start + int(header[1], 8)
        if end > len(data):
            return None
        if header[2] == b"0":
            found = PLAIN_NAME.match(data, begin)
            if found is None:
                return None
            name, suffix = found[1], found[2].decode().lower()
            if name != last or suffix in sample:
                last, sample = name, {"__key__": name.decode()}
                samples.append(sample)
            sample[suffix] = view[start:end]
        elif not PAX_TIMES.fullmatch(data, start, end):
            return None
        begin = (end + 511) // 512 * 512
    return samples


@dataclass(slots=True)
class Found:
    """A sample in a tar."""

    key: str
    begin: int  # the first byte of its first member's headers
    end: int = 0
    sizes: dict[str, int] = field(default_factory=dict)  # by suffix
    contents: dict[str, bytes] = field(default_factory=dict)  # of those members that were read


def grouped(archive: Archive, wanted: Callable[[str, int], bool]) -> Iterator[Found]:
    """Joins adjacent members with the same key; reads those whose suffix and size are `wanted`.

    A suffix that comes again starts another sample with the same key. What makes a sample larger than MAX_SAMPLE_BYTES
    is not read.

    Raises:
        UserError: a link or a device with the name of a sample's member. tar stores the second of two hard links as a
            link, and webdataset passes over it, so its sample would be lost.
    """
    sample: Found | None = None
    for member in archive:
        key, suffix = member_key(member)
        if key is None:
            continue
        if member.kind != FILE:
            fix = "with --dereference --hard-dereference" if member.kind.endswith("link") else "without it"
            raise UserError(
                f"{archive.url}: {member.name} at byte {archive.origin + member.begin} is a {member.kind}, expected a"
                f" regular file; write the tar {fix}"
            )
        if sample is None or key != sample.key or suffix in sample.sizes:
            if sample is not None:
                yield sample
            sample = Found(key, member.begin)
        sample.sizes[suffix], sample.end = member.nbytes, member.end
        fits = member.end - sample.begin <= MAX_SAMPLE_BYTES or member.nbytes <= MAX_LABEL_BYTES
        if fits and wanted(suffix, member.nbytes):
            sample.contents[suffix] = archive.read(member)
    if sample is not None:
        yield sample


def member_key(member: Member) -> tuple[str | None, str]:
    """Key and suffix of a member as webdataset splits its name; no key where webdataset passes over it."""
    key, suffix = split_name(member.name)
    if member.kind == FOLDER or key is None or re.match(r"__[^/]*__($|/)", member.name):
        return None, ""
    return key, suffix.lower()


def split_name(name: str) -> tuple[str | None, str]:
    """What webdataset's `base_plus_ext` gives, whose time grows with the square of the name's length: it searches for
    `^((?:.*/|)[^.]+)[.]([^/]*)$`. Key and suffix are split at the first dot of the file name.
    """
    dot = name.find(".", name.rfind("/") + 1)
    if dot < 0:
        return None, ""
    line_end = name.find("\n", 0, dot)
    begin = name.rfind("/", 0, dot if line_end < 0 else line_end) + 1
    if begin == dot and begin:  # a hidden file
        begin = name.rfind("/", 0, begin - 1) + 1
    if begin == dot or "." in name[begin:dot]:
        return None, ""
    return name[:dot], name[dot + 1 :]


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
    label = label_in(sample["cls"])
    if label == UNLABELLED:
        found = bytes(sample["cls"][:40]).decode(errors="replace")
        raise UserError(f"{where}: the member cls holds {found!r}, expected the class as a whole number")
    return label


def label_in(content: bytes | memoryview) -> int:
    """The class in a member `cls`; UNLABELLED where there is none."""
    text = bytes(content).strip() if len(content) <= MAX_LABEL_BYTES else b""
    return int(text) if text.isdigit() and len(text) <= 9 else UNLABELLED


def leaves_folder(name: str) -> bool:
    """Whether a member of that name would be unpacked outside of its folder."""
    return name.startswith("/") or ".." in name.split("/")


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


@dataclass(frozen=True)
class Scan:
    """What one shard holds."""

    url: str
    nbytes: int
    records: np.ndarray  # (N,), RECORD
    bad: int  # samples that lack an image or a readable class
    missing_end: bool


def scan_shard(url: str, limits: ReadConfig | None = None) -> Scan:
    """Reads one shard's headers and classes (all of it, where it can only be streamed).

    Raises:
        UserError: missing, empty, damaged, no tar, or without a sample that has an image.
    """
    limits = limits or ReadConfig()
    source = Source(limits)
    if is_pipe(url):
        stream = StreamFile(source.stream(url))
        archive = Archive(io.BufferedReader(stream, 1 << 20), url, limits.allow_missing_end)
        records, bad = _scan(url, archive)
        return Scan(url, stream.nbytes, records, bad, archive.missing_end)
    nbytes = source.size(url)
    if nbytes == 0:
        raise UserError(f"{url}: empty file; write the shard anew")
    try:
        with open(url, "rb") if is_local(url) else io.BufferedReader(RangeFile(source, url, nbytes), 1 << 20) as file:
            archive = Archive(file, url, limits.allow_missing_end)
            records, bad = _scan(url, archive)
    except OSError as error:
        raise UserError(f"{url}: can't be read: {error.strerror or error}") from None
    return Scan(url, nbytes, records, bad, archive.missing_end)


def _scan(url: str, archive: Archive) -> tuple[np.ndarray, int]:
    rows: list[tuple[int, int, int, int]] = []
    lacking: list[str] = []
    for sample in grouped(archive, lambda suffix, nbytes: suffix == "cls" and nbytes <= MAX_LABEL_BYTES):
        check_stop()
        where, label = f"{url}: sample {sample.key}", label_in(sample.contents.get("cls", b""))
        if not any(suffix in sample.sizes for suffix in IMAGE_SUFFIXES):
            lacking.append(
                f"{where}: no image among its members ({', '.join(sorted(sample.sizes))}); expected one of"
                f" {', '.join(IMAGE_SUFFIXES)}"
            )
        elif label == UNLABELLED:
            lacking.append(f"{where}: no label; expected a member cls with the class as a whole number")
        nbytes = sample.end - sample.begin
        digest = digest_of(sample.key, sample.sizes)
        rows.append((sample.begin, nbytes if nbytes <= MAX_SAMPLE_BYTES else 0, label, digest))
    if not rows:
        raise UserError(f"{url}: {NO_SAMPLES}")
    if len(lacking) == len(rows):
        raise UserError(lacking[0])
    return np.array(rows, dtype=RECORD), len(lacking)
