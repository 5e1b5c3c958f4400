"""The errors that end a command in order: what went wrong, and who can mend it."""

import errno
import re

from pipeline.text import shown


class UserError(ValueError):
    """Something that the user can mend. The message names the thing, what was found, what was expected, the fix."""

    def __init__(self, message: object = ""):
        super().__init__(shown(str(message)))


class PeerLost(Exception):
    """Another rank ended, and this one can't go on; what went wrong stands in that rank's message."""


class WorkerDied(Exception):
    """A data worker has ended; the message names it, says how it ended and what it was reading."""


class Interrupted(BaseException):
    """A stop was requested during a wait. Like KeyboardInterrupt, no handler of failures should catch it."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the host's memory ran out. Python, torch, OpenCV, PIL and libjpeg each say it in their own way."""
    return (
        isinstance(error, MemoryError)
        or getattr(error, "errno", None) == errno.ENOMEM
        or re.search(
            r"can't allocate memory|not enough memory|out of memory error|Insufficient memory|Memory allocation fail",
            str(error),
        )
        is not None
    )
