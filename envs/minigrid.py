"""MiniGrid's tasks, as in minigrid_MemoryS13: what the agent sees of the grid, as categories or as a picture."""

from collections.abc import Mapping
from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces

from envs import gym
from envs.errors import EnvError, nearest, one_line

INSTALL = "pip install minigrid==3.2.0"


def make(task: str, *, own_time_limit: bool, render: bool, options: Mapping[str, Any]) -> gymnasium.Env:
    """Build MiniGrid-<task>-v0; options are arguments of the environment, and `pixels: true` to see a picture.

    Raises:
        EnvError: the package is missing, the task is unknown, or an option is refused.
    """
    try:
        from minigrid.core import constants
        from minigrid.wrappers import RGBImgPartialObsWrapper
    except ImportError as error:
        raise EnvError(f"environment 'minigrid_{task}' misses a package ({one_line(error)}); {INSTALL}") from None
    name = f"MiniGrid-{task}-v0"
    if name not in gymnasium.registry:
        known = [each[len("MiniGrid-") : -len("-v0")] for each in gymnasium.registry if each.startswith("MiniGrid-")]
        hint = nearest(task, known, "minigrid_") or ", as in minigrid_MemoryS13"
        raise EnvError(f"unknown environment 'minigrid_{task}'{hint}")
    own = dict(options)
    pixels = own.pop("pixels", False)
    if not isinstance(pixels, bool):
        raise EnvError(f"option pixels of environment 'minigrid_{task}' is {pixels!r}; it is true or false")
    env = gym.make(name, own_time_limit=own_time_limit, render=render, options=own)
    if pixels:
        return Picture(RGBImgPartialObsWrapper(env))
    # Objects, colours, and states of a door or directions, of which there are four.
    sizes = (1 + max(constants.OBJECT_TO_IDX.values()), len(constants.COLOR_TO_IDX), 4)
    return Cells(env, sizes)


def preload(task: str) -> list[str]:
    """Modules worth importing once before the processes of many environments are forked."""
    return ["envs.minigrid", "minigrid"]


class Cells(gymnasium.ObservationWrapper):
    """Observations `cells` (49 * 3,) MultiDiscrete and `direction` Discrete(4); the mission, a text, is left out."""

    def __init__(self, env: gymnasium.Env, sizes: tuple[int, int, int]) -> None:
        """Read the codes of `env` as categories of these sizes."""
        super().__init__(env)
        assert isinstance(env.observation_space, spaces.Dict)
        height, width, _ = env.observation_space["image"].shape or ()
        cells = spaces.MultiDiscrete(np.tile(sizes, height * width))
        self.observation_space = spaces.Dict(cells=cells, direction=spaces.Discrete(4))

    def observation(self, observation: dict[str, Any]) -> dict[str, Any]:
        """The codes in a row."""
        return {"cells": observation["image"].reshape(-1).astype(np.int64), "direction": observation["direction"]}


class Picture(gymnasium.ObservationWrapper):
    """Observations `image` uint8 (56, 56, 3) and `direction` Discrete(4); the mission, a text, is left out."""

    def __init__(self, env: gymnasium.Env) -> None:
        """Leave the picture of `env` as it is."""
        super().__init__(env)
        assert isinstance(env.observation_space, spaces.Dict)
        image = env.observation_space["image"]
        assert image.shape is not None
        self.observation_space = spaces.Dict(
            image=spaces.Box(0, 255, image.shape, np.uint8), direction=spaces.Discrete(4)
        )

    def observation(self, observation: dict[str, Any]) -> dict[str, Any]:
        """What is shown of it."""
        return {"image": observation["image"], "direction": observation["direction"]}
