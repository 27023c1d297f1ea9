"""What a matrix memory reads, write by write: every read is a sum over all that was written, each with a weight.

C_t is the sum over u <= t of D_tu k_u v_u', where D_tu is what the gates have left of write u, and each read asks for
some x_t'C_t (`Read.effective_query`). So the answer is the sum of w_tu v_u with the weights w_tu = D_tu (x_t'k_u).
"""

import torch
from torch import Tensor

from agent.cores.memory import Memory, effective_rank, empty, memories_at, split
from agent.cores.reads import Read

PIECE = 64
"""Steps whose memories are formed at once."""


def look(
    read: Read, q: Tensor, k: Tensor, v: Tensor, log_input: Tensor, log_forget: Tensor, first: Tensor, values: int
) -> tuple[Tensor, Tensor]:
    """Read after each of T steps from an empty memory: q, k (B, H, T, K), v (B, H, T, V) as written, gates, resets.

    Returns:
        The weights w (B, H, T, T), and the effective rank (B, H, T) of the first `values` columns of each C_t.
    """
    wide = log_input.dtype
    q, k, v = (part.to(wide) for part in (q, k, v))
    start = empty(q.shape[0], q.shape[1], q.shape[3], v.shape[3], q.device)
    start = memory = Memory(*(part.to(wide) for part in start))
    asked, ranks = [], []
    for begin in range(0, q.shape[2], PIECE):
        here = slice(begin, begin + PIECE)
        given = (k[:, :, here], v[:, :, here], log_input[..., here], log_forget[..., here], first[:, here])
        memories = memories_at(*given, memory, range(given[0].shape[2]), PIECE)  # (B, T', H, ...)
        asked.append(read.effective_query(q[:, :, here].transpose(1, 2), memories).transpose(1, 2))
        ranks.append(effective_rank(memories.C[..., :values]).transpose(1, 2))
        memory = Memory(*(part[:, -1] for part in memories))
    left = split(k, v, log_input, log_forget, first, start, q.shape[2]).weight[:, :, 0]  # D, with the scale of C
    return torch.cat(asked, 2) @ k.mT * left, torch.cat(ranks, 2)


def mean_age(weights: Tensor) -> Tensor:
    """How long ago what is read was written, in steps, weighed by the size of the weights: (..., T, T) -> (..., T)."""
    steps = torch.arange(weights.shape[-1], device=weights.device)
    size = weights.abs()
    age = (size * (steps[:, None] - steps)).sum(-1)
    return age / size.sum(-1).clamp(min=torch.finfo(size.dtype).tiny)
