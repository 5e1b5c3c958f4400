"""Small files that would take gigabytes or hours, and files that lead elsewhere: one clear line each, at once.

Attacks run in a process of their own, which may take MEMORY_MIB more than it has when it starts, and SECONDS.
"""

import functools
import io
import json
import multiprocessing
import os
import pickle
import resource
import struct
import tarfile
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image, PngImagePlugin

from pipeline import checkpoint
from pipeline.audit import last_step, logged_samples
from pipeline.config import load_config
from pipeline.data.decode import MAX_JPEG_SCANS, decode
from pipeline.data.index import RECORD, _check_of, load_index, load_records, read_classes, write_index
from pipeline.data.tar import parse_tar, scan_shard, split_name
from pipeline.data.write import WriteConfig, write_shards
from pipeline.engine import TrainingState, check_weights
from pipeline.errors import UserError, shorten
from pipeline.monitor.jsonl import read_lines
from pipeline.parsing import parse_json, parse_yaml
from pipeline.weights import read_weights
from vit.model import ViT, ViTConfig

MEMORY_MIB, SECONDS = 300, 20


def attempted(function, arguments, pipe):
    now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (now + (MEMORY_MIB << 20),) * 2)
    try:
        pipe.send(("result", repr(function(*arguments))[:200]))
    except UserError as error:
        pipe.send(("UserError", str(error)))
    except BaseException as error:
        pipe.send((type(error).__name__, str(error)[:500]))


def attack(function, *arguments):
    """The message with which the limits refuse an attack."""
    kind, message = outcome(function, *arguments)
    assert kind == "UserError", (kind, message)
    assert len(message) < 1500
    return message


def outcome(function, *arguments):
    ours, theirs = multiprocessing.Pipe()
    process = multiprocessing.get_context("fork").Process(target=attempted, args=(function, arguments, theirs))
    process.start()
    theirs.close()
    try:
        assert ours.poll(SECONDS), "it hangs"
        return ours.recv()
    finally:
        process.kill()
        process.join()
        ours.close()


def png(side=6):
    file = io.BytesIO()
    Image.new("RGB", (side, side), "red").save(file, "PNG")
    return file.getvalue()


def write_tar(path, members):
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


# ---- index, classes


@pytest.fixture
def shard(tmp_path):
    path = tmp_path / "x.tar"
    write_tar(path, {f"{n}.{suffix}": of for n in range(4) for suffix, of in (("png", png()), ("cls", b"1"))})
    write_index([str(path)])
    return path


def change_row(shard, **values):
    file = shard.parent / "index.json"
    content = json.loads(file.read_text())
    content["shards"][0] |= values
    content["check"] = _check_of(content["shards"])
    file.write_text(json.dumps(content))


@pytest.mark.parametrize(
    "row",
    [
        {"samples": 10**12, "checks": [0]}, {"first_record": -5}, {"nbytes": 1 << 80}, {"bad": -1}, {"samples": 2.5},
        {"labels": [0, 1 << 40]}, {"labels": [0]}, {"checks": [-1]}, {"checks": [0] * 1000}, {"name": ["x.tar"]},
        {"first_record": 1 << 60}, {"samples": True},
    ],
    ids=str,
)  # fmt: skip
def test_impossible_numbers_in_an_index_are_refused(shard, row):
    change_row(shard, **row)
    message = attack(load_index, str(shard), False)
    assert "index.json: " in message
    assert "pipeline.shards index" in message


@pytest.mark.parametrize(
    ("column", "value"),
    [
        ("offset", 1 << 63),
        ("offset", 1 << 40),
        ("nbytes", (1 << 28) + 1),
        ("nbytes", 9000),
        ("label", -7),
        ("offset", 0),
    ],
)
def test_records_outside_of_their_shard_are_refused(shard, column, value):
    file = shard.parent / "index.bin"
    records = np.frombuffer(file.read_bytes(), RECORD).copy()
    records[column][2] = value
    file.write_bytes(records.tobytes())
    change_row(shard, checks=[zlib.crc32(records.tobytes())])
    message = attack(load_records, load_index(str(shard)).shard(0))
    assert "index.bin: damaged: record 2 of" in message


def test_an_index_may_not_promise_more_than_its_records(shard):
    os.truncate(shard, 1 << 40)  # takes no space on the disk
    change_row(shard, nbytes=1 << 40, samples=1 << 31, checks=[0] * (1 << 19))
    assert "index.bin: truncated; run:" in attack(load_records, load_index(str(shard)).shard(0))


@pytest.mark.parametrize("name", ["index.json", "classes.json", "sizes.json"])
@pytest.mark.parametrize("kind", ["device", "pipe", "huge", "many values", "deep", "binary"])
def test_files_of_json_are_read_within_limits(shard, name, kind):
    file = shard.parent / name
    file.unlink(missing_ok=True)
    if kind == "device":
        file.symlink_to("/dev/zero")
    elif kind == "pipe":
        os.mkfifo(file)
    else:
        content = {"many values": b"[" + b"[]," * 15_000_000, "deep": b"[" * 100_000, "binary": b"\xff\xfe"}
        file.write_bytes(content.get(kind, b""))
        os.truncate(file, 1 << 36 if kind == "huge" else file.stat().st_size)
    use = {"index.json": load_index, "classes.json": read_classes, "sizes.json": write_index}[name]
    message = attack(use, [str(shard)])
    assert name in message


def test_json_is_strict():
    for text, problem in ((b'{"a": 1, "a": 2}', "the key 'a' twice"), (b"1" * 5000, "4300"), (b"[" * 2000, "too deep")):
        with pytest.raises(ValueError, match=problem):
            parse_json(text)


def test_values_are_shortened_in_messages():
    for value in ("x" * 10**6, ["x" * 1000] * 1000, 1 << 100_000, {str(n): n for n in range(9999)}, b"\0" * 10**6):
        assert len(shorten(value)) <= 80
    deep = []
    for _ in range(100_000):
        deep = [deep]
    assert len(shorten(deep)) <= 80
    assert shorten("short") == "'short'"
    assert shorten("short", quote=False) == "short"


# ---- tars


@pytest.mark.parametrize("kind", [tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK])
def test_extended_headers_of_gigabytes_are_refused(tmp_path, kind):
    info = tarfile.TarInfo("long")
    info.type, info.size = kind, 4 << 30
    path = tmp_path / "x.tar"
    path.write_bytes(info.tobuf(tarfile.GNU_FORMAT))
    os.truncate(path, 5 << 30)
    assert "damaged at byte 0: an extended header of 4294967296 bytes, more than 1048576" in attack(
        scan_shard, str(path)
    )


@pytest.mark.parametrize("form", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_long_names_take_no_time(tmp_path, form):
    """webdataset's expression would take hours for each of these."""
    path = tmp_path / "x.tar"
    with tarfile.open(path, "w", format=form) as tar:
        tar.addfile(tarfile.TarInfo("a/" * 500_000 + "x"))
    assert "a name of 1000001 characters, more than 4096" in attack(scan_shard, str(path))
    assert outcome(parse_tar, path.read_bytes(), "x.tar")[0] == "UserError"
    assert outcome(split_name, "a/" * 500_000 + "x./.y") == ("result", "(None, '')")


def test_names_are_split_as_webdataset_does():
    from webdataset.tariterators import base_plus_ext

    rng = np.random.default_rng(0)
    for _ in range(20_000):
        name = "".join(rng.choice(list("ab/./.\n"), rng.integers(9)))
        key, suffix = base_plus_ext(name)
        assert split_name(name) == ((key, suffix) if key is not None else (None, ""))


# ---- images


def jpeg_of_scans(scans, side=2000):
    """A valid progressive JPEG of one colour, whose coefficients come in as many scans as asked for."""

    def huffman(symbol, kind):
        return b"\xff\xc4" + struct.pack(">H", 20) + bytes([kind << 4, 1] + [0] * 15 + [symbol])

    def scan(first, last, bits, coded):
        coded += "1" * (-len(coded) % 8)
        body = int(coded, 2).to_bytes(len(coded) // 8, "big").replace(b"\xff", b"\xff\0")
        return b"\xff\xda" + struct.pack(">H", 8) + bytes([1, 1, 0, first, last, bits]) + body

    blocks = ((side + 7) // 8) ** 2
    nothing = ("0" + "1" * 14) * -(-blocks // ((1 << 15) - 1))
    parts = [scan(0, 0, 0, "0" * blocks)]
    for number in range(1, 64):
        for low in range(13, -1, -1):
            parts.append(scan(number, number, (0 if low == 13 else low + 1) << 4 | low, nothing))
    frame = b"\xff\xc2" + struct.pack(">HBHHB", 11, 8, side, side, 1) + b"\x01\x11\x00"
    tables = b"\xff\xdb" + struct.pack(">H", 67) + b"\0" + b"\1" * 64
    scans = b"".join((parts * (scans // len(parts) + 1))[:scans])
    return b"\xff\xd8" + tables + frame + huffman(0, 0) + huffman(0xE0, 1) + scans + b"\xff\xd9"


def test_a_jpeg_of_thousands_of_scans_is_refused():
    assert decode(jpeg_of_scans(MAX_JPEG_SCANS, 64), "x").shape == (64, 64, 3)
    data = jpeg_of_scans(5000)
    message = attack(decode, data, "shard.tar: sample 7")
    assert message.startswith("shard.tar: sample 7: can't be decoded: a JPEG of 5000 scans, expected at most 100;")
    # A header in front of the first one hides nothing; nor do many headers.
    for hidden in (b"\xff\xe1\x00\x08\xff\xda\xff\xc0\x01\x01", b"\xff\xfe\x00\x02" * 1000):
        assert "scans" in attack(decode, data[:2] + hidden + data[2:], "x")


def test_the_largest_image_is_an_option():
    for form in ("JPEG", "PNG", "WEBP"):
        file = io.BytesIO()
        Image.new("RGB", (100, 90)).save(file, form)
        assert decode(file.getvalue(), "x", max_pixels=9000).shape == (90, 100, 3)
        with pytest.raises(UserError, match=r"^x: can't be decoded: 100 x 90 pixels, expected at most 8999 in all"):
            decode(file.getvalue(), "x", max_pixels=8999)


@functools.cache
def packed_zeros():
    return zlib.compress(bytes(MEMORY_MIB << 20), 1)


@pytest.mark.parametrize("kind", [b"zTXt", b"iTXt", b"iCCP"])
def test_compressed_text_in_a_png_does_not_take_its_memory(kind):
    content = {b"zTXt": b"a\0\0", b"iTXt": b"a\0\1\0\0\0", b"iCCP": b"a\0\0"}[kind] + packed_zeros()
    file = io.BytesIO()
    PngImagePlugin.putchunk(file, kind, content)
    data = png()
    place = data.index(b"IDAT") - 4
    result, message = outcome(decode, data[:place] + file.getvalue() + data[place:], "x")
    assert result in ("UserError", "result"), message


# ---- weights


def safetensors(header, rest=b""):
    return struct.pack("<Q", len(header)) + header + rest


def torch_file(path, **options):
    torch.save({"a": torch.zeros(4)}, path, **options)
    return path


def repacked(path, change=lambda name, data: data, compression=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path) as archive:
        members = {info.filename: archive.read(info) for info in archive.infolist()}
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in members.items():
            archive.writestr(name, change(name, data))


def bomb(path):
    repacked(path, lambda name, data: bytes(MEMORY_MIB << 20) if "/data/" in name else data, zipfile.ZIP_DEFLATED)


class Bytes:
    def __reduce__(self):
        return bytearray, (1 << 40,)


def npz(path, header, nbytes):
    start = b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header.encode()
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.npy", start + bytes(nbytes))


def described(shape, kind="<f4"):
    return f"{{'descr': '{kind}', 'fortran_order': False, 'shape': {shape}, }}\n"


SHAPE = b'{"a":{"dtype":"F32","shape":[4611686018427387904,4],"data_offsets":[0,0]}}'
WEIGHTS = {
    "length.safetensors": (lambda p: p.write_bytes(struct.pack("<Q", 1 << 62)), "a header of 4611686018427387904"),
    "long.safetensors": (lambda p: p.write_bytes(struct.pack("<Q", 17 << 20) + bytes(17 << 20)), "a header of"),
    "shape.safetensors": (lambda p: p.write_bytes(safetensors(SHAPE)), "can't be read as weights"),
    "empty.safetensors": (lambda p: p.write_bytes(b""), "can't be read as weights"),
    "pipe.safetensors": (os.mkfifo, "not a regular file"),
    "bomb.npz": (lambda p: npz(p, described("(83886080,)"), 320 << 20), "take 335544395 bytes unpacked, expected"),
    "shape.npz": (lambda p: npz(p, described("(1099511627776,)"), 64), "'a.npy': its header does not fit its"),
    "negative.npz": (lambda p: npz(p, described("(-4, -4)"), 64), "'a.npy': its header does not fit its"),
    "object.npz": (lambda p: npz(p, described("(8,)", "|O"), 64), "'a.npy': its header does not fit its"),
    "nested.npz": (lambda p: npz(p, "(" * 9000, 64), "can't be read as weights"),
    "pipe.npz": (os.mkfifo, "not a regular file"),
    "bomb.pt": (lambda p: bomb(torch_file(p)), "compressed or overlap"),
    "bytes.pt": (lambda p: torch.save({"a": Bytes()}, p), "it holds more than tensors"),
    "legacy.pt": (lambda p: p.write_bytes(pickle.dumps(Bytes(), 2)), "it holds more than tensors"),
    "view.pt": (lambda p: torch.save({"a": torch.zeros(1).expand(1 << 30, 1 << 10)}, p), "'a' is no plain tensor"),
    "meta.pt": (lambda p: torch.save({"a": torch.zeros(1 << 40, device="meta")}, p), "'a' is no plain tensor"),
    "empty.pt": (lambda p: p.write_bytes(b""), "can't be read as weights"),
    "device.pt": (lambda p: p.symlink_to("/dev/zero"), "not a regular file"),
}  # fmt: skip


@pytest.mark.parametrize("name", WEIGHTS)
def test_files_of_weights_take_no_more_memory_than_their_size(tmp_path, name):
    make, problem = WEIGHTS[name]
    make(tmp_path / name)
    message = attack(read_weights, str(tmp_path / name), 1 << 20)
    assert message.startswith(str(tmp_path / name))
    assert problem in message


def test_a_model_of_another_size_is_refused_before_its_memory_is_taken():
    config = ViTConfig(width=100_000, heads=1, mlp_dim=400_000, depth=40)  # 19 TB

    def check():
        with torch.device("meta"):
            check_weights(ViT(config), {"positions": torch.zeros(3)})

    assert "the checkpoint is of another model" in attack(check)
    for values in ({"width": 1 << 60, "heads": 7}, {"depth": 1 << 40}):
        with pytest.raises(ValueError, match="must be at most"):
            ViTConfig(**values)


# ---- checkpoints


@pytest.fixture
def saved(tmp_path):
    """A whole checkpoint, and what changes a file in it together with the manifest."""
    path, partial = tmp_path / "step-00000003", tmp_path / ".part"
    state = TrainingState({"a": torch.ones(3)}, {}, 3, None)
    written = checkpoint.write_share(str(partial), state, 0, 1)
    checkpoint.complete(str(partial), str(path), written, {"step": 3, "updates": 3, "evaluation": {}})
    return path


def change_manifest(path, change):
    manifest = json.loads((path / "manifest.json").read_text())
    change(manifest["files"])
    del manifest["blake2b"]
    (path / "manifest.json").write_text(json.dumps({**manifest, "blake2b": checkpoint._checksum(manifest)}))


@pytest.mark.parametrize("name", ["/dev/zero", "../../secret", "model-00001-of-00001.safetensors/../../secret", "x\n"])
def test_a_manifest_names_files_of_its_checkpoint_only(saved, name):
    change_manifest(saved, lambda files: files.update({name: {"nbytes": 0, "blake2b": "0"}}))
    message = attack(checkpoint.require, str(saved))
    assert f"manifest.json names {name!r}, expected only state.json and parts" in message


@pytest.mark.parametrize("name", ["state.json", "manifest.json", "model-00001-of-00001.safetensors"])
@pytest.mark.parametrize("kind", ["link", "device", "pipe"])
def test_a_checkpoint_holds_no_links_out_of_it_nor_devices(saved, tmp_path, name, kind):
    file = saved / name
    content = file.read_bytes()
    file.unlink()
    if kind == "link":
        (tmp_path / "elsewhere").write_bytes(content)
        file.symlink_to("../elsewhere")
    elif kind == "device":
        file.symlink_to("/dev/zero")
    else:
        os.mkfifo(file)
        if name != "manifest.json":
            change_manifest(saved, lambda files: files[name].update(nbytes=0))
    message = attack(checkpoint.require, str(saved))
    assert f"{name} is a link out of the checkpoint" in message or "not a regular file" in message


def test_a_checkpoint_in_the_cache_of_huggingface_hub_is_whole(saved, tmp_path):
    blobs, snapshot = tmp_path / "models--me--vit/blobs", tmp_path / "models--me--vit/snapshots/4b825dc"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for number, file in enumerate(sorted(saved.iterdir())):
        file.rename(blobs / f"{number}")
        (snapshot / file.name).symlink_to(f"../../blobs/{number}")
    checkpoint.require(str(snapshot))
    (blobs / "0").rename(tmp_path / "elsewhere")
    (blobs / "0").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="is a link out of the checkpoint"):
        checkpoint.require(str(snapshot))


def test_a_state_of_wrong_types_is_damaged(saved):
    for key, value in (("step", "3"), ("updates", -1), ("evaluation", [1]), ("classes", [1]), ("config", 5)):
        facts = {"step": 3, "updates": 3, "evaluation": {}, key: value}
        (saved / "state.json").write_text(json.dumps(facts))
        change_manifest(saved, lambda files: files.update({"state.json": checkpoint._facts(str(saved / "state.json"))}))
        with pytest.raises(UserError, match=f"state.json: ValueError: {key}: found .*, expected"):
            checkpoint.require(str(saved))


# ---- logs of a run that an audit reads


def lines_of(path):
    return list(read_lines(str(path)))


def test_logs_are_read_within_limits(tmp_path):
    log = tmp_path / "metrics.jsonl"
    log.symlink_to("/dev/zero")
    assert "not a regular file" in attack(lines_of, log)
    log.unlink()
    os.mkfifo(log)
    assert "not a regular file" in attack(lines_of, log)
    log.unlink()
    log.write_bytes(b"[" * 100_000 + b'\n{"step": 1}\n')
    assert outcome(lines_of, log) == ("result", "[{'step': 1}]")
    os.truncate(log, 1 << 30)
    assert outcome(lines_of, log) == ("result", "[{'step': 1}]")


@pytest.mark.parametrize(
    "row", [{"step": 10**15, "samples": []}, {"step": 0, "samples": []}, {"step": 1}, {"step": 1, "samples": [1]}]
)
def test_an_audit_refuses_impossible_rows_of_a_log(tmp_path, row):
    log = tmp_path / "samples-rank0.jsonl"
    log.write_text(json.dumps(row) + "\n")
    with pytest.raises(UserError, match="expected a step from 1 to 10000000 and the names of its samples"):
        list(logged_samples(str(log)))
    (tmp_path / "metrics.jsonl").write_text('{"step": 3}\n{"step": 1000000000000000}\n')
    assert last_step(str(tmp_path)) == 3


# ---- configs


LAUGHS = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 30)
)
MERGES = "a0: &a0 {x: 1, y: 2}\n" + "".join(f"a{n}: &a{n} {{<<: [*a{n - 1}, *a{n - 1}]}}\n" for n in range(1, 40))
CONFIGS = {
    "aliases": (LAUGHS, "its aliases stand for more than 100000 values"),
    "merges": (MERGES, "its aliases stand for more than 100000 values"),
    "an alias of itself": ("run: &a [*a]", "line 1: an alias refers to a value that it is a part of"),
    "deep": ("run: " + "[" * 50_000, "nested too deep"),
    "large": ("run: {dir: " + "x" * 300_000 + "}", "it has 300012 bytes, expected at most 262144"),
    "a long value": ("run: {steps: 1}\ndata: {workers: '" + "x" * 50_000 + "'}", "data.workers: expected a whole"),
    "a long key": ("x" * 1000 + "y: 1", "unknown key; known here are"),
    "a large section": ("run: {steps: 1}\ndata: [" + "1, " * 20_000 + "]", "data: expected a section with"),
    "twice": ("run: {dir: a}\nrun: {dir: b}", "line 2: the key 'run' is given twice"),
    "no date": ("run: {dir: 2001-99-99}", "not readable YAML: month must be in 1..12"),
    "digits": ("run: {seed: 0x" + "f" * 50_000 + "}", "run.seed: expected a whole number, found a int of too many"),
    "large seed": ("run: {seed: 99999999999999999999}", "run.seed: expected a whole number, found 9999999999"),
    "no text": (b"\xff\xfe\xff", "not readable YAML"),
    "object": ("run: !!python/object/apply:os.system [echo]", "line 1, column 6: could not determine a constructor"),
}  # fmt: skip


@pytest.mark.parametrize("name", CONFIGS)
def test_configs_are_read_within_limits(tmp_path, name):
    text, problem = CONFIGS[name]
    path = tmp_path / "c.yaml"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    message = attack(load_config, str(path))
    assert message.startswith(f"{path}: ")
    assert problem in message


def test_a_config_may_name_thousands_of_shards_one_by_one(tmp_path):
    urls = [f"/mnt/lustre/projects/imagenet/wds/train/imagenet-train-{n:06d}.tar" for n in range(2048)]
    path = tmp_path / "c.yaml"
    path.write_text(yaml.safe_dump({"run": {"steps": 1}, "data": {"train": urls}}))
    assert load_config(str(path)).data.train == tuple(urls)


def test_devices_and_pipes_are_no_configs(tmp_path):
    os.mkfifo(tmp_path / "pipe.yaml")
    (tmp_path / "zero.yaml").symlink_to("/dev/zero")
    for name in ("pipe.yaml", "zero.yaml"):
        assert attack(load_config, str(tmp_path / name)).endswith(f"{name}: not readable YAML: not a regular file")


def test_anchors_and_merge_keys_go_on_working():
    text = "a: &a {x: 1, y: [1e-3, no]}\nb: {<<: *a, x: 2}\nc: *a\n"
    assert parse_yaml(text) == yaml.safe_load(text)


# ---- shards write


@pytest.fixture
def folder(tmp_path):
    for name in ("cat", "dog"):
        (tmp_path / "src" / name).mkdir(parents=True)
        (tmp_path / "src" / name / "a.png").write_bytes(png())
    (tmp_path / "secret").write_text("password")
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside/b.png").write_bytes(png())
    return tmp_path / "src"


def refused_write(source, tmp_path):
    with pytest.raises(UserError) as caught:
        write_shards([str(source)], str(tmp_path / "out"), WriteConfig(processes=1))
    return str(caught.value)


PLANTED = {
    "a file outside": (lambda f: (f / "cat/b.png").symlink_to("../../secret"), "b.png: a link to {0}/secret, outside"),
    "a folder outside": (lambda f: (f / "cat/more").symlink_to("../../outside"), "more: a link to {0}/outside, out"),
    "a class outside": (lambda f: (f / "fish").symlink_to("../outside"), "fish: a link to {0}/outside, outside"),
    "itself": (lambda f: (f / "cat/loop").symlink_to("."), "loop: a link to a folder that its class has already"),
    "its root": (lambda f: (f / "cat/loop").symlink_to(".."), "loop/cat: a link to a folder that its class has"),
    "a pipe": (lambda f: os.mkfifo(f / "cat/b.png"), "b.png: not a regular file"),
    "a device": (lambda f: (f / "cat/b.png").symlink_to("/dev/zero"), "b.png: a link to /dev/zero, outside"),
    "a text": (lambda f: (f / "cat/b.png").write_text("password"), "b.png: can't be decoded: no image (JPEG, PNG or"),
}  # fmt: skip


@pytest.mark.parametrize("name", PLANTED)
def test_write_packs_images_of_its_folder_only(folder, tmp_path, name):
    plant, problem = PLANTED[name]
    plant(folder)
    message = refused_write(folder, tmp_path)
    assert problem.format(tmp_path) in message
    assert "password" not in "".join(path.read_text("latin-1") for path in tmp_path.glob("out/*"))


def test_folders_that_link_to_each_other_many_times_end(folder, tmp_path):
    for number in range(40):  # 2^40 paths
        (folder / f"cat/d{number}").mkdir()
        for side in "ab":
            (folder / f"cat/d{number}/{side}").symlink_to(f"../d{number + 1}")
    message = refused_write(folder, tmp_path)
    assert "a link to a folder that its class has already" in message


def test_links_inside_a_folder_are_followed(folder, tmp_path):
    (folder / "dog/b.png").symlink_to("../cat/a.png")
    (folder / "fish").symlink_to("cat")
    written = write_shards([str(folder)], str(tmp_path / "out"), WriteConfig(processes=1))
    assert scan_shard(written.shards[0]).records.size == 4


@pytest.mark.parametrize("target", ["secret", "/etc/passwd", "/dev/zero", "pipe.png"])
def test_a_list_packs_images_only(folder, tmp_path, target):
    """A list's paths are the user's own word, but what is no image is not packed."""
    (tmp_path / "x.png").symlink_to(target)
    if target == "pipe.png":
        os.mkfifo(tmp_path / target)
    (tmp_path / "list.csv").write_text("path,label\nx.png,cat\nsrc/dog/a.png,dog\n")
    message = refused_write(tmp_path / "list.csv", tmp_path)
    assert "x.png: can't be decoded: no image" in message or "x.png: not a regular file" in message
