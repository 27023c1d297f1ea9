"""What environments give, as tensors and back again."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from envs.streams import Row


def tensors(row: Row) -> dict[str, Tensor]:
    """A row of the environments as tensors (N, ...) that share its memory."""
    return {key: torch.from_numpy(np.ascontiguousarray(value)) for key, value in row.items()}


def as_tensors(value: Any) -> Any:
    """Arrays within lists and dicts as tensors, which a checkpoint may hold; tensors on the CPU."""
    if isinstance(value, dict):
        return {key: as_tensors(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [as_tensors(entry) for entry in value]
    if isinstance(value, Tensor):
        return value.cpu()
    return torch.from_numpy(value.copy()) if isinstance(value, np.ndarray) else value


def as_arrays(value: Any) -> Any:
    """Tensors within lists and dicts as arrays of their own."""
    if isinstance(value, dict):
        return {key: as_arrays(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [as_arrays(entry) for entry in value]
    return value.numpy().copy() if isinstance(value, Tensor) else value
