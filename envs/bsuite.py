"""The behaviour suite (Osband et al., 2020), as in bsuite_memory_len_5: setting 5 of the experiment memory_len."""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces

from envs.errors import EnvError, nearest, one_line

INSTALL = "pip install bsuite==0.3.6"


def make(task: str, *, own_time_limit: bool, render: bool, options: Mapping[str, Any]) -> gymnasium.Env:
    """Build `<experiment>_<number>`; there are no options, and episodes always end by the experiment's rules.

    Raises:
        EnvError: the package is missing, the experiment or its setting is unknown, its data cannot be fetched (mnist
            is downloaded), or there are options, or rendering is asked for.
    """
    try:
        from bsuite import bsuite as experiments
        from bsuite import sweep
    except ImportError as error:
        raise EnvError(f"environment 'bsuite_{task}' misses a package ({one_line(error)}); {INSTALL}") from None
    experiment, _, number = task.rpartition("_")
    setting = f"{experiment}/{number}"
    if setting not in sweep.SETTINGS:
        known = [name.replace("/", "_") for name in sweep.SETTINGS]
        hint = nearest(task, known, "bsuite_") or "; names are bsuite_<experiment>_<number>, as in bsuite_memory_len_5"
        raise EnvError(f"unknown environment 'bsuite_{task}'{hint}")
    if options or render:
        what = "does not render images" if render else f"has no options, and {', '.join(options)} was given"
        raise EnvError(f"environment 'bsuite_{task}' {what}")
    build = experiments.EXPERIMENT_NAME_TO_ENVIRONMENT[experiment]
    try:
        return Experiment(build, sweep.SETTINGS[setting])
    except OSError as error:
        raise EnvError(f"environment 'bsuite_{task}' cannot be made: {one_line(error)}") from None


def preload(task: str) -> list[str]:
    """Modules worth importing once before the processes of many environments are forked."""
    return ["envs.bsuite", "bsuite.bsuite"]


class Experiment(gymnasium.Env):
    """One setting: a float32 array, a choice, and an end by the experiment's own rules."""

    def __init__(self, build: Callable[..., Any], settings: Mapping[str, Any]) -> None:
        """Build it once to see its spaces."""
        self._build, self._settings = build, settings
        self._takes_seed = "seed" in inspect.signature(build).parameters  # the others draw nothing
        self._begin(0)
        seen = self._env.observation_spec()
        self.observation_space = spaces.Box(-np.inf, np.inf, seen.shape, np.float32)
        self.action_space = spaces.Discrete(int(self._env.action_spec().num_values))

    def _begin(self, seed: int) -> None:
        drawn = {"seed": seed} if self._takes_seed else {}
        self._env = self._build(**{**self._settings, **drawn})

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Start an episode; the same seed starts the same one."""
        super().reset(seed=seed)
        if seed is not None:
            self._begin(int(self.np_random.integers(2**31)))
        return np.array(self._env.reset().observation, np.float32), {}

    def step(self, action: Any) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        """Take a step."""
        step = self._env.step(int(action))
        terminated = bool(step.last() and step.discount == 0)
        truncated = bool(step.last()) and not terminated
        return np.array(step.observation, np.float32), float(step.reward), terminated, truncated, {}
