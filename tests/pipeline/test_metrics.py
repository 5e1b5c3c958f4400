"""Metrics of an interval: over ranks, over a resume, and the speed of exactly its steps."""

from types import SimpleNamespace

import pytest
import torch

from pipeline.metrics import Sums
from pipeline.monitor import meter
from pipeline.monitor.meter import Meter


class Ranks:
    """Engines of some ranks in one process: collectives meet in what the ranks before have given."""

    def __init__(self, count):
        self.given = {}
        self.engines = [self.engine(rank, count) for rank in range(count)]

    def engine(self, rank, count):
        ranks = SimpleNamespace(rank=rank, world_size=count, is_main=rank == 0)

        def reduce_sum(values):
            self.given[rank] = values
            return torch.stack([self.given[n] for n in sorted(self.given)]).sum(0)

        def gather_rows(values):
            self.given[rank] = values[0]
            return torch.stack([self.given[n] for n in sorted(self.given)])

        return SimpleNamespace(ranks=ranks, device="cpu", reduce_sum=reduce_sum, gather_rows=gather_rows)


def values(rank, step):
    return {"loss": torch.tensor(0.1 * (rank + 3) / (step + 7)), "count": torch.tensor(8 - rank)}


def after(ranks, sums, method):
    """What the last rank, which has met all others, gets of a collective."""
    ranks.given.clear()
    return [getattr(one, method)() for one in sums][-1]


@pytest.mark.parametrize("count", [1, 2, 3])
def test_an_interval_that_a_resume_cuts_has_the_means_of_one_that_was_not(count):
    ranks = Ranks(count)
    undisturbed = [Sums(engine) for engine in ranks.engines]
    resumed = [Sums(engine) for engine in ranks.engines]
    for step in range(7):
        for rank in range(count):
            undisturbed[rank].add(values(rank, step))
            resumed[rank].add(values(rank, step))
        if step == 3:
            saved = after(ranks, resumed, "saved")
            after(ranks, undisturbed, "saved")  # a save must not change anything
            resumed = [Sums.resume(engine, saved) for engine in ranks.engines]
    assert after(ranks, resumed, "read") == after(ranks, undisturbed, "read")
    assert after(ranks, resumed, "saved") == {}
    assert after(ranks, resumed, "read") == {"count": 0.0}


def test_an_interval_goes_on_on_another_number_of_ranks():
    four, three = Ranks(4), Ranks(3)
    sums = [Sums(engine) for engine in four.engines]
    for rank in range(4):
        sums[rank].add(values(rank, 0))
    saved = after(four, sums, "saved")
    expected = after(four, sums, "read")
    resumed = [Sums.resume(engine, saved) for engine in three.engines]
    assert after(three, resumed, "read") == pytest.approx(expected)


@pytest.fixture
def clock(monkeypatch):
    now = SimpleNamespace(seconds=100.0)
    monkeypatch.setattr(meter.time, "perf_counter", lambda: now.seconds)
    return now


def test_each_interval_counts_the_images_and_waits_of_its_own_steps(clock):
    counter = Meter(1, None, 1)

    def step(wait, compute):
        with counter.waiting():
            clock.seconds += wait
        clock.seconds += compute
        counter.step(64)

    clock.seconds += 50  # before the first step
    counter.reset()
    for _ in range(2):
        for _ in range(4):
            step(1.0, 3.0)
        assert counter.waits == [1.0] * 4
        assert counter.read() == {"images_per_second": 16.0, "data_wait_fraction": 0.25}
    clock.seconds += 2.0
    counter.step(64)  # the last step waits for no data
    assert counter.waits == [0.0]
    assert counter.read() == {"images_per_second": 32.0, "data_wait_fraction": 0.0}
    assert (counter.total_images, counter.total_seconds) == (9 * 64, 34.0)


def test_an_evaluation_inside_of_an_interval_takes_no_time_and_drops_no_steps(clock):
    counter = Meter(1, None, 1)
    for number in range(4):
        clock.seconds += 2.0
        counter.step(64)
        if number == 1:
            with counter.paused():
                clock.seconds += 1000.0
    assert counter.read()["images_per_second"] == 32.0
    assert counter.total_seconds == 8.0
