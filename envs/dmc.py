"""Tasks of the dm_control suite as gymnasium environments, seen by their state or in pictures."""

from collections.abc import Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces

from envs.errors import EnvError, nearest
from envs.options import Options, parse
from envs.rendering import cannot_draw, load_suite, may_draw

FRAME_SIZE = 256  # height and width of a frame for a video, pixels


@dataclass(frozen=True, kw_only=True)
class View(Options):
    """Options of a task that is seen in pictures."""

    fast_rendering: bool = False  # no shadows, reflections and smoothing of edges: for a CPU that draws
    state: bool = False  # show the state beside the picture


def make(task: str, *, own_time_limit: bool, render: bool, options: Mapping[str, Any]) -> gymnasium.Env:
    """Build `<domain>_<task>` of the suite; without its own time limit an episode may last forever.

    `<domain>_<task>_vision` shows pictures instead of the state, and has the options of `View`.

    Raises:
        EnvError: dm_control is missing or broken, the task or an option is unknown, or rendering is not possible.
    """
    plain = task.removesuffix("_vision")
    view = None if plain == task else parse(View, options, f"dmc_{task}")
    if view is None and options:
        raise EnvError(f"environment 'dmc_{task}' has no options, and {', '.join(options)} was given")
    suite = load_suite(render or view is not None)
    known = {f"{domain}_{name}": (domain, name) for domain, name in suite.ALL_TASKS}
    if plain not in known:
        hint = nearest(plain, known, "dmc_") or "; names are dmc_<domain>_<task>, as in dmc_walker_walk"
        raise EnvError(f"unknown environment 'dmc_{task}'{hint}")
    return Suite(suite, *known[plain], own_time_limit, render, view)


def preload(task: str) -> list[str]:
    """Modules worth importing once before the processes of many environments are forked.

    What draws is not among them: a process must not share a connection to the GPU with the one it was forked from.
    """
    return ["envs.dmc"] if task.endswith("_vision") or may_draw() else ["envs.dmc", "dm_control.suite"]


class Suite(gymnasium.Env):
    """One task. Observations are a Dict of float32 vectors, scalars of shape (1,); rewards are in [0, 1].

    Attributes:
        drawn: whether it is to be seen in pictures, which `draw` makes; the Dict may then be empty.
    """

    def __init__(
        self, suite: ModuleType, domain: str, task: str, own_time_limit: bool, render: bool, view: View | None
    ) -> None:
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
        self._shown: dict[str, spaces.Space] = {
            key: spaces.Box(-np.inf, np.inf, (int(np.prod(spec.shape)),), np.float32)
            for key, spec in self._env.observation_spec().items()
            if view is None or view.state
        }
        self.observation_space = spaces.Dict(self._shown)
        self.drawn = view is not None
        self._drawing: dict[str, Any] = {}
        if view is not None:
            self._prepare_drawing(view.fast_rendering)

    def _prepare_drawing(self, fast: bool) -> None:
        """Choose how to draw, and do it once: what is missing should be known now and not amid a run."""
        if fast:
            quality = self._env.physics.model.vis.quality
            quality.shadowsize = quality.offsamples = 0
            self._drawing = {"render_flag_overrides": {"shadow": False, "reflection": False}}
            self.metadata["note"] = "rendering without shadows and reflections: not quite the published pictures"
        else:
            self.metadata["note"] = (
                "rendering as published; where a CPU draws, env.options.fast_rendering=true is faster"
            )
        try:
            self.draw(64)
        except Exception as error:  # of many kinds, as there are many ways to have no GL
            raise cannot_draw(error) from None

    def draw(self, size: int) -> np.ndarray:
        """What a camera sees now, uint8 (size, size, 3)."""
        image = self._env.physics.render(size, size, camera_id=self._camera, **self._drawing)
        return np.ascontiguousarray(image)  # it is upside down in memory

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
        return self.draw(FRAME_SIZE)

    def close(self) -> None:
        """Free the simulation."""
        self._env.close()

    def _vectors(self, observation: dict[str, Any]) -> dict[str, np.ndarray]:
        return {key: np.array(observation[key], np.float32).reshape(-1) for key in self._shown}
