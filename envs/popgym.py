"""The tasks of POPGym (Morad et al., 2023) by the names of their classes, as in popgym_RepeatPreviousEasy."""

from collections.abc import Mapping
from typing import Any

import gymnasium
from gymnasium import spaces

from envs.errors import EnvError, nearest, one_line

INSTALL = "pip install popgym==1.0.7"  # earlier versions gave CountRecall and MineSweeper other returns


def make(task: str, *, own_time_limit: bool, render: bool, options: Mapping[str, Any]) -> gymnasium.Env:
    """Build the task; an option `rescale: false` keeps the suite's own rewards. Episodes always end by its rules.

    Raises:
        EnvError: the package is missing, the task or an option is unknown, or rendering is asked for.
    """
    try:
        from popgym import envs as suite
    except ImportError as error:
        raise EnvError(f"environment 'popgym_{task}' misses a package ({one_line(error)}); {INSTALL}") from None
    known = {kind.__name__: kind for kind in suite.ALL}
    if task not in known:
        hint = nearest(task, known, "popgym_") or f"; names are {', '.join(known)}"
        raise EnvError(f"unknown environment 'popgym_{task}'{hint}")
    if render:
        raise EnvError(f"environment 'popgym_{task}' does not render images; do without rendering")
    rescale = dict(options)
    if not isinstance(rescale.pop("rescale", True), bool) or rescale:
        raise EnvError(f"environment 'popgym_{task}' has one option, rescale, true or false; given was {dict(options)}")
    env: gymnasium.Env = Rewards(known[task](), options.get("rescale", True))
    return NamedParts(env) if isinstance(env.observation_space, spaces.Tuple) else env


def preload(task: str) -> list[str]:
    """Modules worth importing once before the processes of many environments are forked."""
    return ["envs.popgym", "popgym.envs"]


class Rewards(gymnasium.Wrapper):
    """Multiplies rewards by the steps of an episode, and tells the suite's own return as a metric `popgym_return`.

    The suite scales returns to [-1, 1], so that a step may pay 1/48; Dreamer divides returns by their spread only
    where that is above 1, and would not hear rewards so small over its entropy bonus.
    """

    def __init__(self, env: gymnasium.Env, rescale: bool) -> None:
        """Rescale `env`, or only tell its return."""
        super().__init__(env)
        base: Any = env.unwrapped
        steps = getattr(base, "max_episode_length", None) or base.deck.num_cards
        self._factor = float(steps) if rescale else 1.0
        self._return = 0.0

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """Start an episode."""
        self._return = 0.0
        return self.env.reset(seed=seed, options=options)

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        """Take a step."""
        observation, reward, terminated, truncated, info = self.env.step(action)
        self._return += float(reward)
        if terminated or truncated:
            info = {**info, "episode_metrics": {"popgym_return": self._return}}
        return observation, float(reward) * self._factor, bool(terminated), bool(truncated), info


class NamedParts(gymnasium.ObservationWrapper):
    """A Tuple of observations as a Dict with the entries part_0, part_1, and so on."""

    def __init__(self, env: gymnasium.Env) -> None:
        """Name the parts of `env`."""
        super().__init__(env)
        assert isinstance(env.observation_space, spaces.Tuple)
        self.observation_space = spaces.Dict(self.observation(env.observation_space.spaces))

    def observation(self, observation: Any) -> dict[str, Any]:
        """The parts by name."""
        return {f"part_{index}": part for index, part in enumerate(observation)}
