"""The plain read of a matrix memory over a sequence, on the GPU: launches and autograd.

Forward: `chunk_states`, sequential over chunks, then `plain_forward` on all chunks at once. Backward: `plain_backward`
on all chunks at once, then `states_backward`, sequential over chunks. Kept for it are y and the memories at chunk
starts; what is inside a chunk is computed again.
"""

from typing import Any

import torch
from torch import Tensor

from agent.cores.folding import fold
from agent.cores.kernels.layout import cut, filled_up, like_rows, unit_columns
from agent.cores.kernels.plain import plain_backward, plain_forward
from agent.cores.kernels.states import chunk_states, states_backward
from agent.cores.kernels.tuning import STATE_COLUMNS, chunk_length, launch, precision
from agent.cores.memory import EMPTY, MAX_LOG_NORMALISER, NORMALISER_EPS, Memory


def plain_read_sequence(
    q: Tensor, k: Tensor, v: Tensor, log_input: Tensor, log_forget: Tensor, first: Tensor, memory: Memory,
    chunk: int = 64,
) -> tuple[Tensor, Memory]:  # fmt: skip
    """The function of the same name in `agent.cores.memory`, with gradients of q, k, v, the gates and all of memory.

    The stabilisers that follow from memory.m count as constants: the memory after the last step carries no gradient
    through its own, and what is read from it does not miss it.

    Args:
        q: queries (B, H, T, K), fp32 or bf16, in the dtype of k and v; K and V are at most `max(tuning.DIMS)`.
        k: keys (B, H, T, K).
        v: values (B, H, T, V).
        log_input: logarithm of the input gate (B, H, T), fp32.
        log_forget: logarithm of the forget gate (B, H, T), fp32.
        first: bool (B, T); where true, the memory is emptied before the step.
        memory: memory before the first step, fp32.
        chunk: steps per chunk at most; the kernels take what is fastest up to it.

    Returns:
        y (B, H, T, V) in the dtype of v and the memory after the last step.
    """
    key, value = k.shape[-1], v.shape[-1]
    q, k, v, memory = filled_up(q, k, v, memory)
    y, C, n, m, *_ = forward_op(q, k, v, log_input, log_forget, first, *memory, chunk)
    return cut(y, Memory(C, n, m.detach()), key, value)


@torch.library.custom_op("matrix_memory::plain_read", mutates_args=())
def forward_op(
    q: Tensor, k: Tensor, v: Tensor, log_input: Tensor, log_forget: Tensor, first: Tensor,
    C: Tensor, n: Tensor, m: Tensor, chunk: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """The read y; C, n, m after the last step; C (B, H, N, K, V), n (B, H, N, K), m (B, H, N) at chunk starts."""
    q, k, v = (unit_columns(x) for x in (q, k, v))
    log_input, log_forget, first, C, n, m = (x.contiguous() for x in (log_input, log_forget, first, C, n, m))
    outputs = _forward_outputs(v, C, n, m, q.shape[2], chunk)
    y, C_after, n_after, m_after, states, normalisers, stabilisers = outputs
    batch, heads, steps, K = q.shape
    V = v.shape[-1]
    chunks = states.shape[2]
    sizes = {"K": K, "V": V, "L": chunk_length(chunk, K, V, k.element_size()), "EMPTY": EMPTY}
    columns = min(V, STATE_COLUMNS)
    chunk_states[(batch * heads, V // columns)](
        k, v, log_input, log_forget, first, C, n, m, states, normalisers, stabilisers, C_after, n_after, m_after,
        *k.stride()[:3], *v.stride()[:3], heads, steps, chunks,
        COLUMNS=columns, **sizes, **launch("chunk_states", K, V, k.element_size()),
    )  # fmt: skip
    plain_forward[(batch * heads * chunks,)](
        q, k, v, log_input, log_forget, first, states, normalisers, stabilisers, y,
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], heads, steps, chunks,
        **sizes, MAX_LOG=MAX_LOG_NORMALISER, EPS=NORMALISER_EPS, PRECISION=precision(q.dtype),
        **launch("plain_forward", K, V, k.element_size()),
    )  # fmt: skip
    return outputs


def _forward_outputs(
    v: Tensor, C: Tensor, n: Tensor, m: Tensor, steps: int, chunk: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    batch, heads, K, V = C.shape
    chunks = -(-steps // chunk_length(chunk, K, V, v.element_size()))
    after = C.new_empty(C.shape), n.new_empty(n.shape), m.new_empty(m.shape)
    starts = (x.new_empty(batch, heads, chunks, *x.shape[2:]) for x in (C, n, m))
    return (like_rows(v), *after, *starts)  # type: ignore[return-value]


@forward_op.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, log_input: Tensor, log_forget: Tensor, first: Tensor,
    C: Tensor, n: Tensor, m: Tensor, chunk: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    return _forward_outputs(v, C, n, m, q.shape[2], chunk)


@torch.library.custom_op("matrix_memory::plain_read_backward", mutates_args=())
def backward_op(
    grad_y: Tensor, grad_C: Tensor, grad_n: Tensor,
    q: Tensor, k: Tensor, v: Tensor, log_input: Tensor, log_forget: Tensor, first: Tensor,
    y: Tensor, states: Tensor, normalisers: Tensor, stabilisers: Tensor, chunk: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of q, k, v, log_input, log_forget, C and n from those of y and of C and n after the last step."""
    rows = [unit_columns(x) for x in (grad_y, q, k, v, y)]
    gates = [x.contiguous() for x in (log_input, log_forget, first)]
    starts = (states, normalisers, stabilisers)
    outputs = _backward_outputs(q, k, v, log_input, grad_C, grad_n)
    grad_q, grad_k, grad_v, grad_input, grad_forget, grad_C_before, grad_n_before = outputs
    grad_states, grad_normalisers = torch.empty_like(states), torch.empty_like(normalisers)
    batch, heads, steps, K = k.shape
    V = v.shape[-1]
    chunks = states.shape[2]
    length = chunk_length(chunk, K, V, k.element_size())
    sizes = {"K": K, "V": V, "L": length, "EMPTY": EMPTY, "PRECISION": precision(k.dtype)}
    plain_backward[(batch * heads * chunks,)](
        *rows, *gates, *starts, grad_q, grad_k, grad_v, grad_input, grad_forget, grad_states, grad_normalisers,
        *(stride for x in rows for stride in x.stride()[:3]), heads, steps, chunks,
        **sizes, MAX_LOG=MAX_LOG_NORMALISER, EPS=NORMALISER_EPS, **launch("plain_backward", K, V, k.element_size()),
    )  # fmt: skip
    _, _, k, v, _ = rows
    states_backward[(batch * heads,)](
        k, v, *gates, *starts, grad_states, grad_normalisers, grad_C.contiguous(), grad_n.contiguous(),
        grad_k, grad_v, grad_input, grad_forget, grad_C_before, grad_n_before,
        *k.stride()[:3], *v.stride()[:3], heads, steps, chunks,
        **sizes, **launch("states_backward", K, V, k.element_size()),
    )  # fmt: skip
    return outputs


def _backward_outputs(
    q: Tensor, k: Tensor, v: Tensor, gate: Tensor, C: Tensor, n: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    gates = gate.new_empty(gate.shape), gate.new_empty(gate.shape)
    return (like_rows(q), like_rows(k), like_rows(v), *gates, C.new_empty(C.shape), n.new_empty(n.shape))


@backward_op.register_fake
def _(
    grad_y: Tensor, grad_C: Tensor, grad_n: Tensor,
    q: Tensor, k: Tensor, v: Tensor, log_input: Tensor, log_forget: Tensor, first: Tensor,
    y: Tensor, states: Tensor, normalisers: Tensor, stabilisers: Tensor, chunk: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    return _backward_outputs(q, k, v, log_input, grad_C, grad_n)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    q, k, v, log_input, log_forget, first, C, n, _, ctx.chunk = inputs
    y, _, _, _, *starts = output
    ctx.set_materialize_grads(False)  # of what is only saved, zeros would take as much room as all of that
    ctx.save_for_backward(C, n, q, k, v, log_input, log_forget, first, y, *starts)


def _backward(
    ctx: Any, grad_y: Tensor | None, grad_C: Tensor | None, grad_n: Tensor | None, *_: None
) -> tuple[Tensor | None, ...]:
    C, n, *saved = ctx.saved_tensors
    given = zip((grad_y, grad_C, grad_n), (saved[6], C, n), strict=True)
    grads = (torch.zeros_like(x) if grad is None else grad for grad, x in given)
    *products, grad_C, grad_n = backward_op(*grads, *saved, ctx.chunk)
    # All that depends on m is exp(m) C and exp(m) n; where these were emptied they may be infinite.
    grad_m = torch.where(grad_C == 0, 0.0, grad_C * C).sum((-2, -1)) + torch.where(grad_n == 0, 0.0, grad_n * n).sum(-1)
    return *products, None, grad_C, grad_n, grad_m, None


# As operators rather than an autograd.Function, since these can be compiled under vmap.
torch.library.register_autograd(forward_op, _backward, setup_context=_save)
torch.library.register_vmap(forward_op, fold(forward_op))
torch.library.register_vmap(backward_op, fold(backward_op))
