"""Tasks of the dm_control suite as gymnasium environments, with state observations."""

import os
from collections.abc import Mapping
from types import ModuleType
from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces

from envs.errors import EnvError, nearest, one_line

IMAGE_SIZE = 256  # height and width of a rendered frame, pixels


def make(task: str, *, own_time_limit: bool, render: bool, options: Mapping[str, Any]) -> gymnasium.Env:
    """Build `<domain>_<task>` of the suite; without its own time limit an episode may last forever.

    Raises:
        EnvError: dm_control is missing or broken, the task is unknown, rendering is not possible, or there are options.
    """
    if options:
        raise EnvError(f"environment 'dmc_{task}' has no options, and {', '.join(options)} was given")
    suite = load_suite(render)
    known = {f"{domain}_{name}": (domain, name) for domain, name in suite.ALL_TASKS}
    if task not in known:
        hint = nearest(task, known, "dmc_") or "; names are dmc_<domain>_<task>, as in dmc_walker_walk"
        raise EnvError(f"unknown environment 'dmc_{task}'{hint}")
    return Suite(suite, *known[task], own_time_limit, render)


def preload(task: str) -> list[str]:
    """Modules worth importing once before the processes of many environments are forked."""
    return ["envs.dmc", "dm_control.suite"]


def load_suite(render: bool) -> ModuleType:
    """Import dm_control.suite; a machine without a display must choose its GL backend before that import."""
    backend = os.environ.setdefault("MUJOCO_GL", "egl" if render else "disabled")
    if render and backend.lower() in ("disabled", "disable", "off", "false", "0"):
        raise EnvError(
            f"dm_control cannot render with MUJOCO_GL={backend} in this process; "
            "set MUJOCO_GL=egl before starting Python"
        )
    try:
        from dm_control import suite
    except ImportError as error:
        raise EnvError(
            f"dm_control cannot be imported ({one_line(error)}); pip install dm-control==1.0.50 mujoco==3.17.0"
        ) from None
    except AttributeError as error:  # what PyOpenGL raises where the GL library is missing
        raise EnvError(
            f"dm_control finds no GL library for MUJOCO_GL={backend} ({one_line(error)}); "
            "apt-get install libegl1 libgl1, or set MUJOCO_GL=disabled and do without rendering"
        ) from None
    return suite


class Suite(gymnasium.Env):
    """One task. Observations are a Dict of float32 vectors, scalars of shape (1,); rewards are in [0, 1]."""

    def __init__(self, suite: ModuleType, domain: str, task: str, own_time_limit: bool, render: bool) -> None:
        """Load the task; `random` only fixes the model here, every seeded reset seeds the task anew."""
        arguments: dict[str, Any] = {"random": 0}
        if not own_time_limit:
            arguments["time_limit"] = float("inf")
        self._env = suite.load(domain, task, task_kwargs=arguments)
        self._camera = 2 if domain == "quadruped" else 0  # the suite's views that follow the body
        self._seeded = False
        self.metadata = {"render_modes": ["rgb_array"], "render_fps": round(1 / self._env.control_timestep())}
        self.render_mode = "rgb_array" if render else None
        action = self._env.action_spec()
        self.action_space = spaces.Box(action.minimum, action.maximum, action.shape, np.float64)
        self.observation_space = spaces.Dict(
            {
                key: spaces.Box(-np.inf, np.inf, (int(np.prod(spec.shape)),), np.float32)
                for key, spec in self._env.observation_spec().items()
            }
        )

    @property
    def task(self) -> Any:
        """The suite's own task, which gives the rewards."""
        return self._env.task

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """Start an episode; the same seed starts the same one."""
        super().reset(seed=seed)
        if seed is not None or not self._seeded:
            self._env.task.random.seed(int(self.np_random.integers(2**32)))
            self._seeded = True
        return self._vectors(self._env.reset().observation), {}

    def step(self, action: np.ndarray) -> tuple[dict[str, np.ndarray], float, bool, bool, dict[str, Any]]:
        """Take one control step. The suite marks an end by the task's own rules with a discount of 0."""
        step = self._env.step(action)
        terminated = bool(step.last() and step.discount == 0)
        truncated = step.last() and not terminated
        return self._vectors(step.observation), float(step.reward), terminated, truncated, {}

    def render(self) -> np.ndarray:
        """Return the current frame, uint8 (256, 256, 3)."""
        return self._env.physics.render(IMAGE_SIZE, IMAGE_SIZE, camera_id=self._camera)

    def close(self) -> None:
        """Free the simulation."""
        self._env.close()

    @staticmethod
    def _vectors(observation: dict[str, Any]) -> dict[str, np.ndarray]:
        return {key: np.array(value, np.float32).reshape(-1) for key, value in observation.items()}
