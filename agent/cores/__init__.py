"""Recurrent cores: the memory of the world model, one file each."""

from agent.cores.core import RecurrentCore, State, core_class, make_core, registered_cores

__all__ = ["RecurrentCore", "State", "core_class", "make_core", "registered_cores"]
