"""Tars written by others: every dialect gives what webdataset itself reads of it."""

import hashlib
import io
import itertools
import json
import tarfile

import pytest
import webdataset
from webdataset.tariterators import base_plus_ext, group_by_keys, tar_file_iterator

from pipeline.data.index import load_index, load_records, write_index
from pipeline.data.order import Order
from pipeline.data.reader import OrderedSamples
from pipeline.data.source import Source
from pipeline.data.tar import PLAIN_NAME, digest_of, label_of, parse_tar, plain_samples, strict_samples
from pipeline.errors import UserError

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


def webdataset_samples(data):
    """What webdataset's own stages read."""
    return group_by_keys({**member, "__url__": ""} for member in tar_file_iterator(io.BytesIO(data)))


@pytest.mark.parametrize("dialect", ["webdataset", "gnu", "pax", "ustar"])
def test_every_dialect_of_tar_gives_what_webdataset_reads(tmp_path, dialect):
    path = tmp_path / "x.tar"
    written(path, dialect)
    expected = [{k: v for k, v in sample.items() if k != "__url__"} for sample in webdataset_samples(path.read_bytes())]
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


def whole_members(writer_options, samples):
    """A run of whole members by webdataset's writer, without the end marks of the tar."""
    file = io.BytesIO()
    with webdataset.TarWriter(file, **writer_options) as writer:
        for sample in samples:
            writer.write(sample)
    with tarfile.open(fileobj=io.BytesIO(file.getvalue())) as tar:
        last = tar.getmembers()[-1]
    return file.getvalue()[: last.offset_data + -(-last.size // 512) * 512]


@pytest.mark.parametrize("options", [{"mtime": 0}, {}], ids=["as ours", "with times in pax headers"])
def test_plain_files_are_read_without_tarfile(options):
    samples = [{"__key__": "f/a", "jpg": b"i" * 700, "cls": "7"}, {"__key__": "b", "Seg.PNG": b"", "cls": "8"}]
    data = whole_members(options, samples)
    assert (b"mtime=" in data) == (not options)
    found = plain_samples(data)
    assert found == [
        {"__key__": "f/a", "cls": b"7", "jpg": b"i" * 700}, {"__key__": "b", "seg.png": b"", "cls": b"8"}
    ]  # fmt: skip
    assert found == [{k: v for k, v in sample.items() if k != "__url__"} for sample in webdataset_samples(data)]


def test_whatever_is_not_plain_is_left_to_the_archive_reader():
    data = whole_members({"mtime": 0}, [{"__key__": "a", "jpg": b"image", "cls": "7"}])
    for position, byte in (
        (156, b"2"), (156, b"x"), (156, b"L"), (257, b"X"), (345, b"p"), (124, b"\x80"), (134, b"9"),
        (0, b"\xff"), (0, b"."),
    ):  # fmt: skip
        spoilt = bytearray(data)
        spoilt[position : position + len(byte)] = byte
        assert plain_samples(bytes(spoilt)) is None
    assert plain_samples(data[:512]) is None
    again = plain_samples(data + data[1024:])  # a member that comes twice starts another sample, as in the index
    assert again == strict_samples(data + data[1024:], "")
    assert [list(sample) for sample in again] == [["__key__", "cls", "jpg"], ["__key__", "jpg"]]
    for name in ("__meta__.json", "n" * 120 + ".jpg", "späß.jpg"):
        file = io.BytesIO()
        with tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT) as tar:
            tar.addfile(tarfile.TarInfo(name))
        assert plain_samples(file.getvalue().rstrip(b"\0").ljust(512, b"\0")) is None


def test_names_are_cut_as_webdataset_cuts_them():
    """All names of six letters among these, which make dots and folders in every place."""
    for letters in itertools.product("a./_", repeat=6):
        name = "".join(letters)
        found = PLAIN_NAME.match(name.encode() + bytes(94))
        if found is not None:  # the rest is left to webdataset
            assert (found[1].decode(), found[2].decode()) == base_plus_ext(name)
            assert not name.startswith("__")
    assert PLAIN_NAME.match(b"n01/a.seg.png\0").groups() == (b"n01/a", b"seg.png")


@pytest.mark.parametrize("key", [*NAMES, 'quo"te\\back', "\udcff", "line\n"])
def test_the_digest_is_that_of_json(key):
    """Indexes that were written before hold: the faster text is the one that json.dumps writes."""
    for sizes in ({}, {"cls": 3}, {"jpg": 110_000, "cls": 1, "späß": 0}):
        facts = json.dumps([key, sorted(sizes.items())]).encode()
        expected = int.from_bytes(hashlib.blake2b(facts, digest_size=8).digest(), "little")
        assert digest_of(key, sizes) == expected


def test_a_label_is_a_whole_number():
    assert label_of({"cls": b" 17\n"}, "x") == 17
    assert label_of({"cls": memoryview(b"000")}, "x") == 0
    for wrong in (b"", b"-1", b"1.0", b"seven", b"\xff", b"1 2", b"1234567890", "٣".encode()):
        with pytest.raises(UserError, match=r"x: the member cls holds .*, expected the class as a whole number"):
            label_of({"cls": wrong}, "x")
