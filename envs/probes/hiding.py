"""Wrappers that hide a part of what is observed: velocities, numbers under noise, moments, what was told at first."""

from typing import Any, ClassVar

import gymnasium
import numpy as np
from gymnasium import spaces

SPEEDS = (0.0, 1.0, 8.0)
"""Target speeds of the suite's walker: stand, walk, run."""


class HideVelocity(gymnasium.ObservationWrapper):
    """Drops the entry `velocity`, or where all numbers are in one entry, those of CartPole's velocities."""

    CARTPOLE_PLACES = (0, 2)  # position of the cart, angle of the pole

    def __init__(self, env: gymnasium.Env) -> None:
        """Hide the velocities of `env`."""
        super().__init__(env)
        assert isinstance(env.observation_space, spaces.Dict)
        parts = dict(env.observation_space.spaces)
        self._whole = "velocity" not in parts
        if self._whole:
            box = parts["observation"]
            assert isinstance(box, spaces.Box)
            places = list(self.CARTPOLE_PLACES)
            parts = {"observation": spaces.Box(box.low[places], box.high[places], dtype=np.float32)}
        else:
            del parts["velocity"]
        self.observation_space = spaces.Dict(parts)

    def observation(self, observation: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """What is left."""
        if self._whole:
            return {"observation": observation["observation"][list(self.CARTPOLE_PLACES)]}
        return {key: value for key, value in observation.items() if key != "velocity"}


class Seeded(gymnasium.Wrapper):
    """A wrapper with random numbers of its own, so that what it draws does not change the environment's episodes."""

    STREAM: ClassVar[int]  # tells the random numbers of one kind of wrapper from those of another

    def __init__(self, env: gymnasium.Env) -> None:
        """Begin with an arbitrary seed."""
        super().__init__(env)
        self.rng = np.random.default_rng()

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """Begin an episode, and with a seed the random numbers too."""
        if seed is not None:
            self.rng = np.random.default_rng([seed, self.STREAM])
        observation, info = self.env.reset(seed=seed, options=options)
        return self.change(observation), info

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        """Take a step."""
        observation, reward, terminated, truncated, info = self.env.step(action)
        return self.change(observation), reward, terminated, truncated, info

    def change(self, observation: dict[str, Any]) -> dict[str, Any]:
        """What is shown instead of an observation."""
        raise NotImplementedError


class Noise(Seeded):
    """Adds Gaussian noise to every number."""

    STREAM = 1

    def __init__(self, env: gymnasium.Env, deviation: float) -> None:
        """Blur `env` by a standard deviation; its numbers are unbounded from then on."""
        super().__init__(env)
        self._deviation = deviation
        self.observation_space = unbounded(env.observation_space)

    def change(self, observation: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Another draw for each number."""
        return {
            key: value + self._deviation * self.rng.standard_normal(value.shape, np.float32)
            for key, value in observation.items()
        }


class Flicker(Seeded):
    """Shows zeros in place of the whole observation, with a fixed probability at each step."""

    STREAM = 2

    def __init__(self, env: gymnasium.Env, probability: float) -> None:
        """Let `env` flicker."""
        super().__init__(env)
        self._probability = probability
        self.observation_space = unbounded(env.observation_space)

    def change(self, observation: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Everything or nothing."""
        if self.rng.random() >= self._probability:
            return observation
        return {key: np.zeros_like(value) for key, value in observation.items()}


class EarlyCue(Seeded):
    """Draws the walker's target speed in each episode and shows it as `cue` in the first steps only.

    The cue is 0 for none, then 1, 2, 3 for the speeds to stand, walk and run at.
    """

    STREAM = 3

    def __init__(self, env: gymnasium.Env, steps: int) -> None:
        """Show the speed for `steps` observations."""
        super().__init__(env)
        assert isinstance(env.observation_space, spaces.Dict)
        self.observation_space = spaces.Dict({**env.observation_space, "cue": spaces.Discrete(1 + len(SPEEDS))})
        self._steps = steps

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """Begin an episode at another speed."""
        self._shown = 0
        self._speed: int | None = None
        return super().reset(seed=seed, options=options)

    def change(self, observation: dict[str, Any]) -> dict[str, Any]:
        """Adds the cue."""
        if self._speed is None:
            self._speed = int(self.rng.integers(len(SPEEDS)))
            # The suite keeps it where its reward reads it, and offers no way to set it.
            suite: Any = self.env.unwrapped
            suite.task._move_speed = SPEEDS[self._speed]
        self._shown += 1
        return {**observation, "cue": 1 + self._speed if self._shown <= self._steps else 0}


def unbounded(space: spaces.Space) -> spaces.Dict:
    """A Dict of Box spaces without their bounds."""
    assert isinstance(space, spaces.Dict)
    return spaces.Dict({key: spaces.Box(-np.inf, np.inf, part.shape, np.float32) for key, part in space.items()})
