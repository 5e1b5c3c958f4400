"""What is watched while a run trains: losses that are not finite, loss spikes, slow ranks.

Each step leaves three numbers on the device; they are read once a log interval, summed over the ranks.
"""

import math
import statistics
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from pipeline.engine import MIN_LOSS_SCALE, Engine
from pipeline.errors import UserError
from pipeline.monitor.jsonl import Lines
from pipeline.options import option

SIGMA_OF_MAD = 1.4826  # standard deviations in a normal distribution's median absolute deviation
LEAST_WINDOW = 16  # losses that a threshold is drawn from at the least
LEAST_TIMES = 5  # forward passes, or waits for data, that a rank is judged by at the least
NOISE = 3  # standard errors of a rank's mean that may be chance
NAMED_SAMPLES = 8  # samples that a message names


@dataclass(frozen=True, kw_only=True)
class HealthConfig:
    on_spike: Literal["none", "skip", "rollback"] = option(
        "none",
        "a step whose loss jumps: none: say so; skip: no update; rollback: to the checkpoint before it, without it",
    )
    spike_z_score: float = option(
        10.0, "a spike lies this many robust standard deviations above the median of the window"
    )
    spike_window_steps: int = option(200, "steps before a spike that it is compared with")
    max_spikes: int = option(20, "spikes that are skipped or rolled back before the run stops", may_change=True)
    max_nonfinite_steps: int = option(
        20, "steps without an update, since loss or gradient was not finite, before the run stops", may_change=True
    )
    hang_seconds: float | None = option(
        600.0, "a rank that gets nowhere for so long tells why and ends the job; null: never", may_change=True
    )
    slow_rank_ratio: float = option(
        1.15, "a rank is named whose forward pass, or step with its wait for data, takes this many times the median's",
        may_change=True,
    )  # fmt: skip
    nan_at_step: int | None = option(
        None, "fault for drills: the loss of this step, counted from 0, becomes NaN on the last rank", may_change=True
    )

    def __post_init__(self) -> None:
        if self.spike_window_steps < LEAST_WINDOW:
            raise ValueError(f"spike_window_steps: must be at least {LEAST_WINDOW}, found {self.spike_window_steps}")
        for name in ("spike_z_score", "hang_seconds"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ValueError(f"{name}: must be positive, found {value}")
        if self.slow_rank_ratio <= 1:
            raise ValueError(f"slow_rank_ratio: must be above 1, found {self.slow_rank_ratio}")


class Rollback(Exception):
    """The run goes back to the checkpoint before step `first` and leaves out the steps `first` to `last`."""

    def __init__(self, first: int, last: int, reason: str):
        super().__init__(reason)
        self.first, self.last, self.reason = first, last, reason


@dataclass(frozen=True)
class StepRecord:
    """What is known of one step (counted from 0), by all ranks."""

    step: int
    loss: float
    grad_norm: float

    @property
    def finite(self) -> bool:
        return abs(self.loss) < float("inf") and abs(self.grad_norm) < float("inf")


@dataclass
class SpikeDetector:
    """A robust z-score over a window of losses (Iglewicz and Hoaglin 1993, with the median absolute deviation)."""

    z_score: float
    window: deque[float]
    threshold: float | None = None  # a loss above it is a spike

    @classmethod
    def resume(cls, config: HealthConfig, saved: dict[str, Any] | None) -> "SpikeDetector":
        """As it was when `saved` was written into a checkpoint."""
        saved = saved or {"window": [], "threshold": None}
        return cls(config.spike_z_score, deque(saved["window"], config.spike_window_steps), saved["threshold"])

    def add(self, loss: float) -> bool:
        """Whether the loss is a spike; if not, it joins the window."""
        if self.threshold is not None and loss > self.threshold:
            return True
        self.window.append(loss)
        return False

    def renew(self) -> None:
        """Draws the threshold from the window. At log steps only, so that a resume finds the same one."""
        if len(self.window) >= LEAST_WINDOW:
            middle = statistics.median(self.window)
            deviation = SIGMA_OF_MAD * statistics.median(abs(loss - middle) for loss in self.window)
            # Losses that hardly vary would make a spike of any: a thousandth of them is none.
            self.threshold = middle + self.z_score * max(deviation, 1e-3 * abs(middle))

    def saved(self) -> dict[str, Any]:
        return {"window": list(self.window), "threshold": self.threshold}


@dataclass
class Health:
    """Keeps account of a run's steps. All ranks hold the same conclusions."""

    config: HealthConfig
    engine: Engine
    detector: SpikeDetector
    notes: Lines  # health.jsonl
    counts: dict[str, int]  # of this run: spikes, nonfinite_steps
    devices: list[str] = field(default_factory=list)  # of each rank
    pending: list[tuple[int, Tensor, list[str]]] = field(default_factory=list)
    slow: set[int] = field(default_factory=set)

    def guarded(self, loss: Tensor, loss_sum: Tensor, count: Tensor) -> Tensor:
        """The loss of a step's last micro batch, made NaN in a spike that is to be skipped. Collective.

        `loss_sum` and `count` are this rank's of the whole step. Then no gradient of the step is finite, and its
        update is left out as that of any such step.
        """
        if self.config.on_spike != "skip" or self.detector.threshold is None:
            return loss
        total, rows = self.engine.reduce_sum(torch.stack([loss_sum.double(), count.double()])).unbind()
        return loss * torch.where(total / rows > self.detector.threshold, float("nan"), 1.0)

    def add(self, step: int, loss_sum: Tensor, count: Tensor, grad_norm: Tensor, keys: list[str]) -> None:
        """Takes down a rank's part of a step; nothing is asked of the device."""
        self.pending.append((step, torch.stack([loss_sum.double(), count.double(), grad_norm.double()]), keys))

    def read(self) -> list[StepRecord]:
        """The steps since the last call, judged: spikes and steps without an update are told. Collective, one sync.

        Raises:
            UserError: more steps were left out than the config allows.
            Rollback: a spike, where the config wants to go back behind it.
        """
        if not self.pending:
            return []
        mine = torch.stack([numbers for _, numbers, _ in self.pending])  # (steps, 3)
        totals = self.engine.reduce_sum(mine.clone())
        totals[:, 2] /= self.engine.ranks.world_size  # the norm is the same on all
        records = [
            StepRecord(step, total / max(count, 1.0), norm)
            for (step, _, _), (total, count, norm) in zip(self.pending, totals.tolist(), strict=True)
        ]
        taken, self.pending = self.pending, []
        spikes = []
        scale = self.engine.loss_scale()
        for (_, _, keys), own, record in zip(taken, mine[:, 0].tolist(), records, strict=True):
            has_loss = abs(record.loss) < float("inf")
            is_spike = has_loss and self.detector.add(record.loss)
            if is_spike:
                spikes.append(record)
            if record.finite:
                self.counts.pop("overflows_in_a_row", None)
            elif is_spike and self.config.on_spike == "skip":
                pass  # `guarded` has made it NaN
            elif has_loss and scale is not None and scale.scale > MIN_LOSS_SCALE:
                self._overflowed(record, scale.scale)
            else:
                self._left_out(record, own, keys)
        if spikes:
            self._spiked(spikes)
        return records

    def renew(self) -> None:
        """At log steps: draws a new threshold for spikes."""
        self.detector.renew()

    def name_slow_ranks(
        self, step: int, forward_seconds: list[float], waited_seconds: list[float], seconds: float
    ) -> dict[str, float]:
        """Compares the ranks' forward passes and waits for data since the last log step, `seconds` ago. Collective.

        In neither does a rank wait for another one; but under ZeRO-3 a forward pass waits for the others' weights, and
        the ranks differ less.
        """
        if self.engine.ranks.world_size == 1 or not forward_seconds or not waited_seconds:
            return {}
        own = [*_mean_and_noise(forward_seconds), *_mean_and_noise(waited_seconds), seconds / len(waited_seconds)]
        mine = torch.tensor([own], dtype=torch.float64, device=self.engine.device)
        passes, pass_noise, waits, wait_noise, steps = zip(*self.engine.gather_rows(mine).tolist(), strict=True)
        median, median_wait = statistics.median_low(passes), statistics.median_low(waits)
        slow = set()
        for rank, device in enumerate(self.devices):
            ratio = (passes[rank] - pass_noise[rank]) / median
            excess = waits[rank] - wait_noise[rank] - median_wait  # what a step would take less with the median's data
            reasons = []
            if ratio > self.config.slow_rank_ratio:
                reasons.append(
                    f"its forward pass takes {1000 * passes[rank]:.1f} ms, {passes[rank] / median:.2f} times the ranks'"
                    " median: look at its node's load, clocks and heat"
                )
            if steps[rank] > self.config.slow_rank_ratio * (steps[rank] - excess):
                reasons.append(
                    f"it waits {1000 * waits[rank]:.1f} of a step's {1000 * steps[rank]:.1f} ms for data, the ranks'"
                    f" median {1000 * median_wait:.1f} ms: look at its node's load, disk and network"
                )
            if reasons:
                slow.add(rank)
                if rank not in self.slow:
                    self._tell(f"step {step}: rank {rank} ({device}) is slow: {'; '.join(reasons)}")
        self.slow = slow
        ranks = range(len(passes))
        slowest, waiting = max(ranks, key=lambda rank: passes[rank]), max(ranks, key=lambda rank: waits[rank])
        return {
            "slowest_rank": slowest,
            "slowest_rank_ratio": passes[slowest] / median,
            "longest_data_wait_rank": waiting,
            "longest_data_wait_seconds": waits[waiting],
        }

    def _overflowed(self, record: StepRecord, scale: float) -> None:
        """Counts the steps that fp16's loss scale takes to fall: a few are usual, but it must find its place."""
        count = self.counts["overflows_in_a_row"] = self.counts.get("overflows_in_a_row", 0) + 1
        if count > self.config.max_nonfinite_steps:
            raise UserError(
                f"step {record.step + 1}: the gradient has overflowed in {count} steps in a row, the loss scale is down"
                f" to {scale:g}, and health.max_nonfinite_steps={self.config.max_nonfinite_steps}; the weights are"
                " finite: set engine.precision=bf16 or no, lower schedule.peak_lr or engine.initial_loss_scale, and"
                " start again"
            )

    def _left_out(self, record: StepRecord, own_loss: float, keys: list[str]) -> None:
        """Names the ranks and samples of a step whose loss or gradient was not finite."""
        bad = abs(own_loss) == float("inf") or own_loss != own_loss
        ranks = self.engine.gather_objects(keys if bad else None)
        found = {rank: named for rank, named in enumerate(ranks) if named is not None}
        self.counts["nonfinite_steps"] = self.counts.get("nonfinite_steps", 0) + 1
        where = "; ".join(f"rank {rank}: {_some(named)}" for rank, named in found.items())
        what = f"the loss was not finite on {where}" if found else "the gradient was not finite, the losses were"
        self._note({"step": record.step + 1, "what": "not finite", "ranks": found})
        self._tell(f"step {record.step + 1}: {what}; weights and moments stayed as they were")
        if self.counts["nonfinite_steps"] > self.config.max_nonfinite_steps:
            weights = "the weights are finite" if self.engine.weights_are_finite() else "the weights are not finite"
            raise UserError(
                f"step {record.step + 1}: {what}; {self.counts['nonfinite_steps']} steps by now, and"
                f" health.max_nonfinite_steps={self.config.max_nonfinite_steps}; {weights}: lower"
                " schedule.peak_lr, set engine.grad_clip, or engine.precision=no, and start again"
            )

    def _spiked(self, spikes: Sequence[StepRecord]) -> None:
        first, last, action = spikes[0], spikes[-1], self.config.on_spike
        worst = max(spikes, key=lambda record: record.loss)
        assert self.detector.threshold is not None
        text = f"loss {worst.loss:.4g} at step {worst.step + 1}, above {self.detector.threshold:.4g}"
        self.counts["spikes"] = self.counts.get("spikes", 0) + len(spikes)
        done = {"none": "nothing is done (health.on_spike)", "skip": "its update was left out",
                "rollback": f"back to the checkpoint before step {first.step + 1}"}[action]  # fmt: skip
        for record in spikes:
            self._note({"step": record.step + 1, "what": f"spike: {action}", "loss": record.loss})
        self._tell(f"spike: {text}: {done}")
        if action != "none" and self.counts["spikes"] > self.config.max_spikes:
            raise UserError(
                f"{text}: the {self.counts['spikes']}. spike, and health.max_spikes={self.config.max_spikes}; lower"
                " schedule.peak_lr or engine.grad_clip, or allow more, and start again"
            )
        if action == "rollback":
            raise Rollback(first.step, last.step, text)

    def _note(self, entry: dict[str, Any]) -> None:
        if self.engine.ranks.is_main:
            self.notes.write(entry)
            self.notes.flush()

    def _tell(self, message: str) -> None:
        if self.engine.ranks.is_main:
            print(f"\nwarning: {message}", flush=True)

    def saved(self) -> dict[str, Any]:
        """What a checkpoint keeps of it."""
        return {"counts": self.counts, "spikes": self.detector.saved()}


def _mean_and_noise(seconds: list[float]) -> tuple[float, float]:
    """The mean, and how much of it may be by chance: `NOISE` standard errors.

    The largest is left out: one hiccup is none, while a rank that is throttled stands still again and again. Short
    forward passes on a busy host scatter widely, and a few of them tell more of the moment than of the rank.
    """
    steady = sorted(seconds)[:-1] or seconds
    noise = NOISE * statistics.stdev(steady) / math.sqrt(len(steady)) if len(seconds) >= LEAST_TIMES else math.inf
    return statistics.mean(steady), noise


def _some(keys: list[str]) -> str:
    more = f" and {len(keys) - NAMED_SAMPLES} more (health.jsonl)" if len(keys) > NAMED_SAMPLES else ""
    return ", ".join(keys[:NAMED_SAMPLES]) + more
