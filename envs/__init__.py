"""Environments behind one interface: `make` builds any of them by name."""

from collections.abc import Mapping
from typing import Any

import gymnasium
from gymnasium.wrappers import TimeLimit

from envs import dmc, gym, memory_maze, minigrid, popgym, probe
from envs.errors import EnvError, EnvironmentFailure, failing
from envs.wrappers import ActionRepeat, DictObservation, UnitAction

__all__ = ["EnvError", "EnvironmentFailure", "make"]

ADAPTERS = {"dmc": dmc, "gym": gym, "probe": probe, "popgym": popgym, "minigrid": minigrid, "memorymaze": memory_maze}


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
        name: `dmc_<domain>_<task>` for dm_control, `gym_<Id>` for any id of gymnasium
            (`gym_<module>:<Id>` imports a module first, which may register the id), `probe_<task>_<level>` for a
            probe of memory, `popgym_<Name>`, `minigrid_<Name>` and `memorymaze_<size>` for those suites.
        action_repeat: how many steps of the environment one action lasts; their rewards are summed.
        time_limit: agent steps (after the repeat) until an episode is truncated; None: the environment's own.
        render: whether `render()` returns uint8 images (H, W, 3).
        options: the environment's own, as `{"gap": 2}` of a probe; which there are is the environment's matter.

    Returns:
        An environment whose observation space is a Dict of 1-D float32 Box, Discrete and 1-D MultiDiscrete,
        and whose action space is a float32 Box(-1, 1) of shape (A,), a Discrete or a 1-D MultiDiscrete. In the last
        step of an episode, `info["episode_metrics"]` may hold numbers by name, which a run logs as episode/<name>.

    Raises:
        EnvError: unknown name, missing package, unsupported space, a number out of range, or an option refused.
        EnvironmentFailure: its constructor raised.
    """
    for key, value in (("action_repeat", action_repeat), ("time_limit", time_limit)):
        if value is not None and value < 1:
            raise EnvError(f"{key} of environment {name!r} is {value}; give an integer of 1 or more")
    suite, _, task = name.partition("_")
    if suite not in ADAPTERS or not task:
        raise EnvError(
            f"unknown environment {name!r}: names are dmc_<domain>_<task>, gym_<Id>, probe_<task>_<level>,"
            " popgym_<Name>, minigrid_<Name> or memorymaze_<size>, as in dmc_walker_walk or gym_CartPole-v1"
        )
    with failing(f"environment {name!r}", "when it was made", name=name):
        env = ADAPTERS[suite].make(task, own_time_limit=time_limit is None, render=render, options=options or {})
    try:
        env = UnitAction(DictObservation(env))
    except EnvError as error:
        env.close()
        raise EnvError(f"environment {name!r}: {error}") from None
    if action_repeat > 1:
        env = ActionRepeat(env, action_repeat)
    return TimeLimit(env, time_limit) if time_limit is not None else env
