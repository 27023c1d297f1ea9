"""Small networks that read one number off a feature: reward, continuation, value."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from agent.distributions import twohot_bins, twohot_loss, twohot_mean
from agent.networks import MLP, Linear


class TwoHotHead(nn.Module):
    """A real number of any scale, as a distribution over symexp-spaced bins. Predicts exactly 0 before training."""

    bins: Tensor

    def __init__(self, feature_size: int, units: int, layers: int, bins: int):
        super().__init__()
        self.mlp = MLP(feature_size, units, layers)
        self.output = Linear(units, bins, scale=0.0)
        self.register_buffer("bins", twohot_bins(bins), persistent=False)

    def forward(self, feature: Tensor) -> Tensor:
        """Features (..., F) -> logits (..., bins)."""
        return self.output(self.mlp(feature))

    def mean(self, logits: Tensor) -> Tensor:
        """Expected value (...) under logits (..., bins)."""
        return twohot_mean(logits, self.bins)

    def loss(self, logits: Tensor, target: Tensor) -> Tensor:
        """Cross-entropy (...) of logits (..., bins) with a target (...)."""
        return twohot_loss(logits, target, self.bins)


class AnticipationHead(TwoHotHead):
    """The real number that an action will bring, told from the feature where it is chosen.

    Each unit of what the feature says is multiplied by a weight of the action, 1 when there is none. Of a sum of both,
    which later layers would have to multiply, no gradient tells what the feature should hold before they have learned
    to, and they do not learn to before it holds anything.
    """

    def __init__(self, feature_size: int, action_width: int, units: int, layers: int, bins: int):
        super().__init__(feature_size, units, layers, bins)
        self.weight_of_action = Linear(action_width, units, fan_in=1)

    def anticipate(self, feature: Tensor, action: Tensor) -> Tensor:
        """Features (..., F) and actions (..., A), one-hot where discrete -> logits (..., bins)."""
        return self.output(self.mlp(feature) * (1 + self.weight_of_action(action)))


class ContinuationHead(nn.Module):
    """The probability, discount included, that what follows still counts."""

    def __init__(self, feature_size: int, units: int, layers: int):
        super().__init__()
        self.mlp = MLP(feature_size, units, layers)
        self.output = Linear(units, 1)

    def forward(self, feature: Tensor) -> Tensor:
        """Features (..., F) -> logits (...) in fp32."""
        return self.output(self.mlp(feature)).squeeze(-1).float()

    def probability(self, feature: Tensor) -> Tensor:
        """Features (..., F) -> (...) in (0, 1)."""
        return torch.sigmoid(self(feature))

    def loss(self, feature: Tensor, target: Tensor) -> Tensor:
        """Binary cross-entropy (...) with a soft target (...) in [0, 1]."""
        return F.binary_cross_entropy_with_logits(self(feature), target, reduction="none")
