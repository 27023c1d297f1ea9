"""The least-squares read of a matrix memory: what ridge regression of the written values on their keys says of q.

    G_t = f_t G_{t-1} + i_t k_t k_t'        y_t = C_t' (G_t + lambda_t)^{-1} q_t        lambda_t = ridge tr(G_t) / K

C_t' (G_t + lambda_t)^{-1} is the matrix W with the least sum_u w_u |W k_u - v_u|^2 + lambda_t |W|^2, where w_u is what
write u still counts. The Gram matrix G is a memory whose values are its keys, so it is kept beside C as more columns
of the same matrix, written and decayed with it: the memory of this module is [C | G] (K, V + K), its values [v, k].

lambda is a share of the mean eigenvalue of G. As a number of its own it would vanish against a memory of many writes
and drown one of few, and its meaning would hang on the stabiliser, by which everything is divided; as a share it does
not change with the scale of keys and gates, and bounds the condition of the system by 1 + K / ridge.

The system is solved by conjugate gradients with a fixed number of iterations, for all steps of a chunk at once: each
iteration is one pass of linear attention over keys alone, so that neither C_t nor G_t is ever formed. All of it is in
fp32, whatever the dtype of q, k and v. Of memories that are nearly of rank one, products in bf16 get answers wrong by
4 % (at ridge 0.1) to 16 % (at 0.01), as they round the large eigenvalue by more than lambda; others by 0.7 %.

Source: von Oswald et al., "MesaNet: Sequence Modeling by Locally Optimal Test-Time Training" (2025), arXiv 2506.05233;
lambda and the gradient are this agent's.
"""

from typing import Any

import torch
from torch import Tensor

from agent.cores.memory import Memory, chunked, split

TRACE_FLOOR = 1e-3
"""Traces of G well below it count as nothing instead of making lambda vanish. The heaviest write has weight 1 and a key
of length 1 / sqrt(K), if keys have unit length before they are scaled, so that one write has trace 1 / K."""


def with_keys(k: Tensor, v: Tensor) -> Tensor:
    """What is written so that the memory holds its Gram matrix: k (..., K), v (..., V) -> [v, k] (..., V + K)."""
    return torch.cat([v, k], -1)


def least_squares_read(q: Tensor, memory: Memory, ridge: Tensor, iterations: int) -> Tensor:
    """Read C' (G + lambda)^{-1} q for q (..., H, K), memory [C | G] (..., H, K, V + K), ridge (H,) -> (..., H, V)."""
    C, _ = _parts(memory)
    x = least_squares_query(q, memory, ridge, iterations).unsqueeze(-2)  # one row
    return (x @ C).squeeze(-2).to(q.dtype)


def least_squares_query(q: Tensor, memory: Memory, ridge: Tensor, iterations: int) -> Tensor:
    """The x (..., H, K) with x'C = `least_squares_read` of the same arguments, in the dtype of C."""
    C, G = _parts(memory)
    strength = _strength(_trace(G), q.shape[-1], ridge)[..., None, None]
    return _solve(_as_key(q, C).unsqueeze(-2), strength, iterations, G).squeeze(-2)


def least_squares_read_sequence(
    q: Tensor, k: Tensor, v: Tensor, log_input: Tensor, log_forget: Tensor, first: Tensor, memory: Memory,
    ridge: Tensor, iterations: int, chunk: int = 64,
) -> tuple[Tensor, Memory]:  # fmt: skip
    """`least_squares_read` after every step; v is [v, k] (B, H, T, V + K), and arguments are as in `memory`."""
    chunks = split(k, v, log_input, log_forget, first, memory, chunk)
    C, G = _parts(chunks.start)  # (B, H, N, K, .)
    weight, carry = chunks.weight, chunks.carry[..., None]
    k, v = chunks.k.to(C.dtype), chunks.v[..., : C.shape[-1]].to(C.dtype)
    trace = weight @ k.square().sum(-1, keepdim=True) + carry * _trace(G)[..., None, None]  # (B, H, N, L, 1)
    strength = _strength(trace, q.shape[-1], ridge[:, None, None, None])
    x = _solve(_as_key(chunked(q, chunk, 0.0), C), strength, iterations, G, k, weight, carry)
    y = ((x @ k.mT) * weight) @ v + carry * (x @ C)
    return y.to(q.dtype).flatten(2, 3)[:, :, : q.shape[2]], chunks.end


def _parts(memory: Memory) -> tuple[Tensor, Tensor]:
    """C (..., K, V) and G (..., K, K) of [C | G]."""
    key, both = memory.C.shape[-2:]
    C, G = memory.C.split((both - key, key), -1)
    # Rounding, and whoever sets a state, may leave it not quite symmetric, which conjugate gradients take for granted.
    return C, (G + G.mT) / 2


def _as_key(q: Tensor, C: Tensor) -> Tensor:
    """The query (..., K) in the precision of C and scaled like a key: then y is in the units of v."""
    return q.to(C.dtype) * q.shape[-1] ** -0.5


def _trace(G: Tensor) -> Tensor:
    """(..., K, K) -> (...)."""
    return G.diagonal(dim1=-2, dim2=-1).sum(-1)


def _strength(trace: Tensor, key: int, ridge: Tensor) -> Tensor:
    """The lambda of Gram matrices (key, key) with that trace."""
    return ridge * (trace + TRACE_FLOOR) / key


# ---- the system ----------------------------------------------------------------------------------------------


def _regularised(x: Tensor, strength: Tensor, G: Tensor, *inside: Tensor) -> Tensor:
    """Rows x_t (..., L, K) -> (G_t + lambda_t) x_t.

    G_t is G (..., K, K) for all t, or with the keys (..., L, K), weights (..., L, L) and carry (..., L, 1) of a chunk
    carry_t G + sum_u weight_tu k_u k_u'. strength, which is lambda, is (..., L, 1) or (..., 1, 1).
    """
    product = x @ G
    if inside:
        k, weight, carry = inside
        product = carry * product + ((x @ k.mT) * weight) @ k
    return product + strength * x


def _solve(b: Tensor, strength: Tensor, iterations: int, *gram: Tensor) -> Tensor:
    """The rows x (..., L, K) with (G_t + lambda_t) x_t = b_t; arguments as in `_regularised`.

    The gradient is that of the solution and not of the iterations: w = (G_t + lambda_t)^{-1} dx gives db = w,
    dG_t = -w x' and dlambda_t = -w'x. It is solved for as x was, the matrix being symmetric, and costs no more than
    that. The iterations would all have to be kept, and going back through those after the residual has become rounding
    noise, as soon as the second where a memory has rank one, divides by it: the gradient is NaN.
    """
    with torch.no_grad():
        x = _conjugate_gradients(b, strength, iterations, *gram)
    if not torch.is_grad_enabled():
        return x
    return _Solution.apply(x, b - _regularised(x, strength, *gram), iterations, strength, *gram)


class _Solution(torch.autograd.Function):
    """The x that is given, with (G + lambda)^{-1} dx as the gradient of its residual b - (G + lambda) x."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, residual: Tensor, iterations: int, strength: Tensor, *gram: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, _, ctx.iterations, strength, *gram = inputs
        ctx.save_for_backward(strength, *gram)

    @staticmethod
    def backward(ctx: Any, dx: Tensor) -> tuple[Tensor | None, ...]:
        strength, *gram = ctx.saved_tensors
        w = _conjugate_gradients(dx, strength, ctx.iterations, *gram)
        return None, w, None, None, *[None] * len(gram)


def _conjugate_gradients(b: Tensor, strength: Tensor, iterations: int, *gram: Tensor) -> Tensor:
    """Rows x (..., L, K) with (G_t + lambda_t) x_t = b_t from x = 0, each row on its own."""
    # Linear in b, which is scaled to 1 since the squares of small gradients would underflow.
    size = b.abs().amax(-1, keepdim=True)
    residual = direction = _quotient(b, size)
    x, square = torch.zeros_like(b), _dot(residual, residual)
    for _ in range(iterations):
        product = _regularised(direction, strength, *gram)
        step = _quotient(square, _dot(direction, product))
        x = x + step * direction
        residual = residual - step * product
        before, square = square, _dot(residual, residual)
        direction = residual + _quotient(square, before) * direction
    return size * x


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum(-1, keepdim=True)


def _quotient(a: Tensor, b: Tensor) -> Tensor:
    """The ratio a / b for b >= 0, or 0 where b is 0: a row that is solved, or was 0 to begin with, stays as it is."""
    return torch.where(b > 0, a / b, 0.0)
