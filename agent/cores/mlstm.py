"""The mLSTM core: residual blocks around a matrix memory with exponential gates.

Source: Beck et al., "xLSTM: Extended Long Short-Term Memory" (2024), the block with up-projection before the cell;
norms and the initialisation of outer layers are this agent's.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import ConfigDict, Field, NonNegativeInt, PositiveInt, model_validator
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from agent.cores.core import Inspection, RecurrentCore, State, register, take
from agent.cores.inspection import look
from agent.cores.memory import Memory, effective_rank, empty, memories_at
from agent.cores.reads import PlainRead, Read
from agent.cores.rotary import Turn, elapsed, rotate, turns
from agent.networks import RMS_EPS, BlockLinear, Linear, RMSNorm, initialize_

FORGET_BIAS = (3.0, 6.0)  # from the first to the last head: memories of about 20 to 400 steps
INPUT_BIAS_STD = 0.1
UNIT_EPS = 1e-6

Cell = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Memory], tuple[Tensor, Memory]]
"""q, k, v (B, H, T, D), log gates (B, H, T), first (B, T), memory -> y (B, H, T, D) and the wanted memory."""


@dataclass(frozen=True, config=ConfigDict(extra="forbid", strict=True, allow_inf_nan=False))
class MLSTMConfig:
    """Keys of `configs/core/mlstm.yaml`."""

    width: PositiveInt
    blocks: PositiveInt
    heads: PositiveInt
    head_dim: PositiveInt
    conv: Annotated[int, Field(ge=2)]
    input_gate: Literal["exponential", "sigmoid"]
    unit_norm: bool
    rotary_heads: NonNegativeInt
    qkv_block: PositiveInt | None

    @model_validator(mode="after")
    def _divides(self) -> "MLSTMConfig":
        if self.head_dim % (self.qkv_block or 1):
            raise ValueError(f"qkv_block ({self.qkv_block}) must divide head_dim ({self.head_dim})")
        if self.rotary_heads > self.heads:
            raise ValueError(f"rotary_heads ({self.rotary_heads}) must be at most heads ({self.heads})")
        if self.rotary_heads and self.head_dim % 2:
            raise ValueError(f"head_dim ({self.head_dim}) must be even where rotary_heads is not 0")
        return self


class MLSTMBlock(nn.Module):
    """x + down(SiLU(z) * (norm(cell(q, k, v, gates)) + skip * c)) with u, z = up(norm(x)).

    c = SiLU(conv(u)) over the last few steps. Per head, q and k are linear in c, and v in u; the gates are linear in
    q, k and v of all heads.
    """

    gate_means: Tensor

    def __init__(self, config: MLSTMConfig):
        super().__init__()
        heads, inner = config.heads, config.heads * config.head_dim
        self.config = config
        self.norm = RMSNorm(config.width)
        self.up = Linear(config.width, 2 * inner, bias=False)
        self.conv = nn.Parameter(torch.empty(inner, config.conv))
        initialize_(self.conv, config.conv)
        self.conv_bias = nn.Parameter(torch.zeros(inner))
        width = config.qkv_block or config.head_dim
        self.query, self.key, self.value = (
            BlockLinear(inner, inner, inner // width, fan_in=width, products=heads) for _ in range(3)
        )
        # Gates begin as constants of their heads, and learn to look.
        self.gates = nn.Parameter(torch.zeros(2 * heads, 3 * inner))
        input_bias, forget_bias = INPUT_BIAS_STD * torch.randn(heads), torch.linspace(*FORGET_BIAS, heads)
        self.gates_bias = nn.Parameter(torch.cat([input_bias, forget_bias]))
        self.register_buffer("gate_means", torch.zeros(2), persistent=False)  # for the log; see `diagnostics`
        self.head_norm = RMSNorm(config.head_dim)
        self.skip = nn.Parameter(torch.ones(inner))
        self.down = Linear(inner, config.width, bias=False, scale=config.blocks**-0.5)

    def forward(
        self, x: Tensor, memory: Memory, history: Tensor, first: Tensor, turn: Turn | None, cell: Cell,
        keep: Sequence[int] | None,
    ) -> tuple[Tensor, Memory, Tensor]:  # fmt: skip
        """T steps.

        Args:
            x: (B, T, W).
            memory: before the first step, (B, H, ...).
            history: u of the steps before, (B, conv - 1, I).
            first: (B, T).
            turn: by which the first R heads turn q and k, (B, R, T, D / 2) each, if there are any.
            cell: what writes and reads the memory.
            keep: the K steps whose history is wanted; None is the last one.

        Returns:
            x (B, T, W), the memory that the cell gives, and history (B, conv - 1, I) or with `keep` (B, K, ...).
        """
        u, z = self.up(self.norm(x)).chunk(2, -1)  # (B, T, I)
        before = self.config.conv - 1
        steps = torch.cat([history.to(x.dtype), u], 1)  # (B, conv - 1 + T, I)
        episode = F.pad(first.cumsum(1), (before, 0)).unsqueeze(-1)  # (B, conv - 1 + T, 1): resets so far
        c = F.silu(self._convolved(steps, episode).to(x.dtype))
        q, k, v, log_input, log_forget = self._cell_inputs(c, u)
        if turn is not None:
            q, k = rotate(q, turn), rotate(k, turn)
        y, memory = cell(q, k, v, log_input, log_forget, first, memory)
        y = self.head_norm(y.transpose(1, 2)).flatten(2)  # (B, T, I)
        x = x + self.down((y + self.skip.to(x.dtype) * c) * F.silu(z))
        kept = [u.shape[1] - 1] if keep is None else keep
        seen = self._history(steps, episode, [before + step for step in kept]).to(history.dtype)
        return x, memory, seen.squeeze(1) if keep is None else seen

    def _convolved(self, steps: Tensor, episode: Tensor) -> Tensor:
        """Steps (B, conv - 1 + T, I) and their episodes (B, conv - 1 + T, 1) -> convolution (B, T, I) in fp32.

        What lies before a reset is not seen. It is a sum of shifted views, as the gradient of one view of all windows
        would be a scattered sum.
        """
        wide = torch.promote_types(steps.dtype, torch.float32)
        before = self.config.conv - 1
        total = self.conv_bias.to(wide)
        for place, weight in enumerate(self.conv.to(wide).unbind(1)):
            then = slice(place, steps.shape[1] - before + place)
            same = episode[:, then] == episode[:, before:]
            total = total + torch.where(same, steps[:, then], 0.0) * weight
        return total

    def _history(self, steps: Tensor, episode: Tensor, places: Sequence[int]) -> Tensor:
        """What a convolution after each of K places will see of the past, (B, K, conv - 1, I); arguments as above."""
        parts = []
        for back in reversed(range(self.config.conv - 1)):
            then = [place - back for place in places]
            same = take(episode, 1, then) == take(episode, 1, places)
            parts.append(torch.where(same, take(steps, 1, then), 0.0))
        return torch.stack(parts, 2)

    def _cell_inputs(self, c: Tensor, u: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """The branches c, u (B, T, I) -> q, k, v (B, H, T, D) and the logarithms of both gates (B, H, T)."""
        config = self.config
        rows = [layer(x.flatten(0, 1)) for layer, x in ((self.query, c), (self.key, c), (self.value, u))]
        wide = torch.promote_types(c.dtype, torch.float32)
        # What is learned moves gates about their constants, so its rounding is small beside them, which stay in fp32.
        gates = F.linear(torch.cat(rows, -1), self.gates.to(c.dtype)).to(wide) + self.gates_bias.to(wide)
        gates = gates.view(*c.shape[:2], 2, config.heads).permute(2, 0, 3, 1)  # (2, B, H, T)
        log_input = F.logsigmoid(gates[0]) if config.input_gate == "sigmoid" else gates[0]
        q, k, v = (row.view(*c.shape[:2], config.heads, -1).transpose(1, 2) for row in rows)
        if config.unit_norm:
            q, k = unit_length(q), unit_length(k)
        log_forget = F.logsigmoid(gates[1])
        if self.gates.requires_grad and torch.is_grad_enabled():  # in training, but not in a frozen twin
            with torch.no_grad():
                self.gate_means.copy_(torch.stack([log_input.mean(), log_forget.exp().mean()]))
        return q, k * config.head_dim**-0.5, v, log_input, log_forget


@register("mlstm")
class MLSTM(RecurrentCore):
    """Input layer, residual mLSTM blocks, norm.

    The state of block i is `memory_i` (B, H, D, D) with its `normaliser_i` (B, H, D) and `stabiliser_i` (B, H), and
    `conv_i` (B, conv - 1, I), the last inputs of its convolution. With rotary heads there is `clock` (B, 1), the steps
    since the last reset.
    """

    Config: ClassVar[type[Any]] = MLSTMConfig
    parallel_in_time = True

    def __init__(self, input_size: int, config: MLSTMConfig):
        super().__init__()
        self.config = config
        self.feature_size = config.width
        self.read_size = self.query_size = config.heads * config.head_dim
        self.input = Linear(input_size, config.width)
        self.blocks = nn.ModuleList(MLSTMBlock(config) for _ in range(config.blocks))
        self.norm = RMSNorm(config.width)
        self.reader = self.make_read(config)

    def make_read(self, config: MLSTMConfig) -> Read:
        """How the memories of all blocks are read."""
        return PlainRead()

    def scale_output_(self, factor: float) -> None:
        """Let h begin this many times as long."""
        self.norm.scale.data.mul_(factor)

    def initial(self, batch: int) -> State:
        """Empty memories, and histories of zeros."""
        config, device = self.config, self.norm.scale.device
        memory = empty(batch, config.heads, config.head_dim, self.reader.written_size(config.head_dim), device)
        history = torch.zeros(batch, config.conv - 1, config.heads * config.head_dim, device=device)
        state: State = {"clock": torch.zeros(batch, 1, device=device)} if config.rotary_heads else {}
        for index in range(config.blocks):
            state |= _pack(index, Memory(*(part.clone() for part in memory)), history.clone())
        return state

    def for_imagination(self, state: State, dtype: torch.dtype) -> State:
        """The same with the matrices C in `dtype` where the read bears it."""
        if not self.reader.bears_rounding:
            return state
        return {key: value.to(dtype) if key.startswith("memory_") else value for key, value in state.items()}

    def step(self, x: Tensor, state: State, first: Tensor) -> tuple[Tensor, State]:
        """Input x (B, X), state (B, ...), first (B,) -> h (B, F) and the state after it."""

        def cell(
            q: Tensor, k: Tensor, v: Tensor, log_input: Tensor, log_forget: Tensor, first: Tensor, memory: Memory
        ) -> tuple[Tensor, Memory]:
            q, k, v, log_input, log_forget = (part.squeeze(2) for part in (q, k, v, log_input, log_forget))
            v = self.reader.written(k, v)
            y, memory = self.reader.step(q, k, v, log_input, log_forget, first.squeeze(1), memory)
            return y.unsqueeze(2), memory

        h, state = self._run(x.unsqueeze(1), state, first.unsqueeze(1), cell, None)
        return h.squeeze(1), state

    def sequence(
        self, x: Tensor, state: State, first: Tensor, keep: Sequence[int] | None = None
    ) -> tuple[Tensor, State]:
        """Inputs x (B, T, X), first (B, T) -> h (B, T, F) and the state, (B, ...) or with `keep` (B, K, ...)."""

        def cell(
            q: Tensor, k: Tensor, v: Tensor, log_input: Tensor, log_forget: Tensor, first: Tensor, memory: Memory
        ) -> tuple[Tensor, Memory]:
            # What a reset hides from later steps is multiplied by 0 here, which a NaN would survive.
            k, v, log_input, log_forget = (finite(part) for part in (k, v, log_input, log_forget))
            memory, v = Memory(*(finite(part) for part in memory)), self.reader.written(k, v)
            y, last = self.reader.sequence(q, k, v, log_input, log_forget, first, memory)
            if keep is None:
                return y, last
            return y, memories_at(k, v, log_input, log_forget, first, memory, keep)

        return self._run(x, state, first, cell, keep)

    def read(self, query: Tensor, state: State) -> Tensor:
        """Ask the last block's memory (N, ...) once more: query (N, H * D) -> answer (N, H * D), normed per head."""
        config = self.config
        q = query.unflatten(-1, (config.heads, -1))
        if config.unit_norm:
            q = unit_length(q)
        if config.rotary_heads:
            turn = turns(state["clock"], config.rotary_heads, config.head_dim)
            q = rotate(q.unsqueeze(2), turn).squeeze(2)
        memory, _ = _unpack(config.blocks - 1, state)
        y = self.reader.read(q, memory)
        y = F.rms_norm(y.to(memory.n.dtype), y.shape[-1:], eps=RMS_EPS)
        return y.flatten(1).to(query.dtype)

    @torch.no_grad()
    def diagnostics(self, state: State) -> dict[str, Tensor]:
        """Means over streams and heads, for each block.

        Of the memory, the log of its norm |exp(m) C| and its effective rank, the participation ratio |C|^4 / |C'C|^2 of
        the squared singular values; of the gates, as they were when last trained, the log of the input gate and the
        forget gate.
        """
        numbers = {}
        for index, block in enumerate(self.blocks):
            memory, _ = _unpack(index, state)
            C = memory.C[..., : self.config.head_dim]  # without what else a read has written
            square = C.square().sum((-2, -1)).clamp(min=torch.finfo(C.dtype).tiny)
            gates = block.get_buffer("gate_means").clone()
            numbers[f"log_input_gate_{index}"], numbers[f"forget_gate_{index}"] = gates.unbind()
            numbers[f"log_norm_{index}"] = (square.log() / 2 + memory.m).mean()
            numbers[f"effective_rank_{index}"] = effective_rank(C).mean()
        return numbers

    @torch.no_grad()
    def inspect(self, x: Tensor, first: Tensor) -> Inspection:
        """The weights of all writes in what each step reads, and the ranks of what is written."""
        looks: list[tuple[Tensor, Tensor]] = []

        def cell(
            q: Tensor, k: Tensor, v: Tensor, log_input: Tensor, log_forget: Tensor, first: Tensor, memory: Memory
        ) -> tuple[Tensor, Memory]:
            written = self.reader.written(k, v)
            looks.append(look(self.reader, q, k, written, log_input, log_forget, first, v.shape[-1]))
            return self.reader.sequence(q, k, written, log_input, log_forget, first, memory)

        self._run(x.unsqueeze(0), self.initial(1), first.unsqueeze(0), cell, None)
        weights, rank = (torch.cat(parts) for parts in zip(*looks, strict=True))
        return Inspection(weights=weights, rank=rank)

    @staticmethod
    def memory_of_block(index: int, state: State) -> Memory:
        """The memory of a block in a state."""
        return _unpack(index, state)[0]

    def schedule(self, updates: int, metrics: Mapping[str, float]) -> bool:
        """Let the read change with training; whether another path through the code is taken from now on."""
        return self.reader.schedule(updates, metrics)

    def _run(
        self, x: Tensor, state: State, first: Tensor, cell: Cell, keep: Sequence[int] | None
    ) -> tuple[Tensor, State]:
        x = self.input(x)
        after: State = {}
        turn = None
        if self.config.rotary_heads:
            time = elapsed(state["clock"].squeeze(1), first)
            turn = turns(time, self.config.rotary_heads, self.config.head_dim)
            after["clock"] = time[:, -1:] if keep is None else take(time, 1, keep).unsqueeze(-1)
        for index, block in enumerate(self.blocks):
            memory, history = _unpack(index, state)
            x, memory, history = block(x, memory, history, first, turn, cell, keep)
            after |= _pack(index, memory, history)
        h = self.norm(x)
        return h.to(torch.promote_types(h.dtype, torch.float32)), after


def unit_length(x: Tensor) -> Tensor:
    """Vectors (..., D) scaled to length 1; those much shorter than UNIT_EPS stay short."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return (wide * (wide.square().sum(-1, keepdim=True) + UNIT_EPS**2).rsqrt()).to(x.dtype)


def finite(x: Tensor) -> Tensor:
    """The tensor with 0 for every number that is none."""
    return torch.nan_to_num(x, nan=0.0, posinf=0.0, neginf=0.0)


def _pack(index: int, memory: Memory, history: Tensor) -> State:
    C, n, m = memory
    return {f"memory_{index}": C, f"normaliser_{index}": n, f"stabiliser_{index}": m, f"conv_{index}": history}


def _unpack(index: int, state: State) -> tuple[Memory, Tensor]:
    C, n, m = (state[f"{part}_{index}"] for part in ("memory", "normaliser", "stabiliser"))
    return Memory(C, n, m), state[f"conv_{index}"]
