"""The world model: what the agent believes about its environment."""

from agent.world_model.world_model import Batch, WorldModel

__all__ = ["Batch", "WorldModel"]
