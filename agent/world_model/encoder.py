"""Observations in, tokens out; and back again."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from agent.distributions import symlog
from agent.networks import MLP, Linear
from agent.spaces import Space, Vector

Observation = dict[str, Tensor]
"""Tensors (..., width) of reals or (...), (..., k) of integers, by the environment's names."""


def network_input(observation: Observation, spaces: dict[str, Space]) -> Tensor:
    """All of an observation as one vector (..., sum of widths), keys sorted: symlog of reals, one-hot of choices."""
    parts = []
    for key in sorted(spaces):
        encoded = spaces[key].encode(observation[key])
        parts.append(symlog(encoded) if isinstance(spaces[key], Vector) else encoded)
    return torch.cat(parts, -1)


class Encoder(nn.Module):
    """Vector observations -> tokens (..., units)."""

    def __init__(self, spaces: dict[str, Space], units: int, layers: int):
        super().__init__()
        self.spaces = spaces
        self.mlp = MLP(sum(space.width for space in spaces.values()), units, layers)
        self.token_size = units

    def forward(self, observation: Observation, dtype: torch.dtype) -> Tensor:
        """Tensors (..., width) -> tokens (..., units), computed in `dtype`."""
        return self.mlp(network_input(observation, self.spaces).to(dtype))


class Decoder(nn.Module):
    """Features -> what the observation was: reals in symlog space, choices as logits."""

    def __init__(self, spaces: dict[str, Space], feature_size: int, units: int, layers: int):
        super().__init__()
        self.spaces = spaces
        self.mlp = MLP(feature_size, units, layers)
        self.outputs = nn.ModuleDict({key: Linear(units, space.width) for key, space in spaces.items()})

    def forward(self, feature: Tensor) -> dict[str, Tensor]:
        """Features (..., F) -> for each key (..., width) in fp32."""
        hidden = self.mlp(feature)
        return {key: output(hidden).float() for key, output in self.outputs.items()}

    def losses(self, feature: Tensor, observation: Observation) -> dict[str, Tensor]:
        """For each key the loss (...): squared error in symlog space or cross-entropy, summed over its entries."""
        losses = {}
        for key, predicted in self(feature).items():
            space = self.spaces[key]
            target = space.encode(observation[key])
            if isinstance(space, Vector):
                losses[key] = (predicted - symlog(target)).square().sum(-1)
            else:
                log_probs = torch.cat([F.log_softmax(part, -1) for part in predicted.split(space.sizes, -1)], -1)
                losses[key] = -(target * log_probs).sum(-1)
        return losses
