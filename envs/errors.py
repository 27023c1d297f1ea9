"""The exceptions of this package: a user's mistake, and an environment that breaks while it runs."""

import contextlib
import difflib
import traceback
from collections.abc import Iterable, Iterator


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


@contextlib.contextmanager
def failing(who: str, during: str, index: int = 0, name: str = "") -> Iterator[None]:
    """Raise what an environment raises as EnvironmentFailure, with kind and place; a user's mistake as it is."""
    try:
        yield
    except EnvError:
        raise
    except WrongValue as error:
        raise EnvironmentFailure(f"{who} gave {error}", index, name) from None
    except (Exception, SystemExit) as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        what = f"raised {type(error).__name__} {during}: {one_line(error)} ({place.filename}:{place.lineno})"
        raise EnvironmentFailure(f"{who} {what}", index, name, traceback.format_exc()) from None


class WrongValue(Exception):
    """An environment returned something that its spaces do not say; the message names it, says what and what to do."""


def nearest(name: str, known: Iterable[str], prefix: str) -> str:
    """Return "; did you mean <prefix>X?" for the known X closest to `name`, or nothing when none is close."""
    matches = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f"; did you mean {prefix}{matches[0]}?" if matches else ""


def one_line(text: object) -> str:
    """Fold a message of several lines into one."""
    return " ".join(str(text).split())
