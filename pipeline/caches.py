"""Folders for compiled code that nobody else can write to.

By default torch keeps compiled code in `/tmp/torchinductor_<user>`, and loads it by unpickling: whoever creates that
folder first runs code as the user. Data workers and compiler processes inherit the variables that are set here.
"""

import atexit
import contextlib
import errno
import os
import shutil
import stat
import sys
import tempfile

from pipeline.errors import UserError

INDUCTOR, TRITON, EXTENSIONS = "TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR", "TORCH_EXTENSIONS_DIR"


def use_private_caches(compiles: bool) -> None:
    """Sets the variables of the compilers' caches to private folders of this user; checks those that are set already.

    Where the home folder can't be written, as in a container with a read-only root, a temporary folder is used.

    Raises:
        UserError: others could write to a cache, and this run `compiles`.
    """
    home = os.environ.get("XDG_CACHE_HOME", "")
    if not os.path.isabs(home):
        home = os.path.join("/", os.path.expanduser("~"), ".cache")  # where no home is known, `~` stays
    root = os.path.join(home, "vit-pretrain")
    defaults = {INDUCTOR: os.path.join(root, "inductor"), TRITON: os.path.join(root, "triton")}
    spare: str | None = None
    for name in (INDUCTOR, TRITON, EXTENSIONS):
        chosen = os.environ.get(name) or None
        if chosen is None and name == EXTENSIONS and spare is None:
            continue  # torch's own default lies in the home folder, with a folder for each version of Python and CUDA
        path = chosen or defaults.get(name, root)
        try:
            problem, writable = next(filter(None, map(_prepare, [path] if chosen else [root, path])), None), True
        except OSError as error:
            problem, writable = f"{path} can't be written ({error.strerror})", False
        if problem is None:
            os.environ[name] = path
            continue
        if compiles and (chosen or writable):
            fix = f"set {name} to" if chosen else "remove it, or set XDG_CACHE_HOME to"
            raise UserError(f"{name}: {problem}, and code is loaded from there; {fix} a folder of your own")
        spare = spare or _make_spare(compiles)
        os.environ[name] = os.path.join(spare, name.lower())
        os.mkdir(os.environ[name], mode=0o700)


def _prepare(folder: str) -> str | None:
    """Creates a folder. Returns why it can't be trusted, if it can't.

    Raises:
        OSError: it can't be written.
    """
    with contextlib.suppress(FileExistsError):
        os.makedirs(folder, mode=0o700)
    problem = find_intruder(folder)
    if problem is None and not os.access(folder, os.W_OK | os.X_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), folder)
    return None if problem is None else f"{folder} {problem}"


def find_intruder(path: str) -> str | None:
    """Returns why another user may write to a folder, or None if only this user can."""
    found = os.lstat(path)
    if stat.S_ISLNK(found.st_mode):
        return "is a link"
    if not stat.S_ISDIR(found.st_mode):
        return "is no folder"
    if found.st_uid != os.geteuid():
        return f"belongs to another user (uid {found.st_uid})"
    if found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        return f"can be written by other users (mode {stat.S_IMODE(found.st_mode):o}, expected 700)"
    parent = os.path.dirname(os.path.realpath(path))
    while True:
        found = os.stat(parent)
        sticky = found.st_mode & stat.S_ISVTX and found.st_uid in (0, os.geteuid())
        if found.st_mode & stat.S_IWOTH and not sticky:
            return f"can be replaced by other users, who can write to {parent}"
        if parent == os.path.dirname(parent):
            return None
        parent = os.path.dirname(parent)


def _make_spare(tell: bool) -> str:
    spare, maker = tempfile.mkdtemp(prefix="vit-pretrain-"), os.getpid()

    def remove() -> None:
        if os.getpid() == maker:
            shutil.rmtree(spare, ignore_errors=True)

    atexit.register(remove)
    if tell:
        print(f"warning: no cache folder can be written: what is compiled goes to {spare}, for this start only",
              file=sys.stderr, flush=True)  # fmt: skip
    return spare
