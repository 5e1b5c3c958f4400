"""A fire drill on this machine: real ranks, real signals, and nothing may be lost.

    python -m pipeline.drill --config configs/X.yaml [key=value ...]

First a run that nothing befalls, then the same run once for each drill: its ranks are killed, stopped, starved of disk;
it is started again until it is finished, and compared with the first: the loss of each step and the final weights and
moments (bit by bit on the same number of ranks), the samples of each step, each step exactly once in metrics.jsonl.
Exit code 0: nothing was lost; 1: something was; 2: a mistake in the config or the command line.
"""

import argparse
import json
import math
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

from pipeline.errors import UserError
from pipeline.job import Job
from pipeline.rehearsal import (
    Drill,
    Lost,
    Outcome,
    Result,
    checkpoint_names,
    compare,
    last_step,
    newest_checkpoint,
    read_json,
    read_lines,
)
from pipeline.text import screen_output

if TYPE_CHECKING:
    from pipeline.config import RunConfig

EXIT_USER_ERROR = 2
HANG_SECONDS = 5.0  # of the watchdog, when a rank is stopped; more where steps are slow
STEPS, CHAOS_STEPS = 60, 240
FULL_DISK_BYTES = 1024  # of a file; less would fail the semaphores that processes share, too


def rehearse(drill: Drill) -> None:
    """The run that nothing befalls.

    Raises:
        UserError: it fails already.
    """
    job = drill.start("reference")
    try:
        drill.wait_for_step("reference", job, 1)
        drill.startup_seconds = time.monotonic() - job.began
        drill.step_seconds = drill.wait_for_step("reference", job, drill.steps) / drill.steps
        drill.reference = drill.finish("reference", job)
    except Lost as problem:
        lines = [line for line in job.said().splitlines() if line.strip()]
        said = next((line for line in lines if line.startswith("error: ")), " | ".join(lines[-5:]))
        raise UserError(f"the run fails without any drill: {problem}; it says: {said}") from None


def kill_rank(drill: Drill, name: str) -> tuple[Outcome, Result]:
    """A rank dies of SIGKILL, as of the kernel's when memory is short: the job must end, and resume."""
    job = drill.start(name)
    drill.wait_for_step(name, job, drill.steps // 2)
    outcome = Outcome(name, f"kill -9 of rank {drill.ranks - 1} at step {last_step(drill.run_dir(name))}")
    job.send(signal.SIGKILL, [job.rank_processes()[drill.ranks - 1]])
    outcome.noticed_seconds = drill.ended(job)
    return outcome, drill.resume(name, outcome)


def terminate(drill: Drill, name: str) -> tuple[Outcome, Result]:
    """All processes get SIGTERM, as batch systems send it before the end: the step must be saved."""
    outcome, _ = saved_by_signal(drill, name)
    return outcome, drill.resume(name, outcome)


def fewer_ranks(drill: Drill, name: str) -> tuple[Outcome, Result]:
    """A saved run goes on with fewer ranks."""
    rows, lanes = drill.config.data.global_batch_size, drill.config.data.plan.lanes
    ranks = next(n for n in range(drill.ranks - 1, 0, -1) if rows % n == 0 and lanes % n == 0)
    outcome, step = saved_by_signal(drill, name)
    outcome.done = f"SIGTERM at step {step}, resumed on {ranks} of {drill.ranks} ranks"
    return outcome, drill.resume(name, outcome, "engine.micro_batch_size=null", ranks=ranks)


def saved_by_signal(drill: Drill, name: str) -> tuple[Outcome, int]:
    job = drill.start(name)
    run = drill.run_dir(name)
    drill.wait_for_step(name, job, drill.steps // 2)
    job.send(signal.SIGTERM)
    outcome = Outcome(name, "SIGTERM to all processes", noticed_seconds=drill.ended(job))
    ended, step = read_json(os.path.join(run, "exit.json")), last_step(run)
    outcome.done += f" at step {step}"
    if ended is None or not ended["status"].startswith("saved"):
        raise Lost(f"the run did not save: {ended}; see {job.output}")
    if newest_checkpoint(run) != step:
        outcome.lost.append(f"step {step} was trained, the checkpoint is of step {newest_checkpoint(run)}")
    return outcome, step


def fill_disk(drill: Drill, name: str) -> tuple[Outcome, Result]:
    """The ranks' files cannot grow for a while: training goes on, and the checkpoint is tried again."""
    from pipeline import checkpoint

    job = drill.start(name, "checkpoint.every_minutes=0.02")
    run = drill.run_dir(name)
    drill.wait_for_step(name, job, drill.every + 1)
    job.limit_file_size(FULL_DISK_BYTES)
    outcome = Outcome(name, f"files of the ranks can't grow from step {last_step(run)} on")
    try:
        outcome.noticed_seconds = drill.wait_for(
            job, "the failure was told", lambda: "can't write the checkpoint" in job.said()
        )
        found = checkpoint_names(run)
        paths = [os.path.join(run, "checkpoints", checkpoint_name) for checkpoint_name in found]
        outcome.lost += [f"{path}: {wrong}" for path in paths if (wrong := checkpoint.verify(path))]
    finally:
        job.limit_file_size(None)
    outcome.recovered_seconds = drill.wait_for(
        job, "a checkpoint was written", lambda: checkpoint_names(run)[-1:] > found[-1:]
    )
    return outcome, drill.finish(name, job)


def poison(drill: Drill, name: str) -> tuple[Outcome, Result]:
    """A batch's loss is NaN on one rank: the step is left out, as if the batch had not been there."""
    step = drill.steps // 2
    os.makedirs(drill.run_dir("without"))
    with open(os.path.join(drill.run_dir("without"), "skipped.json"), "w") as file:
        json.dump([{"first": step, "last": step, "reason": "the poisoned batch"}], file)
    expected = drill.finish("without", drill.start("without"))
    outcome = Outcome(name, f"the loss of step {step + 1} is NaN on rank {drill.ranks - 1}")
    result = drill.finish(name, drill.start(name, f"health.nan_at_step={step}"))
    notes = read_lines(os.path.join(drill.run_dir(name), "health.jsonl"))
    if not any(note["step"] == step + 1 and str(drill.ranks - 1) in note["ranks"] for note in notes):
        outcome.lost.append(f"health.jsonl does not name step {step + 1} and rank {drill.ranks - 1}")
    for run in (result, expected):
        run.losses.pop(step + 1, None)  # one has none, the other the other ranks'
    outcome.lost += compare(result, expected, drill.steps)
    return outcome, expected


def stop_rank(drill: Drill, name: str) -> tuple[Outcome, Result]:
    """A rank stands still (SIGSTOP): the others explain it and end the job."""
    hang = max(HANG_SECONDS, 20 * drill.step_seconds)
    # torchrun waits for so long before it kills a rank that stands still.
    job = drill.start(name, f"health.hang_seconds={hang:.1f}", TORCH_ELASTIC_SHUTDOWN_TIMEOUT="5")
    drill.wait_for_step(name, job, drill.steps // 2)
    stopped = drill.ranks - 1
    outcome = Outcome(name, f"SIGSTOP to rank {stopped} at step {last_step(drill.run_dir(name))}")
    job.send(signal.SIGSTOP, [job.rank_processes()[stopped]])
    outcome.noticed_seconds = drill.wait_for(job, "the hang was told", lambda: "got nowhere for" in job.said())
    drill.ended(job)
    if f"did not arrive: rank {stopped}: " not in job.said():
        outcome.lost.append(f"rank {stopped} is not named as the one that did not arrive; see {job.output}")
    return outcome, drill.resume(name, outcome)


def kill_again_and_again(drill: Drill, name: str) -> tuple[Outcome, Result]:
    """SIGKILLs at random moments, of a rank or of all processes, each followed by a start."""
    outcome = Outcome(name, "")
    run, done = drill.run_dir(name), 0
    words = [f"checkpoint.every_steps={max(drill.steps // (2 * drill.kills), 1)}"]
    while done < drill.kills and newest_checkpoint(run) < drill.steps:
        resumed, before = newest_checkpoint(run), inode(run)
        job = drill.start(name, *words)
        if drill.random.random() < 0.3:
            wait_seconds(job, drill.random.uniform(0.0, drill.startup_seconds))
            ranks = list(job.rank_processes().values())
        else:
            span = 2 * (drill.steps - resumed) // (drill.kills - done + 1)
            target = min(resumed + drill.random.randint(1, max(span, 1)), drill.steps)
            # Until a start has come to its first step, the lines of the one before it are in the file.
            while job.running() and inode(run) == before:
                time.sleep(0.005)
            ranks = list(job.rank_processes().values())  # takes longer than some steps
            while job.running() and last_step(run) < target:
                time.sleep(0.001)
            wait_seconds(job, drill.random.uniform(0.0, drill.step_seconds))
        done += job.running()
        if ranks and drill.random.random() < 0.5:
            job.send(signal.SIGKILL, [drill.random.choice(ranks)])
            drill.ended(job)
        else:
            job.kill()
            drill.jobs.remove(job)
        outcome.repeated_steps += max(last_step(run) - newest_checkpoint(run), 0)
        say(f"  kill {done} of {drill.kills}: step {last_step(run)}, newest checkpoint {newest_checkpoint(run)}")
    outcome.done = f"{done} SIGKILLs at random moments"
    if done < drill.kills:
        outcome.done += f" (not {drill.kills}: the run was over; more --steps)"
    repeated = outcome.repeated_steps
    result = drill.resume(name, outcome, *words)
    outcome.repeated_steps = repeated
    return outcome, result


DRILLS: dict[str, Callable[[Drill, str], tuple[Outcome, Result]]] = {
    "kill": kill_rank,
    "sigterm": terminate,
    "disk": fill_disk,
    "nan": poison,
    "stop": stop_rank,
    "fewer-ranks": fewer_ranks,
    "kills": kill_again_and_again,
}


def practise(drill: Drill, name: str) -> Outcome:
    """One drill, compared with the run that nothing befell."""
    outcome = Outcome(name, (DRILLS[name].__doc__ or "").split(":")[0])
    try:
        outcome, result = DRILLS[name](drill, name)
    except Lost as problem:
        outcome.lost.append(str(problem))
        return outcome
    if name != "nan":
        assert drill.reference is not None
        tolerance = drill.tolerance if name == "fewer-ranks" else 0.0
        outcome.lost += compare(result, drill.reference, drill.steps, tolerance)
    return outcome


def inode(run: str) -> int | None:
    """Of metrics.jsonl, which each start that comes so far writes anew."""
    path = os.path.join(run, "metrics.jsonl")
    return os.stat(path).st_ino if os.path.exists(path) else None


def wait_seconds(job: Job, seconds: float) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end and job.running():
        time.sleep(0.002)


def table(outcomes: Sequence[Outcome]) -> str:
    """Rows of equal width."""

    def seconds(value: float | None) -> str:
        return "-" if value is None else f"{value:.1f}"

    rows = [("drill", "what was done", "noticed s", "recovered s", "repeated", "lost")]
    for outcome in outcomes:
        noticed, recovered = seconds(outcome.noticed_seconds), seconds(outcome.recovered_seconds)
        lost = "; ".join(outcome.lost) or "nothing"
        rows.append((outcome.drill, outcome.done, noticed, recovered, str(outcome.repeated_steps), lost))
    widths = [max(len(row[column]) for row in rows) for column in range(5)]
    return "\n".join("  ".join([*(c.ljust(w) for c, w in zip(row[:5], widths, strict=True)), row[5]]) for row in rows)


def say(text: str) -> None:
    print(text, flush=True)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    drills = "\n".join(f"  {name:<12} {run.__doc__}" for name, run in DRILLS.items())
    parser = argparse.ArgumentParser(
        prog="python -m pipeline.drill", description=__doc__, epilog=f"drills:\n{drills}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--config", default="configs/digits.yaml", help="YAML file (configs/digits.yaml)")
    parser.add_argument("--ranks", type=int, default=2, help="processes on this machine, one a GPU (2)")
    parser.add_argument(
        "--steps", type=int, help=f"length of each run in optimizer steps ({STEPS}, with --chaos {CHAOS_STEPS})"
    )
    parser.add_argument("--kills", type=int, default=6, help="SIGKILLs of the drill `kills` (6)")
    parser.add_argument("--dir", help="new or empty folder that keeps all runs; default: one that goes if all is well")
    parser.add_argument("--only", nargs="+", choices=DRILLS, metavar="DRILL", help="these drills, instead of all")
    parser.add_argument("--seed", type=int, default=0, help="of the random moments (0)")
    parser.add_argument(
        "--chaos", type=float, metavar="MINUTES", help="random faults for so long, instead of the drills below"
    )
    parser.add_argument("--round", type=int, metavar="N", help="with --chaos: only this round, to see it again")
    parser.add_argument("--json", metavar="FILE", help="write the table there as JSON, too")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="options that override the config's")
    return parser.parse_intermixed_args(arguments)


def check(parsed: argparse.Namespace) -> "RunConfig":
    """Raises UserError for what no drill can be held with."""
    from pipeline.config import load_config

    config = load_config(parsed.config, parsed.overrides)
    parsed.steps = parsed.steps or (STEPS if parsed.chaos is None else CHAOS_STEPS)
    if parsed.chaos is not None and (parsed.only is not None or not 0 < parsed.chaos < math.inf):
        raise UserError("--chaos: expected a number of minutes above 0, without --only")
    if parsed.round is not None and (parsed.chaos is None or parsed.round < 0):
        raise UserError("--round: expected the number of a round, together with --chaos")
    if parsed.chaos is not None and config.data.workers < 1:
        raise UserError("data.workers: --chaos kills data workers; set at least 1")
    for name, least in (("ranks", 2), ("steps", 12), ("kills", 1)):
        if getattr(parsed, name) < least:
            raise UserError(f"--{name}: must be at least {least}, found {getattr(parsed, name)}")
    if config.data.resampled:
        raise UserError("data.resampled: shards drawn with replacement have no exact resume; set data.resampled=false")
    if not any(type(sink).__module__.endswith("jsonl") for sink in config.monitor):
        raise UserError("monitor: the drill reads metrics.jsonl; add jsonl to monitor")
    if parsed.dir is not None and os.path.isdir(parsed.dir) and os.listdir(parsed.dir):
        raise UserError(f"--dir {parsed.dir}: is not empty; name a new folder")
    return config


def cause_chaos(drill: Drill, parsed: argparse.Namespace) -> int:
    """Random faults; returns the exit code."""
    from pipeline.build import prepare_data
    from pipeline.chaos import Chaos, summary
    from pipeline.runtime import Ranks

    prepare_data(drill.config, Ranks(0, 1, 0, 1))  # chaos serves and damages copies of the shards before the first run
    chaos = Chaos(drill, parsed.seed, say)
    say(f"chaos: {drill.ranks} ranks, {drill.steps} steps, seed {parsed.seed}; runs below {drill.folder}")
    rehearse(drill)
    say(f"reference: first step after {drill.startup_seconds:.1f} s, {1000 * drill.step_seconds:.0f} ms a step")
    rounds = chaos.run(parsed.chaos, parsed.round)
    say("\n" + summary(rounds, parsed.seed))
    if parsed.json:
        with open(parsed.json, "w") as file:
            json.dump([asdict(played) for played in rounds], file, indent=1)
    lost = any(played.lost for played in rounds)
    if not lost and parsed.dir is None:
        shutil.rmtree(drill.folder, ignore_errors=True)
    say(f"\nsee {drill.folder}" if lost else "\nnothing was lost")
    return 1 if lost else 0


def hold(drill: Drill, names: Sequence[str]) -> list[Outcome]:
    say(f"{drill.ranks} ranks, {drill.steps} steps, a checkpoint every {drill.every}; runs below {drill.folder}")
    began = time.monotonic()
    rehearse(drill)
    say(f"reference: finished in {time.monotonic() - began:.1f} s, first step after {drill.startup_seconds:.1f} s")
    outcomes = []
    for name in names:
        began = time.monotonic()
        say(f"{name}: {DRILLS[name].__doc__}")
        outcome = practise(drill, name)
        drill.close()
        say(f"  {outcome.done}; lost: {'; '.join(outcome.lost) or 'nothing'} ({time.monotonic() - began:.1f} s)")
        outcomes.append(outcome)
    return outcomes


def main(arguments: list[str] | None = None) -> int:
    parsed = parse(arguments)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    drill = None
    try:
        config = check(parsed)
        folder = os.path.abspath(parsed.dir or tempfile.mkdtemp(prefix="drill-"))
        drill = Drill(config, parsed.config, parsed.overrides, parsed.ranks, parsed.steps, parsed.kills, folder,
                      parsed.seed)  # fmt: skip
        if parsed.chaos is not None:
            return cause_chaos(drill, parsed)
        outcomes = hold(drill, parsed.only or list(DRILLS))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return EXIT_USER_ERROR
    except KeyboardInterrupt:
        print("\ninterrupted; its processes are ended", file=sys.stderr, flush=True)
        return 128 + signal.SIGINT
    finally:
        if drill is not None:
            drill.close()
    say("\n" + table(outcomes))
    if parsed.json:
        with open(parsed.json, "w") as file:
            json.dump([asdict(outcome) for outcome in outcomes], file, indent=1)
    lost = sum(bool(outcome.lost) for outcome in outcomes)
    if not lost and parsed.dir is None:
        shutil.rmtree(folder, ignore_errors=True)
    say(f"\n{lost} drills lost something; see {folder}" if lost else "\nnothing was lost")
    return 1 if lost else 0


if __name__ == "__main__":
    screen_output()
    sys.exit(main())
