"""The mLSTM whose memory is orthogonalised when it is read, and only then: what is stored is the plain memory."""

from typing import Any, ClassVar, cast

from pydantic import ConfigDict
from pydantic.dataclasses import dataclass
from torch import Tensor

from agent.cores.core import State, register
from agent.cores.mlstm import MLSTM, MLSTMConfig
from agent.cores.reads import OrthoRead, OrthoReadConfig, Read


@dataclass(frozen=True, config=ConfigDict(extra="forbid", strict=True, allow_inf_nan=False))
class OrthoMLSTMConfig(OrthoReadConfig, MLSTMConfig):
    """Keys of `configs/core/ortho_mlstm.yaml`."""


@register("ortho_mlstm")
class OrthoMLSTM(MLSTM):
    """The mLSTM with an `OrthoRead`."""

    Config: ClassVar[type[Any]] = OrthoMLSTMConfig

    def make_read(self, config: MLSTMConfig) -> Read:
        """How the memories of all blocks are read."""
        return OrthoRead(cast(OrthoMLSTMConfig, config))

    def diagnostics(self, state: State) -> dict[str, Tensor]:
        """Those of the mLSTM, and the share of the orthogonalised read."""
        return super().diagnostics(state) | {"alpha": self.reader.get_buffer("alpha").clone()}
