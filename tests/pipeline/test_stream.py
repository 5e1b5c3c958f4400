"""The batches: the same for any number of ranks and workers, exact evaluation, damage that is named."""

import shutil

import numpy as np
import pytest
import torch

from pipeline.data.augment import resize, shift
from pipeline.data.index import load_index, scan_shard, write_index
from pipeline.data.loader import DataConfig, Loader, evaluation_stream, train_stream
from pipeline.errors import UserError
from pipeline.runtime import Ranks

POLICIES = (resize.Config(), shift.Config(pixels=2))
CPU = torch.device("cpu")


def batches(folder, world_size, workers, count, start=0):
    """Global batches: each a list of keys and one tensor of images, joined over ranks."""
    config = DataConfig(train=(f"{folder}/train-{{000..003}}.tar",), global_batch_size=24, shuffle_pool=480)
    index = load_index(config.train)
    streams = []
    for rank in range(world_size):
        ranks = Ranks(rank, world_size, rank, world_size)
        loader = Loader(train_stream(config, index, POLICIES, 16, 10, 7, ranks, start), workers, CPU)
        iterator = iter(loader)
        streams.append([next(iterator) for _ in range(count)])
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


@pytest.mark.parametrize(("world_size", "workers"), [(1, 0), (2, 2), (5, 1)])
def test_evaluation_counts_every_sample_once(digits, world_size, workers):
    config = DataConfig(val=(f"{digits}/val-{{000..001}}.tar",), workers=workers, val_batch_size=50)
    index = load_index(config.val)
    keys, lengths = [], set()
    for rank in range(world_size):
        stream = evaluation_stream(config, index, POLICIES[:1], 16, 10, Ranks(rank, world_size, rank, world_size))
        loader = Loader(stream, workers, CPU)
        parts = list(loader)
        loader.close()
        lengths.add(len(parts))
        keys += [key for p in parts for key, valid in zip(p.keys, p.valid.tolist(), strict=True) if valid]
    assert len(lengths) == 1, "ranks would wait for each other"
    assert len(keys) == 360
    assert len(set(keys)) == 360


def test_a_world_size_that_does_not_divide_the_lanes_is_refused_with_the_nearest(digits):
    config = DataConfig(train=(f"{digits}/train-{{000..003}}.tar",), global_batch_size=24)
    with pytest.raises(UserError, match=r"5 ranks do not divide 24 lanes.*nearest.*: 4, 6"):
        train_stream(config, load_index(config.train), POLICIES, 16, 10, 0, Ranks(0, 5, 0, 5), 0)


def damaged(digits, tmp_path, position, value):
    for file in digits.iterdir():
        shutil.copy(file, tmp_path)
    path = tmp_path / "train-000.tar"
    content = bytearray(path.read_bytes())
    content[position] ^= value
    path.write_bytes(content)
    return str(path)


def read_all(path):
    config = DataConfig(val=(path,), workers=0)
    stream = evaluation_stream(config, load_index(config.val), POLICIES[:1], 16, 10, Ranks(0, 1, 0, 1))
    return list(Loader(stream, 0, CPU))


def test_a_flipped_header_byte_is_named_and_drops_no_sample_silently(digits, tmp_path):
    _, records = scan_shard(f"{digits}/train-000.tar")
    path = damaged(digits, tmp_path, int(records["offset"][10]) + 3, 0x40)
    with pytest.raises(UserError, match=r"train-000.tar: damaged at byte \d+.*pipeline.shards verify"):
        read_all(path)


def test_flipped_image_bytes_name_shard_and_sample(digits, tmp_path):
    _, records = scan_shard(f"{digits}/train-000.tar")
    header = int(records["offset"][0]) + 512
    with open(f"{digits}/train-000.tar", "rb") as file:
        begin = file.read().index(b"\x89PNG", header - 512)
    path = damaged(digits, tmp_path, begin, 0xFF)
    with pytest.raises(UserError, match=r"train-000.tar: sample \d+: can't be decoded"):
        read_all(path)


def test_index_covers_whole_members(digits):
    nbytes, records = scan_shard(f"{digits}/train-000.tar")
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
