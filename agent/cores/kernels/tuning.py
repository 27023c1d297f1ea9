"""Every choice of size and launch, in one place: change it here, measure, keep what is faster."""

from dataclasses import dataclass

import torch

DIMS = (16, 32, 64, 128)
"""Head dimensions of keys and values that the kernels take."""

STATE_COLUMNS = 32
"""Columns of the memory that one program of `chunk_states` carries through time."""


@dataclass(frozen=True)
class Launch:
    """How a kernel is launched: warps per program and depth of the software pipeline."""

    num_warps: int
    num_stages: int = 1


LAUNCH: dict[str, dict[int, Launch]] = {
    "step": {16: Launch(1), 32: Launch(1), 64: Launch(2), 128: Launch(8)},
    "chunk_states": {16: Launch(4, 2), 32: Launch(4, 2), 64: Launch(4, 2), 128: Launch(4, 2)},
    "read_forward": {16: Launch(4), 32: Launch(2), 64: Launch(4), 128: Launch(8)},
    "read_backward": {16: Launch(4), 32: Launch(2), 64: Launch(4), 128: Launch(8)},
    "values_backward": {16: Launch(4), 32: Launch(2), 64: Launch(4, 3), 128: Launch(8)},
    "keys_backward": {16: Launch(4), 32: Launch(2), 64: Launch(4), 128: Launch(8)},
    "plain_forward": {16: Launch(4), 32: Launch(2), 64: Launch(4), 128: Launch(8)},
    "plain_backward": {16: Launch(4), 32: Launch(2), 64: Launch(4), 128: Launch(8)},
    "states_backward": {16: Launch(4), 32: Launch(2), 64: Launch(8), 128: Launch(8)},
}
"""Kernel -> width, the larger head dimension (fp32 counts twice, as it takes twice the room of bf16) -> launch.

Width 32 has 2 warps: with 4 or 8, which Triton 3.6 turns into warp-group products on an H100, tiles of 64 x 32 in bf16
came out of the backward kernels as NaN, or with an illegal access. So did `states_backward` at 32 x 16 in fp32; two
warps were exact 50 times of 50, hence no more than two where keys and values differ in width, as they do in no core.
"""

CHUNK = {16: 64, 32: 64, 64: 64, 128: 32, 256: 16}
"""Width -> steps per chunk at most: a program holds (steps, width) tiles in its registers."""


def launch(kernel: str, key_dim: int, value_dim: int, bytes_per_number: int = 2) -> dict[str, int]:
    """Launch options of a kernel for memories (key_dim, value_dim) whose products are in such numbers."""
    chosen = LAUNCH[kernel][min(_width(key_dim, value_dim, bytes_per_number), max(DIMS))]
    warps = chosen.num_warps if key_dim == value_dim else min(chosen.num_warps, 2)
    return {"num_warps": warps, "num_stages": chosen.num_stages}


def chunk_length(chunk: int, key_dim: int, value_dim: int, bytes_per_number: int) -> int:
    """Steps per chunk: a power of two from 16 up to what `chunk` asks for and one program can hold."""
    most = min(chunk, CHUNK[_width(key_dim, value_dim, bytes_per_number)])
    return max(16, 1 << (most.bit_length() - 1))


def precision(dtype: torch.dtype) -> str:
    """Products of fp32 tiles in three TF32 products, which is fp32 to rounding; bf16 tiles need no such choice."""
    return "tf32x3" if dtype == torch.float32 else "tf32"


def _width(key_dim: int, value_dim: int, bytes_per_number: int) -> int:
    return max(key_dim, value_dim) * bytes_per_number // 2
