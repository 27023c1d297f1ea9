"""The update in compiled regions: what it computes, and that it compiles once.

Regions are traced, differentiated and decomposed as for the GPU, and then run operation by operation: writing and
building their kernels would take minutes on a CPU.
"""

import logging
from collections.abc import Callable
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from torch._dynamo.utils import counters

from agent.agent import Agent
from agent.replay import Replay

Make = Callable[..., Any]

CONTINUOUS, DISCRETE = gymnasium.spaces.Box(-1, 1, (2,), np.float32), gymnasium.spaces.Discrete(3)
# Weights stay where they are: LaProp makes steps of equal size of gradients that are 0 but for rounding.
SMALL = ["optimizer.warmup=0", "optimizer.lr=1e-30", "behavior.imagination_horizon=2", "train.batch_length=4"]
IMAGE = {"image": gymnasium.spaces.Box(0, 255, (16, 16, 3), np.uint8)}
CASES = [
    pytest.param("gru", CONTINUOUS, "behavior.gradient=dynamics", id="through the model"),
    pytest.param("mlstm", DISCRETE, "rssm.posterior=observation", id="parallel core"),
    pytest.param("gru", CONTINUOUS, "rssm.posterior=recurrent", id="recurrent", marks=pytest.mark.slow),
    pytest.param("gru", DISCRETE, "rssm.posterior=observation", id="observation", marks=pytest.mark.slow),
    pytest.param("mlstm", CONTINUOUS, "rssm.posterior=recurrent", id="large state", marks=pytest.mark.slow),
    pytest.param("gru", DISCRETE, "observation.encode=image", id="images", marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("core", "action", "setting"), CASES)
def test_compiled_regions_equal_eager_ones_and_are_compiled_once(
    make_agent: Make,
    make_replay: Make,
    traced_regions: None,
    caplog: pytest.LogCaptureFixture,
    core: str,
    action: gymnasium.Space[Any],
    setting: str,
) -> None:
    caplog.set_level(logging.CRITICAL, "torch.__trace")  # kept for pytest, it would double the time
    counters.clear()
    graphs, results, replay_contents = [], {}, {}
    for mode in ("full", "eager"):
        seen = IMAGE if setting == "observation.encode=image" else None
        agent: Agent = make_agent(action, [*SMALL, setting, f"compile={mode}"], core=core, observations=seen)
        distance = (torch.arange(agent.config.heads.bins) - agent.config.heads.bins // 2).abs()
        for head in (agent.behavior.critic, agent.world_model.reward):  # far bins reach 4.85e8, and rounding with them
            torch.nn.init.normal_(head.output.weight, std=0.1)
            head.output.bias.data.copy_(-0.5 * distance)
        replay: Replay = make_replay(agent)
        agent.attach(replay)
        torch.manual_seed(1)
        for _ in range(3):
            agent.update(replay.sample(4))
            graphs.append(counters["stats"]["unique_graphs"])
        squares = [square.sqrt() for square in agent.learner.optimizer.square]
        results[mode] = agent.take_metrics(), squares
        everything = torch.cartesian_prod(torch.arange(replay.streams), torch.arange(0, 32, 4)).T
        replay_contents[mode] = replay.gather(everything)[1]
    assert graphs[0] == graphs[-1] >= 5
    assert not counters["graph_break"]

    (metrics, squares), (expected, expected_squares) = results["full"], results["eager"]
    assert metrics == pytest.approx(expected, rel=1e-3, abs=1e-5)
    for ours, theirs in zip(squares, expected_squares, strict=True):
        assert 0 < theirs.norm() < np.inf
        assert (ours - theirs).norm() <= 1e-3 * theirs.norm()
    for key, stored in replay_contents["full"].items():
        torch.testing.assert_close(stored, replay_contents["eager"][key], rtol=1e-4, atol=1e-5)
