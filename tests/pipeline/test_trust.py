"""What others made runs nothing: their checkpoints, configs, caches and links each carry a harmless attack.

Each attack would leave a marker file, or change a file of the user's.
"""

import os
import pickle
import socket
import stat
import subprocess
import sys

import pytest
import yaml

from pipeline import caches, checkpoint, checks, lease
from pipeline import evaluate as evaluating
from pipeline import export as exporting
from pipeline.build import build_model
from pipeline.config import ALLOW_PIPE_VARIABLE, load_config, load_data_config, to_tree
from pipeline.data.index import expand_urls, write_file, write_index
from pipeline.data.source import ReadConfig
from pipeline.engine import TrainingState
from pipeline.errors import UserError
from pipeline.monitor.jsonl import Lines, restore_logs
from pipeline.monitor.tensorboard import TensorBoard
from pipeline.report import dry_run
from pipeline.run_dir import RunDir, create_folder
from pipeline.runtime import Ranks
from pipeline.shards import main as shards
from pipeline.weights import fit_weights
from tests.conftest import ROOT, data, train

DIGITS = str(ROOT / "configs/digits.yaml")
ROOT_ONLY = pytest.mark.skipif(os.geteuid() != 0, reason="giving files to another user needs root")


@pytest.fixture
def marker(tmp_path):
    return tmp_path / "MARKER"


@pytest.fixture
def trap(digits, tmp_path, marker):
    """A `pipe:` command that leaves the marker, with its index: in every other way a good shard."""
    url = f"pipe:touch {marker}; cat {digits}/val-000.tar"
    write_index([url], folder=str(tmp_path / "index"), limits=ReadConfig(allow_pipe=True))
    marker.unlink()
    return url


def write_checkpoint(run, **changes):
    """A run with a checkpoint of the default model, whose state.json says what its author likes."""
    config = load_config(DIGITS)
    weights = {name: p.detach() for name, p in build_model(config.model, config.engine, 0).named_parameters()}
    partial, final = f"{run}/checkpoints/.part", f"{run}/checkpoints/step-00000005"
    files = checkpoint.write_share(partial, TrainingState(weights, {}, 5), 0, 1)
    facts = {"config": to_tree(config), "classes": [str(n) for n in range(10)], **changes}
    checkpoint.complete(partial, final, files, {"step": 5, "updates": 5, "evaluation": {}, **facts})
    return final


@pytest.fixture
def stranger(trap, tmp_path):
    """A stranger's run: its checkpoint and its config.yaml name the command as their data, and allow it."""
    tree = to_tree(load_config(DIGITS))
    tree["data"] |= {"train": [trap], "val": [trap], "index": str(tmp_path / "index")}
    tree["data"]["read"]["allow_pipe"] = True
    run = tmp_path / "stranger"
    write_checkpoint(run, config=tree)
    (run / "config.yaml").write_text(yaml.safe_dump(tree))
    return run


def test_a_strangers_checkpoint_says_nothing_of_what_is_read(stranger, marker, digits, tmp_path, capsys):
    assert evaluating.main([str(stranger)]) == 2
    message = capsys.readouterr().err
    assert "name the shards to evaluate on, by --data URL or by --config FILE; if you have trained this run" in message
    assert evaluating.main([str(stranger), "--config", str(stranger / "config.yaml")]) == 2
    assert "a config file can't allow itself to run shell commands" in capsys.readouterr().err
    assert evaluating.main([str(stranger), "--data", f"{digits}/val-{{000..001}}.tar", "--workers", "0"]) == 0
    assert "val/count 360" in capsys.readouterr().out
    assert exporting.main([str(stranger), "--layout", "native", "--out", str(tmp_path / "vit.safetensors")]) == 0
    config = load_config(DIGITS, ["run.seed=1"])
    fork = build_model(config.model, config.engine, 1)
    fork.load_state_dict(fit_weights(fork, str(stranger), new_head=False))
    assert not marker.exists()


def test_the_user_can_still_evaluate_on_a_command(stranger, trap, marker, tmp_path, capsys):
    words = ["--data", trap, "--set", f"data.index={tmp_path / 'index'}", "data.read.allow_pipe=true"]
    assert evaluating.main([str(stranger), *words, "--workers", "0"]) == 0, capsys.readouterr().err
    assert marker.exists()


def test_an_audit_of_a_strangers_run_reads_the_users_config(stranger, marker, digits, monkeypatch, capsys):
    (stranger / "samples-rank0.jsonl").write_text("")
    words = ["audit", "--config", DIGITS, "--steps", "2", "--run", str(stranger), "--set", *data(digits)]
    monkeypatch.setattr(sys, "argv", ["shards", *words])
    assert shards() == 1
    assert "as the run has logged" in capsys.readouterr().out
    assert not marker.exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"config": None}, "config: found None"),
        ({"config": {"augment": {"val": ["os.system"]}}}, "augment.val[0].name: unknown 'os.system'; known are"),
        ({"config": {"objective": {"name": "..monitor.sink"}}}, "objective.name: unknown '..monitor.sink'"),
        ({"classes": {"a": 1}}, "classes: found {'a': 1}"),
        ({"config": {"model": {"depth": 9000}}}, "model.depth=9000, but "),
        ({"config": {"model": {"width": 10**7, "heads": 7, "depth": 4}}}, "heads: 7 does not divide width 10000000"),
        ({"config": {"model": {"width": 10**5, "heads": 1, "depth": 4}}}, "the checkpoint is of another model"),
    ],
)
def test_a_state_that_lies_is_one_clear_line(tmp_path, capsys, changes, message):
    path = write_checkpoint(tmp_path / "run", **changes)
    assert exporting.main([path, "--layout", "native", "--out", str(tmp_path / "vit.safetensors")]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("name", ["../../profile", "/etc/profile", "config.yaml", "samples-rank0.jsonl/../../x"])
def test_a_checkpoint_cannot_name_any_file_as_a_log_of_the_run(tmp_path, name):
    """It would be written with the text that the checkpoint has for it."""
    run = tmp_path / "runs/mine"
    run.mkdir(parents=True)
    victim = tmp_path / "profile"
    victim.write_text("mine\n")
    state = {"nbytes": 0, "blake2b": Lines("").digest.hexdigest(), "pending": "touch MARKER\n"}
    with pytest.raises(UserError, match=r"as a log; name another run.dir"):
        restore_logs(str(run), {name: state}, 5)
    assert victim.read_text() == "mine\n"
    assert os.listdir(run) == []


def config_with_pipe(folder, trap):
    tree = {**yaml.safe_load((ROOT / "configs/digits.yaml").read_text()), "run": {"steps": 1}}
    tree["data"] = {"train": trap, "val": trap, "index": f"{folder}/index", "read": {"allow_pipe": True}, "workers": 0}
    (folder / "config.yaml").write_text(yaml.safe_dump(tree))
    return str(folder / "config.yaml")


def test_a_config_file_cannot_allow_its_own_commands(trap, marker, tmp_path, monkeypatch):
    path = config_with_pipe(tmp_path, trap)
    for read in (load_config, load_data_config):
        with pytest.raises(UserError, match=r"add data.read.allow_pipe=true to the command line"):
            read(path)
    assert load_config(path, ["data.read.allow_pipe=true"]).data.read.allow_pipe
    assert load_config(path, ["data.read={allow_pipe: true}"]).data.read.allow_pipe
    assert not load_config(path, ["data.read.allow_pipe=false"]).data.read.allow_pipe
    monkeypatch.setenv(ALLOW_PIPE_VARIABLE, "1")
    assert load_config(path).data.read.allow_pipe
    assert load_config(DIGITS).data.read.allow_pipe
    assert not load_config(path, ["data.read.allow_pipe=false"]).data.read.allow_pipe
    assert not marker.exists()


@pytest.mark.parametrize("url", ["reference://x.tar", "simplecache::reference::http://h/r.json", "reference::r.json"])
def test_a_config_cannot_name_a_file_of_templates(url):
    for option in ("data.train", "data.index"):
        with pytest.raises(UserError, match="reference file systems are not read"):
            load_config(DIGITS, [f"{option}={url}"])


@pytest.mark.parametrize("url", ["{reference,reference}://x.tar", "ref{e..e}rence::r.json"])
def test_braces_hide_no_file_of_templates(url):
    config = load_config(DIGITS, [f"data.train={[url]}"])
    with pytest.raises(UserError, match="reference file systems are not read"):
        expand_urls(config.data.train)


def test_only_training_runs_a_command(trap, marker, tmp_path, capsys):
    """Not the dry run, not a preflight, even where the user allows commands."""
    words = [config_with_pipe(tmp_path, trap), f"run.dir={tmp_path / 'run'}", "data.read.allow_pipe=true"]
    config, alone = load_config(words[0], words[1:]), Ranks(0, 1, 0, 1)
    assert dry_run(config, alone) == 0
    look = {"rank": 0, "host": "here", "shards": checks.look_at_shards(config, alone, 5.0)}
    [finding] = checks.check_shards([look])
    assert finding.fine
    assert finding.text == "not read: they are pipe: commands, which a check does not run"
    assert not marker.exists()
    for steps in (1, 2):  # a start, and a resume
        code, output = train("--config", *words, f"run.steps={steps}")
        assert code == 0, output
    assert "resuming from" in output
    assert marker.exists()


# Caches of compiled code.


@pytest.fixture
def home(tmp_path, monkeypatch):
    for name in (caches.INDUCTOR, caches.TRITON, caches.EXTENSIONS, "XDG_CACHE_HOME"):
        monkeypatch.setenv(name, "")  # restored to what it was, whatever the test sets
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def mode(path):
    return stat.S_IMODE(os.stat(path).st_mode)


def test_compiled_code_lies_in_private_folders(home):
    caches.use_private_caches(compiles=True)
    assert os.environ[caches.INDUCTOR] == str(home / ".cache/vit-pretrain/inductor")
    assert os.environ[caches.TRITON] == str(home / ".cache/vit-pretrain/triton")
    for path in (home / ".cache/vit-pretrain", os.environ[caches.INDUCTOR], os.environ[caches.TRITON]):
        assert mode(path) == 0o700
    caches.use_private_caches(compiles=True)


def test_without_a_home_no_cache_lies_in_the_working_directory(home, monkeypatch):
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)  # as for a uid without an entry in passwd
    monkeypatch.setattr(caches, "_prepare", lambda folder: None)
    caches.use_private_caches(compiles=True)
    assert os.path.isabs(os.environ[caches.INDUCTOR])


def planted_link(folder):
    (folder.parent / "elsewhere").mkdir()
    folder.symlink_to(folder.parent / "elsewhere")


def planted_by_another(folder):
    folder.mkdir()
    os.chown(folder, 12345, 12345)


def planted_open(folder):
    folder.mkdir()
    folder.chmod(0o770)


def planted_below_open(folder):
    folder.mkdir()
    folder.parent.parent.chmod(0o777)


@pytest.mark.parametrize(
    ("plant", "message"),
    [
        (planted_link, "is a link"),
        pytest.param(planted_by_another, r"belongs to another user \(uid 12345\)", marks=ROOT_ONLY),
        (planted_open, r"can be written by other users \(mode 770, expected 700\)"),
        (planted_below_open, "can be replaced by other users, who can write to"),
    ],
)
@pytest.mark.parametrize("chosen", [True, False])
def test_a_cache_that_others_can_write_to_is_refused(home, monkeypatch, capsys, plant, message, chosen):
    root = home / ".cache/vit-pretrain"
    root.mkdir(parents=True, mode=0o700)
    plant(root / "inductor")
    if chosen:
        monkeypatch.setenv(caches.INDUCTOR, str(root / "inductor"))
    with pytest.raises(UserError, match=message):
        caches.use_private_caches(compiles=True)
    caches.use_private_caches(compiles=False)  # a run that compiles nothing goes on, and does not touch it
    used = os.environ[caches.INDUCTOR]
    assert used != str(root / "inductor")
    assert mode(used) == mode(os.path.dirname(used)) == 0o700


def test_without_a_home_there_is_a_folder_for_this_process(home, monkeypatch):
    monkeypatch.setenv("HOME", "/proc/no-home")  # nobody can create anything there, not even root
    caches.use_private_caches(compiles=True)
    for name in (caches.INDUCTOR, caches.TRITON, caches.EXTENSIONS):
        assert caches.find_intruder(os.environ[name]) is None


class Attack:
    """Its pickle leaves the marker, and ends the process that loads it."""

    def __init__(self, marker):
        self.marker = str(marker)

    def __reduce__(self):
        return exec, (f"import os; open({self.marker!r}, 'w').close(); os._exit(0)",)


@ROOT_ONLY
@pytest.mark.integration
def test_torch_runs_what_is_in_a_cache_so_a_planted_one_is_refused(home, monkeypatch, marker, tmp_path):
    folder = tmp_path / "torchinductor"
    monkeypatch.setenv(caches.INDUCTOR, str(folder))
    monkeypatch.setenv("TORCHINDUCTOR_COMPILE_THREADS", "1")
    program = "import torch; print(torch.compile(torch.sin)(torch.ones(3)).sum())"
    subprocess.run([sys.executable, "-c", program], check=True)
    pickled = [path for path in folder.rglob("*") if path.is_file() and {"fxgraph", "aotautograd"} & set(path.parts)]
    for path in pickled:
        path.write_bytes(pickle.dumps(Attack(marker)))
    subprocess.run([sys.executable, "-c", program], check=True)
    assert marker.exists()
    os.chown(folder, 12345, 12345)
    with pytest.raises(UserError, match=r"belongs to another user \(uid 12345\), and code is loaded from there"):
        caches.use_private_caches(compiles=True)


# Links that somebody has planted where a file will be written.


@pytest.fixture
def victim(tmp_path):
    path = tmp_path / "victim"
    path.write_text("mine")
    return path


def test_no_temporary_file_is_written_through_a_link(victim, tmp_path):
    """The names that were predictable: of leases, indexes, probes and preflights."""
    folder, process = tmp_path / "shared", f"{socket.gethostname()}.{os.getpid()}"
    (folder / "tensorboard").mkdir(parents=True)
    (folder / ".run.lease-00000001").write_text("{}")
    names = [f".run.lease-00000002.{process}", f".run.time.{process}", "index.json.part", "tensorboard/.probe"]
    for name in names:
        (folder / name).symlink_to(victim)
    os.utime(folder / ".run.lease-00000001", (0, 0))
    with lease.acquire(str(folder), "run", "x"):
        write_file(f"{folder}/index.json", b"{}")
    TensorBoard(str(folder / "tensorboard"), 0).close()
    assert victim.read_text() == "mine"
    assert all((folder / name).is_symlink() for name in names)


def test_leases_and_logs_that_are_links_are_not_followed(victim, tmp_path, capsys):
    (tmp_path / "shared").mkdir()
    absent = tmp_path / "absent"
    held = lease.acquire(str(tmp_path / "shared"), "run", "x")
    os.remove(held.path)
    os.symlink(victim, held.path)
    held.release()
    assert victim.read_text() == "mine"
    (tmp_path / "metrics.jsonl").symlink_to(absent)
    lines = Lines(str(tmp_path / "metrics.jsonl"))
    lines.write({"step": 1})
    lines.flush()
    assert not absent.exists()
    assert "Too many levels of symbolic links" in capsys.readouterr().err


def test_a_lease_that_is_a_pipe_or_nothing_but_brackets_stops_nobody(tmp_path, monkeypatch):
    monkeypatch.setattr(lease, "EXPIRES_SECONDS", 0.2)
    os.mkfifo(tmp_path / ".run.lease-00000001")
    with lease.acquire(str(tmp_path), "run", "x") as held:
        assert held.path.endswith("2")
    (tmp_path / ".run.lease-00000003").write_text("[" * 60_000)
    with lease.acquire(str(tmp_path), "run", "x") as held:
        assert held.path.endswith("4")


# The run directory.


@pytest.mark.parametrize(("words", "expected"), [([], 0o700), (["run.mode=750"], 0o750), (["run.mode=2770"], 0o2770)])
def test_a_run_directory_is_private_unless_the_user_opens_it(tmp_path, words, expected):
    path = tmp_path / "runs/new"
    config = load_config(DIGITS, [f"run.dir={path}", *words])

    def start():
        run = RunDir(config.run.dir, config.run.directory_mode)
        run.open({})
        run.close()

    before = os.umask(0o077)
    try:
        start()
    finally:
        os.umask(before)
    assert mode(path) == expected
    path.chmod(0o755)  # by its owner, later
    start()
    assert mode(path) == 0o755


def test_a_run_directory_keeps_the_group_of_its_project(tmp_path):
    tmp_path.chmod(0o2775)
    create_folder(str(tmp_path / "new"), 0o750)
    assert mode(tmp_path / "new") == 0o2750


def test_a_folder_that_a_launcher_has_made_becomes_private_and_no_other(tmp_path):
    for name, file, expected in (("of a launcher", "logs", 0o700), ("of the user", "thesis.tex", 0o755)):
        (tmp_path / name / file).mkdir(parents=True)
        (tmp_path / name).chmod(0o755)
        run = RunDir(str(tmp_path / name))
        run.open({})
        run.close()
        assert mode(tmp_path / name) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("0750", "run.mode: expected text, found 488; put the text in quotes"),
        ("700", "run.mode: expected text, found 700; put the text in quotes"),
        ("'777'", "none to write for everybody, found '777'"),
        ("'500'", "with all rights for you"),
        ("rwx", "expected three octal digits"),
    ],
)
def test_a_mode_that_yaml_reads_as_another_number_is_refused(tmp_path, text, message):
    (tmp_path / "config.yaml").write_text(f"run: {{steps: 1, mode: {text}}}\n")
    with pytest.raises(UserError) as refused:
        load_config(str(tmp_path / "config.yaml"))
    assert message in str(refused.value)
