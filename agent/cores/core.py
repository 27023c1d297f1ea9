"""The contract of a recurrent core, and the registry that turns one word of config into one."""

import copy
import importlib
import pkgutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import entry_points
from itertools import chain
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

State = dict[str, Tensor]
"""A core's memory: a flat dict of fp32 tensors (B, ...)."""


class Inspection(NamedTuple):
    """A memory over T steps, for a person to look at; what a core cannot tell is None.

    N blocks with H heads each hold memories of their own. The answer to the read of step t is the sum over all writes
    u <= t of a value times its weight.
    """

    weights: Tensor | None = None  # of write u in what step t reads (N, H, T, T), 0 for u > t
    rank: Tensor | None = None  # effective rank of each matrix after each step (N, H, T)
    size: Tensor | None = None  # norm of the whole state after each step (T,)
    change: Tensor | None = None  # norm of its difference from the state before (T,)


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

    read_size: int = 0
    """Width R of what `read` answers; 0 where there is no `read`."""

    query_size: int = 0
    """Width Q of the query that `read` takes."""

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

    def read(self, query: Tensor, state: State) -> Tensor:
        """Ask the memory once more, without changing it; gradients reach both query and memory.

        Query (N, Q), linear in what a network makes of z_t, and the memory after step t (N, ...) -> answer (N, R). The
        core has no parameters of its own for this, since they would go unused where nobody asks.
        """
        raise NotImplementedError(f"{type(self).__name__} has read_size 0")

    def for_imagination(self, state: State, dtype: torch.dtype) -> State:
        """A memory (B, ...) as imagination carries it, without gradients, from many states over a few steps.

        What hardly loses by it may be kept in `dtype`, that of matrix products: to read and write a large memory at
        each step is most of what those steps take. `step` and `read` keep to it, and compute as before.
        """
        return state

    def scale_output_(self, factor: float) -> None:
        """Let h begin this many times as long, where all that is learned later may change it; called before training.

        For cores that end in a norm, whose h is as long as sqrt(F) whatever they hold. Others have no use for it.
        """

    def diagnostics(self, state: State) -> dict[str, Tensor]:
        """Numbers (0-d tensors) for the log on the memory (B, ...) after the last step of a batch.

        Part of every update, so of static shapes and without host synchronisation.
        """
        return {}

    @torch.no_grad()
    def inspect(self, x: Tensor, first: Tensor) -> Inspection:
        """What the memory does over T steps from an empty one: inputs x (T, X), first bool (T,). Not for training.

        This is for a state that does not keep writes apart: its size, and how much each step changes it.
        """
        state, size, change = self.initial(1), [], []
        for now, fresh in zip(x.unsqueeze(1), first.unsqueeze(1), strict=True):
            before = _flat(clear(state, fresh))
            _, state = self.step(now, state, fresh)
            size.append(_flat(state).norm())
            change.append((_flat(state) - before).norm())
        return Inspection(size=torch.stack(size), change=torch.stack(change))

    def schedule(self, updates: int, metrics: Mapping[str, float]) -> bool:
        """Change with training: called whenever metrics are taken, with the number of updates so far.

        What changes lies in buffers and is changed in place, so that checkpoints hold it and both captured graphs and
        the frozen twin of this module see it.

        Returns:
            Whether `step` or `sequence` now take another path through the code, as a mix that leaves 0 does. Then
            the agent makes new twins and captures anew. What chooses the path may be a plain attribute; the core sets
            it again from its buffers when a state dict is loaded.
        """
        return False

    @property
    def state_bytes(self) -> int:
        """Bytes of the memory of one stream."""
        return sum(value.nbytes for value in self.initial(1).values())

    @property
    def state_is_large(self) -> bool:
        """Whether replay keeps the memory at the heads of training sequences only.

        A vector memory is h itself. A memory more than twice as wide is mostly what is behind h, such as matrices of
        d x d for d numbers of h, and would make up nearly all of replay. Measured against h, the answer is the same at
        every size of a core.
        """
        return sum(value.numel() for value in self.initial(1).values()) > 2 * self.feature_size

    def step_flops(self, input_size: int) -> int:
        """Floating-point operations of the matrix products in one `step` of one stream, by torch's counter.

        Counted on the meta device, where nothing is computed and the reference form of every kernel runs. A core whose
        work the counter does not see overrides this.
        """
        tensors = chain(self.parameters(), self.buffers())
        weightless = copy.deepcopy(self, {id(tensor): _on_meta(tensor) for tensor in tensors})
        state = {key: value.to("meta") for key, value in weightless.initial(1).items()}
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            weightless.step(torch.empty(1, input_size, device="meta"), state, torch.empty(1, device="meta").bool())
        return counter.get_total_flops()


def _on_meta(tensor: Tensor) -> Tensor:
    """The shape of a parameter or buffer without its numbers."""
    shape = torch.empty_like(tensor, device="meta")
    return nn.Parameter(shape, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else shape


CORES: dict[str, type[RecurrentCore]] = {}

ENTRY_POINTS = "dreamer_that_remembers.cores"
"""The group of entry points by which other packages add cores: `name = "module:Class"`."""


def register(name: str) -> Callable[[type[RecurrentCore]], type[RecurrentCore]]:
    """Class decorator: the core is chosen by `--core name`."""

    def add(core: type[RecurrentCore]) -> type[RecurrentCore]:
        CORES[name] = core
        return core

    return add


def registered_cores() -> dict[str, type[RecurrentCore]]:
    """The cores of this package and those registered by hand, by name.

    Every module of this package is imported, so that a new core is a new file and no more.
    """
    package = importlib.import_module(__package__)
    for module in pkgutil.iter_modules(package.__path__):
        importlib.import_module(f"{__package__}.{module.name}")
    return CORES


def core_class(name: str) -> type[RecurrentCore]:
    """The core called `name`: a registered one, or that of an installed package, which is only now imported.

    Raises:
        KeyError: no core has that name.
        TypeError: what a package calls a core is none.
    """
    cores = registered_cores()
    if name not in cores:
        for entry in entry_points(group=ENTRY_POINTS, name=name):
            core = entry.load()
            if not (isinstance(core, type) and issubclass(core, RecurrentCore)):
                raise TypeError(f"{entry.value} is no subclass of RecurrentCore")
            register(name)(core)
    return cores[name]


def make_core(name: str, input_size: int, config: Any) -> RecurrentCore:
    """A core, with freshly initialised weights on the CPU.

    Args:
        name: a core of this package, one added by `register`, or one of an installed package.
        input_size: width X of the input x (..., X).
        config: an instance of the core's `Config`, as `agent.resolve(...).core` is.

    Raises:
        KeyError: no core has that name.
    """
    core: Callable[[int, Any], RecurrentCore] = core_class(name)
    return core(input_size, config)


def clear(state: State, first: Tensor) -> State:
    """The memory (B, ...) with the streams where `first` (B,) is true emptied.

    `where` and not a product: what is cleared may be infinite, and 0 * inf is NaN.
    """
    return {
        key: torch.where(first.view(-1, *[1] * (value.dim() - 1)), torch.zeros_like(value), value)
        for key, value in state.items()
    }


def _flat(state: State) -> Tensor:
    """All numbers of a memory."""
    return torch.cat([value.flatten() for value in state.values()])


def take(x: Tensor, dim: int, places: Sequence[int]) -> Tensor:
    """The chosen places of an axis, by views alone: a list of indices would have to be copied from the host."""
    stride = places[1] - places[0] if len(places) > 1 else 1
    if stride > 0 and list(places) == list(range(places[0], places[-1] + 1, stride)):
        return x[(*[slice(None)] * dim, slice(places[0], places[-1] + 1, stride))]
    return torch.stack([x.select(dim, place) for place in places], dim)
