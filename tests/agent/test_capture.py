"""What only a GPU can show: the captured update computes what the eager one does, and its noise goes on."""

from collections.abc import Callable, Iterator

import gymnasium
import numpy as np
import pytest
import torch

from agent.agent import Agent
from agent.capture import EAGER_CALLS
from agent.replay import Replay

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")

FAST = ["optimizer.warmup=0", "optimizer.lr=1e-3"]


Prepare = Callable[..., tuple[Agent, Replay]]


@pytest.fixture
def prepare(make_agent: Callable[..., Agent], make_replay: Callable[..., Replay]) -> Prepare:
    def make(mode: str, *settings: str) -> tuple[Agent, Replay]:
        action = gymnasium.spaces.Box(-1, 1, (2,), np.float32)
        agent = make_agent(action, [f"compile={mode}", *settings], device="cuda")
        replay = make_replay(agent)
        agent.attach(replay)
        return agent, replay

    return make


@pytest.fixture
def _same_bits_every_time(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Sums by atomics differ from run to run, and where a gradient is about 0, LaProp makes a whole step of that."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("_same_bits_every_time")
def test_captured_updates_equal_eager_ones(prepare: Prepare) -> None:
    results = []
    for mode in ("eager", "graph"):
        agent, replay = prepare(mode, *FAST, "precision=fp32")
        torch.manual_seed(7)
        for _ in range(EAGER_CALLS + 4):
            agent.update(replay.sample(4))
        results.append([parameter.detach().clone() for parameter in agent.learner.parameters])
    before = prepare("eager", *FAST)[0].learner.parameters
    for start, eager, captured in zip(before, *results, strict=True):
        assert (eager - captured).norm() <= 1e-3 * (eager - start).norm()
        assert not torch.equal(start, captured) or start.numel() <= 1


def test_captured_noise_differs_from_update_to_update(prepare: Prepare) -> None:
    agent, replay = prepare("graph", "optimizer.lr=1e-30")
    index = replay.sample(4)
    seen = set()
    for _ in range(EAGER_CALLS + 5):
        agent.update(index)
        metrics = agent.take_metrics()  # weights hardly move, so that differences come from the sampled latents
        seen.add((metrics["loss/reconstruction"], metrics["policy_entropy"]))
    assert len(seen) == EAGER_CALLS + 5


def test_captured_acting_samples_anew(prepare: Prepare) -> None:
    agent, _ = prepare("graph")
    observation = {"place": torch.zeros(2, 3), "signal": torch.zeros(2, dtype=torch.int64)}
    actions = []
    for _ in range(EAGER_CALLS + 5):
        action, _ = agent.act(observation, torch.tensor([True, True]), agent.initial(2))
        actions.append(action.clone())
    assert len({tuple(action.flatten().tolist()) for action in actions}) == EAGER_CALLS + 5


@pytest.mark.parametrize("mode", ["eager", "graph", "full"])
def test_a_core_that_takes_another_path_is_captured_anew(
    mode: str, make_agent: Callable[..., Agent], make_replay: Callable[..., Replay]
) -> None:
    action = gymnasium.spaces.Box(-1, 1, (2,), np.float32)
    settings = ["rssm.posterior=observation", "rssm.read_after_observation=true", f"compile={mode}", *FAST]
    agent = make_agent(action, settings, device="cuda", core="outer_product")
    replay = make_replay(agent)
    agent.attach(replay)
    observation, first = (
        {"place": torch.zeros(2, 3), "signal": torch.zeros(2, dtype=torch.int64)},
        torch.zeros(2).bool(),
    )
    carry = agent.initial(2)
    for _ in range(2 * EAGER_CALLS + 4):  # the schedule takes another path at update 3, and says so once
        agent.update(replay.sample(4))
        _, carry = agent.act(observation, first, carry)
        metrics = agent.take_metrics()
        assert all(np.isfinite(list(metrics.values())))
        agent.schedule(metrics)
    assert agent.world_model.rssm.core.factor == agent.learner.frozen_world_model.module.rssm.core.factor == 2
    if mode != "eager":
        assert agent._update.graph is not None and agent._act.graph is not None  # type: ignore[union-attr]
    state, z = {key: torch.ones_like(value) for key, value in agent.initial(2).state.items()}, agent.initial(2).z
    results = [
        rssm.imagine_step(state, z, carry.action, torch.rand(2, rssm.groups, device="cuda"), torch.float32).h
        for rssm in (agent.world_model.rssm, agent.learner.frozen_world_model.module.rssm)
    ]
    assert torch.allclose(*results, rtol=0.1, atol=0.1)


def test_no_host_synchronisation_in_the_steady_state(prepare: Prepare) -> None:
    agent, replay = prepare("graph")
    for _ in range(EAGER_CALLS + 2):
        agent.update(replay.sample(4))
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(5):
            agent.update(replay.sample(4))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert agent.take_metrics()["loss/reconstruction"] > 0


@pytest.mark.parametrize("mode", ["eager", "graph"])
def test_an_agent_on_the_gpu_learns_from_a_replay_on_the_host(
    mode: str, make_agent: Callable[..., Agent], make_replay: Callable[..., Replay]
) -> None:
    action = gymnasium.spaces.Box(-1, 1, (2,), np.float32)
    replay = make_replay(make_agent(action))  # of an agent on the CPU
    agent = make_agent(action, [f"compile={mode}"], device="cuda")
    agent.attach(replay)
    for _ in range(EAGER_CALLS + 2):
        agent.update(replay.sample(4))
    assert agent.take_metrics()["loss/reconstruction"] > 0
