"""What may be wrong with the values that an environment returns, in words."""

import numbers
from typing import Any

import numpy as np
from gymnasium import spaces

from envs.errors import WrongValue


def entry_problem(value: Any, space: spaces.Space) -> str | None:
    """Return what is wrong with one entry of an observation, or None."""
    if not isinstance(space, spaces.Box):
        fits = space.contains(value)
        return None if fits else f"is {value!r}, outside of its space {space}; correct the value or the space"
    if isinstance(value, np.generic):
        value = np.asarray(value)
    if not isinstance(value, np.ndarray):
        kind = type(value).__name__
        return f"is a {kind}; return a numpy array of dtype {space.dtype} and shape {space.shape}"
    if value.shape != space.shape:
        return f"has shape {value.shape}, its space says {space.shape}; make them equal"
    if not np.can_cast(value.dtype, space.dtype):
        return f"has dtype {value.dtype}, its space says {space.dtype}; add .astype(np.{space.dtype})"
    if np.issubdtype(value.dtype, np.floating) and not np.isfinite(value).all():
        return "holds NaN or infinite values; find where they come from, the agent cannot learn from them"
    outside = (value < space.low) | (value > space.high)
    if outside.any():
        place = tuple(int(i) for i in np.argwhere(outside)[0])
        return (
            f"is {value[place]} at {list(place)}, outside of [{space.low[place]}, {space.high[place]}]; "
            "widen the space or clip the value"
        )
    return None


def dtype_problem(value: Any, space: spaces.Space) -> str | None:
    """Return why `value` cannot be read as the dtype of its space, or None: 64 bits may stand for 32, not 0.5 for 0."""
    dtype = np.asarray(value).dtype
    if space.dtype is None or np.can_cast(dtype, space.dtype, "same_kind"):
        return None
    return f"has dtype {dtype}, its space says {space.dtype}; add .astype(np.{space.dtype}) or change the space"


def is_finite_scalar(reward: Any) -> bool:
    """Tell whether `reward` is one real, finite number."""
    if isinstance(reward, np.ndarray) and reward.shape == ():
        reward = reward[()]
    return isinstance(reward, numbers.Real | np.bool_) and bool(np.isfinite(float(reward)))


def check_space(name: str, now: spaces.Space, before: spaces.Space) -> None:
    """Raise WrongValue where an environment has another space than it had when it was made."""
    if now is not before and now != before:
        raise WrongValue(f"{name}, which became {now} and was {before}; set it once, in __init__")
