"""What an update takes of memory is foretold from two small ones."""

import weakref
from collections.abc import Callable
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from agent.footprint import FEW, Footprint, foretell
from agent.rehearsal import rehearsing
from agent.schema import Config

SPACES = gymnasium.spaces.Dict({"place": gymnasium.spaces.Box(-1, 1, (3,), np.float32)}), gymnasium.spaces.Discrete(3)
SETTINGS = ["train.batch_length=6", "behavior.imagination_horizon=3", "env.amount=2"]
CPU = torch.device("cpu")


class Counting(TorchDispatchMode):
    """Counts the bytes of the storages that were made inside and are still held, and the most there were at once."""

    def __init__(self) -> None:
        super().__init__()
        self.held: dict[int, int] = {}
        self.most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in self.held:
                    self.held[storage._cdata] = storage.nbytes()
                    weakref.finalize(storage, self.held.pop, storage._cdata, None)
        self.most = max(self.most, sum(self.held.values()))
        return result

    def peak(self, update: Callable[[], None]) -> int:
        """The most bytes held during an update."""
        self.most = 0
        with self:
            update()
        return self.most


@pytest.mark.parametrize("core", ["gru", "mlstm"])
def test_a_large_update_takes_what_two_small_ones_foretold(
    debug_config: Callable[..., Config], monkeypatch: pytest.MonkeyPatch, core: str
) -> None:
    config, counting = debug_config(*SETTINGS, core=core), Counting()

    def counted(*given: Any) -> Any:
        with counting:
            return rehearsing(*given)

    monkeypatch.setattr("agent.footprint.rehearsing", counted)
    before = torch.get_rng_state()
    footprint = foretell(*SPACES, config, CPU, counting.peak)
    assert torch.equal(torch.get_rng_state(), before)
    assert not counting.held
    agent, replay = counted(*SPACES, config, CPU)
    agent.update(replay.sample(24))
    found = counting.peak(lambda: agent.update(replay.sample(24)))
    assert footprint.sequence > 0
    assert footprint.of(24) + replay.nbytes == pytest.approx(found, rel=0.02)


def test_the_peak_is_an_affine_function_of_the_batch(debug_config: Callable[..., Config]) -> None:
    config, peaks = debug_config(*SETTINGS), iter([10_100 + 20 * FEW, 10_100 + 40 * FEW])
    footprint = foretell(*SPACES, config, CPU, lambda update: next(peaks))
    replay = rehearsing(*SPACES, config, CPU)[1]
    assert footprint == (10_100 - replay.nbytes, 20)
    assert Footprint(100, 20).of(3) == 160
