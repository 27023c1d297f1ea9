"""Causal attention over a window of steps: it forgets nothing in there, so other cores are measured against it.

Sources: Vaswani et al., "Attention Is All You Need" (2017); Su et al., "RoFormer: Enhanced Transformer with Rotary
Position Embedding" (2021); Zhang and Sennrich, "Root Mean Square Layer Normalization" (2019); Shazeer, "GLU Variants
Improve Transformer" (2020).
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from pydantic import ConfigDict, PositiveInt, model_validator
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from agent.cores.core import Inspection, RecurrentCore, State, register
from agent.networks import Linear, RMSNorm, initialize_

LONGEST_WAVE = 10_000  # steps per radian of the slowest rotation

Rotation = tuple[Tensor, Tensor]
"""Cosine and sine (steps, 1, head_size / 2) by which heads are turned at each step."""


@dataclass(frozen=True, config=ConfigDict(extra="forbid", strict=True))
class AttentionConfig:
    """Keys of `configs/core/attention.yaml`."""

    window: PositiveInt
    width: PositiveInt
    blocks: PositiveInt
    heads: PositiveInt
    head_size: PositiveInt
    units: PositiveInt

    @model_validator(mode="after")
    def _turns_in_pairs(self) -> "AttentionConfig":
        if self.head_size % 2:
            raise ValueError(f"head_size ({self.head_size}) must be even")
        return self


@register("attention")
class AttentionWindow(RecurrentCore):
    """Linear -> pre-norm blocks of attention and gated feed-forward -> RMSNorm.

    Step t sees the steps max(t - window + 1, start of the episode) .. t, in every block. The memory holds the keys and
    values of the last `window` steps, the newest last, and which of these places are taken. Keys are stored as they
    are and turned when they are read, by their place in what is read: scores depend on distances alone, and no
    counter grows with time.
    """

    Config = AttentionConfig
    parallel_in_time = True

    def __init__(self, input_size: int, config: AttentionConfig):
        super().__init__()
        self.feature_size = config.width
        self.window = config.window
        self.head_size = config.head_size
        self.memory_size = config.heads * config.head_size
        self.input = Linear(input_size, config.width)
        # The input is 0 where an episode begins. From a stream of 0, every norm on the way back would multiply the
        # gradient by a hundred, and all of them together drown what the other steps say.
        assert self.input.bias is not None
        initialize_(self.input.bias, fan_in=1, scale=0.5)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.blocks))
        self.norm = RMSNorm(config.width)

    def scale_output_(self, factor: float) -> None:
        """Let h begin this many times as long."""
        self.norm.scale.data.mul_(factor)

    def initial(self, batch: int) -> State:
        """An empty memory: `keys` and `values` (B, window, blocks, heads * head_size), `taken` (B, window)."""
        device = self.norm.scale.device
        shape = (batch, self.window, len(self.blocks), self.memory_size)
        return {
            "keys": torch.zeros(shape, device=device),
            "values": torch.zeros(shape, device=device),
            "taken": torch.zeros(batch, self.window, device=device),
        }

    def for_imagination(self, state: State, dtype: torch.dtype) -> State:
        """The same with keys and values in the dtype of the products that they are: no number changes."""
        return {key: value if key == "taken" else value.to(dtype) for key, value in state.items()}

    def step(self, x: Tensor, state: State, first: Tensor) -> tuple[Tensor, State]:
        """A sequence of one: x (B, X), first (B,) -> h (B, F) and the new state."""
        h, state = self.sequence(x.unsqueeze(1), state, first.unsqueeze(1))
        return h.squeeze(1), state

    def sequence(
        self, x: Tensor, state: State, first: Tensor, keep: Sequence[int] | None = None
    ) -> tuple[Tensor, State]:
        """Inputs x (B, T, X), first (B, T) -> h (B, T, F) and the state, (B, ...) or with `keep` (B, K, ...).

        All is done on S = window - 1 + T steps: those of the memory that step 0 still sees, then the new ones.
        """
        # Resets since the memory was made, (B, S): steps with equal numbers belong to one episode.
        episode = F.pad(first.cumsum(1), (self.window - 1, 0))
        taken = _append(state["taken"], torch.ones_like(first, dtype=state["taken"].dtype))
        seen = self._seen(episode, taken)
        wide = torch.promote_types(x.dtype, torch.float32)
        rotation = _rotation(episode.shape[1], self.head_size, wide, x.device)

        stream = self.input(x).to(wide)  # (B, T, F)
        keys, values = [], []
        for i, block in enumerate(self.blocks):
            past = (state["keys"][:, :, i], state["values"][:, :, i])
            stream, (key, value) = block(stream, past, seen, rotation, x.dtype)
            keys.append(key)
            values.append(value)
        history = {"keys": torch.stack(keys, 2), "values": torch.stack(values, 2), "taken": taken}
        return self.norm(stream), self._memory(history, episode, keep)

    @torch.no_grad()
    def inspect(self, x: Tensor, first: Tensor) -> Inspection:
        """The attention of every head, by the steps that it goes to."""
        weights: list[Tensor] = []
        hooks = [
            block.register_forward_pre_hook(lambda block, given: weights.append(block.weights(*given)))
            for block in self.blocks
        ]
        try:
            self.sequence(x.unsqueeze(0), self.initial(1), first.unsqueeze(0))
        finally:
            for hook in hooks:
                hook.remove()
        return Inspection(weights=torch.cat(weights)[..., self.window - 1 :])

    def _seen(self, episode: Tensor, taken: Tensor) -> Tensor:
        """Which of S steps each of the T last ones sees: episode (B, S), taken (B, S) -> bool (B, T, S)."""
        places = torch.arange(episode.shape[1], device=episode.device)
        age = places[self.window - 1 :, None] - places  # (T, S)
        same = episode[:, self.window - 1 :, None] == episode[:, None]
        return same & ((age >= 0) & (age < self.window)) & (taken > 0.5)[:, None]

    def _memory(self, history: State, episode: Tensor, keep: Sequence[int] | None) -> State:
        """The state after the chosen steps, out of all S steps: tensors (B, S, ...), episode (B, S)."""
        window, steps = self.window, episode.shape[1] - self.window + 1
        chosen = [steps - 1] if keep is None else list(keep)

        def windows(whole: Tensor) -> Tensor:  # slices and not an index, which would have to be sent to the device
            return torch.stack([whole[:, t : t + window] for t in chosen], 1)  # (B, K, window, ...)

        numbers = windows(episode)
        same = numbers == numbers[:, :, -1:]
        kept = {}
        for key, whole in history.items():
            here = windows(whole)
            kept[key] = torch.where(same.view(*same.shape, *[1] * (here.dim() - 3)), here, 0.0)
        return kept if keep is not None else {key: value[:, 0] for key, value in kept.items()}


class Block(nn.Module):
    """y = x + A(RMS(x)); y + W_d (SiLU(W_g n) * W_u n) with n = RMS(y). A: attention and the projection of its heads.

    The sums are kept in fp32, the products are in the dtype that the caller names.
    """

    def __init__(self, config: AttentionConfig):
        super().__init__()
        self.heads = config.heads
        size = config.heads * config.head_size
        # Each block adds two branches to the stream, which would otherwise grow with the number of blocks.
        scale = (2 * config.blocks) ** -0.5
        self.attention_norm = RMSNorm(config.width)
        self.queries_keys_values = Linear(config.width, 3 * size, bias=False)
        self.attention_out = Linear(size, config.width, bias=False, scale=scale)
        self.feed_forward_norm = RMSNorm(config.width)
        self.gate_up = Linear(config.width, 2 * config.units, bias=False)
        self.down = Linear(config.units, config.width, bias=False, scale=scale)

    def forward(
        self, stream: Tensor, past: tuple[Tensor, Tensor], seen: Tensor, rotation: Rotation, dtype: torch.dtype
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """The new stream, and the keys and values of all S steps.

        Args:
            stream: (B, T, F).
            past: keys and values of the memory (B, window, heads * head_size).
            seen: bool (B, T, S).
            rotation: of all S steps.
            dtype: of the matrix products.
        """
        query, key, value = self._projected(stream, past, dtype)
        stream = stream + self.attention_out(self._attend(query, key, value, seen, rotation))
        gate, up = self.gate_up(self.feed_forward_norm(stream).to(dtype)).chunk(2, -1)
        return stream + self.down(F.silu(gate) * up), (key, value)

    def weights(
        self, stream: Tensor, past: tuple[Tensor, Tensor], seen: Tensor, rotation: Rotation, dtype: torch.dtype
    ) -> Tensor:
        """What each step attends to: the arguments of `forward` -> (B, heads, T, S), sums over S are 1."""
        query, key, _ = self._projected(stream, past, dtype)
        query, key = (rows.unflatten(-1, (self.heads, -1)) for rows in (query, key))
        steps = query.shape[1]
        query = _turn(query, (rotation[0][-steps:], rotation[1][-steps:])).transpose(1, 2)
        scores = query @ _turn(key, rotation).permute(0, 2, 3, 1) * query.shape[-1] ** -0.5
        return scores.masked_fill(~seen.unsqueeze(1), -torch.inf).softmax(-1)

    def _projected(
        self, stream: Tensor, past: tuple[Tensor, Tensor], dtype: torch.dtype
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Queries (B, T, D), and keys and values (B, S, D) behind those of the memory."""
        query, *new = self.queries_keys_values(self.attention_norm(stream).to(dtype)).chunk(3, -1)
        key, value = (_append(old, more.to(old.dtype)) for old, more in zip(past, new, strict=True))
        return query, key, value

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, seen: Tensor, rotation: Rotation) -> Tensor:
        """Query (B, T, D), key and value (B, S, D), seen (B, T, S) -> what is read (B, T, D), in the query's dtype."""
        steps = query.shape[1]
        query, key, value = (rows.unflatten(-1, (self.heads, -1)) for rows in (query, key, value))
        query = _turn(query, (rotation[0][-steps:], rotation[1][-steps:])).to(query.dtype)
        # What lies beyond a reset may be infinite, and even with weight 0 it would make the sum NaN. Nothing is
        # hidden by this: a step that is not finite shows in its own output.
        key, value = (
            rows.nan_to_num(0.0, 0.0, 0.0).to(query.dtype) for rows in (_turn(key, rotation), value)
        )  # (B, S, heads, head_size)
        read = F.scaled_dot_product_attention(
            query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), seen.unsqueeze(1)
        )  # (B, heads, T, head_size); its softmax is in fp32 whatever the dtype
        return read.transpose(1, 2).flatten(-2)


def _append(old: Tensor, new: Tensor) -> Tensor:
    """Memory (B, window, ...), new steps (B, T, ...) -> (B, window - 1 + T, ...): no new step sees the oldest one."""
    return torch.cat([old[:, 1:], new], 1)


def _rotation(steps: int, size: int, dtype: torch.dtype, device: torch.device) -> Rotation:
    """Step p turns pair i of a head by p / LONGEST_WAVE^(2 i / size): cosine and sine (steps, 1, size / 2)."""
    speed = LONGEST_WAVE ** (-torch.arange(0, size, 2, device=device, dtype=dtype) / size)
    angle = (torch.arange(steps, device=device, dtype=dtype)[:, None] * speed)[:, None]
    return angle.cos(), angle.sin()


def _turn(rows: Tensor, rotation: Rotation) -> Tensor:
    """Rotate heads (B, steps, heads, head_size), pairs made of one entry of each half, in the rotation's dtype."""
    cos, sin = rotation
    a, b = rows.to(cos.dtype).chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)
