"""Environments behind one interface: `make` builds any of them by name."""

from collections.abc import Callable, Mapping
from importlib.metadata import entry_points
from typing import Any

import gymnasium
from gymnasium.wrappers import TimeLimit

from envs import atari, bsuite, crafter, dmc, gym, memory_maze, minigrid, popgym, probe
from envs.actions import UnitAction
from envs.errors import EnvError, EnvironmentFailure, failing
from envs.images import DrawnImage, ResizedImages
from envs.wrappers import ActionRepeat, DictObservation

__all__ = ["EnvError", "EnvironmentFailure", "make"]

ADAPTERS = {
    "dmc": dmc,
    "gym": gym,
    "atari100k": atari,
    "atari": atari,
    "crafter": crafter,
    "bsuite": bsuite,
    "probe": probe,
    "popgym": popgym,
    "minigrid": minigrid,
    "memorymaze": memory_maze,
}

IMAGE_SIZE = 64  # pixels, of images that are drawn at whatever size is asked for

ENTRY_POINTS = "dreamer_that_remembers.envs"
"""The group of entry points by which other packages add suites: `suite = "module:make"`, a function like `gym.make`."""


def make(
    name: str,
    *,
    action_repeat: int = 1,
    time_limit: int | None = None,
    render: bool = False,
    options: Mapping[str, Any] | None = None,
) -> gymnasium.Env:
    """Build the environment `name`, with the spaces that the agent understands.

    Args:
        name: `dmc_<domain>_<task>` for dm_control, with `_vision` at its end to see it in pictures; `gym_<Id>` for any
            id of gymnasium (`gym_<module>:<Id>` imports a module first, which may register the id);
            `probe_<task>_<level>` for a probe of memory; `atari100k_<game>` or `atari_<game>` (one adapter, other
            presets), `crafter_reward`, `bsuite_<experiment>_<number>`, `popgym_<Name>`, `minigrid_<Name>` and
            `memorymaze_<size>` for those suites; and `<suite>_<...>` for a suite that an installed package adds.
        action_repeat: how many steps of the environment one action lasts; their rewards are summed.
        time_limit: agent steps (after the repeat) until an episode is truncated; None: the environment's own.
        render: whether `render()` returns uint8 images (H, W, 3).
        options: the environment's own, as `{"gap": 2}` of a probe; which there are is the environment's matter. And
            `image_size`, for all: the height and width, in pixels, to which images are resized.

    Returns:
        An environment whose observation space is a Dict of images (a uint8 Box of height, width, channels), 1-D float32
        Box, Discrete and 1-D MultiDiscrete, and whose action space is a float32 Box(-1, 1) of shape (A,), a Discrete, a
        1-D MultiDiscrete or a `envs.actions.Hybrid` of both. In the last step of an episode,
        `info["episode_metrics"]` may hold numbers by name, which a run logs as episode/<name>.

    Raises:
        EnvError: unknown name, missing package, unsupported space, a number out of range, or an option refused.
        EnvironmentFailure: its constructor raised.
    """
    own = dict(options or {})
    size = own.pop("image_size", None)
    for key, value in (("action_repeat", action_repeat), ("time_limit", time_limit), ("image_size", size)):
        if value is not None and (not isinstance(value, int) or value < 1):
            raise EnvError(f"{key} of environment {name!r} is {value!r}; give an integer of 1 or more")
    suite, _, task = name.partition("_")
    make_task = _maker(suite)
    if make_task is None or not task:
        raise EnvError(
            f"unknown environment {name!r}: names are dmc_<domain>_<task>, gym_<Id>, probe_<task>_<level> or"
            f" <suite>_<name> with one of {', '.join(ADAPTERS)}, as in dmc_walker_walk or gym_CartPole-v1"
        )
    with failing(f"environment {name!r}", "when it was made", name=name):
        env = make_task(task, own_time_limit=time_limit is None, render=render, options=own)
    try:
        env = UnitAction(DictObservation(env))
    except EnvError as error:
        env.close()
        raise EnvError(f"environment {name!r}: {error}") from None
    if action_repeat > 1:
        env = ActionRepeat(env, action_repeat)
    if getattr(env.unwrapped, "drawn", False):
        env = DrawnImage(env, size or IMAGE_SIZE)
    elif size is not None:
        env = ResizedImages(env, size)
    return TimeLimit(env, time_limit) if time_limit is not None else env


def _maker(suite: str) -> Callable[..., gymnasium.Env] | None:
    """The function that makes environments of a suite: of this package, or of one that is installed beside it."""
    if suite in ADAPTERS:
        return ADAPTERS[suite].make
    for entry in entry_points(group=ENTRY_POINTS, name=suite):
        try:
            return entry.load()
        except (ImportError, AttributeError) as error:
            raise EnvError(f"environments {suite}_...: {entry.value} cannot be imported ({error})") from None
    return None
