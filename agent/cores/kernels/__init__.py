"""Triton twins of functions in `agent.cores.memory`, and the one place that chooses between the two.

The kernels run where they can: on CUDA, with triton installed, in fp32 or bf16, for head dimensions in `tuning.DIMS`,
over sequences for all up to the largest of them. Everything else is the reference, with the same arguments and results.
"""

from collections.abc import Container
from importlib.util import find_spec

import torch
from torch import Tensor

from agent.cores import memory as reference
from agent.cores.kernels.tuning import DIMS
from agent.cores.memory import Memory

_INSTALLED = find_spec("triton") is not None
OVER_SEQUENCES = range(1, max(DIMS) + 1)


def available() -> bool:
    """Whether the kernels can be imported."""
    return _INSTALLED


def _fits(q: Tensor, k: Tensor, v: Tensor, dims: Container[int]) -> bool:
    """Whether the kernels take q, k (..., K) and v (..., V) where they take K and V in `dims`."""
    return (
        available()
        and q.is_cuda
        and q.dtype in (torch.float32, torch.bfloat16)
        and q.dtype == k.dtype == v.dtype
        and q.shape[-1] in dims
        and v.shape[-1] in dims
    )


def step(
    q: Tensor, k: Tensor, v: Tensor, log_input: Tensor, log_forget: Tensor, first: Tensor, memory: Memory,
    coefficients: Tensor | None = None,
) -> tuple[Tensor, Memory]:  # fmt: skip
    """`write`, then `polynomial_read` with coefficients (J,), or `plain_read` without.

    Takes q, k (B, H, K), v (B, H, V), log gates (B, H), first (B,); gives y (B, H, V) and the memory after the step.
    C may be in bf16: it is added to and read in fp32, and rounded afterwards. The kernel has no gradient, so that where
    one is asked for, the reference runs.
    """
    sources = (q, k, v, log_input, log_forget, *memory)
    if _fits(q, k, v, DIMS) and not (torch.is_grad_enabled() and any(source.requires_grad for source in sources)):
        from agent.cores.kernels import one_step as kernel

        return kernel.step(q, k, v, log_input, log_forget, first, memory, coefficients)
    wide = memory._replace(C=memory.C.to(memory.n.dtype))
    after = reference.write(k, v, log_input, log_forget, first, wide)
    y = reference.plain_read(q, after) if coefficients is None else reference.polynomial_read(q, after, coefficients)
    return y, after._replace(C=after.C.to(memory.C.dtype))


def plain_read_sequence(
    q: Tensor, k: Tensor, v: Tensor, log_input: Tensor, log_forget: Tensor, first: Tensor, memory: Memory,
    chunk: int = 64,
) -> tuple[Tensor, Memory]:  # fmt: skip
    """`agent.cores.memory.plain_read_sequence`; what the kernels' gradient leaves out is said at their own."""
    if _fits(q, k, v, OVER_SEQUENCES):
        from agent.cores.kernels import plain_sequence as kernel

        return kernel.plain_read_sequence(q, k, v, log_input, log_forget, first, memory, chunk)
    return reference.plain_read_sequence(q, k, v, log_input, log_forget, first, memory, chunk)


def polynomial_read_sequence(
    q: Tensor, k: Tensor, v: Tensor, log_input: Tensor, log_forget: Tensor, first: Tensor, memory: Memory,
    coefficients: Tensor, chunk: int = 64,
) -> tuple[Tensor, Memory]:  # fmt: skip
    """`agent.cores.memory.polynomial_read_sequence`; what the kernels' gradient leaves out is said at their own."""
    if _fits(q, k, v, OVER_SEQUENCES):
        from agent.cores.kernels import sequence as kernel

        return kernel.polynomial_read_sequence(
            q, k, v, log_input, log_forget, first, memory, coefficients, chunk
        )  # fmt: skip
    return reference.polynomial_read_sequence(q, k, v, log_input, log_forget, first, memory, coefficients, chunk)
