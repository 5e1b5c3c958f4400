"""Mutated shards: no traceback, no hang, and every sample is trained on once or named.

Headers have checksums, contents have none: an image whose bytes have changed is a sample like any other, if it can be
decoded. So is what the mutation of a name or a label makes of a shard that is indexed only afterwards.
"""

import io
import os
import random
import re
import signal
import tarfile
from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
import webdataset
from PIL import Image
from webdataset.tariterators import base_plus_ext

from pipeline.data.augment import resize
from pipeline.data.decode import decode
from pipeline.data.index import load_index, load_records, write_index
from pipeline.data.loader import DataConfig, Loader, evaluation_stream
from pipeline.data.order import Order
from pipeline.data.reader import OrderedSamples, ResampledSamples
from pipeline.data.source import Source
from pipeline.data.tar import MAX_LABEL_BYTES
from pipeline.data.verify import verify_shard
from pipeline.errors import UserError
from pipeline.runtime import Ranks

CLASSES = 1000
SECONDS = 10  # for all that is done with one mutated shard
FORMATS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}
DIALECTS = ["ours", "webdataset", "ustar", "gnu", "pax"]
NAMES = ["n01/00", "01", "a/b.c/02", "d" * 120 + "/long" * 30 + "/03", "späß/04-" + "ü" * 60, "with space 05"]


# ---- shards


def png(seed):
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (6, 6, 3), np.uint8)).save(file, "PNG")
    return file.getvalue()


def shard(dialect):
    """A small shard as its bytes."""
    file = io.BytesIO()
    if dialect in ("ours", "webdataset"):  # the latter with times in pax headers
        with webdataset.TarWriter(file, mtime=0 if dialect == "ours" else 1_700_000_000.1234567) as writer:
            for number in range(6):
                writer.write({"__key__": f"train-{number:08d}", "png": png(number), "cls": str(100 + number)})
        return file.getvalue()
    header = {"comment": "all"} if dialect == "pax" else None
    with tarfile.open(fileobj=file, mode="w", format=FORMATS[dialect], pax_headers=header) as tar:
        for number, name in enumerate(NAMES):
            name = name if dialect != "ustar" else name.encode("ascii", "ignore").decode()[-90:].lstrip("/")
            for suffix, content in ((".PNG", png(number)), (".cls", b"%d\n" % (100 + number)), (".json", b"{}")):
                info = tarfile.TarInfo(name + suffix)
                info.size, info.mtime = len(content), 1_700_000_000
                tar.addfile(info, io.BytesIO(content))
            if number % 3 == 1:
                folder = tarfile.TarInfo(f"folder{number}")
                folder.type = tarfile.DIRTYPE
                tar.addfile(folder)
    return file.getvalue()


Sample = tuple[str, dict[str, bytes]]  # key, and contents by suffix


def reference(data) -> list[Sample] | None:
    """What tarfile and webdataset's rules make of a tar.

    None where tarfile stops before a valid end, and of what is not supported: a sample's member that is no regular
    file, and unknown types of members.
    """
    samples: list[Sample] = []
    data = padded_with_zeros(data)
    try:
        with tarfile.open(fileobj=io.BytesIO(data), mode="r:") as tar:
            for member in tar:
                if member.issparse() or any(k in tar.pax_headers for k in ("path", "size")):
                    return None
                key, suffix = base_plus_ext(member.name)
                if member.type not in tarfile.SUPPORTED_TYPES:
                    return None
                if member.isdir() or key is None or re.match(r"__[^/]*__($|/)", member.name):
                    continue
                if not member.isreg():
                    return None
                suffix = suffix.lower()
                if not samples or samples[-1][0] != key or suffix in samples[-1][1]:
                    samples.append((key, {}))
                samples[-1][1][suffix] = tar.extractfile(member).read()
            rest = data[tar.offset :]
    except (tarfile.TarError, ValueError, OSError, OverflowError):
        return None
    return samples if len(rest) >= 1024 and not rest.strip(b"\0") else None


def padded_with_zeros(data):
    """With zeros behind pax records. They say where they end; since 2024 tarfile refuses anything else behind them."""
    new, begin = bytearray(data), 0
    while begin < len(data):
        try:
            info = tarfile.TarInfo.frombuf(data[begin : begin + 512], "utf-8", "surrogateescape")
        except tarfile.HeaderError:
            break
        extended = info.type in (tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE)
        named = info.type in (tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK)
        has_content = extended or named or info.isreg() or info.type not in tarfile.SUPPORTED_TYPES
        end = begin + 512 + (max(info.size, 0) if has_content else 0)
        begin = min(end + -end % 512, len(data))
        if extended and end < begin:
            new[end:begin] = bytes(begin - end)
    return bytes(new)


def truth(sample: Sample) -> tuple[str, bytes, int] | None:
    """Key, image and label; None of a sample that can't be trained on."""
    key, contents = sample
    label = contents.get("cls", b"").strip()
    if "png" not in contents or not re.fullmatch(rb"\d{1,9}", label) or len(contents["cls"]) > MAX_LABEL_BYTES:
        return None
    return None if key.startswith("/") or ".." in key.split("/") or int(label) >= CLASSES else (
        key, contents["png"], int(label)
    )  # fmt: skip


# ---- mutations


@dataclass
class Mutation:
    data: bytes
    what: str
    repaired: bool = False  # header checksums were made to fit


def ends_of_members(data):
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        return [0, *[m.offset_data + -(-m.size // 512) * 512 for m in tar.getmembers()]]


def headers(data):
    """Where blocks are that tarfile takes for headers."""
    found = []
    for begin in range(0, len(data), 512):
        try:
            tarfile.TarInfo.frombuf(data[begin : begin + 512], "utf-8", "surrogateescape")
            found.append(begin)
        except tarfile.HeaderError:
            pass
    return found


def flip(rng, data):
    new = bytearray(data)
    used = data.rstrip(b"\0")
    places = [rng.randrange(len(used)) for _ in range(rng.choice([1, 1, 1, 2, 5]))]
    for place in places:
        new[place] ^= 1 << rng.randrange(8)
    return f"bits flipped at {places}", bytes(new)


def flip_header(rng, data):
    new, begin = bytearray(data), rng.choice(headers(data))
    place = begin + rng.choice([rng.randrange(512), rng.randrange(100), 124 + rng.randrange(12), 156, 257])
    new[place] = rng.choice([0, 32, 48, 55, 57, 120, 255, new[place] ^ 1])
    return f"byte {place} set to {new[place]}", bytes(new)


def repaired_header(rng, data):
    """A header that was changed with its checksum: another name, size, type, or a prefix."""
    new, begin = bytearray(data), rng.choice(headers(data))
    place = begin + rng.choice([rng.randrange(20), 124 + rng.randrange(12), 134, 156, 156, 257, 345])
    new[place] = rng.choice([*b"\x00 .01789/_xgLKSV", 0x80, 0xFF])
    new[begin + 148 : begin + 156] = b" " * 8
    new[begin + 148 : begin + 156] = b"%06o\0 " % sum(new[begin : begin + 512])
    return f"byte {place} set to {new[place]}, checksum repaired", bytes(new)


def cut(rng, data):
    place = rng.choice([rng.randrange(len(data)), rng.choice(ends_of_members(data)), rng.randrange(0, len(data), 512)])
    place += rng.choice([0, 0, 200])
    if rng.random() < 0.5:
        return f"cut at {place}", data[:place]
    return f"cut at {place}, zeros behind", data[:place].ljust(len(data), b"\0")


def zero(rng, data):
    begin = rng.choice([rng.randrange(len(data)), rng.randrange(0, len(data), 512), rng.choice(headers(data))])
    nbytes = rng.choice([1, 100, 512, 1024, 4096])
    return f"{nbytes} zeros at {begin}", (data[:begin] + bytes(nbytes) + data[begin + nbytes :])[: len(data)]


def concatenate(rng, data):
    other = rng.choice([data, shard("ours"), shard("gnu")])
    end = rng.choice([len(data), ends_of_members(data)[-1], ends_of_members(data)[-1] + 512])
    return f"another archive at {end}", data[:end] + other


def insert(rng, data):
    place = rng.choice([rng.randrange(len(data)), rng.randrange(0, len(data), 512), rng.choice(ends_of_members(data))])
    source = rng.randrange(0, len(data), 512)
    more = rng.choice([rng.randbytes(rng.randrange(1, 700)), bytes(512), bytes(1024), rng.randbytes(512),
                       data[source : source + 512 * rng.randrange(1, 8)]])  # fmt: skip
    new = data[:place] + more + data[place:]
    if rng.random() < 0.5:
        return f"{len(more)} bytes inserted at {place}, size kept", new[: len(data)]
    return f"{len(more)} bytes inserted at {place}", new


def remove(rng, data):
    unit = rng.choice([1, 512])
    begin = rng.randrange(0, len(data), unit)
    end = begin + unit * rng.randrange(1, 9)
    new = data[:begin] + data[end:]
    return f"bytes {begin} to {end} removed", new if rng.random() < 0.5 else new.ljust(len(data), b"\0")


def reorder(rng, data):
    kind = rng.choice(["bytes", "blocks", "members"])
    if kind == "members":
        edges = ends_of_members(data)
        a, b, c = sorted(rng.sample(range(len(edges)), 3))
        a, b, c = edges[a], edges[b], edges[c]
    else:
        unit = 1 if kind == "bytes" else 512
        a = rng.randrange(0, len(data) - 4 * 512, unit)
        b, c = a + unit * rng.randrange(1, 6), a + unit * rng.randrange(6, 20)
    return f"bytes {a} to {b} moved behind {c}", data[:a] + data[b:c] + data[a:b] + data[c:]


def overwrite(rng, data):
    nbytes = rng.choice([16, 512, 1024, 2048])
    source, place = (rng.randrange(0, len(data) - nbytes, 512) for _ in range(2))
    return f"{nbytes} bytes at {place} overwritten by those at {source}", (
        data[:place] + data[source : source + nbytes] + data[place + nbytes :]
    )


MUTATIONS = [
    flip, flip_header, flip_header, repaired_header, cut, zero, concatenate, insert, remove, reorder, overwrite,
]  # fmt: skip


def mutated(rng, data):
    kind = rng.choice(MUTATIONS)
    what, new = kind(rng, data)
    return Mutation(new, what, repaired=kind is repaired_header)


# ---- what is done with each


@contextmanager
def time_limit():
    """A hang is an error that says where, instead of a test that is killed."""

    def expired(number, frame):
        raise AssertionError(f"hangs for {SECONDS} s")

    handler = signal.signal(signal.SIGALRM, expired)
    before = signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        yield
    finally:
        signal.signal(signal.SIGALRM, handler)
        signal.setitimer(signal.ITIMER_REAL, *before)


def trained(index):
    """Each indexed sample as training gets it."""
    samples = OrderedSamples(index, Order(index.counts, 0, 1, 4, shuffle=False), Source(), CLASSES)
    try:
        return [samples.get(0, position)[0] for position in range(index.samples)]
    finally:
        samples.close()


def drawn(path):
    """One pass over a shard without an index."""
    stream = ResampledSamples([path], Source(), CLASSES, 1, (0,))
    try:
        found = []
        for sample in stream._drawn():
            if sample.key[0] != stream.first:
                return found
            found.append(sample)
    finally:
        stream.close()


def decodable(image):
    try:
        return decode(image, "") is not None
    except UserError:
        return False


def check_samples(path, found, expected):
    """All of these samples, good or named."""
    assert len(found) == len(expected)
    for sample, given in zip(found, expected, strict=True):
        known = truth(given)
        if known is None:
            assert sample.bad
            assert path in sample.where
        else:
            key, image, label = known
            assert (sample.bad, sample.label, bytes(sample.image)) == (None, label, image)
            assert sample.where == f"{path}: sample {key}"


@dataclass
class Fuzz:
    """One dialect's original shard, with its index, and what has been seen of its mutations."""

    dialect: str
    folder: str
    seen: Counter = field(default_factory=Counter)

    def __post_init__(self):
        self.data = shard(self.dialect)
        self.samples = reference(self.data)
        assert len(self.samples) == 6
        self.path, self.fresh = f"{self.folder}/x.tar", f"{self.folder}/fresh/x.tar"
        os.mkdir(f"{self.folder}/fresh")
        self.store(self.path, self.data)
        write_index([self.path])
        self.shard = load_index(self.path).shard(0)
        rows = load_records(self.shard)
        self.records = [slice(int(row["offset"]), int(row["offset"] + row["nbytes"])) for row in rows]
        check_samples(self.path, trained(load_index(self.path)), self.samples)
        check_samples(self.path, drawn(self.path), self.samples)
        assert not verify_shard(self.shard, None, False).bad

    def store(self, path, data):
        with open(path, "wb") as file:
            file.write(data)

    def check(self, mutation):
        self.store(self.path, mutation.data)
        self.store(self.fresh, mutation.data)
        found = reference(mutation.data)
        self.check_index(mutation, found)
        self.check_resampled(mutation, found)
        self.check_training(mutation, found)

    def check_index(self, mutation, found):
        """The index is written after the mutation: all samples, or an error that names the byte."""
        for name in ("index.json", "index.bin"):
            if os.path.exists(f"{self.folder}/fresh/{name}"):
                os.remove(f"{self.folder}/fresh/{name}")
        try:
            write_index([self.fresh])
        except UserError as error:
            text = str(error)
            assert self.fresh in text
            assert re.search(r" byte \d+|empty file|a tar without samples|no image among|no label", text), text
            self.seen["refused" if found is None else "refused, though tarfile reads it"] += 1
            assert found is None or not self.harmless(mutation), text
            return
        assert found is not None, "an archive without a valid end was indexed"
        samples = trained(load_index(self.fresh))
        check_samples(self.fresh, samples, found)
        self.seen["indexed"] += 1
        if not mutation.repaired:  # no intact sample is lost beside the mutation
            good = {(s.where, bytes(s.image), s.label) for s in samples if not s.bad}
            bad = {s.where for s in samples if s.bad}
            for place, sample in zip(self.records, self.samples, strict=True):
                key, image, label = truth(sample)
                if any(at % 512 == 0 for at in all_places(mutation.data, self.data[place])):
                    where = f"{self.fresh}: sample {key}"
                    assert (where, image, label) in good or where in bad, f"{key} is lost"

    def harmless(self, mutation):
        """Whether only image bytes and padding differ."""
        if len(mutation.data) != len(self.data):
            return False
        kept = bytearray(self.data)
        with tarfile.open(fileobj=io.BytesIO(self.data)) as tar:
            for member in tar:
                if member.isreg():
                    last = member.offset_data + -(-member.size // 512) * 512
                    begin = member.offset_data + (0 if member.name.lower().endswith(".png") else member.size)
                    kept[begin:last] = mutation.data[begin:last]
        return bytes(kept) == mutation.data

    def check_resampled(self, mutation, found):
        samples = drawn(self.fresh)
        if " from sample " not in samples[-1].where:
            check_samples(self.fresh, samples, found)
        else:  # what comes after them is named
            assert samples[-1].where == f"{self.fresh}: from sample {len(samples) - 1} on"
            assert samples[-1].bad
            assert not found or not self.harmless(mutation)

    def check_training(self, mutation, found):
        """The index is older than the mutation: the shard is refused, or each sample comes once or is named."""
        if len(mutation.data) != len(self.data):
            with pytest.raises(UserError, match=r"x.tar: (truncated|changed|empty)"):
                load_index(self.path)
            assert verify_shard(self.shard, None, False).bad
            return
        samples = trained(load_index(self.path))
        assert len(samples) == len(self.samples)
        bad = 0
        for number, (sample, original, place) in enumerate(zip(samples, self.samples, self.records, strict=True)):
            key, image, label = truth(original)
            if mutation.data[place] == self.data[place]:
                assert not sample.bad, sample.bad
            if sample.bad:
                bad += 1
                assert sample.where in (f"{self.path}: sample {key}", f"{self.path}: sample {number} of 6")
            else:
                assert (sample.where, sample.label) == (f"{self.path}: sample {key}", label)
                assert len(sample.image) == len(image)
                assert bytes(sample.image) in mutation.data
                assert bytes(sample.image) == image or mutation.data[place] != self.data[place]
                bad += not decodable(bytes(sample.image))
        if self.seen["loaded"] < 20:  # the whole way of a batch, with decoding
            self.seen["loaded"] += 1
            keys, named = self.loaded()
            assert keys == [sample.where for sample in samples]
            assert len(named) == bad
        self.seen["bad samples"] += bad
        self.seen["whole"] += not bad
        report = verify_shard(self.shard, None, False)
        if bad or found is None or self.differs(found):
            assert report.bad, "verify finds nothing"
        elif self.harmless(mutation):
            assert not report.bad, report.bad

    def loaded(self):
        """One evaluation by the loader: the keys of its rows, and the bad ones."""
        config = DataConfig(val=(self.path,), workers=0)
        stream = evaluation_stream(config, load_index(self.path), (resize.Config(),), 6, CLASSES, Ranks(0, 1, 0, 1))
        batches = list(Loader(stream, 0, torch.device("cpu")))
        keys = [key for batch in batches for key in batch.keys if key]
        assert sum(batch.valid_rows for batch in batches) == len(keys) - sum(len(batch.bad) for batch in batches)
        return keys, [entry for batch in batches for entry in batch.bad]

    def differs(self, found):
        """Whether more than the contents of members has changed."""
        return [(k, {s: len(c) for s, c in of.items()}) for k, of in found] != [
            (k, {s: len(c) for s, c in of.items()}) for k, of in self.samples
        ]


def all_places(data, part):
    place = data.find(part)
    while place >= 0:
        yield place
        place = data.find(part, place + 1)


def fuzz(dialect, folder, mutations, monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda file: None)  # thousands of them take minutes
    run = Fuzz(dialect, str(folder))
    for number in range(mutations):
        rng = random.Random(f"{dialect} {number}")
        mutation = mutated(rng, run.data)
        if mutation.data == run.data:
            continue
        try:
            with time_limit():
                run.check(mutation)
        except Exception as error:
            raise AssertionError(f"{dialect}, mutation {number}, {mutation.what}: {error!r}") from error
    print(dialect, dict(run.seen))
    return run.seen


@pytest.mark.parametrize("dialect", DIALECTS)
def test_every_sample_of_a_mutated_shard_is_trained_on_or_named(dialect, tmp_path, monkeypatch):
    seen = fuzz(dialect, tmp_path, 600, monkeypatch)
    assert seen["refused"] > 50
    assert seen["indexed"] > 5
    assert seen["bad samples"] > 20


@pytest.mark.integration
@pytest.mark.parametrize("dialect", DIALECTS)
def test_thousands_of_mutations(dialect, tmp_path, monkeypatch):
    fuzz(dialect, tmp_path, 4000, monkeypatch)
