"""How much of a GPU's memory a run will take, foretold before it starts from an update or two on noise."""

import copy
import dataclasses
import gc
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from gymnasium import spaces

from agent.rehearsal import rehearsing
from agent.schema import Config

MOST = 32
"""Sequences of the largest batch that is tried; what more of them take follows from this one and one of half of them.

With fewer the peak would lie elsewhere: where gradients of all weights meet the optimizer, which no sequence adds to.
"""
CAPTURE_SHARE, CAPTURE_BYTES = 0.05, 100 * 2**20
"""What capturing adds to the memory of an update that runs as it is: a graph's pool is not as well filled, and each
stream has a workspace for products of its own. Found for five cores, sizes 1m to 400m, batches of 16 to 256 on an H100
(docs/speed.md); without it all were foretold too low, with it none is off by more than 11 %."""

Update = Callable[[], None]


class Peak(NamedTuple):
    """What an update takes of memory when it takes most, weights and optimizer included, in bytes."""

    used: int  # by tensors
    held: int  # by the allocator, which cannot fill all that it holds

    def without(self, amount: int) -> "Peak":
        """Less something of which all is used."""
        return Peak(self.used - amount, self.held - amount)


def foretold_on_gpu(
    observations: spaces.Space[Any], action: spaces.Space[Any], config: Config, device: torch.device, ranks: int = 1
) -> int | None:
    """`foretell` for one of so many ranks, if `device` is a GPU."""
    if device.type != "cuda":
        return None
    train = dataclasses.replace(config.train, batch_size=config.train.batch_size // ranks)
    return foretell(observations, action, dataclasses.replace(config, train=train), device, peak_on_gpu)


def foretell(
    observations: spaces.Space[Any],
    action: spaces.Space[Any],
    config: Config,
    device: torch.device,
    peak: Callable[[Update], Peak],
) -> int:
    """Bytes that the update will take while it runs uncompiled and captured, as a run begins; compiled it takes less.

    Weights, optimizer and activations of an agent that learns from noise and is then dropped are measured. What was
    drawn from torch's generators is undone, so that a run is the same with this and without.

    Args:
        observations: as of `Agent`.
        action: as of `Agent`.
        config: the resolved configuration.
        device: where the run will be.
        peak: calls an update and tells what was taken meanwhile.
    """
    batch = config.train.batch_size
    config = dataclasses.replace(config, compile="eager")

    def measured(few: int) -> Peak:
        try:
            # Spaces draw noise as well, and an environment may own them.
            return _peak(copy.deepcopy(observations), copy.deepcopy(action), config, device, few, peak)
        finally:
            gc.collect()
            if device.type == "cuda":
                torch.cuda.empty_cache()

    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        found = measured(min(batch, MOST))
        used = found.used
        if batch > MOST:
            each = (found.used - measured(MOST // 2).used) / (MOST - MOST // 2)
            used += round(each * (batch - MOST))
    return round(used * (found.held / found.used) * (1 + CAPTURE_SHARE)) + CAPTURE_BYTES


def _peak(
    observations: spaces.Space[Any], action: spaces.Space[Any], config: Config, device: torch.device, batch: int,
    peak: Callable[[Update], Peak],
) -> Peak:  # fmt: skip
    """The peak of an update of `batch` sequences, without replay."""
    agent, replay = rehearsing(observations, action, config, device)
    agent.update(replay.sample(batch))  # libraries set themselves up, and the agent what it keeps
    return peak(lambda: agent.update(replay.sample(batch))).without(replay.nbytes)


def peak_on_gpu(update: Update) -> Peak:
    """What torch's allocator gave out and held at the peak of `update`, on the current GPU."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    update()
    torch.cuda.synchronize()
    return Peak(torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved())
