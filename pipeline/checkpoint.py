"""Save, load, find and prune checkpoints: `python -m pipeline.checkpoint ls|verify RUN`.

A checkpoint is a folder `step-00001200` with full fp32 weights, moments and moving average (safetensors, of which each
rank writes its share), `state.json`, and `manifest.json` with sizes and checksums, written last. It is written under
another name, synced and renamed. It fits any number of ranks, ZeRO stage and precision.

Only intact checkpoints count. A damaged one is renamed to `damaged-step-00001200`, and never deleted.
"""

import argparse
import contextlib
import dataclasses
import datetime
import functools
import hashlib
import json
import math
import os
import re
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from pipeline.engine import Engine, LossScale, TrainingState
from pipeline.errors import PeerLost, UserError, shorten
from pipeline.files import sync, write_durably
from pipeline.lease import Lease
from pipeline.optimizer import EMA
from pipeline.options import option
from pipeline.parsing import NotRegular, check_safetensors, open_regular, read_json
from pipeline.text import screen_output

NAME = re.compile(r"step-(\d{8,})")
SET_ASIDE = re.compile(r"(damaged|unreadable)-step-(\d{8,})(-\d+)?")
PART = re.compile(r"(model|optimizer|ema)-\d{5}-of-\d{5}\.safetensors")
STATE = "state.json"
LEFTOVERS = (".part-", ".removed-")  # of a save or a removal that was killed
EARLIER = ".earlier-"  # a checkpoint while a second save of its step takes its place
FORMAT = 2
RETRY_MINUTES = 1.0
READ_PAUSES_SECONDS = (1.0, 2.0, 4.0, 8.0)  # between tries to read from a storage that fails

Found = TypeVar("Found")


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    every_steps: int = option(1000, "steps between checkpoints; the last step always has one", may_change=True)
    every_minutes: float | None = option(None, "longest time between checkpoints; null: no limit", may_change=True)
    keep_last: int = option(2, "newest checkpoints to keep", may_change=True)
    keep_every_steps: int | None = option(None, "checkpoints of these steps are kept for good", may_change=True)
    keep_best: str | None = option(
        None,
        "metric of an evaluation, such as val/top1: each new best is saved, and the best checkpoint is kept; the"
        " largest is best, or the smallest if the name ends in loss",
        may_change=True,
    )

    def __post_init__(self) -> None:
        for name in ("every_steps", "keep_last", "keep_every_steps", "every_minutes"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ValueError(f"{name}: must be positive, found {value}")


class Damaged(Exception):
    """A checkpoint's content is not what was written. A mere error of the storage is an OSError instead."""


@dataclass(frozen=True)
class Outcome:
    """What became of one attempt to save."""

    failure: str | None = None  # no checkpoint was written, since ...
    not_finite: str | None = None  # the same, and training can't go on
    group_broken: bool = False  # the same, and no later attempt can succeed in this process group


class Saver:
    """Writes a run's checkpoints in the background: training waits only until the state is copied to host memory.

    Every rank has one, and all call its methods at the same steps. The unfinished checkpoint has the number of the
    lease in its name: a process that is left over from an earlier start can't write into it.
    """

    def __init__(self, config: CheckpointConfig, store: "Store", engine: Engine, facts: dict[str, Any], lease: Lease):
        self.config, self.store, self.engine, self.facts, self.lease = config, store, engine, facts, lease
        self.group = self._new_group()
        self.group_renewed = False  # since the last checkpoint
        self.memory: dict[tuple[str | None, str], Tensor] = {}  # for the host copy
        self.thread: threading.Thread | None = None
        self.last = Outcome()
        self.longest_seconds = 0.0  # that one has taken
        self.clock = time.monotonic()

    @property
    def failure(self) -> str | None:
        """Why the last attempt failed."""
        return self.last.failure

    def save(self, step: int, facts: dict[str, Any]) -> None:
        """Starts to write a checkpoint of `step` with these facts, which have the `evaluation` of this step.

        A failure is kept in `failure`, and older checkpoints stay intact.
        """
        self.wait()
        self.clock = time.monotonic()
        ranks = self.engine.ranks
        state = self.engine.state(self.memory)
        scale = None if state.loss_scale is None else asdict(state.loss_scale)
        counters = {"step": step, "updates": state.updates, "loss_scale": scale}
        facts = {**counters, **facts, **self.facts}
        self.thread = threading.Thread(target=self._run, args=(step, state, facts), name=f"save-{ranks.rank}")
        self.thread.start()

    def wanted(self) -> bool:
        """Whether it is time for a checkpoint by the clock, or to try again after a failure."""
        minutes = self.config.every_minutes
        if self.failure is not None:
            minutes = min(RETRY_MINUTES, minutes or RETRY_MINUTES)
        return minutes is not None and time.monotonic() - self.clock > 60 * minutes

    def needs_all_ranks(self) -> bool:
        """Whether all ranks must call `settle` soon."""
        return self.last.group_broken or self.last.not_finite is not None

    def settle(self) -> bool:
        """Waits for the last attempt, and deals with what only all ranks together can. Collective.

        Returns whether the ranks have made a new process group, and the checkpoint must be saved again.

        Raises:
            UserError: the state is not finite.
            PeerLost: the new group has failed, too.
        """
        if self.last.group_broken:
            self._leave_group()  # ends the wait of ranks that are still in it
        self.wait()
        told = self.engine.gather_objects((self.last.not_finite, self.last.group_broken, self.group_renewed))
        not_finite = [text for text, _, _ in told if text is not None]
        if not_finite:
            raise UserError(not_finite[0])
        broken = [rank for rank, (_, is_broken, _) in enumerate(told) if is_broken]
        if not broken:
            return False
        if any(renewed for _, _, renewed in told):
            raise PeerLost(
                f"{self.store.folder}: no checkpoint can be written: the ranks lost each other twice in a row while"
                f" they wrote it (rank {broken[0]}); look at the network between them and start again to resume"
            )
        self._leave_group()
        self.group, self.group_renewed, self.last = self._new_group(), True, Outcome()
        return True

    def is_best(self, evaluation: Mapping[str, float]) -> bool:
        """Whether an evaluation is better than those of all checkpoints that are kept. Collective."""
        metric = self.config.keep_best
        if metric is None or metric not in evaluation:
            return False
        better = self.engine.ranks.is_main and score_of(evaluation, metric) > self.store.best_score(metric)
        return self.engine.gather_objects(better)[0]

    def lacks_metric(self, evaluation: Mapping[str, float]) -> str | None:
        """What to tell the user where an evaluation does not have the metric of `keep_best`."""
        metric = self.config.keep_best
        if metric is None or metric in evaluation:
            return None
        return f"checkpoint.keep_best={metric}: no such metric; set one of {', '.join(sorted(evaluation))}, or null"

    def wait(self, seconds: float | None = None) -> None:
        """Until the checkpoint that is being written, if there is one, lies on the disk, or the time is over."""
        if self.thread is not None:
            self.thread.join(seconds)
            self.thread = None

    def finish(self) -> None:
        """Waits for the last checkpoint.

        Raises:
            UserError: it could not be written.
        """
        self.wait()
        if self.failure is not None:
            raise UserError(self.failure)

    def close(self) -> None:
        """Gives up the process group and the host copy's memory."""
        self.wait()
        self._leave_group()
        self.memory.clear()

    def _new_group(self) -> Any:
        """A group of the savers' own: the writing threads meet while training goes on."""
        if self.engine.ranks.world_size == 1:
            return None
        timeout = datetime.timedelta(seconds=self.engine.config.timeout_seconds)
        return torch.distributed.new_group(backend="gloo", timeout=timeout)

    def _leave_group(self) -> None:
        group, self.group = self.group, None
        if group is not None:
            with contextlib.suppress(Exception):  # it may be broken
                torch.distributed.destroy_process_group(group)

    def _run(self, step: int, state: TrainingState, facts: dict[str, Any]) -> None:
        name = f"step-{step:08d}"
        start = self.lease.path.rpartition("-")[2]
        partial = os.path.join(self.store.folder, f".part-{step:08d}-{start}")
        try:
            outcome = self._write(name, partial, state, facts)
        except Exception as error:  # of a collective call: the others may wait in another one now
            outcome = Outcome(f"rank {self.engine.ranks.rank}: {error}", group_broken=self.engine.ranks.world_size > 1)
        if outcome.failure is None:
            self.group_renewed = False
        else:
            shutil.rmtree(partial, ignore_errors=True)
            if outcome.not_finite is None:
                hint = "" if outcome.group_broken else "; free some space or repair the run directory"
                path = os.path.join(self.store.folder, name)
                text = f"{path}: can't write the checkpoint: {outcome.failure}{hint} (older checkpoints are intact)"
                outcome = Outcome(text, group_broken=outcome.group_broken)
                if self.engine.ranks.is_main:
                    _warn(text)
        self.longest_seconds = max(self.longest_seconds, time.monotonic() - self.clock)
        self.last = outcome

    def _write(self, name: str, partial: str, state: TrainingState, facts: dict[str, Any]) -> Outcome:
        """Writes this rank's share; rank 0 completes the checkpoint. The outcome is the same on all ranks.

        Raises:
            Exception: the ranks could not talk to each other.
        """
        ranks, group = self.engine.ranks, self.group
        problem, not_finite, files = None, None, {}
        share = self.engine.whole(state, group)
        try:
            not_finite = find_not_finite(share)
            if not_finite is None:
                files = write_share(partial, share, ranks.rank, ranks.world_size)
        except Exception as error:
            problem = f"rank {ranks.rank}: {error}"
        told = self.engine.gather_objects((problem, not_finite, files), group)
        for rank, (_, tensor, _) in enumerate(told):
            if tensor is not None:
                text = (
                    f"step {facts['step']}: {tensor} is not finite on rank {rank}; no checkpoint of it was written, and"
                    " older ones are intact: lower schedule.peak_lr, set engine.grad_clip, or engine.precision=no, and"
                    " start again to resume from the newest one"
                )
                return Outcome(text, not_finite=text)
        problem = "; ".join(found for found, _, _ in told if found) or None
        if problem is None:
            if ranks.is_main:
                try:
                    self.lease.check()
                    written = {file: known for _, _, share_files in told for file, known in share_files.items()}
                    complete(partial, os.path.join(self.store.folder, name), written, facts)
                except Exception as error:
                    problem = str(error)
            problem = self.engine.gather_objects(problem, group)[0]
        if problem is None and ranks.is_main:
            try:
                self.store.add(os.path.join(self.store.folder, name))
                self.store.prune(self.config)
            except Exception as error:  # the checkpoint is there all the same
                _warn(f"{self.store.folder}: can't delete old checkpoints: {error}")
        return Outcome(problem)


class Store:
    """A run's folder of checkpoints, and which of them are intact. Only rank 0 changes anything there.

    `guard` is called before it does, and raises where another start has taken over the run.
    """

    def __init__(self, folder: str, guard: Callable[[], None] = lambda: None):
        self.folder, self.guard = folder, guard
        self.intact: dict[str, dict[str, int]] = {}  # those this process has written or verified: their files' sizes
        self.scores: dict[tuple[str, str], float] = {}
        self.unreadable: set[str] = set()  # that were told
        self.newest: str | None = None  # that this process has written

    def find_newest(self) -> str | None:
        """The intact checkpoint to resume from, or None in a new run. Newer ones are set aside. No save is under way.

        Raises:
            UserError: there are checkpoints, but none is intact.
        """
        self.guard()
        patiently(self.clean_up)
        names = patiently(lambda: _names(self.folder))
        earlier = [os.path.join(self.folder, name) for name in sorted(names) if SET_ASIDE.fullmatch(name)]
        damaged, unreadable = [], []
        for path in _sorted(self.folder, names):
            try:
                patiently(functools.partial(self._verify, path))
            except Damaged as error:
                damaged.append(f"{self._set_aside(path, 'damaged', str(error))}: {error}")
            except OSError as error:
                unreadable.append((path, str(error)))
            else:
                for other, reason in unreadable:
                    # The run goes on from here: it must not return to what was the newest checkpoint.
                    if self._set_aside(other, "unreadable", reason) == other:
                        raise UserError(f"{other}: can't be read ({reason}) and can't be renamed; repair the storage")
                return path
        lines = [f"{path}: can't be read: {reason}" for path, reason in unreadable] + damaged
        lines += [f"{path}: set aside by an earlier start" for path in earlier]
        if not lines:
            return None
        raise UserError(
            f"{self.folder}: no checkpoint is intact, and the run would start at step 0:"
            + "".join(f"\n  {line}" for line in lines)
            + "\nIf the storage failed, repair it and start again. If you have a copy of a checkpoint, put it there as"
            " step-<its step in 8 digits>, such as step-00001200."
            " To start at step 0, move this folder away, or choose another run.dir."
        )

    def clean_up(self) -> None:
        """Finishes or removes what killed processes have left behind. No save is under way."""
        for name in _names(self.folder):
            path = os.path.join(self.folder, name)
            if name.startswith(EARLIER):
                self._settle(path, os.path.join(self.folder, name.removeprefix(EARLIER)))
            elif name.startswith(LEFTOVERS):
                shutil.rmtree(path, ignore_errors=True)

    def _settle(self, earlier: str, final: str) -> None:
        """Keeps one of two checkpoints of the same step: the second, `final`, if it is intact."""
        if os.path.exists(final):  # it is missing after a kill between the two renames in `complete`
            try:
                patiently(functools.partial(self._verify, final))
            except Damaged as error:
                how, reason = "damaged", str(error)
            except UserError:  # of another version of the format: `find_newest` refuses it
                return
            except OSError as error:
                if verify(earlier, _step(final)) is not None:
                    return
                how, reason = "unreadable", str(error)
            else:
                shutil.rmtree(earlier, ignore_errors=True)
                return
            if self._set_aside(final, how, reason) == final:
                return
        os.rename(earlier, final)
        sync(self.folder)

    def add(self, path: str) -> None:
        """Takes down a checkpoint that this process has just completed."""
        self.intact[path] = {name: os.path.getsize(os.path.join(path, name)) for name in os.listdir(path)}
        self.scores = {key: score for key, score in self.scores.items() if key[0] != path}
        self.newest = path

    def prune(self, config: CheckpointConfig) -> None:
        """Deletes checkpoints that are neither among the newest intact ones, nor of a step to keep, nor the best.

        Nothing is deleted before `keep_last` intact ones are known. What can't be read at the moment is left alone.
        """
        kept, older = 0, []
        for path in _folders(self.folder):
            if kept == config.keep_last:
                older.append(path)
            else:
                kept += self._is_intact(path)
        if config.keep_every_steps:
            older = [path for path in older if _step(path) % config.keep_every_steps]
        if older and config.keep_best:
            best = self._best(config.keep_best)
            older = [path for path in older if path != best and (path, config.keep_best) in self.scores]
        for path in older:
            if path != self.newest:
                _remove(path)

    def best_score(self, metric: str) -> float:
        return max((score for score, _ in self._scored(metric)), default=-math.inf)

    def discard_after(self, step: int) -> None:
        """Deletes the checkpoints of later steps."""
        for path in _folders(self.folder):
            if _step(path) > step:
                _remove(path)

    def _best(self, metric: str) -> str | None:
        for score, path in sorted(self._scored(metric), reverse=True):
            if score > -math.inf and self._is_intact(path):
                return path
        return None

    def _scored(self, metric: str) -> Iterator[tuple[float, str]]:
        """The checkpoints whose score can be read."""
        for path in _folders(self.folder):
            if (path, metric) not in self.scores:
                try:
                    self.scores[path, metric] = score_of(load_state(path)["evaluation"], metric)
                except (FileNotFoundError, ValueError, KeyError, TypeError):
                    self.scores[path, metric] = -math.inf
                except OSError:
                    continue
            yield self.scores[path, metric], path

    def _verify(self, path: str) -> None:
        """Checks all of a checkpoint that this process does not know, and the sizes of one that it does."""
        if path not in self.intact:
            self.intact[path] = check(path)
        for name, nbytes in self.intact[path].items():
            with _missing_means_damaged(name):
                found = os.path.getsize(os.path.join(path, name))
            if found != nbytes:
                raise Damaged(f"{name} has {found} bytes instead of {nbytes}")

    def _is_intact(self, path: str) -> bool:
        try:
            self._verify(path)
            self.unreadable.discard(path)
            return True
        except Damaged as error:
            self._set_aside(path, "damaged", str(error))
        except (OSError, UserError) as error:
            if path not in self.unreadable:
                self.unreadable.add(path)
                _warn(f"{path}: can't be read, and is left alone: {error}")
        return False

    def _set_aside(self, path: str, how: str, reason: str) -> str:
        """Renames a checkpoint, so that nobody counts it, and says so. Returns its new path; the old one on failure."""
        self.guard()
        self.intact.pop(path, None)
        target = wanted = os.path.join(self.folder, f"{how}-{os.path.basename(path)}")
        number = 0
        while os.path.exists(target):
            target = f"{wanted}-{(number := number + 1)}"
        try:
            os.rename(path, target)
            sync(self.folder)
        except OSError as error:
            _warn(f"{path} is {how} ({reason}), and can't be renamed: {error}")
            return path
        _warn(f"{path} is {how} ({reason}); renamed to {os.path.basename(target)}")
        return target


def find_not_finite(state: TrainingState) -> str | None:
    """The first tensor with a value that is not finite."""
    for kind, tensors in (("weight", state.weights), *state.moments.items()):
        for name, tensor in tensors.items():
            # The extremes of a tensor with NaN are NaN; isfinite() on all of it would need memory.
            if tensor.numel() and not all(math.isfinite(extreme) for extreme in torch.aminmax(tensor)):
                return f"{kind} {name}"
    return None


def write_share(folder: str, state: TrainingState, rank: int, world_size: int) -> dict[str, Any]:
    """Writes a rank's part of weights, moments and moving average. Returns size and checksum of each file."""
    os.makedirs(folder, exist_ok=True)
    moments = {f"{key}.{name}": v for key, kept in state.moments.items() if key != EMA for name, v in kept.items()}
    contents: dict[str, Mapping[str, Tensor]] = {"model": state.weights, "optimizer": moments}
    if EMA in state.moments:
        contents["ema"] = state.moments[EMA]
    files = {}
    for kind, tensors in contents.items():
        name = f"{kind}-{rank + 1:05d}-of-{world_size:05d}.safetensors"
        path = os.path.join(folder, name)
        save_file(dict(tensors), path)
        # safetensors lets the owner alone read; who may read the run directory may read its checkpoints.
        os.chmod(path, os.stat(folder).st_mode & 0o666)
        sync(path)
        files[name] = _facts(path)
    return files


def complete(partial: str, final: str, files: dict[str, Any], facts: dict[str, Any]) -> None:
    """Adds `state.json` and the manifest to the written parts, and gives the folder its name.

    Raises:
        OSError: a part that another rank has written is not there.
    """
    for name, known in files.items():
        path = os.path.join(partial, name)
        if not os.path.exists(path) or os.path.getsize(path) != known["nbytes"]:
            raise OSError(f"{name}, which its rank has written, is not in rank 0's {partial}: all ranks need one shared"
                          " file system there")  # fmt: skip
    state = os.path.join(partial, STATE)
    write_durably(state, json.dumps(facts, indent=1))
    manifest = {"format": FORMAT, "files": {**files, STATE: _facts(state)}}
    manifest["blake2b"] = _checksum(manifest)
    write_durably(os.path.join(partial, "manifest.json"), json.dumps(manifest, indent=1))
    folder, name = os.path.split(final)
    earlier = os.path.join(folder, EARLIER + name)
    replaces = os.path.exists(final)
    if replaces:
        shutil.rmtree(earlier, ignore_errors=True)
        os.rename(final, earlier)  # `clean_up` renames it back if this process is killed now
    try:
        os.rename(partial, final)
    except OSError:
        if replaces:
            os.rename(earlier, final)
        raise
    sync(folder)
    shutil.rmtree(earlier, ignore_errors=True)


def latest(folder: str) -> tuple[str | None, list[str]]:
    """The newest intact checkpoint of a folder, and why newer ones were skipped. Only reads."""
    skipped: list[str] = []
    for path in _folders(folder):
        wrong = verify(path)
        if wrong is None:
            return path, skipped
        skipped.append(f"{path}: {wrong}")
    return None, skipped


def has_any(folder: str) -> bool:
    """Whether a folder holds checkpoints, intact or not."""
    return any(NAME.fullmatch(name) or SET_ASIDE.fullmatch(name) or name.startswith(EARLIER) for name in _names(folder))


def check(path: str, step: int | None = None) -> dict[str, int]:
    """Reads all of a checkpoint. Returns the sizes of its files. `step` is what it must be of, by default as its name.

    Raises:
        Damaged: the content is not what was written, or the name is of another step.
        OSError: it can't be read.
        UserError: it is of another version of the format.
    """
    if os.path.exists(path) and not os.path.isdir(path):
        raise Damaged("it is a file, not a folder")
    files = _read_manifest(path)
    for name, facts in files.items():
        with _missing_means_damaged(name):
            _refuse_link(path, name)
            whole = os.path.join(path, name)
            if os.path.getsize(whole) != facts["nbytes"] or _facts(whole) != facts:  # the size first: it takes no time
                raise Damaged(f"{name} does not fit the manifest's size and checksum")
            if name != STATE:
                _check_tensors(whole, name)
    _check_step(path, _named_step(path) if step is None else step)
    return {name: os.path.getsize(os.path.join(path, name)) for name in (*files, "manifest.json")}


def _read_manifest(path: str) -> dict[str, Any]:
    """The facts of each file. Raises what `check` does."""
    try:
        with _missing_means_damaged("manifest.json"):
            _refuse_link(path, "manifest.json")
            manifest = read_json(os.path.join(path, "manifest.json"))
        found_format, files = manifest["format"], dict(manifest["files"])
        checksum = manifest.pop("blake2b", None)
        expected = _checksum(manifest)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise Damaged(f"manifest.json: {type(error).__name__}: {shorten(str(error), 200, quote=False)}") from None
    # Older versions wrote formats 1 and 2 without a checksum of the manifest.
    if checksum != expected and (checksum is not None or found_format not in (1, 2)):
        raise Damaged("manifest.json does not fit its own checksum")
    if found_format != FORMAT:
        raise UserError(
            f"{path}: format {shorten(found_format)}, this version reads {FORMAT}; use the version of the code that"
            " wrote it, or move this checkpoint away to go on from an older one"
        )
    for name, facts in files.items():  # a stranger's manifest must not name any other file of the user's
        if name != STATE and not PART.fullmatch(name):
            raise Damaged(
                f"manifest.json names {shorten(name)}, expected only {STATE} and parts as this code writes them"
            )
        if not (isinstance(facts, dict) and type(facts.get("nbytes")) is int):
            raise Damaged(f"manifest.json says {shorten(facts)} of {name}, expected its size and checksum")
    return files


def _refuse_link(path: str, name: str) -> None:
    """Raises Damaged where a file of a checkpoint is a link out of it.

    In the cache of huggingface_hub, all files of a snapshot are links to the folder `blobs` beside `snapshots`.
    """
    whole, home = os.path.join(path, name), os.path.realpath(path)
    blobs = os.path.join(home.rpartition("/snapshots/")[0], "blobs")
    if os.path.islink(whole) and os.path.dirname(os.path.realpath(whole)) not in (home, blobs):
        raise Damaged(f"{name} is a link out of the checkpoint; copy the file there")


def _check_tensors(path: str, name: str) -> None:
    """Raises Damaged where a part has no sound header: only that is read."""
    try:
        check_safetensors(path)
        with safe_open(path, framework="pt"):
            pass
    except (ValueError, SafetensorError) as error:
        raise Damaged(f"{name}: {shorten(str(error), 200, quote=False)}") from None


def _checksum(manifest: dict[str, Any]) -> str:
    return hashlib.blake2b(json.dumps(manifest, sort_keys=True).encode(), digest_size=16).hexdigest()


def _check_step(path: str, step: int | None) -> None:
    """Raises Damaged where `state.json` is of another step than this. None: any step will do."""
    try:
        with _missing_means_damaged("state.json"):
            found = load_state(path)["step"]
        right = f"step-{found:08d}"
    except (ValueError, KeyError, TypeError) as error:
        raise Damaged(f"state.json: {type(error).__name__}: {shorten(str(error), 200, quote=False)}") from None
    if step not in (found, None):
        raise Damaged(f"state.json is of step {found}, the name is of step {step}; rename the folder to {right}")


def verify(path: str, step: int | None = None) -> str | None:
    """What is wrong with a checkpoint, or None; with `step` as in `check`."""
    try:
        check(path, step)
    except Damaged as error:
        return f"damaged: {error}"
    except OSError as error:
        return f"can't be read: {error}"
    except UserError as error:
        return str(error)
    return None


def patiently(read: Callable[[], Found]) -> Found:
    """Reads from a storage that may fail for a moment: tries several times.

    Raises:
        OSError: the last try failed, too.
    """
    for pause in READ_PAUSES_SECONDS:
        try:
            return read()
        except OSError as error:
            _warn(f"{error}; tried again in {pause:g} s")
            time.sleep(pause)
    return read()


def load_state(path: str) -> dict[str, Any]:
    """What `Saver` was given as facts, with `step`, `updates` and `evaluation`; of a checkpoint that is intact.

    Raises:
        OSError: it can't be read.
        ValueError: its content is not as expected.
    """
    facts = read_json(os.path.join(path, STATE))
    if not isinstance(facts, dict):
        raise ValueError(f"found {shorten(facts)}, expected an object")
    for key in ("step", "updates"):
        if key not in facts:
            raise ValueError(f"{key}: missing")
    for key, (fits, expected) in FACTS.items():
        if key in facts and not fits(facts[key]):
            raise ValueError(f"{key}: found {shorten(facts[key])}, expected {expected}")
    return facts


def _is_number(value: Any) -> bool:
    return type(value) in (int, float)


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 1 << 53


def _is_object(value: Any) -> bool:
    return isinstance(value, dict)


def _is_loss_scale(value: Any) -> bool:
    names = {field.name for field in dataclasses.fields(LossScale)}
    return value is None or (
        isinstance(value, dict)
        and {"scale", "stable_steps"} <= value.keys() <= names
        and _is_number(value["scale"])
        and all(_is_count(number) for name, number in value.items() if name != "scale" and number is not None)
    )


# What other code relies on: whether a value fits, and what it must be.
FACTS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "step": (_is_count, "a step"),
    "updates": (_is_count, "a count"),
    "loss_scale": (_is_loss_scale, "null or a loss scale"),
    "classes": (
        lambda value: value is None or (isinstance(value, list) and all(isinstance(name, str) for name in value)),
        "null or a list of names",
    ),
    "config": (_is_object, "sections of options"),
    "evaluation": (
        lambda value: isinstance(value, dict) and all(map(_is_number, value.values())),
        "an object of numbers",
    ),
    **dict.fromkeys(("logs", "interval", "health"), (_is_object, "an object")),
}


def require(path: str) -> None:
    """Raises UserError where a folder is no intact checkpoint."""
    wrong = verify(path)
    if wrong is not None:
        raise UserError(f"{path}: no whole checkpoint: {wrong}; name another one")


class Tensors(Mapping[str, Tensor]):
    """Tensors of a checkpoint, each mapped into memory when it is asked for, and gone when it is not used any more.

    Ranks of one node share the pages, and a slice reads no more than itself.
    """

    def __init__(self, places: dict[str, tuple[str, str]]):
        self.places = places  # file, and name in it

    def __getitem__(self, name: str) -> Tensor:
        path, key = self.places[name]
        with safe_open(path, framework="pt") as file:
            return file.get_tensor(key)

    def __iter__(self) -> Iterator[str]:
        return iter(self.places)

    def __len__(self) -> int:
        return len(self.places)


def load(path: str) -> TrainingState:
    """Everything that an intact checkpoint holds. Tensors are read when they are used."""
    moments: dict[str, dict[str, tuple[str, str]]] = {}
    for full, place in _places(path, "optimizer").items():
        key, _, name = full.partition(".")
        moments.setdefault(key, {})[name] = place
    averages = _places(path, "ema")
    if averages:
        moments[EMA] = averages
    facts = load_state(path)
    scale = LossScale(**facts["loss_scale"]) if facts.get("loss_scale") else None
    lazy = {key: Tensors(places) for key, places in moments.items()}
    return TrainingState(Tensors(_places(path, "model")), lazy, facts["updates"], scale)


def load_weights(path: str, ema: bool = False) -> Tensors:
    """The weights, or their moving average, of an intact checkpoint.

    Raises:
        UserError: the checkpoint has no moving average.
    """
    weights = _places(path, "ema" if ema else "model")
    if not weights:
        raise UserError(
            f"{path}: holds no moving average of the weights: optimizer.ema_decay was null; leave --ema out"
        )
    return Tensors(weights)


def _places(path: str, kind: str) -> dict[str, tuple[str, str]]:
    """Where each tensor of a kind is: file, and name in it."""
    names = [name for name in _read_manifest(path) if name.startswith(f"{kind}-")]
    places: dict[str, tuple[str, str]] = {}
    for part in (os.path.join(path, name) for name in names):
        with safe_open(part, framework="pt") as file:
            places |= {name: (part, name) for name in file.keys()}  # noqa: SIM118
    return places


def score_of(evaluation: Mapping[str, float], metric: str) -> float:
    """The larger, the better; minus infinity without a usable value."""
    value = float(evaluation.get(metric, math.nan))
    value = -value if metric.endswith("loss") else value
    return value if math.isfinite(value) else -math.inf


def _folders(folder: str) -> list[str]:
    """All checkpoints by name, newest first."""
    return _sorted(folder, _names(folder))


def _sorted(folder: str, names: list[str]) -> list[str]:
    found = sorted(filter(NAME.fullmatch, names), key=_step, reverse=True)
    return [os.path.join(folder, name) for name in found]


def _names(folder: str) -> list[str]:
    try:
        return os.listdir(folder)
    except FileNotFoundError:
        return []


def newest_step(folder: str) -> int:
    """The step of the newest checkpoint by name; 0 without any."""
    return max(map(_step, _folders(folder)), default=0)


def _step(path: str) -> int:
    found = NAME.fullmatch(os.path.basename(path))
    assert found is not None
    return int(found[1])


def _named_step(path: str) -> int | None:
    """The step in a checkpoint's name, also of one set aside. None: the user has given it another name."""
    name = os.path.basename(os.path.normpath(path))
    found = re.fullmatch(f"{NAME.pattern}|{SET_ASIDE.pattern}", name)
    return None if found is None else int(found[1] or found[3])


def _remove(path: str) -> None:
    """Deletes a checkpoint. One that is half deleted when the process is killed has another name."""
    folder, name = os.path.split(path)
    removed = os.path.join(folder, f".removed-{name}")
    shutil.rmtree(removed, ignore_errors=True)
    with contextlib.suppress(FileNotFoundError):
        os.rename(path, removed)
        shutil.rmtree(removed, ignore_errors=True)


@contextlib.contextmanager
def _missing_means_damaged(name: str) -> Iterator[None]:
    try:
        yield
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        raise Damaged(f"{name} is missing") from None


def _facts(path: str) -> dict[str, Any]:
    """Size and checksum.

    Raises:
        OSError: it can't be read.
        Damaged: it is no file that could be read to its end.
    """
    digest = hashlib.blake2b(digest_size=16)
    try:
        file = open_regular(path)
    except NotRegular as error:
        raise Damaged(f"{os.path.basename(path)} is {error.strerror}") from None
    with file:
        size = os.fstat(file.fileno()).st_size
        while chunk := file.read(1 << 22):
            digest.update(chunk)
    return {"nbytes": size, "blake2b": digest.hexdigest()}


def _warn(text: str) -> None:
    print(f"warning: {text}", file=sys.stderr, flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m pipeline.checkpoint", description="Lists or verifies checkpoints.")
    parser.add_argument("command", choices=["ls", "verify"], help="ls: steps and sizes; verify: also all checksums")
    parser.add_argument("folder", help="a run directory, or the folder of its checkpoints")
    parsed = parser.parse_args()
    inner = os.path.join(parsed.folder, "checkpoints")
    folder = inner if os.path.isdir(inner) else parsed.folder
    try:
        names = _names(folder)
    except OSError as error:
        print(f"error: {folder}: {error.strerror}; name a run directory", file=sys.stderr)
        return 2
    paths = _sorted(folder, names)
    paths += [os.path.join(folder, name) for name in sorted(names) if SET_ASIDE.fullmatch(name)]
    if not paths:
        print(f"error: {parsed.folder}: no checkpoints", file=sys.stderr)
        return 2
    bad = 0
    for path in paths:
        set_aside = "set aside" if SET_ASIDE.fullmatch(os.path.basename(path)) else ""
        wrong = verify(path) if parsed.command == "verify" else None
        bad += wrong is not None
        said = wrong or ("whole" if parsed.command == "verify" else "")
        print(f"{path}  {_nbytes(path) / 2**20:10.1f} MiB  {', '.join(filter(None, (set_aside, said)))}".rstrip())
    return 1 if bad else 0


def _nbytes(path: str) -> int:
    """The size of what can be read: a training process may delete a checkpoint while it is listed."""
    nbytes = 0
    with contextlib.suppress(OSError):
        for file in [os.path.join(path, name) for name in os.listdir(path)] if os.path.isdir(path) else [path]:
            with contextlib.suppress(OSError):
                nbytes += os.path.getsize(file)
    return nbytes


if __name__ == "__main__":
    screen_output()
    sys.exit(main())
