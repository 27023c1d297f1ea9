"""A Dreamer whose recurrent core is chosen by one word of config.

import agent
player = agent.load("runs/walker")
print(agent.evaluate(player, episodes=10)["mean"])
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from agent.agent import Agent
    from agent.config import resolve
    from agent.cores import make_core
    from agent.evaluation import evaluate, load, record
    from agent.training import train

__all__ = ["Agent", "evaluate", "load", "make_core", "record", "resolve", "train"]

_HOMES = {"Agent": "agent.agent", "make_core": "agent.cores", "resolve": "agent.config", "train": "agent.training"}


def __getattr__(name: str) -> Any:
    # Imported when first used: `--help` should not wait for torch.
    if name not in __all__:
        raise AttributeError(f"module 'agent' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_HOMES.get(name, "agent.evaluation")), name)
