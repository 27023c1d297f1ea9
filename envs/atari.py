"""Games of the Atari 2600 on ale-py, as in atari100k_pong and atari_ms_pacman: what the screen shows, frame by frame.

Presets choose a protocol: `atari100k` and `atari` are one adapter with other options and repeats.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces

from envs.errors import EnvError, nearest, one_line
from envs.images import as_image, image_shape
from envs.options import Options, option, parse

INSTALL = "pip install ale-py==0.12.1"
LONGEST = 108_000  # frames, half an hour of play, after which an episode is cut off


@dataclass(frozen=True, kw_only=True)
class Protocol(Options):
    """Options of a game; the defaults are those of Atari 100k."""

    gray: bool = False  # shades instead of colours
    sticky: float = option(0.0, 0, 1)  # probability that the console repeats its last action instead
    all_actions: bool = False  # all 18, or those that the game knows
    noops: int = option(30, 0)  # an episode begins with up to so many frames without action


def make(task: str, *, own_time_limit: bool, render: bool, options: Mapping[str, Any]) -> gymnasium.Env:
    """Build the game `task`, a name like ms_pacman; options are those of `Protocol`.

    Raises:
        EnvError: the package is missing, or the game or an option is unknown or not allowed.
    """
    try:
        import ale_py
        from ale_py import roms
    except ImportError as error:
        raise EnvError(f"game {task!r} of Atari misses a package ({one_line(error)}); {INSTALL}") from None
    gymnasium.register_envs(ale_py)
    ale_py.ALEInterface.setLoggerMode(ale_py.LoggerMode.Error)
    known = {game: identity(game) for game in roms.get_all_rom_ids() if identity(game) in gymnasium.registry}
    if task not in known:
        hint = nearest(task, known, "") or f"; games are {', '.join(sorted(known))}"
        raise EnvError(f"unknown game {task!r} of Atari{hint}")
    protocol = parse(Protocol, options, f"atari_{task}")
    env = gymnasium.make(
        known[task],
        obs_type="grayscale" if protocol.gray else "rgb",
        frameskip=1,
        repeat_action_probability=protocol.sticky,
        full_action_space=protocol.all_actions,
        max_num_frames_per_episode=LONGEST if own_time_limit else 0,
        render_mode="rgb_array" if render else None,
        disable_env_checker=True,  # check_env explains more
    )
    return Screen(env, protocol.noops)


def identity(game: str) -> str:
    """What gymnasium calls a game."""
    return f"ALE/{''.join(word.capitalize() for word in game.split('_'))}-v5"


def preload(task: str) -> list[str]:
    """Modules worth importing once before the processes of many environments are forked."""
    return ["envs.atari", "ale_py"]


class Screen(gymnasium.Wrapper):
    """Observation `image`: of two frames in a row the brighter pixels, since consoles draw some things in turns.

    So an action that is repeated shows what its last two frames showed.
    """

    def __init__(self, env: gymnasium.Env, noops: int) -> None:
        """Watch `env`; an episode begins with one to `noops` frames without action."""
        super().__init__(env)
        self._noops = noops
        self._shape = env.observation_space.shape or ()
        self.observation_space = spaces.Dict(image=spaces.Box(0, 255, image_shape(self._shape), np.uint8))
        self._before = np.zeros(image_shape(self._shape), np.uint8)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """Start an episode; the same seed starts the same one."""
        frame, _ = self.env.reset(seed=seed)
        for _ in range(int(self.np_random.integers(1, self._noops + 1)) if self._noops else 0):
            frame, _, terminated, truncated, _ = self.env.step(0)
            if terminated or truncated:
                frame, _ = self.env.reset()
        self._before = as_image(frame, self._shape)
        return {"image": self._before.copy()}, {}

    def step(self, action: Any) -> tuple[dict[str, np.ndarray], float, bool, bool, dict[str, Any]]:
        """Play one frame."""
        frame, reward, terminated, truncated, _ = self.env.step(action)
        before, self._before = self._before, as_image(frame, self._shape)
        return {"image": np.maximum(before, self._before)}, float(reward), bool(terminated), bool(truncated), {}
