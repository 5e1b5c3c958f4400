"""The errors that end a command in order: what went wrong, and who can mend it."""

import errno
import re
import reprlib
from typing import Any

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


def shorten(value: Any, most: int = 80, *, quote: bool = True) -> str:
    """A value that somebody else has chosen, for a message: as `repr` writes it, or a text itself, cut to `most`."""
    if quote or not isinstance(value, str):
        try:
            text = _REPR.repr(value)
        except ValueError:  # a whole number of more digits than Python writes
            text = f"a {type(value).__name__} of too many digits"
    else:
        text = value[: most + 1]
    return text if len(text) <= most else f"{text[: most - 4]} ..."


_REPR = reprlib.Repr()
_REPR.maxstring = _REPR.maxother = _REPR.maxlong = 200  # `most` cuts; these keep it from writing all of a large value
