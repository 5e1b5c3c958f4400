"""The run directory: resolved config, manifest, how the run ended; and what may change when it is resumed."""

import contextlib
import datetime
import importlib.metadata
import json
import os
import platform
import stat
import subprocess
import sys
from collections.abc import Callable
from typing import Any

from pipeline.errors import UserError, shorten
from pipeline.files import write_durably
from pipeline.lease import Lease, LeaseLost, acquire, observe
from pipeline.parsing import read_json
from pipeline.text import masked_tree, masked_words, shown

PACKAGES = ("torch", "accelerate", "deepspeed", "webdataset", "numpy", "pillow", "safetensors")
LEASE = "run"
OF_LAUNCHERS = ("checkpoints", "logs", "restarts", "STOP", "exit.json")  # what may be there before the first start


def is_object(content: Any) -> bool:
    return isinstance(content, dict)


def is_list_of_steps(content: Any) -> bool:
    return isinstance(content, list) and all(
        isinstance(entry, dict) and all(type(entry.get(key)) is int for key in ("first", "last")) for entry in content
    )


# Whether a file's content fits, and what it must be.
OBJECT = (is_object, "an object")
SKIPPED = (is_list_of_steps, 'a list of {"first": <step>, "last": <step>}')


def create_folder(path: str, mode: int) -> None:
    """Creates a run directory with this mode, whatever the umask; one that is there already keeps its own."""
    os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
    try:
        os.mkdir(path, 0o700)
    except FileExistsError:
        if not os.path.isdir(path):
            raise
    else:
        set_mode(path, mode)


def set_mode(path: str, mode: int) -> None:
    with contextlib.suppress(OSError):  # some network file systems have no modes
        # In a project's folder, new files get the group of the folder: this bit says so.
        os.chmod(path, mode | (os.stat(path).st_mode & stat.S_ISGID))


class RunDir:
    """`mode` is set at the first start of a run: its files may name machines, users and private sources."""

    def __init__(self, path: str, mode: int = 0o700):
        self.path, self.mode = path, mode
        self.checkpoints = os.path.join(path, "checkpoints")
        self.lease: Lease | None = None  # without it this start must not write there

    def file(self, name: str) -> str:
        return os.path.join(self.path, name)

    def open(self, identity: dict[str, Any], stopped: Callable[[], bool] = lambda: False) -> None:
        """Takes the directory's lease and checks that the run in it is this one. Removes `exit.json` of its last start.

        Raises:
            UserError: no permission, another start is writing there, or another run lies there; names each option that
                differs.
        """
        try:
            self.create()
            os.makedirs(self.checkpoints, exist_ok=True)
            self.claim(stopped)
        except OSError as error:
            raise UserError(
                f"run.dir={self.path}: can't be written: {error.strerror}; choose another run.dir"
            ) from None
        identity = json.loads(json.dumps(identity))
        known = masked_tree(self.read("identity.json"))  # an earlier version of this program did not mask it
        if known is None:
            if os.listdir(self.checkpoints):
                raise UserError(f"run.dir={self.path}: holds checkpoints but no identity.json; choose another run.dir")
            if all(name in OF_LAUNCHERS or name.startswith(".") for name in os.listdir(self.path)):
                set_mode(self.path, self.mode)  # a launcher has made it for this run
            self.write("identity.json", known := identity)
        differing = [
            f"{key}: there {shorten(known.get(key), 200)}, now {identity.get(key)!r}"
            for key in sorted(known.keys() | identity.keys())
            if known.get(key) != identity.get(key)
        ]
        if differing:
            raise UserError(
                f"run.dir={self.path} holds another run; it differs in "
                + "; ".join(differing)
                + ". Set these back to resume it, or choose another run.dir"
            )
        for name in ("exit.json", "STOP"):
            if os.path.isdir(self.file(name)):
                raise UserError(f"{self.file(name)}: is a folder, expected a file; move it away")
        if os.path.exists(self.file("exit.json")):
            os.remove(self.file("exit.json"))

    def create(self) -> None:
        create_folder(self.path, self.mode)

    def claim(self, stopped: Callable[[], bool] = lambda: False) -> None:
        """Takes the lease on the directory.

        Raises:
            UserError: another start is writing there.
            Interrupted: `stopped` said True while a holder that may be dead was waited for.
        """
        if self.lease is None:
            self.lease = acquire(self.path, LEASE, f"run.dir={self.path}", stopped=stopped)

    def join(self, lease_path: str) -> None:
        """For the other ranks: the lease that rank 0 holds is theirs, too."""
        if self.lease is None:
            self.lease = observe(lease_path, f"run.dir={self.path}")

    def close(self) -> None:
        """Lets another start write there."""
        if self.lease is not None:
            self.lease.release()

    def read(self, name: str) -> Any:
        """The content of a file of JSON, or None without this file.

        Raises:
            UserError: it can't be read, or its content is not of the right kind.
        """
        try:
            content = read_json(self.file(name))
        except FileNotFoundError:
            return None
        except IsADirectoryError:
            problem = "is a folder, expected a file"
        except ValueError:
            problem = "not readable JSON"
        else:
            fits, expected = SKIPPED if name == "skipped.json" else OBJECT
            if fits(content):
                return content
            problem = f"found {shorten(json.dumps(content), quote=False)}, expected {expected}"
        raise UserError(f"{self.file(name)}: {problem}; restore it or choose another run.dir")

    def write(self, name: str, value: Any) -> None:
        text = value if isinstance(value, str) else json.dumps(value, indent=1)
        write_durably(self.file(name), text)

    def start(self, config_yaml: str, classes: list[str] | None, devices: list[str], settings: dict[str, Any]) -> None:
        """Writes what this start of the run is; `devices` names each rank's, `settings` what makes it deterministic."""
        self.write("config.yaml", config_yaml)
        if classes is not None:
            self.write("classes.json", classes)
        self.write("manifest.json", manifest(devices) | {"deterministic": settings})

    def end(self, status: str, step: int, reason: str) -> None:
        """`exit.json` for launchers, which hide exit codes; the first of several ranks that fail writes it."""
        try:
            if self.lease is None:
                return
            self.lease.check()
        except LeaseLost:
            return
        reason = shown(reason)
        if os.path.exists(self.file("exit.json")):
            return
        self.write("exit.json", {"status": status, "step": step, "reason": reason})
        try:
            record = self.read("manifest.json")
        except UserError:  # someone else has written it; the next start writes it anew
            return
        if record is not None and "ended" not in record:
            self.write("manifest.json", {**record, "ended": now(), "exit": f"{status}: {reason}"})


def now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def package_versions() -> dict[str, str]:
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def manifest(devices: list[str]) -> dict[str, Any]:
    return {
        "command": [sys.executable, *masked_words(sys.argv)],
        "git": git_revision(),
        "python": platform.python_version(),
        "packages": package_versions(),
        "world_size": len(devices),
        "devices": devices,
        "started": now(),
    }


def git_revision() -> dict[str, Any] | None:
    def git(*words: str) -> str:
        here = os.path.dirname(os.path.abspath(__file__))
        # The words are constants below, and git is the user's own, from PATH.
        done = subprocess.run(["git", *words], cwd=here, capture_output=True, text=True, check=True)  # noqa: S603, S607
        return done.stdout.strip()

    try:
        return {"revision": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain"))}
    except (OSError, subprocess.CalledProcessError):
        return None
