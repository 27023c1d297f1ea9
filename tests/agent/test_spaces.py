"""Spaces as the networks see them."""

import gymnasium
import numpy as np
import pytest
import torch

from agent.errors import UserError
from agent.spaces import Categories, Hybrid, Image, Vector, action_from_gymnasium, from_gymnasium
from envs import actions


def test_hybrid_actions_are_stored_as_numbers_and_read_as_reals_and_codes() -> None:
    space = action_from_gymnasium(actions.Hybrid(2, [3, 2]))
    assert space == Hybrid(Vector(2), Categories((3, 2), scalar=False))
    assert (space.width, space.shape, space.dtype) == (7, (4,), torch.float32)
    stored = torch.tensor([[0.5, -3.0, 2.0, 0.0], [0.0, 1.0, 0.0, 1.0]])
    encoded = space.encode(stored)
    assert encoded.tolist() == [[0.5, -3, 0, 0, 1, 1, 0], [0, 1, 1, 0, 0, 0, 1]]
    assert torch.equal(space.decode(encoded), stored)


def test_hybrid_noise_is_normal_then_uniform() -> None:
    noise = Hybrid(Vector(2), Categories((3, 2), scalar=False)).noise((4000,), torch.device("cpu"))
    assert noise.shape == (4000, 4)
    assert noise[:, :2].std() == pytest.approx(1, abs=0.05) and noise[:, :2].mean().abs() < 0.05
    assert noise[:, 2:].min() >= 0 and noise[:, 2:].max() < 1
    assert noise[:, 2:].mean() == pytest.approx(0.5, abs=0.02)


def test_spaces_of_other_kinds_are_refused() -> None:
    assert from_gymnasium(gymnasium.spaces.Box(0, 255, (64, 48, 3), np.uint8), "eye") == Image(64, 48, 3)
    with pytest.raises(UserError, match="eye has the space"):
        from_gymnasium(gymnasium.spaces.Box(0, 1, (8, 8), np.float32), "eye")
