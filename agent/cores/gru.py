"""DreamerV3's block GRU: a wide memory vector whose recurrent weights are block-diagonal.

Source: Hafner et al., "Mastering diverse control tasks through world models" (Nature, 2025).
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from pydantic import ConfigDict, PositiveInt, model_validator
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from agent.cores.core import RecurrentCore, State, clear, register, take
from agent.cores.scan import scan
from agent.networks import BlockLinear, Layer, RMSNorm, block_linear, initialize_


@dataclass(frozen=True, config=ConfigDict(extra="forbid", strict=True))
class BlockGRUConfig:
    """Keys of `configs/core/gru.yaml`."""

    deter: PositiveInt
    hidden: PositiveInt
    blocks: PositiveInt

    @model_validator(mode="after")
    def _divides(self) -> "BlockGRUConfig":
        if self.deter % self.blocks:
            raise ValueError(f"deter ({self.deter}) must be a multiple of blocks ({self.blocks})")
        return self


class Mix(nn.Module):
    """Each block of h with what all blocks share: block b of the output is W_b [h_b, s] + bias_b.

    Inputs h (N, F), s (N, S) -> (N, F) in at least fp32.

    s is the same for all blocks, so this is computed as a block product of h plus one dense product of s: the same
    numbers without g copies of s.

    Both operands lie in one tensor, since the optimizer clips gradients by the norm of a tensor and the reference has
    one for all of W: with two, each would be clipped by its own norm, and training would take another path.
    """

    def __init__(self, size: int, shared: int, blocks: int):
        super().__init__()
        self.blocks, self.width = blocks, size // blocks
        # The first F / g rows hold the blocks (g, F / g, F / g), the other S rows the dense part (F, S), each as it is
        # multiplied, so that a view is all it takes.
        self.weight = nn.Parameter(torch.empty(self.width + shared, size))
        self.bias = nn.Parameter(torch.zeros(size))
        initialize_(self.weight, fan_in=size + blocks * shared)

    def forward(self, h: Tensor, s: Tensor) -> Tensor:  # noqa: D102
        # `split` and not two slices: its gradient is one concatenation, theirs are two padded tensors and their sum.
        own, dense = self.weight.to(h.dtype).split([self.width, s.shape[-1]])
        # As (F, S) and not as (S, F): for F = 2048 on a CPU, s @ dense takes 0.1 ms less forward at 16 rows, and 0.3 ms
        # more for the gradient of s, which is wanted at each step back in time. At 1024 rows there is no difference.
        dense = dense.view(-1, s.shape[-1])
        # In at least fp32, for precision, and because a sum in bf16 would be made part of the dense product, to which
        # the blocks' product would first have to be copied in another order.
        wide = torch.promote_types(h.dtype, torch.float32)
        return block_linear(h, own.view(self.blocks, self.width, -1), self.bias).to(wide) + F.linear(s, dense).to(wide)


@register("gru")
class BlockGRU(RecurrentCore):
    """h' = u * tanh(r * c) + (1 - u) * h, gates from a block-diagonal layer over [h, W h, x].

    With h_b one of g blocks of h, and [., .] the concatenation:

        p       = SiLU(RMS(W_p h))
        m_b     = SiLU(RMS(W_b [h_b, p, x]))
        r, c, u = per block a third of W'_b m_b;   r = sigmoid(r), u = sigmoid(u - 1)
    """

    Config = BlockGRUConfig
    parallel_in_time = False

    def __init__(self, input_size: int, config: BlockGRUConfig):
        super().__init__()
        deter, hidden, blocks = config.deter, config.hidden, config.blocks
        self.feature_size = deter
        self.blocks = blocks
        self.past = Layer(deter, hidden)
        self.mix = Mix(deter, hidden + input_size, blocks)
        self.norm = RMSNorm(deter)
        self.gates = BlockLinear(deter, 3 * deter, blocks)

    def initial(self, batch: int) -> State:
        """An empty memory: `deter` (B, F) of zeros."""
        return {"deter": torch.zeros(batch, self.feature_size, device=self.norm.scale.device)}

    def step(self, x: Tensor, state: State, first: Tensor) -> tuple[Tensor, State]:
        """Input x (B, X), state `deter` (B, F), first (B,) -> h (B, F) and the new state, in which `deter` is h."""
        deter = clear(state, first)["deter"]
        h = deter.to(x.dtype)
        mixed = self.mix(h, torch.cat([self.past(h), x], -1))
        gates = self.gates(F.silu(self.norm(mixed)).to(x.dtype)).to(deter.dtype)  # (B, 3 F)
        reset, candidate, update = (part.flatten(-2) for part in gates.unflatten(-1, (self.blocks, 3, -1)).unbind(-2))
        update = torch.sigmoid(update - 1)
        deter = update * torch.tanh(torch.sigmoid(reset) * candidate) + (1 - update) * deter
        return deter, {"deter": deter}

    def sequence(
        self, x: Tensor, state: State, first: Tensor, keep: Sequence[int] | None = None
    ) -> tuple[Tensor, State]:
        """Inputs x (B, T, X), first (B, T) -> h (B, T, F) and the state, (B, F) or with `keep` (B, K, F)."""

        def step(
            carry: tuple[Tensor, ...], inputs: tuple[Tensor, ...]
        ) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
            _, after = self.step(inputs[0], {"deter": carry[0]}, inputs[1])
            return (after["deter"],), ()

        inputs = (x.transpose(0, 1), first.transpose(0, 1))
        (deter,), _ = scan(step, step, tuple(self.parameters()), (state["deter"],), inputs)
        deter = deter.transpose(0, 1)  # (B, T, F)
        return deter, {"deter": deter[:, -1] if keep is None else take(deter, 1, keep)}
