"""Gradients against central differences.

Unlike torch's gradcheck it asks each graph for its gradient only once, and moves parameters where they are.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

DISTANCE = 1e-6
DIRECTIONS = 3


def check_gradients(function: Callable[[], Sequence[Tensor]], leaves: Sequence[Tensor]) -> None:
    """Assert that a random weighting of all results has the right gradient at every leaf, in fp64."""
    weights = [torch.randn_like(result) for result in function()]

    def loss() -> Tensor:
        return torch.stack([(w * r).sum() for w, r in zip(weights, function(), strict=True)]).sum()

    gradients = torch.autograd.grad(loss(), leaves, allow_unused=True, materialize_grads=True)
    for leaf, gradient in zip(leaves, gradients, strict=True):
        for _ in range(DIRECTIONS):
            direction = torch.randn_like(leaf)
            with torch.no_grad():
                leaf += DISTANCE * direction
                above = loss()
                leaf -= 2 * DISTANCE * direction
                below = loss()
                leaf += DISTANCE * direction
            numeric = (above - below) / (2 * DISTANCE)
            torch.testing.assert_close((gradient * direction).sum(), numeric, rtol=1e-5, atol=1e-7)
