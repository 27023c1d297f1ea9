"""The one exception that a user's own mistake raises, a disk without room included."""

import contextlib
from collections.abc import Iterator
from pathlib import Path


class UserError(Exception):
    """A mistake of the user: its message names the thing, says what is wrong and what to do, on one line."""


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turns an OSError of what is written to `path` into a UserError."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"{path}: cannot be written ({error.strerror or error}); make room there, then give the same command again"
        ) from error
