"""The end of a tar: all of its members are read, or an error names the byte."""

import io
import json
import os
import re
import signal
import subprocess
import sys
import tarfile
import threading

import numpy as np
import pytest
import torch
import webdataset
from PIL import Image

from pipeline import shards
from pipeline.audit import shard_keys
from pipeline.data import index as index_module
from pipeline.data.archive import Archive
from pipeline.data.index import load_index, load_records, write_index
from pipeline.data.loader import DataConfig, Loader, evaluation_stream
from pipeline.data.order import Order
from pipeline.data.parallel import in_processes
from pipeline.data.reader import OrderedSamples, ResampledSamples
from pipeline.data.source import ReadConfig, Source
from pipeline.data.tar import strict_samples
from pipeline.errors import UserError
from pipeline.runtime import Ranks

SAMPLES = 40


def png(number):
    file = io.BytesIO()
    Image.fromarray(np.full((4, 4, 3), number, np.uint8)).save(file, "PNG")
    return file.getvalue()


def shard(samples=SAMPLES):
    file = io.BytesIO()
    with webdataset.TarWriter(file, mtime=0) as writer:
        for number in range(samples):
            writer.write({"__key__": f"{number:06d}", "png": png(number), "cls": str(number)})
    return file.getvalue()


def edges(data):
    """Where members begin, and where the last one ends."""
    return [member.begin for member in Archive(io.BytesIO(data), "")] + [len(data.rstrip(b"\0")) // 512 * 512 + 512]


@pytest.fixture(scope="module")
def whole():
    return shard()


@pytest.fixture
def command(monkeypatch, capsys):
    """Runs `python -m pipeline.shards WORDS` in this process: (exit code, output)."""

    def run(*words):
        monkeypatch.setattr(sys, "argv", ["shards", *map(str, words)])
        code = shards.main()
        printed = capsys.readouterr()
        return code, printed.out + printed.err

    return run


def flipped(data, place, bit=1):
    new = bytearray(data)
    new[place] ^= bit
    return bytes(new)


MIDDLE = 20  # the member with which sample 10 begins
DAMAGED = {
    "a bit of a header": lambda d, at: (flipped(d, at[MIDDLE] + 3), rf"damaged at byte {at[MIDDLE]}: no tar header"),
    "4 KiB of zeros": lambda d, at: (
        d[: at[MIDDLE]] + bytes(4096) + d[at[MIDDLE] + 4096 :],
        rf"damaged at byte {at[MIDDLE + 4]}: other data behind the end of the archive at byte {at[MIDDLE]}",
    ),
    "cut inside a header": lambda d, at: (
        d[: at[MIDDLE] + 200], rf"truncated at byte {at[MIDDLE] + 200}: inside the header at byte {at[MIDDLE]}",
    ),
    "cut inside a member": lambda d, at: (d[: at[MIDDLE] + 600], rf"truncated at byte {at[MIDDLE] + 600}: the member"),
    "cut at a member": lambda d, at: (
        d[: at[MIDDLE]], rf"no end mark at byte {at[MIDDLE]}: found the end of the file, .*--allow-missing-end",
    ),
    "one block of zeros at the end": lambda d, at: (
        d[: at[-1] + 512], rf"no end mark at byte {at[-1]}: found only 512 bytes of zeros, .*--allow-missing-end",
    ),
    "two archives": lambda d, at: (
        d + d, rf"damaged at byte {len(d)}: other data behind the end of the archive at byte {at[-1]}: .*another",
    ),
    "two archives, and one block of zeros between them": lambda d, at: (
        d[: at[-1] + 512] + d, rf"damaged at byte {at[-1] + 512}: other data behind the end of the archive",
    ),
    "something behind the end": lambda d, at: (d + b"x", rf"damaged at byte {len(d)}: other data behind the end"),
    "compressed": lambda d, at: (__import__("gzip").compress(d), "found a compressed file at byte 0"),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGED)
def test_wherever_a_tar_is_read_its_end_is_checked(whole, tmp_path, command, damage):
    path = tmp_path / "x.tar"
    path.write_bytes(whole)
    assert command("index", path)[0] == 0
    data, message = DAMAGED[damage](whole, edges(whole))
    path.write_bytes(data)
    code, output = command("verify", path)
    assert code == 1
    changed = r"(truncated|changed): it has \d+ bytes"
    assert re.search(rf"{message}|{changed}|at byte {edges(whole)[MIDDLE]}: found no sample", output), output
    for name in ("index.json", "index.bin"):
        (tmp_path / name).unlink()
    code, output = command("index", path)
    assert code == 2
    assert re.search(rf"x.tar: .*{message}", output), output
    assert not (tmp_path / "index.json").exists()
    stream = ResampledSamples([str(path)], Source(), 100, 1, (0,))
    for sample in stream._drawn():
        if sample.bad:
            break
    assert re.search(message, sample.bad)
    if "no end mark" not in message:
        with pytest.raises(UserError, match=message):
            shard_keys(str(path), Source())


@pytest.mark.parametrize("rest", [0, 200, 512])
def test_an_option_accepts_shards_without_an_end_mark_and_counts_them(whole, tmp_path, command, rest):
    (tmp_path / "cut.tar").write_bytes(whole[: edges(whole)[-1] + rest])
    (tmp_path / "whole.tar").write_bytes(renamed(shard(3)))
    code, output = command("index", tmp_path / "*.tar", "--allow-missing-end")
    assert code == 0, output
    assert "indexed 43 samples in 2 shards\n1 of the shards have no end mark" in output
    code, output = command("verify", tmp_path / "*.tar", "--allow-missing-end")
    assert code == 0, output
    assert "1 of the shards have no end mark\n" in output
    code, output = command("verify", tmp_path / "*.tar")
    assert code == 1
    assert "cut.tar: no end mark at byte" in output
    stream = ResampledSamples([str(tmp_path / "cut.tar")], Source(ReadConfig(allow_missing_end=True)), 100, 1, (0,))
    drawn = stream._drawn()
    assert not any(next(drawn).bad for _ in range(100))


def renamed(data):
    file = io.BytesIO()
    with tarfile.open(fileobj=io.BytesIO(data)) as old, tarfile.open(fileobj=file, mode="w") as new:
        for member in old:
            content = old.extractfile(member)
            member.name = f"other-{member.name}"
            new.addfile(member, content)
    return file.getvalue()


def test_a_pipe_is_checked_to_its_end(whole, tmp_path):
    (tmp_path / "x.tar").write_bytes(whole[:-1] + b"x")
    limits = ReadConfig(allow_pipe=True)
    with pytest.raises(UserError, match=rf"damaged at byte {len(whole) - 1}: other data behind the end"):
        write_index([f"pipe:cat {tmp_path}/x.tar"], folder=str(tmp_path), limits=limits)
    (tmp_path / "x.tar").write_bytes(whole[: edges(whole)[21] - 512])
    with pytest.raises(UserError, match=r"truncated at byte \d+: the member 000010.cls"):
        write_index([f"pipe:cat {tmp_path}/x.tar"], folder=str(tmp_path), limits=limits)


ODD = {
    "a second pax header": (lambda pax, file: pax + pax + file, "damaged at byte 1024: a second pax header"),
    "a pax header alone": (lambda pax, file: pax, "damaged at byte 1024: no member follows the extended header"),
    "a pax record of another length": (
        lambda pax, file: pax.replace(b"17 path", b"18 path") + file, "damaged at byte 512: a damaged pax record",
    ),
    "zeros in a pax header": (lambda pax, file: pax[:512] + bytes(512) + file, "at byte 512: a damaged pax record"),
    "zeros in a long name": (lambda pax, file: header(b"L", 9) + bytes(512) + file, "512: a damaged long name"),
    "a huge extended header": (
        lambda pax, file: header(b"x", 1 << 30) + file, "at byte 0: an extended header of 1073741824 bytes",
    ),
    "a sparse file": (lambda pax, file: header(b"S", 0), "is a sparse file, which is not supported"),
    "a global path": (lambda pax, file: header(b"g", 17) + pax[512:] + file, "a global pax header that sets path"),
}  # fmt: skip


def header(kind, size):
    info = tarfile.TarInfo("x.png")
    info.type, info.size = kind, size
    return info.tobuf(tarfile.USTAR_FORMAT)[:512]


@pytest.mark.parametrize("name", ODD)
def test_damaged_extended_headers_are_errors(name):
    record = b"17 path=abcd.png\n"
    pax, file = header(b"x", 17) + record.ljust(512, b"\0"), header(b"0", 0)
    assert strict_samples(pax + file, "")[0]["__key__"] == "abcd"
    build, message = ODD[name]
    with pytest.raises(UserError, match=message):
        list(Archive(io.BytesIO(build(pax, file) + bytes(1024)), "x.tar"))


# ---- links and devices


def linked(folder, make_link):
    """A tar of a folder in which make_link made a second name for each file of sample a."""
    folder.mkdir()
    for name, content in (("a.cls", b"1"), ("a.png", png(1)), ("b.cls", b"2"), ("b.png", png(2))):
        (folder / name).write_bytes(content)
    for suffix in ("cls", "png"):
        make_link(folder / f"a.{suffix}", folder / f"zz-a.{suffix}")
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for path in sorted(folder.iterdir()):
            tar.add(path, path.name)
    return file.getvalue()


def device(data, kind):
    """The tar `data` with a device zz-a.png behind its last member."""
    end = edges(data)[-1]
    info = tarfile.TarInfo("zz-a.png")
    info.type = kind
    return data[:end] + info.tobuf(tarfile.USTAR_FORMAT)[:512] + bytes(1024)


DEREFERENCE = "expected a regular file; write the tar with --dereference --hard-dereference"
NO_FILES = {
    "hard links": (lambda path: linked(path, lambda a, b: os.link(a, b)),
                   r"zz-a.cls at byte 4096 is a hard link, " + DEREFERENCE),
    "symbolic links": (lambda path: linked(path, lambda a, b: b.symlink_to(a.name)),
                       r"zz-a.cls at byte 4096 is a symbolic link, " + DEREFERENCE),
    "a character device": (lambda path: device(shard(2), tarfile.CHRTYPE),
                           r"zz-a.png at byte 4096 is a character device, .*; write the tar without it"),
    "a named pipe": (lambda path: device(shard(2), tarfile.FIFOTYPE), "zz-a.png at byte 4096 is a named pipe"),
    "a part of a multi-volume archive": (lambda path: device(shard(2), b"M"),
                                         "byte 4096: zz-a.png is a member of type 'M', which is not supported"),
}  # fmt: skip


@pytest.mark.parametrize("name", NO_FILES)
def test_links_and_devices_in_the_place_of_a_samples_files_are_errors(tmp_path, command, name):
    build, message = NO_FILES[name]
    data, path = build(tmp_path / "folder"), tmp_path / "x.tar"
    end = 4096
    path.write_bytes(data[:end] + bytes(len(data) - end))  # the same size, without them
    assert command("index", path)[0] == 0
    path.write_bytes(data)
    code, output = command("verify", path)  # the index is older
    assert code == 1
    assert re.search(message, output), output
    for name in ("index.json", "index.bin"):
        (tmp_path / name).unlink()
    code, output = command("index", path)
    assert code == 2
    assert re.search(rf"x.tar: .*{message}", output), output
    assert not (tmp_path / "index.json").exists()
    stream = ResampledSamples([str(path)], Source(), 100, 1, (0,))
    samples = []
    for sample in stream._drawn():
        samples.append(sample)
        if sample.bad:
            break
    assert re.search(message, samples[-1].bad)
    with pytest.raises(UserError, match=message):
        shard_keys(str(path), Source())


def test_a_file_of_an_indexed_sample_that_became_a_link_makes_a_bad_sample(tmp_path, command):
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        for name, content in (("a.cls", b"1"), ("a.json", b""), ("a.png", png(1)), ("b.cls", b"2"), ("b.png", png(2))):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    path, data = tmp_path / "x.tar", file.getvalue()
    path.write_bytes(data)
    assert command("index", path)[0] == 0
    info = tarfile.TarInfo("a.json")
    info.type, info.linkname = tarfile.SYMTYPE, "a.cls"
    path.write_bytes(data[:1024] + info.tobuf(tarfile.USTAR_FORMAT)[:512] + data[1536:])
    code, output = command("verify", path)
    assert code == 1
    assert re.search("sample .*a.json at byte 1024 is a symbolic link", output), output
    code, output = command("write", path, tmp_path / "out")
    assert code == 2
    assert re.search("a.json at byte 1024 is a symbolic link", output), output
    index = load_index(str(path))
    samples = OrderedSamples(index, Order(index.counts, 0, 1, 4, shuffle=False), Source(), 10)
    first, second = (samples.get(0, position)[0] for position in range(2))
    samples.close()
    assert "damaged at byte 0: not the indexed sample" in first.bad
    assert not second.bad


def test_folders_and_links_that_webdataset_passes_over_are_allowed(tmp_path, command):
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        for name, kind in (("v1.0", tarfile.DIRTYPE), ("latest", tarfile.SYMTYPE), ("__meta__/x.png", tarfile.LNKTYPE),
                           ("null", tarfile.CHRTYPE)):  # fmt: skip
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "v1.0"
            tar.addfile(info)
    data, path = file.getvalue(), tmp_path / "x.tar"
    path.write_bytes(data[: 4 * 512] + shard(3))
    code, output = command("index", path)
    assert (code, "indexed 3 samples" in output) == (0, True), output
    assert command("verify", path)[0] == 0


# ---- labels


def test_a_label_that_differs_from_the_index_makes_a_bad_sample(whole, tmp_path):
    path = str(tmp_path / "x.tar")
    with open(path, "wb") as file:
        file.write(whole)
    write_index([path])
    first = int(load_records(load_index(path).shard(0))["offset"][7]) + 512  # its member cls comes first
    assert whole[first : first + 1] == b"7"
    with open(path, "wb") as file:
        file.write(whole[:first] + b"9" + whole[first + 1 :])
    index = load_index(path)
    samples = OrderedSamples(index, Order(index.counts, 0, 1, 8, shuffle=False), Source(), 100)
    read = [samples.get(0, position)[0] for position in range(SAMPLES)]
    samples.close()
    assert [number for number, sample in enumerate(read) if sample.bad] == [7]
    assert read[7].where == f"{path}: sample 000007"
    assert "label 9, the index says 7; restore the shard, or if it was changed on purpose, run:" in read[7].bad


# ---- verify


def test_verify_accounts_for_every_byte(whole, tmp_path, command):
    """Samples that the index does not have: behind the last, and between two."""
    path = tmp_path / "x.tar"
    at = edges(whole)
    hole, end = whole[: at[10]] + whole[at[12] : at[78]] + bytes(10240), whole[at[78] : at[80]]
    path.write_bytes(hole.ljust(len(whole), b"\0"))
    write_index([str(path)])
    assert command("verify", path)[0] == 0
    path.write_bytes((whole[: at[10]] + whole[at[12] : at[78]] + end).ljust(len(whole), b"\0"))
    code, output = command("verify", path)
    assert code == 1
    assert f"x.tar: sample 000039: at byte {at[76]}: not in the index; run:" in output
    assert "all shards are whole" not in output


def test_verify_is_as_strict_as_training_about_names(tmp_path, command):
    path = tmp_path / "x.tar"
    with tarfile.open(path, "w") as tar:
        for name, content in (("/abs/1.png", png(1)), ("/abs/1.cls", b"1"), ("2.png", png(2)), ("2.cls", b"2")):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    write_index([str(path)])
    code, output = command("verify", path)
    assert code == 1
    assert "sample /abs/1: its name leaves the shard's folder" in output
    assert "1 things are bad" in output


# ---- the index


@pytest.fixture
def indexed(tmp_path):
    """Three shards of 3, 5000 and 3 samples, with their index."""
    for name, samples in (("a", 3), ("b", 5000), ("c", 3)):
        file = tmp_path / f"{name}.tar"
        with webdataset.TarWriter(str(file), mtime=0) as writer:
            for number in range(samples):
                writer.write({"__key__": f"{name}{number}", "png": b"x", "cls": "1"})
    write_index([f"{tmp_path}/{name}.tar" for name in "abc"])
    return tmp_path


def test_damage_of_records_is_found_in_the_block_that_is_read(indexed):
    path = indexed / "index.bin"
    content = path.read_bytes()
    for spoilt, reason in (
        (flipped(content, (3 + 4500) * 24 + 5), r"damaged between bytes 98376 and 120072: the records of .*b.tar"),
        (content[24:48] + content[:24] + content[48:], r"damaged between bytes 0 and 72: the records of .*a.tar"),
        (content[:-1], "truncated"),
        (None, "not found"),
    ):
        path.write_bytes(spoilt) if spoilt is not None else path.unlink()
        index = load_index(f"{indexed}/{{a,b,c}}.tar")
        with pytest.raises(UserError, match=rf"index.bin: {reason}.*; run: python -m pipeline.shards index '"):
            [load_records(shard) for shard in index.shards]
    path.write_bytes(flipped(content, (3 + 4500) * 24 + 5))
    assert len(load_records(load_index(f"{indexed}/b.tar").shard(0), block=0)) == 4096
    samples = OrderedSamples(index, Order(index.counts, 0, 1, 8, shuffle=False), Source(), 100)
    assert samples.get(0, 3000)[0].where.endswith("b.tar: sample b2997")
    with pytest.raises(UserError, match=r"index.bin: damaged"):
        samples.get(0, 4900)
    samples.close()


def test_a_damaged_index_does_not_lose_the_shards_that_are_not_named_now(indexed, command):
    (indexed / "index.json").write_text((indexed / "index.json").read_text().replace('"samples": 3', '"samples": 4', 1))
    code, output = command("index", indexed / "a.tar")
    assert code == 2
    assert "index.json: damaged" in output
    assert "it may have shards that are not named now, such as b.tar" in output
    assert command("index", indexed / "*.tar")[0] == 0  # the command that the message names
    assert load_index(f"{indexed}/{{a,b,c}}.tar").samples == 5006
    content = (indexed / "index.bin").read_bytes()
    (indexed / "index.bin").write_bytes(flipped(content, 100))
    code, output = command("index", indexed / "a.tar")
    assert code == 2
    assert "index.bin: damaged" in output
    assert command("index", indexed / "b.tar")[0] == 0  # the damaged rows are written anew
    (indexed / "index.json").write_text("{")
    code, output = command("index", indexed / "a.tar", "--to", indexed / "")
    assert code == 2
    assert "or remove it and index all of its shards again" in output


def test_an_index_elsewhere_keeps_the_shards_that_are_not_named_now(indexed, command):
    for name in "ab":
        assert command("index", indexed / f"{name}.tar", "--to", indexed / "index")[0] == 0
    assert load_index(f"{indexed}/{{a,b}}.tar", folder=f"{indexed}/index").samples == 5003


def test_two_that_write_an_index_at_once_lose_no_rows(indexed, monkeypatch):
    os.remove(indexed / "index.json")
    both = threading.Barrier(2)
    honest = index_module.acquire

    def acquire(*words):
        both.wait(10)
        return honest(*words)

    monkeypatch.setattr(index_module, "acquire", acquire)
    threads = [threading.Thread(target=write_index, args=([f"{indexed}/{name}.tar"],)) for name in "ab"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert load_index(f"{indexed}/{{a,b}}.tar").samples == 5003


def test_counts_of_others_that_cannot_be_read_are_one_line(indexed, command):
    (indexed / "sizes.json").write_text("[1")
    code, output = command("index", indexed / "a.tar")
    assert code == 2
    assert "sizes.json: no readable sample counts; mend or remove it" in output


# ---- memory


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        OSError("out of memory error when reading image file"),  # PIL
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes"),  # torch
    ],
)
@pytest.mark.parametrize("place", ["decode", "augment", "read", "parse"])
@pytest.mark.parametrize("workers", [0, 1])
def test_memory_that_runs_out_ends_the_run_and_blames_no_sample(whole, tmp_path, monkeypatch, place, error, workers):
    if place in ("read", "parse") and not isinstance(error, MemoryError):
        pytest.skip("only Python's own error can come there")

    def fail(*words, **options):
        raise error

    path = str(tmp_path / "x.tar")
    with open(path, "wb") as file:
        file.write(whole)
    write_index([path])
    index = load_index(path)
    config = DataConfig(val=(path,), workers=workers)

    class Policy:
        def __call__(self, image, size, rng):
            return fail() if place == "augment" else image

    stream = evaluation_stream(config, index, (Policy(),), 4, 100, Ranks(0, 1, 0, 1))
    if place == "decode":
        monkeypatch.setattr("pipeline.data.decode._decode_any", fail)
    elif place == "read":
        records = load_records(index.shard(0))
        monkeypatch.setattr("pipeline.data.source.os.pread", fail)
        monkeypatch.setattr(Source, "read_cached", Source.read)
        monkeypatch.setattr("pipeline.data.reader.load_records", lambda shard, read, block: records)
    elif place == "parse":
        monkeypatch.setattr("pipeline.data.reader.parse_tar", fail)
    loader = Loader(stream, workers, torch.device("cpu"))
    with pytest.raises(UserError, match=r"rank 0, data worker 0 of 1: out of host memory at") as raised:
        list(loader)
    loader.close()
    assert re.search(rf"{re.escape(path)}(: sample 0|, samples 0 to)", str(raised.value)), raised.value
    assert "set data.workers (now 1 of each rank) or data.shuffle_pool lower" in str(raised.value)


def test_memory_that_runs_out_is_not_taken_for_that_of_a_gpu(monkeypatch):
    from types import SimpleNamespace

    from pipeline.build import explain

    config = SimpleNamespace(data=SimpleNamespace(global_batch_size=8), engine=SimpleNamespace(micro_batch_size=8))
    given = UserError("rank 0: out of host memory: can't allocate memory")
    assert explain(given, config, Ranks(0, 1, 0, 1)) is given
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    found = str(explain(MemoryError("x"), config, Ranks(1, 2, 1, 2)))
    assert "rank 1: out of host memory (x); set data.workers or data.shuffle_pool lower" in found


# ---- write


@pytest.fixture
def images(tmp_path):
    for number in range(6):
        (tmp_path / "images/a").mkdir(parents=True, exist_ok=True)
        (tmp_path / f"images/a/{number}.png").write_bytes(png(number))
    return tmp_path / "images"


def test_a_write_leaves_the_parts_of_another_prefix_alone(images, tmp_path, command):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/classes.json").write_text('["a"]')
    (tmp_path / "out/val-small-plan.json").write_text("{}")
    theirs = tmp_path / "out/.val-small-000000.tar.0123456789abcdef.part"
    mine = tmp_path / "out/.val-000000.tar.0123456789abcdef.part"
    theirs.write_bytes(b"x")
    code, output = command("write", images, tmp_path / "out", "--prefix", "val")
    assert code == 0, output
    assert theirs.exists()
    (tmp_path / "out/val-000000.tar").unlink()
    mine.write_bytes(b"x")
    assert command("write", images, tmp_path / "out", "--prefix", "val")[0] == 0
    assert not mine.exists()


def test_a_second_write_of_the_same_shards_is_refused_and_names_the_first(images, tmp_path, command):
    script = "import sys; from pipeline.lease import acquire; held = acquire(sys.argv[1], 'write-val', 'x');"
    script += " print('held', flush=True); sys.stdin.read()"
    (tmp_path / "out").mkdir()
    first = subprocess.Popen(
        [sys.executable, "-c", script, tmp_path / "out"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert first.stdout.readline() == "held\n"
    code, output = command("write", images, tmp_path / "out", "--prefix", "val")
    assert code == 2
    assert re.search(rf"--prefix val: process {first.pid} on \S+ .*is writing there already", output)
    assert not list((tmp_path / "out").glob("val-*"))
    assert command("write", images, tmp_path / "out", "--prefix", "train")[0] == 0  # another prefix is free
    first.communicate("")
    assert command("write", images, tmp_path / "out", "--prefix", "val")[0] == 0
    assert json.loads((tmp_path / "out/classes.json").read_text()) == ["a"]


def test_two_writes_that_start_at_once_with_different_classes_do_not_mix_them(images, tmp_path, command, monkeypatch):
    from pipeline.data import write

    def claim(folder, config, identity):
        (tmp_path / "out/classes.json").write_text('["b"]')  # meanwhile, by another process

    monkeypatch.setattr(write, "claim_folder", claim)
    code, output = command("write", images, tmp_path / "out")
    assert code == 2
    assert "another process has written other classes meanwhile; start the same command again" in output


def test_a_worker_of_write_or_verify_without_memory_is_one_line():
    with pytest.raises(UserError, match=r"a worker process ran out of memory; .*fewer --processes"):
        list(in_processes(raise_memory_error, [(), ()], 1))


def test_an_index_whose_worker_is_killed_is_one_line(indexed, monkeypatch):
    monkeypatch.setattr(index_module, "scan_shard", abort)
    with pytest.raises(UserError, match=r"a worker process was killed .*fewer --processes"):
        write_index([f"{indexed}/a.tar", f"{indexed}/c.tar"], processes=2)


def abort(*words):
    os.kill(os.getpid(), signal.SIGKILL)


def raise_memory_error():
    raise MemoryError
