"""How much of a GPU's memory an update will take, foretold before a run starts from two small ones."""

import copy
import dataclasses
import gc
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from gymnasium import spaces

from agent.rehearsal import rehearsing
from agent.schema import Config

FEW = 4
"""Sequences in the smaller of two batches; the other has twice as many."""

Update = Callable[[], None]


class Footprint(NamedTuple):
    """What an update takes at its peak, in bytes: an affine function of its number of sequences."""

    fixed: int  # weights, their twins, gradients, optimizer, and what libraries keep to work with
    sequence: int  # what one sequence adds: its activations, and those of what is imagined from it

    def of(self, batch: int) -> int:
        """Bytes at the peak of an update from `batch` sequences."""
        return self.fixed + batch * self.sequence


def foretell(
    observations: spaces.Space[Any],
    action: spaces.Space[Any],
    config: Config,
    device: torch.device,
    peak: Callable[[Update], int],
) -> Footprint:
    """Measure uncompiled updates of `FEW` sequences of noise and of twice as many, of an agent that is then dropped.

    An uncompiled update, and the graph that captures it, takes more than a compiled one; it is what a run begins with.
    What was drawn from torch's generators is undone, so that a run is the same with this and without.

    Args:
        observations: as of `Agent`.
        action: as of `Agent`.
        config: the resolved configuration.
        device: where the run will be.
        peak: calls an update and tells the most bytes that were allocated at once meanwhile, earlier ones included.
    """
    config = dataclasses.replace(config, compile="eager")
    generators = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=generators):
        few, twice = (_peak(observations, action, config, device, batch, peak) for batch in (FEW, 2 * FEW))
    return Footprint(few - (twice - few), (twice - few) // FEW)


def _peak(
    observations: spaces.Space[Any], action: spaces.Space[Any], config: Config, device: torch.device, batch: int,
    peak: Callable[[Update], int],
) -> int:  # fmt: skip
    """Bytes at the peak of an update of so many sequences, without replay."""
    # Spaces draw noise as well, and an environment may own them.
    agent, replay = rehearsing(copy.deepcopy(observations), copy.deepcopy(action), config, device)
    agent.update(replay.sample(batch))  # libraries set themselves up, and the agent what it keeps
    found = peak(lambda: agent.update(replay.sample(batch))) - replay.nbytes
    del agent, replay
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return found


def peak_on_gpu(update: Update) -> int:
    """Bytes that torch's allocator had given out at the peak of `update`, on the current GPU."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    update()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated()
