"""How tensors lie in device memory for the kernels over sequences."""

from torch import Tensor


def unit_columns(x: Tensor) -> Tensor:
    """The same numbers (..., d), those of a row side by side, as every kernel takes them; other axes lie anyhow."""
    return x if x.stride(-1) == 1 else x.contiguous()


def like_rows(x: Tensor) -> Tensor:
    """An empty (B, H, T, d) that lies in memory as (B, T, H, d), the way the layers around a memory have it."""
    batch, heads, steps, width = x.shape
    return x.new_empty(batch, steps, heads, width).transpose(1, 2)
