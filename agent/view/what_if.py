"""Whether the model knows what actions change: many ways to go on from one state, each played and each predicted.

The actor learns from differences: which of its actions brings more, from where it is. A model's losses hardly show
whether it knows them, as a state says most of what comes next, and so does a model that no action impresses. Here all
that a state says is taken off.
"""

import contextlib
from typing import Any

import gymnasium
import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from agent.agent import Agent
from agent.environment import make_env
from agent.errors import UserError
from agent.view.episode import Episode, cut, play_episode, spread
from agent.view.open_loop import Sequences
from envs.errors import failing

STATES = 8
"""States of an episode from which it is asked, at most."""
PLANS = 8
"""Ways to go on from each of them."""
SAMPLES = 16
"""Predictions of each, since the model's are random."""
CHANCE = 0.3
"""Share of the actions of a plan that are random ones; the others are those that were taken."""
SAME = 1e-4
"""Difference of rewards by which an environment is taken not to repeat itself."""


def what_if(agent: Agent, episodes: int = 10, seed: int = 0) -> dict[str, Any]:
    """Play episodes, then go back to states of them and go on otherwise, in the environment and in the model.

    Args:
        agent: as `load` gives it.
        episodes: how many to play, with the most likely actions; those shorter than the imagination horizon say
            nothing. An environment must repeat itself from the same seed: a state is reached once more by the actions
            that led there.
        seed: of the first episode; the others have the seeds after it.

    Returns:
        `states`, how many there were, and lists over `ahead`, a number of steps each: of the sum of rewards over these
        steps `correlation` between what came and what was predicted, both less their means over the plans of a state,
        and their root mean squares, `came` and `predicted`, and `sampled`, by which predictions of one plan differ.
        What is predicted is a mean over samples, rewards counting less the likelier the episode has ended before.

    Raises:
        UserError: no episode is long enough, or the environment does not repeat itself.
        EnvironmentFailure: the environment failed.
    """
    horizon = agent.config.behavior.imagination_horizon
    found: list[tuple[Tensor, Tensor]] = []
    for number in tqdm(range(seed, seed + episodes), desc="what if", unit="episode", disable=None):  # for a terminal
        episode = play_episode(agent, number, longest=None)
        if len(episode.reward) <= horizon:
            continue
        with contextlib.closing(make_env(agent.config)) as env:
            places = spread(len(episode.reward), horizon + 1, STATES)
            plans = _vary(agent, episode, places, env, number)
            came = _played(agent, episode, places, plans, env, number)
        found.append((came, _predicted(agent, cut(agent, episode, places, 1), plans, number)))
    if not found:
        raise UserError(
            f"no episode is longer than the {horizon} steps of an imagined one; there is nothing to compare"
        )
    came, predicted = (torch.cat(parts).cumsum(-1) for parts in zip(*found, strict=True))
    ahead = sorted({1, min(5, horizon), horizon})
    return {"states": len(came), "ahead": ahead, **_compared(came, predicted, [steps - 1 for steps in ahead])}


def _vary(agent: Agent, episode: Episode, places: list[int], env: gymnasium.Env[Any, Any], seed: int) -> Tensor:
    """Plans (S, P, H, A) from S places of an episode, as the networks take them."""
    horizon = agent.config.behavior.imagination_horizon
    taken = torch.stack([episode.previous_action[place + 1 : place + 1 + horizon] for place in places])
    taken = taken.unsqueeze(1).expand(-1, PLANS, -1, -1)  # (S, P, H, A)
    env.action_space.seed(seed)
    samples = np.stack([env.action_space.sample() for _ in range(taken[..., 0].numel())])
    others = agent.action.encode(torch.as_tensor(samples)).to(taken).view(taken.shape)
    changed = torch.rand(taken.shape[:-1], generator=torch.Generator().manual_seed(seed)) < CHANCE
    return torch.where(changed.unsqueeze(-1).to(agent.device), others, taken)


def _played(
    agent: Agent, episode: Episode, places: list[int], plans: Tensor, env: gymnasium.Env[Any, Any], seed: int
) -> Tensor:
    """What the environment gives (S, P, H) for plans (S, P, H, A); 0 after the end of an episode."""
    way = agent.action.decode(episode.previous_action).cpu().numpy()
    decoded = agent.action.decode(plans).cpu().numpy()
    came = torch.zeros(plans.shape[:-1])
    for number, place in enumerate(places):
        before = episode.reward[1 : place + 1].cpu()
        for other in range(PLANS):
            rewards = _rewards(agent, env, seed, [*way[1 : place + 1], *decoded[number, other]])
            if len(rewards) < place or not torch.allclose(rewards[:place], before, rtol=0, atol=SAME):
                raise UserError(
                    f"environment {agent.config.env.name!r} does not repeat itself from the same seed, so no state of "
                    "it can be reached twice"
                )
            after = rewards[place:]
            came[number, other, : len(after)] = after
    return came


def _rewards(agent: Agent, env: gymnasium.Env[Any, Any], seed: int, actions: list[np.ndarray]) -> Tensor:
    """What actions bring from the start of an episode on, up to its end."""
    rewards = []
    with failing(f"environment {agent.config.env.name!r}", "when it was played", name=agent.config.env.name):
        env.reset(seed=seed)
        for action in actions:
            _, reward, terminated, truncated, _ = env.step(action)
            rewards.append(float(reward))
            if terminated or truncated:
                break
    return torch.tensor(rewards)


@torch.no_grad()
def _predicted(agent: Agent, given: Sequences, plans: Tensor, seed: int) -> Tensor:
    """Rewards (S, P, M, H) that the model predicts, M times each, from sequences of one step (S, 1, ...) on."""
    model = agent.learner.frozen_world_model.module
    rssm, generator = model.rssm, torch.Generator().manual_seed(seed)
    states, horizon = plans.shape[0], plans.shape[2]
    copies = PLANS * SAMPLES

    def noise(amount: int) -> Tensor:
        return torch.rand(amount, rssm.groups, generator=generator).to(agent.device)

    token = model.encoder(given.observation, agent.dtype)[:, 0]
    latent, _ = rssm.observe_step(
        given.state, given.z, given.previous_action[:, 0], given.first[:, 0], token, noise(states)
    )
    state = {key: value.repeat_interleave(copies, 0) for key, value in latent.state.items()}
    z = latent.z.repeat_interleave(copies, 0)
    actions = plans.flatten(0, 1).repeat_interleave(SAMPLES, 0)  # (S * P * M, H, A)
    live, rewards = torch.ones(len(z), device=agent.device), []
    for step in range(horizon):
        imagined = rssm.imagine_step(state, z, actions[:, step], noise(len(z)), agent.dtype)
        state, z, feature = imagined.state, imagined.z, rssm.feature(imagined, agent.dtype)
        rewards.append(live * model.reward.mean(model.reward(feature)))
        live = live * (model.continuation.probability(feature) / model.discount).clamp(max=1)
    return torch.stack(rewards, -1).view(states, PLANS, SAMPLES, horizon).float().cpu()


def _compared(came: Tensor, predicted: Tensor, steps: list[int]) -> dict[str, list[float]]:
    """The numbers of `what_if` for sums of rewards that came (S, P, H) and were predicted (S, P, M, H)."""
    expected = predicted.mean(2)
    true, said = (sums - sums.mean(1, keepdim=True) for sums in (came, expected))

    def size(x: Tensor) -> Tensor:
        return x.square().flatten(0, -2).mean(0).sqrt()

    sizes = {"came": size(true), "predicted": size(said), "sampled": size(predicted - expected.unsqueeze(2))}
    tiny = torch.finfo(came.dtype).tiny
    correlation = (true * said).flatten(0, 1).mean(0) / (sizes["came"] * sizes["predicted"]).clamp(min=tiny)
    return {name: values[steps].tolist() for name, values in {"correlation": correlation, **sizes}.items()}
