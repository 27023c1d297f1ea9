"""Wrappers that turn any observation into the few spaces that the agent understands, and repeat actions."""

from collections.abc import Mapping
from typing import Any, SupportsFloat

import gymnasium
import numpy as np
from gymnasium import spaces

from envs.errors import EnvError, WrongValue
from envs.images import as_image, image_shape, is_image
from envs.values import check_space, dtype_problem, entry_problem

RESERVED = ("is_first", "is_last", "is_terminal", "reward", "action")  # the other entries of a row


class DictObservation(gymnasium.ObservationWrapper):
    """Observations become a flat dict of images (H, W, C), float32 vectors (k,), integers () and integer vectors (k,).

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
        picture = is_image(source)
        if problem is None and isinstance(source, spaces.Box) and not picture:
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
        if picture:
            return as_image(value, source.shape or ())
        match source:
            case spaces.Discrete():
                return int(value) - int(source.start)
            case spaces.MultiDiscrete():
                return (np.asarray(value) - source.start).reshape(-1).astype(np.int64)
        return np.array(value, np.float32).reshape(-1)


def entries(space: spaces.Space) -> dict[str, spaces.Space]:
    """Name the parts of an observation space: those of a Dict, or the single entry "observation"."""
    return dict(space.spaces) if isinstance(space, spaces.Dict) else {"observation": space}


def observation_entry(key: str, space: spaces.Space) -> spaces.Space:
    """Return the space that the agent sees for the entry `key`; EnvError where it is not supported."""
    if key in RESERVED:
        raise EnvError(f"observation {key!r} has a reserved name, rename it (taken: {', '.join(RESERVED)})")
    match space:
        case spaces.Box() if is_image(space):
            return spaces.Box(0, 255, image_shape(space.shape), np.uint8)
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
