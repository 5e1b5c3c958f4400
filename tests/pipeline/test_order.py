"""The order of the stream: exactly once an epoch, and a function of seed and step alone."""

import numpy as np
import pytest

from pipeline.data.order import AUGMENT, KeyedGenerator, Order, auto_lanes, random_order, share


def samples(order, lane, count, start=0):
    """(epoch, shard, sample) of a lane's positions start..start+count-1."""
    found = []
    for position in range(start, start + count):
        window, slot = order.locate(lane, position)
        line = [(p.shard, n) for p in order.pieces(window) for n in range(p.begin, p.end)]
        found.append((window.epoch, *line[order.shuffled(window)[slot]]))
    return found


@pytest.mark.parametrize(
    ("counts", "lanes", "pool"),
    [([1, 7, 30, 2, 100], 8, 40), ([3], 8, 8), ([5, 6], 4, 1000), ([1, 1, 1], 16, 16), ([1000], 1, 64)],
)
def test_every_sample_comes_exactly_once_an_epoch(counts, lanes, pool):
    order = Order(np.array(counts), seed=3, lanes=lanes, pool=pool)
    epochs = 4
    seen = []
    for lane in range(lanes):
        length = (epochs * sum(counts) + lane) // lanes
        seen += samples(order, lane, length)
    expected = [(e, s, n) for e in range(epochs) for s, count in enumerate(counts) for n in range(count)]
    assert sorted(seen) == expected


def test_lanes_never_drift_apart():
    order = Order(np.array([5, 1, 7]), seed=1, lanes=8, pool=16)
    for epochs in range(1, 9):
        lengths = [sum(order.locate(lane, p)[0].epoch < epochs for p in range(20)) for lane in range(8)]
        assert sum(lengths) == 13 * epochs
        assert max(lengths) - min(lengths) <= 1


def test_a_lane_can_be_entered_anywhere():
    order = Order(np.array([50, 30, 77]), seed=1, lanes=4, pool=32)
    whole = samples(order, 2, 150)
    for start in (1, 39, 40, 100):
        assert samples(Order(order.counts, 1, 4, 32), 2, 150 - start, start) == whole[start:]


def test_epochs_and_seeds_have_other_orders():
    order = Order(np.array([40, 40]), seed=0, lanes=2, pool=80)
    first, second = samples(order, 0, 40), samples(order, 0, 40, start=40)
    assert [s[1:] for s in first] != [s[1:] for s in second]
    assert samples(Order(order.counts, 1, 2, 80), 0, 40) != first


def test_without_shuffle_the_stream_is_one_pass_in_order():
    order = Order(np.array([4, 3]), seed=0, lanes=2, pool=4, shuffle=False)
    assert samples(order, 0, 3) + samples(order, 1, 4) == [
        (0, 0, 0), (0, 0, 1), (0, 0, 2), (0, 0, 3), (0, 1, 0), (0, 1, 1), (0, 1, 2)
    ]  # fmt: skip
    assert order.locate(0, 3) is None


def test_random_order_is_pinned():
    """Another order after an upgrade would break every resume: the numbers are written down."""
    assert random_order(8, 0, 1, 2).tolist() == [6, 7, 2, 3, 0, 5, 1, 4]
    assert sorted(random_order(100, 5)) == list(range(100))
    raw = KeyedGenerator(7, AUGMENT).at(3, (1, 2), 0).bit_generator.random_raw(2)
    assert raw.tolist() == [10257912396488882048, 1255262154333048697]


def test_a_samples_random_numbers_depend_on_its_key_alone():
    """Whatever was drawn before: also what the generator keeps of it, such as the half of a number."""
    keyed = KeyedGenerator(-5, AUGMENT)
    for epoch, sample, copy in [(0, (0, 0), 0), (0, (0, 1), 0), (0, (1, 0), 0), (9, (3, 2**40), 0), (9, (3, 2**40), 1)]:
        counter = (0, epoch << 32 | copy, *sample)
        expected = np.random.Generator(np.random.Philox(key=np.array([2**64 - 5, AUGMENT], np.uint64), counter=counter))
        found = keyed.at(epoch, sample, copy)
        drawn = [
            (rng.random(), rng.integers(0, 1000), rng.normal(), rng.random(dtype=np.float32))
            for rng in (found, expected)
        ]
        assert drawn[0] == drawn[1]


def test_auto_lanes_and_shares():
    assert [auto_lanes(n) for n in (64, 4096, 1000, 7, 6000)] == [64, 1024, 1000, 7, 1000]
    assert [list(share(7, 3, part)) for part in range(3)] == [[0, 1], [2, 3], [4, 5, 6]]
