"""DreamerV3's block GRU: a wide memory vector whose recurrent weights are block-diagonal.

Source: Hafner et al., "Mastering diverse control tasks through world models" (Nature, 2025).
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from pydantic import ConfigDict, PositiveInt, model_validator
from pydantic.dataclasses import dataclass
from torch import Tensor

from agent.cores.core import RecurrentCore, State, clear, register, take
from agent.cores.scan import scan
from agent.networks import BlockLinear, Layer, Linear, RMSNorm


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


@register("gru")
class BlockGRU(RecurrentCore):
    """h' = u * tanh(r * c) + (1 - u) * h, gates from a block-diagonal layer over [h, W h, x].

    With h_b one of g blocks of h, and [., .] the concatenation:

        p       = SiLU(RMS(W_p h))
        m_b     = SiLU(RMS(W_b [h_b, p, x]))
        r, c, u = per block a third of W'_b m_b;   r = sigmoid(r), u = sigmoid(u - 1)

    p and x are the same for all blocks, so W_b [h_b, p, x] is computed as a block product of h plus one dense product
    of [p, x]: the same numbers without g copies of p and x.
    """

    Config = BlockGRUConfig
    parallel_in_time = False

    def __init__(self, input_size: int, config: BlockGRUConfig):
        super().__init__()
        deter, hidden, blocks = config.deter, config.hidden, config.blocks
        self.feature_size = deter
        self.blocks = blocks
        self.past = Layer(deter, hidden)
        shared = hidden + input_size
        fan_in = deter + blocks * shared
        self.mix_blocks = BlockLinear(deter, deter, blocks, fan_in=fan_in)
        self.mix_shared = Linear(shared, deter, bias=False, fan_in=fan_in)
        self.norm = RMSNorm(deter)
        self.gates = BlockLinear(deter, 3 * deter, blocks)

    def initial(self, batch: int) -> State:
        """An empty memory: `deter` (B, F) of zeros."""
        return {"deter": torch.zeros(batch, self.feature_size, device=self.norm.scale.device)}

    def step(self, x: Tensor, state: State, first: Tensor) -> tuple[Tensor, State]:
        """Input x (B, X), state `deter` (B, F), first (B,) -> h (B, F) and the new state, in which `deter` is h."""
        deter = clear(state, first)["deter"]
        h = deter.to(x.dtype)
        mixed = self.mix_blocks(h) + self.mix_shared(torch.cat([self.past(h), x], -1))
        gates = self.gates(F.silu(self.norm(mixed))).to(deter.dtype)  # (B, 3 F)
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
