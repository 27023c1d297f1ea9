"""What makes runs repeat: the global random generators, where they are and putting them there again; and kernels."""

import os
import random
from typing import Any

import numpy as np
import torch

from agent.schema import Config


def make_deterministic(config: Config, device: torch.device) -> None:
    """Choose kernels that give the same bits every time: always on the CPU, where it costs little, and on request."""
    if config.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when the first product is made
    on_cpu = device.type == "cpu"
    torch.use_deterministic_algorithms(on_cpu or config.deterministic, warn_only=not on_cpu)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def seed_everything(seed: int) -> None:
    """Begin all of them anew."""
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002 - environments of others may draw from it


def random_state() -> dict[str, Any]:
    """State of Python's, NumPy's and torch's global generators, CUDA's too if the process uses CUDA."""
    version, internal, gauss = random.getstate()
    numpy = np.random.get_state(legacy=False)  # noqa: NPY002
    assert isinstance(numpy, dict)
    key = numpy["state"]["key"].tolist()
    return {
        "python": [version, list(internal), gauss],
        "numpy": {**numpy, "state": {"key": key, "pos": int(numpy["state"]["pos"])}},
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [],
    }


def set_random_state(state: dict[str, Any]) -> None:
    """Puts the generators where random_state() found them; CUDA states without a device here are left out."""
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    numpy = state["numpy"]
    key = np.array(numpy["state"]["key"], dtype=np.uint32)
    np.random.set_state({**numpy, "state": {"key": key, "pos": numpy["state"]["pos"]}})  # noqa: NPY002
    torch.set_rng_state(state["torch"])
    devices = range(torch.cuda.device_count())
    for device, device_state in zip(devices, state["cuda"], strict=False):
        torch.cuda.set_rng_state(device_state, device)
