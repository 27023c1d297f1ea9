"""An agent that learns from noise: what is needed to time an update, or to compile one ahead of its use."""

from typing import Any

import torch
from gymnasium import spaces

from agent.agent import Agent
from agent.replay import Replay
from agent.schema import Config

WINDOWS = 4
"""Sequences in replay for each environment."""


def rehearsing(
    observations: spaces.Space[Any], action: spaces.Space[Any], config: Config, device: torch.device
) -> tuple[Agent, Replay]:
    """An agent attached to a replay of random sequences, so that `agent.update` works at once; arguments of `Agent`."""
    torch.manual_seed(config.seed)
    agent = Agent(observations, action, config, device)
    rows, latents = agent.row_specs()
    streams, window = config.env.amount, config.train.batch_length + 1
    replay = Replay(
        rows, latents, streams=streams, capacity=WINDOWS * window * streams, window=window,
        device=device, seed=0, online_queue=False, stride=agent.replay_stride,
    )  # fmt: skip
    carry = agent.initial(streams)
    flags = torch.zeros(streams, dtype=torch.bool)
    for _ in range(WINDOWS * window):
        samples = [observations.sample() for _ in range(streams)]
        row = {key: torch.stack([torch.as_tensor(sample[key]) for sample in samples]) for key in samples[0]}
        chosen = torch.stack([torch.as_tensor(action.sample()) for _ in range(streams)])
        row |= {"reward": torch.rand(streams), "is_first": flags, "is_last": flags, "is_terminal": flags}
        replay.add(agent.row(row, chosen, carry))
    agent.attach(replay)
    return agent, replay
