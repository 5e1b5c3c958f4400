"""Checkpoints: what is kept, what is recovered, what is refused."""

import subprocess
import sys

import pytest
import torch

from pipeline import checkpoint
from pipeline.engine import TrainingState
from pipeline.errors import UserError
from tests.conftest import ROOT


def state(value, name):
    weights = {name: torch.full((3, 2), value)}
    moments = {key: {name: torch.full((3, 2), value)} for key in ("exp_avg", "exp_avg_sq")}
    return TrainingState(weights, moments, updates=int(value))


def save(folder, step, value, world_size=1, evaluation=(), store=None, **options):
    """A checkpoint of `world_size` shares, and what the options keep of the folder."""
    partial, final = f"{folder}/.part-{step:08d}", f"{folder}/step-{step:08d}"
    files = {}
    for rank in range(world_size):
        share = state(value, "ab"[rank])
        files |= checkpoint.write_share(partial, share, rank, world_size)
    facts = {"step": step, "updates": int(value), "evaluation": dict(evaluation)}
    checkpoint.complete(partial, final, files, facts)
    store = store or checkpoint.Store(str(folder))
    store.add(final)
    store.prune(checkpoint.CheckpointConfig(**options))


def test_the_newest_whole_checkpoint_is_found_and_read(tmp_path):
    for step in (1, 2, 3):
        save(tmp_path, step, float(step), world_size=2, keep_last=2)
    path, skipped = checkpoint.latest(str(tmp_path))
    assert path.endswith("step-00000003")
    assert not skipped
    assert not (tmp_path / "step-00000001").exists()
    loaded = checkpoint.load(path)
    for name in "ab":
        assert torch.equal(loaded.weights[name], torch.full((3, 2), 3.0))
        assert torch.equal(loaded.moments["exp_avg"][name], torch.full((3, 2), 3.0))
    assert loaded.updates == 3


@pytest.mark.parametrize(("folder_mode", "file_mode"), [(0o755, 0o644), (0o770, 0o660), (0o700, 0o600)])
def test_who_may_read_the_run_directory_may_read_its_checkpoints(tmp_path, folder_mode, file_mode):
    part = tmp_path / ".part-00000001"
    part.mkdir()
    part.chmod(folder_mode)
    checkpoint.write_share(str(part), state(1.0, "a"), 0, 1)
    assert {path.stat().st_mode & 0o777 for path in part.iterdir()} == {file_mode}


def test_a_part_that_went_to_another_disk_makes_no_checkpoint(tmp_path):
    save(tmp_path, 1, 1.0)
    known = checkpoint.write_share(str(tmp_path / "elsewhere"), state(2.0, "b"), 1, 2)
    here = checkpoint.write_share(str(tmp_path / ".part-00000002"), state(2.0, "a"), 0, 2)
    with pytest.raises(OSError, match=r"model-00002-of-00002.safetensors.*one shared file system"):
        checkpoint.complete(f"{tmp_path}/.part-00000002", f"{tmp_path}/step-00000002", here | known, {"step": 2})
    assert checkpoint.latest(str(tmp_path))[0].endswith("step-00000001")


def test_the_best_and_those_of_chosen_steps_are_kept(tmp_path):
    for step, top1 in ((2, 0.1), (3, 0.9), (4, 0.2), (5, 0.3), (6, 0.4)):
        save(tmp_path, step, 1.0, evaluation={"val/top1": top1}.items(), keep_last=1, keep_every_steps=4,
             keep_best="val/top1")  # fmt: skip
    assert sorted(p.name for p in tmp_path.iterdir()) == [f"step-0000000{n}" for n in (3, 4, 6)]


def test_a_second_save_of_a_step_replaces_the_first_and_what_a_killed_one_left_goes(tmp_path):
    save(tmp_path, 1, 1.0)
    (tmp_path / ".earlier-step-00000001").mkdir()  # killed before it was removed
    next_one = checkpoint.write_share(str(tmp_path / ".part-00000002-a"), state(2.0, "a"), 0, 1)
    save(tmp_path, 1, 2.0)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".part-00000002-a", "step-00000001"]
    assert checkpoint.load(str(tmp_path / "step-00000001")).updates == 2
    # Another rank may have begun to write the next one already.
    checkpoint.complete(f"{tmp_path}/.part-00000002-a", f"{tmp_path}/step-00000002", next_one, {"step": 2})
    checkpoint.write_share(str(tmp_path / ".part-00000009-b"), state(9.0, "a"), 0, 1)
    checkpoint.clean_up(str(tmp_path))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000001", "step-00000002"]


@pytest.mark.parametrize("damage", ["flip", "cut", "no manifest", "no part"])
def test_a_damaged_checkpoint_is_skipped_with_its_reason(tmp_path, damage):
    for step in (1, 2):
        save(tmp_path, step, 1.0, world_size=2)
    folder = tmp_path / "step-00000002"
    file = folder / ("manifest.json" if damage == "no manifest" else "model-00002-of-00002.safetensors")
    content = bytearray(file.read_bytes())
    if damage == "flip":
        content[-1] ^= 1
        file.write_bytes(content)
    elif damage == "cut":
        file.write_bytes(content[:-1])
    else:
        file.unlink()
    path, skipped = checkpoint.latest(str(tmp_path))
    assert path.endswith("step-00000001")
    assert "step-00000002" in skipped[0]
    with pytest.raises(UserError, match="no whole checkpoint"):
        checkpoint.require(str(folder))
    command = [sys.executable, "-m", "pipeline.checkpoint", "verify", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 1
    assert done.stdout.count("whole") == 1
    assert "step-00000002" in done.stdout
