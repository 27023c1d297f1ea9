"""A small core with a large memory, for tests: fast weights that fade, parallel in time, with a second read."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from pydantic import ConfigDict, PositiveInt
from pydantic.dataclasses import dataclass
from torch import Tensor

from agent import config as configuration
from agent.cores import RecurrentCore, State
from agent.cores.core import CORES, clear, take
from agent.networks import Linear
from agent.schema import Config

FADE = 0.8
RELEASE = 3
"""Updates after which a schedule doubles what the core answers."""


@dataclass(frozen=True, config=ConfigDict(extra="forbid", strict=True))
class OuterProductConfig:
    width: PositiveInt


class OuterProduct(RecurrentCore):
    """M_t = FADE M_{t-1} + k_t v_t' with h_t = M_t' q_t, times `gain`; twice that once `doubled`."""

    Config = OuterProductConfig
    parallel_in_time = True
    gain: Tensor
    doubled: Tensor

    def __init__(self, input_size: int, config: OuterProductConfig):
        super().__init__()
        self.width = self.feature_size = self.read_size = self.query_size = config.width
        self.project = Linear(input_size, 3 * config.width)
        self.register_buffer("gain", torch.ones(()))
        self.register_buffer("doubled", torch.tensor(False))
        self.factor = 1
        self.register_load_state_dict_post_hook(lambda core, _: core.choose_path())

    def choose_path(self) -> None:
        self.factor = 2 if self.doubled else 1

    def initial(self, batch: int) -> State:
        return {"M": torch.zeros(batch, self.width, self.width, device=self.project.weight.device)}

    def answer(self, query: Tensor, memory: Tensor) -> Tensor:
        return self.factor * self.gain * (query.unsqueeze(-2) @ memory.to(query.dtype)).squeeze(-2)

    def step(self, x: Tensor, state: State, first: Tensor) -> tuple[Tensor, State]:
        q, k, v = self.project(x).chunk(3, -1)
        memory = FADE * clear(state, first)["M"] + k.unsqueeze(-1) * v.unsqueeze(-2)
        return self.answer(q, memory), {"M": memory}

    def sequence(
        self, x: Tensor, state: State, first: Tensor, keep: Sequence[int] | None = None
    ) -> tuple[Tensor, State]:
        steps = x.shape[1]
        q, k, v = self.project(x).chunk(3, -1)
        writes = k.unsqueeze(-1) * v.unsqueeze(-2)  # (B, S, K, V)
        age = torch.arange(steps, device=x.device)[:, None] - torch.arange(steps, device=x.device)  # (T, S)
        life = first.cumsum(1)
        seen = (age >= 0) & (life.unsqueeze(2) == life.unsqueeze(1))  # (B, T, S)
        faded = FADE ** age.clamp(min=0).to(state["M"].dtype)[..., None, None] * writes.unsqueeze(1)
        memory = torch.where(seen[..., None, None], faded, 0.0).sum(2)  # (B, T, K, V)
        fades = FADE ** (1 + torch.arange(steps, device=x.device)).to(state["M"].dtype)
        before = fades[:, None, None] * state["M"].unsqueeze(1)  # (B, T, K, V)
        memory = memory + torch.where((life == 0)[..., None, None], before, 0.0)
        return self.answer(q, memory), {"M": memory[:, -1] if keep is None else take(memory, 1, keep)}

    def read(self, query: Tensor, state: State) -> Tensor:
        return self.answer(query, state["M"])

    def diagnostics(self, state: State) -> dict[str, Tensor]:
        return {"norm": state["M"].norm(dim=(1, 2)).mean()}

    def schedule(self, updates: int, metrics: Mapping[str, float]) -> bool:
        self.gain.fill_(1 + updates / 8)
        release = not self.doubled and updates >= RELEASE and metrics["core/norm"] > 0
        if release:
            self.doubled.fill_(True)
            self.choose_path()
        return release


def with_outer_product(config: Config, monkeypatch: pytest.MonkeyPatch) -> Config:
    """The configuration with this core, which is known while the test runs."""
    monkeypatch.setitem(CORES, "outer_product", OuterProduct)
    section: Any = configuration._core_section("outer_product")
    return dataclasses.replace(config, core=section(name="outer_product", width=8))
