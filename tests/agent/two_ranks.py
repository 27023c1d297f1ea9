"""What each of two processes does for test_distributed.py; results go to the folder it is given.

torchrun --nproc-per-node=2 tests/agent/two_ranks.py FOLDER
"""

import contextlib
import copy
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import gymnasium
import numpy as np
import torch
from test_resume import NEVER, small_config
from torch import Tensor

from agent import config as configuration
from agent import schema
from agent.agent import Agent
from agent.dealing import deal_replay
from agent.distributed import Ranks, meeting
from agent.incidents import Incidents
from agent.replay import Replay
from agent.training import train

CPU = torch.device("cpu")
SPACES = gymnasium.spaces.Dict({"place": gymnasium.spaces.Box(-np.inf, np.inf, (3,), np.float32)})
ACTIONS = {"gru": gymnasium.spaces.Discrete(3), "mlstm": gymnasium.spaces.Box(-1, 1, (2,), np.float32)}
ROWS = 40
WINDOWS = torch.tensor([[0, 0, 1, 1], [0, 24, 8, 16]])  # (2, B): those of rank 0, then those of rank 1
FAULTY = "gym_chase:Faulty-v0"


def settings(core: str) -> schema.Config:
    """The normaliser follows at once, weights move from the first update on, and gradients near 0 are not blown up."""
    values = ["precision=fp32", "compile=eager", "behavior.return_rate=1", "optimizer.warmup=0", "optimizer.lr=1e-3"]
    values += ["optimizer.eps=1e-2"]
    return configuration.resolve("gym_CartPole-v1", core=core, size="debug", device="cpu", settings=values)


def make_agent(core: str, ranks: Ranks) -> Agent:
    """Other weights on each rank until the first one's are spread; then far from those that foresee nothing."""
    torch.manual_seed(1 + ranks.rank)
    agent = Agent(SPACES, ACTIONS[core], settings(core), CPU, ranks)
    random = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in agent.learner.parameters:
            parameter += 0.3 * torch.randn(parameter.shape, generator=random) / max(parameter.shape) ** 0.5
        # Bins of up to 5e8 get next to nothing: a mean of all is a difference of huge numbers, and its rounding, which
        # is another on every processor, would be all that one sees of returns. Rewards are near 20, so that returns
        # differ by more than 1 and are divided.
        for head, centre in (
            (agent.behavior.critic, 0),
            (agent.learner.slow_critic, 0),
            (agent.world_model.reward, 0.15),
        ):
            head.output.bias -= 40 * (torch.linspace(-1, 1, len(head.output.bias)) - centre).square()
    agent.learner.refresh()
    return agent


def make_replay(agent: Agent, streams: int) -> Replay:
    return Replay(
        *agent.row_specs(), streams=streams, capacity=ROWS * streams, window=agent.config.train.batch_length + 1,
        device=CPU, seed=0, online_queue=True, stride=agent.replay_stride,
    )  # fmt: skip


def joint_replay(agent: Agent) -> Replay:
    """Two streams of random rows."""
    replay, random = make_replay(agent, 2), torch.Generator().manual_seed(0)
    rows, latents = agent.row_specs()
    for t in range(ROWS):
        row = {}
        for key, (shape, dtype) in (rows | latents).items():
            value = torch.randn(2, *shape, generator=random)
            row[key] = value if dtype.is_floating_point else (value.abs() % 2).to(dtype)
        row |= {key: torch.tensor([t % 11 == k, t % 13 == k]) for key, k in (("is_first", 0), ("is_last", 10))}
        replay.add(row | {"is_terminal": row["is_last"]})
    return replay


@contextlib.contextmanager
def handed_out(ranks: Ranks) -> Iterator[None]:
    """Every draw of an update is that of the joint batch, of which each rank takes its part."""
    calls = 0

    def part_of(draw: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def drawn(*shape: int, **options: Any) -> Tensor:
            nonlocal calls
            dim = min(calls % 3, 1)  # sequences (B, ...), then imagined ones (H, N, ...) twice
            calls += 1
            whole = [size * ranks.size if place == dim else size for place, size in enumerate(shape)]
            return draw(*whole, **options).chunk(ranks.size, dim)[ranks.rank].contiguous()

        return drawn

    torch.manual_seed(5)
    with mock.patch("torch.rand", part_of(torch.rand)), mock.patch("torch.randn", part_of(torch.randn)):
        yield


def learn(core: str, ranks: Ranks, updates: int = 3) -> tuple[Agent, Replay]:
    """Updates from this rank's part of the joint batch and replay."""
    agent = make_agent(core, ranks)
    replay = joint_replay(agent)
    index = WINDOWS
    if ranks.size > 1:
        own = make_replay(agent, 1)
        own.load_state_dict(deal_replay([replay.state_dict()], range(ranks.rank, ranks.rank + 1), seed=0))
        replay = own
        index = torch.stack([torch.zeros(2, dtype=torch.int64), WINDOWS[1].chunk(2)[ranks.rank]])
    agent.attach(replay)
    with handed_out(ranks):
        for _ in range(updates):
            agent.update(index)
    return agent, replay


def results(agent: Agent, replay: Replay) -> dict[str, Any]:
    metrics = agent.take_metrics()
    return copy.deepcopy({"agent": agent.state_dict(), "latents": replay.state_dict()["tensors"], "metrics": metrics})


def skip(agent: Agent, replay: Replay, folder: Path) -> dict[str, Any]:
    """An update that is not finite on rank 1 alone."""
    agent.take_metrics()
    before = [parameter.detach().clone() for parameter in agent.learner.parameters]
    if agent.ranks.rank == 1:
        replay._rows["reward"][0, 3] = torch.nan
    agent.update(torch.tensor([[0, 0], [0, 16]]))
    same = all(torch.equal(one, other) for one, other in zip(before, agent.learner.parameters, strict=True))
    skipped, in_a_row = agent.take_metrics()["skipped_updates"], int(agent.learner.watch.in_a_row)
    told = Incidents(folder / "not_finite", most=2).look(agent, 7)
    return {"same": same, "skipped": skipped, "in_a_row": in_a_row, "told": told}


def main(folder: Path) -> None:
    rank = os.environ["RANK"]
    found: dict[str, Any] = {}
    with meeting(settings("gru"), CPU) as ranks:
        for core in ACTIONS:
            agent, replay = learn(core, ranks)
            found[core] = results(agent, replay)
        found["skip"] = skip(agent, replay, folder)
    torch.save(found, folder / f"rank{rank}.pt")
    for logdir, lengths in {"whole": [160], "resumed": [90, 160]}.items():
        for steps in lengths:
            train(small_config(steps, NEVER), folder / logdir)
    train(small_config(4000, NEVER, "env.restarts=2", env=FAULTY), folder / "faulty")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
