"""What other actions would have brought, played and predicted."""

import dataclasses
import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from chase import LENGTH
from test_foresight import with_opinions
from test_resume import NEVER, small_config

import agent as api
from agent.agent import Agent
from agent.errors import UserError
from agent.spaces import action_from_gymnasium
from agent.training import train
from agent.view import what_if as module
from agent.view.episode import Episode, cut, play_episode
from agent.view.what_if import _compared, _played, _predicted, _vary, what_if
from envs.actions import Hybrid

SCRIPT = Path(__file__).parents[2] / "scripts" / "evaluate_agent.py"


def taken_from(episode: Episode, places: list[int], horizon: int) -> torch.Tensor:
    """The actions after each of these places (S, H, A)."""
    return torch.stack([episode.previous_action[place + 1 : place + 1 + horizon] for place in places])


@pytest.mark.parametrize("task", ["chase", "pendulum"])
def test_plans_are_the_actions_taken_but_for_some_random_ones(task: str) -> None:
    horizon, places = 8, [0, 3, 11]
    if task == "chase":
        agent = with_opinions("gru", horizon)
    else:
        config = api.resolve("gym_Pendulum-v1", size="debug", settings=["behavior.imagination_horizon=8"])
        env = api.make_env(config)
        agent = Agent(env.observation_space, env.action_space, config, torch.device("cpu"))
    episode, env = play_episode(agent, 5, 30), api.make_env(agent.config)
    plans = _vary(agent, episode, places, env, seed=5)
    taken = taken_from(episode, places, horizon).unsqueeze(1)
    assert plans.shape == (len(places), module.PLANS, horizon, agent.action.width)
    other = (plans != taken).any(-1).float()
    # A random choice may be the one that was taken; 192 actions, five standard deviations.
    share = module.CHANCE * (1 if task == "pendulum" else 2 / 3)
    assert abs(other.mean() - share) < 5 * (share * (1 - share) / other.numel()) ** 0.5
    assert len(plans.flatten(0, 1).flatten(1).unique(dim=0)) > len(places)  # plans differ from one another
    for action in agent.action.decode(plans).flatten(0, 2).numpy():
        assert env.action_space.contains(action)
    assert torch.equal(plans, _vary(agent, episode, places, env, seed=5))


@pytest.mark.parametrize(
    "space", [gymnasium.spaces.MultiDiscrete([3, 4]), Hybrid(2, (3, 2))], ids=["several", "hybrid"]
)
def test_plans_are_actions_of_every_kind(space: gymnasium.Space[Any]) -> None:
    agent, env = with_opinions("gru", 4), api.make_env(small_config(40, NEVER))
    agent.action, env.action_space = action_from_gymnasium(space), space
    episode = play_episode(with_opinions("gru", 4), 5, 20)
    actions = torch.as_tensor(np.stack([space.sample() for _ in range(20)]))
    episode = episode._replace(previous_action=agent.action.encode(actions))
    plans = _vary(agent, episode, [0, 9], env, seed=5)
    taken = taken_from(episode, [0, 9], 4).unsqueeze(1)
    assert (plans != taken).any() and (plans == taken).all(-1).float().mean() > 0.5
    for action in agent.action.decode(plans).flatten(0, 2).numpy():
        assert space.contains(action)


def test_what_was_done_brings_again_what_it_brought_and_nothing_after_the_end() -> None:
    agent = with_opinions("gru", 4)
    episode, env = play_episode(agent, 5, None), api.make_env(agent.config)
    places = [0, 7, LENGTH - 2]
    taken = torch.cat([episode.previous_action, torch.eye(3)[[0, 0, 0, 0]]])
    plans = torch.stack([taken[place + 1 : place + 5] for place in places]).unsqueeze(1)
    came = _played(agent, episode, places, plans.expand(-1, module.PLANS, -1, -1), env, seed=5)
    rewards = torch.cat([episode.reward, torch.zeros(4)])
    expected = torch.stack([rewards[place + 1 : place + 5] for place in places])
    torch.testing.assert_close(came, expected.unsqueeze(1).expand(-1, module.PLANS, -1))
    assert expected.any()


def test_other_actions_bring_what_the_environment_says() -> None:
    """Of the small environment by its rules: a step left, none or right, and a reward where the target is."""
    agent = with_opinions("gru", 4)
    episode, env = play_episode(agent, 5, None), api.make_env(agent.config)
    plans = torch.eye(3)[torch.randint(3, (1, module.PLANS, 4), generator=torch.Generator().manual_seed(0))]
    came = _played(agent, episode, [6], plans, env, seed=5)
    for plan in range(module.PLANS):
        env.reset(seed=5)
        for action in episode.previous_action[1:7]:
            env.step(int(action.argmax()))
        rewards = [float(env.step(int(action.argmax()))[1]) for action in plans[0, plan]]
        assert came[0, plan].tolist() == rewards
    assert len(came.sum(-1).unique()) > 1


@pytest.mark.parametrize("core", ["gru", "ortho_mlstm"])
def test_predictions_are_those_of_the_model_by_hand(core: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PLANS", 2)
    monkeypatch.setattr(module, "SAMPLES", 1)
    agent = with_opinions(core, 3)
    episode, places = play_episode(agent, 5, None), [4]
    plans = torch.eye(3)[torch.tensor([[[0, 1, 2], [2, 2, 0]]])]
    found = _predicted(agent, cut(agent, episode, places, 1), plans, seed=9)
    model = agent.learner.frozen_world_model.module
    generator = torch.Generator().manual_seed(9)
    noises = [torch.rand(rows, model.rssm.groups, generator=generator) for rows in (1, 2, 2, 2)]
    given = cut(agent, episode, places, 1)
    with torch.no_grad():
        token = model.encoder(given.observation, torch.float32)
        for plan in range(2):
            latent, _ = model.rssm.observe_step(
                given.state, given.z, given.previous_action[:, 0], given.first[:, 0], token[:, 0], noises[0]
            )
            live = 1.0
            for step in range(3):
                noise = noises[step + 1][plan : plan + 1]
                latent = model.rssm.imagine_step(
                    latent.state, latent.z, plans[0, plan, step][None], noise, torch.float32
                )
                feature = model.rssm.feature(latent, torch.float32)
                reward = live * model.reward.mean(model.reward(feature)).item()
                assert found[0, plan, 0, step].item() == pytest.approx(reward, abs=1e-5)
                live *= min(1.0, model.continuation.probability(feature).item() / model.discount)
    assert live < 0.999 and found.abs().min() > 1e-3


def test_numbers_are_those_of_numpy() -> None:
    generator = torch.Generator().manual_seed(0)
    came = torch.randn(5, 4, 3, generator=generator) + 10 * torch.randn(5, 1, 3, generator=generator)
    predicted = came.unsqueeze(2) + torch.randn(5, 4, 6, 3, generator=generator) + 7
    found = _compared(came, predicted, [0, 2])
    for place, step in enumerate((0, 2)):
        true, said = came[..., step].numpy(), predicted[..., step].numpy()
        expected = said.mean(2)
        true, less = true - true.mean(1, keepdims=True), expected - expected.mean(1, keepdims=True)
        assert found["correlation"][place] == pytest.approx(np.corrcoef(true.ravel(), less.ravel())[0, 1], abs=1e-5)
        assert found["came"][place] == pytest.approx(true.std(), rel=1e-5)
        assert found["predicted"][place] == pytest.approx(less.std(), rel=1e-5)
        assert found["sampled"][place] == pytest.approx((said - expected[..., None]).std(), rel=1e-5)
    assert _compared(torch.zeros(2, 3, 1), torch.zeros(2, 3, 4, 1), [0])["correlation"] == [0.0]


class Restless(gymnasium.RewardWrapper):
    """Rewards that no seed brings back."""

    steps = itertools.count()

    def reward(self, reward: Any) -> float:
        """Another one at each call."""
        return float(reward) + next(self.steps)


class Brief(gymnasium.Wrapper):
    """Ends after its third step."""

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        """As the environment, but for its end."""
        self.taken += 1
        observation, reward, _, _, info = self.env.step(action)
        return observation, reward, self.taken == 3, False, info

    def reset(self, **given: Any) -> tuple[Any, dict[str, Any]]:
        """As the environment."""
        self.taken = 0
        return self.env.reset(**given)


@pytest.mark.parametrize("wrapper", [Restless, Brief])
def test_an_environment_that_does_not_repeat_itself_is_refused(
    wrapper: type[gymnasium.Wrapper], monkeypatch: pytest.MonkeyPatch
) -> None:
    agent = with_opinions("gru", 4)
    monkeypatch.setattr(module, "make_env", lambda config: wrapper(api.make_env(config)))
    with pytest.raises(UserError, match="does not repeat itself"):
        what_if(agent, episodes=1)


def test_episodes_that_are_too_short_say_nothing() -> None:
    agent = with_opinions("gru", 4)
    agent.config = dataclasses.replace(agent.config, env=dataclasses.replace(agent.config.env, time_limit=3))
    with pytest.raises(UserError, match="no episode is longer than the 4 steps"):
        what_if(agent, episodes=2)


def test_the_script_tells_it(
    tmp_path: Path, run_script: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    train(small_config(40, NEVER), tmp_path)
    capsys.readouterr()
    assert run_script("--logdir", str(tmp_path), "--episodes", "1", "--what-if", "--device", "cpu") == 0
    told: dict[str, Any] = json.loads(capsys.readouterr().out)["what_if"]
    assert told == what_if(api.load(tmp_path, "cpu"), 1)
    assert told["states"] == module.STATES and told["ahead"] == [1, 2]
