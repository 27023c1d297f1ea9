"""Environments behind one interface: `make` builds any of them by name."""

import gymnasium
from gymnasium.wrappers import TimeLimit

from envs import dmc, gym
from envs.errors import EnvError, EnvironmentFailure
from envs.wrappers import ActionRepeat, DictObservation, UnitAction

__all__ = ["EnvError", "EnvironmentFailure", "make"]

ADAPTERS = {"dmc": dmc, "gym": gym}


def make(name: str, *, action_repeat: int = 1, time_limit: int | None = None, render: bool = False) -> gymnasium.Env:
    """Build the environment `name`, with the spaces that the agent understands.

    Args:
        name: `dmc_<domain>_<task>` for dm_control, `gym_<Id>` for any id of gymnasium
            (`gym_<module>:<Id>` imports a module first, which may register the id).
        action_repeat: how many steps of the environment one action lasts; their rewards are summed.
        time_limit: agent steps (after the repeat) until an episode is truncated; None: the environment's own.
        render: whether `render()` returns uint8 images (H, W, 3).

    Returns:
        An environment whose observation space is a Dict of 1-D float32 Box, Discrete and 1-D MultiDiscrete,
        and whose action space is a float32 Box(-1, 1) of shape (A,), a Discrete or a 1-D MultiDiscrete.

    Raises:
        EnvError: unknown name, missing package, unsupported space, or a number out of range.
    """
    for key, value in (("action_repeat", action_repeat), ("time_limit", time_limit)):
        if value is not None and value < 1:
            raise EnvError(f"{key} of environment {name!r} is {value}; give an integer of 1 or more")
    suite, _, task = name.partition("_")
    if suite not in ADAPTERS or not task:
        raise EnvError(
            f"unknown environment {name!r}: names are dmc_<domain>_<task> or gym_<Id>,"
            " as in dmc_walker_walk or gym_CartPole-v1"
        )
    env = ADAPTERS[suite].make(task, own_time_limit=time_limit is None, render=render)
    try:
        env = UnitAction(DictObservation(env))
    except EnvError as error:
        env.close()
        raise EnvError(f"environment {name!r}: {error}") from None
    if action_repeat > 1:
        env = ActionRepeat(env, action_repeat)
    return TimeLimit(env, time_limit) if time_limit is not None else env
