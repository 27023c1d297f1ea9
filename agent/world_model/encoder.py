"""Observations in, tokens out; and back again."""

import re
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from agent.distributions import symlog
from agent.errors import UserError
from agent.networks import MLP, Linear
from agent.schema import Heads
from agent.spaces import Categories, Image, Space, Vector
from agent.world_model.images import ImageDecoder, ImageEncoder

Observation = dict[str, Tensor]
"""Tensors (..., width) of reals, (...) or (..., k) of integers, (..., H, W, C) of bytes, by the environment's names."""


def chosen(spaces: Mapping[str, Space], pattern: str, key: str) -> dict[str, Space]:
    """The entries whose whole name the regular expression matches.

    Raises:
        UserError: there are none; it calls the pattern by its `key` in the configuration.
    """
    entries = {name: space for name, space in spaces.items() if re.fullmatch(pattern, name)}
    if not entries:
        raise UserError(f"{key}: {pattern!r} matches no entry of the observation, which has {', '.join(spaces)}")
    return entries


def _parted(spaces: Mapping[str, Space]) -> tuple[dict[str, Vector | Categories], dict[str, Image]]:
    """Those that multilayer perceptrons read and write, and images."""
    vectors = {key: space for key, space in spaces.items() if not isinstance(space, Image)}
    return vectors, {key: space for key, space in spaces.items() if isinstance(space, Image)}


def network_input(observation: Observation, spaces: Mapping[str, Vector | Categories]) -> Tensor:
    """These entries as one vector (..., sum of widths), keys sorted: symlog of reals, one-hot of choices."""
    parts = []
    for key in sorted(spaces):
        encoded = spaces[key].encode(observation[key])
        parts.append(symlog(encoded) if isinstance(spaces[key], Vector) else encoded)
    return torch.cat(parts, -1)


class Encoder(nn.Module):
    """Observations -> tokens (..., token_size): those of vectors and choices, then those of images."""

    def __init__(self, spaces: Mapping[str, Space], heads: Heads):
        super().__init__()
        self.vectors, images = _parted(spaces)
        width = sum(space.width for space in self.vectors.values())
        self.mlp = MLP(width, heads.units, heads.encoder_layers) if self.vectors else None
        self.images = ImageEncoder(images, heads.depth) if images else None
        self.token_size = (heads.units if self.vectors else 0) + (self.images.token_size if self.images else 0)

    def forward(self, observation: Observation, dtype: torch.dtype) -> Tensor:
        """Entries (..., shape) -> tokens (..., token_size), computed in `dtype`."""
        tokens = []
        if self.mlp is not None:
            tokens.append(self.mlp(network_input(observation, self.vectors).to(dtype)))
        if self.images is not None:
            tokens.append(self.images(observation, dtype))
        return torch.cat(tokens, -1)


class Decoder(nn.Module):
    """Features -> what the observation was: reals in symlog space, choices as logits, images in (0, 1)."""

    def __init__(self, spaces: Mapping[str, Space], feature_size: int, memory_size: int, heads: Heads):
        super().__init__()
        self.vectors, images = _parted(spaces)
        self.memory_size = memory_size
        self.mlp = MLP(feature_size, heads.units, heads.decoder_layers) if self.vectors else None
        outputs = {key: Linear(heads.units, space.width) for key, space in self.vectors.items()}
        self.outputs = nn.ModuleDict(outputs)
        self.images: ImageDecoder | None = None
        if images:
            self.images = ImageDecoder(images, memory_size, feature_size - memory_size, heads.depth, heads.units)

    def forward(self, feature: Tensor) -> dict[str, Tensor]:
        """Features (..., F), the core's output first -> for each key (..., width) or (..., H, W, C) in fp32."""
        decoded: dict[str, Tensor] = {}
        if self.mlp is not None:
            hidden = self.mlp(feature)
            decoded = {key: output(hidden).float() for key, output in self.outputs.items()}
        if self.images is not None:
            decoded |= self.images(feature[..., : self.memory_size], feature[..., self.memory_size :])
        return decoded

    def losses(self, feature: Tensor, observation: Observation) -> dict[str, Tensor]:
        """For each key the loss (...), summed over its entries.

        That is the squared error of reals in symlog space and of images in [0, 1], and the cross-entropy of choices.
        """
        losses = {}
        for key, predicted in self(feature).items():
            space = self.vectors.get(key)
            if space is None:
                losses[key] = (predicted - observation[key].float() / 255).square().sum((-3, -2, -1))
            elif isinstance(space, Vector):
                losses[key] = (predicted - symlog(space.encode(observation[key]))).square().sum(-1)
            else:
                log_probs = torch.cat([F.log_softmax(part, -1) for part in predicted.split(space.sizes, -1)], -1)
                losses[key] = -(space.encode(observation[key]) * log_probs).sum(-1)
        return losses
