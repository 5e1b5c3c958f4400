"""Checks a job's nodes before it trains, in seconds: `torchrun ... -m pipeline.preflight --config C [key=value ...]`.

Start it as the training command would be started, on all ranks; alone it checks one process. Rank 0 prints a line for
each check. Exit code 0: all is fine, 1: a check failed, 2: a mistake of the user's. The launchers start it with
--then-train: where all is fine, each rank's process becomes the training command.
"""

import argparse
import contextlib
import dataclasses
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

from pipeline.errors import PeerLost, UserError
from pipeline.runtime import Ranks, die_with_parent, export_ranks, has_launcher, read_ranks, read_rendezvous
from pipeline.text import screen_output

if TYPE_CHECKING:
    from pipeline.audit import Finding
    from pipeline.config import RunConfig


EXIT_USER_ERROR = 2
TRAIN = os.path.join(os.path.dirname(os.path.abspath(__file__)), "train.py")


class Report:
    """Rank 0's findings, a line each as they come, or all as JSON at the end; `failed` hears rank 0's problems."""

    def __init__(self, ranks: Ranks, as_json: bool, failed: Callable[[str], None] = lambda problems: None):
        self.speaks, self.as_json, self.failed = ranks.is_main, as_json, failed
        self.findings: list[Finding] = []
        self.ended = False
        self.others_fine = True  # what rank 0 has found, on the other ranks
        self.began = time.monotonic()

    def add(self, findings: "list[Finding]") -> None:
        self.findings += findings
        for finding in findings:
            line = f"{'ok    ' if finding.fine else 'FAILED'} {finding.name:<24} {finding.text}"
            if not self.speaks and not finding.fine:
                print(line, file=sys.stderr, flush=True)
            elif self.speaks and not self.as_json:
                print(line, flush=True)

    @property
    def fine(self) -> bool:
        return self.others_fine and all(finding.fine for finding in self.findings)

    def end(self) -> int:
        """Prints the sum, once. Returns the exit code."""
        if self.speaks and not self.ended:
            self.ended = True
            seconds = time.monotonic() - self.began
            failed = [finding for finding in self.findings if not finding.fine]
            if self.as_json:
                checks = [dataclasses.asdict(finding) for finding in self.findings]
                report = {"fine": not failed, "seconds": round(seconds, 2), "checks": checks}
                print(json.dumps(report, indent=1), flush=True)
            else:
                print(f"{len(failed)} problems" if failed else f"all is fine, in {seconds:.1f} s", flush=True)
            if failed:
                self.failed("; ".join(f"{finding.name}: {finding.text}" for finding in failed))
        return 0 if self.fine else 1


class TimeLimit:
    """Ends the process where a phase does not end by itself: a dead network, a file system that hangs."""

    def __init__(self, report: Report, who: str, seconds: float):
        self.report, self.who, self.seconds = report, who, seconds
        self.cleanup: Callable[[], None] = lambda: None

    @contextlib.contextmanager
    def phase(self, name: str, fix: str) -> Iterator[None]:
        timer = threading.Timer(self.seconds, self._end, [name, fix])
        timer.daemon = True
        timer.start()
        try:
            yield
        finally:
            timer.cancel()

    def _end(self, name: str, fix: str) -> None:
        from pipeline.audit import Finding

        self.report.add(
            [
                Finding(
                    name,
                    False,
                    f"{self.who}: it hangs: no end within {self.seconds:g} s; {fix}, or raise --timeout-seconds",
                )
            ]
        )
        self.report.end()
        cleaner = threading.Thread(target=self.cleanup, daemon=True)  # which may hang as well
        cleaner.start()
        cleaner.join(1.0)
        os._exit(1)


def preflight(config: "RunConfig", ranks: Ranks, timeout: float, report: Report) -> None:
    """Three rounds, each told to rank 0: who is there, what each node sees, what all measure together.

    Raises:
        PeerLost: rank 0 is gone, or has given up and says why.
    """
    from pipeline import checks
    from pipeline.audit import Finding
    from pipeline.meeting import Meeting

    look = checks.look_at_process(ranks)
    # torch's store sleeps longer after each attempt to reach it, and overshoots its time by up to half.
    limit = TimeLimit(report, checks.place(look), 1.5 * timeout + 5)
    try:
        with limit.phase("ranks", "a program other than rank 0 may answer at MASTER_PORT"):
            meeting = Meeting(ranks.rank, ranks.world_size, read_rendezvous(os.environ), timeout)
    except UserError as error:
        report.add([Finding("ranks", False, f"{checks.place(look)}: {error}")])
        return
    assert config.run.dir is not None
    probe = checks.RunDirProbe(config.run.dir, config.run.directory_mode, ranks.rank)
    limit.cleanup = probe.remove
    looks: dict[int, dict[str, Any]] = {}

    def together(name: str, seen: dict[str, Any], judge: Callable[[], list[Finding]], answer: Callable[[], Any]) -> Any:
        """Brings what each has seen to rank 0, which judges it if all have come. Returns rank 0's answer."""
        meeting.tell(name, seen)
        if ranks.is_main:
            told = meeting.collect(name)
            for rank, more in told.items():
                looks[rank] = looks.get(rank, {}) | more
            arrival = checks.check_arrival(name, told, looks, ranks.world_size, timeout)
            complete = len(told) == ranks.world_size
            report.add(arrival + (judge() if complete else []))
            if not complete:
                report.end()
            meeting.answer(name, answer() if complete else None)
        heard = meeting.hear(name)
        if heard is None and not ranks.is_main:
            raise PeerLost("not all ranks have come; rank 0 says which")
        return heard

    def all_looks() -> list[dict[str, Any]]:
        return [looks[rank] for rank in range(ranks.world_size)]

    def who_leads() -> list[int]:
        with limit.phase("shards", "check the storage of data.train"):
            checks.prepare(config, ranks)  # before the other nodes look for the shards
        return checks.leaders(all_looks())

    try:
        leaders = together("ranks", look, lambda: checks.check_processes(all_looks(), config), who_leads)
        if leaders is None:
            return
        seen: dict[str, Any] = {"clock": time.time()}  # the answer has just come, to all at once
        if ranks.rank in leaders:
            with limit.phase("run directory", "check the storage of run.dir"):
                seen["run_dir"] = probe.write()
            with limit.phase("shards", "check the storage of data.train and data.val"):
                seen["shards"] = checks.look_at_shards(config, ranks, timeout / 4)
        if together("storage", seen, lambda: checks.check_nodes(all_looks(), config), lambda: True) is None:
            return
        seen = {"unseen": probe.unseen(leaders) if ranks.rank in leaders else []}
        with limit.phase("all-reduce", checks.NETWORK):
            seen |= checks.measure(ranks, leaders, meeting.store, timeout)
        together("network", seen, lambda: checks.check_network(all_looks(), config), lambda: True)
        if ranks.is_main:
            report.end()  # before the others end: a launcher ends all ranks after the first that fails
            meeting.answer("verdict", report.fine)
        report.others_fine = meeting.hear("verdict")
    finally:
        probe.remove()
        meeting.leave()


def keep(config: "RunConfig", problems: str) -> None:
    """Writes `exit.json` for the launcher, if the run has a directory."""
    from pipeline.checkpoint import newest_step
    from pipeline.run_dir import RunDir

    assert config.run.dir is not None
    run_dir = RunDir(config.run.dir)
    with contextlib.suppress(OSError, UserError):  # the disk may be what is wrong, or another start be training there
        if os.path.isdir(run_dir.path):
            run_dir.claim()
        run_dir.end("failed", newest_step(run_dir.checkpoints), f"preflight: {problems}")
    run_dir.close()


def main(arguments: list[str] | None = None) -> int:
    from pipeline.config import CONFIG_FOLDER, load_config

    parser = argparse.ArgumentParser(
        prog="python -m pipeline.preflight", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", default=os.path.join(CONFIG_FOLDER, "digits.yaml"), help="YAML file (digits)")
    parser.add_argument(
        "--timeout-seconds",
        type=float,
        default=20.0,
        help="how long a missing rank or a silent source is waited for (20)",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of lines")
    parser.add_argument(
        "--then-train", action="store_true", help="if all is fine, go on as pipeline/train.py with the same options"
    )
    parser.add_argument("--local_rank", "--local-rank", help=argparse.SUPPRESS)  # the deepspeed launcher appends it
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="options that override the config's")
    parsed = parser.parse_intermixed_args(arguments)
    unchanged = dict(os.environ)
    if has_launcher(os.environ):
        die_with_parent(os.getppid())
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # the store warns of each try to reach rank 0
    try:
        ranks = read_ranks(os.environ)
        config = load_config(parsed.config, parsed.overrides)
        export_ranks(ranks, os.environ)
        report = Report(ranks, parsed.json, partial(keep, config) if parsed.then_train else lambda problems: None)
        preflight(config, ranks, parsed.timeout_seconds, report)
        code = report.end()
        if code == 0 and parsed.then_train:
            words = [sys.executable, TRAIN, "--config", parsed.config, *parsed.overrides]
            os.execve(sys.executable, words, unchanged)  # noqa: S606  # no shell is wanted: the words are exact
        return code
    except UserError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return EXIT_USER_ERROR
    except PeerLost as error:
        print(f"rank {ranks.rank}: {error}", file=sys.stderr, flush=True)
        return 1


if __name__ == "__main__":
    screen_output()
    sys.exit(main())
