"""What the world model predicts when it observes the first steps of a sequence and not the others."""

from typing import NamedTuple

import torch
from torch import Tensor

from agent.agent import Agent
from agent.cores import State
from agent.distributions import symexp
from agent.spaces import Image, Vector
from agent.world_model.encoder import Observation
from agent.world_model.rssm import RSSM


class Sequences(NamedTuple):
    """T steps of B sequences, (B, T, ...), and where the model was before them, (B, ...)."""

    observation: Observation
    previous_action: Tensor  # (B, T, A), as the networks take it
    reward: Tensor  # (B, T)
    first: Tensor  # bool (B, T)
    state: State
    z: Tensor  # (B, G, C)


class Predicted(NamedTuple):
    """What was and what the model says, (B, T, ...) on the CPU: reals and choices in their units, images in 0 to 1."""

    truth: Observation
    model: Observation
    reward: Tensor  # (B, T)
    model_reward: Tensor  # (B, T)
    valid: Tensor  # bool (B, T): whether the step still belongs to the predicted episode
    context: int  # steps that were observed

    @property
    def images(self) -> list[str]:
        """The keys of images."""
        return [key for key, value in self.truth.items() if value.dim() == 5]


@torch.no_grad()
def predict(agent: Agent, given: Sequences, context: int, generator: torch.Generator, act: bool = False) -> Predicted:
    """Observe `context` steps, then predict the others without looking.

    Args:
        agent: whose model predicts. No random number of its process is drawn.
        given: the sequences. An episode that begins among the observed steps is told to the model; of one that begins
            later it cannot know, and from there on the sequence is not `valid`.
        context: how many steps are observed, at least 1.
        generator: of the model's samples, on the CPU.
        act: let the policy choose the actions that are not observed, its most likely ones, instead of those that
            were taken.
    """
    model = agent.learner.frozen_world_model.module
    amount, steps = given.first.shape
    seen = given._replace(
        observation={key: value[:, :context] for key, value in given.observation.items()},
        previous_action=given.previous_action[:, :context],
        reward=given.reward[:, :context],
        first=given.first[:, :context],
    )
    noise = torch.rand(steps, amount, model.rssm.groups, generator=generator).to(agent.device)
    feature = roll_out(agent, seen, given.previous_action[:, context:], noise, act)
    decoded = {key: _in_units(agent, key, value) for key, value in model.decoder(feature).items()}
    began = given.first.cpu()
    over = torch.cat([torch.zeros_like(began[:, :context]), began[:, context:]], 1).cumsum(1) > 0
    return Predicted(
        {key: _shown(agent, key, given.observation[key]) for key in decoded},
        {key: value.cpu() for key, value in decoded.items()},
        given.reward.cpu(), model.reward.mean(model.reward(feature)).float().cpu(), ~over, context,
    )  # fmt: skip


@torch.no_grad()
def roll_out(agent: Agent, seen: Sequences, actions: Tensor, noise: Tensor, act: bool = False) -> Tensor:
    """Features (B, T + H, F) of T steps that are observed and of H more that are not.

    Args:
        agent: whose model it is.
        seen: the observed steps, at least one.
        actions: that lead to the others (B, H, A).
        noise: of the model's samples, in [0, 1) (T + H, B, G).
        act: let the policy choose the actions instead, its most likely ones.
    """
    model = agent.learner.frozen_world_model.module
    rssm: RSSM = model.rssm
    token, context = model.encoder(seen.observation, agent.dtype), seen.first.shape[1]
    state, z = seen.state, seen.z
    features: list[Tensor] = []
    for t, uniform in enumerate(noise):
        if t < context:
            action = seen.previous_action[:, t]
            latent, _ = rssm.observe_step(state, z, action, seen.first[:, t], token[:, t], uniform)
        else:
            action = agent.learner.frozen_actor.module(features[-1]).mode() if act else actions[:, t - context]
            latent = rssm.imagine_step(state, z, action, uniform, agent.dtype)
        state, z = latent.state, latent.z
        features.append(rssm.feature(latent, agent.dtype))
    return torch.stack(features, 1)


def _in_units(agent: Agent, key: str, decoded: Tensor) -> Tensor:
    """What the decoder gives (..., width) or (..., H, W, C), as the environment would give it, images in (0, 1)."""
    space = agent.observations[key]
    if isinstance(space, Image):
        return decoded
    return symexp(decoded) if isinstance(space, Vector) else space.decode(decoded)


def _shown(agent: Agent, key: str, value: Tensor) -> Tensor:
    """An entry of an observation (B, T, ...) on the CPU, images in [0, 1]."""
    return (value.float() / 255 if isinstance(agent.observations[key], Image) else value).cpu()
