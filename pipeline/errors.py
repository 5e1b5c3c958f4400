"""The errors that end a command in order: what went wrong, and who can mend it."""


class UserError(ValueError):
    """Something that the user can mend. The message names the thing, what was found, what was expected, the fix."""


class PeerLost(Exception):
    """Another rank ended, and this one can't go on; what went wrong stands in that rank's message."""


class WorkerDied(Exception):
    """A data worker has ended; the message names it, says how it ended and what it was reading."""


class Interrupted(BaseException):
    """A stop was requested during a wait. Like KeyboardInterrupt, no handler of failures should catch it."""
