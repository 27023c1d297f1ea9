"""A Dreamer whose recurrent core is chosen by one word of config.

import agent
logdir = agent.train(agent.resolve("dmc_walker", core="ortho_mlstm"))
frames, returns = agent.read_metric(logdir, "episode/return")
player = agent.load(logdir)
print(agent.evaluate(player, episodes=10)["mean"])

docs/tutorial.md goes through all of it.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from agent.agent import Agent
    from agent.config import resolve
    from agent.cores import make_core
    from agent.deployment import export
    from agent.environment import make_env
    from agent.evaluation import evaluate, load, record
    from agent.results import read_metric
    from agent.training import train
    from agent.view.foresight import foresee
    from agent.view.what_if import what_if

_HOMES = {
    "Agent": "agent.agent",
    "evaluate": "agent.evaluation",
    "export": "agent.deployment",
    "foresee": "agent.view.foresight",
    "load": "agent.evaluation",
    "make_core": "agent.cores",
    "make_env": "agent.environment",
    "read_metric": "agent.results",
    "record": "agent.evaluation",
    "resolve": "agent.config",
    "train": "agent.training",
    "what_if": "agent.view.what_if",
}

__all__ = [
    "Agent", "evaluate", "export", "foresee", "load", "make_core", "make_env", "read_metric", "record", "resolve",
    "train", "what_if",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    # Imported when first used: `--help` should not wait for torch.
    if name not in _HOMES:
        raise AttributeError(f"module 'agent' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_HOMES[name]), name)
