"""Layers that every part of the agent is made of: Linear -> RMSNorm -> SiLU, in DreamerV3's initialisation.

Precision follows the input: a layer computes in the dtype of what it is given and casts its fp32 weights to it, so
that only the places where numbers enter the model choose between fp32 and bf16. Norms are computed in fp32.
"""

import copy
import math
from typing import Generic, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# A normal truncated to [-2, 2] has standard deviation 0.8796; dividing by it restores the variance that was asked for.
TRUNCATED_NORMAL_CORRECTION = 1.1368
RMS_EPS = 1e-4

M = TypeVar("M", bound=nn.Module)


def initialize_(weight: Tensor, fan_in: int, scale: float = 1.0) -> None:
    """Fill `weight` in place from a normal truncated at two standard deviations, with variance scale^2 / fan_in."""
    with torch.no_grad():
        nn.init.trunc_normal_(weight, 0.0, 1.0, -2.0, 2.0)
        weight.mul_(scale * TRUNCATED_NORMAL_CORRECTION / math.sqrt(fan_in))


class Linear(nn.Module):
    """y = W x + b in the dtype of x: (..., in) -> (..., out)."""

    def __init__(
        self, in_size: int, out_size: int, *, scale: float = 1.0, bias: bool = True, fan_in: int | None = None
    ):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_size, in_size))
        self.bias = nn.Parameter(torch.zeros(out_size)) if bias else None
        initialize_(self.weight, fan_in or in_size, scale)

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        if self.bias is None or self.bias.dtype == x.dtype:
            return F.linear(x, self.weight.to(x.dtype), self.bias)
        # Cast to x, the bias would cost a kernel of its own; added in fp32, it is part of whatever kernel comes next.
        return (F.linear(x, self.weight.to(x.dtype)) + self.bias).to(x.dtype)


def block_linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Input x (N, in), weight (g, in / g, out / g), bias (out,) -> (N, out): block b of x times weight b, plus bias."""
    grouped = x.unflatten(-1, (weight.shape[0], -1)).transpose(0, 1)  # (g, N, in / g)
    if bias.dtype == x.dtype and x.device.type == "cpu":
        return torch.baddbmm(bias.view(weight.shape[0], 1, -1), grouped, weight).transpose(0, 1).flatten(-2)
    # A GPU's batched product begins with copying the bias to all rows; added afterwards, as above, it costs nothing.
    return (torch.bmm(grouped, weight.to(x.dtype)).transpose(0, 1).flatten(-2) + bias).to(x.dtype)


class BlockLinear(nn.Module):
    """A block-diagonal linear map, (N, in) -> (N, out): block b of the input alone makes block b of the output.

    The weight lies as (blocks, in / blocks, out / blocks), the operand order of a batched product, since every other
    layout costs a copy at each call.

    Args:
        in_size: of all blocks together.
        out_size: of all blocks together.
        blocks: how many.
        fan_in: for the initialisation; the reference's, the full input width, if it is not given.
        products: how many batched products to compute it by, each of equally many neighbouring blocks with zeros
            between them, where many tiny ones would be slow; one for each block if it is not given.
    """

    def __init__(
        self, in_size: int, out_size: int, blocks: int, *, fan_in: int | None = None, products: int | None = None
    ):
        super().__init__()
        self.joined = blocks // (products or blocks)
        self.weight = nn.Parameter(torch.empty(blocks, in_size // blocks, out_size // blocks))
        self.bias = nn.Parameter(torch.zeros(out_size))
        initialize_(self.weight, fan_in or in_size)

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        weight = self.weight
        if self.joined > 1:  # (g, i, o) -> (g / j, j i, j o)
            apart = torch.eye(self.joined, device=weight.device, dtype=weight.dtype)[:, None, :, None]
            weight = (weight.unflatten(0, (-1, self.joined)).unsqueeze(3) * apart).flatten(1, 2).flatten(2, 3)
        return block_linear(x, weight, self.bias)


class Conv(nn.Module):
    """Convolution of odd kernel and stride 1 that keeps the size, in the dtype of x: (N, H, W, in) -> (N, H, W, out).

    Channels are the last axis outside, and in memory too, the weight's included: so norms over channels need no copy,
    and no library turns the operands around at each call.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel: int):
        super().__init__()
        weight = torch.empty(out_channels, in_channels, kernel, kernel)
        self.weight = nn.Parameter(weight.to(memory_format=torch.channels_last))
        self.bias = nn.Parameter(torch.zeros(out_channels))
        initialize_(self.weight, kernel * kernel * in_channels)
        self.padding = kernel // 2

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        same = self.bias.dtype == x.dtype
        bias = self.bias if same else None
        result = F.conv2d(x.permute(0, 3, 1, 2), self.weight.to(x.dtype), bias, padding=self.padding)
        result = result.permute(0, 2, 3, 1)
        return result if same else (result + self.bias).to(x.dtype)  # in fp32, as in Linear


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * scale over the last axis, computed in at least fp32, returned in the dtype of x."""

    def __init__(self, size: int):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + RMS_EPS) * self.scale).to(x.dtype)


class Layer(nn.Module):
    """Linear, RMSNorm, SiLU: (..., in) -> (..., out)."""

    def __init__(self, in_size: int, out_size: int):
        super().__init__()
        self.linear = Linear(in_size, out_size)
        self.norm = RMSNorm(out_size)

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        return F.silu(self.norm(self.linear(x)))


class MLP(nn.Sequential):
    """`layers` Layers of `units`: (..., in) -> (..., units)."""

    def __init__(self, in_size: int, units: int, layers: int):
        super().__init__(*(Layer(in_size if i == 0 else units, units) for i in range(layers)))


def parameter_count(*modules: nn.Module) -> int:
    """How many numbers are learned in all of `modules` together."""
    return sum(parameter.numel() for module in modules for parameter in module.parameters())


class Frozen(Generic[M]):
    """A twin of a module that never receives gradients, its matrices kept in the precision of the products.

    Imagination, acting and the chain of gradients through time read weights and do not learn them. In fp32 the twin
    shares the module's storage; in bf16 `refresh` casts every matrix once, instead of once at each of the 64 + 15
    steps of an update. Vectors (biases, norm scales) and buffers are always shared.
    """

    def __init__(self, module: M, dtype: torch.dtype):
        self.module: M = copy.deepcopy(module).requires_grad_(False)
        self._copies: list[Tensor] = []
        self._originals: list[Tensor] = []
        for twin, original in zip(self.module.parameters(), module.parameters(), strict=True):
            if original.dim() > 1 and dtype != original.dtype:
                twin.data = original.detach().to(dtype)
                self._copies.append(twin.data)
                self._originals.append(original.detach())
            else:
                twin.data = original.data
        for own, shared in zip(self.module.buffers(), module.buffers(), strict=True):
            own.data = shared.data

    def refresh(self) -> None:
        """Take over the module's present weights, in place."""
        if self._copies:
            torch._foreach_copy_(self._copies, self._originals)
