"""What an agent expects beside what comes."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from chase import LENGTH
from test_resume import NEVER, small_config

import agent as api
from agent.agent import Agent
from agent.errors import UserError
from agent.training import train
from agent.view import foresight
from agent.view.episode import play_episode
from agent.view.foresight import foresee, whole_of

SCRIPT = Path(__file__).parents[2] / "scripts" / "evaluate_agent.py"
ROWS = LENGTH + 1  # of an episode, from its first observation to its last


def with_opinions(core: str, horizon: int) -> Agent:
    """An agent of the small environment whose heads are not 0."""
    config = small_config(40, NEVER, f"behavior.imagination_horizon={horizon}", core=core)
    env = api.make_env(config)
    torch.manual_seed(0)
    agent = Agent(env.observation_space, env.action_space, config, torch.device("cpu"))
    for parameter in agent.learner.parameters:
        parameter.data += 0.1 * torch.randn_like(parameter)
    reward = agent.world_model.reward
    reward.output.bias.data -= reward.bins.abs().log1p() * 2  # near 0, and no sums of numbers up to 5e8
    agent.learner.refresh()
    return agent


@pytest.mark.parametrize("core", ["gru", "ortho_mlstm"])
def test_expectations_of_a_whole_episode_are_those_of_the_model_by_hand(core: str) -> None:
    agent = with_opinions(core, LENGTH)  # one start, the first step
    found = foresee(agent, episodes=1, seed=5)
    episode = play_episode(agent, 5, None)
    model = agent.learner.frozen_world_model.module
    noise = torch.rand(ROWS, 1, model.rssm.groups, generator=torch.Generator().manual_seed(5))
    expected: dict[str, list[float]] = {"predicted": [], "imagined": []}
    for name, rewards in expected.items():
        state, z = model.rssm.initial(1)
        with torch.no_grad():
            token = model.encoder({key: value[:1] for key, value in episode.observation.items()}, torch.float32)
            latent, _ = model.rssm.observe_step(
                state, z, episode.previous_action[:1], torch.tensor([True]), token, noise[0]
            )
            for step in range(ROWS):
                feature = model.rssm.feature(latent, torch.float32)
                rewards.append(model.reward.mean(model.reward(feature)).item())
                if step + 1 < ROWS:
                    action = episode.previous_action[step + 1][None]
                    if name == "imagined":
                        action = agent.learner.frozen_actor.module(feature).mode()
                    latent = model.rssm.imagine_step(latent.state, latent.z, action, noise[step + 1], torch.float32)
    assert found["starts"] == 1
    assert found["came"] == episode.reward.tolist()
    for name, rewards in expected.items():
        assert found[name] == pytest.approx(rewards, abs=1e-5)
    assert found["predicted"] != found["imagined"] and max(map(abs, found["predicted"])) > 0.01


@pytest.mark.parametrize("core", ["gru", "ortho_mlstm"])
def test_losses_of_a_whole_episode_are_those_of_its_steps_by_hand(core: str) -> None:
    agent = with_opinions(core, 4)
    agent.config = dataclasses.replace(
        agent.config, train=dataclasses.replace(agent.config.train, batch_length=2 * ROWS)
    )
    found = foresee(agent, episodes=1, seed=5)["losses"]
    episode = play_episode(agent, 5, None)
    model = agent.learner.frozen_world_model.module
    noise = torch.rand(1, ROWS, model.rssm.groups, generator=torch.Generator().manual_seed(5))[0]
    rows: dict[str, list[float]] = {"dynamics": [], "reconstruction": [], "reward": []}
    state, z = model.rssm.initial(1)
    with torch.no_grad():
        for t in range(ROWS):
            now = slice(t, t + 1)
            seen = {key: value[now] for key, value in episode.observation.items()}
            token = model.encoder(seen, torch.float32)
            latent, log_probs = model.rssm.observe_step(
                state, z, episode.previous_action[now], episode.first[now], token, noise[now]
            )
            state, z = latent.state, latent.z
            feature = model.rssm.feature(latent, torch.float32)
            posterior, prior = (
                torch.distributions.Categorical(logits=logits)
                for logits in (log_probs, model.rssm.prior_log_probs(latent.h, torch.float32))
            )
            distance = torch.distributions.kl_divergence(posterior, prior).sum().item()
            rows["dynamics"].append(max(distance, agent.config.loss.free_nats))
            rows["reconstruction"].append(sum(loss.item() for loss in model.decoder.losses(feature, seen).values()))
            rows["reward"].append(model.reward.loss(model.reward(feature), episode.reward[now]).item())
    assert found == pytest.approx({name: sum(values) / ROWS for name, values in rows.items()}, rel=1e-4)


def test_losses_are_taken_on_sequences_as_long_as_those_of_training() -> None:
    agent = with_opinions("gru", 4)
    episode, length = play_episode(agent, 5, None), agent.config.train.batch_length
    whole = whole_of(agent, episode)
    assert whole.reward.shape == (ROWS // length, length) and len(whole.reward) > 1
    assert torch.equal(whole.reward.flatten(), episode.reward[: whole.reward.numel()])
    assert torch.equal(whole.z[1:], episode.z[length - 1 : -1 : length][: len(whole.z) - 1])


def test_all_starts_count_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    agent = with_opinions("gru", 4)
    rewards = [play_episode(agent, seed, None).reward for seed in (7, 8)]
    found = foresee(agent, episodes=2, seed=7)
    windows = torch.cat([one.unfold(0, 5, 1) for one in rewards])
    assert found["starts"] == len(windows) == 2 * (ROWS - 4)
    torch.testing.assert_close(torch.tensor(found["came"]), windows.mean(0))
    monkeypatch.setattr(foresight, "STARTS", 2)
    found = foresee(agent, episodes=1, seed=7)
    torch.testing.assert_close(torch.tensor(found["came"]), (rewards[0][:5] + rewards[0][-5:]) / 2)


def test_episodes_that_are_too_short_say_nothing() -> None:
    agent = with_opinions("gru", 4)
    agent.config = dataclasses.replace(agent.config, env=dataclasses.replace(agent.config.env, time_limit=3))
    with pytest.raises(UserError, match="no episode has the 5 steps"):
        foresee(agent, episodes=2)


def test_the_script_tells_it(
    tmp_path: Path, run_script: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    train(small_config(40, NEVER), tmp_path)
    capsys.readouterr()
    assert run_script("--logdir", str(tmp_path), "--episodes", "2", "--foresight", "--device", "cpu") == 0
    told: dict[str, Any] = json.loads(capsys.readouterr().out)["foresight"]
    assert told == foresee(api.load(tmp_path, "cpu"), 2)
    assert {len(told[name]) for name in ("came", "predicted", "imagined")} == {3}
