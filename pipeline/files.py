"""Writing files so that they survive a crash or a loss of power."""

import contextlib
import errno
import os
import secrets
from collections.abc import Iterator
from typing import BinaryIO


def write_durably(path: str, content: str | bytes) -> None:
    """Replaces a file in one step: whatever happens, `path` holds the old or the new content, whole."""
    with replacing(path) as file:
        file.write(content.encode() if isinstance(content, str) else content)


@contextlib.contextmanager
def replacing(path: str) -> Iterator[BinaryIO]:
    """The same for content that is written bit by bit."""
    folder, name = os.path.split(path)
    partial = os.path.join(folder, f".{name}.{secrets.token_hex(4)}.part")  # several ranks may write the same file
    try:
        with open(partial, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.remove(partial)
        raise
    sync(folder or ".")


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
