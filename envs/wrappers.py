"""Wrappers that turn any gymnasium environment into the few spaces that the agent understands."""

from collections.abc import Mapping
from typing import Any, SupportsFloat

import gymnasium
import numpy as np
from gymnasium import spaces

from envs.errors import EnvError, WrongValue
from envs.values import dtype_problem, entry_problem

RESERVED = ("is_first", "is_last", "is_terminal", "reward", "action")  # the other entries of a row


class DictObservation(gymnasium.ObservationWrapper):
    """Observations become a flat dict of float32 vectors (k,), integers () and integer vectors (k,).

    The entries of a Dict space keep their names, any other space becomes the entry "observation".

    What an environment returns is held against its space on the way: shape, kind of dtype, bounds, finite numbers, and
    that the space is still the one that it had.

    Raises:
        EnvError: an entry of an unsupported space or with a reserved name.
        WrongValue: from `reset` and `step`, where a value does not fit.
    """

    def __init__(self, env: gymnasium.Env) -> None:
        """Convert the spaces of `env`."""
        super().__init__(env)
        self._source = env.observation_space
        self._sources = entries(env.observation_space)
        self._seen = {key: observation_entry(key, space) for key, space in self._sources.items()}
        self.observation_space = spaces.Dict(self._seen)

    def observation(self, observation: Any) -> dict[str, Any]:
        """Convert one observation; the arrays are copies, so an environment may reuse its own."""
        check_space("observation_space", self.env.observation_space, self._source)
        if not isinstance(self._source, spaces.Dict):
            observation = {"observation": observation}
        if not isinstance(observation, Mapping):
            raise WrongValue(f"a {type(observation).__name__} as observation; return a dict, as observation_space says")
        if missing := self._sources.keys() - observation.keys():
            raise WrongValue(f"an observation without {min(missing)!r}; return every key of observation_space")
        return {key: self._convert(key, observation[key], source) for key, source in self._sources.items()}

    def _convert(self, key: str, value: Any, source: spaces.Space) -> Any:
        problem = dtype_problem(value, source)
        if problem is None and isinstance(source, spaces.Box):
            with np.errstate(over="ignore"):  # what becomes infinite is found below
                value = np.array(value, np.float32)
            if value.shape != source.shape:
                problem = f"has shape {value.shape}, its space says {source.shape}; make them equal"
            else:
                value = value.reshape(-1)
                problem = entry_problem(value, self._seen[key])
        elif problem is None:
            problem = entry_problem(value, source)
        if problem is not None:
            raise WrongValue(f"observation {key!r} that {problem}")
        match source:
            case spaces.Discrete():
                return int(value) - int(source.start)
            case spaces.MultiDiscrete():
                return (np.asarray(value) - source.start).reshape(-1).astype(np.int64)
        return np.array(value, np.float32).reshape(-1)


def check_space(name: str, now: spaces.Space, before: spaces.Space) -> None:
    """Raise WrongValue where an environment has another space than it had when it was made."""
    if now is not before and now != before:
        raise WrongValue(f"{name}, which became {now} and was {before}; set it once, in __init__")


def entries(space: spaces.Space) -> dict[str, spaces.Space]:
    """Name the parts of an observation space: those of a Dict, or the single entry "observation"."""
    return dict(space.spaces) if isinstance(space, spaces.Dict) else {"observation": space}


def observation_entry(key: str, space: spaces.Space) -> spaces.Space:
    """Return the space that the agent sees for the entry `key`; EnvError where it is not supported."""
    if key in RESERVED:
        raise EnvError(f"observation {key!r} has a reserved name, rename it (taken: {', '.join(RESERVED)})")
    match space:
        case spaces.Box() if space.dtype == np.uint8 and len(space.shape) == 3:
            raise EnvError(f"observation {key!r} is an image: pixels are not supported yet, use state observations")
        case spaces.Box():
            with np.errstate(over="ignore"):  # bounds beyond float32 become infinite, as they should
                low, high = (bound.astype(np.float32).reshape(-1) for bound in (space.low, space.high))
            return spaces.Box(low, high, dtype=np.float32)
        case spaces.MultiBinary():
            return spaces.Box(0.0, 1.0, (int(np.prod(space.shape)),), np.float32)
        case spaces.Discrete():
            return spaces.Discrete(int(space.n))
        case spaces.MultiDiscrete():
            return spaces.MultiDiscrete(space.nvec.reshape(-1))
    raise EnvError(
        f"observation {key!r} is a {type(space).__name__} space, which is not supported; "
        "wrap the environment to give Box, Discrete, MultiDiscrete or MultiBinary, or a flat Dict of them"
    )


class UnitAction(gymnasium.ActionWrapper):
    """Actions become a float32 vector in [-1, 1], an integer from 0, or a vector of integers from 0.

    A continuous action is clipped to [-1, 1] and stretched to the bounds of its dimension; where a bound is
    infinite it is passed on as it is, within the bound that is finite.

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
        match self._source:
            case spaces.Discrete(start=start):
                return self._source.dtype.type(action + start)
            case spaces.MultiDiscrete(start=start, shape=shape):
                return (np.asarray(action).reshape(shape) + start).astype(self._source.dtype)
            case spaces.Box() as box:
                return rescale(np.asarray(action), box)
        raise AssertionError(f"{self._source} was refused when the wrapper was made")


def unit_action_space(space: spaces.Space) -> spaces.Space:
    """Return the space in which the agent acts for the environment's `space`; EnvError if not supported."""
    match space:
        case spaces.Box() if np.issubdtype(space.dtype, np.floating):
            return spaces.Box(-1.0, 1.0, (int(np.prod(space.shape)),), np.float32)
        case spaces.Discrete():
            return spaces.Discrete(int(space.n))
        case spaces.MultiDiscrete():
            return spaces.MultiDiscrete(space.nvec.reshape(-1))
    kind = "Box of integers" if isinstance(space, spaces.Box) else type(space).__name__
    raise EnvError(
        f"the action space is a {kind}, which is not supported; "
        "wrap the environment to take a Box of floats, Discrete or MultiDiscrete"
    )


def rescale(action: np.ndarray, space: spaces.Box) -> np.ndarray:
    """Map an action (A,) in [-1, 1] to the bounds of `space` (any shape), in its shape and dtype."""
    unit = np.clip(action.astype(np.float64), -1.0, 1.0).reshape(space.shape)
    finite = np.isfinite(space.low) & np.isfinite(space.high)
    low = np.where(finite, space.low, -1.0).astype(np.float64)
    high = np.where(finite, space.high, 1.0).astype(np.float64)
    stretched = low + (unit + 1.0) / 2.0 * (high - low)
    return np.clip(stretched.astype(space.dtype), space.low, space.high)


class ActionRepeat(gymnasium.Wrapper):
    """Every action lasts `amount` steps or until the episode ends; their rewards are summed."""

    def __init__(self, env: gymnasium.Env, amount: int) -> None:
        """Repeat every action of `env` `amount` times."""
        super().__init__(env)
        self._amount = amount

    def step(self, action: Any) -> tuple[Any, SupportsFloat, bool, bool, dict[str, Any]]:
        """Return the last step's observation, flags and info, and the sum of the rewards."""
        total: Any = 0.0
        for _ in range(self._amount):
            observation, reward, terminated, truncated, info = self.env.step(action)
            total = total + reward
            if terminated or truncated:
                break
        return observation, total, terminated, truncated, info
