"""How a matrix memory is read: plainly, through its orthogonalised matrix or a mix of both, or by least squares.

A Read has the same meaning for one step and for a sequence. This is the one place where the functions that compute
it are chosen.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from pydantic import ConfigDict, Field, NonNegativeFloat, PositiveFloat, PositiveInt, model_validator
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from agent.cores import kernels
from agent.cores.least_squares import (
    least_squares_query,
    least_squares_read,
    least_squares_read_sequence,
    with_keys,
)
from agent.cores.maps import chebyshev_fit, make_map, on_matrices
from agent.cores.memory import (
    Memory,
    matrix_query,
    matrix_read,
    matrix_read_sequence,
    plain_query,
    plain_read,
    polynomial_query,
    polynomial_read,
    write,
)

Share = Annotated[float, Field(ge=0, le=1)]


class Read(nn.Module, ABC):
    """Shapes are those of `agent.cores.memory`."""

    def written_size(self, value: int) -> int:
        """Width of what `written` makes of values of width `value`."""
        return value

    def written(self, k: Tensor, v: Tensor) -> Tensor:
        """What takes the place of v (..., V) wherever k (..., K) is written: `written_size(V)` wide."""
        return v

    @property
    def bears_rounding(self) -> bool:
        """Whether what is read loses little where C is rounded after every step, once imagination begins."""
        return False

    @abstractmethod
    def read(self, q: Tensor, memory: Memory) -> Tensor:
        """Ask a memory (B, H, ...) with q (B, H, K) -> (B, H, V)."""

    @abstractmethod
    def effective_query(self, q: Tensor, memory: Memory) -> Tensor:
        """The x (B, H, K) with which what q (B, H, K) reads from a memory (B, H, ...) is x'C; in fp32, as is q."""

    def step(
        self, q: Tensor, k: Tensor, v: Tensor, log_input: Tensor, log_forget: Tensor, first: Tensor, memory: Memory
    ) -> tuple[Tensor, Memory]:
        """Write, then read: q, k (B, H, K), v (B, H, V), gates (B, H), first (B,) -> y (B, H, V) and the memory."""
        memory = write(k, v, log_input, log_forget, first, memory)
        return self.read(q, memory), memory

    @abstractmethod
    def sequence(
        self, q: Tensor, k: Tensor, v: Tensor, log_input: Tensor, log_forget: Tensor, first: Tensor, memory: Memory
    ) -> tuple[Tensor, Memory]:
        """T steps: q, k (B, H, T, K), v (B, H, T, V), gates (B, H, T), first (B, T) -> y (B, H, T, V), last memory."""

    def schedule(self, updates: int, metrics: Mapping[str, float]) -> bool:
        """Change with training; whether another path through the code is taken from now on."""
        return False


class PlainRead(Read):
    """The mLSTM's own: q'C over its normaliser."""

    bears_rounding = True

    def read(self, q: Tensor, memory: Memory) -> Tensor:  # noqa: D102
        return plain_read(q, memory)

    def effective_query(self, q: Tensor, memory: Memory) -> Tensor:  # noqa: D102
        return plain_query(q, memory)

    def step(  # noqa: D102
        self, q: Tensor, k: Tensor, v: Tensor, log_input: Tensor, log_forget: Tensor, first: Tensor, memory: Memory
    ) -> tuple[Tensor, Memory]:
        return kernels.step(q, k, v, log_input, log_forget, first, memory)

    def sequence(  # noqa: D102
        self, q: Tensor, k: Tensor, v: Tensor, log_input: Tensor, log_forget: Tensor, first: Tensor, memory: Memory
    ) -> tuple[Tensor, Memory]:
        return kernels.plain_read_sequence(q, k, v, log_input, log_forget, first, memory)


@dataclass(frozen=True, config=ConfigDict(extra="forbid", strict=True, allow_inf_nan=False))
class OrthoReadConfig:
    """Keys of `configs/core/ortho_mlstm.yaml` that say how the memory is read."""

    map: Literal["cubic", "pe2", "pe3", "polar"]
    map_steps: PositiveInt
    form: Literal["polynomial", "exact"]
    degree: PositiveInt
    alpha_schedule: Literal["constant", "linear", "release"]
    alpha_start: Share
    alpha_end: Share
    alpha_updates: PositiveInt
    alpha_metric: str
    alpha_side: Literal["above", "below"]
    alpha_bar: float

    @model_validator(mode="after")
    def _fits(self) -> "OrthoReadConfig":
        if self.form == "polynomial" and self.map == "polar":
            raise ValueError("map polar jumps at 0, so no polynomial comes near it; it needs form exact")
        if self.degree % 2 == 0:
            raise ValueError(f"degree ({self.degree}) must be odd")
        return self


class OrthoRead(Read):
    """Query the memory with its singular values mapped towards 1: q' [alpha f(A) + (1 - alpha) A] with A = C / |C|.

    There is no normaliser, since f(A) does not scale with C. The polynomial form has f as an odd polynomial, so that
    alpha is no more than a change of its coefficients; the exact form applies f to every matrix, in training to those
    of all steps. Where alpha is exactly 0 this is the plain read, bit for bit and at its cost.

    Source: A. Tambde, "Matrix Orthogonalization Improves Memory in Recurrent Models" (2026), whose map is five cubic
    Newton-Schulz steps; released as in arXiv 2607.19390.
    """

    alpha: Tensor
    released: Tensor
    coefficients: Tensor

    def __init__(self, config: OrthoReadConfig):
        super().__init__()
        self.config = config
        self.map = make_map(config.map, config.map_steps)
        self.fit = chebyshev_fit(self.map, config.degree) if config.form == "polynomial" else None
        self.register_buffer("alpha", torch.zeros(()))
        self.register_buffer("released", torch.tensor(-1))  # update at which the metric passed the bar; -1: not yet
        terms = 0 if self.fit is None else len(self.fit)
        self.register_buffer("coefficients", torch.zeros(terms), persistent=False)
        self.plain = False  # whether alpha is exactly 0: known on the host, as it decides what is computed
        self._released: int | None = None
        self._set(config.alpha_start)
        self.register_load_state_dict_post_hook(_take_over_loaded)

    def _set(self, alpha: float) -> None:
        # In place, as captured graphs and frozen twins hold on to the buffers.
        self.plain = alpha == 0
        self.alpha.fill_(alpha)
        if self.fit is not None:
            mixed = alpha * self.fit
            mixed[0] += 1 - alpha  # T_0 is A itself
            self.coefficients.copy_(torch.from_numpy(mixed).float())

    def schedule(self, updates: int, metrics: Mapping[str, float]) -> bool:
        """Move alpha to where it should be after this many updates; whether it came to or left exactly 0."""
        config, was_plain = self.config, self.plain
        if config.alpha_schedule == "release" and self._released is None:
            value = metrics.get(config.alpha_metric, float("nan"))
            if value >= config.alpha_bar if config.alpha_side == "above" else value <= config.alpha_bar:
                self._released = updates
                self.released.fill_(updates)
        began = {"constant": None, "linear": 0, "release": self._released}[config.alpha_schedule]
        share = 0.0 if began is None else min(1.0, (updates - began) / config.alpha_updates)
        start, end = config.alpha_start, config.alpha_end
        self._set(end if share == 1 else start + share * (end - start))
        return self.plain != was_plain

    @property
    def bears_rounding(self) -> bool:
        """Only a plain read: the map raises small singular values several times, and rounding with them."""
        return self.plain

    def _mixed(self, A: Tensor) -> Tensor:
        return torch.lerp(A, on_matrices(self.map, A), self.alpha.to(A.dtype))

    def read(self, q: Tensor, memory: Memory) -> Tensor:  # noqa: D102
        if self.plain:
            return plain_read(q, memory)
        if self.fit is None:
            return matrix_read(q, memory, self._mixed)
        return polynomial_read(q, memory, self.coefficients)

    def effective_query(self, q: Tensor, memory: Memory) -> Tensor:  # noqa: D102
        if self.plain:
            return plain_query(q, memory)
        if self.fit is None:
            return matrix_query(q, memory, self._mixed)
        return polynomial_query(q, memory, self.coefficients.to(q.dtype))

    def step(  # noqa: D102
        self, q: Tensor, k: Tensor, v: Tensor, log_input: Tensor, log_forget: Tensor, first: Tensor, memory: Memory
    ) -> tuple[Tensor, Memory]:
        if self.plain:
            return kernels.step(q, k, v, log_input, log_forget, first, memory)
        if self.fit is None:
            return super().step(q, k, v, log_input, log_forget, first, memory)
        return kernels.step(q, k, v, log_input, log_forget, first, memory, self.coefficients)

    def sequence(  # noqa: D102
        self, q: Tensor, k: Tensor, v: Tensor, log_input: Tensor, log_forget: Tensor, first: Tensor, memory: Memory
    ) -> tuple[Tensor, Memory]:
        if self.plain:
            return kernels.plain_read_sequence(q, k, v, log_input, log_forget, first, memory)
        if self.fit is None:
            return matrix_read_sequence(q, k, v, log_input, log_forget, first, memory, self._mixed)
        return kernels.polynomial_read_sequence(q, k, v, log_input, log_forget, first, memory, self.coefficients)


def _take_over_loaded(read: OrthoRead, _: Any) -> None:
    """Bring what the host knows, and the coefficients, in line with buffers that were just loaded."""
    released = int(read.released)
    read._released = None if released < 0 else released
    read._set(float(read.alpha))


@dataclass(frozen=True, config=ConfigDict(extra="forbid", strict=True, allow_inf_nan=False))
class LeastSquaresReadConfig:
    """Keys of `configs/core/mesa.yaml` that say how the memory is read."""

    iterations: PositiveInt
    ridge: PositiveFloat
    ridge_learned: bool
    ridge_floor: NonNegativeFloat

    @model_validator(mode="after")
    def _fits(self) -> "LeastSquaresReadConfig":
        if self.ridge <= self.ridge_floor:
            raise ValueError(f"ridge ({self.ridge:g}) must be above ridge_floor ({self.ridge_floor:g})")
        return self


class LeastSquaresRead(Read):
    """Answer with what ridge regression of the written values on their keys says of q.

    The memory (B, H, K, V + K) is C with the Gram matrix of its keys beside it. A learned ridge is one number for each
    head, shared by all memories that are read: ridge_floor + softplus(free_ridge).
    """

    ridge: Tensor

    def __init__(self, heads: int, config: LeastSquaresReadConfig):
        super().__init__()
        self.config = config
        ridge = torch.full((heads,), config.ridge)
        if config.ridge_learned:
            self.free_ridge = nn.Parameter((ridge - config.ridge_floor).expm1().log())
        else:
            self.register_buffer("ridge", ridge, persistent=False)

    def ridges(self) -> Tensor:
        """The ridge of each head, (H,)."""
        config = self.config
        return config.ridge_floor + F.softplus(self.free_ridge) if config.ridge_learned else self.ridge

    def written_size(self, value: int) -> int:
        """Values as wide as keys, and the keys."""
        return 2 * value

    def written(self, k: Tensor, v: Tensor) -> Tensor:  # noqa: D102
        return with_keys(k, v)

    def read(self, q: Tensor, memory: Memory) -> Tensor:  # noqa: D102
        return least_squares_read(q, memory, self.ridges(), self.config.iterations)

    def effective_query(self, q: Tensor, memory: Memory) -> Tensor:  # noqa: D102
        return least_squares_query(q, memory, self.ridges(), self.config.iterations)

    def sequence(  # noqa: D102
        self, q: Tensor, k: Tensor, v: Tensor, log_input: Tensor, log_forget: Tensor, first: Tensor, memory: Memory
    ) -> tuple[Tensor, Memory]:
        given = (q, k, v, log_input, log_forget, first, memory)
        return least_squares_read_sequence(*given, self.ridges(), self.config.iterations)
