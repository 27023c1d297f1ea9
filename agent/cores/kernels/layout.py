"""How tensors lie in device memory for the kernels over sequences."""

import torch.nn.functional as F
from torch import Tensor

from agent.cores.kernels.tuning import DIMS
from agent.cores.memory import Memory


def unit_columns(x: Tensor) -> Tensor:
    """The same numbers (..., d), those of a row side by side, as every kernel takes them; other axes lie anyhow."""
    return x if x.stride(-1) == 1 else x.contiguous()


def like_rows(x: Tensor) -> Tensor:
    """An empty (B, H, T, d) that lies in memory as (B, T, H, d), the way the layers around a memory have it."""
    batch, heads, steps, width = x.shape
    return x.new_empty(batch, steps, heads, width).transpose(1, 2)


def filled_up(q: Tensor, k: Tensor, v: Tensor, memory: Memory) -> tuple[Tensor, Tensor, Tensor, Memory]:
    """Keys (..., K), values (..., V) and the memory with zeros after them, so that K and V are among `tuning.DIMS`.

    Zeros are written as zeros and change no norm, so that `cut` finds what there would be without them.
    """
    key, value = (min(dim for dim in DIMS if dim >= x.shape[-1]) - x.shape[-1] for x in (k, v))
    if key == value == 0:  # filling up copies, even by nothing
        return q, k, v, memory
    memory = Memory(F.pad(memory.C, (0, value, 0, key)), F.pad(memory.n, (0, key)), memory.m)
    return F.pad(q, (0, key)), F.pad(k, (0, key)), F.pad(v, (0, value)), memory


def cut(y: Tensor, memory: Memory, key: int, value: int) -> tuple[Tensor, Memory]:
    """What was read (..., V') and the memory, without what `filled_up` has added to `key` and `value` columns."""
    return y[..., :value], Memory(memory.C[..., :key, :value], memory.n[..., :key], memory.m)
