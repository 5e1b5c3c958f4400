"""The batches: the same for any number of ranks and workers, exact evaluation, damage that is named."""

import io
import json
import os
import re
import shutil
import tarfile
import time

import numpy as np
import psutil
import pytest
import torch
import webdataset
from PIL import Image

from pipeline.data.augment import resize, shift
from pipeline.data.index import load_index, write_index
from pipeline.data.loader import SLOTS, DataConfig, Loader, evaluation_stream, train_stream
from pipeline.data.source import Source
from pipeline.data.tar import scan_shard
from pipeline.errors import UserError
from pipeline.runtime import Ranks
from tests.conftest import take

POLICIES = (resize.Config(), shift.Config(pixels=2))
CPU = torch.device("cpu")


def batches(folder, world_size, workers, count, start=0, **options):
    """Global batches: each a list of keys and one tensor of images, joined over ranks."""
    config = DataConfig(train=(f"{folder}/train-{{000..003}}.tar",), global_batch_size=24, shuffle_pool=480, **options)
    index = load_index(config.train)
    streams = []
    for rank in range(world_size):
        ranks = Ranks(rank, world_size, rank, world_size)
        loader = Loader(train_stream(config, index, POLICIES, 16, 10, 7, ranks, start), workers, CPU)
        streams.append(take(loader, count))
        loader.close()
    joined = []
    for parts in zip(*streams, strict=True):
        joined.append(([k for p in parts for k in p.keys], torch.cat([p.images for p in parts])))
    return joined


@pytest.mark.parametrize(("world_size", "workers"), [(1, 1), (1, 3), (2, 0), (3, 2)])
def test_global_batches_do_not_depend_on_ranks_and_workers(digits, world_size, workers):
    reference = batches(digits, 1, 0, 5)
    for (keys, images), (expected_keys, expected) in zip(
        batches(digits, world_size, workers, 5), reference, strict=True
    ):
        assert keys == expected_keys
        assert torch.equal(images, expected)


def test_resume_sees_the_same_batches_on_another_number_of_ranks(digits):
    whole = batches(digits, 1, 0, 6)
    for (keys, images), (expected_keys, expected) in zip(batches(digits, 2, 1, 2, start=4), whole[4:], strict=True):
        assert keys == expected_keys
        assert torch.equal(images, expected)


@pytest.mark.parametrize(("repeats", "world_size"), [(2, 1), (2, 3), (3, 2)])
def test_repeated_augmentation_gives_copies_that_differ(digits, repeats, world_size):
    joined = batches(digits, world_size, 1, 12, repeats=repeats)
    keys = [key for keys, _ in joined for key in keys]
    images = torch.cat([images for _, images in joined])
    for number in range(0, len(keys), repeats):
        assert len(set(keys[number : number + repeats])) == 1
    first, second = images[0::repeats], images[1::repeats]
    assert (first != second).flatten(1).any(1).float().mean() > 0.9  # a shift of (0, 0) may come twice
    for (keys, images), (expected_keys, expected) in zip(
        joined, batches(digits, 1, 0, 12, repeats=repeats), strict=True
    ):
        assert keys == expected_keys
        assert torch.equal(images, expected)


@pytest.mark.parametrize(("world_size", "workers"), [(1, 0), (2, 2), (5, 1)])
def test_evaluation_counts_every_sample_once(digits, world_size, workers):
    config = DataConfig(val=(f"{digits}/val-{{000..001}}.tar",), workers=workers, val_batch_size=50)
    index = load_index(config.val)
    keys, lengths = [], set()
    for rank in range(world_size):
        stream = evaluation_stream(config, index, POLICIES[:1], 16, 10, Ranks(rank, world_size, rank, world_size))
        loader = Loader(stream, workers, CPU)
        parts = take(loader)
        loader.close()
        lengths.add(len(parts))
        keys += [key for p in parts for key, valid in zip(p.keys, p.valid.tolist(), strict=True) if valid]
    assert len(lengths) == 1, "ranks would wait for each other"
    assert len(keys) == 360
    assert len(set(keys)) == 360


@pytest.mark.parametrize("workers", [0, 2])
def test_workers_that_are_started_beforehand_give_every_pass_whole(digits, workers):
    config = DataConfig(val=(f"{digits}/val-{{000..001}}.tar",), workers=workers, val_batch_size=50)
    stream = evaluation_stream(config, load_index(config.val), POLICIES[:1], 16, 10, Ranks(0, 1, 0, 1))
    loader = Loader(stream, workers, CPU)
    loader.start()
    first, second = take(loader), take(loader)
    loader.close()
    assert sum(batch.valid_rows for batch in first) == 360
    assert [batch.keys for batch in first] == [batch.keys for batch in second]


def test_a_world_size_that_does_not_divide_the_lanes_is_refused_with_the_nearest(digits):
    config = DataConfig(train=(f"{digits}/train-{{000..003}}.tar",), global_batch_size=24)
    with pytest.raises(UserError, match=r"5 ranks do not divide 24 lanes.*nearest.*: 4, 6"):
        train_stream(config, load_index(config.train), POLICIES, 16, 10, 0, Ranks(0, 5, 0, 5), 0)


def test_a_negative_seed_is_refused(digits):
    config = DataConfig(train=(f"{digits}/train-{{000..003}}.tar",), global_batch_size=24)
    with pytest.raises(UserError, match=r"run.seed: must not be negative, found -1"):
        train_stream(config, load_index(config.train), POLICIES, 16, 10, -1, Ranks(0, 1, 0, 1), 0)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_batch_keeps_its_images_until_the_next_but_one_is_asked_for(digits, workers):
    config = DataConfig(train=(f"{digits}/train-{{000..003}}.tar",), global_batch_size=24)
    stream = train_stream(config, load_index(config.train), POLICIES, 16, 10, 7, Ranks(0, 1, 0, 1), 0)
    loader = Loader(stream, workers, CPU)
    iterator, seen = iter(loader), set()
    before = next(iterator)
    for _ in range(3 * SLOTS):
        content = before.images.clone()
        batch = next(iterator)
        time.sleep(0.01)  # the workers go on
        assert torch.equal(before.images, content)
        seen.add(batch.images.data_ptr())
        before = batch
    assert len(seen) == SLOTS
    part = batch.images[3:5]  # of one that is held too long
    batch = before = next(iterator)
    with pytest.raises(AssertionError, match="held too long"):
        next(iterator)
    del part
    loader.close()


def evict(path):
    """Takes a file out of the system's memory; skips the test where that can't be done or seen."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())
        for _ in range(100):
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            try:
                os.preadv(file.fileno(), [bytearray(100)], 0, os.RWF_NOWAIT)
            except BlockingIOError:
                return
            except OSError:
                break
            time.sleep(0.02)
    pytest.skip("this file system does not say what is in memory")


def test_only_what_the_system_has_in_memory_is_read_at_once(tmp_path):
    path, content, source = tmp_path / "x.bin", os.urandom(300_000), Source()
    path.write_bytes(content)
    evict(path)
    with pytest.raises(BlockingIOError):
        source.read_cached(str(path), 1000, 200_000)
    assert source.read(str(path), 1000, 200_000) == content[1000:201_000]
    assert source.read_cached(str(path), 1000, 200_000) == content[1000:201_000]


@pytest.mark.parametrize("url", ["missing.tar", "http://127.0.0.1:9/x.tar", "pipe:cat x.tar"])
def test_nothing_else_is_read_at_once(url, tmp_path):
    with pytest.raises(BlockingIOError):
        Source().read_cached(url if ":" in url else str(tmp_path / url), 0, 10)
    short = tmp_path / "short.tar"
    short.write_bytes(bytes(100))
    with pytest.raises(BlockingIOError):
        Source().read_cached(str(short), 50, 100)


def test_threads_give_the_stream_that_the_cache_gives(digits, monkeypatch):
    expected, reads = batches(digits, 1, 0, 8), []
    monkeypatch.setattr(Source, "read_cached", lambda *place: reads.append(place) or raise_blocking())
    for (keys, images), (expected_keys, expected_images) in zip(batches(digits, 1, 0, 8), expected, strict=True):
        assert keys == expected_keys
        assert torch.equal(images, expected_images)
    assert reads


def raise_blocking():
    raise BlockingIOError


def test_the_copies_of_a_drawn_sample_have_its_label(digits):
    """Shards that are drawn with replacement, each sample twice: pixels and label are of the same sample."""
    config = DataConfig(
        train=(f"{digits}/train-{{000..003}}.tar",), global_batch_size=24, repeats=2, resampled=True, shuffle_pool=480
    )
    loader = Loader(train_stream(config, None, POLICIES[:1], 16, 10, 7, Ranks(0, 1, 0, 1), 0), 0, CPU)
    for batch in take(loader, 10):
        assert torch.equal(batch.images[0::2], batch.images[1::2])
        assert torch.equal(batch.labels[0::2], batch.labels[1::2])
        assert batch.keys[0::2] == batch.keys[1::2]


def worker_processes(loader):
    return [psutil.Process(worker.pid) for worker in loader.workers.processes]


def test_workers_hold_the_same_memory_after_each_epoch(digits):
    config = DataConfig(train=(f"{digits}/train-{{000..003}}.tar",), global_batch_size=24, shuffle_pool=480)
    stream = train_stream(config, load_index(config.train), POLICIES, 16, 10, 7, Ranks(0, 1, 0, 1), 0)
    loader = Loader(stream, 2, CPU)
    found = []
    for step, _ in enumerate(loader, 1):
        if step % 60 == 0:  # an epoch of 1,437 samples
            found.append(sum(worker.memory_info().rss for worker in worker_processes(loader)))
        if len(found) == 4:
            break
    loader.close()
    assert max(found[1:]) < 1.05 * found[0], found


def test_a_shard_larger_than_memory_is_read_by_windows(tmp_path):
    """One shard of 400 samples of 1 MB: a JPEG, and what a camera may leave behind its end."""
    photo = io.BytesIO()
    Image.fromarray(np.zeros((20, 30, 3), np.uint8)).save(photo, "JPEG")
    content = photo.getvalue() + bytes(1_000_000)
    with webdataset.TarWriter(str(tmp_path / "train-000.tar"), mtime=0) as writer:
        for number in range(400):
            writer.write({"__key__": f"{number:04d}", "jpg": content, "cls": "1"})
    write_index([str(tmp_path / "train-000.tar")])
    config = DataConfig(train=(str(tmp_path / "train-000.tar"),), global_batch_size=8, shuffle_pool=32)
    stream = train_stream(config, load_index(config.train), POLICIES, 16, 10, 7, Ranks(0, 1, 0, 1), 0)
    loader = Loader(stream, 1, CPU)
    iterator, held = iter(loader), []
    for _ in range(55):  # more than an epoch
        assert next(iterator).valid_rows == 8
        (worker,) = worker_processes(loader)
        held.append(worker.memory_full_info().uss)  # what it doesn't share with this process
    loader.close()
    # The pool of 32 MB, the windows that are read ahead, and what is being parsed of them.
    assert max(held) < 150e6, max(held)


def damaged(digits, tmp_path, position, value):
    for file in digits.iterdir():
        shutil.copy(file, tmp_path)
    path = tmp_path / "train-000.tar"
    content = bytearray(path.read_bytes())
    content[position] ^= value
    path.write_bytes(content)
    return str(path)


def read_all(path):
    """One pass over a shard: its rows' keys, which of them are valid, and the bad ones."""
    config = DataConfig(val=(path,), workers=0)
    stream = evaluation_stream(config, load_index(config.val), POLICIES[:1], 16, 10, Ranks(0, 1, 0, 1))
    parts = take(Loader(stream, 0, CPU))
    keys = [key for part in parts for key in part.keys]
    return keys, torch.cat([part.valid for part in parts]), [entry for part in parts for entry in part.bad]


def test_a_flipped_header_byte_masks_its_sample_and_no_other(digits, tmp_path):
    records = scan_shard(f"{digits}/train-000.tar").records
    whole, _, _ = read_all(f"{digits}/train-000.tar")
    path = damaged(digits, tmp_path, int(records["offset"][10]) + 3, 0x40)
    keys, valid, bad = read_all(path)
    assert valid.sum() == len(records) - 1
    assert not valid[10]
    assert [k.rpartition(" ")[2] for k in keys[:10] + keys[11:]] == [
        k.rpartition(" ")[2] for k in whole[:10] + whole[11:]
    ]
    assert len(bad) == 1
    assert re.search(r"train-000.tar: sample 10 of \d+", bad[0][0])
    assert re.search(r"damaged at byte \d+.*pipeline.shards verify", bad[0][1])


def test_a_sample_that_was_exchanged_for_another_is_masked(digits, tmp_path):
    """The tar is whole and has the same number of samples: only the index tells."""
    for file in digits.iterdir():
        shutil.copy(file, tmp_path)
    path = tmp_path / "train-000.tar"
    whole = [key for key in read_all(str(path))[0] if key]  # the rest pads the last batch
    with tarfile.open(path) as tar:
        members = [(m.name, tar.extractfile(m).read()) for m in tar]
    taken = members[6][0].partition(".")[0]
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for name, content in members:
            info = tarfile.TarInfo(name.replace(taken, "9999"))
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    assert path.stat().st_size == (digits / "train-000.tar").stat().st_size
    keys, valid, bad = read_all(str(path))
    assert valid.sum() == len(whole) - 1
    assert "not the indexed sample" in bad[0][1]
    assert [k for k, v in zip(keys, valid, strict=True) if v] == [k for k in whole if not k.endswith(taken)]


def test_flipped_image_bytes_name_shard_and_sample(digits, tmp_path):
    records = scan_shard(f"{digits}/train-000.tar").records
    with open(f"{digits}/train-000.tar", "rb") as file:
        begin = file.read().index(b"\x89PNG")
    _, valid, bad = read_all(damaged(digits, tmp_path, begin, 0xFF))
    assert valid.sum() == len(records) - 1
    assert re.search(r"train-000.tar: sample \d+", bad[0][0])
    assert "can't be decoded" in bad[0][1]


def test_index_covers_whole_members(digits):
    scan = scan_shard(f"{digits}/train-000.tar")
    nbytes, records = scan.nbytes, scan.records
    ends = records["offset"] + records["nbytes"]
    assert (ends[:-1] == records["offset"][1:]).all()
    assert nbytes >= ends[-1]
    assert np.bincount(records["label"]).sum() == len(records)


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"", "empty file"), (b"no tar at all" * 100, "no readable tar"), (bytes(10240), "without samples")],
)
def test_a_bad_tar_is_refused_when_the_index_is_written(tmp_path, content, message):
    path = tmp_path / "x.tar"
    path.write_bytes(content)
    with pytest.raises(UserError, match=f"x.tar: .*{message}"):
        write_index([str(path)])
    assert not (tmp_path / "index.json").exists()


COUNTS = {
    "sizes.json": lambda counts: counts,
    "_info.json": lambda counts: {"splits": {"train": {"filenames": [*counts], "shard_lengths": [*counts.values()]}}},
}


@pytest.mark.parametrize("name", COUNTS)
def test_counts_that_others_have_left_beside_the_shards_are_compared(digits, tmp_path, name):
    for file in digits.glob("train-*.tar"):
        shutil.copy(file, tmp_path)
    urls = [str(path) for path in sorted(tmp_path.glob("*.tar"))]
    counts = {f"train-00{n}.tar": count for n, count in enumerate([360, 359, 359, 359])}
    (tmp_path / name).write_text(json.dumps(COUNTS[name](counts)))
    assert write_index(urls).samples == 1437
    os.remove(tmp_path / "index.json")
    (tmp_path / name).write_text(json.dumps(COUNTS[name]({**counts, "train-002.tar": 400})))
    with pytest.raises(UserError, match=rf"train-002.tar: 359 samples, but {name} beside it says 400"):
        write_index(urls)
    assert not (tmp_path / "index.json").exists()


def test_an_index_keeps_what_it_had_of_other_shards(digits, tmp_path):
    for file in digits.glob("*.tar"):
        shutil.copy(file, tmp_path)
    write_index([str(path) for path in tmp_path.glob("train-*.tar")])
    write_index([str(path) for path in tmp_path.glob("val-*.tar")], processes=2)
    assert load_index([f"{tmp_path}/train-{{000..003}}.tar", f"{tmp_path}/val-{{000..001}}.tar"]).samples == 1797
