"""Random faults on real runs, as long as you like: `python -m pipeline.drill --chaos MINUTES`.

Each round is one run on which a few faults fall, at random moments, one after another. After each fault either the run
goes on, or it refuses with a message that a person can act on; then the round does what that person would do. At the
end of the round the run is compared with one that nothing disturbed. The same seed and round draw the same faults.
"""

import contextlib
import http.server
import os
import random
import re
import shutil
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.data.index import expand_urls, write_index
from pipeline.data.source import is_local
from pipeline.job import Job
from pipeline.rehearsal import Drill, Lost, compare, last_step, newest_checkpoint, read_json, read_result

FAULTS_PER_ROUND = 2
GONE_SECONDS = 10.0  # after the end of a launcher or rank, nothing of it may be left
MOST_SHARDS = 64  # whose index is copied to be damaged
FULL_DISK_BYTES = 1024
# Sums in another order grow apart: two undisturbed runs of 240 steps on 1 and 2 ranks differed by 2.5 % of the weights'
# norm and by 0.07 in a loss. Steps and samples must still be the same; test_matrix.py holds the numbers more tightly.
DRIFT = 0.1
LOGS = ("metrics.jsonl", "health.jsonl", "quarantine.jsonl", "samples-rank*.jsonl")
SIGNALS = ("SIGTERM", "SIGINT", "SIGUSR1", "SIGUSR2", "SIGHUP", "STOP file")


@dataclass
class Round:
    """One run, and what befell it."""

    number: int
    struck: list[str] = field(default_factory=list)  # kinds of faults, of those that met a running or stopped run
    story: list[str] = field(default_factory=list)  # what was done, in words
    lost: list[str] = field(default_factory=list)
    refusals: int = 0


class Chaos:
    """Plays rounds. `drill` starts the runs and has the undisturbed one, its reference."""

    def __init__(self, drill: Drill, seed: int, say: Callable[[str], None]):
        self.drill, self.seed, self.say = drill, seed, say
        drill.words = [f"run.evaluate_every_steps={max(drill.steps // 4, 1)}"]
        drill.every = max(drill.steps // 12, 1)
        self.kinds = dict(FAULTS)
        shards = expand_urls([*drill.config.data.train, *drill.config.data.val])
        self.server: Server | None = None
        self.index: Path | None = None
        if all(is_local(url) for url in shards) and len(shards) <= MOST_SHARDS:
            self.index = Path(drill.folder, "index")
            self.index.mkdir(parents=True)
            write_index(shards, folder=str(self.index))
            self.server = Server(shards)
            drill.words.append(f"data.index={self.index}")
        else:
            say(f"left out: silent storage and a damaged index, which take local shards, {MOST_SHARDS} at most")
            for kind in ("silent storage", "damaged index"):
                del self.kinds[kind]

    def run(self, minutes: float, only: int | None) -> list[Round]:
        """Rounds for so many minutes, or only the one with this number."""
        rounds: list[Round] = []
        end = time.monotonic() + 60 * minutes
        while (only is None and time.monotonic() < end) or (only is not None and not rounds):
            began = time.monotonic()
            played = self.play(len(rounds) if only is None else only)
            rounds.append(played)
            lost = "; ".join(played.lost) or "nothing"
            self.say(
                f"round {played.number}: {'; '.join(played.story)}; lost: {lost} ({time.monotonic() - began:.1f} s)"
            )
        if self.server is not None:
            self.server.close()
        return rounds

    def play(self, number: int) -> Round:
        place = Place(self, Round(number), random.Random(f"{self.seed} {number}"))  # noqa: S311  # repeatable, no secret
        faults = self.faults_of(number)
        try:
            for kind in faults:
                self.kinds[kind](place)
            place.finish()
        except Lost as problem:
            place.round.lost.append(f"{' and '.join(faults)}: {problem}")
        finally:
            place.close()
        if not place.round.lost:
            shutil.rmtree(Path(self.drill.run_dir(place.name)).parent, ignore_errors=True)
        return place.round

    def faults_of(self, number: int) -> list[str]:
        """All kinds take turns, in an order that is drawn anew each time around."""
        first = number * FAULTS_PER_ROUND
        turns = range(first // len(self.kinds), (first + FAULTS_PER_ROUND) // len(self.kinds) + 1)
        line: list[str] = []
        for turn in turns:
            kinds = sorted(self.kinds)
            random.Random(f"{self.seed} turn {turn}").shuffle(kinds)  # noqa: S311  # repeatable, no secret
            line += kinds
        offset = first - turns.start * len(self.kinds)
        return line[offset : offset + FAULTS_PER_ROUND]


class Place:
    """The run of one round: running, or stopped."""

    def __init__(self, chaos: Chaos, round: Round, draw: random.Random):
        self.chaos, self.drill, self.round, self.draw = chaos, chaos.drill, round, draw
        self.name = f"round-{round.number:03d}"
        self.run = Path(self.drill.run_dir(self.name))
        self.job: Job | None = None
        self.ranks = self.drill.ranks
        self.tolerance = 0.0
        self.pids: set[int] = set()

    # What faults are made of

    def strike(self, kind: str, words: str) -> None:
        self.round.struck.append(kind)
        self.round.story.append(words)

    def start(self, *words: str) -> Job:
        other_ranks = ["engine.micro_batch_size=null"] if self.ranks != self.drill.ranks else []
        return self.drill.start(self.name, *other_ranks, *words, ranks=self.ranks)

    def running(self, *words: str, fresh: bool = False) -> Job:
        """The job, started if need be; with `fresh` it is a new start with these words."""
        if fresh and self.job is not None:
            self.stop()
        if self.job is None:
            self.job = self.start(*words)
        return self.job

    def moment(self, job: Job, in_training: bool = False) -> None:
        """Waits until a random moment: in the start-up, or after a random step."""
        if not in_training and self.draw.random() < 0.25:
            pause(job, self.draw.uniform(0.0, self.drill.startup_seconds))
            return
        done = newest_checkpoint(str(self.run))
        before = file_number(self.run / "metrics.jsonl")
        target = done + self.draw.randint(1, max((self.drill.steps - done) // 2, 1))
        while job.running() and file_number(self.run / "metrics.jsonl") == before:
            time.sleep(0.01)  # until this start writes, the lines of the one before are there
        while job.running() and last_step(str(self.run)) < min(target, self.drill.steps - 1):
            time.sleep(0.002)
        pause(job, self.draw.uniform(0.0, 2 * self.drill.step_seconds))

    def all_processes(self, job: Job) -> list[int]:
        found = job.processes()
        self.pids.update(found)
        return found

    def stop(self) -> None:
        """Ends the job by SIGTERM."""
        assert self.job is not None
        self.all_processes(self.job)
        self.job.send(signal.SIGTERM)
        self.ended(self.job)

    def ended(self, job: Job, since: float | None = None) -> str:
        """Waits for the end of a job, and that it leaves nothing. `since`: when its launcher was killed.

        Returns what it said.

        Raises:
            Lost: it does not end, or something of it is left.
        """
        if since is None:
            end = time.monotonic() + job_patience(self.drill)
            while job.running():
                self.all_processes(job)
                if time.monotonic() > end:
                    raise Lost(f"the job has not ended; see {job.output}")
                time.sleep(0.05)
            since = time.monotonic()
        while left := job.processes():
            if time.monotonic() > since + GONE_SECONDS:
                names = ", ".join(f"{pid} ({command_of(pid)})" for pid in left)
                raise Lost(f"{GONE_SECONDS:g} s later these processes were left: {names}; see {job.output}")
            time.sleep(0.05)
        names_there = os.listdir("/dev/shm")  # noqa: S108  # only names are read
        shared = [name for name in names_there if {int(n) for n in re.findall(r"\d+", name)} & self.pids]
        if shared:
            raise Lost(f"shared memory was left: {', '.join(shared)}; see {job.output}")
        job.wait(1.0)
        if job in self.drill.jobs:
            self.drill.jobs.remove(job)
        if job is self.job:
            self.job = None
        return job.said()

    def refused(self, said: str, job: Job) -> bool:
        """Whether a job has ended by a refusal that a person can act on.

        Raises:
            Lost: it failed in another way.
        """
        ended = read_json(str(self.run / "exit.json")) if self.run.exists() else None
        if (ended or {}).get("status") in ("finished", "saved: start me again"):
            return False
        crashes = said.count("Traceback (most recent call last)") - said.count("ChildFailedError: ")  # torchrun's own
        if crashes > 0 or "error: " not in said:
            raise Lost(f"it ended neither well nor with a clear refusal: {ended}; see {job.output}")
        return True

    def resume_or_refuse(self, what: str, repair: Callable[[], object]) -> None:
        """Starts the run after something of it was damaged. Where it refuses, undoes the damage."""
        job = self.running()
        before = file_number(self.run / "metrics.jsonl")
        while job.running() and file_number(self.run / "metrics.jsonl") == before:
            time.sleep(0.01)
        if job.running():
            return
        said = self.ended(job)
        if self.refused(said, job):
            line = next(line for line in said.splitlines() if "error: " in line)
            self.round.refusals += 1
            self.round.story.append(f"refused ({line.partition('error: ')[2][:160]}), {what} restored")
            repair()

    def finish(self) -> None:
        """Runs it to its end, and compares it with the reference.

        Raises:
            Lost: it does not finish.
        """
        job = self.running()
        self.ended(job)
        ended = read_json(str(self.run / "exit.json")) or {}
        if ended.get("status") != "finished":
            raise Lost(f"the run did not finish: {ended}; see {job.output}")
        result = read_result(str(self.run))
        assert self.drill.reference is not None
        self.round.lost += compare(result, self.drill.reference, self.drill.steps, self.tolerance)

    def close(self) -> None:
        for job in [job for job in self.drill.jobs if job.running() or job.processes()]:
            job.kill()
        self.drill.jobs.clear()


def kill_rank(place: Place) -> None:
    job = place.running()
    place.moment(job)
    ranks = job.rank_processes()
    place.all_processes(job)
    if not ranks or not job.running():
        return
    rank = place.draw.choice(sorted(ranks))
    place.strike("kill a rank", f"kill -9 of rank {rank} at step {last_step(str(place.run))}")
    job.send(signal.SIGKILL, [ranks[rank]])
    place.ended(job)


def kill_worker(place: Place) -> None:
    job = place.running()
    place.moment(job, in_training=True)
    place.all_processes(job)
    workers = job.workers()
    if not workers or not job.running():
        return
    place.strike("kill a worker", f"kill -9 of a data worker at step {last_step(str(place.run))}")
    job.send(signal.SIGKILL, [place.draw.choice(workers)])
    said = place.ended(job)
    ended = read_json(str(place.run / "exit.json")) or {}
    if ended.get("status") == "failed" and "worker" not in said:
        raise Lost(f"the worker's death is not explained; see {job.output}")


def kill_launcher(place: Place) -> None:
    job = place.running()
    place.moment(job)
    place.all_processes(job)
    if not job.running():
        return
    place.strike("kill the launcher", f"kill -9 of the launcher alone at step {last_step(str(place.run))}")
    job.send(signal.SIGKILL, [job.process.pid])
    place.ended(job, since=time.monotonic())


def kill_everything(place: Place) -> None:
    job = place.running()
    place.moment(job)
    place.all_processes(job)
    if not job.running():
        return
    place.strike("kill everything", f"kill -9 of all processes at step {last_step(str(place.run))}")
    job.kill()
    place.ended(job)


def send_signal(place: Place) -> None:
    job = place.running()
    place.moment(job)
    processes = place.all_processes(job)
    if not job.running():
        return
    how = place.draw.choice(SIGNALS)
    ranks = job.rank_processes()
    target, pids = place.draw.choice(
        [("all processes", processes), ("rank 0", [ranks[0]] if 0 in ranks else processes)]
    )
    place.strike("signal", f"{how} to {target} at step {last_step(str(place.run))}")
    if how == "STOP file":
        place.run.mkdir(exist_ok=True)
        (place.run / "STOP").touch()
    else:
        job.send(signal.Signals[how], pids)
    place.ended(job)  # however early it came; what was trained must be saved, which the final comparison sees


def start_twice(place: Place) -> None:
    job = place.running()
    place.moment(job)
    if not job.running():
        return
    other = place.start()
    place.strike("two starts", f"a second start at step {last_step(str(place.run))}")
    end = time.monotonic() + job_patience(place.drill)
    while job.running() and other.running():
        place.all_processes(job)
        place.all_processes(other)
        if time.monotonic() > end:
            raise Lost(f"two starts run side by side; see {job.output} and {other.output}")
        time.sleep(0.05)
    refused = job if other.running() else other
    said = place.ended(refused)
    place.job = other if refused is job else job
    finished = (read_json(str(place.run / "exit.json")) or {}).get("status") == "finished"
    if "is writing there already" not in said and not finished:
        raise Lost(f"a second start was not refused; see {refused.output}")
    place.round.refusals += 1


def silence_storage(place: Place) -> None:
    """Reads go through a server that stops answering: for good, until a signal has ended the job; or for a while."""
    server = place.chaos.server
    assert server is not None
    data = place.drill.config.data
    words = [f"data.{name}=[{','.join(map(server.url, expand_urls(urls)))}]"
             for name, urls in (("train", data.train), ("val", data.val)) if urls]  # fmt: skip
    job = place.running(*words, fresh=True)
    place.moment(job)
    if not job.running():
        return
    server.silent.set()
    try:
        step = last_step(str(place.run))
        if place.draw.random() < 0.5:
            place.strike("silent storage", f"storage silent for a while at step {step}")
            pause(job, place.draw.uniform(0.5, 3.0))
        else:
            place.strike("silent storage", f"storage silent at step {step}, then SIGTERM")
            pause(job, place.draw.uniform(0.0, 2.0))
            place.all_processes(job)
            began = time.monotonic()
            job.send(signal.SIGTERM)
            place.ended(job)
            if time.monotonic() - began > 30.0:
                raise Lost(f"it took {time.monotonic() - began:.0f} s to stop; see {job.output}")
    finally:
        server.silent.clear()


def fill_disk(place: Place) -> None:
    job = place.running()
    place.moment(job, in_training=True)
    if not job.running():
        return
    place.strike("full disk", f"the ranks' files can't grow for a while from step {last_step(str(place.run))} on")
    with contextlib.suppress(ProcessLookupError):
        job.limit_file_size(FULL_DISK_BYTES)
        pause(job, place.draw.uniform(0.5, 3.0))
        job.limit_file_size(None)


def stand_still(place: Place) -> None:
    job = place.running()
    place.moment(job, in_training=True)
    ranks = job.rank_processes()
    if not ranks or not job.running():
        return
    rank = place.draw.choice(sorted(ranks))
    place.strike("pause", f"rank {rank} stands still for a while at step {last_step(str(place.run))}")
    job.send(signal.SIGSTOP, [ranks[rank]])
    pause(job, place.draw.uniform(0.2, 3.0))
    job.send(signal.SIGCONT, [ranks[rank]])


def stopped(place: Place) -> bool:
    """Has the run stopped at a random moment, by SIGKILL or SIGTERM; whether it has left something to damage."""
    job = place.running()
    place.moment(job, in_training=True)
    place.all_processes(job)
    if place.draw.random() < 0.5:
        job.kill()
        place.ended(job)
    else:
        place.stop()
    return place.run.exists()


def damage_checkpoint(place: Place) -> None:
    if not stopped(place):
        return
    folder = place.run / "checkpoints"
    files = sorted(path for path in folder.glob("step-*/*") if path.stat().st_size)
    if not files:
        return
    copy = folder.with_name("checkpoints-copy")
    shutil.copytree(folder, copy)
    chosen = place.draw.choice(files)
    place.strike("damaged checkpoint", f"{damage(chosen, place.draw)} in {chosen.parent.name}/{chosen.name}")

    def repair() -> None:
        shutil.rmtree(folder)
        shutil.copytree(copy, folder)

    place.resume_or_refuse("the checkpoints", repair)
    shutil.rmtree(copy)


def damage_log(place: Place) -> None:
    if not stopped(place):
        return
    files = sorted(path for pattern in LOGS for path in place.run.glob(pattern) if path.stat().st_size)
    if not files:
        return
    chosen = place.draw.choice(files)
    content = chosen.read_bytes()
    place.strike("damaged log", f"{damage(chosen, place.draw)} in {chosen.name}")
    place.resume_or_refuse(chosen.name, lambda: chosen.write_bytes(content))


def damage_index(place: Place) -> None:
    stopped(place)
    assert place.chaos.index is not None
    chosen = place.draw.choice(sorted(place.chaos.index.glob("index.*")))
    content = chosen.read_bytes()
    place.strike("damaged index", f"{damage(chosen, place.draw)} in {chosen.name}")
    try:
        place.resume_or_refuse(chosen.name, lambda: None)
        if place.job is not None:  # what it has read was whole; the damaged part may still come
            place.moment(place.job, in_training=True)
            if place.job.running():
                place.stop()
            else:
                job = place.job
                place.refused(place.ended(job), job)
    finally:
        chosen.write_bytes(content)


def change_ranks(place: Place) -> None:
    """A run on another number of ranks, up to the order of sums the same."""
    stopped(place)
    rows, lanes = place.drill.config.data.global_batch_size, place.drill.config.data.plan.lanes
    numbers = [n for n in range(1, place.drill.ranks + 1) if rows % n == 0 and lanes % n == 0 and n != place.ranks]
    if not numbers:
        return
    place.ranks = place.draw.choice(numbers)
    place.tolerance = max(place.drill.tolerance, DRIFT)
    place.strike("other number of ranks", f"on {place.ranks} ranks from step {newest_checkpoint(str(place.run))} on")
    place.moment(place.running(), in_training=True)


FAULTS: dict[str, Callable[[Place], None]] = {
    "kill a rank": kill_rank,
    "kill a worker": kill_worker,
    "kill the launcher": kill_launcher,
    "kill everything": kill_everything,
    "signal": send_signal,
    "two starts": start_twice,
    "silent storage": silence_storage,
    "full disk": fill_disk,
    "pause": stand_still,
    "damaged checkpoint": damage_checkpoint,
    "damaged log": damage_log,
    "damaged index": damage_index,
    "other number of ranks": change_ranks,
}


class Server:
    """Serves local shards over HTTP, and falls silent on demand."""

    def __init__(self, paths: list[str]):
        self.silent = threading.Event()
        files = {os.path.basename(path): path for path in paths}
        silent = self.silent

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_HEAD(self) -> None:
                self.answer(body=False)

            def do_GET(self) -> None:
                self.answer(body=True)

            def answer(self, body: bool) -> None:
                while silent.is_set():
                    time.sleep(0.05)
                path = files.get(os.path.basename(self.path))
                if path is None:
                    self.send_error(404)
                    return
                size = os.path.getsize(path)
                span = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
                begin, end = (int(span[1]), min(int(span[2]) + 1, size)) if span else (0, size)
                self.send_response(206 if span else 200)
                self.send_header("Content-Length", str(end - begin))
                if span:
                    self.send_header("Content-Range", f"bytes {begin}-{end - 1}/{size}")
                self.end_headers()
                if body:
                    with open(path, "rb") as file, contextlib.suppress(OSError):  # the reader may be gone
                        file.seek(begin)
                        self.wfile.write(file.read(end - begin))

            def log_message(self, format: str, *args: Any) -> None:
                """Says nothing."""

        class Quiet(http.server.ThreadingHTTPServer):
            daemon_threads = True

            def handle_error(self, request: Any, client_address: Any) -> None:
                """A reader that was killed is no error."""

        self.server = Quiet(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def url(self, path: str) -> str:
        return f"http://127.0.0.1:{self.server.server_address[1]}/{os.path.basename(path)}"

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()


def damage(path: Path, draw: random.Random) -> str:
    """Flips a bit of a file, or cuts it. Returns what was done."""
    content = bytearray(path.read_bytes())
    at = draw.randrange(len(content))
    if draw.random() < 0.5:
        content[at] ^= 1 << draw.randrange(8)
        path.write_bytes(content)
        return f"a bit flipped at byte {at} of {len(content)}"
    path.write_bytes(content[:at])
    return f"cut at byte {at} of {len(content)}"


def job_patience(drill: Drill) -> float:
    """How long a job may take, in seconds: generous, since a hang is ended by its own watchdog only much later."""
    return 60.0 + 5 * (drill.startup_seconds + drill.steps * drill.step_seconds)


def pause(job: Job, seconds: float) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end and job.running():
        time.sleep(0.002)


def file_number(path: Path) -> int | None:
    """Changes when a start writes the file anew."""
    return path.stat().st_ino if path.exists() else None


def command_of(pid: int) -> str:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")[:80]
    return "ended meanwhile"


def summary(rounds: list[Round], seed: int) -> str:
    """Rounds and faults by kind, then what was lost and how to play it again."""
    counts = Counter(kind for played in rounds for kind in played.struck)
    refusals = sum(played.refusals for played in rounds)
    lines = [f"{len(rounds)} rounds, {sum(counts.values())} faults, {refusals} clear refusals:"]
    lines += [f"  {kind:<22} {count}" for kind, count in sorted(counts.items())]
    for played in rounds:
        lines += [
            f"LOST in round {played.number} (--seed {seed} --round {played.number}): {text}" for text in played.lost
        ]
    return "\n".join(lines)
