"""The fast update makes what the plain one makes: losses, gradients, latents and steps."""

from collections.abc import Callable
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from torch import Tensor

from agent.agent import Agent
from agent.plain_update import PlainUpdate

Make = Callable[..., Any]

CONTINUOUS, DISCRETE = gymnasium.spaces.Box(-1, 1, (2,), np.float32), gymnasium.spaces.Discrete(3)
CASES = [
    pytest.param("gru", CONTINUOUS, "rssm.posterior=recurrent", id="gru"),
    pytest.param("gru", DISCRETE, "rssm.posterior=observation", id="gru, observation"),
    pytest.param("mlstm", CONTINUOUS, "rssm.posterior=observation", id="mlstm"),
    pytest.param("mlstm", DISCRETE, "rssm.posterior=recurrent", id="mlstm, recurrent"),
    pytest.param("ortho_mlstm", DISCRETE, "rssm.read_after_observation=true", id="ortho_mlstm, read twice"),
    pytest.param("mlstm", CONTINUOUS, "behavior.imagination_starts=3", id="mlstm, from the last three states"),
    pytest.param("attention", CONTINUOUS, "rssm.posterior=observation", id="attention"),
]


def two_alike(make_agent: Make, core: str, action: gymnasium.Space[Any], *settings: str) -> list[Agent]:
    """Agents of equal weights, whose heads predict something."""
    agents = []
    for _ in range(2):
        agent: Agent = make_agent(action, ["behavior.imagination_horizon=3", *settings], core=core)
        torch.manual_seed(1)
        # Far bins stand for 4.85e8, and an average over all of them would be rounding.
        near = (torch.arange(agent.config.heads.bins) - agent.config.heads.bins // 2).abs() < 20
        for head in (agent.behavior.critic, agent.learner.slow_critic, agent.world_model.reward):
            torch.nn.init.normal_(head.output.weight, std=0.1)
            head.output.bias.data.copy_(torch.where(near, 0.0, -30.0))
        agent.learner.refresh()
        agents.append(agent)
    return agents


@pytest.mark.parametrize(("core", "action", "setting"), CASES)
def test_losses_gradients_and_latents_are_those_of_the_plain_update(
    make_agent: Make,
    make_replay: Make,
    monkeypatch: pytest.MonkeyPatch,
    core: str,
    action: gymnasium.Space[Any],
    setting: str,
) -> None:
    one, other = two_alike(make_agent, core, action, setting)
    rows, context = make_replay(one).gather(make_replay(one).sample(4))
    found: dict[str, list[Tensor]] = {}
    optimize = one.learner._optimize

    def recorded(gradients: list[Tensor], *rest: Any) -> dict[str, Tensor]:
        found["fast"] = [gradient.clone() for gradient in gradients]
        return optimize(gradients, *rest)

    monkeypatch.setattr(one.learner, "_optimize", recorded)
    monkeypatch.setattr(PlainUpdate, "descend", lambda self, gradients: found.update(plain=gradients))
    torch.manual_seed(5)
    latents, metrics = one.learner.learn(rows, context)
    torch.manual_seed(5)
    expected_latents, expected = PlainUpdate(other.learner)(rows, context)
    assert metrics["finite"]
    for name, loss in expected.items():
        torch.testing.assert_close(metrics[f"loss/{name}"], loss, rtol=1e-5, atol=1e-6)
    assert latents.keys() == expected_latents.keys()
    for key, latent in expected_latents.items():
        torch.testing.assert_close(latents[key], latent, rtol=1e-4, atol=1e-5)
    assert len(found["fast"]) == len(found["plain"])
    for fast, plain in zip(found["fast"], found["plain"], strict=True):
        assert plain.norm() > 0
        assert (fast - plain).norm() < 1e-4 * plain.norm() + 1e-7
    for name in ("low", "high"):
        torch.testing.assert_close(getattr(one.learner.normalizer, name), getattr(other.learner.normalizer, name))


def test_steps_of_both_optimizers_are_equal(make_agent: Make) -> None:
    settings = ["optimizer.warmup=3", "optimizer.lr=1e-2", "optimizer.behavior_lr=3e-3"]
    one, other = two_alike(make_agent, "gru", CONTINUOUS, *settings)
    plain, fine = PlainUpdate(other.learner), torch.tensor(True)
    before = [parameter.detach().clone() for parameter in one.learner.parameters]
    for scale in (1e-3, 1.0, 1e2, 1.0):  # the third is clipped
        gradients = [scale * torch.randn_like(parameter) for parameter in one.learner.parameters]
        plain.descend([gradient.clone() for gradient in gradients])
        one.learner._optimize(gradients, fine, one.learner.optimizer.norms(gradients))
    for learner in (one.learner, other.learner):
        assert not any(torch.equal(a, b) for a, b in zip(learner.parameters, before, strict=True))
    mine, theirs = one.learner, other.learner
    for a, b in zip(mine.parameters, theirs.parameters, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    for a, b in zip(mine.slow_critic.parameters(), theirs.slow_critic.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
