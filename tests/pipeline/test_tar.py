"""Tars written by others: every dialect gives what webdataset itself reads of it."""

import io
import tarfile

import pytest
import webdataset

from pipeline.data.index import load_index, load_records, write_index
from pipeline.data.order import Order
from pipeline.data.reader import OrderedSamples
from pipeline.data.source import Source
from pipeline.data.tar import parse_stream, parse_tar, plain_members

NAMES = ["a/b/0001", "0002", "n01440764/x-3", "d" * 120 + "/long", "späß", "with space", "v1.0/dots.in.folder/4"]


def written(path, dialect):
    if dialect == "webdataset":
        with webdataset.TarWriter(str(path)) as writer:  # its default: a time with a fraction, so pax headers
            for number, name in enumerate(NAMES):
                writer.write({"__key__": name.replace(".", "_"), "jpg": b"x" * number, "cls": str(number)})
        return
    forms = {"gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT, "ustar": tarfile.USTAR_FORMAT}
    names = [name for name in NAMES if dialect != "ustar" or len(name) < 100]
    with tarfile.open(
        path, "w", format=forms[dialect], pax_headers={"comment": "all"} if dialect == "pax" else None
    ) as tar:
        for number, name in enumerate(names):
            for suffix, content in ((".JPG", b"x" * number * 700), (".cls", str(number).encode()), (".json", b"{}")):
                info = tarfile.TarInfo(name + suffix)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
        folder = tarfile.TarInfo("n0")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)


@pytest.mark.parametrize("dialect", ["webdataset", "gnu", "pax", "ustar"])
def test_every_dialect_of_tar_gives_what_webdataset_reads(tmp_path, dialect):
    path = tmp_path / "x.tar"
    written(path, dialect)
    expected = [
        {k: v for k, v in sample.items() if k != "__url__"}
        for sample in parse_stream(io.BytesIO(path.read_bytes()), "")
    ]
    write_index([str(path)])
    index = load_index(str(path))
    assert index.samples == len(expected) >= 6
    data = path.read_bytes()
    for record, sample in zip(load_records(index.shard(0)), expected, strict=True):
        run = data[record["offset"] : record["offset"] + record["nbytes"]]
        (found,) = parse_tar(run, "")
        assert {k: v for k, v in found.items() if k != "__url__"} == sample
    samples = OrderedSamples(index, Order(index.counts, 0, 1, 100, shuffle=False), Source(), 1000)
    read = [samples.get(0, position)[0] for position in range(index.samples)]
    samples.close()
    assert [(s.label, s.bad) for s in read] == [(int(e["cls"]), None) for e in expected]


def test_plain_files_are_read_without_tarfile_and_nothing_else_is(tmp_path):
    path = tmp_path / "x.tar"
    with webdataset.TarWriter(str(path), mtime=0) as writer:
        writer.write({"__key__": "a", "jpg": b"image", "cls": "7"})
    data = path.read_bytes()[:2048]
    assert plain_members(data) == [("a.cls", b"7"), ("a.jpg", b"image")]
    for position, byte in ((156, b"2"), (156, b"x"), (257, b"X"), (345, b"p"), (124, b"\x80"), (0, b"\xff")):
        spoilt = bytearray(data)
        spoilt[position : position + 1] = byte
        assert plain_members(bytes(spoilt)) is None
    assert plain_members(data[:512]) is None
