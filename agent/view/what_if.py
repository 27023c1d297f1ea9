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

from agent.agent import Agent
from agent.environment import make_env
from agent.errors import UserError
from agent.view.episode import Episode, cut, play_episodes, spread
from agent.view.open_loop import Sequences, roll_out
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
    with contextlib.closing(make_env(agent.config)) as env:
        for number, episode in play_episodes(agent, episodes, seed, horizon + 1, "what if"):
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
    model, generator = agent.learner.frozen_world_model.module, torch.Generator().manual_seed(seed)
    states, horizon = plans.shape[0], plans.shape[2]
    copies = PLANS * SAMPLES

    def each(x: Tensor) -> Tensor:
        return x.repeat_interleave(copies, 0)

    def noise(amount: int) -> Tensor:
        return torch.rand(amount, model.rssm.groups, generator=generator)

    seen = Sequences(
        {key: each(value) for key, value in given.observation.items()},
        each(given.previous_action), each(given.reward), each(given.first),
        {key: each(value) for key, value in given.state.items()}, each(given.z),
    )  # fmt: skip
    actions = plans.flatten(0, 1).repeat_interleave(SAMPLES, 0)  # (S * P * M, H, A)
    # All predictions from a state begin with the same sample of it.
    uniform = torch.stack([each(noise(states)), *(noise(states * copies) for _ in range(horizon))]).to(agent.device)
    feature = roll_out(agent, seen, actions, uniform)[:, 1:]  # (S * P * M, H, F)
    live = (model.continuation.probability(feature) / model.discount).clamp(max=1).cumprod(1)
    before = torch.cat([torch.ones_like(live[:, :1]), live[:, :-1]], 1)
    rewards = before * model.reward.mean(model.reward(feature))
    return rewards.view(states, PLANS, SAMPLES, horizon).float().cpu()


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
