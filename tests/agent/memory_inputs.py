"""What tests of the matrix memory's kernels share: inputs, their sizes, and the memories to expect."""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from agent.cores.kernels.tuning import DIMS
from agent.cores.memory import EMPTY, Memory

CUDA = torch.cuda.is_available()  # elsewhere conftest.py has Triton interpret the kernels

DEVICE = "cuda" if CUDA else "cpu"

SIZES = [(16, 16, 1), (32, 16, 63), (16, 32, 64), (16, 16, 65), (16, 16, 150), (12, 24, 65)]
CUDA_SIZES = [(d, d, steps) for d in (*DIMS, 48) for steps in (1, 63, 64, 65, 200)]

Inputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Memory]


def make_inputs(steps: int, key: int, value: int, dtype: torch.dtype = torch.float32, batch: int = 2) -> Inputs:
    """q, k, v, log gates, first, a used memory; resets in the middle of all streams but the first."""
    heads = 2
    q, k = torch.randn(2, batch, heads, steps, key)
    v = torch.randn(batch, heads, steps, value)
    log_input = torch.randn(batch, heads, steps)
    log_forget = F.logsigmoid(2 * torch.randn(batch, heads, steps) + 3)
    first = torch.zeros(batch, steps, dtype=torch.bool)
    first[1:, steps // 2] = first[1:, steps // 3] = True
    memory = Memory(torch.randn(batch, heads, key, value), torch.randn(batch, heads, key), torch.randn(batch, heads))
    q, k, v = (x.to(dtype) for x in (q, k * key**-0.5, v))
    return on_device((q, k, v, log_input, log_forget, first, memory), DEVICE)


def on_device(inputs: Inputs, device: str) -> Inputs:
    *tensors, memory = inputs
    return (*(x.to(device) for x in tensors), Memory(*(x.to(device) for x in memory)))  # type: ignore[return-value]


def wide(inputs: Inputs) -> Inputs:
    """The same numbers in fp64."""
    q, k, v, log_input, log_forget, first, memory = inputs
    q, k, v, log_input, log_forget = (x.double() for x in (q, k, v, log_input, log_forget))
    return q, k, v, log_input, log_forget, first, Memory(*(x.double() for x in memory))


def each_memory(
    k: Tensor, v: Tensor, log_input: Tensor, log_forget: Tensor, first: Tensor, memory: Memory
) -> Iterator[Memory]:
    """The memory after each step, one step after the other, with the stabiliser taken as constant."""
    C, n, m = memory
    for t in range(k.shape[2]):
        gone = first[:, t, None]
        C, n = torch.where(gone[..., None, None], 0.0, C), torch.where(gone[..., None], 0.0, n)
        old = log_forget[..., t] + torch.where(gone, EMPTY, m)
        m = torch.maximum(old, log_input[..., t]).detach()
        forget, write = (old - m).exp()[..., None], (log_input[..., t] - m).exp()[..., None]
        C = forget[..., None] * C + (write * k[:, :, t])[..., None] * v[:, :, t, None, :]
        n = forget * n + write * k[:, :, t]
        yield Memory(C, n, m)


def at(inputs: Inputs, t: int) -> Inputs:
    q, k, v, log_input, log_forget, first, memory = inputs
    rows = (q[:, :, t], k[:, :, t], v[:, :, t], log_input[..., t], log_forget[..., t])
    return (*rows, first[:, t], memory)


def error(ours: Tensor, theirs: Tensor) -> float:
    ours, theirs = ours.detach().double().cpu(), theirs.detach().double().cpu()
    return float((ours - theirs).norm() / (theirs.norm() + 1e-12))
