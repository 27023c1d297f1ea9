"""The orthogonalised read of a matrix memory over a sequence, on the GPU: launches and autograd.

Forward: `chunk_states`, sequential over chunks, then `read_forward` on all chunks at once. Backward: `read_backward`,
`values_backward` and `keys_backward` on all chunks at once, then `states_backward`, sequential over chunks. The arrays
between them are the memories at chunk starts and, for the gradient, the vectors of the recurrences.
"""

from typing import Any

import torch
from torch import Tensor

from agent.cores.folding import fold
from agent.cores.kernels.backward import keys_backward, read_backward, values_backward
from agent.cores.kernels.forward import read_forward
from agent.cores.kernels.layout import cut, filled_up, like_rows, unit_columns
from agent.cores.kernels.states import chunk_states, states_backward
from agent.cores.kernels.tuning import STATE_COLUMNS, chunk_length, launch, precision
from agent.cores.memory import EMPTY, NORM_FLOOR, Memory


def polynomial_read_sequence(
    q: Tensor, k: Tensor, v: Tensor, log_input: Tensor, log_forget: Tensor, first: Tensor, memory: Memory,
    coefficients: Tensor, chunk: int = 64,
) -> tuple[Tensor, Memory]:  # fmt: skip
    """The function of the same name in `agent.cores.memory`, with gradients of q, k, v, gates, memory.C and memory.m.

    The stabilisers that follow from memory.m count as constants: the memory after the last step carries no gradient
    through its own, nor does n, and what is read from the memory by direction alone does not miss it.

    Args:
        q: queries (B, H, T, K), fp32 or bf16, in the dtype of k and v; K and V are at most `max(tuning.DIMS)`.
        k: keys (B, H, T, K).
        v: values (B, H, T, V).
        log_input: logarithm of the input gate (B, H, T), fp32.
        log_forget: logarithm of the forget gate (B, H, T), fp32.
        first: bool (B, T); where true, the memory is emptied before the step.
        memory: memory before the first step, fp32.
        coefficients: c (J,) of f(s) = sum_j c_j s T_j(2 s^2 - 1), fp32.
        chunk: steps per chunk at most; the kernels take what is fastest up to it.

    Returns:
        y (B, H, T, V) in the dtype of v and the memory after the last step.
    """
    key, value = k.shape[-1], v.shape[-1]
    q, k, v, memory = filled_up(q, k, v, memory)
    save = torch.is_grad_enabled()  # what a tensor requires is not known under vmap
    y, C, n, m, *_ = forward_op(q, k, v, log_input, log_forget, first, *memory, coefficients, chunk, save)
    return cut(y, Memory(C, n.detach(), m.detach()), key, value)


@torch.library.custom_op("matrix_memory::polynomial_read", mutates_args=())
def forward_op(
    q: Tensor, k: Tensor, v: Tensor, log_input: Tensor, log_forget: Tensor, first: Tensor,
    C: Tensor, n: Tensor, m: Tensor, coefficients: Tensor, chunk: int, save: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """The read y; C, n and m after the last step; C (B, H, N, K, V) and m (B, H, N) at the starts of chunks.

    With `save` also the scales (B, H, N, L) and bases (B, H, N, J, L, K), (B, H, N, J, L, V) of `read_forward`.
    """
    q, k, v = (unit_columns(x) for x in (q, k, v))
    log_input, log_forget, first, C, n, m = (x.contiguous() for x in (log_input, log_forget, first, C, n, m))
    outputs = _forward_outputs(q, v, C, n, m, len(coefficients), chunk, save)
    y, C_after, n_after, m_after, states, stabilisers, scales, basis_k, basis_v = outputs
    batch, heads, steps, K = q.shape
    V = v.shape[-1]
    chunks = states.shape[2]
    sizes = {"K": K, "V": V, "L": basis_k.shape[-2], "EMPTY": EMPTY}
    columns = min(V, STATE_COLUMNS)
    chunk_states[(batch * heads, V // columns)](
        k, v, log_input, log_forget, first, C, n, m, states, None, stabilisers, C_after, n_after, m_after,
        *k.stride()[:3], *v.stride()[:3], heads, steps, chunks,
        COLUMNS=columns, **sizes, **launch("chunk_states", K, V, k.element_size()),
    )  # fmt: skip
    read_forward[(batch * heads * chunks,)](
        q, k, v, log_input, log_forget, first, states, stabilisers, coefficients.contiguous(),
        y, scales, basis_k, basis_v,
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], heads, steps, chunks,
        COEFFICIENTS=len(coefficients), **sizes, FLOOR=NORM_FLOOR, SAVE=save, PRECISION=precision(q.dtype),
        **launch("read_forward", K, V, k.element_size()),
    )  # fmt: skip
    return outputs


def _forward_outputs(
    q: Tensor, v: Tensor, C: Tensor, n: Tensor, m: Tensor, coefficients: int, chunk: int, save: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    batch, heads, steps, K = q.shape
    V = v.shape[-1]
    length = chunk_length(chunk, K, V, q.element_size())
    chunks = -(-steps // length)
    bases = (batch, heads, chunks) if save else (0, 0, 0)
    return (
        like_rows(v),
        C.new_empty(C.shape),
        n.new_empty(n.shape),
        m.new_empty(m.shape),
        C.new_empty(batch, heads, chunks, K, V),
        m.new_empty(batch, heads, chunks),
        m.new_empty(*bases, length),
        q.new_empty(*bases, coefficients, length, K),
        v.new_empty(*bases, coefficients, length, V),
    )


@forward_op.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, log_input: Tensor, log_forget: Tensor, first: Tensor,
    C: Tensor, n: Tensor, m: Tensor, coefficients: Tensor, chunk: int, save: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    return _forward_outputs(q, v, C, n, m, len(coefficients), chunk, save)


@torch.library.custom_op("matrix_memory::polynomial_read_backward", mutates_args=())
def backward_op(
    grad_y: Tensor, grad_C: Tensor, k: Tensor, v: Tensor, log_input: Tensor, log_forget: Tensor, first: Tensor,
    coefficients: Tensor, states: Tensor, stabilisers: Tensor, scales: Tensor, basis_k: Tensor, basis_v: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of q, k, v, log_input, log_forget and C from those of y and of C after the last step."""
    grad_y, k, v = (unit_columns(x) for x in (grad_y, k, v))
    grad_C, log_input, log_forget, first = (x.contiguous() for x in (grad_C, log_input, log_forget, first))
    outputs = _backward_outputs(k, v, log_input, grad_C)
    grad_q, grad_k, grad_v, grad_input, grad_forget, grad_C_before = outputs
    grad_states = torch.empty_like(states)
    batch, heads, steps, K = k.shape
    V = v.shape[-1]
    chunks = states.shape[2]
    length = scales.shape[-1]
    sizes = {"K": K, "V": V, "L": length, "EMPTY": EMPTY, "PRECISION": precision(k.dtype)}
    adjoints = (batch, heads, chunks, len(coefficients) - 1, length)
    adjoint_k, adjoint_v = basis_k.new_empty(*adjoints, K), basis_v.new_empty(*adjoints, V)
    inputs = (grad_y, k, v, log_input, log_forget, first, states, stabilisers, scales)
    strides = (*grad_y.stride()[:3], *k.stride()[:3], *v.stride()[:3], heads, steps, chunks)
    read_backward[(batch * heads * chunks,)](
        *inputs, coefficients.contiguous(), adjoint_k, adjoint_v, grad_q,
        *strides, COEFFICIENTS=len(coefficients), **sizes, **launch("read_backward", K, V, k.element_size()),
    )  # fmt: skip
    vectors = (basis_k, basis_v, adjoint_k, adjoint_v)
    radial = torch.empty_like(scales)
    values_backward[(batch * heads * chunks,)](
        *inputs, *vectors, radial, grad_v, grad_states,
        *strides, COEFFICIENTS=len(coefficients), **sizes, **launch("values_backward", K, V, k.element_size()),
    )  # fmt: skip
    keys_backward[(batch * heads * chunks,)](
        *inputs, *vectors, radial, grad_k, grad_input, grad_forget,
        *strides, COEFFICIENTS=len(coefficients), **sizes, **launch("keys_backward", K, V, k.element_size()),
    )  # fmt: skip
    states_backward[(batch * heads,)](
        k, v, log_input, log_forget, first, states, None, stabilisers, grad_states, None, grad_C, None,
        grad_k, grad_v, grad_input, grad_forget, grad_C_before, None,
        *k.stride()[:3], *v.stride()[:3], heads, steps, chunks,
        **sizes, **launch("states_backward", K, V, k.element_size()),
    )  # fmt: skip
    return outputs


def _backward_outputs(
    k: Tensor, v: Tensor, gate: Tensor, C: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    gates = gate.new_empty(gate.shape), gate.new_empty(gate.shape)
    return (like_rows(k), like_rows(k), like_rows(v), *gates, C.new_empty(C.shape))


@backward_op.register_fake
def _(
    grad_y: Tensor, grad_C: Tensor, k: Tensor, v: Tensor, log_input: Tensor, log_forget: Tensor, first: Tensor,
    coefficients: Tensor, states: Tensor, stabilisers: Tensor, scales: Tensor, basis_k: Tensor, basis_v: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    return _backward_outputs(k, v, log_input, grad_C)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, k, v, log_input, log_forget, first, C, _, _, coefficients, _, _ = inputs
    y, _, _, _, *saved = output
    ctx.set_materialize_grads(False)  # of what is only saved, zeros would take as much room as all of that
    ctx.save_for_backward(y, C, k, v, log_input, log_forget, first, coefficients, *saved)


def _backward(ctx: Any, grad_y: Tensor | None, grad_C: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    y, C, *saved = ctx.saved_tensors
    grad_y = torch.zeros_like(y) if grad_y is None else grad_y
    grad_C = torch.zeros_like(C) if grad_C is None else grad_C
    grad_q, grad_k, grad_v, grad_input, grad_forget, grad_C = backward_op(grad_y, grad_C, *saved)
    # All that depends on m is exp(m) C; where that was emptied C may be infinite.
    grad_m = torch.where(grad_C == 0, 0.0, grad_C * C).sum((-2, -1))
    return grad_q, grad_k, grad_v, grad_input, grad_forget, None, grad_C, None, grad_m, None, None, None


# As operators rather than an autograd.Function, since these can be compiled under vmap.
torch.library.register_autograd(forward_op, _backward, setup_context=_save)
torch.library.register_vmap(forward_op, fold(forward_op, shared=(9,)))
torch.library.register_vmap(backward_op, fold(backward_op, shared=(7,)))
