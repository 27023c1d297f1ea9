"""Whether imagination keeps its promises: the reward that an agent imagines some steps ahead, beside what comes.

The actor learns from imagination alone, so it learns to go where the model is wrong in its favour. Means over replay
need not show that, as much of replay is not where the actor goes by now: so this looks at the agent's own episodes.
"""

from typing import Any

import torch
from torch import Tensor

from agent.agent import Agent
from agent.errors import UserError
from agent.view.episode import Episode, cut, play_episodes, spread
from agent.view.open_loop import Sequences, predict
from agent.world_model.world_model import Batch

STARTS = 64
"""States of an episode from which is imagined, at most."""
LOSSES = ("dynamics", "reconstruction", "reward")


def foresee(agent: Agent, episodes: int = 10, seed: int = 0) -> dict[str, Any]:
    """Play episodes and look ahead from their states, in all of it with the policy's most likely actions.

    Args:
        agent: as `load` gives it.
        episodes: how many to play; those shorter than the imagination horizon say nothing.
        seed: of the first episode; the others have the seeds after it.

    Returns:
        `starts`, from how many states was looked ahead, and mean rewards on arriving at them and 1, 2, ..., H steps
        later, H being the imagination horizon: `came`; `predicted` by the model from the actions that were taken, of
        which a difference is the model's error; `imagined`, where the policy acts on what the model predicts. More
        there than in `predicted` is what the policy makes of the model, and not of the environment. Also `losses`, the
        model's means over these episodes by name: what training logs as `loss/...` of replay, but of episodes that it
        has not learned from.

    Raises:
        UserError: no episode is long enough.
        EnvironmentFailure: the environment failed.
    """
    length = agent.config.behavior.imagination_horizon + 1
    found: dict[str, list[Tensor]] = {"came": [], "predicted": [], "imagined": []}
    lost: list[Tensor] = []
    for number, episode in play_episodes(agent, episodes, seed, length, "foresight"):
        given = cut(agent, episode, spread(len(episode.reward), length, STARTS), length)
        found["came"].append(given.reward.cpu())
        lost.append(losses(agent, whole_of(agent, episode), torch.Generator().manual_seed(number)))
        for name, act in (("predicted", False), ("imagined", True)):
            generator = torch.Generator().manual_seed(number)
            found[name].append(predict(agent, given, 1, generator, act=act).model_reward)
    if not found["came"]:
        raise UserError(f"no episode has the {length} steps of an imagined one; there is nothing to compare")
    rewards = {name: torch.cat(parts) for name, parts in found.items()}  # (starts, 1 + H)
    means = dict(zip(LOSSES, torch.cat(lost).mean(0).tolist(), strict=True))
    return {
        "starts": len(rewards["came"]),
        **{name: values.mean(0).tolist() for name, values in rewards.items()},
        "losses": means,
    }


def whole_of(agent: Agent, episode: Episode) -> Sequences:
    """An episode in sequences as long as those of training, (B, T, ...), without what is left over at its end."""
    steps = len(episode.reward)
    length = min(agent.config.train.batch_length, steps)
    return cut(agent, episode, range(0, steps - length + 1, length), length)


@torch.no_grad()
def losses(agent: Agent, given: Sequences, generator: torch.Generator) -> Tensor:
    """What the world model loses on sequences (B, T, ...) that it infers anew: means over steps, (B, 3) as LOSSES.

    No episode may end in them. `generator`, on the CPU, is that of the posterior's samples.
    """
    model = agent.learner.frozen_world_model.module
    rssm, token = model.rssm, model.encoder(given.observation, agent.dtype)
    noise = torch.rand(*given.first.shape, rssm.groups, generator=generator).to(agent.device)
    posterior = rssm.observe(given.state, given.z, given.previous_action, given.first, token, noise)
    never = torch.zeros_like(given.first)
    batch = Batch(given.observation, given.previous_action, given.reward, given.first, never, never)
    found, _ = model.losses(batch, posterior, rssm.feature(posterior.latent, agent.dtype))
    return torch.stack([found[name].float().mean(1).cpu() for name in LOSSES], 1)
