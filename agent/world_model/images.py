"""Images in, tokens out; and back again. All images of an observation are read and drawn as one, stacked on channels.

    encoder  4 x (conv -> max-pool 2 x 2 -> RMSNorm over channels -> SiLU), flattened
    decoder  SiLU(RMSNorm(block-diagonal map of h + two layers of the code)) at a sixteenth of the resolution,
             3 x (double the resolution -> conv -> RMSNorm -> SiLU), double it, conv, sigmoid

Source: Hafner et al., "Mastering diverse control tasks through world models" (Nature, 2025).
"""

from collections.abc import Mapping
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from agent.errors import UserError
from agent.networks import BlockLinear, Conv, Layer, Linear, RMSNorm
from agent.spaces import Image

WIDTHS = (2, 3, 4, 4)
"""Channels of the stages, from the finest resolution to the coarsest, in units of the size's depth."""
KERNEL = 5
BLOCKS = 8
"""Of the map from the core's output to the coarsest stage."""
REDUCTION = 2 ** len(WIDTHS)


def stacked(images: Mapping[str, Image]) -> Image:
    """One image with the channels of all of them, keys sorted.

    Raises:
        UserError: they differ in size, or their size cannot be halved as often as the networks do.
    """
    named = ", ".join(f"{key} is {image.height} x {image.width}" for key, image in images.items())
    (height, width), *others = {(image.height, image.width) for image in images.values()}
    if others or height % REDUCTION or width % REDUCTION:
        rule = "of one size" if others else f"a multiple of {REDUCTION} pixels high and wide"
        raise UserError(f"images must be {rule}, but {named}; set env.options.image_size, as to 64")
    return Image(height, width, sum(image.channels for image in images.values()))


class ImageEncoder(nn.Module):
    """Images -> tokens (..., token_size)."""

    def __init__(self, images: Mapping[str, Image], depth: int):
        super().__init__()
        self.keys = sorted(images)
        image = stacked(images)
        channels = [image.channels, *(width * depth for width in WIDTHS)]
        self.convs = nn.ModuleList(Conv(before, after, KERNEL) for before, after in pairwise(channels))
        self.norms = nn.ModuleList(RMSNorm(after) for after in channels[1:])
        self.token_size = image.height // REDUCTION * (image.width // REDUCTION) * channels[-1]

    def forward(self, observation: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
        """Bytes (..., H, W, C) of each image -> tokens (..., token_size), computed in `dtype`."""
        x = torch.cat([observation[key] for key in self.keys], -1)
        outer = x.shape[:-3]
        x = (x.flatten(0, -4).float() / 255 - 0.5).to(dtype)  # (N, H, W, C)
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = F.silu(norm(halved(conv(x))))
        return x.flatten(1).unflatten(0, outer)


class ImageDecoder(nn.Module):
    """The core's output and the code -> images with values in (0, 1)."""

    def __init__(self, images: Mapping[str, Image], memory_size: int, code_size: int, depth: int, units: int):
        super().__init__()
        self.channels = {key: images[key].channels for key in sorted(images)}
        image = stacked(images)
        channels = [width * depth for width in reversed(WIDTHS)]  # from the coarsest stage on
        self.coarse = (image.height // REDUCTION, image.width // REDUCTION)
        size = self.coarse[0] * self.coarse[1] * channels[0]
        if memory_size % BLOCKS or channels[0] % BLOCKS:
            raise UserError(
                f"decoder of images: the core's width, {memory_size}, and {WIDTHS[-1]} times heads.depth, {depth}, "
                f"must be multiples of {BLOCKS}; set them so"
            )
        self.from_memory = BlockLinear(memory_size, size, BLOCKS)
        self.from_code = nn.Sequential(Layer(code_size, 2 * units), Linear(2 * units, size))
        self.norm = RMSNorm(channels[0])
        pairs = list(pairwise(channels))
        self.convs = nn.ModuleList(Conv(before, after, KERNEL) for before, after in pairs)
        self.norms = nn.ModuleList(RMSNorm(after) for _, after in pairs)
        self.output = Conv(channels[-1], image.channels, KERNEL)

    def forward(self, memory: Tensor, code: Tensor) -> dict[str, Tensor]:
        """The core's output (..., F) and the rest of the feature (..., S) -> for each image (..., H, W, C) in fp32."""
        outer = memory.shape[:-1]
        x = F.silu(self.norm(self._laid_out(memory.flatten(0, -2)) + self._coarse_image(code.flatten(0, -2))))
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = F.silu(norm(conv(doubled(x))))
        image = self.output(doubled(x)).float().sigmoid().unflatten(0, outer)
        return dict(zip(self.channels, image.split(list(self.channels.values()), -1), strict=True))

    def _laid_out(self, memory: Tensor) -> Tensor:
        """(N, F) -> (N, h, w, C): each block makes a share of the channels of every place."""
        blocks = self.from_memory(memory).unflatten(-1, (BLOCKS, *self.coarse, -1))  # (N, blocks, h, w, C / blocks)
        return blocks.permute(0, 2, 3, 1, 4).flatten(-2)

    def _coarse_image(self, code: Tensor) -> Tensor:
        """(N, S) -> (N, h, w, C)."""
        return self.from_code(code).unflatten(-1, (*self.coarse, -1))


def halved(x: Tensor) -> Tensor:
    """The maxima of squares of 2 x 2: (N, H, W, C) -> (N, H / 2, W / 2, C)."""
    return F.max_pool2d(x.permute(0, 3, 1, 2), 2).permute(0, 2, 3, 1)


def doubled(x: Tensor) -> Tensor:
    """Every value repeated in a square of 2 x 2: (N, H, W, C) -> (N, 2 * H, 2 * W, C)."""
    return F.interpolate(x.permute(0, 3, 1, 2), scale_factor=2.0, mode="nearest").permute(0, 2, 3, 1)
