"""One time step of a matrix memory on the GPU: write and read in one pass over the memory.

A program holds the memory of one head in registers: it is read from and written to device memory once, and the
2m + 1 products with a vector that the orthogonalised read needs cost no traffic at all.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from agent.cores.kernels.tuning import launch
from agent.cores.memory import EMPTY, MAX_LOG_NORMALISER, NORM_FLOOR, NORMALISER_EPS, Memory


@triton.jit(do_not_specialize=["heads"])
def _step(
    q_ptr: tl.tensor,
    k_ptr: tl.tensor,
    v_ptr: tl.tensor,
    log_input_ptr: tl.tensor,
    log_forget_ptr: tl.tensor,
    first_ptr: tl.tensor,
    c_ptr: tl.tensor,
    n_ptr: tl.tensor,
    m_ptr: tl.tensor,
    coefficients_ptr: tl.tensor,
    y_ptr: tl.tensor,
    c_out_ptr: tl.tensor,
    n_out_ptr: tl.tensor,
    m_out_ptr: tl.tensor,
    heads: tl.tensor,
    COEFFICIENTS: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    EMPTY: tl.constexpr,
    FLOOR: tl.constexpr,
    MAX_LOG: tl.constexpr,
    EPS: tl.constexpr,
) -> None:
    """Program (batch row, head); COEFFICIENTS = 0 is the plain read."""
    row = tl.program_id(0).to(tl.int64)
    keys = tl.arange(0, K)
    values = tl.arange(0, V)
    cell = row * K * V + keys[:, None] * V + values[None, :]
    q = tl.load(q_ptr + row * K + keys).to(tl.float32)
    k = tl.load(k_ptr + row * K + keys).to(tl.float32)
    v = tl.load(v_ptr + row * V + values).to(tl.float32)
    log_input = tl.load(log_input_ptr + row)
    first = tl.load(first_ptr + row // heads) != 0
    # A memory that is emptied is not read: what it holds may be infinite.
    wanted = tl.where(first == 0, keys, -1) >= 0
    c = tl.load(c_ptr + cell, mask=wanted[:, None], other=0.0).to(tl.float32)
    n = tl.load(n_ptr + row * K + keys, mask=wanted, other=0.0)
    m_before = tl.where(first, EMPTY, tl.load(m_ptr + row))

    log_forget = tl.where(first, 0.0, tl.load(log_forget_ptr + row))
    m = tl.maximum(log_forget + m_before, log_input)
    forget = tl.exp(log_forget + m_before - m)
    write = tl.exp(log_input - m)
    c = forget * c + (write * k)[:, None] * v[None, :]
    n = forget * n + write * k
    tl.store(c_out_ptr + cell, c.to(c_out_ptr.dtype.element_ty))
    tl.store(n_out_ptr + row * K + keys, n)
    tl.store(m_out_ptr + row, m)

    if COEFFICIENTS == 0:
        normaliser = tl.maximum(tl.abs(tl.sum(q * n, 0)), tl.exp(tl.minimum(-m, MAX_LOG))) + EPS
        y = tl.sum(q[:, None] * c, 0) / normaliser
    else:
        # Clenshaw's recurrence from the highest Chebyshev coefficient down.
        scale = 1.0 / (tl.sum(tl.sum(c * c, 1), 0) + FLOOR * FLOOR)
        b = tl.load(coefficients_ptr + COEFFICIENTS - 1) * q
        b_after = tl.zeros_like(b)
        for r in range(COEFFICIENTS - 1):
            j = COEFFICIENTS - 2 - r
            u = tl.sum(b[:, None] * c, 0)
            w = tl.sum(c * u[None, :], 1) * scale
            gain = tl.where(j == 0, 1.0, 2.0)
            b_new = tl.load(coefficients_ptr + j) * q + gain * (2.0 * w - b) - b_after
            b_after = b
            b = b_new
        y = tl.sum(b[:, None] * c, 0) * tl.sqrt(scale)
    tl.store(y_ptr + row * V + values, y.to(y_ptr.dtype.element_ty))


@torch.library.custom_op("matrix_memory::step", mutates_args=())
def step_op(
    q: Tensor, k: Tensor, v: Tensor, log_input: Tensor, log_forget: Tensor, first: Tensor,
    C: Tensor, n: Tensor, m: Tensor, coefficients: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """`step` on tensors alone, so that `torch.compile` sees one operation."""
    batch, heads, key_dim = q.shape
    value_dim = v.shape[-1]
    inputs = [x.contiguous() for x in (q, k, v, log_input, log_forget, first, C, n, m)]
    outputs = _outputs(v, C, n, m)
    _step[(batch * heads,)](
        *inputs,
        n if coefficients is None else coefficients.contiguous(),
        *outputs,
        heads,
        COEFFICIENTS=0 if coefficients is None else len(coefficients),
        K=key_dim,
        V=value_dim,
        EMPTY=EMPTY,
        FLOOR=NORM_FLOOR,
        MAX_LOG=MAX_LOG_NORMALISER,
        EPS=NORMALISER_EPS,
        **launch("step", key_dim, value_dim),
    )
    return outputs


def _outputs(v: Tensor, *memory: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    y, C, n, m = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (v, *memory))
    return y, C, n, m


@step_op.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, log_input: Tensor, log_forget: Tensor, first: Tensor,
    C: Tensor, n: Tensor, m: Tensor, coefficients: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    return _outputs(v, C, n, m)


def step(
    q: Tensor, k: Tensor, v: Tensor, log_input: Tensor, log_forget: Tensor, first: Tensor, memory: Memory,
    coefficients: Tensor | None = None,
) -> tuple[Tensor, Memory]:  # fmt: skip
    """Write one association, then read; without gradient.

    Args:
        q: query (B, H, K), in the dtype of k and v.
        k: key (B, H, K).
        v: value (B, H, V).
        log_input: logarithm of the input gate (B, H), fp32.
        log_forget: logarithm of the forget gate (B, H), fp32.
        first: bool (B,); where true, the memory is emptied before the step.
        memory: memory before the step; its C may be in bf16, and is so afterwards.
        coefficients: c (J,) of f(s) = sum_j c_j s T_j(2 s^2 - 1) for the read q' f(C / |C|), fp32; None is the plain
            read q'C / max(|q'n|, exp(-m)).

    Returns:
        y (B, H, V) in the dtype of v and the memory after the step.
    """
    y, *after = step_op(q, k, v, log_input, log_forget, first, *memory, coefficients)
    return y, Memory(*after)
