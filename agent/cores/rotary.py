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


def elapsed(clock: Tensor, first: Tensor) -> Tensor:
    """Steps since the reset that was last, (B, T), each step counted.

    Args:
        clock: the same before the first step, (B,).
        first: bool (B, T); where true, counting begins anew, so that this step is the first.
    """
    steps = torch.arange(1, first.shape[1] + 1, device=first.device).expand_as(first)
    before = torch.where(first, steps - 1, 0).cummax(1).values  # steps up to the last reset
    reset = first.cumsum(1) > 0
    return torch.where(reset, (steps - before).to(clock.dtype), steps + clock.unsqueeze(1))


def angles(time: Tensor, heads: int, dim: int) -> Tensor:
    """Times (B, T), in steps -> angles (B, heads, T, dim / 2), in at least fp32.

    Pair j of head h turns by pi (2 (j heads + h) + 1) / (heads dim) a step: all odd multiples of the slowest rate.
    """
    ring = heads * dim
    odd = torch.arange(1, ring, 2, device=time.device, dtype=time.dtype).view(dim // 2, heads).T  # (heads, dim / 2)
    # All angles repeat after 2 * ring steps, and small numbers keep the precision.
    return torch.remainder(time, 2 * ring)[:, None, :, None] * (math.pi / ring * odd[:, None])


def rotate(x: Tensor, angle: Tensor) -> Tensor:
    """Turn the first heads of x (B, H, T, D) by angles (B, R, T, D / 2): number j with number j + D / 2 of a head."""
    heads = angle.shape[1]
    moved, still = x[:, :heads].to(angle.dtype), x[:, heads:]
    a, b = moved.chunk(2, -1)
    cos, sin = angle.cos(), angle.sin()
    turned = torch.cat([a * cos - b * sin, a * sin + b * cos], -1).to(x.dtype)
    return torch.cat([turned, still], 1)
