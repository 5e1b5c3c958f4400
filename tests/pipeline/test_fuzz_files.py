"""Mutated index, manifest, state, classes and config files: a result or a UserError, within limits of time and memory.

Each kind runs in a process of its own, which may take MEMORY_MIB more than it has when it starts, and SECONDS an input.
FUZZ_INPUTS and FUZZ_SEED choose more and other inputs, such as FUZZ_INPUTS=100000 FUZZ_SEED=7.
"""

import copy
import hashlib
import json
import os
import random
import resource
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

SECONDS = 5.0  # of processor time for one input; nearly all take milliseconds
MEMORY_MIB = 512
LONGEST_MESSAGE = 4000
ROOT = Path(__file__).parents[2]
INPUTS, SEED = int(os.environ.get("FUZZ_INPUTS", "1000")), os.environ.get("FUZZ_SEED", "0")
STRINGS = [
    "",
    "\0",
    "a\x1b[31mb",
    "\r\n",
    "../../etc/passwd",
    "/dev/zero",
    "ü" * 300,
    "x" * 100_000,
    "\ud800",
    "NaN",
    "{name}",
]
NUMBERS = [0, -1, 1, 2**31, 2**32, 2**63, 2**64, -(2**63), 10**30, 10**400, 1e308, float("nan"), float("inf"), 0.5]


def deep(depth, of=list):
    value = of()
    for _ in range(depth):
        value = [value] if of is list else {"a": value}
    return value


def anything(rng):
    return rng.choice([
        None, True, False, rng.choice(NUMBERS), rng.choice(NUMBERS), rng.choice(STRINGS), [], {}, [[]], [None],
        {"name": 1}, deep(rng.choice([5, 50, 200])), deep(rng.choice([5, 50, 200]), dict), list(range(1000)),
    ])  # fmt: skip


def places(value, path=()):
    """The path of each value within a tree."""
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, child in items:
        yield from places(child, (*path, key))


def edited(rng, tree):
    """A tree with some values replaced, dropped, doubled or renamed."""
    tree = copy.deepcopy(tree)
    for _ in range(rng.choice([1, 1, 1, 2, 4])):
        path = rng.choice(list(places(tree)))
        if not path:
            if rng.random() < 0.1:
                return anything(rng)
            continue
        parent = tree
        for key in path[:-1]:
            parent = parent[key]
        key = path[-1]
        action = rng.choice(["replace", "replace", "drop", "double", "rename"])
        if action == "drop":
            del parent[key]
        elif action == "double" and isinstance(parent, list):
            parent.append(copy.deepcopy(parent[key]))
        elif action == "rename" and isinstance(parent, dict):
            parent[str(rng.choice([*parent, *STRINGS[:7]]))] = parent.pop(key)
        else:
            parent[key] = anything(rng)
    return tree


def damaged(rng, data):
    """Bytes flipped, cut, repeated, or taken from elsewhere."""
    data = bytearray(data)
    for _ in range(rng.choice([1, 1, 2, 8])):
        place = rng.randrange(len(data) + 1)
        action = rng.choice(["flip", "cut", "insert", "repeat", "remove"])
        if action == "flip" and place < len(data):
            data[place] ^= 1 << rng.randrange(8)
        elif action == "cut":
            del data[place:]
        elif action == "insert":
            more = [
                b"[" * 50_000, b'{"a":' * 5000, b'"', b"\\u0000", b"\xff", b"\0", b"1" * 5000, b"NaN", b"-", b"&a *a",
                b"!!python/name:os.system ", b"? ", b"2001-99-99", b"0x" + b"f" * 5000, b"<<: ", b": ", b"\t",
            ]  # fmt: skip
            data[place:place] = rng.choice(more)
        elif action == "repeat":
            data[place:place] = data[max(place - 40, 0) : place] * rng.choice([1, 2, 1000])
        else:
            del data[place : place + rng.randrange(1, 30)]
    return bytes(data)


def mutated(rng, tree, dump=lambda tree: json.dumps(tree).encode()):
    return damaged(rng, dump(tree)) if rng.random() < 0.5 else dump(edited(rng, tree))


# ---- one kind of file each: a function that makes a folder, and gives one that tries one mutation


def index_files(folder):
    import webdataset

    from pipeline.data.index import _check_of, load_index, load_records, write_index
    from pipeline.data.order import Order
    from pipeline.data.reader import OrderedSamples
    from pipeline.data.source import Source
    from tests.pipeline.test_fuzz import png

    for shard in "ab":
        with webdataset.TarWriter(f"{folder}/{shard}.tar", mtime=0) as writer:
            for number in range(6):
                writer.write({"__key__": f"{shard}{number}", "png": png(number), "cls": str(number)})
    urls = [f"{folder}/a.tar", f"{folder}/b.tar"]
    write_index(urls)
    tree, records = json.loads(Path(folder, "index.json").read_text()), Path(folder, "index.bin").read_bytes()

    def attempt(rng):
        content, binary = tree, records
        if rng.random() < 0.3:  # records are mutated, and their checksums repaired
            import zlib

            binary = damaged(rng, records).ljust(len(records), b"\xff")[: len(records)]
            content = copy.deepcopy(tree)
            for row, begin in zip(content["shards"], (0, len(records) // 2), strict=True):
                row["checks"] = [zlib.crc32(binary[begin : begin + len(records) // 2])]
            data = json.dumps({**content, "check": _check_of(content["shards"])}).encode()
        elif rng.random() < 0.7:  # the checksum fits: anyone can compute it
            content = edited(rng, tree)
            if isinstance(content, dict) and "shards" in content:
                content["check"] = _check_of(content["shards"])
            data = json.dumps(content).encode()
        else:
            data = mutated(rng, tree)
        Path(folder, "index.json").write_bytes(data)
        Path(folder, "index.bin").write_bytes(binary)
        yield data + binary
        index = load_index(urls)
        for shard in index.shards:
            load_records(shard)
        if index.samples <= 12:
            samples = OrderedSamples(index, Order(index.counts, 0, 1, 4, shuffle=False), Source(), 10)
            try:
                for position in range(index.samples):
                    samples.get(0, position)
            finally:
                samples.close()

    return attempt


def checkpoint_files(folder):
    import torch

    from pipeline import checkpoint
    from pipeline.config import describe_checkpoint, load_config, to_tree
    from pipeline.engine import TrainingState

    path = f"{folder}/step-00000003"
    state = TrainingState({"a": torch.ones(2, 3)}, {"exp_avg": {"a": torch.ones(2, 3)}}, 3, None)
    written = checkpoint.write_share(f"{folder}/.part", state, 0, 1)
    facts = {"step": 3, "updates": 3, "loss_scale": {"scale": 2.0, "stable_steps": 1}, "evaluation": {"val/loss": 1.0},
             "classes": ["a", "b"], "config": to_tree(load_config("configs/digits.yaml")), "logs": {}}  # fmt: skip
    checkpoint.complete(f"{folder}/.part", path, written, facts)
    manifest = json.loads(Path(path, "manifest.json").read_text())
    name = next(name for name in manifest["files"] if name.startswith("model"))
    tensors = Path(path, name).read_bytes()

    def attempt(rng):
        content, model, facts_there = copy.deepcopy(manifest), tensors, json.dumps(facts).encode()
        kind = rng.choice(["manifest", "state", "state", "tensors"])
        if kind == "state":
            facts_there = mutated(rng, facts)
        elif kind == "tensors":
            model = damaged(rng, tensors)
        for file, data in (("state.json", facts_there), (name, model)):
            Path(path, file).write_bytes(data)
            content["files"][file] = checkpoint._facts(os.path.join(path, file))
        if kind == "manifest":
            content = edited(rng, content)
        if isinstance(content, dict) and rng.random() < 0.9:
            content.pop("blake2b", None)
            content["blake2b"] = checkpoint._checksum(content)
        data = json.dumps(content).encode()
        if kind == "manifest" and rng.random() < 0.3:
            data = damaged(rng, data)
        Path(path, "manifest.json").write_bytes(data)
        yield data + facts_there + model
        checkpoint.require(path)
        found = checkpoint.load(path)
        sum(tensor.numel() for tensor in found.weights.values())
        describe_checkpoint(checkpoint.load_state(path), path)

    return attempt


def classes_files(folder):
    from pipeline.data.index import _cross_check, read_classes

    tree = [f"class {number}" for number in range(20)]
    counts = {"a.tar": 3, "b.tar": 4}

    def attempt(rng):
        data, sizes = mutated(rng, tree), mutated(rng, counts)
        Path(folder, "classes.json").write_bytes(data)
        Path(folder, "sizes.json").write_bytes(sizes)
        yield data + sizes
        try:
            read_classes(f"{folder}/a.tar")
        finally:
            _cross_check(folder, counts)

    return attempt


def config_files(folder):
    import yaml

    from pipeline.config import load_config

    texts = [path.read_bytes() for path in sorted(Path("configs").glob("*.yaml"))]
    trees = [yaml.safe_load(text) for text in texts]
    path = f"{folder}/config.yaml"

    def attempt(rng):
        number = rng.randrange(len(trees))
        overrides = []
        if rng.random() < 0.3:
            data = texts[number]
            key = ".".join(map(str, rng.choice(list(places(trees[number])))))
            text = rng.choice([str(anything(rng)), damaged(rng, b"{a: [1, 2], b: x}").decode(errors="replace")])
            overrides = [damaged(rng, f"{key}={text}".encode(errors="replace")[:2000]).decode(errors="replace")]
        elif rng.random() < 0.5:
            data = damaged(rng, texts[number])
        else:
            data = json.dumps(edited(rng, trees[number]), ensure_ascii=rng.random() < 0.5).encode(
                errors="surrogatepass"
            )
        Path(path).write_bytes(data)
        yield data + "".join(overrides).encode()
        load_config(path, overrides)

    return attempt


KINDS = {"index": index_files, "checkpoint": checkpoint_files, "classes": classes_files, "config": config_files}


def fuzz(kind, inputs, seed, folder):
    """Runs in a process of its own. Raises where an input gives anything but a result or a UserError."""
    from pipeline.errors import UserError

    os.fsync = lambda file: None  # thousands of them take minutes
    attempt = KINDS[kind](folder)
    before = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (before + (MEMORY_MIB << 20), resource.RLIM_INFINITY))

    def expired(number, frame):
        raise TimeoutError(f"takes more than {SECONDS} s")

    signal.signal(signal.SIGPROF, expired)
    refused = 0
    for number in range(inputs):
        rng = random.Random(f"{kind} {seed} {number}")
        steps = attempt(rng)
        data = next(steps)
        signal.setitimer(signal.ITIMER_PROF, SECONDS)
        try:
            next(steps, None)
        except UserError as error:
            refused += 1
            if len(str(error)) > LONGEST_MESSAGE:
                raise AssertionError(f"{kind}, seed {seed}, input {number}: a message of {len(str(error))}") from None
        except BaseException as error:
            signal.setitimer(signal.ITIMER_PROF, 0)
            name = Path(tempfile.gettempdir(), f"fuzz-{kind}-{hashlib.blake2b(data, digest_size=6).hexdigest()}")
            name.write_bytes(data)
            raise AssertionError(f"{kind}, seed {seed}, input {number} ({name}): {error!r}"[:2000]) from error
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)
    print(f"{kind}: {inputs} inputs, {refused} refused")
    assert inputs > refused > inputs // 4, "some inputs are to be sound, most are not"


@pytest.mark.parametrize("kind", KINDS)
def test_a_mutated_file_gives_a_result_or_one_clear_error(kind, tmp_path):
    script = f"import sys; from {__name__} import fuzz; fuzz(sys.argv[1], int(sys.argv[2]), *sys.argv[3:])"
    words = [sys.executable, "-c", script, kind, str(INPUTS), SEED, str(tmp_path)]
    done = subprocess.run(words, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-4000:]
