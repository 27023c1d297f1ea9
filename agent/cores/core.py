"""The contract of a recurrent core, and the registry that turns one word of config into one."""

import importlib
import pkgutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

State = dict[str, Tensor]
"""A core's memory: a flat dict of fp32 tensors (B, ...)."""


class RecurrentCore(nn.Module, ABC):
    """What carries information through time: input x_t from (z_{t-1}, a_{t-1}), output h_t that everything reads.

    A core never sees an environment and imports nothing of the agent around it. `step` and `sequence` compute
    the same function, to rounding, forward and backward.
    """

    Config: ClassVar[type[Any]]
    """Pydantic dataclass of the keys that `configs/core/<name>.yaml` gives, `name` left out."""

    parallel_in_time: ClassVar[bool]
    """Whether `sequence` works on all steps at once instead of one after another."""

    feature_size: int
    """Width F of the output h."""

    @abstractmethod
    def initial(self, batch: int) -> State:
        """The empty memory of `batch` streams: tensors (B, ...) on the core's device, in fp32."""

    @abstractmethod
    def step(self, x: Tensor, state: State, first: Tensor) -> tuple[Tensor, State]:
        """One step in time.

        Args:
            x: input (B, X).
            state: memory before the step, tensors (B, ...).
            first: bool (B,); where true, the memory is emptied before the step.

        Returns:
            The output h (B, F) and the memory after the step.
        """

    @abstractmethod
    def sequence(
        self, x: Tensor, state: State, first: Tensor, keep: Sequence[int] | None = None
    ) -> tuple[Tensor, State]:
        """T steps in time, equal to T calls of `step`.

        Args:
            x: inputs (B, T, X).
            state: memory before the first step, tensors (B, ...).
            first: bool (B, T); where true, the memory is emptied before that step, in mid-sequence too.
            keep: the K steps whose memory is wanted; None is the memory after the last one.

        Returns:
            The outputs h (B, T, F) and the memory, (B, ...) or with `keep` (B, K, ...).
        """


CORES: dict[str, type[RecurrentCore]] = {}


def register(name: str) -> Callable[[type[RecurrentCore]], type[RecurrentCore]]:
    """Class decorator: the core is chosen by `--core name`."""

    def add(core: type[RecurrentCore]) -> type[RecurrentCore]:
        CORES[name] = core
        return core

    return add


def registered_cores() -> dict[str, type[RecurrentCore]]:
    """All cores by name. Every module of this package is imported, so that a new core is a new file and no more."""
    package = importlib.import_module(__package__)
    for module in pkgutil.iter_modules(package.__path__):
        importlib.import_module(f"{__package__}.{module.name}")
    return CORES


def make_core(name: str, input_size: int, config: Any) -> RecurrentCore:
    """The core called `name` for inputs of width `input_size`; `config` is an instance of its `Config`.

    Raises:
        KeyError: no core has that name.
    """
    core: Callable[[int, Any], RecurrentCore] = registered_cores()[name]
    return core(input_size, config)


def clear(state: State, first: Tensor) -> State:
    """The memory (B, ...) with the streams where `first` (B,) is true emptied.

    `where` and not a product: what is cleared may be infinite, and 0 * inf is NaN.
    """
    return {
        key: torch.where(first.view(-1, *[1] * (value.dim() - 1)), torch.zeros_like(value), value)
        for key, value in state.items()
    }
