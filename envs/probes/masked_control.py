"""Control without velocities, optionally behind noise and flicker, or at a speed that is only told at the start.

Native rewards, so that returns compare with those of full observations. A score needs the return with full
observations, of the same agent: (R - R_random) / (R_full - R_random), with RANDOM_RETURN below.
"""

from dataclasses import dataclass, field
from typing import Any, ClassVar

import gymnasium

from envs import dmc, gym
from envs.errors import EnvError
from envs.probes.hiding import EarlyCue, Flicker, HideVelocity, Noise
from envs.probes.task import Options, option
from envs.wrappers import DictObservation

RANDOM_RETURN = {"walker": 31.0, "cheetah": 3.0, "cartpole": 29.0, "pendulum": 0.0, "balance": 22.0}
"""Mean returns of uniformly random actions; of `balance`, CartPole-v1, over 10,000 episodes."""


@dataclass(frozen=True, kw_only=True)
class MaskedControl(Options):
    """A control task and what is hidden of it."""

    LEVELS: ClassVar[dict[str, dict[str, Any]]] = {
        "easy": {},
        "base": {"flicker": 0.2, "obs_noise": 0.1},
        "hard": {"flicker": 0.5, "obs_noise": 0.3},
    }
    TASKS: ClassVar[dict[str, str]] = {
        "walker": "walker_walk",
        "cheetah": "cheetah_run",
        "cartpole": "cartpole_swingup",
        "pendulum": "pendulum_swingup",
        "balance": "CartPole-v1",
    }

    body: str = field(default="walker")
    flicker: float = option(0.0, 0, 1)  # probability that an observation is all zeros
    obs_noise: float = option(0.0, 0)  # standard deviation of Gaussian noise on every number
    velocities: bool = option(False)  # whether they are shown after all
    cue_steps: int = option(0, 0)  # steps that show a target speed, drawn in each episode; 0: the task's own speed

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.body not in self.TASKS:
            raise EnvError(f"option body is {self.body!r}; allowed is {', '.join(self.TASKS)}")
        if self.cue_steps and self.body != "walker":
            raise EnvError(f"option cue_steps is {self.cue_steps}; only the body walker has a speed to choose")

    def make(self, own_time_limit: bool, render: bool) -> gymnasium.Env:
        """The environment, with a Dict of float32 vectors, and `cue` Discrete with an early cue."""
        adapter = gym if self.body == "balance" else dmc
        task = self.TASKS[self.body]
        env: gymnasium.Env = adapter.make(task, own_time_limit=own_time_limit, render=render, options={})
        env = DictObservation(env)
        if not self.velocities:
            env = HideVelocity(env)
        if self.obs_noise:
            env = Noise(env, self.obs_noise)
        if self.flicker:
            env = Flicker(env, self.flicker)
        return EarlyCue(env, self.cue_steps) if self.cue_steps else env
