"""The exceptions of this package: a user's mistake, and an environment that breaks while it runs."""

import difflib
from collections.abc import Iterable


class EnvError(Exception):
    """A mistake of the user: its message names the thing, says what is wrong and what to do, on one line."""


class EnvironmentFailure(EnvError):
    """An environment raised, hung, gave a wrong value, or its process died. The message is one line.

    `index` is the environment's place among its streams, `name` the name it was made by, `details` the traceback where
    there is one.
    """

    def __init__(self, message: str, index: int = 0, name: str = "", details: str = "") -> None:
        """Build from a message of one line."""
        super().__init__(message)
        self.index, self.name, self.details = index, name, details


class WrongValue(Exception):
    """An environment returned something that its spaces do not say; the message names it, says what and what to do."""


def nearest(name: str, known: Iterable[str], prefix: str) -> str:
    """Return "; did you mean <prefix>X?" for the known X closest to `name`, or nothing when none is close."""
    matches = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f"; did you mean {prefix}{matches[0]}?" if matches else ""


def one_line(text: object) -> str:
    """Fold a message of several lines into one."""
    return " ".join(str(text).split())
