"""The one exception that a user's own mistake raises."""


class UserError(Exception):
    """A mistake of the user: its message names the thing, says what is wrong and what to do, on one line."""
