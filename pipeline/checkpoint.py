"""Save, load, find and prune checkpoints: `python -m pipeline.checkpoint ls|verify RUN`.

A checkpoint is a folder `step-00001200` with full fp32 weights, moments and moving average (safetensors, of which each
rank writes its share), `state.json`, and `manifest.json` with sizes and checksums, written last. It is written under
another name, synced and renamed: a folder without a whole manifest is not a checkpoint. It fits any number of ranks,
ZeRO stage and precision.
"""

import argparse
import hashlib
import json
import os
import re
import shutil
import sys
import threading
import time
from dataclasses import asdict, dataclass
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from pipeline.engine import Engine, LossScale, TrainingState
from pipeline.errors import UserError
from pipeline.optimizer import EMA
from pipeline.options import option

NAME = re.compile(r"step-(\d{8,})")
RETRY_MINUTES = 1.0
PART = re.compile(r"(model|optimizer|ema)-\d{5}-of-\d{5}\.safetensors")


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    every_steps: int = option(1000, "steps between checkpoints; the last step always has one", may_change=True)
    every_minutes: float | None = option(None, "longest time between checkpoints; null: no limit", may_change=True)
    keep_last: int = option(2, "newest checkpoints to keep", may_change=True)
    keep_every_steps: int | None = option(None, "checkpoints of these steps are kept for good", may_change=True)
    keep_best: str | None = option(
        None, "metric of an evaluation, such as val/top1: the checkpoint with the largest is kept", may_change=True
    )

    def __post_init__(self) -> None:
        for name in ("every_steps", "keep_last", "keep_every_steps", "every_minutes"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ValueError(f"{name}: must be positive, found {value}")


class Saver:
    """Writes a run's checkpoints in the background: training waits only until the state is copied to host memory.

    Every rank has one, and all call its methods at the same steps.
    """

    def __init__(self, config: CheckpointConfig, folder: str, engine: Engine, facts: dict[str, Any]):
        import torch.distributed as dist

        self.config, self.folder, self.engine, self.facts = config, folder, engine, facts
        # A group of its own: the writing threads meet while training goes on.
        self.group = dist.new_group(backend="gloo") if engine.ranks.world_size > 1 else None
        self.memory: dict[tuple[str | None, str], Tensor] = {}  # for the host copy
        self.thread: threading.Thread | None = None
        self.failure: str | None = None  # of the last attempt
        self.longest_seconds = 0.0  # that one has taken
        self.clock = time.monotonic()
        if engine.ranks.is_main:  # no rank saves before all have met in the first step
            remove_leftovers(folder)

    def save(self, step: int, facts: dict[str, Any]) -> None:
        """Starts to write a checkpoint of `step` with these facts, which have the last `evaluation`.

        A failure is kept in `failure`, and older checkpoints stay whole.
        """
        self.wait()
        self.clock = time.monotonic()
        ranks = self.engine.ranks
        state = self.engine.state(self.memory)
        scale = None if state.loss_scale is None else asdict(state.loss_scale)
        counters = {"step": step, "updates": state.updates, "loss_scale": scale}
        facts = {**counters, **facts, **self.facts}
        self.thread = threading.Thread(target=self._write, args=(step, state, facts), name=f"save-{ranks.rank}")
        self.thread.start()

    def wanted(self) -> bool:
        """Whether it is time for a checkpoint by the clock, or to try again after a failure."""
        minutes = self.config.every_minutes
        if self.failure is not None:
            minutes = min(RETRY_MINUTES, minutes or RETRY_MINUTES)
        return minutes is not None and time.monotonic() - self.clock > 60 * minutes

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

    def _write(self, step: int, state: TrainingState, facts: dict[str, Any]) -> None:
        ranks = self.engine.ranks
        final, partial = os.path.join(self.folder, f"step-{step:08d}"), os.path.join(self.folder, f".part-{step:08d}")
        problem, written = None, {}
        try:
            written = write_share(partial, self.engine.whole(state, self.group), ranks.rank, ranks.world_size)
        except Exception as error:
            problem = f"rank {ranks.rank}: {error}"
        try:
            shares = self.engine.gather_objects((problem, written), self.group)
            problem = "; ".join(found for found, _ in shares if found) or None
            if problem is None and ranks.is_main:
                complete(partial, final, {name: known for _, share in shares for name, known in share.items()}, facts)
                prune(self.folder, self.config)
        except Exception as error:
            problem = str(error)
        if problem is not None:
            shutil.rmtree(partial, ignore_errors=True)
            problem = (
                f"{final}: can't write the checkpoint: {problem}; free some space or mend the run directory"
                " (older checkpoints are whole)"
            )
            if ranks.is_main:
                print(f"warning: {problem}", file=sys.stderr, flush=True)
        self.failure = problem
        self.longest_seconds = max(self.longest_seconds, time.monotonic() - self.clock)


def write_share(folder: str, state: TrainingState, rank: int, world_size: int) -> dict[str, Any]:
    """Writes a rank's part of weights, moments and moving average. Returns size and checksum of each file."""
    os.makedirs(folder, exist_ok=True)
    moments = {f"{key}.{name}": v for key, kept in state.moments.items() if key != EMA for name, v in kept.items()}
    contents = {"model": state.weights, "optimizer": moments}
    if EMA in state.moments:
        contents["ema"] = state.moments[EMA]
    files = {}
    for kind, tensors in contents.items():
        name = f"{kind}-{rank + 1:05d}-of-{world_size:05d}.safetensors"
        path = os.path.join(folder, name)
        save_file(tensors, path)
        # safetensors lets the owner alone read; who may read the run directory may read its checkpoints.
        os.chmod(path, os.stat(folder).st_mode & 0o666)
        _sync(path)
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
    state = os.path.join(partial, "state.json")
    _write_json(state, facts)
    for name in os.listdir(partial):
        if PART.fullmatch(name) and name not in files:  # of an attempt with another number of ranks
            os.remove(os.path.join(partial, name))
    _write_json(os.path.join(partial, "manifest.json"), {"format": 2, "files": {**files, "state.json": _facts(state)}})
    shutil.rmtree(earlier := f"{partial}-earlier", ignore_errors=True)
    if os.path.exists(final):
        os.rename(final, earlier)  # to remove it takes time, in which there would be none
    os.rename(partial, final)
    _sync(os.path.dirname(final))
    shutil.rmtree(earlier, ignore_errors=True)


def prune(folder: str, config: CheckpointConfig) -> None:
    """Removes what is neither among the newest, nor of a step to keep, nor the best."""
    found = _folders(folder)
    kept = set(found[: config.keep_last])
    if config.keep_every_steps:
        kept |= {path for path in found if _step(path) % config.keep_every_steps == 0}
    if config.keep_best:
        scores = {path: _score(path, config.keep_best) for path in found}
        kept.add(max(found, key=lambda path: scores[path]))
    for path in found:
        if path not in kept:
            shutil.rmtree(path, ignore_errors=True)


def remove_leftovers(folder: str) -> None:
    """Removes what killed saves have left; while none is under way."""
    for name in os.listdir(folder):
        if name.startswith(".part-"):
            shutil.rmtree(os.path.join(folder, name), ignore_errors=True)


def discard_after(folder: str, step: int) -> None:
    """Removes the checkpoints that lie after `step`."""
    for path in _folders(folder):
        if _step(path) > step:
            shutil.rmtree(path)


def latest(folder: str) -> tuple[str | None, list[str]]:
    """The newest whole checkpoint of a folder, and why newer ones were skipped."""
    skipped: list[str] = []
    for path in _folders(folder):
        wrong = verify(path)
        if wrong is None:
            return path, skipped
        skipped.append(f"{path}: {wrong}")
    return None, skipped


def verify(path: str) -> str | None:
    """What is wrong with a checkpoint, or None."""
    try:
        with open(os.path.join(path, "manifest.json")) as file:
            manifest = json.load(file)
        if manifest["format"] != 2:
            return f"format {manifest['format']}, this version reads 2"
        for name, facts in manifest["files"].items():
            if _facts(os.path.join(path, name)) != facts:
                return f"{name} does not fit the manifest's size and checksum"
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"not whole: {error}"
    return None


def load_state(path: str) -> dict[str, Any]:
    """What `Saver` was given as facts, with `step`, `updates` and `evaluation`; of a checkpoint that is whole."""
    with open(os.path.join(path, "state.json")) as file:
        return json.load(file)


def require(path: str) -> None:
    """Raises UserError where a folder is no whole checkpoint."""
    wrong = verify(path)
    if wrong is not None:
        raise UserError(f"{path}: no whole checkpoint: {wrong}; name another one")


def load(path: str) -> TrainingState:
    """Everything that a checkpoint holds, if it is whole."""
    moments: dict[str, dict[str, Tensor]] = {}
    for full, tensor in _load_parts(path, "optimizer").items():
        key, _, name = full.partition(".")
        moments.setdefault(key, {})[name] = tensor
    averages = _load_parts(path, "ema")
    if averages:
        moments[EMA] = averages
    facts = load_state(path)
    scale = LossScale(**facts["loss_scale"]) if facts.get("loss_scale") else None
    return TrainingState(_load_parts(path, "model"), moments, facts["updates"], scale)


def load_weights(path: str, ema: bool = False) -> dict[str, Tensor]:
    """The weights, or their moving average, of a checkpoint that is whole.

    Raises:
        UserError: the checkpoint has no moving average.
    """
    weights = _load_parts(path, "ema" if ema else "model")
    if not weights:
        raise UserError(
            f"{path}: holds no moving average of the weights: optimizer.ema_decay was null; leave --ema out"
        )
    return weights


def _load_parts(path: str, kind: str) -> dict[str, Tensor]:
    parts = [load_file(os.path.join(path, name)) for name in os.listdir(path) if name.startswith(f"{kind}-")]
    return {name: tensor for part in parts for name, tensor in part.items()}


def _folders(folder: str) -> list[str]:
    """All checkpoints by name, newest first."""
    try:
        names = sorted((n for n in os.listdir(folder) if NAME.fullmatch(n)), reverse=True)
    except FileNotFoundError:
        return []
    return [os.path.join(folder, name) for name in names]


def newest_step(folder: str) -> int:
    """The step of the newest checkpoint by name; 0 without any."""
    return max(map(_step, _folders(folder)), default=0)


def _step(path: str) -> int:
    found = NAME.fullmatch(os.path.basename(path))
    assert found is not None
    return int(found[1])


def _score(path: str, metric: str) -> float:
    try:
        return float(load_state(path)["evaluation"].get(metric, float("-inf")))
    except (OSError, ValueError, KeyError):
        return float("-inf")


def _facts(path: str) -> dict[str, Any]:
    digest = hashlib.blake2b(digest_size=16)
    with open(path, "rb") as file:
        while chunk := file.read(1 << 22):
            digest.update(chunk)
    return {"nbytes": os.path.getsize(path), "blake2b": digest.hexdigest()}


def _write_json(path: str, value: Any) -> None:
    with open(path, "w") as file:
        json.dump(value, file, indent=1)
    _sync(path)


def _sync(path: str) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m pipeline.checkpoint", description="Lists or verifies checkpoints.")
    parser.add_argument("command", choices=["ls", "verify"], help="ls: steps and sizes; verify: also all checksums")
    parser.add_argument("folder", help="a run directory, or the folder of its checkpoints")
    parsed = parser.parse_args()
    inner = os.path.join(parsed.folder, "checkpoints")
    paths = _folders(inner if os.path.isdir(inner) else parsed.folder)
    if not paths:
        print(f"error: {parsed.folder}: no checkpoints", file=sys.stderr)
        return 2
    bad = 0
    for path in paths:
        size = sum(os.path.getsize(os.path.join(path, name)) for name in os.listdir(path))
        wrong = verify(path) if parsed.command == "verify" else None
        bad += wrong is not None
        print(f"{path}  {size / 2**20:10.1f} MiB  {wrong or ('whole' if parsed.command == 'verify' else '')}".rstrip())
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
