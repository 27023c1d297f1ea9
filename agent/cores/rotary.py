"""Keys and queries that turn with time, so that a memory finds by lag what it would else find by content alone.

Turned by their own times t and u, a query and a key meet in q'R(u - t)k, which depends on how long ago u was. Softmax
attention sharpens such products; a linear read does not. So rates here are not spread over octaves, as in the source,
but evenly, those of a Fourier transform: for R heads with keys (D,) of equal pairs, taken together, what was written 1
to R * D - 1 steps away is orthogonal. Content still counts: a key is what it was, turned.

Source: Su et al., "RoFormer: Enhanced Transformer with Rotary Position Embedding" (2021); in a linear memory with
decay: Sun et al., "Retentive Network: A Successor to Transformer for Large Language Models" (2023).
"""

import math

import torch
from torch import Tensor

Turn = tuple[Tensor, Tensor]


def elapsed(clock: Tensor, first: Tensor) -> Tensor:
    """Steps since the reset that was last, (B, T), each step counted.

    Args:
        clock: the same before the first step, (B,).
        first: bool (B, T); where true, counting begins anew, so that this step is the first.
    """
    steps = torch.arange(1, first.shape[1] + 1, device=first.device).expand_as(first)
    before = torch.where(first, steps - 1, 0).cummax(1).values  # steps up to the last reset
    reset = first.cumsum(1) > 0  # chosen by it, not added up: a NaN of the clock must not pass a reset
    return torch.where(reset, (steps - before).to(clock.dtype), steps + clock.unsqueeze(1))


def turns(time: Tensor, heads: int, dim: int) -> Turn:
    """Times (B, T), in steps -> cosines and sines (B, heads, T, dim / 2) of how far they turn, in the dtype of time.

    Pair j of head h turns by pi (2 (j heads + h) + 1) / (heads dim) a step: all odd multiples of the slowest rate.
    """
    ring = heads * dim
    odd = torch.arange(1, ring, 2, device=time.device, dtype=time.dtype).view(dim // 2, heads).T  # (heads, dim / 2)
    # All angles repeat after 2 * ring steps, and small numbers keep the precision.
    angle = torch.remainder(time, 2 * ring)[:, None, :, None] * (math.pi / ring * odd[:, None])
    return angle.cos(), angle.sin()


def rotate(x: Tensor, turn: Turn) -> Tensor:
    """Turn the first R heads of x (B, H, T, D) by cosines and sines (B, R, T, D / 2): pairs are j and j + D / 2."""
    cos, sin = turn
    heads = cos.shape[1]
    moved, still = x[:, :heads].to(cos.dtype), x[:, heads:]
    a, b = moved.chunk(2, -1)
    turned = torch.cat([a * cos - b * sin, a * sin + b * cos], -1).to(x.dtype)
    return torch.cat([turned, still], 1)
