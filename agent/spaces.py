"""What an observation or an action is made of, in the few kinds that the networks know."""

from dataclasses import dataclass
from typing import Any

import gymnasium
import numpy as np
import torch
from torch import Tensor

from agent.distributions import one_hot
from agent.errors import UserError
from envs import actions


@dataclass(frozen=True)
class Vector:
    """`width` real numbers: (..., width) in fp32."""

    width: int

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one value as it is stored."""
        return (self.width,)

    dtype = torch.float32

    def encode(self, value: Tensor) -> Tensor:
        """(..., width) as stored -> the same, for the networks."""
        return value

    def decode(self, encoded: Tensor) -> Tensor:
        """What the networks made (..., width) -> what the environment takes (..., width)."""
        return encoded

    def noise(self, shape: tuple[int, ...], device: torch.device) -> Tensor:
        """Noise (*shape, width) to sample a policy with."""
        return torch.randn(*shape, self.width, device=device)


@dataclass(frozen=True)
class Categories:
    """One or several discrete choices: integers (...) or (..., k); for the networks one-hot (..., sum of sizes)."""

    sizes: tuple[int, ...]
    scalar: bool

    dtype = torch.int64

    @property
    def width(self) -> int:
        """Width of the one-hot code."""
        return sum(self.sizes)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one value as it is stored."""
        return () if self.scalar else (len(self.sizes),)

    def encode(self, value: Tensor) -> Tensor:
        """Integers (...) or (..., k) -> one-hot (..., width) in fp32."""
        parts = [value] if self.scalar else list(value.unbind(-1))
        hot = [one_hot(part, size) for part, size in zip(parts, self.sizes, strict=True)]
        return torch.cat(hot, -1)

    def decode(self, encoded: Tensor) -> Tensor:
        """One-hot (..., width) -> integers (...) or (..., k)."""
        choices = [part.argmax(-1) for part in encoded.split(self.sizes, -1)]
        return choices[0] if self.scalar else torch.stack(choices, -1)

    def noise(self, shape: tuple[int, ...], device: torch.device) -> Tensor:
        """Noise (*shape, k) to sample a policy with."""
        return torch.rand(*shape, len(self.sizes), device=device)


@dataclass(frozen=True)
class Image:
    """A picture: (..., height, width, channels) of bytes, as it is stored and as the networks take it."""

    height: int
    width: int
    channels: int

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one value as it is stored."""
        return (self.height, self.width, self.channels)

    dtype = torch.uint8


@dataclass(frozen=True)
class Hybrid:
    """Reals and choices at once: (..., stored) in fp32, reals first, each choice a whole number.

    For the networks reals and one-hot codes (..., width).
    """

    reals: Vector
    choices: Categories

    dtype = torch.float32

    @property
    def width(self) -> int:
        """Width of reals and one-hot codes together."""
        return self.reals.width + self.choices.width

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one value as it is stored."""
        return (self.reals.width + len(self.choices.sizes),)

    def encode(self, value: Tensor) -> Tensor:
        """As stored (..., stored) -> for the networks (..., width)."""
        reals, choices = value.tensor_split([self.reals.width], -1)
        return torch.cat([reals, self.choices.encode(choices.round().long())], -1)

    def decode(self, encoded: Tensor) -> Tensor:
        """What the networks made (..., width) -> as the environment takes it (..., stored)."""
        reals, choices = encoded.tensor_split([self.reals.width], -1)
        return torch.cat([reals, self.choices.decode(choices).to(reals.dtype)], -1)

    def noise(self, shape: tuple[int, ...], device: torch.device) -> Tensor:
        """Noise (*shape, stored) to sample a policy with."""
        return torch.cat([self.reals.noise(shape, device), self.choices.noise(shape, device)], -1)


Action = Vector | Categories | Hybrid
Space = Vector | Categories | Image


def action_from_gymnasium(space: gymnasium.Space[Any]) -> Action:
    """The networks' view of the action space of an environment made by `envs.make`.

    Raises:
        UserError: the space is of another kind.
    """
    if isinstance(space, actions.Hybrid):
        return Hybrid(Vector(space.reals), Categories(space.sizes, scalar=False))
    found = from_gymnasium(space, "action")
    assert not isinstance(found, Image), "envs.make gives no such action"
    return found


def from_gymnasium(space: gymnasium.Space[Any], name: str) -> Space:
    """The networks' view of the gymnasium space of an entry called `name`.

    Raises:
        UserError: the space is of another kind.
    """
    if isinstance(space, gymnasium.spaces.Box) and len(space.shape) == 1:
        return Vector(space.shape[0])
    if isinstance(space, gymnasium.spaces.Box) and len(space.shape) == 3 and space.dtype == np.uint8:
        return Image(*space.shape)
    if isinstance(space, gymnasium.spaces.Discrete):
        return Categories((int(space.n),), scalar=True)
    if isinstance(space, gymnasium.spaces.MultiDiscrete) and space.nvec.ndim == 1:
        return Categories(tuple(int(n) for n in np.asarray(space.nvec)), scalar=False)
    raise UserError(
        f"{name} has the space {space}: use a flat Box, an image (uint8 Box of height, width, channels), Discrete or "
        "MultiDiscrete"
    )
