"""Actions of any environment, in the few spaces in which the agent acts: reals, choices, or both in one vector."""

import math
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces

from envs.errors import EnvError
from envs.values import check_space


class Hybrid(spaces.Box):
    """Reals and choices in one float32 vector: first `reals` numbers in [-1, 1], then one whole number for each choice.

    Being a Box, it passes through vector environments, replay and checkpoints as any other vector does.
    """

    def __init__(self, reals: int, sizes: Sequence[int]) -> None:
        """`sizes` are how many alternatives each choice has."""
        self.reals, self.sizes = reals, tuple(int(size) for size in sizes)
        low: Any = np.array([-1.0] * reals + [0.0] * len(self.sizes), np.float32)
        high: Any = np.array([1.0] * reals + [size - 1.0 for size in self.sizes], np.float32)
        super().__init__(low, high, dtype=np.float32)

    def sample(self, mask: None = None, probability: None = None) -> np.ndarray:
        """Uniform reals and choices."""
        value = super().sample()
        value[self.reals :] = self.np_random.integers(self.sizes)
        return value

    def contains(self, x: Any) -> bool:
        """Whether it lies within the bounds, its choices whole numbers."""
        return super().contains(x) and bool((x[self.reals :] == np.round(x[self.reals :])).all())

    def __repr__(self) -> str:
        return f"Hybrid({self.reals} reals, choices of {list(self.sizes)})"


class UnitAction(gymnasium.ActionWrapper):
    """Actions become a float32 vector in [-1, 1], an integer from 0, a vector of integers from 0, or a Hybrid vector.

    A continuous action is clipped to [-1, 1] and stretched to the bounds of its dimension; where a bound is
    infinite it is passed on as it is, within the bound that is finite. The parts of a Dict or Tuple, of nested ones
    too, stand in their own order, reals before choices.

    Raises:
        EnvError: an unsupported action space.
        WrongValue: from `step`, where the environment's action space is no longer the one that it had.
    """

    def __init__(self, env: gymnasium.Env) -> None:
        """Convert the action space of `env`."""
        super().__init__(env)
        self._source = env.action_space
        self.action_space = unit_action_space(self._source)

    def action(self, action: Any) -> Any:
        """Convert one action of the agent to one of the environment."""
        check_space("action_space", self.env.action_space, self._source)
        flat = np.asarray(action).reshape(-1)
        match self.action_space:
            case Hybrid(reals=amount):
                reals, choices = flat[:amount], flat[amount:]
            case spaces.Box():
                reals, choices = flat, flat[:0]
            case _:
                reals, choices = flat[:0], flat
        return composed(self._source, iter(reals), iter(choices.astype(np.int64)))


def unit_action_space(space: spaces.Space) -> spaces.Space:
    """Return the space in which the agent acts for the environment's `space`; EnvError if not supported."""
    reals, sizes = 0, []
    for part in leaves(space):
        match part:
            case spaces.Box() if np.issubdtype(part.dtype, np.floating):
                reals += math.prod(part.shape)
            case spaces.Discrete():
                sizes.append(int(part.n))
            case spaces.MultiDiscrete():
                sizes += part.nvec.reshape(-1).tolist()
            case spaces.MultiBinary():
                sizes += [2] * math.prod(part.shape)
            case _:
                kind = "Box of integers" if isinstance(part, spaces.Box) else type(part).__name__
                where = "the action space is" if part is space else "the action space has a part that is"
                raise EnvError(
                    f"{where} a {kind}, which is not supported; wrap the environment to take a Box of floats, "
                    "Discrete, MultiDiscrete or MultiBinary, or a Dict or Tuple of them"
                )
    if isinstance(space, spaces.Discrete):
        return spaces.Discrete(sizes[0])
    if reals and sizes:
        return Hybrid(reals, sizes)
    if sizes:
        return spaces.MultiDiscrete(sizes)
    if not reals:
        raise EnvError("the action space has no parts; give the agent something to do")
    return spaces.Box(-1.0, 1.0, (reals,), np.float32)


def leaves(space: spaces.Space) -> Iterator[spaces.Space]:
    """The parts of a space that have no parts themselves, in the order of the space."""
    if isinstance(space, spaces.Dict | spaces.Tuple):
        for part in space.values() if isinstance(space, spaces.Dict) else space:
            yield from leaves(part)
    else:
        yield space


def composed(space: spaces.Space, reals: Iterator[Any], choices: Iterator[Any]) -> Any:
    """An action in the environment's `space`, each part of which takes its share of reals in [-1, 1] and of choices."""
    match space:
        case spaces.Dict():
            return {key: composed(part, reals, choices) for key, part in space.items()}
        case spaces.Tuple():
            return tuple(composed(part, reals, choices) for part in space)
        case spaces.Discrete():
            return space.dtype.type(next(choices) + space.start)
        case spaces.MultiDiscrete():
            return (taken(choices, space.shape) + space.start).astype(space.dtype)
        case spaces.MultiBinary():
            return taken(choices, space.shape).astype(space.dtype)
        case spaces.Box():
            return rescale(taken(reals, space.shape), space)
    raise AssertionError(f"{space} was refused when the wrapper was made")


def taken(numbers: Iterator[Any], shape: tuple[int, ...]) -> np.ndarray:
    """The next numbers, as an array of this shape."""
    return np.array(list(islice(numbers, math.prod(shape)))).reshape(shape)


def rescale(action: np.ndarray, space: spaces.Box) -> np.ndarray:
    """Map an action in [-1, 1] to the bounds of `space`, in its shape and dtype."""
    unit = np.clip(action.astype(np.float64), -1.0, 1.0)
    finite = np.isfinite(space.low) & np.isfinite(space.high)
    low = np.where(finite, space.low, -1.0).astype(np.float64)
    high = np.where(finite, space.high, 1.0).astype(np.float64)
    stretched = low + (unit + 1.0) / 2.0 * (high - low)
    return np.clip(stretched.astype(space.dtype), space.low, space.high)
