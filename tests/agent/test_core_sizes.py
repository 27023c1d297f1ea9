"""Cores are compared at equal size: with each of them the whole agent has as many parameters as with the GRU."""

import functools
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch

from agent import config as configuration
from agent.behavior import Behavior
from agent.networks import parameter_count
from agent.spaces import from_gymnasium
from agent.world_model import WorldModel

SIZES = ("debug", "tiny", "1m", "wide", "12m", "25m", "50m", "100m", "200m", "400m")
TOLERANCE = 0.1


def box(size: int) -> gymnasium.Space[Any]:
    return gymnasium.spaces.Box(-np.inf, np.inf, (size,), np.float32)


@functools.cache
def agent_parameters(core: str, size: str) -> int:
    """Learned numbers of an agent for walker, counted without allocating them."""
    spaces = {"orientations": box(14), "height": box(1), "velocity": box(9)}
    observations = {key: from_gymnasium(space, key) for key, space in spaces.items()}
    action = from_gymnasium(gymnasium.spaces.Box(-1, 1, (6,), np.float32), "action")
    config = configuration.resolve(env="dmc_walker", core=core, size=size, device="cpu")
    with torch.device("meta"):
        model = WorldModel(observations, action, config)
        behavior = Behavior(model.rssm.feature_size, action, config)
    return parameter_count(model, behavior)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("core", sorted(set(configuration.config_names("core")) - {"gru"}))
def test_every_core_is_as_large_as_the_gru_at_every_size(core: str, size: str) -> None:
    assert agent_parameters(core, size) == pytest.approx(agent_parameters("gru", size), rel=TOLERANCE)


def test_all_sizes_are_compared() -> None:
    assert set(SIZES) == set(configuration.config_names("size"))
