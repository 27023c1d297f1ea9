"""The matrix memory: associations k -> v written with exponential gates, read plainly or through its singular values.

    C_t = f_t C_{t-1} + i_t k_t v_t'        n_t = f_t n_{t-1} + i_t k_t        y_t = q_t' C_t, or q_t' f(C_t / |C_t|_F)

Everything is kept divided by exp(m), m the largest log weight of what is held, so that the heaviest write has weight 1
and no exponential overflows. k comes in scaled by 1 / sqrt(K).

All forms take q, k (B, H, T, K), v (B, H, T, V), the logarithms of both gates (B, H, T) in fp32, `first` (B, T) bool,
which empties the memory before a step, and a Memory; they give y (B, H, T, V) in the dtype of q and the Memory after
the last step. Products of queries are in the dtype of q, k and v; states, weights and norms stay in fp32. For one step
there is no axis T.

The forms parallel in time work on chunks: products with C_t for all t of a chunk are products with the memory C at its
start and, through a matrix D (L, L) of weights, with the chunk's own keys and values, so that no C_t is ever formed:

    x' C_t = a_t x' C + sum_u D_tu (x' k_u) v_u'        C_t w = a_t C w + sum_u D_tu k_u (v_u' w)

Source: Beck et al., "xLSTM: Extended Long Short-Term Memory" (2024), stabilised as there.
"""

from collections.abc import Callable, Sequence
from itertools import groupby
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from agent.cores.core import take

EMPTY = -1e30
"""m of an empty memory: finite, so that differences are never NaN, and below whatever a gate can say."""

NORM_FLOOR = 1e-3
"""Frobenius norms well below it count as nothing instead of being scaled up to 1. The heaviest write has weight 1
and norm |k||v|, so this is relative to the writes: only what cancelled, or was written with next to no value, is so
small, and its direction is rounding noise, which gradients would multiply by one over the norm."""

NORMALISER_EPS = 1e-6
MAX_LOG_NORMALISER = 80.0  # exp of more overflows in fp32


class Memory(NamedTuple):
    """The memory is exp(m) C, its normaliser exp(m) n; all in fp32, but for C in imagination, which may be in bf16.

    Other leading axes than (B, H) do as well.
    """

    C: Tensor  # (B, H, K, V)
    n: Tensor  # (B, H, K)
    m: Tensor  # (B, H)


def empty(batch: int, heads: int, key: int, value: int, device: torch.device | None = None) -> Memory:
    """A memory (B, H, K, V) that holds nothing: what is written first has weight 1, however small its gate."""
    return Memory(
        torch.zeros(batch, heads, key, value, device=device),
        torch.zeros(batch, heads, key, device=device),
        torch.full((batch, heads), EMPTY, device=device),
    )


# ---- one step ------------------------------------------------------------------------------------------------


def write(k: Tensor, v: Tensor, log_input: Tensor, log_forget: Tensor, first: Tensor, memory: Memory) -> Memory:
    """Decay what is there and add the association of k (B, H, K) with v (B, H, V).

    log_input and log_forget are (B, H), first (B,).
    """
    # `where` and not a product: what is emptied may be infinite, and 0 * inf is NaN.
    first = first[:, None]
    C = torch.where(first[..., None, None], 0.0, memory.C)
    n = torch.where(first[..., None], 0.0, memory.n)
    old = log_forget + torch.where(first, EMPTY, memory.m)
    m = torch.maximum(old, log_input)
    forget, k = (old - m).exp(), k * (log_input - m).exp()[..., None]
    C = forget[..., None, None] * C + k[..., None] * v[..., None, :]
    return Memory(C, forget[..., None] * n + k, m)


def plain_read(q: Tensor, memory: Memory) -> Tensor:
    """Read q'C / max(|q'n|, exp(-m)) for q (B, H, K) -> (B, H, V)."""
    y = _row(q, memory.C.to(q.dtype)).to(memory.n.dtype)
    overlap = (q * memory.n).sum(-1)
    return (y / _normaliser(overlap, memory.m)[..., None]).to(q.dtype)


def plain_query(q: Tensor, memory: Memory) -> Tensor:
    """The x (..., H, K) with x'C = `plain_read` of q (..., H, K)."""
    return q / _normaliser((q * memory.n).sum(-1), memory.m)[..., None]


def matrix_read(q: Tensor, memory: Memory, function: Callable[[Tensor], Tensor]) -> Tensor:
    """Read q' f(C / |C|) for q (..., H, K) -> (..., H, V), with f applied to the matrices (..., H, K, V), in fp32."""
    return _row(q.to(memory.C.dtype), function(unit(memory.C))).to(q.dtype)


def matrix_query(q: Tensor, memory: Memory, function: Callable[[Tensor], Tensor]) -> Tensor:
    """The x (..., H, K) with x'C = `matrix_read` of q (..., H, K), for f that only maps singular values."""
    A = unit(memory.C)
    return _row(_row(q, function(A)), torch.linalg.pinv(A)) * _inverse_norm(memory.C)[..., 0]


def polynomial_read(q: Tensor, memory: Memory, coefficients: Tensor) -> Tensor:
    """Read q' f(C / |C|) for q (B, H, K) -> (B, H, V), f(s) = sum_j c_j s T_j(2 s^2 - 1), c (J,): 2 J - 1 products."""
    A = unit(memory.C).to(q.dtype)
    return _polynomial(q, coefficients, lambda x: _row(x, A), lambda y: _row(y, A.mT))


def polynomial_query(q: Tensor, memory: Memory, coefficients: Tensor) -> Tensor:
    """The x (B, H, K) with x'C = `polynomial_read` of q (B, H, K): what f makes of C is the same C, asked otherwise."""
    A = unit(memory.C)
    asked = _polynomial_query(q, coefficients, lambda x: _row(x, A), lambda y: _row(y, A.mT))
    return asked * _inverse_norm(memory.C)[..., 0]


def unit(C: Tensor) -> Tensor:
    """Matrices (..., K, V) divided by their Frobenius norms, which count as at least about NORM_FLOOR."""
    return C * _inverse_norm(C)


def _inverse_norm(C: Tensor) -> Tensor:
    """One over the norms that `unit` divides by: (..., K, V) -> (..., 1, 1)."""
    return (C.square().sum((-2, -1), keepdim=True) + NORM_FLOOR**2).rsqrt()


def effective_rank(C: Tensor) -> Tensor:
    """Participation ratio |C|^4 / |C'C|^2 of squared singular values, 1 to K; 0 where C is 0: (..., K, V) -> (...)."""
    square, tiny = C.square().sum((-2, -1), keepdim=True), torch.finfo(C.dtype).tiny
    A = C * square.clamp(min=tiny).rsqrt()
    return torch.where(square[..., 0, 0] > tiny, (A.mT @ A).square().sum((-2, -1)).reciprocal(), 0.0)


def _row(x: Tensor, matrix: Tensor) -> Tensor:
    """Product x' M: (..., K), (..., K, V) -> (..., V)."""
    return (x.unsqueeze(-2) @ matrix).squeeze(-2)


def _normaliser(overlap: Tensor, m: Tensor) -> Tensor:
    """The larger of |q'n| and exp(-m), of any shape: y stays at the scale of v where little like q was ever written."""
    return torch.maximum(overlap.abs(), (-m).clamp(max=MAX_LOG_NORMALISER).exp()) + NORMALISER_EPS


def _polynomial(
    q: Tensor, coefficients: Tensor, to_value: Callable[[Tensor], Tensor], to_key: Callable[[Tensor], Tensor]
) -> Tensor:
    """Read q' f(A) = x' A with the x of `_polynomial_query`; arguments as there."""
    return to_value(_polynomial_query(q, coefficients, to_value, to_key).to(q.dtype))


def _polynomial_query(
    q: Tensor, coefficients: Tensor, to_value: Callable[[Tensor], Tensor], to_key: Callable[[Tensor], Tensor]
) -> Tensor:
    """The x = sum_j c_j T_j(2 A A' - 1) q, by the recurrence of T_j, in at least fp32.

    to_value is x -> x' A, (..., K) -> (..., V), and to_key is y -> A y, (..., V) -> (..., K); both in the dtype of q.
    """
    dtype = q.dtype

    def gram(x: Tensor) -> Tensor:
        return to_key(to_value(x.to(dtype))).to(coefficients.dtype)

    before = q.to(coefficients.dtype)
    c = coefficients.unbind()
    total = c[0] * before
    if len(c) > 1:
        now = 2 * gram(before) - before
        total = total + c[1] * now
        for weight in c[2:]:
            before, now = now, 2 * (2 * gram(now) - now) - before
            total = total + weight * now
    return total


# ---- T steps, one after the other ----------------------------------------------------------------------------


def read_by_steps(
    read: Callable[[Tensor, Memory], Tensor],
    q: Tensor, k: Tensor, v: Tensor, log_input: Tensor, log_forget: Tensor, first: Tensor, memory: Memory,
) -> tuple[Tensor, Memory]:  # fmt: skip
    """The definition that the parallel forms are held to: T times `write` and `read`."""
    outputs = []
    for t in range(q.shape[2]):
        memory = write(k[:, :, t], v[:, :, t], log_input[..., t], log_forget[..., t], first[:, t], memory)
        outputs.append(read(q[:, :, t], memory))
    return torch.stack(outputs, 2), memory


# ---- T steps at once -----------------------------------------------------------------------------------------


class Chunks(NamedTuple):
    """N chunks of L steps, the last one padded with steps that change nothing."""

    k: Tensor  # (B, H, N, L, K)
    v: Tensor  # (B, H, N, L, V)
    weight: Tensor  # D (B, H, N, L, L): what is left at step t of what was written at step u of the chunk
    carry: Tensor  # a (B, H, N, L): what is left at step t of the memory at the chunk's start
    m: Tensor  # (B, H, N, L)
    start: Memory  # before each chunk, (B, H, N, ...)
    end: Memory  # after the last step, (B, H, ...)


def split(
    k: Tensor, v: Tensor, log_input: Tensor, log_forget: Tensor, first: Tensor, memory: Memory, chunk: int
) -> Chunks:
    """Weights inside each chunk and the memory at its start, from the arguments of a form."""
    k, v = (chunked(x, chunk, 0.0) for x in (k, v))  # (B, H, N, L, .)
    log_input = chunked(log_input, chunk, EMPTY)  # (B, H, N, L)
    # A reset is a mask and no decay, which would drown all other terms of the sum.
    log_decay = chunked(log_forget.masked_fill(first[:, None], 0.0), chunk, 0.0).cumsum(-1)
    episode = chunked(first[:, None], chunk, False).cumsum(-1)  # (B, 1, N, L): resets since the chunk's start
    same = (episode[..., :, None] == episode[..., None, :]).tril()

    log_carry = torch.where(episode == 0, log_decay, EMPTY)
    log_weight = torch.where(same, log_decay[..., :, None] - log_decay[..., None, :] + log_input[..., None, :], EMPTY)
    start, end = _carry(k, v, log_weight[..., -1, :], log_carry[..., -1], memory)
    m = torch.maximum(start.m[..., None] + log_carry, log_weight.amax(-1))
    carry = (start.m[..., None] + log_carry - m).exp()
    return Chunks(k, v, (log_weight - m[..., None]).exp(), carry, m, start, end)


def chunked(x: Tensor, chunk: int, padding: float) -> Tensor:
    """(B, H, T) or (B, H, T, d) -> (B, H, N, L) or (B, H, N, L, d), padded at the end."""
    missing = -x.shape[2] % chunk
    return F.pad(x, (*[0, 0] * (x.dim() - 3), 0, missing), value=padding).unflatten(2, (-1, chunk))


def _carry(k: Tensor, v: Tensor, log_weight: Tensor, log_carry: Tensor, memory: Memory) -> tuple[Memory, Memory]:
    """The memory from chunk to chunk.

    log_weight (B, H, N, L) is what each write counts at the end of its chunk, log_carry (B, H, N) what is left there of
    the memory at its start. Returns the memory before each chunk (B, H, N, ...) and after the last one.
    """
    top = log_weight.amax(-1)
    weighted = k * (log_weight - top[..., None]).exp()[..., None]
    C_added = weighted.mT @ v.to(weighted.dtype)  # (B, H, N, K, V), in fp32 whatever the products' dtype
    added = zip(C_added.unbind(2), weighted.sum(-2).unbind(2), top.unbind(-1), log_carry.unbind(-1), strict=True)
    starts = []
    for C, n, m, log_kept in added:
        starts.append(memory)
        old = memory.m + log_kept
        now = torch.maximum(old, m)
        kept, new = (old - now).exp()[..., None], (m - now).exp()[..., None]
        memory = Memory(kept[..., None] * memory.C + new[..., None] * C, kept * memory.n + new * n, now)
    return Memory(*(torch.stack(parts, 2) for parts in zip(*starts, strict=True))), memory


def plain_read_sequence(
    q: Tensor, k: Tensor, v: Tensor, log_input: Tensor, log_forget: Tensor, first: Tensor, memory: Memory,
    chunk: int = 64,
) -> tuple[Tensor, Memory]:  # fmt: skip
    """`plain_read` after every step."""
    chunks = split(k, v, log_input, log_forget, first, memory, chunk)
    wide, steps = log_input.dtype, q.shape[2]
    q = chunked(q, chunk, 0.0)
    scores = (q @ chunks.k.mT).to(wide) * chunks.weight  # (B, H, N, L, L)
    inside = (scores.to(q.dtype) @ chunks.v).to(wide)
    before = (q @ chunks.start.C.to(q.dtype)).to(wide)
    y = inside + chunks.carry[..., None] * before
    overlap = scores.sum(-1) + chunks.carry * (q.to(wide) @ chunks.start.n[..., None]).squeeze(-1)
    y = (y / _normaliser(overlap, chunks.m)[..., None]).to(q.dtype)
    return y.flatten(2, 3)[:, :, :steps], chunks.end


def polynomial_read_sequence(
    q: Tensor, k: Tensor, v: Tensor, log_input: Tensor, log_forget: Tensor, first: Tensor, memory: Memory,
    coefficients: Tensor, chunk: int = 64,
) -> tuple[Tensor, Memory]:  # fmt: skip
    """`polynomial_read` after every step, by 2 J - 1 passes of linear attention for coefficients (J,) in fp32."""
    chunks = split(k, v, log_input, log_forget, first, memory, chunk)
    wide, dtype, steps = log_input.dtype, q.dtype, q.shape[2]
    scale = _inverse_norms(chunks)[..., None]  # (B, H, N, L, 1)
    weight, carry = chunks.weight * scale, chunks.carry[..., None] * scale
    C = chunks.start.C.to(dtype)

    def product(x: Tensor, left: Tensor, right: Tensor, start: Tensor) -> Tensor:
        """Rows x (..., L, K) -> x' A_t (..., L, V) for left = k, right = v; the transpose for the two exchanged."""
        scores = (x @ left.mT).to(wide) * weight
        return ((scores.to(dtype) @ right).to(wide) + carry * (x @ start).to(wide)).to(dtype)

    y = _polynomial(
        chunked(q, chunk, 0.0),
        coefficients.to(wide),
        lambda x: product(x, chunks.k, chunks.v, C),
        lambda x: product(x, chunks.v, chunks.k, C.mT),
    )
    return y.flatten(2, 3)[:, :, :steps], chunks.end


def _inverse_norms(chunks: Chunks) -> Tensor:
    """1 / |C_t| (B, H, N, L) as `unit` has it, in fp32, since the terms may cancel.

    |C_t|^2 = a^2 |C|^2 + 2 a sum_u D_u k_u'C v_u + sum_uw D_u M_uw D_w        M_uw = (k_u'k_w) (v_u'v_w)
    """
    weight, carry, C = chunks.weight, chunks.carry, chunks.start.C
    k, v = chunks.k.to(C.dtype), chunks.v.to(C.dtype)
    across = (weight @ ((k @ C) * v).sum(-1, keepdim=True)).squeeze(-1)
    inside = ((weight @ ((k @ k.mT) * (v @ v.mT))) * weight).sum(-1)
    square = carry.square() * C.square().sum((-2, -1))[..., None] + 2 * carry * across + inside
    return (square.clamp(min=0) + NORM_FLOOR**2).rsqrt()


def matrix_read_sequence(
    q: Tensor, k: Tensor, v: Tensor, log_input: Tensor, log_forget: Tensor, first: Tensor, memory: Memory,
    function: Callable[[Tensor], Tensor],
) -> tuple[Tensor, Memory]:  # fmt: skip
    """`matrix_read` after every step, from all T memories at once: a reference, for short sequences."""
    states = memories_at(k, v, log_input, log_forget, first, memory, range(q.shape[2]))
    y = matrix_read(q.transpose(1, 2), states, function).transpose(1, 2)
    return y, Memory(*(part[:, -1] for part in states))


def memories_at(
    k: Tensor, v: Tensor, log_input: Tensor, log_forget: Tensor, first: Tensor, memory: Memory,
    steps: Sequence[int], chunk: int = 64,
) -> Memory:  # fmt: skip
    """The memory after the chosen steps, each (B, len(steps), H, ...), from the starts of their chunks."""
    chunks = split(k, v, log_input, log_forget, first, memory, chunk)
    found = []
    for index, group in groupby(steps, key=lambda step: step // chunk):
        at = [step % chunk for step in group]
        weight = take(chunks.weight[:, :, index], 2, at).unsqueeze(-1)  # (B, H, S, L, 1)
        carry = take(chunks.carry[:, :, index], 2, at).unsqueeze(-1)  # (B, H, S, 1)
        m = take(chunks.m[:, :, index], 2, at)
        weighted = weight * chunks.k[:, :, None, index]  # (B, H, S, L, K)
        C_added = weighted.mT @ chunks.v[:, :, None, index].to(weight.dtype)
        start = Memory(*(part[:, :, index, None] for part in chunks.start))
        found.append(Memory(carry[..., None] * start.C + C_added, carry * start.n + weighted.sum(-2), m))
    return Memory(*(torch.cat(parts, 2).transpose(1, 2) for parts in zip(*found, strict=True)))
