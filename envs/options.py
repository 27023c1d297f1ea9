"""What a user may set about an environment: dataclasses whose fields say what is allowed."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, TypeVar

from envs.errors import EnvError, nearest

KINDS: dict[Any, str] = {int: "an integer", float: "a number", bool: "true or false", str: "a word"}
"""What an option may be, in words."""


def option(default: Any, low: float | None = None, high: float = math.inf) -> Any:
    """A field with the numbers that it may be."""
    return field(default=default, metadata={} if low is None else {"low": low, "high": high})


@dataclass(frozen=True, kw_only=True)
class Options:
    """The options are the fields.

    Raises:
        EnvError: an option has a wrong type or is out of range.
    """

    def __post_init__(self) -> None:
        for each in fields(self):
            value = getattr(self, each.name)
            if type(value) is not each.type and not (each.type is float and type(value) is int):
                raise EnvError(f"option {each.name} is {value!r}; give {KINDS[each.type]}")
            if each.metadata and not each.metadata["low"] <= value <= each.metadata["high"]:
                allowed = f"{each.metadata['low']:g} to {each.metadata['high']:g}"
                raise EnvError(f"option {each.name} is {value:g}; allowed is {allowed}")


Chosen = TypeVar("Chosen", bound=Options)


def parse(kind: type[Chosen], given: Mapping[str, Any], name: str) -> Chosen:
    """The options that were given for the environment `name`, which shows images.

    Raises:
        EnvError: one is unknown or not allowed.
    """
    known = [each.name for each in fields(kind)]
    for key in given:
        if key not in known:
            hint = nearest(key, known, "") or f"; its options are image_size, {', '.join(known)}"
            raise EnvError(f"environment {name!r} has no option {key!r}{hint}")
    try:
        return kind(**given)
    except EnvError as error:
        raise EnvError(f"environment {name!r}: {error}") from None
