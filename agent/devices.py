"""The device that a program runs on, and what of it shows in the last digits of its numbers."""

from typing import Literal

import torch

from agent.errors import UserError


def choose(wish: Literal["auto", "cpu", "cuda"]) -> torch.device:
    """The device that is meant: `auto` is cuda where torch finds one.

    Raises:
        UserError: cuda is asked for and there is none.
    """
    available = torch.cuda.is_available()
    if wish == "cuda" and not available:
        raise UserError(
            "device: cuda, but torch finds no CUDA device here; use --device cpu, or install a CUDA build of torch"
        )
    return torch.device("cuda" if available and wish != "cpu" else "cpu")


def platform(device: torch.device) -> dict[str, str]:
    """What decides how sums are rounded, besides the code."""
    on_gpu = device.type == "cuda"
    return {
        "torch": str(torch.__version__),  # a class of its own, which no checkpoint may hold
        "device": torch.cuda.get_device_name(device) if on_gpu else f"cpu with {torch.get_num_threads()} threads",
    }
