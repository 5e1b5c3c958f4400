"""Checkpoints: what is kept, what is recovered, what is refused."""

import contextlib
import errno
import json
import math
import os
import re
import shutil
import subprocess
import sys

import pytest
import torch

from pipeline import checkpoint
from pipeline.checkpoint import CheckpointConfig
from pipeline.engine import EngineConfig, TrainingState
from pipeline.errors import PeerLost, UserError
from pipeline.monitor.jsonl import restore_logs
from pipeline.run_dir import RunDir
from pipeline.runtime import Ranks
from tests.conftest import ROOT, SMALL, data, environment, free_port


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
    checkpoint.Store(str(tmp_path)).clean_up()
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


# Only intact checkpoints count.


def cut(folder):
    """Takes the last byte of a checkpoint's weights."""
    file = folder / "model-00001-of-00001.safetensors"
    file.write_bytes(file.read_bytes()[:-1])


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def impatient(monkeypatch):
    monkeypatch.setattr(checkpoint, "READ_PAUSES_SECONDS", (0.0, 0.0))


@pytest.mark.parametrize(("keep_last", "kept"), [(1, [45]), (2, [40, 45]), (3, [40, 45])])
def test_damaged_checkpoints_do_not_drive_out_intact_ones(tmp_path, capsys, keep_last, kept):
    for step in (40, 50, 60):
        save(tmp_path, step, 1.0, keep_last=9)
    cut(tmp_path / "step-00000050")
    cut(tmp_path / "step-00000060")
    store = checkpoint.Store(str(tmp_path))  # of the next start
    assert store.find_newest() == str(tmp_path / "step-00000040")
    assert "step-00000060 is damaged (model-00001-of-00001.safetensors does not fit" in capsys.readouterr().err
    save(tmp_path, 45, 1.0, store=store, keep_last=keep_last)
    damaged = ["damaged-step-00000050", "damaged-step-00000060"]
    assert names(tmp_path) == damaged + [f"step-{step:08d}" for step in kept]
    listed = subprocess.run(
        [sys.executable, "-m", "pipeline.checkpoint", "ls", tmp_path], capture_output=True, cwd=ROOT
    )
    assert listed.stdout.count(b"set aside") == 2


def test_a_checkpoint_that_is_damaged_while_the_run_goes_on_does_not_count(tmp_path):
    store = checkpoint.Store(str(tmp_path))
    for step in (10, 20):
        save(tmp_path, step, 1.0, store=store, keep_last=2)
    cut(tmp_path / "step-00000020")
    save(tmp_path, 30, 1.0, store=store, keep_last=2)
    assert names(tmp_path) == ["damaged-step-00000020", "step-00000010", "step-00000030"]
    (tmp_path / "step-00000030/state.json").unlink()
    save(tmp_path, 30, 1.0, store=store, keep_last=1)
    save(tmp_path, 20, 1.0, store=store, keep_last=1)  # the one just written stays, whatever else is there
    assert names(tmp_path) == ["damaged-step-00000020", "step-00000020", "step-00000030"]


def test_a_damaged_best_checkpoint_gives_way_to_the_next(tmp_path):
    for step, loss in ((1, 0.1), (2, 0.2), (3, float("nan")), (4, 0.3)):
        save(tmp_path, step, 1.0, evaluation={"val/loss": loss}, keep_last=9)
    cut(tmp_path / "step-00000001")
    save(tmp_path, 5, 1.0, keep_last=1, keep_best="val/loss")
    assert names(tmp_path) == ["damaged-step-00000001", "step-00000002", "step-00000005"]


def fail_to_read(monkeypatch, fails):
    """Reading a file gives EIO where `fails(path)` says so."""
    original = checkpoint._facts

    def facts(path):
        if fails(path):
            raise OSError(errno.EIO, "Input/output error", path)
        return original(path)

    monkeypatch.setattr(checkpoint, "_facts", facts)


def test_an_error_of_the_storage_that_passes_is_waited_for(tmp_path, monkeypatch, impatient):
    for step in (10, 20):
        save(tmp_path, step, 1.0)
    failures = [True, True]
    fail_to_read(monkeypatch, lambda path: bool(failures) and failures.pop())
    assert checkpoint.Store(str(tmp_path)).find_newest() == str(tmp_path / "step-00000020")
    assert names(tmp_path) == ["step-00000010", "step-00000020"]


def test_a_run_that_goes_on_from_an_older_checkpoint_does_not_return_to_an_unreadable_one(
    tmp_path, monkeypatch, impatient, capsys
):
    for step in (10, 20):
        save(tmp_path, step, 1.0)
    fail_to_read(monkeypatch, lambda path: "step-00000020" in path)
    assert checkpoint.Store(str(tmp_path)).find_newest() == str(tmp_path / "step-00000010")
    assert names(tmp_path) == ["step-00000010", "unreadable-step-00000020"]
    assert "step-00000020 is unreadable ([Errno 5] Input/output error" in capsys.readouterr().err


def test_an_unreadable_checkpoint_is_neither_counted_nor_deleted_nor_renamed_while_the_run_goes_on(
    tmp_path, monkeypatch
):
    for step in (10, 20, 30):
        save(tmp_path, step, 1.0, keep_last=9)
    fail_to_read(monkeypatch, lambda path: "step-00000030" in path)
    save(tmp_path, 25, 1.0, keep_last=2)
    assert names(tmp_path) == ["step-00000020", "step-00000025", "step-00000030"]


def test_a_run_without_an_intact_checkpoint_is_refused(tmp_path, monkeypatch, impatient):
    assert checkpoint.Store(str(tmp_path)).find_newest() is None
    (tmp_path / ".part-00000010-a").mkdir()  # killed before its first checkpoint
    assert checkpoint.Store(str(tmp_path)).find_newest() is None
    for step in (10, 20):
        save(tmp_path, step, 1.0)
    cut(tmp_path / "step-00000020")
    with monkeypatch.context() as failing:
        fail_to_read(failing, lambda path: "step-00000010" in path)
        with pytest.raises(
            UserError, match=r"(?s)step-00000010: can't be read: .*Input/output.*damaged-step-00000020: mod"
        ):
            checkpoint.Store(str(tmp_path)).find_newest()
        assert names(tmp_path) == ["damaged-step-00000020", "step-00000010"]
    cut(tmp_path / "step-00000010")
    for _ in range(2):  # the second start finds damaged ones that were set aside
        with pytest.raises(
            UserError, match=r"(?s)no checkpoint is intact.*damaged-step-00000010.*in 8 digits.*start at step 0, move"
        ):
            checkpoint.Store(str(tmp_path)).find_newest()
    save(tmp_path / "copy", 5, 1.0)
    (tmp_path / "copy/step-00000005").rename(tmp_path / "step-00000005")
    assert checkpoint.Store(str(tmp_path)).find_newest() == str(tmp_path / "step-00000005")


def test_a_checkpoint_of_a_later_version_is_not_taken_for_damaged(tmp_path, monkeypatch):
    save(tmp_path, 1, 1.0)
    with monkeypatch.context() as later:
        later.setattr(checkpoint, "FORMAT", 3)
        save(tmp_path, 2, 1.0)
    with pytest.raises(UserError, match=r"format 3, this version reads 2; use the version .* or move this checkpoint"):
        checkpoint.Store(str(tmp_path)).find_newest()
    assert names(tmp_path) == ["step-00000001", "step-00000002"]


def change_manifest(folder, change):
    file = folder / "manifest.json"
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


@pytest.mark.parametrize("older", [False, True])
def test_a_flipped_bit_in_the_format_is_damage(tmp_path, older):
    for step in (1, 2):
        save(tmp_path, step, 1.0)
        if older:  # a manifest without a checksum of itself
            change_manifest(tmp_path / f"step-{step:08d}", lambda manifest: manifest.pop("blake2b", None))
    assert checkpoint.latest(str(tmp_path)) == (str(tmp_path / "step-00000002"), [])
    file = tmp_path / "step-00000002/manifest.json"
    file.write_text(file.read_text().replace('"format": 2', '"format": 3'))
    assert checkpoint.Store(str(tmp_path)).find_newest() == str(tmp_path / "step-00000001")
    assert names(tmp_path) == ["damaged-step-00000002", "step-00000001"]


def test_a_flipped_bit_anywhere_in_a_manifest_is_damage_or_changes_nothing(tmp_path):
    save(tmp_path, 1, 1.0)
    file = tmp_path / "step-00000001/manifest.json"
    content = file.read_bytes()
    for position in range(len(content)):
        flipped = bytearray(content)
        flipped[position] ^= 1 << position % 8
        file.write_bytes(flipped)
        wrong = checkpoint.verify(str(file.parent))
        assert wrong is None or wrong.startswith("damaged: "), wrong


def test_a_copy_under_the_number_of_another_step_does_not_count(tmp_path, capsys):
    for step in (10, 20):
        save(tmp_path, step, 1.0)
    (tmp_path / "step-00000020").rename(tmp_path / "step-00000099")
    assert checkpoint.Store(str(tmp_path)).find_newest() == str(tmp_path / "step-00000010")
    assert "of step 20, the name is of step 99; rename the folder to step-00000020" in capsys.readouterr().err
    assert "rename the folder to step-00000020" in checkpoint.verify(str(tmp_path / "damaged-step-00000099"))
    (tmp_path / "damaged-step-00000099").rename(tmp_path / "step-00000020")
    assert checkpoint.Store(str(tmp_path)).find_newest() == str(tmp_path / "step-00000020")
    (tmp_path / "step-00000020").rename(tmp_path / "the best")
    checkpoint.require(str(tmp_path / "the best"))  # as model.init_from


@pytest.mark.parametrize("wrong", ["final", "earlier", "both", "final can't be read"])
def test_of_two_saves_of_a_step_an_intact_one_stays(tmp_path, wrong, monkeypatch, impatient):
    save(tmp_path, 1, 1.0)
    save(tmp_path, 2, 1.0)
    final, earlier = tmp_path / "step-00000002", tmp_path / ".earlier-step-00000002"
    final.rename(earlier)
    save(tmp_path / "second", 2, 2.0)
    (tmp_path / "second/step-00000002").rename(final)
    (tmp_path / "second").rmdir()
    for folder, name in ((final, "final"), (earlier, "earlier")):
        if wrong in (name, "both"):
            cut(folder)
    if wrong == "final can't be read":
        inode = final.stat().st_ino
        fail_to_read(monkeypatch, lambda path: os.stat(os.path.dirname(path)).st_ino == inode)
    path = checkpoint.Store(str(tmp_path)).find_newest()
    expected = {
        "final": ("step-00000002", 1, ["damaged-step-00000002", "step-00000001", "step-00000002"]),
        "earlier": ("step-00000002", 2, ["step-00000001", "step-00000002"]),
        "both": ("step-00000001", 1, ["damaged-step-00000002", "damaged-step-00000002-1", "step-00000001"]),
        "final can't be read": ("step-00000002", 1, ["step-00000001", "step-00000002", "unreadable-step-00000002"]),
    }
    assert (os.path.basename(path), checkpoint.load(path).updates, names(tmp_path)) == expected[wrong]


def test_checkpoints_are_in_order_of_their_numbers(tmp_path):
    for step in (99_999_999, 100_000_000):
        save(tmp_path, step, 1.0)
    assert checkpoint.latest(str(tmp_path))[0].endswith("step-100000000")


class Killed(BaseException):
    pass


@pytest.mark.parametrize("renames", [0, 1, 2])
def test_a_kill_during_the_second_save_of_a_step_leaves_one_of_the_two(tmp_path, monkeypatch, renames):
    save(tmp_path, 1, 1.0)
    rename, left = os.rename, [renames]

    def killed(*words):
        if not left[0]:
            raise Killed
        left[0] -= 1
        rename(*words)

    with monkeypatch.context() as killing:
        killing.setattr(os, "rename", killed)
        if renames < 2:
            with pytest.raises(Killed):
                save(tmp_path, 1, 2.0)
        else:
            save(tmp_path, 1, 2.0)
    path = checkpoint.Store(str(tmp_path)).find_newest()
    assert checkpoint.load(path).updates == (2 if renames == 2 else 1)
    assert names(tmp_path) == ["step-00000001"]


def test_a_kill_while_a_checkpoint_is_deleted_leaves_no_damaged_one(tmp_path, monkeypatch):
    save(tmp_path, 1, 1.0)

    def killed(path, **options):
        if os.path.exists(path):
            os.remove(os.path.join(path, "state.json"))
            raise Killed

    with monkeypatch.context() as killing:
        killing.setattr(shutil, "rmtree", killed)
        with pytest.raises(Killed):
            checkpoint.Store(str(tmp_path)).discard_after(0)
    assert checkpoint.Store(str(tmp_path)).find_newest() is None
    assert names(tmp_path) == []


def test_everything_is_synced_before_it_gets_its_name(tmp_path, monkeypatch):
    done = []

    def recorded(module, name, show):
        original = getattr(module, name)

        def call(*words):
            done.append((name, *(os.path.basename(show(word)) for word in words)))
            return original(*words)

        monkeypatch.setattr(module, name, call)

    recorded(os, "fsync", lambda handle: os.readlink(f"/proc/self/fd/{handle}"))
    recorded(os, "rename", str)
    recorded(os, "replace", str)
    save(tmp_path, 1, 1.0)
    (rename,) = (number for number, entry in enumerate(done) if entry[0] == "rename")
    assert done[rename] == ("rename", ".part-00000001", "step-00000001")
    synced = [entry[1] for entry in done[:rename] if entry[0] == "fsync"]
    assert {"model-00001-of-00001.safetensors", "optimizer-00001-of-00001.safetensors"} <= set(synced)
    assert synced[-1] == ".part-00000001", "the folder with all names in it"
    assert done[rename + 1] == ("fsync", tmp_path.name)
    done.clear()
    (tmp_path / "metrics.jsonl").write_text("")
    RunDir(str(tmp_path)).write("exit.json", {"status": "finished"})
    restore_logs(str(tmp_path), {}, 3)
    for name, written in (("exit.json", done[:3]), ("metrics.jsonl", done[3:])):
        (_, partial), replaced, folder = written
        assert replaced == ("replace", partial, name)
        assert folder == ("fsync", tmp_path.name)


def test_a_write_that_fails_leaves_the_old_file_alone(tmp_path, monkeypatch):
    run_dir = RunDir(str(tmp_path))
    run_dir.write("classes.json", {"a": 1})

    def full(handle):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        run_dir.write("classes.json", {"a": 2})
    assert run_dir.read("classes.json") == {"a": 1}
    assert names(tmp_path) == ["classes.json"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("identity.json", "[]", r"found \[\], expected an object; restore it"),
        ("identity.json", "null", r"found null, expected an object"),
        ("identity.json", None, r"is a folder, expected a file; restore it"),
        ("skipped.json", '{"first": 3}', r'found \{"first": 3\}, expected a list of \{"first": <step>'),
        ("skipped.json", '[{"first": 3}]', r"found .*, expected a list of"),
        ("skipped.json", '[{"first": 3, "last": "4"}]', r"found .*, expected a list of"),
        ("exit.json", None, r"is a folder, expected a file; move it away"),
        ("STOP", None, r"is a folder, expected a file; move it away"),
    ],
)
def test_a_file_of_the_wrong_kind_in_a_run_directory_is_refused(tmp_path, name, content, message):
    if content is None:
        (tmp_path / name).mkdir()
    else:
        (tmp_path / name).write_text(content)
    run_dir = RunDir(str(tmp_path))

    def begin():
        run_dir.open({"a": 1})
        run_dir.read("skipped.json")

    with contextlib.closing(run_dir), pytest.raises(UserError, match=f"{re.escape(str(tmp_path / name))}: {message}"):
        begin()


def test_the_end_of_a_run_is_told_whatever_its_manifest_is(tmp_path):
    (tmp_path / "manifest.json").write_text("[]")
    run_dir = RunDir(str(tmp_path))
    run_dir.open({})
    run_dir.end("failed", 3, "a reason")
    run_dir.close()
    assert run_dir.read("exit.json")["step"] == 3


def listed(command, folder):
    words = [sys.executable, "-m", "pipeline.checkpoint", command, str(folder)]
    done = subprocess.run(words, capture_output=True, text=True, cwd=ROOT)
    return done.returncode, done.stdout, done.stderr


def test_what_is_no_checkpoint_is_listed_as_damaged(tmp_path):
    (tmp_path / "damaged-step-00000005").write_text("a file")
    save(tmp_path, 6, 1.0)
    (tmp_path / "step-00000006/broken").symlink_to("nothing")
    assert listed("ls", tmp_path)[::2] == (0, "")
    code, output, errors = listed("verify", tmp_path)
    assert (code, errors) == (1, "")
    assert re.search(r"damaged-step-00000005 .* MiB  set aside, damaged: it is a file, not a folder", output)
    code, output, errors = listed("ls", tmp_path / "damaged-step-00000005")
    assert (code, output) == (2, "")
    assert errors.endswith("damaged-step-00000005: Not a directory; name a run directory\n")


def test_slurm_counts_checkpoints_that_are_not_set_aside(tmp_path):
    script = (ROOT / "launch/pretrain.slurm").read_text()
    function = script[script.index("newest_step()") : script.index("give_up()")]
    command = ["bash", "-euc", f"run_dir={tmp_path}\n{function}\nnewest_step"]
    assert subprocess.check_output(command) == b"0\n"
    for name in ("step-00000008", "step-00000040", "damaged-step-00000060", "step-00000070-copy", "step-x", "step-100"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    assert subprocess.check_output(command) == b"40\n"


LOAD = """
import sys, torch
from pipeline import checkpoint
from pipeline.engine import load_weights
def peak():
    return {line.split(":")[0]: int(line.split()[1]) for line in open("/proc/self/status") if "kB" in line}["VmHWM"]
model = torch.nn.Sequential(*(torch.nn.Linear(1024, 1024, bias=False) for _ in range(24)))
moments = [torch.zeros(1024, 1024) for _ in model]
state = checkpoint.load(sys.argv[1])
state.weights["0.weight"].sum()
open("/proc/self/clear_refs", "w").write("5")  # forgets the peak
before = peak()
load_weights(model, state.weights)
for name, moment in zip(state.weights, moments):
    moment.copy_(state.moments["exp_avg"][name])
print(peak() - before)
"""


def test_a_checkpoint_is_loaded_one_tensor_at_a_time(tmp_path):
    weights = {f"{number}.weight": torch.full((1024, 1024), float(number)) for number in range(24)}
    kept = TrainingState(weights, {"exp_avg": weights}, updates=1)
    files = checkpoint.write_share(f"{tmp_path}/.part", kept, 0, 1)
    checkpoint.complete(f"{tmp_path}/.part", f"{tmp_path}/step-00000001", files, {"step": 1, "updates": 1})
    command = [sys.executable, "-c", LOAD, str(tmp_path / "step-00000001")]
    grown = int(subprocess.check_output(command, cwd=ROOT))
    assert grown < 4 * 4096, f"{grown} KiB for tensors of 4096 KiB, 192 MiB in all"


# The saver, and what its ranks do when they lose each other.


class OneRank:
    """What a saver needs of an engine. `group` fails while `broken`."""

    def __init__(self, world_size=1):
        self.ranks = Ranks(0, world_size, 0, world_size)
        self.config = EngineConfig(timeout_seconds=7)
        self.value, self.broken = 1.0, False

    def state(self, memory):
        return state(self.value, "a")

    def whole(self, kept, group):
        return kept

    def gather_objects(self, value, group=None):
        if group is not None and self.broken:
            raise RuntimeError("Timed out waiting 7000ms for recv operation to complete")
        return [value]


class LeaseOf:
    """The lease of a start."""

    def __init__(self, number):
        self.path = f"/run/.run.lease-{number:08d}"

    def check(self):
        pass


@pytest.fixture
def groups(monkeypatch):
    """The process groups that were made, and destroyed."""
    made, gone = [], []

    def new_group(backend, timeout):
        assert (backend, timeout.total_seconds()) == ("gloo", 7)
        made.append(f"group {len(made)}")
        return made[-1]

    monkeypatch.setattr(torch.distributed, "new_group", new_group)
    monkeypatch.setattr(torch.distributed, "destroy_process_group", gone.append)
    return made, gone


def saver_of(folder, engine, **options):
    folder.mkdir(exist_ok=True)
    return checkpoint.Saver(CheckpointConfig(**options), checkpoint.Store(str(folder)), engine, {}, LeaseOf(7))


def test_the_group_of_the_savers_is_made_anew_once_it_has_failed(tmp_path, groups, capsys):
    made, gone = groups
    engine = OneRank(world_size=2)
    saver = saver_of(tmp_path, engine)
    engine.broken = True
    saver.save(10, {})
    assert saver.settle()
    assert (made, gone) == (["group 0", "group 1"], ["group 0"])
    assert "can't write the checkpoint: rank 0: Timed out" in capsys.readouterr().err
    engine.broken = False
    assert not saver.needs_all_ranks()
    saver.save(11, {})
    assert not saver.settle()
    saver.finish()
    assert names(tmp_path) == ["step-00000011"]
    engine.broken = True  # once more, later
    saver.save(20, {})
    assert saver.settle()
    saver.save(20, {})
    with pytest.raises(PeerLost, match=r"twice in a row.*start again to resume"):
        saver.settle()


def test_a_disk_that_fails_leaves_the_group_as_it_is(tmp_path, groups, monkeypatch):
    saver = saver_of(tmp_path, OneRank(world_size=2))
    with monkeypatch.context() as failing:
        fail_to_read(failing, lambda path: True)
        saver.save(10, {})
        assert not saver.settle()
    with pytest.raises(UserError, match="free some space"):
        saver.finish()
    assert not saver.needs_all_ranks()


@pytest.mark.parametrize("kind", ["weight", "exp_avg_sq", "ema"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_state_that_is_not_finite_is_not_saved_and_ends_the_run(tmp_path, kind, value):
    engine = OneRank()
    saver = saver_of(tmp_path, engine, keep_last=1)
    saver.save(10, {})
    assert not saver.settle()
    bad = state(1.0, "a")
    bad.moments["ema"] = {"a": torch.ones(3, 2)}
    (bad.weights if kind == "weight" else bad.moments[kind])["a"][2, 1] = value
    engine.state = lambda memory: bad
    saver.save(20, {})
    saver.wait()
    assert saver.needs_all_ranks()
    with pytest.raises(UserError, match=rf"step 20: {kind} a is not finite on rank 0; no .*engine\.grad_clip"):
        saver.settle()
    assert names(tmp_path) == ["step-00000010"]


def test_a_rank_of_an_earlier_start_does_not_write_into_a_checkpoint(tmp_path, monkeypatch):
    saver = saver_of(tmp_path, OneRank())
    written = []
    original = checkpoint.complete

    def complete(partial, final, files, facts):
        monkeypatch.setattr(checkpoint, "complete", original)
        earlier = OneRank()
        earlier.broken, earlier.value = True, 2.0
        stale = checkpoint.Saver(CheckpointConfig(), saver.store, earlier, {}, LeaseOf(6))
        stale.group = "a group whose rank 0 is gone"
        stale.save(10, {})
        stale.wait()
        assert stale.failure is not None
        written.append(os.path.basename(partial))
        original(partial, final, files, facts)

    monkeypatch.setattr(checkpoint, "complete", complete)
    saver.save(10, {})
    saver.finish()
    assert written == [".part-00000010-00000007"]
    assert checkpoint.verify(str(tmp_path / "step-00000010")) is None
    assert checkpoint.load(str(tmp_path / "step-00000010")).weights["a"][0, 0] == 1


def test_the_best_of_an_earlier_start_is_remembered(tmp_path):
    for step, top1 in ((1, 0.5), (2, 0.7)):
        save(tmp_path, step, 1.0, evaluation={"val/top1": top1, "val/loss": 0.8 - top1})
    saver = saver_of(tmp_path, OneRank(), keep_best="val/top1")
    assert [saver.is_best({"val/top1": top1}) for top1 in (0.6, 0.7, 0.71, math.nan)] == [False, False, True, False]
    saver = saver_of(tmp_path, OneRank(), keep_best="val/loss")
    assert [saver.is_best({"val/loss": loss}) for loss in (0.4, 0.11, 0.09, float("nan"))] == [
        False,
        False,
        True,
        False,
    ]
    assert not saver_of(tmp_path, OneRank()).is_best({"val/top1": 1.0})
    assert "no such metric; set one of val/top1, val/x," in saver.lacks_metric({"val/x": 1.0, "val/top1": 1.0})


@pytest.mark.timeout(120)
def test_two_processes_that_lost_each_other_write_the_next_checkpoint(tmp_path):
    """On real gloo: rank 1 comes too late to the first checkpoint."""
    environ = environment({"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "2"})
    command = [sys.executable, str(ROOT / "tests/pipeline/late_saver.py"), str(tmp_path)]
    processes = [
        subprocess.Popen([*command, str(rank)], cwd=ROOT, env={**environ, "RANK": str(rank)}, text=True,
                         stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        for rank in range(2)
    ]  # fmt: skip
    said = [process.communicate(timeout=100)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], "\n".join(said)
    assert "can't write the checkpoint: rank 0: " in said[0]
    assert "saved step 5 after a new group" in said[0]
    assert all("step 7: weight b is not finite on rank 1" in text for text in said)
    assert names(tmp_path) == [".run.lease-00000001", "step-00000005"]
    assert set(checkpoint.load(str(tmp_path / "step-00000005")).weights) == {"a", "b"}


# Whole runs.

# The training command with evaluations that come out as told: {step: top1, or None where a stop breaks it off once}.
SCORED = """
import json, sys
from pipeline import checkpoint, session, trainer
scores = {int(step): score for step, score in json.loads(sys.argv[1]).items()}
def evaluated(self, step, model, name):
    score = scores[step]
    if score is None:
        raise trainer.BrokenOff
    return {"val/top1": score, "val/count": float(self.val_samples)}
trainer.Trainer._evaluated = evaluated
checkpoint.READ_PAUSES_SECONDS = ()
sys.exit(session.main(sys.argv[2:]))
"""


def train_scored(scores, *words):
    command = [sys.executable, "-c", SCORED, json.dumps(scores), *SMALL, *words]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment({}), timeout=100)
    return done.returncode, done.stdout + done.stderr


def test_the_best_checkpoint_is_the_one_that_was_evaluated(digits, tmp_path):
    """The issue's case in small, then an evaluation that no checkpoint was due for, a stop in one, and a resume."""
    words = [*data(digits), f"run.dir={tmp_path}", "run.evaluate_every_steps=4", "checkpoint.every_steps=2"]
    words += ["checkpoint.keep_last=1", "checkpoint.keep_best=val/top1"]
    code, output = train_scored({4: 0.5, 8: 0.9, 12: 0.8}, *words, "run.steps=12")
    assert code == 0, output
    assert names(tmp_path / "checkpoints") == ["step-00000008", "step-00000012"]
    words.append("checkpoint.every_steps=100")
    code, output = train_scored({16: 0.9, 20: 0.91, 24: None}, *words, "run.steps=26")
    assert code == 0, output
    assert names(tmp_path / "checkpoints") == ["step-00000020", "step-00000024"]
    code, output = train_scored({24: 0.92, 26: 0.1}, *words, "run.steps=26")
    assert code == 0, output
    assert names(tmp_path / "checkpoints") == ["step-00000024", "step-00000026"]
    assert checkpoint.load_state(str(tmp_path / "checkpoints/step-00000024"))["evaluation"]["val/top1"] == 0.92
    code, output = train_scored({28: 0.1}, *words[:-2], "checkpoint.keep_best=val/top", "run.steps=28")
    assert code == 2
    assert "checkpoint.keep_best=val/top: no such metric; set one of val/count, val/top1" in output


def test_a_run_whose_checkpoints_are_damaged_is_refused_and_keeps_its_logs(digits, tmp_path):
    words = [*data(digits), f"run.dir={tmp_path}", "checkpoint.every_steps=2", "run.steps=4", "data.log_samples=true"]
    code, output = train_scored({4: 0.5}, *words)
    assert code == 0, output
    logs = {path.name: path.read_bytes() for path in tmp_path.glob("*.jsonl")}
    assert len(logs) >= 2
    good = tmp_path / "checkpoints/step-00000002"
    shutil.copytree(good, tmp_path / "copy")
    (good / "state.json").unlink()
    (good / "state.json").symlink_to("state.json")  # ELOOP: the storage fails
    cut(tmp_path / "checkpoints/step-00000004")
    words[4] = "run.steps=6"
    for message in ("step-00000002: can't be read: [Errno", "damaged-step-00000004: set aside by an earlier start"):
        code, output = train_scored({6: 0.5}, *words)
        assert code == 2, output
        assert message in output
        assert "Traceback" not in output
        assert json.loads((tmp_path / "exit.json").read_text())["status"] == "failed"
        assert {path.name: path.read_bytes() for path in tmp_path.glob("*.jsonl")} == logs
    shutil.rmtree(good)
    (tmp_path / "copy").rename(good)
    code, output = train_scored({6: 0.5}, *words)
    assert code == 0, output
    assert f"resuming from {good}" in output


def test_weights_that_are_not_finite_end_the_run_and_older_checkpoints_stay(digits, tmp_path):
    spoiled = (
        "import sys; from pipeline import session, trainer\n"
        "train_step = trainer.Trainer.step\n"
        "def step(self, number, batch, valid_rows):\n"
        "    found = train_step(self, number, batch, valid_rows)\n"
        "    if number == 5: self.engine.module.head.weight.data[0, 0] = float('inf')\n"
        "    return found\n"
        "trainer.Trainer.step = step\n"
        "sys.exit(session.main(sys.argv[1:]))"
    )
    words = [*SMALL, *data(digits), f"run.dir={tmp_path}", "checkpoint.every_steps=2", "run.steps=500"]
    done = subprocess.run(
        [sys.executable, "-c", spoiled, *words, "checkpoint.keep_last=1"],
        capture_output=True, text=True, cwd=ROOT, env=environment({}), timeout=100,
    )  # fmt: skip
    assert done.returncode == 2, done.stdout + done.stderr
    assert re.search(r"error: step (6|8): weight head\.weight is not finite on rank 0; no checkpoint", done.stderr)
    assert names(tmp_path / "checkpoints") == ["step-00000004"]
    assert json.loads((tmp_path / "exit.json").read_text())["step"] < 100
