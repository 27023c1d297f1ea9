"""One episode of a trained agent, and sequences cut out of it."""

import contextlib
import itertools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from agent.agent import Agent
from agent.environment import make_env
from agent.evaluation import play
from agent.view.open_loop import Sequences
from agent.world_model.encoder import Observation


class Episode(NamedTuple):
    """T steps from the start of an episode: everything (T, ...) on the agent's device."""

    observation: Observation
    previous_action: Tensor  # (T, A), as the networks take it
    reward: Tensor  # (T,)
    first: Tensor  # bool (T,)
    z: Tensor  # (T, G, C)


def play_episode(agent: Agent, seed: int, longest: int | None) -> Episode:
    """The first `longest` steps of an episode with the most likely actions, all of it if it is shorter or for None.

    Raises:
        EnvError: the environment cannot be made.
        EnvironmentFailure: it failed.
    """
    observations, rewards, codes, actions = [], [], [], [torch.zeros(1, agent.action.width, device=agent.device)]
    with contextlib.closing(make_env(agent.config)) as env:
        for observation, reward, carry in itertools.islice(play(agent, env, seed), longest):
            # The environment may write its next observation, and a CUDA graph its next result, into the same memory.
            observations.append({key: observation[key].to(agent.device, copy=True) for key in agent.observations})
            rewards.append(reward)
            codes.append(carry.z.clone())
            actions.append(carry.action.clone())
    first = torch.zeros(len(rewards), dtype=torch.bool, device=agent.device)
    first[0] = True
    return Episode(
        {key: torch.cat([step[key] for step in observations]) for key in agent.observations},
        torch.cat(actions[:-1]), torch.tensor(rewards, device=agent.device), first, torch.cat(codes),
    )  # fmt: skip


def play_episodes(agent: Agent, amount: int, seed: int, shortest: int, doing: str) -> Iterator[tuple[int, Episode]]:
    """Episodes of the seeds from `seed` on, each with its own; of `amount` played, those of at least `shortest` steps.

    A bar called `doing` shows how far it is. Raises what `play_episode` does.
    """
    for number in tqdm(range(seed, seed + amount), desc=doing, unit="episode", disable=None):  # for a terminal
        episode = play_episode(agent, number, longest=None)
        if len(episode.reward) >= shortest:
            yield number, episode


@torch.no_grad()
def core_inputs(agent: Agent, episode: Episode) -> Tensor:
    """What the core read at each step, (T, X)."""
    before = torch.cat([torch.zeros_like(episode.z[:1]), episode.z[:-1]])
    rssm = agent.learner.frozen_world_model.module.rssm
    return rssm.core_input(before, episode.previous_action, episode.first, agent.dtype)


@torch.no_grad()
def cut(agent: Agent, episode: Episode, starts: Sequence[int], length: int) -> Sequences:
    """The sequences (B, length, ...) from these steps on, each with what the memory held before."""
    rssm = agent.learner.frozen_world_model.module.rssm
    state, _ = rssm.initial(1)
    x, first = core_inputs(agent, episode).unsqueeze(0), episode.first.unsqueeze(0)
    later = [start for start in starts if start > 0]
    states = [state] * (len(starts) - len(later))  # of sequences from the very start, which come first
    if later:
        _, kept = rssm.core.sequence(x[:, : later[-1]], state, first[:, : later[-1]], keep=[at - 1 for at in later])
        states += [{key: value[:, place] for key, value in kept.items()} for place in range(len(later))]

    def stacked(whole: Tensor) -> Tensor:
        return torch.stack([whole[start : start + length] for start in starts])

    return Sequences(
        {key: stacked(value) for key, value in episode.observation.items()},
        stacked(episode.previous_action), stacked(episode.reward), stacked(episode.first),
        {key: torch.cat([one[key] for one in states]) for key in state},
        torch.stack([episode.z[max(start - 1, 0)] for start in starts]),
    )  # fmt: skip


def spread(steps: int, length: int, amount: int) -> list[int]:
    """Where at most `amount` different sequences of `length` steps start, from the first step to the last place."""
    places = [round(place * (steps - length) / max(1, amount - 1)) for place in range(amount)]
    return sorted(set(places))
