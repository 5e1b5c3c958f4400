"""Save, load, find and prune checkpoints.

A checkpoint is a folder `step-00001200` with full fp32 weights and moments (safetensors), `state.json`, and
`manifest.json` with sizes and checksums, written last. It is written under another name, synced and renamed: a
folder without a whole manifest is not a checkpoint. It fits any number of ranks, ZeRO stage and precision.
"""

import hashlib
import json
import os
import re
import shutil
from dataclasses import dataclass
from typing import Any

from safetensors.torch import load_file, save_file

from pipeline.engine import MOMENTS, TrainingState
from pipeline.errors import UserError
from pipeline.options import option

NAME = re.compile(r"step-(\d{8,})")


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    every_steps: int = option(1000, "steps between checkpoints; the last step always has one", may_change=True)
    keep_last: int = option(2, "checkpoints to keep", may_change=True)

    def __post_init__(self) -> None:
        for name in ("every_steps", "keep_last"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: must be at least 1, found {getattr(self, name)}")


def save(folder: str, step: int, state: TrainingState, facts: dict[str, Any], keep_last: int) -> str:
    """Writes `folder/step-...` and removes all but the newest `keep_last`. Returns its path.

    Raises:
        UserError: the disk is full or can't be written; older checkpoints stay whole.
    """
    final = os.path.join(folder, f"step-{step:08d}")
    partial = os.path.join(folder, f".part-step-{step:08d}")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        os.makedirs(partial)
        save_file(state.weights, os.path.join(partial, "model.safetensors"))
        moments = {f"{key}.{name}": tensor for key in MOMENTS for name, tensor in state.moments[key].items()}
        save_file(moments, os.path.join(partial, "optimizer.safetensors"))
        _write_json(os.path.join(partial, "state.json"), {"step": step, "updates": state.updates, **facts})
        files = {name: _facts(os.path.join(partial, name)) for name in sorted(os.listdir(partial))}
        _write_json(os.path.join(partial, "manifest.json"), {"format": 1, "files": files})
        for name in os.listdir(partial):
            _sync(os.path.join(partial, name))
        shutil.rmtree(final, ignore_errors=True)
        os.rename(partial, final)
        _sync(folder)
    except Exception as error:
        shutil.rmtree(partial, ignore_errors=True)
        if not isinstance(error, OSError) and "No space" not in str(error) and "File too large" not in str(error):
            raise
        raise UserError(
            f"{final}: can't write the checkpoint: {error}; free some space or choose another run.dir and start again"
            " (older checkpoints are whole)"
        ) from None
    for old in _folders(folder)[keep_last:]:
        shutil.rmtree(old, ignore_errors=True)
    return final


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
            files = json.load(file)["files"]
        for name, facts in files.items():
            if _facts(os.path.join(path, name)) != facts:
                return f"{name} does not fit the manifest's size and checksum"
    except (OSError, ValueError, KeyError) as error:
        return f"not whole: {error}"
    return None


def load_state(path: str) -> dict[str, Any]:
    """What `save` was given as facts, with `step` and `updates`."""
    wrong = verify(path)
    if wrong is not None:
        raise UserError(f"{path}: no whole checkpoint: {wrong}; name another one")
    with open(os.path.join(path, "state.json")) as file:
        return json.load(file)


def load(path: str, updates: int) -> TrainingState:
    weights = load_file(os.path.join(path, "model.safetensors"))
    moments: dict[str, dict] = {key: {} for key in MOMENTS}
    for name, tensor in load_file(os.path.join(path, "optimizer.safetensors")).items():
        key, _, parameter = name.partition(".")
        moments[key][parameter] = tensor
    return TrainingState(weights, moments, updates)


def _folders(folder: str) -> list[str]:
    """All checkpoints by name, newest first."""
    try:
        names = sorted((n for n in os.listdir(folder) if NAME.fullmatch(n)), reverse=True)
    except FileNotFoundError:
        return []
    return [os.path.join(folder, name) for name in names]


def _facts(path: str) -> dict[str, Any]:
    digest = hashlib.blake2b(digest_size=16)
    with open(path, "rb") as file:
        while chunk := file.read(1 << 22):
            digest.update(chunk)
    return {"nbytes": os.path.getsize(path), "blake2b": digest.hexdigest()}


def _write_json(path: str, value: Any) -> None:
    with open(path, "w") as file:
        json.dump(value, file, indent=1)


def _sync(path: str) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
