"""Memory Maze (Pasukonis et al., 2022), as in memorymaze_9x9: find coloured objects again, from pictures alone."""

import functools
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces

from envs import rendering
from envs.errors import EnvError, one_line

INSTALL = "pip install memory-maze==1.0.3 gym==0.26.2"  # it imports gym and does not say so
SIZES = ("9x9", "11x11", "13x13", "15x15")


def make(task: str, *, own_time_limit: bool, render: bool, options: Mapping[str, Any]) -> gymnasium.Env:
    """Build the maze of a size; options are arguments of its task, as `good_visibility: true`. It always ends in time.

    Raises:
        EnvError: the package or the GL library is missing, the size is unknown, or an option is refused.
    """
    if task not in SIZES:
        raise EnvError(f"unknown environment 'memorymaze_{task}'; the sizes are {', '.join(SIZES)}")
    if render:
        raise EnvError(f"environment 'memorymaze_{task}' renders nothing but its observations; do without rendering")
    if not find_spec("memory_maze"):
        raise EnvError(f"environment 'memorymaze_{task}' misses a package; {INSTALL}")
    rendering.load_suite(render=True)  # observations are pictures: chooses a GL backend, or says what hinders it
    try:
        from memory_maze import tasks
    except ImportError as error:
        raise EnvError(f"environment 'memorymaze_{task}' misses a package ({one_line(error)}); {INSTALL}") from None
    try:
        return Maze(functools.partial(getattr(tasks, f"memory_maze_{task}"), image_only_obs=True, **options))
    except TypeError as error:
        raise EnvError(f"environment 'memorymaze_{task}' refuses {dict(options)}: {one_line(error)}") from None


def preload(task: str) -> list[str]:
    """Modules worth importing once before the processes of many environments are forked: nothing that draws."""
    return ["envs.memory_maze"]


class Maze(gymnasium.Env):
    """Observation `image` uint8 (64, 64, 3), six actions, +1 for each object reached when it is its turn."""

    def __init__(self, make_task: Callable[..., Any]) -> None:
        """Make the simulation."""
        self._make_task = make_task
        self._env = make_task(seed=0)
        self.action_space = spaces.Discrete(int(self._env.action_spec().num_values))
        shape = self._env.observation_spec().shape
        self.observation_space = spaces.Dict(image=spaces.Box(0, 255, shape, np.uint8))

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """Build another maze; the same seed builds the same one."""
        super().reset(seed=seed)
        if seed is not None:  # its parts keep random states of their own, which only a new one begins anew
            self._env.close()
            self._env = self._make_task(seed=int(self.np_random.integers(2**31)))
        return {"image": self._env.reset().observation.copy()}, {}

    def step(self, action: Any) -> tuple[dict[str, np.ndarray], float, bool, bool, dict[str, Any]]:
        """Act for a quarter of a second; the time limit is no end by the maze's rules."""
        step = self._env.step(int(action))
        terminated = bool(step.last() and step.discount == 0)
        observation = {"image": step.observation.copy()}
        return observation, float(step.reward), terminated, bool(step.last()) and not terminated, {}

    def close(self) -> None:
        """Free the simulation."""
        self._env.close()
