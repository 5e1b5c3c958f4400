"""The error of a user's mistake: one clear message, exit code 2, no traceback."""


class UserError(ValueError):
    """Something that the user can mend. The message names the thing, what was found, what was expected, the fix."""


class PeerLost(Exception):
    """Another rank ended, and this one can't go on; what went wrong stands in that rank's message."""
