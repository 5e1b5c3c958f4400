"""Runs that are started for a drill, and what one has lost against another."""

import json
import os
import random
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from pipeline.job import Job

if TYPE_CHECKING:
    from torch import Tensor

    from pipeline.config import RunConfig

PATIENCE_SECONDS = 600.0  # for a start, or for a job's end
EXPLAIN_SECONDS = PATIENCE_SECONDS / 2  # a job that hangs by itself says where before it is given up
TOLERANCE = {"no": 1e-4, "bf16": 3e-2, "fp16": 3e-2}  # with another number of ranks, whose sums have another order


class Lost(Exception):
    """What should have happened and did not."""


@dataclass
class Outcome:
    """A row of the table."""

    drill: str
    done: str
    lost: list[str] = field(default_factory=list)
    noticed_seconds: float | None = None  # from the fault until the job has ended or says what is wrong
    recovered_seconds: float | None = (
        None  # from the next start, or the end of the fault, until it is further than before
    )
    repeated_steps: int = 0  # trained again, since no checkpoint had them


@dataclass(frozen=True)
class Result:
    """What a finished run has left."""

    losses: dict[int, float]
    lines: Counter[int]  # of each step in metrics.jsonl
    samples: dict[int, list[str]]  # of each step, over all ranks
    evaluations: list[tuple[int, float]]  # step and loss, in the order of metrics.jsonl
    state: "dict[str, Tensor]"


class Drill:
    """Starts the runs and knows what they should come to."""

    def __init__(self, config: "RunConfig", path: str, overrides: Sequence[str], ranks: int, steps: int, kills: int,
                 folder: str, seed: int):  # fmt: skip
        self.config, self.path, self.overrides = config, path, list(overrides)
        self.ranks, self.steps, self.kills, self.folder = ranks, steps, kills, folder
        self.every = max(steps // 6, 1)
        self.words: list[str] = []  # options of all runs
        self.tolerance = TOLERANCE[config.engine.precision]
        self.random = random.Random(seed)  # noqa: S311  # repeatable, no secret
        self.jobs: list[Job] = []
        self.startup_seconds, self.step_seconds = 0.0, 0.0
        self.reference: Result | None = None

    def run_dir(self, name: str) -> str:
        return os.path.join(self.folder, name, "run")

    def start(self, name: str, *words: str, ranks: int | None = None, **environ: str) -> Job:
        """Starts the run of a drill, or starts it again."""
        os.makedirs(os.path.join(self.folder, name), exist_ok=True)
        count = sum(entry.startswith("output-") for entry in os.listdir(os.path.join(self.folder, name)))
        own = ["run.deterministic=true", *self.overrides, "run.epochs=null", f"run.steps={self.steps}"]
        own += [*self.words, "run.log_every_steps=1", "data.log_samples=true", f"checkpoint.every_steps={self.every}"]
        own += [f"run.dir={self.run_dir(name)}", f"health.hang_seconds={EXPLAIN_SECONDS:g}", *words]
        output = os.path.join(self.folder, name, f"output-{count + 1:03d}.txt")
        job = Job(["--config", self.path, *own], ranks or self.ranks, output, environ)
        self.jobs.append(job)
        return job

    def wait_for(self, job: Job, what: str, happened: Callable[[], bool]) -> float:
        """Seconds until `happened`.

        Raises:
            Lost: the job ended before, or it took too long.
        """
        began = time.monotonic()
        while not happened():
            if not job.running() and not happened():
                raise Lost(f"the run ended before {what}; {job.output} says why (or --steps is too small)")
            if time.monotonic() - began > PATIENCE_SECONDS:
                raise Lost(f"{what}: not within {PATIENCE_SECONDS:g} s; see {job.output}")
            time.sleep(0.005)
        return time.monotonic() - began

    def wait_for_step(self, name: str, job: Job, step: int) -> float:
        return self.wait_for(job, f"step {step}", lambda: last_step(self.run_dir(name)) >= step)

    def ended(self, job: Job) -> float:
        """Seconds until all processes of a job have ended.

        Raises:
            Lost: they don't.
        """
        began = time.monotonic()
        if job.wait(PATIENCE_SECONDS) is None:
            job.kill()
            raise Lost(f"processes were left after {PATIENCE_SECONDS:g} s; see {job.output}")
        self.jobs.remove(job)
        return time.monotonic() - began

    def resume(self, name: str, outcome: Outcome, *words: str, ranks: int | None = None) -> Result:
        """Starts a run that has ended again, to its end; what this took goes to `outcome`."""
        run = self.run_dir(name)
        before = last_step(run)
        outcome.repeated_steps += before - newest_checkpoint(run)
        job = self.start(name, *words, ranks=ranks)
        if before < self.steps:
            outcome.recovered_seconds = self.wait_for_step(name, job, before + 1)
        return self.finish(name, job)

    def finish(self, name: str, job: Job) -> Result:
        """Waits for a run that nothing befalls any more.

        Raises:
            Lost: it does not finish.
        """
        self.ended(job)
        ended = read_json(os.path.join(self.run_dir(name), "exit.json"))
        if (ended or {}).get("status") != "finished":
            raise Lost(f"the run did not finish: {ended}; see {job.output}")
        return read_result(self.run_dir(name))

    def close(self) -> None:
        for job in self.jobs:
            job.kill()


def compare(result: Result, expected: Result, steps: int, tolerance: float = 0.0) -> list[str]:
    """What a run has lost against another. `tolerance` is absolute for losses, relative for all weights together."""
    import torch

    lost = []
    wrong = {step: count for step in range(1, steps + 1) if (count := result.lines[step]) != 1}
    if wrong:
        lost.append(f"metrics.jsonl has steps not exactly once: {first_few(wrong)}")
    differing = {
        step: (result.losses.get(step), expected.losses.get(step))
        for step in sorted(expected.losses.keys() | result.losses.keys())
        if not close(result.losses.get(step), expected.losses.get(step), tolerance)
    }
    if differing:
        lost.append(f"losses differ (here, without the fault): {first_few(differing)}")
    streams = {step: "differ" for step in range(1, steps + 1) if result.samples.get(step) != expected.samples.get(step)}
    if streams or not expected.samples:
        lost.append(f"other samples in steps {first_few(streams)}")
    if [step for step, _ in result.evaluations] != [step for step, _ in expected.evaluations] or not all(
        close(here, there, tolerance)
        for (_, here), (_, there) in zip(result.evaluations, expected.evaluations, strict=True)
    ):
        lost.append(f"evaluations differ: {first_few(result.evaluations)}; without the fault {expected.evaluations}")
    if result.state.keys() != expected.state.keys():
        lost.append(f"the checkpoint has other tensors: {first_few(result.state.keys() ^ expected.state.keys())}")
    elif tolerance == 0.0:
        changed = [name for name, value in expected.state.items() if not torch.equal(value, result.state[name])]
        if changed:
            lost.append(f"{len(changed)} of {len(expected.state)} final tensors differ: {first_few(changed)}")
    else:
        names = [name for name in expected.state if name.startswith("weights/")]
        here, there = (torch.cat([run.state[name].flatten() for name in names]) for run in (result, expected))
        distance = float((here - there).norm() / there.norm())
        if not distance <= tolerance:
            lost.append(f"the final weights differ by {distance:.2g} of their norm, allowed {tolerance:g}")
    return lost


def close(left: float | None, right: float | None, tolerance: float) -> bool:
    return left == right or (left is not None and right is not None and abs(left - right) <= tolerance)


def first_few(values: Any, count: int = 3) -> str:
    items = [f"{key}: {value}" for key, value in values.items()] if isinstance(values, dict) else list(values)
    return ", ".join(map(str, items[:count])) + (f" and {len(items) - count} more" if len(items) > count else "")


def read_result(run: str) -> Result:
    """Raises Lost where a finished run has left no whole checkpoint."""
    from pipeline import checkpoint

    path, skipped = checkpoint.latest(os.path.join(run, "checkpoints"))
    if path is None or skipped:
        raise Lost(f"checkpoints that are not whole: {'; '.join(skipped) or 'there are none'}")
    state = checkpoint.load(path)
    tensors = {f"weights/{name}": value for name, value in state.weights.items()}
    for key, moments in state.moments.items():
        tensors |= {f"{key}/{name}": value for name, value in moments.items()}
    metrics = read_lines(os.path.join(run, "metrics.jsonl"))
    lines = [line for line in metrics if "learning_rate" in line]
    samples: dict[int, list[str]] = {}
    for name in sorted(os.listdir(run)):
        if name.startswith("samples-rank"):
            for line in read_lines(os.path.join(run, name)):
                samples.setdefault(line["step"], []).extend(map(without_folder, line["samples"]))
    return Result(
        losses={line["step"]: line["loss"] for line in lines if "loss" in line},
        lines=Counter(line["step"] for line in lines),
        evaluations=[(line["step"], line["val/loss"]) for line in metrics if "val/loss" in line],
        samples={step: sorted(keys) for step, keys in samples.items()},
        state=tensors,
    )


def without_folder(sample: str) -> str:
    """A logged sample whose shard may have been read from another place."""
    url, separator, key = sample.partition(": sample ")
    return f"{os.path.basename(url)}{separator}{key}"


def read_lines(path: str) -> list[dict[str, Any]]:
    """The objects of a file of JSON lines; the last one may be half written."""
    found = []
    if os.path.exists(path):
        with open(path) as file:
            for line in file:
                if line.endswith("\n"):
                    found.append(json.loads(line))
    return found


def read_json(path: str) -> Any:
    if not os.path.exists(path):
        return None
    with open(path) as file:
        return json.load(file)


def last_step(run: str) -> int:
    """The last step of which a run has written."""
    return max((line["step"] for line in read_lines(os.path.join(run, "metrics.jsonl"))), default=0)


def newest_checkpoint(run: str) -> int:
    """The step of the newest whole checkpoint; 0 without one."""
    from pipeline import checkpoint

    path, _ = checkpoint.latest(os.path.join(run, "checkpoints"))
    return 0 if path is None else int(os.path.basename(path).removeprefix("step-"))


def checkpoint_names(run: str) -> list[str]:
    folder = os.path.join(run, "checkpoints")
    return sorted(name for name in os.listdir(folder) if name.startswith("step-"))
