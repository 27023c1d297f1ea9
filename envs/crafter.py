"""Crafter (Hafner, 2021), as in crafter_reward: gather, build and survive, from pictures alone."""

from collections.abc import Mapping
from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces

from envs.errors import EnvError, one_line
from envs.images import picture

INSTALL = "pip install crafter==1.8.3"
TASKS = {"reward": True, "noreward": False}
LENGTH = 10_000  # steps after which an episode is cut off
SIZE = 64  # pixels
FRAME_SIZE = 256  # of a frame for a video


def make(task: str, *, own_time_limit: bool, render: bool, options: Mapping[str, Any]) -> gymnasium.Env:
    """Build `reward`, or `noreward` for an agent that is to explore by itself; there are no options.

    Raises:
        EnvError: the package is missing, the task is unknown, or there are options.
    """
    if task not in TASKS:
        raise EnvError(f"unknown environment 'crafter_{task}'; there are crafter_reward and crafter_noreward")
    if options:
        raise EnvError(f"environment 'crafter_{task}' has no option but image_size, and {', '.join(options)} was given")
    try:
        import crafter  # noqa: F401
    except ImportError as error:
        raise EnvError(f"environment 'crafter_{task}' misses a package ({one_line(error)}); {INSTALL}") from None
    return Crafter(TASKS[task], LENGTH if own_time_limit else None, render)


def preload(task: str) -> list[str]:
    """Modules worth importing once before the processes of many environments are forked."""
    return ["envs.crafter", "crafter"]


class Crafter(gymnasium.Env):
    """Observation `image` uint8 (64, 64, 3), 17 actions, +1 for each achievement's first time, +-0.1 for health.

    At its end an episode tells `achievements`, how many of the 22 it had, and of each by its name whether (1.0) or not:
    the benchmark's score is the geometric mean over achievements of 1 + their rates in percent, less 1. The same seed
    builds the same world; which creatures vanish in it depends on the order of sets, and differs between processes.
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": 10}  # noqa: RUF012 - gymnasium's own form

    def __init__(self, reward: bool, length: int | None, render: bool) -> None:
        """Build a first world."""
        self._arguments = {"size": (SIZE, SIZE), "reward": reward, "length": length}
        self.render_mode = "rgb_array" if render else None
        self._build(0)
        self.action_space = spaces.Discrete(len(self._env.action_names))
        self.observation_space = spaces.Dict(image=picture(SIZE, 3))

    def _build(self, seed: int) -> None:
        import crafter

        self._env = crafter.Env(seed=seed, **self._arguments)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """Build another world."""
        super().reset(seed=seed)
        if seed is not None:
            self._build(int(self.np_random.integers(2**31)))
        return {"image": self._env.reset()}, {}

    def step(self, action: Any) -> tuple[dict[str, np.ndarray], float, bool, bool, dict[str, Any]]:
        """Act; death is an end by the game's rules, the time limit is none."""
        image, reward, over, info = self._env.step(int(action))
        dead = info["discount"] == 0
        told = {}
        if over:
            had = {name: float(count > 0) for name, count in info["achievements"].items()}
            told = {"episode_metrics": {"achievements": sum(had.values()), **had}}
        return {"image": image}, float(reward), bool(dead), bool(over and not dead), told

    def render(self) -> np.ndarray:
        """Return the current frame, uint8 (256, 256, 3)."""
        return self._env.render((FRAME_SIZE, FRAME_SIZE))
