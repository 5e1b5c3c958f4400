"""Writing files so that they survive a crash or a loss of power, and never through a link that somebody has planted."""

import contextlib
import errno
import os
import re
import secrets
from collections.abc import Iterable


def write_durably(path: str, content: str | bytes | Iterable[bytes]) -> None:
    """Replaces a file in one step: whatever happens, `path` holds the old or the new content, whole."""
    partial = partial_path(path)
    try:
        with open(partial, "wb", opener=new_file) as file:
            content = content.encode() if isinstance(content, str) else content
            file.writelines([content] if isinstance(content, bytes) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.remove(partial)
        raise
    sync(os.path.dirname(path) or ".")


def partial_path(path: str) -> str:
    """An unpredictable name next to `path`. Several ranks may write the same file at once."""
    folder, name = os.path.split(path)
    return os.path.join(folder, f".{name}.{secrets.token_hex(8)}.part")


def is_partial_of(name: str, final: str) -> bool:
    """Whether a file may be left of a process that was killed while it wrote `final` (a regular expression)."""
    return re.fullmatch(rf"\.{final}\.[0-9a-f]{{16}}\.part", name) is not None


def new_file(path: str, flags: int) -> int:
    """An opener for `open` that creates the file and fails if the name exists, even as a link."""
    return os.open(path, flags | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)


def no_link(path: str, flags: int) -> int:
    """An opener for `open` that fails on links (ELOOP) and does not block on named pipes."""
    return os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)


def sync(path: str) -> None:
    """Waits until a file's content, or the names in a folder, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno != errno.EINVAL or not os.path.isdir(path):  # some network file systems can't sync a folder
            raise
    finally:
        os.close(handle)
