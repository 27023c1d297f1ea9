"""Regions of the update as compiled functions, and where what was compiled is kept."""

import copyreg
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch

Mode = Literal["eager", "graph", "full"]
"""How the update runs: as it is; as one CUDA graph; with its regions compiled, on a GPU as one graph of these."""
CACHE_VARIABLE = "TORCHINDUCTOR_CACHE_DIR"


def how_updates_begin(wish: Mode | Literal["auto", "ahead"], on_gpu: bool) -> Mode:
    """The mode that `compile` in the configuration stands for; `ahead`: that before all is compiled."""
    if wish == "auto":
        return "full" if on_gpu else "eager"
    if wish == "ahead":
        return "graph" if on_gpu else "eager"
    return wish


def _memory_format(name: str) -> torch.memory_format:
    """The format `torch.<name>`."""
    return getattr(torch, name)


def _reduce(form: torch.memory_format) -> tuple[Callable[[str], torch.memory_format], tuple[str]]:
    return _memory_format, (str(form).removeprefix("torch."),)


# The compiler's cache knows code by a hash of pickled arguments, memory formats among them, and pickle says of those
# which module has them: the first one loaded that imports torch, which is another in each program. Then what one
# process has compiled would be unknown to the next.
copyreg.pickle(torch.memory_format, _reduce)


def compiled(function: Callable[..., Any], device: torch.device) -> Callable[..., Any]:
    """The function as one compiled region, of the shapes that it is first called with, kept for later processes."""
    use_lasting_cache()
    # The update is a chain of thousands of small kernels, and what waits between two of them costs as much as they do:
    # those that do not depend on each other become one.
    options: dict[str, Any] = {"combo_kernels": True} if device.type == "cuda" else {}
    return torch.compile(function, fullgraph=True, dynamic=False, options=options)


def as_it_is(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function uncompiled."""
    return function


def use_lasting_cache() -> None:
    """Let PyTorch keep compiled code in the user's cache folder, unless the environment names another place.

    Its own choice is the folder for temporary files, so that after a restart of the machine, or in the next job of a
    cluster, the first update waits for the compiler again.
    """
    if CACHE_VARIABLE in os.environ:
        return
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dreamer-that-remembers" / "compiled"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:  # no home, or one that cannot be written to: PyTorch's choice is better than none
        return
    if os.access(folder, os.W_OK):
        os.environ[CACHE_VARIABLE] = str(folder)
