"""The environment that a configuration asks for."""

import gymnasium

import envs
from agent.schema import Config


def make_env(config: Config, render: bool = False) -> gymnasium.Env:
    """One environment as the agent sees it.

    Args:
        config: whose section `env` is read, as `agent.resolve("dmc_walker")` gives it.
        render: whether `render()` returns uint8 images (H, W, 3).

    Returns:
        A gymnasium environment. Observations are a flat dict of fp32 vectors (k,) and integers, () or (k,); an action
        is fp32 (A,) in [-1, 1], an integer, or integers (k,). One step lasts `env.action_repeat` frames.

    Raises:
        EnvError: unknown name, missing package, unsupported space, or an option refused.
    """
    env = config.env
    return envs.make(
        env.name, action_repeat=env.action_repeat, time_limit=env.time_limit, render=render, options=env.options
    )  # fmt: skip
