"""The scripts in launch/ with hostile folder names, file contents and variables. The attack would make a file `marker`.

Stubs on PATH stand for Slurm, ssh and the trainer: a real cluster takes seconds for each case (tests/cluster has one).
"""

import os
import shutil
import subprocess
import sys

import pytest

from tests.conftest import ROOT, train

ATTACK = "BASH_VERSINFO[$(>marker)0]"  # arithmetic runs the command; `set -u` wants the name of a variable there

STUBS = {
    "scontrol": """
case "$*" in
"show hostnames"*) echo alpha ;;
*"show node"*) echo "NodeName=alpha NodeAddr=127.0.0.1 State=IDLE" ;;
"-o show job"*) echo "JobId=7 JobState=${STATE:-COMPLETING} Reason=None" ;;
"show job"*) echo "   Command=$TREE/launch/pretrain.slurm" ;;
esac""",
    "srun": """
if [[ "$*" == *--print-run-dir* ]]; then echo "${MODE:-700} $RUN"; exit; fi
if [[ ${SIGNALLED:-} ]]; then mkdir -p "$LOGS/alpha"; touch "$LOGS/alpha/signalled"; fi
printf '%b' "${EXIT_JSON:-}" >"$RUN/exit.json" """,
    "getent": 'if [[ $2 == 1* ]]; then echo "$2 STREAM"; fi',
    "ssh": 'touch "$TREE/ssh-ran"; echo a line of output',
    "sleep": "exec /bin/sleep 0.02",
    "python": """
case "$*" in
*address.py*) echo 127.0.0.1 lo ;;
*--print-run-dir*) echo "${MODE:-700} $RUN" ;;
esac""",
}


class Site:
    def __init__(self, folder):
        self.tree, self.run = folder / "tree", folder / "run[1]"  # a name that is a pattern, too
        shutil.copytree(ROOT / "launch", self.tree / "launch", ignore=shutil.ignore_patterns("site.env"))
        (self.tree / "launch/site.env").write_text("PYTHON=python\n")
        (self.run / "checkpoints").mkdir(parents=True)
        (folder / "stubs").mkdir()
        for name, text in STUBS.items():
            path = folder / "stubs" / name
            path.write_text(f"#!/bin/bash\n{text}\n")
            path.chmod(0o755)
        kept = {name: value for name, value in os.environ.items() if not name.startswith("SLURM")}
        path = f"{folder}/stubs:{os.environ['PATH']}"
        self.environ = {**kept, "PATH": path, "TREE": str(self.tree), "RUN": str(self.run)}

    def bash(self, *words, **environ):
        environ = {**self.environ, **environ}
        done = subprocess.run(
            ["bash", *words], cwd=self.tree, env=environ, capture_output=True, text=True, timeout=20, check=False
        )
        return done.returncode, done.stdout + done.stderr

    def slurm(self, **environ):
        job = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "alpha", "SLURM_NNODES": "1"}
        return self.bash("launch/pretrain.slurm", **{**job, **environ})

    def node(self, **environ):
        settings = {"PYTHON": "python", "LAUNCHER": "accelerate", "PREFLIGHT": "yes", "NETWORK_INTERFACE": "",
                    "NODES": "1", "RANKS": "1", "HEAD": "127.0.0.1", "PORT": "0", "RUN_ID": "1", "NODE_RESTARTS": "0",
                    "LOGS": str(self.run / "logs")}  # fmt: skip
        return self.bash("launch/node.sh", **{**settings, **environ})

    def attacked(self):
        return (self.tree / "marker").exists()


@pytest.fixture
def site(tmp_path):
    return Site(tmp_path)


@pytest.mark.parametrize("content", [f"{ATTACK} 0", f"0 {ATTACK}", "0", "", "\0\0", "1 2 3", "-1 -1", f"{10**20} 0"])
def test_what_restarts_holds_is_never_evaluated(site, content):
    (site.run / "restarts").write_text(f"{content}\n")
    _, output = site.slurm(SLURM_RESTART_COUNT="1")
    assert not site.attacked()
    assert "restarts: expected two whole numbers" in output
    assert (site.run / "restarts").read_text() == "0 0"


@pytest.mark.parametrize("name", [f"step-00000009+{ATTACK}", f"step-{ATTACK}", "step-" + "9" * 20, "step-00000001\n+1"])
def test_a_folder_name_is_never_evaluated(site, name):
    for folder in (name, "step-00000008"):
        (site.run / "checkpoints" / folder).mkdir()
    _, output = site.slurm(STATE="RUNNING")
    assert not site.attacked()
    assert "requeueing from step 8\n" in output


@pytest.mark.parametrize("name", ["SLURM_JOB_ID", "SLURM_RESTART_COUNT", "SLURM_NNODES", "SLURM_NTASKS_PER_NODE"])
def test_variables_of_slurm_are_never_evaluated(site, name):
    code, output = site.slurm(**{name: ATTACK})
    assert not site.attacked()
    assert code == 2
    assert "expected a whole number, found BASH_VERSINFO\\[" in output


@pytest.mark.parametrize("name", ["NODES", "RANKS", "PORT", "NODE_RESTARTS"])
def test_variables_of_a_node_are_never_evaluated(site, name):
    code, output = site.node(**{name: ATTACK})
    assert not site.attacked()
    assert code == 2
    assert f"error: {name}: expected " in output


@pytest.mark.parametrize("option", ["--max-restarts", "--port", "--nodes"])
def test_options_are_never_evaluated(site, option):
    code, output = site.bash("launch/torchrun.sh", "--nodes", "2", "--head", "10.0.0.1", option, ATTACK)
    assert not site.attacked()
    assert code == 2
    assert "expected " in output


@pytest.mark.parametrize("name", ["h/;s/.*/touch marker/e;s/x/y", "-oProxyCommand=touch marker", "a b", "$(>marker)"])
def test_a_host_name_reaches_neither_sed_nor_the_options_of_ssh(site, name):
    code, output = site.bash("launch/torchrun.sh", "--hosts", name)
    assert not site.attacked()
    assert not (site.tree / "ssh-ran").exists()
    assert code == 2
    assert "expected the name of a host" in output


@pytest.mark.parametrize("name", ["local", "torchrun", "tensorboard", "node"])
def test_a_script_finds_its_own_repository_whatever_cdpath_is(site, tmp_path, name):
    """With a CDPATH, `cd launch/..` may lead elsewhere, where somebody has put a `launch/settings.sh` of theirs."""
    (tmp_path / "others/launch").mkdir(parents=True)
    for script in ("settings.sh", "functions.sh"):
        (tmp_path / "others/launch" / script).write_text(f"touch '{site.tree}/marker'\n")
    _, output = site.bash(f"launch/{name}.sh", "--help", CDPATH=str(tmp_path / "others"), PYTHON="true")
    assert not site.attacked()
    assert str(tmp_path / "others") not in output


def test_all_hosts_are_started_by_ssh(site):
    code, output = site.bash("launch/torchrun.sh", "--hosts", "n1,user@n2.example-site.org")
    assert code == 0
    assert (site.tree / "ssh-ran").exists()
    assert "n1: a line of output" in output
    assert "user@n2.example-site.org: a line of output" in output


def test_a_link_in_the_run_directory_is_replaced_and_not_followed(site, tmp_path):
    victim = tmp_path / "victim"
    victim.write_text("3 1")
    for name in ("restarts", "STOP", "dangling"):
        (site.run / name).symlink_to(tmp_path / "elsewhere" if name == "dangling" else victim)
    code, output = site.slurm(SLURM_RESTART_COUNT="1", EXIT_JSON='{"status": "finished", "reason": ""}')
    assert code == 0, output
    assert (site.run / "restarts").read_text() == "0 0"
    for name in ("STOP", "dangling"):
        code, output = site.bash("-euc", 'source launch/functions.sh; make_marker "$1"', "bash", str(site.run / name))
        assert code == 0, output
        assert (site.run / name).read_text() == ""
        assert not (site.run / name).is_symlink()
    assert victim.read_text() == "3 1"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run[1]", "stubs", "tree", "victim"]
    assert not list(site.run.glob(".*"))


def test_a_pipe_in_place_of_restarts_does_not_hang_the_job(site):
    os.mkfifo(site.run / "restarts")
    site.slurm(SLURM_RESTART_COUNT="1")
    assert (site.run / "restarts").read_text() == "0 0"


def test_a_line_break_in_the_name_of_the_run_directory_is_refused():
    """The scripts take the last line of what is printed: it would be another folder. They also show it."""
    for name, shown in ((r"runs/a\n/another", r"runs/a\n/another"), (r"runs/\e[2J", r"runs/\x1b[2J")):
        code, output = train("--print-run-dir", f'run.dir="{name}"')
        assert code == 2
        assert f"run.dir='{shown}': holds control characters; choose another run.dir" in output


def test_a_new_run_directory_is_private(site, tmp_path):
    site.slurm(RUN=str(tmp_path / "runs/new"))
    assert (tmp_path / "runs/new/restarts").exists()
    assert (tmp_path / "runs/new").stat().st_mode & 0o777 == 0o700
    site.slurm(RUN=str(tmp_path / "runs/of a group"), MODE="750")
    assert (tmp_path / "runs/of a group").stat().st_mode & 0o777 == 0o750


def test_starts_without_a_newer_checkpoint_are_counted(site):
    (site.run / "restarts").write_text("0 2\n")
    _, output = site.slurm(SLURM_RESTART_COUNT="3", STATE="RUNNING")
    assert (site.run / "restarts").read_text() == "0 3"
    assert "no newer checkpoint than step 0 after 3 restarts: giving up" in output
    (site.run / "checkpoints/step-00000009").mkdir()
    _, output = site.slurm(SLURM_RESTART_COUNT="4", STATE="RUNNING")
    assert (site.run / "restarts").read_text() == "9 0"
    assert "requeueing from step 9" in output


def test_the_end_of_a_run_is_told_without_control_characters(site):
    saved = r'{"status": "saved: start me again", "reason": "a\033]0;title\007b\033[31m"}'
    _, output = site.slurm(EXIT_JSON=saved)
    assert "step ended with saved: start me again (a]0;titleb[31m)" in output
    assert "\033" not in output


def test_a_signal_to_a_node_requeues_whatever_the_run_directory_is_called(site):
    saved = '{"status": "saved: start me again", "reason": "STOP file"}'
    _, output = site.slurm(EXIT_JSON=saved, SIGNALLED="1", STATE="RUNNING")
    assert "requeueing from step 0" in output
    _, output = site.slurm(EXIT_JSON=saved, STATE="RUNNING", SLURM_JOB_ID="8")
    assert "requeueing" not in output


def test_tensorboard_takes_no_run_whose_name_it_would_split(site):
    (site.tree / "a,b:c/tensorboard").mkdir(parents=True)
    code, output = site.bash("launch/tensorboard.sh", "a,b:c")
    assert code == 2
    assert "a,b:c: tensorboard splits names at commas and colons" in output


def test_the_name_of_the_run_directory_reaches_the_scripts_as_it_is(tmp_path):
    """What looks like a secret in it is masked elsewhere."""
    run = tmp_path / "decay#wd=0.1;lr=1"
    assert train("--print-run-dir", f"run.dir={run}") == (0, f"700 {run}\n")


def test_what_a_launcher_starts_shows_no_secret_before_its_options_are_known():
    command = [sys.executable, "launch/start.py", "--data.train=http://SECRET:SECRET@h/x.tar?token=SECRET"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert "unrecognized arguments: --data.train=http://***@h/x.tar?token=***" in done.stderr
    assert "SECRET" not in done.stdout + done.stderr
