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
