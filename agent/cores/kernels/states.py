"""The memory, and its gradient, from chunk to chunk: the two kernels that are sequential, whatever the read."""

import triton
import triton.language as tl

from agent.cores.kernels.chunk import load_gates, load_rows, store_rows, tile, weights_at_end


@triton.jit(do_not_specialize=["heads", "steps"])
def chunk_states(
    k_ptr: tl.tensor,
    v_ptr: tl.tensor,
    log_input_ptr: tl.tensor,
    log_forget_ptr: tl.tensor,
    first_ptr: tl.tensor,
    c_ptr: tl.tensor,
    n_ptr: tl.tensor,
    m_ptr: tl.tensor,
    states_ptr: tl.tensor,
    normalisers_ptr: tl.tensor | None,
    stabilisers_ptr: tl.tensor,
    c_out_ptr: tl.tensor,
    n_out_ptr: tl.tensor,
    m_out_ptr: tl.tensor,
    k_batch: tl.tensor,
    k_head: tl.tensor,
    k_step: tl.tensor,
    v_batch: tl.tensor,
    v_head: tl.tensor,
    v_step: tl.tensor,
    heads: tl.tensor,
    steps: tl.tensor,
    chunks: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    COLUMNS: tl.constexpr,
    L: tl.constexpr,
    EMPTY: tl.constexpr,
) -> None:
    """The memory before each chunk and after the last step. Program (batch row and head, COLUMNS columns of C).

    Chunks' starts are C in states, m in stabilisers and, for a read that has a use for it, n in normalisers.
    """
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS
    batch = row // heads
    head = row % heads
    keys = tl.arange(0, K)
    cell = keys[:, None] * V + (column + tl.arange(0, COLUMNS))[None, :]
    k_ptr += batch * k_batch + head * k_head
    v_ptr += batch * v_batch + head * v_head

    # A memory that is emptied at once is not read: what it holds may be infinite.
    kept = tl.load(first_ptr + batch * steps) == 0
    wanted = tl.where(kept, keys, -1) >= 0
    c = tl.load(c_ptr + row * K * V + cell, mask=wanted[:, None], other=0.0)
    n = tl.load(n_ptr + row * K + keys, mask=wanted, other=0.0)
    m = tl.where(kept, tl.load(m_ptr + row), EMPTY)
    # All programs of a row have the same n and m; one stores them.
    own = tl.where(column == 0, keys, -1) >= 0
    for i in range(chunks):
        start = i * L
        tl.store(states_ptr + (row * chunks + i) * K * V + cell, c)
        tl.store(stabilisers_ptr + row * chunks + i, m)
        if normalisers_ptr is not None:
            tl.store(normalisers_ptr + (row * chunks + i) * K + keys, n, mask=own)
        log_input, decay, episode, _ = load_gates(
            log_input_ptr, log_forget_ptr, first_ptr, row, batch, start, steps, L, EMPTY
        )
        weight, carry, m = weights_at_end(log_input, decay, episode, m, L, EMPTY)
        k = load_rows(k_ptr, k_step, start, steps, 0, L, K).to(tl.float32) * weight[:, None]
        v = load_rows(v_ptr, v_step, start, steps, column, L, COLUMNS).to(tl.float32)
        c = carry * c + tl.dot(tl.trans(k), v, input_precision="tf32x3")
        n = carry * n + tl.sum(k, 0)
    tl.store(c_out_ptr + row * K * V + cell, c)
    tl.store(n_out_ptr + row * K + keys, n, mask=own)
    tl.store(m_out_ptr + row, m, mask=column == 0)


@triton.jit(do_not_specialize=["heads", "steps"])
def states_backward(
    k_ptr: tl.tensor,
    v_ptr: tl.tensor,
    log_input_ptr: tl.tensor,
    log_forget_ptr: tl.tensor,
    first_ptr: tl.tensor,
    states_ptr: tl.tensor,
    normalisers_ptr: tl.tensor | None,
    stabilisers_ptr: tl.tensor,
    grad_states_ptr: tl.tensor,
    grad_normalisers_ptr: tl.tensor | None,
    grad_c_end_ptr: tl.tensor,
    grad_n_end_ptr: tl.tensor | None,
    grad_k_ptr: tl.tensor,
    grad_v_ptr: tl.tensor,
    grad_input_ptr: tl.tensor,
    grad_forget_ptr: tl.tensor,
    grad_c_ptr: tl.tensor,
    grad_n_ptr: tl.tensor | None,
    k_batch: tl.tensor,
    k_head: tl.tensor,
    k_step: tl.tensor,
    v_batch: tl.tensor,
    v_head: tl.tensor,
    v_step: tl.tensor,
    heads: tl.tensor,
    steps: tl.tensor,
    chunks: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    L: tl.constexpr,
    EMPTY: tl.constexpr,
    PRECISION: tl.constexpr,
) -> None:
    """Carry the gradient of the memory of one head from the last chunk to before the first.

    What reaches the memory at a chunk's end is added, through what the chunk wrote, to the gradients of k, v and gates.
    Without normalisers it is the gradient of C alone, otherwise of C and n.
    """
    row = tl.program_id(0).to(tl.int64)
    batch = row // heads
    head = row % heads
    k_ptr += batch * k_batch + head * k_head
    v_ptr += batch * v_batch + head * v_head
    grad_k_ptr += (batch * steps * heads + head) * K
    grad_v_ptr += (batch * steps * heads + head) * V
    t = tl.arange(0, L)
    keys = tl.arange(0, K)
    grad = tl.load(grad_c_end_ptr + row * K * V + tile(K, V))
    if normalisers_ptr is not None:
        grad_n = tl.load(grad_n_end_ptr + row * K + keys)
    for r in range(chunks):
        i = chunks - 1 - r
        start = i * L
        log_input, decay, episode, first = load_gates(
            log_input_ptr, log_forget_ptr, first_ptr, row, batch, start, steps, L, EMPTY
        )
        m_start = tl.load(stabilisers_ptr + row * chunks + i)
        weight, carry, _ = weights_at_end(log_input, decay, episode, m_start, L, EMPTY)
        k = load_rows(k_ptr, k_step, start, steps, 0, L, K)
        v = load_rows(v_ptr, v_step, start, steps, 0, L, V)
        narrow = grad.to(k.dtype)
        k_grad = tl.dot(k, narrow, input_precision=PRECISION) * weight[:, None]  # (L, V)
        v_grad = tl.dot(v, tl.trans(narrow), input_precision=PRECISION) * weight[:, None]  # (L, K)
        if normalisers_ptr is not None:
            v_grad += weight[:, None] * grad_n[None, :]
        store_rows(
            grad_k_ptr, v_grad + load_rows(grad_k_ptr, heads * K, start, steps, 0, L, K), heads * K, start, steps, L, K
        )
        store_rows(
            grad_v_ptr, k_grad + load_rows(grad_v_ptr, heads * V, start, steps, 0, L, V), heads * V, start, steps, L, V
        )

        c = tl.load(states_ptr + (row * chunks + i) * K * V + tile(K, V))
        of_carry = carry * tl.sum(tl.sum(grad * c, 1), 0)
        of_weight = tl.sum(k_grad * v, 1)  # (L,), of the logarithms
        if normalisers_ptr is not None:
            at = (row * chunks + i) * K + keys
            of_carry += carry * tl.sum(grad_n * tl.load(normalisers_ptr + at), 0)
            of_weight += weight * tl.sum(k * grad_n[None, :], 1)
            grad_n = carry * grad_n + tl.load(grad_normalisers_ptr + at)
        of_forget = of_carry + tl.cumsum(of_weight, 0) - of_weight
        live = start + t < steps
        gate = row * steps + start + t
        tl.store(grad_input_ptr + gate, of_weight + tl.load(grad_input_ptr + gate, mask=live, other=0.0), mask=live)
        of_forget = tl.where(first != 0, 0.0, of_forget) + tl.load(grad_forget_ptr + gate, mask=live, other=0.0)
        tl.store(grad_forget_ptr + gate, of_forget, mask=live)
        grad = carry * grad + tl.load(grad_states_ptr + (row * chunks + i) * K * V + tile(K, V))
    tl.store(grad_c_ptr + row * K * V + tile(K, V), grad)
    if normalisers_ptr is not None:
        tl.store(grad_n_ptr + row * K + keys, grad_n)
