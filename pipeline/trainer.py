"""The training loop: `fit` over injected parts, and one optimizer `step`."""

import contextlib
import os
import re
import sys
from collections import ChainMap
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.checkpoint import Saver
from pipeline.data.loader import Batch, Loader
from pipeline.data.mix import MixConfig, mix
from pipeline.data.order import DROPOUT
from pipeline.engine import Engine
from pipeline.errors import Interrupted, UserError, WorkerDied
from pipeline.health import Health
from pipeline.lease import Lease, LeaseLost
from pipeline.ledger import Ledger
from pipeline.meeting import StopNews
from pipeline.metrics import Sums
from pipeline.monitor.meter import Meter
from pipeline.monitor.sink import Sinks
from pipeline.options import option
from pipeline.runtime import LAUNCHER_SECONDS, Agreement, Vote, launcher_patience
from pipeline.watchdog import Watchdog

CLOSE_SECONDS = 20.0  # for a checkpoint under way to be written by all, when a rank has failed


@dataclass(frozen=True, kw_only=True)
class ProfileConfig:
    start_step: int = option(10, "first step to record", may_change=True)
    steps: int = option(0, "steps to record; 0: no profile", may_change=True)


@dataclass(frozen=True, kw_only=True)
class RunSettings:
    dir: str | None = option(None, "run directory; null: runs/<config name>", may_change=True)
    mode: str = option(
        "700", 'who may enter the run directory when it is created, as for chmod; "750": your group', may_change=True
    )
    seed: int = option(0, "seed of the initial weights, the order of the data and all augmentation")
    steps: int | None = option(None, "length in optimizer steps (exactly one of steps and epochs)", may_change=True)
    epochs: float | None = option(None, "length in passes over the training data", may_change=True)
    log_every_steps: int = option(20, "steps between log lines", may_change=True)
    evaluate_every_steps: int | None = option(None, "steps between evaluations; null: at the end", may_change=True)
    deterministic: bool = option(False, "the same losses bit for bit in each run on the same ranks", may_change=True)
    profile: ProfileConfig = option(ProfileConfig(), "torch profiler", may_change=True)

    def __post_init__(self) -> None:
        if (self.steps is None) == (self.epochs is None):
            raise ValueError(f"steps: set exactly one of steps ({self.steps}) and epochs ({self.epochs})")
        length = self.steps if self.steps is not None else self.epochs
        if length is not None and length <= 0:
            raise ValueError(f"steps: the length of the run must be positive, found {length}")
        if not re.fullmatch(r"0?[0-7]?7[0-7][0145]", self.mode):
            raise ValueError(
                f'mode: expected three octal digits such as "700" or "750", with all rights for you and none to write'
                f" for everybody, found {self.mode!r}"
            )
        if self.log_every_steps < 1:
            raise ValueError(f"log_every_steps: must be at least 1, found {self.log_every_steps}")

    @property
    def directory_mode(self) -> int:
        return int(self.mode, 8)

    def total_steps(self, samples: int, global_batch: int) -> int:
        if self.steps is not None:
            return self.steps
        assert self.epochs is not None
        return -(-int(self.epochs * samples) // global_batch)


def due(step: int, every: int | None, total_steps: int) -> bool:
    """Whether something that happens every so many steps, and at the end, happens after `step` steps."""
    return step == total_steps or (every is not None and step % every == 0)


def is_complete(step: int, total_steps: int, evaluation_due: bool) -> bool:
    """Whether nothing is left of a run that has done `step` steps."""
    return step >= total_steps and not evaluation_due


class BrokenOff(Exception):
    """An evaluation that a stop has ended."""


@dataclass(frozen=True)
class StepResult:
    grad_norm: Tensor
    metrics: list[dict[str, Tensor]]


@dataclass
class Trainer:
    """One run. `fit` is the loop; the parts come from `build.py`."""

    settings: RunSettings
    engine: Engine
    objective: Any
    mix: MixConfig
    num_classes: int
    schedule: Callable[[int], float]
    train: Loader
    val: Loader | None
    sinks: Sinks
    meter: Meter
    vote: Vote
    health: Health
    watchdog: Watchdog
    news: StopNews
    ledger: Ledger
    saver: Saver
    lease: Lease  # on the run directory: checked before anything is written there
    averaged_model: Callable[[], nn.Module] | None  # the moving average of the weights, if there is one
    skips: Sequence[tuple[int, int]]  # first and last step (from 0) of batches that are left out
    profiler: Any
    class_names: list[str]
    start_step: int
    total_steps: int
    epoch_rows: int | None  # None: there are no epochs
    val_samples: int
    steps_done: int
    last_evaluation: dict[str, float]
    evaluated_step: int  # of `last_evaluation`
    evaluation_due: bool  # a stop has broken off the one of the step that is done
    sums: Sums  # of the steps since the last log line
    grad_norm: float | None  # the last finite one since then
    logs: dict[str, Any]  # the states of the run's logs at its last checkpoint
    failure: WorkerDied | None = None  # why this rank can't go on: all stop after the step that is under way
    failed: bool = False  # whether a rank can't go on
    warned: bool = False  # of slow checkpoints
    bad_rows_seen: bool = False  # since the ledger was settled last; the same on all ranks
    problem: str | None = None  # the run ends for this reason at its next save

    def fit(self) -> tuple[str, int]:
        """Trains to the end or to a signal. Returns how it ended and after which step.

        It has "finished", is "saved", or is saved since a rank "failed", whose `failure` says why.

        Raises:
            Rollback: a loss spike, behind which the config wants to go back.
        """
        step = saved = self.start_step
        batch = None
        for loader in self._loaders():  # before threads save, watch and tell
            loader.start()
        self.watchdog.beat("data", step)
        self.watchdog.start()
        if self.evaluation_due and self.evaluate(step):
            saved = -1  # the checkpoint lacks it
            if self.problem is not None or self.saver.is_best(self.last_evaluation):
                self._save(step)
                saved = step
        if step < self.total_steps:
            batches = iter(self.train)
            batch = self._next(step, batches)
        while step < self.total_steps:
            self.watchdog.beat("vote", step)
            agreed = self._agree(self.vote)
            if agreed.stop:
                break
            save_again = agreed.settle and self._settle_saver(step)
            assert batch is not None  # a rank without one votes to stop
            if step == self.start_step:
                self._show_inputs(step, batch)
                self._warm_up(batch)
                self.meter.reset()
            # Fetched before the step, so that the ranks' vote on it arrives while the step computes.
            upcoming = self._next(step, batches) if step + 1 < self.total_steps else batch
            skipped = any(first <= step <= last for first, last in self.skips)
            if not skipped:
                result = self.step(step, batch, agreed.valid_rows)
                for metrics in result.metrics:
                    self.sums.add(metrics)
            self.meter.step(0 if skipped else self.engine.plan.global_batch)
            self.ledger.add(step, batch)
            self.bad_rows_seen |= agreed.valid_rows < self.engine.plan.global_batch
            self.steps_done = step = step + 1
            if due(step, self.settings.log_every_steps, self.total_steps):
                self._log(step)
            save = due(step, self.saver.config.every_steps, self.total_steps) or agreed.save or save_again
            if due(step, self.settings.evaluate_every_steps, self.total_steps):
                with self.meter.paused():
                    evaluation = self.evaluate(step)
                if self.evaluation_due:
                    break
                save |= self.saver.is_best(evaluation)
            if save or self.problem is not None:
                self._save(step)
                saved = step
            self._tell(step)
            batch = upcoming
        self.vote.drain()
        if step != saved and step > 0:
            self._save(step)
        while self._settle_saver(step):
            self._save(step)
        self.saver.finish()
        return ("finished" if self.complete else "failed" if self.failed else "saved"), step

    def _agree(self, vote: Vote) -> Agreement:
        agreed = vote.finish()
        self.failed |= agreed.failed
        return agreed

    def _warm_up(self, batch: Batch) -> None:
        engine = self.engine
        micro = batch.split(engine.plan.micro_batch)[0]
        engine.model.train()
        engine.warm_up(lambda: self.objective(engine.model, normalised(micro, engine.input_dtype))[0])

    @property
    def complete(self) -> bool:
        return is_complete(self.steps_done, self.total_steps, self.evaluation_due)

    def step(self, step: int, batch: Batch, valid_rows: int) -> StepResult:
        """One optimizer step over this rank's rows of global batch `step`, of which `valid_rows` count on all ranks."""
        engine, plan = self.engine, self.engine.plan
        metrics: list[dict[str, Tensor]] = []
        for number, micro in enumerate(batch.split(plan.micro_batch)):
            self.watchdog.beat("forward", step)
            seed_dropout(engine.device, self.settings.seed, step, engine.ranks.rank, number)
            with engine.micro_step():
                inputs = normalised(micro, engine.input_dtype)
                if self.mix.on:
                    inputs = self._mixed(inputs, step, engine.ranks.rank * len(batch) + number * plan.micro_batch)
                with self.meter.forward_pass():
                    loss_sum, values = self.objective(engine.model, inputs)
                if step == self.health.config.nan_at_step and engine.ranks.rank == plan.ranks - 1:
                    loss_sum, values = loss_sum * float("nan"), {**values, "loss": values["loss"] * float("nan")}
                metrics.append(values)
                loss = loss_sum / max(valid_rows, 1)
                if number == plan.accumulation - 1:
                    total, count = (torch.stack([m[name] for m in metrics]).sum() for name in ("loss", "count"))
                    loss = self.health.guarded(loss, total, count)
                self.watchdog.beat("backward", step)
                engine.backward(loss)
        self.watchdog.beat("update", step)
        grad_norm = engine.step(self.schedule(step))
        self.health.add(step, total, count, grad_norm, batch.keys)
        self.watchdog.arm()
        return StepResult(grad_norm, [finite_only(values) for values in metrics])

    @torch.no_grad()
    def evaluate(self, step: int) -> dict[str, float]:
        """Counts every validation sample once, on any number of ranks. A stop breaks it off: then it is due."""
        self.evaluation_due = False
        if self.val is None:
            return {}
        try:
            found = self._evaluated(step, self.engine.model, "val")
            if self.averaged_model is not None:
                found |= self._evaluated(step, self.averaged_model(), "val_ema")
        except BrokenOff:
            self.evaluation_due = True
            return {}
        finally:
            self.engine.model.train()  # here and not in each step: it visits every module
        self.lease.check()
        self.last_evaluation, self.evaluated_step = found, step
        if self.last_evaluation["val/count"] < self.val_samples:
            self.last_evaluation["val/bad"] = self.val_samples - self.last_evaluation["val/count"]
            self._settle(step)
        self.problem = self.problem or self.saver.lacks_metric(found)
        self.sinks.scalars(step, self.last_evaluation)
        return self.last_evaluation

    def _evaluated(self, step: int, model: nn.Module, name: str) -> dict[str, float]:
        assert self.val is not None
        self.watchdog.beat("evaluate", step)
        model.eval()
        sums, bad = Sums(self.engine), []
        vote = self.vote.between_steps()
        vote.start(0)
        try:
            self._check_workers()
            for batch in self.val:
                self.watchdog.beat("evaluate", step)
                if self._agree(vote).stop:
                    raise BrokenOff
                vote.start(0)
                with self.engine.autocast():
                    sums.add(self.objective(model, normalised(batch, self.engine.input_dtype))[1])
                bad += batch.bad
        except (Interrupted, WorkerDied) as reason:
            if not self._agree(vote).stop:  # the others go on to their next vote
                self._give_up(vote, reason)
                self._agree(vote)
            raise BrokenOff from None
        if self._agree(vote).stop:  # all ranks must come to the same end
            raise BrokenOff
        if model is self.engine.model:
            self.ledger.note(step, "val", bad)
        return {f"{name}/{key}": value for key, value in sums.read().items()}

    def _mixed(self, batch: Batch, step: int, first_row: int) -> Batch:
        images, targets = mix(
            batch.images, batch.labels, batch.valid, self.num_classes, self.mix,
            seed=self.settings.seed, step=step, first_row=first_row,
        )  # fmt: skip
        return replace(batch, images=images, targets=targets)

    def _log(self, step: int) -> None:
        self.watchdog.beat("log", step)
        self.lease.check()
        self._read_health()
        self.health.renew()
        self.ledger.flush()
        if self.bad_rows_seen:
            self._settle(step)
        means = self.sums.read()
        values = {"learning_rate": self.schedule(step - 1)}
        if self.epoch_rows is not None:
            values["epoch"] = step * self.engine.plan.global_batch / self.epoch_rows
        if means.pop("count"):
            values = {**means, **values}
        if self.grad_norm is not None:
            values["grad_norm"] = self.grad_norm
            self.grad_norm = None
        scale = self.engine.loss_scale()
        if scale is not None:
            values["loss_scale"] = scale.scale
        meter = self.meter
        values |= self.health.name_slow_ranks(step, meter.forward_seconds(), meter.waits, meter.seconds())
        values |= {name: float(count) for name, count in self.health.counts.items()}
        if self.skips:
            values["skipped_steps"] = sum(min(last + 1, step) - first for first, last in self.skips if first < step)
        self._warn_of_slow_saves()
        if self.saver.failure is not None:
            values["checkpoint_failed"] = 1.0
        if self.ledger.total:
            values["bad_samples"] = self.ledger.total
            values |= {f"bad_samples/rank{rank}": count for rank, count in sorted(self.ledger.by_rank.items())}
        values |= self.meter.read()
        self.sinks.scalars(step, values)

    def _read_health(self) -> None:
        for record in self.health.read():
            if record.finite:
                self.grad_norm = record.grad_norm

    def _next(self, step: int, batches: Iterator[Batch]) -> Batch | None:
        """The next batch, fetched during `step`, whose valid rows and the wish to stop are told to all ranks.

        None where a stop comes before the batch, or a worker has died: then this rank votes to stop.
        """
        self.watchdog.beat("data", step)
        try:
            self._check_workers()
            with self.meter.waiting():
                batch = next(batches)
        except (Interrupted, WorkerDied) as reason:
            self._give_up(self.vote, reason)
            return None
        self.vote.start(batch.valid_rows)
        return batch

    def _check_workers(self) -> None:
        """Raises WorkerDied; also for workers that nobody waits for at this moment."""
        for loader in self._loaders():
            loader.check()

    def _give_up(self, vote: Vote, reason: BaseException) -> None:
        """Votes to stop without a batch."""
        self.failure = reason if isinstance(reason, WorkerDied) else self.failure
        vote.start(0, failed=self.failure is not None)

    def _save(self, step: int) -> None:
        self.watchdog.beat("save", step)
        self.lease.check()
        self._read_health()  # a spike must not be saved
        self.ledger.flush()
        self.sinks.flush()
        if self.bad_rows_seen:
            self._settle(step)
        self.saver.save(step, self._facts(step))
        if self.problem is not None:  # nothing is wrong with the weights: the rows were masked
            self.saver.finish()
            raise UserError(self.problem)

    def _warn_of_slow_saves(self) -> None:
        limit = launcher_patience(os.environ)
        if (
            limit is not None
            and self.saver.longest_seconds > limit / 2
            and self.engine.ranks.is_main
            and not self.warned
        ):
            self.warned = True
            print(
                f"\nwarning: a checkpoint took {self.saver.longest_seconds:.0f} s, and the launcher kills the ranks"
                f" {limit:g} s after a signal: set TORCH_ELASTIC_SHUTDOWN_TIMEOUT={LAUNCHER_SECONDS} for it",
                file=sys.stderr, flush=True,
            )  # fmt: skip

    def _settle_saver(self, step: int) -> bool:
        """Whether a checkpoint must be saved again, since the ranks have lost each other while they wrote it."""
        self.watchdog.beat("save", step)
        return self.saver.settle()

    def _facts(self, step: int) -> dict[str, Any]:
        """What a checkpoint keeps beside the training state. Collective."""
        evaluation = self.last_evaluation if self.evaluated_step == step else {}
        return {
            "evaluation": evaluation, "evaluation_due": self.evaluation_due, "health": self.health.saved(),
            "skipped_steps": list(self.skips), "interval": {"sums": self.sums.saved(), "grad_norm": self.grad_norm},
            "logs": self._logs(),
        }  # fmt: skip

    def _logs(self) -> dict[str, Any]:
        own = [*self.ledger.logs(), *self.sinks.logs()]
        if self.engine.ranks.is_main:
            own.append(self.health.notes)
        states = self.engine.gather_objects({os.path.basename(log.path): log.state() for log in own})
        # Logs of ranks that there are fewer of now stay.
        self.logs = dict(ChainMap({}, *states, self.logs))
        return self.logs

    def _settle(self, step: int) -> None:
        self.bad_rows_seen = False
        self.problem = self.ledger.settle(step) or self.problem

    def _tell(self, step: int) -> None:
        self.sinks.step(step)
        if self.profiler is not None:
            self.profiler.step()

    def _show_inputs(self, step: int, batch: Batch) -> None:
        """Of global batch `step`."""
        names = self.class_names
        labels = [names[label] if label < len(names) else str(label) for label in batch.labels[:32].tolist()]
        self.sinks.images(step + 1, batch.images[:32], labels)

    def close(self, failed: bool = False) -> None:
        """After a failure, ranks that will not come are not waited for."""
        if failed:
            self.watchdog.stop()
        self.watchdog.beat("save", self.steps_done)
        self.saver.wait(CLOSE_SECONDS if failed else None)
        self.watchdog.stop()
        with contextlib.suppress(LeaseLost, OSError):  # what another start has taken over is left alone
            self.lease.check()
            self.ledger.flush()
            self.health.notes.flush()
            self.sinks.close()
        self.news.close()
        for loader in self._loaders():
            loader.close()

    def reading(self) -> list[str]:
        """What this rank's workers are reading at this moment."""
        return [text for loader in self._loaders() for text in loader.reading()]

    def _loaders(self) -> list[Loader]:
        return [loader for loader in (self.train, self.val) if loader is not None]


def normalised(batch: Batch, dtype: torch.dtype) -> Batch:
    """uint8 pixels to [-1, 1], as the original release has them: (B, 3, S, S)."""
    images = batch.images.to(torch.float32).div_(127.5).sub_(1.0).to(dtype)
    return replace(batch, images=images)


def finite_only(values: dict[str, Tensor]) -> dict[str, Tensor]:
    """Metrics that count nowhere where the loss is not finite, without asking the device."""
    finite = values["loss"].isfinite()
    return {name: torch.where(finite, value, 0) for name, value in values.items()}


def seed_dropout(device: torch.device, *key: int) -> None:
    """Keys dropout and drop path by (seed, step, rank, micro step), so that a resume draws what would have come."""
    seed = 0
    for number in (*key, DROPOUT):
        seed = (seed * 1_000_003 + number + 1) % (1 << 62)
    # That of the device alone: torch.manual_seed takes half a millisecond where there is no GPU.
    (torch.cuda if device.type == "cuda" else torch.default_generator).manual_seed(seed)
