"""The plain read over a sequence: forward and backward kernels.

With N_t the normaliser, W_tu = D_tu / N_t and b_t = a_t / N_t for step t, C and n the memory at the chunk's start, and
z_tu = q_t'k_u:

    y_t = sum_u W_tu z_tu v_u + b_t q_t'C        o_t = sum_u D_tu z_tu + a_t q_t'n        N_t = max(|o_t|, exp(-m_t))

How the loss depends on o_t, where N_t is |o_t|, is as if values had one more column, of 1 (n is that of C), in which
the gradient g_t = dL/dy_t were r_t = -sign(o_t) g_t'y_t; elsewhere r_t is 0. So with s_tu = g_t'v_u + r_t and
h_t = C g_t + r_t n

    dL/dq_t = sum_u W_tu s_tu k_u + b_t h_t        dL/dk_u = sum_t W_tu s_tu q_t        dL/dv_u = sum_t W_tu z_tu g_t
    dL/dC = sum_t b_t q_t g_t'        dL/dn = sum_t b_t r_t q_t        dL/dlog D_tu = W_tu z_tu s_tu
    dL/dlog a_t = b_t q_t'h_t

The stabilisers count as constants: y is the same for any m, as numerator and normaliser are both divided by exp(m).
(Not where -m is past MAX_LOG and exp(-m) is cut off; but there y is of the order of exp(-MAX_LOG) at most.)
"""

import triton
import triton.language as tl

from agent.cores.kernels.chunk import load_gates, load_rows, store_rows, tile, weights_inside


@triton.jit
def overlap_and_floor(
    q: tl.tensor, n: tl.tensor, scores: tl.tensor, carry: tl.tensor, m: tl.tensor, MAX_LOG: tl.constexpr
) -> tuple:
    """The two (L,) of which the larger, by size, is the normaliser: o from weighted scores D z (L, L), and exp(-m)."""
    overlap = tl.sum(scores, 1) + carry * tl.sum(q.to(tl.float32) * n[None, :], 1)
    return overlap, tl.exp(tl.minimum(-m, MAX_LOG))


@triton.jit(do_not_specialize=["heads", "steps", "chunks"])
def plain_forward(
    q_ptr: tl.tensor,
    k_ptr: tl.tensor,
    v_ptr: tl.tensor,
    log_input_ptr: tl.tensor,
    log_forget_ptr: tl.tensor,
    first_ptr: tl.tensor,
    states_ptr: tl.tensor,
    normalisers_ptr: tl.tensor,
    stabilisers_ptr: tl.tensor,
    y_ptr: tl.tensor,
    q_batch: tl.tensor,
    q_head: tl.tensor,
    q_step: tl.tensor,
    k_batch: tl.tensor,
    k_head: tl.tensor,
    k_step: tl.tensor,
    v_batch: tl.tensor,
    v_head: tl.tensor,
    v_step: tl.tensor,
    heads: tl.tensor,
    steps: tl.tensor,
    chunks: tl.tensor,
    K: tl.constexpr,
    V: tl.constexpr,
    L: tl.constexpr,
    EMPTY: tl.constexpr,
    MAX_LOG: tl.constexpr,
    EPS: tl.constexpr,
    PRECISION: tl.constexpr,
) -> None:
    """The read of one chunk of one head."""
    program = tl.program_id(0).to(tl.int64)
    row = program // chunks
    start = (program % chunks).to(tl.int32) * L
    batch = row // heads
    head = row % heads
    q = load_rows(q_ptr + batch * q_batch + head * q_head, q_step, start, steps, 0, L, K)
    k = load_rows(k_ptr + batch * k_batch + head * k_head, k_step, start, steps, 0, L, K)
    v = load_rows(v_ptr + batch * v_batch + head * v_head, v_step, start, steps, 0, L, V)
    c = tl.load(states_ptr + program * K * V + tile(K, V)).to(k.dtype)
    n = tl.load(normalisers_ptr + program * K + tl.arange(0, K))
    log_input, decay, episode, _ = load_gates(
        log_input_ptr, log_forget_ptr, first_ptr, row, batch, start, steps, L, EMPTY
    )
    weight, carry, m = weights_inside(log_input, decay, episode, tl.load(stabilisers_ptr + program), L, EMPTY)

    scores = weight * tl.dot(q, tl.trans(k), input_precision=PRECISION)
    overlap, floor = overlap_and_floor(q, n, scores, carry, m, MAX_LOG)
    y = carry[:, None] * tl.dot(q, c, input_precision=PRECISION)
    y += tl.dot(scores.to(v.dtype), v, input_precision=PRECISION)
    y /= (tl.maximum(tl.abs(overlap), floor) + EPS)[:, None]
    store_rows(y_ptr + (batch * steps * heads + head) * V, y, heads * V, start, steps, L, V)


@triton.jit(do_not_specialize=["heads", "steps", "chunks"])
def plain_backward(
    grad_y_ptr: tl.tensor,
    q_ptr: tl.tensor,
    k_ptr: tl.tensor,
    v_ptr: tl.tensor,
    y_ptr: tl.tensor,
    log_input_ptr: tl.tensor,
    log_forget_ptr: tl.tensor,
    first_ptr: tl.tensor,
    states_ptr: tl.tensor,
    normalisers_ptr: tl.tensor,
    stabilisers_ptr: tl.tensor,
    grad_q_ptr: tl.tensor,
    grad_k_ptr: tl.tensor,
    grad_v_ptr: tl.tensor,
    grad_input_ptr: tl.tensor,
    grad_forget_ptr: tl.tensor,
    grad_states_ptr: tl.tensor,
    grad_normalisers_ptr: tl.tensor,
    g_batch: tl.tensor,
    g_head: tl.tensor,
    g_step: tl.tensor,
    q_batch: tl.tensor,
    q_head: tl.tensor,
    q_step: tl.tensor,
    k_batch: tl.tensor,
    k_head: tl.tensor,
    k_step: tl.tensor,
    v_batch: tl.tensor,
    v_head: tl.tensor,
    v_step: tl.tensor,
    y_batch: tl.tensor,
    y_head: tl.tensor,
    y_step: tl.tensor,
    heads: tl.tensor,
    steps: tl.tensor,
    chunks: tl.tensor,
    K: tl.constexpr,
    V: tl.constexpr,
    L: tl.constexpr,
    EMPTY: tl.constexpr,
    MAX_LOG: tl.constexpr,
    EPS: tl.constexpr,
    PRECISION: tl.constexpr,
) -> None:
    """Gradients through the read of one chunk of one head, of all but what comes after the chunk."""
    program = tl.program_id(0).to(tl.int64)
    row = program // chunks
    start = (program % chunks).to(tl.int32) * L
    batch = row // heads
    head = row % heads
    q = load_rows(q_ptr + batch * q_batch + head * q_head, q_step, start, steps, 0, L, K)
    k = load_rows(k_ptr + batch * k_batch + head * k_head, k_step, start, steps, 0, L, K)
    n = tl.load(normalisers_ptr + program * K + tl.arange(0, K))
    log_input, decay, episode, first = load_gates(
        log_input_ptr, log_forget_ptr, first_ptr, row, batch, start, steps, L, EMPTY
    )
    weight, carry, m = weights_inside(log_input, decay, episode, tl.load(stabilisers_ptr + program), L, EMPTY)
    scores = weight * tl.dot(q, tl.trans(k), input_precision=PRECISION)
    overlap, floor = overlap_and_floor(q, n, scores, carry, m, MAX_LOG)
    scale = 1.0 / (tl.maximum(tl.abs(overlap), floor) + EPS)
    weight *= scale[:, None]
    scores *= scale[:, None]
    carry *= scale

    g = load_rows(grad_y_ptr + batch * g_batch + head * g_head, g_step, start, steps, 0, L, V).to(k.dtype)
    grad_v = tl.dot(tl.trans(scores.to(k.dtype)), g, input_precision=PRECISION)
    store_rows(grad_v_ptr + (batch * steps * heads + head) * V, grad_v, heads * V, start, steps, L, V)
    carried = tl.trans((carry[:, None] * q).to(k.dtype))
    grad_c = tl.dot(carried, g, input_precision=PRECISION)
    tl.store(grad_states_ptr + program * K * V + tile(K, V), grad_c)

    y = load_rows(y_ptr + batch * y_batch + head * y_head, y_step, start, steps, 0, L, V)
    along = tl.sum(y.to(tl.float32) * g, 1)
    r = tl.where(tl.abs(overlap) > floor, tl.where(overlap > 0.0, -along, along), 0.0)
    grad_n = tl.sum((carry * r)[:, None] * q, 0)
    tl.store(grad_normalisers_ptr + program * K + tl.arange(0, K), grad_n)

    v = load_rows(v_ptr + batch * v_batch + head * v_head, v_step, start, steps, 0, L, V)
    s = tl.dot(g, tl.trans(v), input_precision=PRECISION) + r[:, None]
    grad_log = scores * s
    s = (weight * s).to(k.dtype)
    grad_k = tl.dot(tl.trans(s), q, input_precision=PRECISION)
    store_rows(grad_k_ptr + (batch * steps * heads + head) * K, grad_k, heads * K, start, steps, L, K)

    c = tl.load(states_ptr + program * K * V + tile(K, V)).to(k.dtype)
    h = carry[:, None] * (tl.dot(g, tl.trans(c), input_precision=PRECISION) + r[:, None] * n[None, :])
    grad_q = tl.dot(s, k, input_precision=PRECISION) + h
    store_rows(grad_q_ptr + (batch * steps * heads + head) * K, grad_q, heads * K, start, steps, L, K)

    # log D_tu has the decay up to t in it, and less that up to u; log a_t has the decay up to t.
    grad_input = tl.sum(grad_log, 0)
    grad_decay = tl.sum(grad_log, 1) + tl.sum(h * q, 1) - grad_input
    t = tl.arange(0, L)
    later = (t[None, :] >= t[:, None]) & (episode[None, :] == episode[:, None])
    grad_forget = tl.sum(tl.where(later, grad_decay[None, :], 0.0), 1)
    live = start + t < steps
    tl.store(grad_input_ptr + row * steps + start + t, grad_input, mask=live)
    tl.store(grad_forget_ptr + row * steps + start + t, tl.where(first != 0, 0.0, grad_forget), mask=live)
