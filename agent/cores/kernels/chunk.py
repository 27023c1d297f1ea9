"""What every kernel over chunks begins with: the weights inside a chunk and the two products with all its memories.

A program works on one chunk of L steps of one head. With C the memory at the chunk's start, the memory after step t is
C_t = a_t C + sum_u D_tu k_u v_u', and with D and a divided by |C_t| the products with A_t = C_t / |C_t| of all t are

    x' A_t = a_t x' C + sum_u D_tu (x' k_u) v_u'        A_t w = a_t C w + sum_u D_tu k_u (v_u' w)

that is, three products of tiles, without any C_t.
"""

import triton
import triton.language as tl


@triton.jit
def load_gates(
    log_input_ptr: tl.tensor,
    log_forget_ptr: tl.tensor,
    first_ptr: tl.tensor,
    row: tl.tensor,
    batch: tl.tensor,
    start: tl.tensor,
    steps: tl.tensor,
    L: tl.constexpr,
    EMPTY: tl.constexpr,
) -> tuple:
    """Gates of the chunk that begins at `start`: log_input, cumulative log decay and resets since the start, all (L,).

    A reset is a mask and no decay, which would drown all other terms of the sum. Steps past the end change nothing.
    """
    t = start + tl.arange(0, L)
    live = t < steps
    log_input = tl.load(log_input_ptr + row * steps + t, mask=live, other=EMPTY)
    log_forget = tl.load(log_forget_ptr + row * steps + t, mask=live, other=0.0)
    first = tl.load(first_ptr + batch * steps + t, mask=live, other=0).to(tl.int32)
    decay = tl.cumsum(tl.where(first != 0, 0.0, log_forget), 0)
    return log_input, decay, tl.cumsum(first, 0), first


@triton.jit
def weights_inside(
    log_input: tl.tensor, decay: tl.tensor, episode: tl.tensor, m_start: tl.tensor, L: tl.constexpr, EMPTY: tl.constexpr
) -> tuple:
    """D (L, L) and a (L,), divided by exp(m_t), and m_t (L,), with m_start that of the memory at the chunk's start."""
    t = tl.arange(0, L)
    seen = (t[:, None] >= t[None, :]) & (episode[:, None] == episode[None, :])
    log_weight = tl.where(seen, decay[:, None] - decay[None, :] + log_input[None, :], EMPTY)
    log_carry = tl.where(episode == 0, decay + m_start, EMPTY)
    m = tl.maximum(tl.max(log_weight, 1), log_carry)
    weight = tl.where(seen, tl.exp(log_weight - m[:, None]), 0.0)
    carry = tl.where(episode == 0, tl.exp(log_carry - m), 0.0)
    return weight, carry, m


@triton.jit
def weights_at_end(
    log_input: tl.tensor, decay: tl.tensor, episode: tl.tensor, m_start: tl.tensor, L: tl.constexpr, EMPTY: tl.constexpr
) -> tuple:
    """The last rows of D (L,) and a, and m after the chunk."""
    last = tl.sum(tl.where(tl.arange(0, L) == L - 1, decay, 0.0), 0)
    episodes = tl.max(episode, 0)
    log_weight = tl.where(episode == episodes, last - decay + log_input, EMPTY)
    log_carry = tl.where(episodes == 0, last + m_start, EMPTY)
    m = tl.maximum(tl.max(log_weight, 0), log_carry)
    weight = tl.where(episode == episodes, tl.exp(log_weight - m), 0.0)
    carry = tl.where(episodes == 0, tl.exp(log_carry - m), 0.0)
    return weight, carry, m


@triton.jit
def load_rows(
    pointer: tl.tensor,
    stride: tl.tensor,
    start: tl.tensor,
    steps: tl.tensor,
    first_column: tl.tensor,
    L: tl.constexpr,
    D: tl.constexpr,
) -> tl.tensor:
    """Rows start .. start + L of a matrix (steps, ...) with unit stride in its columns; (L, D), zero past the end."""
    t = start + tl.arange(0, L)
    columns = first_column + tl.arange(0, D)
    return tl.load(pointer + t[:, None].to(tl.int64) * stride + columns[None, :], mask=t[:, None] < steps, other=0.0)


@triton.jit
def store_rows(
    pointer: tl.tensor,
    rows: tl.tensor,
    stride: tl.tensor,
    start: tl.tensor,
    steps: tl.tensor,
    L: tl.constexpr,
    D: tl.constexpr,
) -> None:
    """The counterpart of `load_rows`."""
    t = start + tl.arange(0, L)
    at = pointer + t[:, None].to(tl.int64) * stride + tl.arange(0, D)[None, :]
    tl.store(at, rows.to(pointer.dtype.element_ty), mask=t[:, None] < steps)


@triton.jit
def tile(rows: tl.constexpr, columns: tl.constexpr) -> tl.tensor:
    """Offsets of a dense matrix (rows, columns)."""
    return tl.arange(0, rows)[:, None] * columns + tl.arange(0, columns)[None, :]


@triton.jit
def gram_product(weight: tl.tensor, scores_k: tl.tensor, scores_v: tl.tensor) -> tl.tensor:
    """D M (L, L) with M_uw = (k_u'k_w)(v_u'v_w), to fp32, since what is summed from it may cancel."""
    return tl.dot(weight, scores_k * scores_v, input_precision="tf32x3")


@triton.jit
def to_values(
    x: tl.tensor,
    k: tl.tensor,
    v: tl.tensor,
    c: tl.tensor,
    weight: tl.tensor,
    carry: tl.tensor,
    PRECISION: tl.constexpr,
) -> tl.tensor:
    """Rows x (L, K) -> x' A_t (L, V), in fp32."""
    scores = tl.dot(x, tl.trans(k), input_precision=PRECISION) * weight
    across = tl.dot(x, c, input_precision=PRECISION)
    return tl.dot(scores.to(v.dtype), v, input_precision=PRECISION) + carry[:, None] * across


@triton.jit
def to_keys(
    z: tl.tensor,
    k: tl.tensor,
    v: tl.tensor,
    c: tl.tensor,
    weight: tl.tensor,
    carry: tl.tensor,
    PRECISION: tl.constexpr,
) -> tl.tensor:
    """Rows z (L, V) -> A_t z (L, K), in fp32."""
    scores = tl.dot(z, tl.trans(v), input_precision=PRECISION) * weight
    across = tl.dot(z, tl.trans(c), input_precision=PRECISION)
    return tl.dot(scores.to(k.dtype), k, input_precision=PRECISION) + carry[:, None] * across
