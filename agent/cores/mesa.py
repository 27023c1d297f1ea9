"""The mLSTM whose memory answers by least squares: it keeps the Gram matrix of its keys too, under the same gates."""

from typing import Any, ClassVar, cast

import torch
from pydantic import ConfigDict
from pydantic.dataclasses import dataclass
from torch import Tensor

from agent.cores.core import State, register
from agent.cores.mlstm import MLSTM, MLSTMConfig
from agent.cores.reads import LeastSquaresRead, LeastSquaresReadConfig, Read


@dataclass(frozen=True, config=ConfigDict(extra="forbid", strict=True, allow_inf_nan=False))
class MesaConfig(LeastSquaresReadConfig, MLSTMConfig):
    """Keys of `configs/core/mesa.yaml`."""


@register("mesa")
class Mesa(MLSTM):
    """The mLSTM with a `LeastSquaresRead`.

    In the state, `memory_i` is (B, H, D, 2 D): what was written, and beside it the Gram matrix of the keys.
    """

    Config: ClassVar[type[Any]] = MesaConfig
    reader: LeastSquaresRead

    def make_read(self, config: MLSTMConfig) -> Read:
        """How the memories of all blocks are read."""
        return LeastSquaresRead(config.heads, cast(MesaConfig, config))

    @torch.no_grad()
    def diagnostics(self, state: State) -> dict[str, Tensor]:
        """Those of the mLSTM, the mean ridge, and for each block the effective rank tr(G)^2 / |G|^2 of the keys."""
        numbers = super().diagnostics(state) | {"ridge": self.reader.ridges().mean()}
        for index in range(self.config.blocks):
            G = state[f"memory_{index}"][..., self.config.head_dim :]
            square = G.square().sum((-2, -1)).clamp(min=torch.finfo(G.dtype).tiny)
            trace = G.diagonal(dim1=-2, dim2=-1).sum(-1)
            numbers[f"key_rank_{index}"] = (trace.square() / square).mean()
        return numbers
