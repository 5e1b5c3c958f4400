"""Explains a hang, then ends it: a thread on each rank that notices when its rank gets nowhere."""

import contextlib
import faulthandler
import glob
import multiprocessing
import os
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

from pipeline.errors import PeerLost, UserError
from pipeline.files import no_link
from pipeline.meeting import MEETING_SECONDS, Meeting
from pipeline.runtime import SHOW_STACKS, Ranks, Rendezvous

EXIT_HANG = 3
STACKS_SECONDS = 0.2  # for a worker to write where it is
ALONE_SECONDS = 30.0  # for a rank to end by itself when rank 0 is gone; longer while a checkpoint grows
NAMED_RANKS = 8  # that a message names
PHASES = ("vote", "data", "forward", "backward", "update", "log", "evaluate", "save")  # of a step, in order


class Growth:
    """Notices when a checkpoint that is being written grows, by whichever rank: so a slow one is no hang.

    It looks in a thread of its own, since the file system may hang, and only while `looked_for` says so.
    """

    def __init__(self, folder: str, looked_for: Callable[[], bool]):
        self.folder, self.looked_for = folder, looked_for
        self.grew = float("-inf")  # when, by the monotonic clock
        self.stopped = threading.Event()
        self.thread: threading.Thread | None = None

    def start(self, interval: float) -> None:
        if self.thread is None:
            self.thread = threading.Thread(target=self._watch, args=(interval,), name="growth", daemon=True)
            self.thread.start()

    def stop(self) -> None:
        """Ends the thread, and lets go of what is watched: the next run's model needs its memory."""
        self.stopped.set()
        self.looked_for = lambda: False

    def _watch(self, interval: float) -> None:
        before: dict[str, Any] = {}
        while not self.stopped.is_set():
            if self.looked_for():
                found = self._sizes()
                if found and found != before:
                    self.grew = time.monotonic()
                before = found
            self.stopped.wait(interval)

    def _sizes(self) -> dict[str, tuple[int, int]]:
        sizes = {}
        for path in glob.glob(os.path.join(glob.escape(self.folder), ".part-*", "*")):
            with contextlib.suppress(OSError):  # renamed in the meantime
                facts = os.stat(path)
                sizes[path] = facts.st_size, getattr(facts, "st_blocks", 0)  # which fsync may raise
        return sizes


class Watchdog:
    """The training loop says where it is by `beat`, which costs nothing.

    From `start` on it watches what waits for data; from `arm` on, after the first step, everything: until then the
    model may be compiled for as long as it takes.

    Ranks tell each other where they are over the store in which they met: what a hang's message says of the others.
    A checkpoint in `folder`/checkpoints that grows is no hang, wherever the ranks wait for it.
    """

    def __init__(
        self,
        hang_seconds: float | None,
        ranks: Ranks,
        place: Rendezvous,
        folder: str,
        reading: Callable[[], list[str]],
        on_hang: Callable[[str], None],
    ):
        self.hang_seconds, self.ranks, self.place, self.folder = hang_seconds, ranks, place, folder
        self.reading, self.on_hang = reading, on_hang
        self.now: tuple[int, str, float] = (0, "data", time.monotonic())  # step, phase, since when
        self.armed = False
        self.stopped = threading.Event()
        self.thread: threading.Thread | None = None
        self.teller: threading.Thread | None = None
        self.growth = Growth(os.path.join(folder, "checkpoints"), self._idle)

    def beat(self, phase: str, step: int) -> None:
        """This rank begins `phase` of `step` (counted from 0)."""
        self.now = step, phase, time.monotonic()

    @property
    def interval(self) -> float:
        return min(5.0, (self.hang_seconds or 60.0) / 5)

    def _idle(self) -> bool:
        return time.monotonic() - self.now[2] > self.interval

    def start(self) -> None:
        if self.hang_seconds is not None and self.thread is None:
            self.growth.start(self.interval)
            self.thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
            self.thread.start()

    def arm(self) -> None:
        """After the first step."""
        self.armed = True

    def stop(self) -> None:
        self.stopped.set()
        for thread in (self.thread, self.teller):
            if thread is not None and thread is not threading.current_thread():
                thread.join(timeout=5.0)

    def _watch(self) -> None:
        assert self.hang_seconds is not None
        interval = self.interval
        if self.ranks.world_size > 1:  # apart from this thread: a store that hangs must not keep it
            self.teller = threading.Thread(target=self._tell, args=(interval,), name="watchdog-tell", daemon=True)
            self.teller.start()
        while not self.stopped.wait(interval):
            step, phase, since = self.now
            if not self.armed and phase not in ("data", "evaluate"):
                continue
            if time.monotonic() - max(since, self.growth.grew) > self.hang_seconds and self.now[2] == since:
                self._end(self._explain(step, phase, interval))

    def _tell(self, interval: float) -> None:
        try:
            meeting = self._meet()
        except (UserError, PeerLost):  # without a store a hang is explained without the others
            return
        try:
            while True:
                step, phase, _ = self.now
                meeting.tell("beat", {"step": step, "phase": phase, "reading": self.reading(), "at": time.time()})
                if self.stopped.wait(interval):
                    return
        except PeerLost:
            if not self.place.hosted:
                self._end_without_main()

    def _end_without_main(self) -> None:
        """The store was in rank 0's process. Collective calls end then, too, but gloo has been seen to wait on."""
        lost = time.monotonic()
        while time.monotonic() - max(lost, self.growth.grew) < ALONE_SECONDS:
            if self.stopped.wait(0.5):
                return
        self._end(f"rank 0 has been gone for {ALONE_SECONDS:g} s")

    def _meet(self) -> Meeting:
        return Meeting(self.ranks.rank, self.ranks.world_size, self.place, MEETING_SECONDS, hosts=False)

    def _explain(self, step: int, phase: str, interval: float) -> str:
        reading = "; ".join(self.reading()) or "none"
        text = f"got nowhere for {self.hang_seconds:g} s in phase '{phase}' of step {step + 1}, reading {reading}"
        if self.ranks.world_size == 1:
            return text
        told: list[dict[int, Any]] = []
        asking = threading.Thread(target=self._ask, args=(told, interval), daemon=True)
        asking.start()
        asking.join(MEETING_SECONDS + 2 * interval + 1)
        if not told:
            return f"{text}; rank 0, which hosts the store, does not answer: it hangs itself, or its node is gone"
        late = self._late(told[0], (step, phase), interval)
        more = f" and {len(late) - NAMED_RANKS} more" if len(late) > NAMED_RANKS else ""
        return f"{text}; did not arrive: {', '.join(late[:NAMED_RANKS]) or 'nobody is behind'}{more}"

    def _ask(self, told: list[dict[int, Any]], interval: float) -> None:
        with contextlib.suppress(UserError, PeerLost):
            told.append(self._meet().collect("beat", timeout=2 * interval))

    def _late(self, told: dict[int, Any], here: tuple[int, str], interval: float) -> list[str]:
        """The ranks that are silent, or behind this one."""
        late = []
        for rank in range(self.ranks.world_size):
            if rank == self.ranks.rank:
                continue
            if rank not in told:
                late.append(f"rank {rank}: no word")
                continue
            beat = told[rank]
            age = time.time() - beat["at"]
            if age > 3 * interval or place_of(beat["step"], beat["phase"]) < place_of(*here):
                shards = f", reading {'; '.join(beat['reading'])}" if beat["reading"] else ""
                late.append(
                    f"rank {rank}: last heard of {age:.0f} s ago, in phase '{beat['phase']}' of step"
                    f" {beat['step'] + 1}{shards}"
                )
        return late

    def _end(self, text: str) -> None:
        message = f"rank {self.ranks.rank}: {text}"
        path = os.path.join(self.folder, f"hang-rank{self.ranks.rank}.txt")
        print(f"\nerror: {message}; stacks of all threads: {path}", file=sys.stderr, flush=True)
        faulthandler.dump_traceback(file=sys.__stderr__ or sys.stderr, all_threads=True)
        with contextlib.suppress(OSError), open(path, "w", opener=no_link) as file:
            file.write(message + "\n\n")
            file.flush()
            faulthandler.dump_traceback(file=file, all_threads=True)
        with contextlib.suppress(Exception):
            self.on_hang(message)
        workers = multiprocessing.active_children()
        for worker in workers:
            print(f"stacks of data worker {worker.pid}:", file=sys.stderr, flush=True)
            assert worker.pid is not None
            with contextlib.suppress(ProcessLookupError):
                os.kill(worker.pid, SHOW_STACKS)
            time.sleep(STACKS_SECONDS)
        for worker in workers:  # one that hangs would outlive its rank
            worker.kill()
        os._exit(EXIT_HANG)


def place_of(step: int, phase: str) -> tuple[int, int]:
    return step, PHASES.index(phase)
