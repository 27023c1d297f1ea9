"""The orthogonalised read over a sequence: the forward kernel."""

import triton
import triton.language as tl

from agent.cores.kernels.chunk import (
    gram_product,
    load_gates,
    load_rows,
    store_rows,
    tile,
    to_keys,
    to_values,
    weights_inside,
)


@triton.jit(do_not_specialize=["heads", "steps", "chunks"])
def read_forward(
    q_ptr: tl.tensor,
    k_ptr: tl.tensor,
    v_ptr: tl.tensor,
    log_input_ptr: tl.tensor,
    log_forget_ptr: tl.tensor,
    first_ptr: tl.tensor,
    states_ptr: tl.tensor,
    stabilisers_ptr: tl.tensor,
    coefficients_ptr: tl.tensor,
    y_ptr: tl.tensor,
    scales_ptr: tl.tensor,
    basis_k_ptr: tl.tensor,
    basis_v_ptr: tl.tensor,
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
    COEFFICIENTS: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    L: tl.constexpr,
    EMPTY: tl.constexpr,
    FLOOR: tl.constexpr,
    SAVE: tl.constexpr,
    PRECISION: tl.constexpr,
) -> None:
    """The read of one chunk of one head, y = A' p with p = sum_j c_j T_j(G) q and G = 2 A A' - 1.

    By the recurrence of T_j, whose vectors are never longer than q: Clenshaw's would be, most of all where A is near
    rank one, and in bf16 y would be off by as much as 8 % there.

    With SAVE, what the backward pass needs is kept: 1 / |C_t| in scales; p and Clenshaw's b_1 .. b_m in basis_k, and A'
    of these in basis_v:

        b_j = c_j q + 2 G b_{j+1} - b_{j+2}
    """
    program = tl.program_id(0).to(tl.int64)
    row = program // chunks
    start = (program % chunks).to(tl.int32) * L
    batch = row // heads
    head = row % heads
    k = load_rows(k_ptr + batch * k_batch + head * k_head, k_step, start, steps, 0, L, K)
    v = load_rows(v_ptr + batch * v_batch + head * v_head, v_step, start, steps, 0, L, V)
    c = tl.load(states_ptr + program * K * V + tile(K, V)).to(k.dtype)
    log_input, decay, episode, _ = load_gates(
        log_input_ptr, log_forget_ptr, first_ptr, row, batch, start, steps, L, EMPTY
    )
    weight, carry, _ = weights_inside(log_input, decay, episode, tl.load(stabilisers_ptr + program), L, EMPTY)

    scores_k = tl.dot(k, tl.trans(k), input_precision=PRECISION)
    scores_v = tl.dot(v, tl.trans(v), input_precision=PRECISION)
    across = tl.sum(tl.dot(k, c, input_precision=PRECISION) * v, 1)
    square = tl.sum(weight * (gram_product(weight, scores_k, scores_v) + 2 * carry[:, None] * across[None, :]), 1)
    square += carry * carry * tl.sum(tl.sum(c.to(tl.float32) * c, 1), 0)
    scale = tl.rsqrt(tl.maximum(square, 0.0) + FLOOR * FLOOR)
    weight *= scale[:, None]
    carry *= scale

    q = load_rows(q_ptr + batch * q_batch + head * q_head, q_step, start, steps, 0, L, K).to(tl.float32)
    before = tl.zeros_like(q)
    now = q
    total = tl.load(coefficients_ptr) * q
    for j in range(1, COEFFICIENTS):
        u = to_values(now.to(k.dtype), k, v, c, weight, carry, PRECISION).to(k.dtype)
        w = to_keys(u, k, v, c, weight, carry, PRECISION)
        after = tl.where(j == 1, 1.0, 2.0) * (2 * w - now) - before
        before = now
        now = after
        total += tl.load(coefficients_ptr + j) * now
    p = total.to(k.dtype)
    y = to_values(p, k, v, c, weight, carry, PRECISION).to(k.dtype)
    store_rows(y_ptr + (batch * steps * heads + head) * V, y, heads * V, start, steps, L, V)

    if SAVE:
        basis_k_ptr += program * COEFFICIENTS * L * K + tile(L, K)
        basis_v_ptr += program * COEFFICIENTS * L * V + tile(L, V)
        tl.store(scales_ptr + program * L + tl.arange(0, L), scale)
        tl.store(basis_k_ptr, p)
        tl.store(basis_v_ptr, y)
        b = tl.load(coefficients_ptr + COEFFICIENTS - 1) * q
        b_after = tl.zeros_like(b)
        for r in range(1, COEFFICIENTS):
            j = COEFFICIENTS - r
            x = b.to(k.dtype)
            u = to_values(x, k, v, c, weight, carry, PRECISION).to(k.dtype)
            tl.store(basis_k_ptr + j * L * K, x)
            tl.store(basis_v_ptr + j * L * V, u)
            if j > 1:
                w = to_keys(u, k, v, c, weight, carry, PRECISION)
                b_new = tl.load(coefficients_ptr + j - 1) * q + 2 * (2 * w - b) - b_after
                b_after = b
                b = b_new
