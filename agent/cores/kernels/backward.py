"""The orthogonalised read over a sequence: backward kernels.

With y = A' p and b_j from the forward pass and g = dL/dy, the adjoint of Clenshaw's recurrence is Chebyshev's:

    xi_0 = A g,  xi_1 = G xi_0,  xi_{j+1} = 2 G xi_j - xi_{j-1},  dL/dq = sum_j c_j xi_j,
    dL/dA = p g' + sum_j 4 h_j [xi_j (A' b_{j+1})' + b_{j+1} (A' xi_j)'],  h_0 = 1/2 and 1 otherwise,

for every step t. No dL/dA_t is formed: each pair x z' in it contributes (x'k_u)(z'v_u) to dL/dD_tu, D_tu (z'v_u) x to
dL/dk_u, D_tu (x'k_u) z to dL/dv_u and a_t x z' to dL/dC, which are products of tiles. The norm removes the radial part,
dL/dC_t = (dL/dA_t - <dL/dA_t, A_t> A_t) / |C_t|. The stabiliser m cancels in the read and is taken as constant.

The recurrence and the sums over pairs are kernels of their own, since a program's registers do not hold both: as one
kernel they take 53 ms instead of 22 (H100, 2048 heads of 64 x 64, 1024 steps, four warps; more warps are slower yet).
"""

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
def read_backward(
    grad_y_ptr: tl.tensor,
    k_ptr: tl.tensor,
    v_ptr: tl.tensor,
    log_input_ptr: tl.tensor,
    log_forget_ptr: tl.tensor,
    first_ptr: tl.tensor,
    states_ptr: tl.tensor,
    stabilisers_ptr: tl.tensor,
    scales_ptr: tl.tensor,
    coefficients_ptr: tl.tensor,
    adjoint_k_ptr: tl.tensor,
    adjoint_v_ptr: tl.tensor,
    grad_q_ptr: tl.tensor,
    g_batch: tl.tensor,
    g_head: tl.tensor,
    g_step: tl.tensor,
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
    PRECISION: tl.constexpr,
) -> None:
    """The recurrence for one chunk of one head: dL/dq and, in adjoint_k and adjoint_v, h_j xi_j and A' h_j xi_j."""
    program = tl.program_id(0).to(tl.int64)
    row = program // chunks
    start = (program % chunks).to(tl.int32) * L
    batch = row // heads
    head = row % heads
    k = load_rows(k_ptr + batch * k_batch + head * k_head, k_step, start, steps, 0, L, K)
    v = load_rows(v_ptr + batch * v_batch + head * v_head, v_step, start, steps, 0, L, V)
    c = tl.load(states_ptr + program * K * V + tile(K, V)).to(k.dtype)
    g = load_rows(grad_y_ptr + batch * g_batch + head * g_head, g_step, start, steps, 0, L, V).to(k.dtype)
    log_input, decay, episode, _ = load_gates(
        log_input_ptr, log_forget_ptr, first_ptr, row, batch, start, steps, L, EMPTY
    )
    weight, carry, _ = weights_inside(log_input, decay, episode, tl.load(stabilisers_ptr + program), L, EMPTY)
    scale = tl.load(scales_ptr + program * L + tl.arange(0, L))
    weight *= scale[:, None]
    carry *= scale

    adjoint_k_ptr += program * (COEFFICIENTS - 1) * L * K + tile(L, K)
    adjoint_v_ptr += program * (COEFFICIENTS - 1) * L * V + tile(L, V)
    xi = to_keys(g, k, v, c, weight, carry, PRECISION)
    xi_before = tl.zeros_like(xi)
    grad_q = tl.load(coefficients_ptr) * xi
    for j in range(COEFFICIENTS - 1):
        half = tl.where(j == 0, 0.5, 1.0)
        x = (half * xi).to(k.dtype)
        tl.store(adjoint_k_ptr + j * L * K, x)
        z = to_values(x, k, v, c, weight, carry, PRECISION).to(k.dtype)
        tl.store(adjoint_v_ptr + j * L * V, z)
        w = to_keys(z, k, v, c, weight, carry, PRECISION)
        xi_new = 4 * w - 2 * half * xi - xi_before
        xi_before = xi
        xi = xi_new
        grad_q += tl.load(coefficients_ptr + j + 1) * xi
    store_rows(grad_q_ptr + (batch * steps * heads + head) * K, grad_q, heads * K, start, steps, L, K)


@triton.jit(do_not_specialize=["heads", "steps", "chunks"])
def values_backward(
    grad_y_ptr: tl.tensor,
    k_ptr: tl.tensor,
    v_ptr: tl.tensor,
    log_input_ptr: tl.tensor,
    log_forget_ptr: tl.tensor,
    first_ptr: tl.tensor,
    states_ptr: tl.tensor,
    stabilisers_ptr: tl.tensor,
    scales_ptr: tl.tensor,
    basis_k_ptr: tl.tensor,
    basis_v_ptr: tl.tensor,
    adjoint_k_ptr: tl.tensor,
    adjoint_v_ptr: tl.tensor,
    radial_ptr: tl.tensor,
    grad_v_ptr: tl.tensor,
    grad_states_ptr: tl.tensor,
    g_batch: tl.tensor,
    g_head: tl.tensor,
    g_step: tl.tensor,
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
    PRECISION: tl.constexpr,
) -> None:
    """Gradients of v and of the memory at the start, for one chunk of one head; and radial = <dL/dA_t, A_t>.

    Sums are kept at a quarter of their value, which spares the factor 4 of all pairs but p g'.
    """
    program = tl.program_id(0).to(tl.int64)
    row = program // chunks
    start = (program % chunks).to(tl.int32) * L
    batch = row // heads
    head = row % heads
    k = load_rows(k_ptr + batch * k_batch + head * k_head, k_step, start, steps, 0, L, K)
    v = load_rows(v_ptr + batch * v_batch + head * v_head, v_step, start, steps, 0, L, V)
    c = tl.load(states_ptr + program * K * V + tile(K, V)).to(k.dtype)
    g = load_rows(grad_y_ptr + batch * g_batch + head * g_head, g_step, start, steps, 0, L, V).to(k.dtype)
    log_input, decay, episode, _ = load_gates(
        log_input_ptr, log_forget_ptr, first_ptr, row, batch, start, steps, L, EMPTY
    )
    weight, carry, _ = weights_inside(log_input, decay, episode, tl.load(stabilisers_ptr + program), L, EMPTY)
    scale = tl.load(scales_ptr + program * L + tl.arange(0, L))
    weight *= scale[:, None]
    carry *= scale

    basis_k_ptr += program * COEFFICIENTS * L * K + tile(L, K)
    basis_v_ptr += program * COEFFICIENTS * L * V + tile(L, V)
    adjoint_k_ptr += program * (COEFFICIENTS - 1) * L * K + tile(L, K)
    adjoint_v_ptr += program * (COEFFICIENTS - 1) * L * V + tile(L, V)
    p = (0.25 * tl.load(basis_k_ptr).to(tl.float32)).to(k.dtype)

    scores = tl.dot(p, tl.trans(k), input_precision=PRECISION)
    grad_v = tl.dot(tl.trans((weight * scores).to(k.dtype)), g, input_precision=PRECISION)
    grad_c = tl.dot(tl.trans((carry[:, None] * p).to(k.dtype)), g, input_precision=PRECISION)
    radial = 0.25 * tl.sum(tl.load(basis_v_ptr) * g.to(tl.float32), 1)
    for j in range(COEFFICIENTS - 1):
        x = tl.load(adjoint_k_ptr + j * L * K)
        u = tl.load(basis_v_ptr + (j + 1) * L * V)
        scores = tl.dot(x, tl.trans(k), input_precision=PRECISION)
        grad_v = tl.dot(tl.trans((weight * scores).to(k.dtype)), u, grad_v, input_precision=PRECISION)
        grad_c = tl.dot(tl.trans((carry[:, None] * x).to(k.dtype)), u, grad_c, input_precision=PRECISION)
        b = tl.load(basis_k_ptr + (j + 1) * L * K)
        z = tl.load(adjoint_v_ptr + j * L * V)
        scores = tl.dot(b, tl.trans(k), input_precision=PRECISION)
        grad_v = tl.dot(tl.trans((weight * scores).to(k.dtype)), z, grad_v, input_precision=PRECISION)
        grad_c = tl.dot(tl.trans((carry[:, None] * b).to(k.dtype)), z, grad_c, input_precision=PRECISION)
        radial += 2 * tl.sum(u.to(tl.float32) * z, 1)

    # The norm removes the radial part.
    radial *= 4
    tl.store(radial_ptr + program * L + tl.arange(0, L), radial)
    seen_by = tl.sum(weight * (radial * carry)[:, None], 0)  # (L,) of the written
    overlap = tl.dot(tl.trans((radial[:, None] * weight).to(k.dtype)), weight.to(k.dtype), input_precision=PRECISION)
    scores = tl.dot(k, tl.trans(k), input_precision=PRECISION)
    grad_v = 4 * grad_v - tl.dot((overlap * scores).to(k.dtype), v, input_precision=PRECISION)
    grad_v -= seen_by[:, None] * tl.dot(k, c, input_precision=PRECISION)
    grad_c = 4 * grad_c - tl.sum(radial * carry * carry, 0) * c
    grad_c -= tl.dot(tl.trans((seen_by[:, None] * k).to(k.dtype)), v, input_precision=PRECISION)
    store_rows(grad_v_ptr + (batch * steps * heads + head) * V, grad_v, heads * V, start, steps, L, V)
    tl.store(grad_states_ptr + program * K * V + tile(K, V), grad_c)


@triton.jit(do_not_specialize=["heads", "steps", "chunks"])
def keys_backward(
    grad_y_ptr: tl.tensor,
    k_ptr: tl.tensor,
    v_ptr: tl.tensor,
    log_input_ptr: tl.tensor,
    log_forget_ptr: tl.tensor,
    first_ptr: tl.tensor,
    states_ptr: tl.tensor,
    stabilisers_ptr: tl.tensor,
    scales_ptr: tl.tensor,
    basis_k_ptr: tl.tensor,
    basis_v_ptr: tl.tensor,
    adjoint_k_ptr: tl.tensor,
    adjoint_v_ptr: tl.tensor,
    radial_ptr: tl.tensor,
    grad_k_ptr: tl.tensor,
    grad_input_ptr: tl.tensor,
    grad_forget_ptr: tl.tensor,
    g_batch: tl.tensor,
    g_head: tl.tensor,
    g_step: tl.tensor,
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
    PRECISION: tl.constexpr,
) -> None:
    """Gradients of k and of the gates, through D, for one chunk of one head; sums as in `values_backward`."""
    program = tl.program_id(0).to(tl.int64)
    row = program // chunks
    start = (program % chunks).to(tl.int32) * L
    batch = row // heads
    head = row % heads
    k = load_rows(k_ptr + batch * k_batch + head * k_head, k_step, start, steps, 0, L, K)
    v = load_rows(v_ptr + batch * v_batch + head * v_head, v_step, start, steps, 0, L, V)
    g = load_rows(grad_y_ptr + batch * g_batch + head * g_head, g_step, start, steps, 0, L, V).to(k.dtype)
    log_input, decay, episode, first = load_gates(
        log_input_ptr, log_forget_ptr, first_ptr, row, batch, start, steps, L, EMPTY
    )
    weight, carry, _ = weights_inside(log_input, decay, episode, tl.load(stabilisers_ptr + program), L, EMPTY)
    scale = tl.load(scales_ptr + program * L + tl.arange(0, L))
    weight *= scale[:, None]
    carry *= scale

    basis_k_ptr += program * COEFFICIENTS * L * K + tile(L, K)
    basis_v_ptr += program * COEFFICIENTS * L * V + tile(L, V)
    adjoint_k_ptr += program * (COEFFICIENTS - 1) * L * K + tile(L, K)
    adjoint_v_ptr += program * (COEFFICIENTS - 1) * L * V + tile(L, V)
    p = (0.25 * tl.load(basis_k_ptr).to(tl.float32)).to(k.dtype)

    scores_x = tl.dot(p, tl.trans(k), input_precision=PRECISION)
    scores_z = tl.dot(g, tl.trans(v), input_precision=PRECISION)
    grad_weight = scores_x * scores_z
    grad_k = tl.dot(tl.trans((weight * scores_z).to(k.dtype)), p, input_precision=PRECISION)
    for j in range(COEFFICIENTS - 1):
        x = tl.load(adjoint_k_ptr + j * L * K)
        z = tl.load(basis_v_ptr + (j + 1) * L * V)
        scores_x = tl.dot(x, tl.trans(k), input_precision=PRECISION)
        scores_z = tl.dot(z, tl.trans(v), input_precision=PRECISION)
        grad_weight += scores_x * scores_z
        grad_k = tl.dot(tl.trans((weight * scores_z).to(k.dtype)), x, grad_k, input_precision=PRECISION)
        x = tl.load(basis_k_ptr + (j + 1) * L * K)
        z = tl.load(adjoint_v_ptr + j * L * V)
        scores_x = tl.dot(x, tl.trans(k), input_precision=PRECISION)
        scores_z = tl.dot(z, tl.trans(v), input_precision=PRECISION)
        grad_weight += scores_x * scores_z
        grad_k = tl.dot(tl.trans((weight * scores_z).to(k.dtype)), x, grad_k, input_precision=PRECISION)

    radial = tl.load(radial_ptr + program * L + tl.arange(0, L))
    seen_by = tl.sum(weight * (radial * carry)[:, None], 0)  # (L,) of the written
    c = tl.load(states_ptr + program * K * V + tile(K, V)).to(k.dtype)
    scores_k = tl.dot(k, tl.trans(k), input_precision=PRECISION)
    scores_v = tl.dot(v, tl.trans(v), input_precision=PRECISION)
    overlap = tl.dot(tl.trans((radial[:, None] * weight).to(k.dtype)), weight.to(k.dtype), input_precision=PRECISION)
    grad_k = 4 * grad_k - tl.dot((overlap * scores_v).to(k.dtype), k, input_precision=PRECISION)
    grad_k -= seen_by[:, None] * tl.dot(v, tl.trans(c), input_precision=PRECISION)
    store_rows(grad_k_ptr + (batch * steps * heads + head) * K, grad_k, heads * K, start, steps, L, K)

    # Rows of dL/dlog D, with that of a, sum to zero: a step's read does not change if all of its memory does.
    across = tl.sum(tl.dot(k, c, input_precision=PRECISION) * v, 1)
    along = gram_product(weight, scores_k, scores_v) + carry[:, None] * across[None, :]  # k_u'A_t v_u (L, L)
    grad_log = tl.sum((4 * grad_weight - radial[:, None] * along) * weight, 0)  # (L,) of the written
    t = tl.arange(0, L)
    later = (t[None, :] >= t[:, None]) & (episode[None, :] == episode[:, None])
    grad_forget = -tl.sum(tl.where(later, grad_log[None, :], 0.0), 1)
    live = start + t < steps
    tl.store(grad_input_ptr + row * steps + start + t, grad_log, mask=live)
    tl.store(grad_forget_ptr + row * steps + start + t, tl.where(first != 0, 0.0, grad_forget), mask=live)
