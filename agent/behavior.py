"""The actor and the critic, trained on what the world model imagines and on what really happened.

Time runs t = 0..H: states 0 are inferred from real experience, states 1..H are imagined; action t leads from state t to
state t + 1, and reward t is what arriving at state t gave. Imagination is laid out as (H + 1, N, ...).

Source: Hafner et al., "Mastering diverse control tasks through world models" (Nature, 2025).
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from agent import schema
from agent.distributed import ALONE, Ranks
from agent.distributions import CategoricalPolicy, HybridPolicy, NormalPolicy, Policy
from agent.networks import MLP, Linear
from agent.spaces import Action, Categories, Hybrid, Vector
from agent.world_model.heads import TwoHotHead

ACTOR_OUTPUT_SCALE = 0.01  # first policies are near the middle of the action space


class Actor(nn.Module):
    """Features -> a distribution over actions."""

    def __init__(self, feature_size: int, space: Action, units: int, layers: int):
        super().__init__()
        self.space = space
        self.mlp = MLP(feature_size, units, layers)
        parts = (space.reals, space.choices) if isinstance(space, Hybrid) else (space,)
        widths = [part.width for part in parts for _ in range(2 if isinstance(part, Vector) else 1)]
        self.outputs = nn.ModuleList(Linear(units, width, scale=ACTOR_OUTPUT_SCALE) for width in widths)

    def forward(self, feature: Tensor) -> Policy:
        """Features (..., F) -> a policy over actions (..., A)."""
        hidden = self.mlp(feature)
        outputs = [output(hidden) for output in self.outputs]
        if isinstance(self.space, Categories):
            return CategoricalPolicy.from_output(outputs[0], self.space.sizes)
        if isinstance(self.space, Vector):
            return NormalPolicy.from_output(*outputs)
        mean, std, logits = outputs
        choices = CategoricalPolicy.from_output(logits, self.space.choices.sizes)
        return HybridPolicy(NormalPolicy.from_output(mean, std), choices)


class Behavior(nn.Module):
    """Actor and critic."""

    def __init__(self, feature_size: int, action: Action, config: schema.Config):
        super().__init__()
        heads = config.heads
        self.actor = Actor(feature_size, action, heads.units, heads.actor_layers)
        self.critic = TwoHotHead(feature_size, heads.units, heads.critic_layers, heads.bins)


def lambda_return(reward: Tensor, live: Tensor, bootstrap: Tensor, last: Tensor, return_lambda: float) -> Tensor:
    """Returns that mix all horizons, R_t for t = 0..H-1, from arrays (H + 1, ...) to (H, ...).

        R_H = b_H        R_t = r_{t+1} + live_{t+1} * [(1 - k_{t+1}) * b_{t+1} + k_{t+1} * R_{t+1}]
        k = (1 - last) * lambda

    Args:
        reward: r, received on arriving at each state.
        live: the discount, zero where the state is terminal.
        bootstrap: b, what the critic expects from each state on.
        last: true where an episode ends, so that what follows belongs to another one.
        return_lambda: how much longer horizons count.
    """
    keep = (1 - last.to(reward.dtype)) * return_lambda
    interim = reward + live * (1 - keep) * bootstrap
    decay = live * keep
    interim = torch.cat([interim[1:-1], interim[-1:] + decay[-1:] * bootstrap[-1:]])
    return _suffix_sums(interim, decay[1:])


def _suffix_sums(x: Tensor, decay: Tensor) -> Tensor:
    """The y (H, ...) with y_t = x_t + decay_t * y_{t+1} and y_H = x_H.

    Every round doubles how many terms each sum has, so that there are log2(H) rounds of a few operations, where a loop
    over time has H.
    """
    reach = 1
    while reach < x.shape[0]:
        x = torch.cat([x[:-reach] + decay[:-reach] * x[reach:], x[-reach:]])
        decay = torch.cat([decay[:-reach] * decay[reach:], decay[-reach:]])
        reach *= 2
    return x


class ReturnNormalizer(nn.Module):
    """Divides advantages by the range of returns, never by less than 1: small returns are left small.

    The range is between two percentiles, each an exponential moving average without bias correction. The returns are
    those of all ranks.
    """

    low: Tensor
    high: Tensor

    def __init__(self, config: schema.Behavior, ranks: Ranks = ALONE):
        super().__init__()
        self.ranks = ranks
        self.rate, self.percentiles = config.return_rate, (config.return_low, config.return_high)
        self.register_buffer("low", torch.zeros(()))
        self.register_buffer("high", torch.zeros(()))

    @torch.no_grad()
    def update(self, returns: Tensor) -> Tensor:
        """Take in returns of any shape; gives the scale to divide by, a number of at least 1."""
        ordered = self.ranks.joined(returns.flatten()).sort().values
        for average, percentile in zip((self.low, self.high), self.percentiles, strict=True):
            place = percentile / 100 * (ordered.shape[0] - 1)
            below = int(place)
            above = min(below + 1, ordered.shape[0] - 1)
            average.lerp_(torch.lerp(ordered[below], ordered[above], place - below), self.rate)
        return (self.high - self.low).clamp(min=1)


class Imagined(NamedTuple):
    """What imagination gives to learn from; gradients lead back to the actions where the actor learns through them."""

    feature: Tensor  # (H + 1, N, F)
    action: Tensor  # (H, N, A)
    reward: Tensor  # (H + 1, N)
    continuation: Tensor  # (H + 1, N), discount included


class BehaviorLoss(NamedTuple):
    """Losses (H, N) and what else came out."""

    losses: dict[str, Tensor]
    returns: Tensor  # (H, N)
    statistics: dict[str, Tensor]


def imagination_loss(
    behavior: Behavior, frozen_critic: TwoHotHead, slow_critic: TwoHotHead, normalizer: ReturnNormalizer,
    imagined: Imagined, config: schema.Behavior,
) -> BehaviorLoss:  # fmt: skip
    """Entropy and more return for the actor; for the critic two-hot regression to lambda-returns and the slow critic.

    The actor's gradient, with advantage A = (returns - value) / scale:

        reinforce  A * d log p(a | s)     A is a number; for every kind of action
        dynamics   dA / da * da           through rewards, values and the model to the sampled action, as DreamerV3's
                                          first version (Hafner et al., 2023) did for continuous actions

    `frozen_critic` has the critic's weights and learns nothing, so that the actor may use it to see where values lie.
    """
    feature = imagined.feature.detach()
    logits = behavior.critic(feature)
    through_model = config.gradient == "dynamics"
    value = (
        frozen_critic.mean(frozen_critic(imagined.feature)) if through_model else frozen_critic.mean(logits.detach())
    )
    weight = imagined.continuation.detach().cumprod(0)[:-1]
    never = torch.zeros_like(imagined.continuation)
    returns = lambda_return(imagined.reward, imagined.continuation, value, never, config.return_lambda)
    scale = normalizer.update(returns)
    advantage = (returns - value[:-1]) / scale

    policy = behavior.actor(feature[:-1])
    entropy = policy.entropy()
    gain = advantage if through_model else advantage * policy.log_prob(imagined.action)
    actor = -weight * (gain + config.entropy * entropy)
    returns = returns.detach()
    critic = weight * critic_loss(
        behavior.critic, slow_critic, feature[:-1], logits[:-1], returns, config.slow_regularizer
    )
    statistics = {
        "imagined_reward": imagined.reward.mean(),
        "imagined_return": returns.mean(),
        "imagined_value": value.mean(),
        "imagined_length": weight.sum(0).mean(),
        "return_scale": scale,
        "policy_entropy": entropy.mean(),
        "advantage_size": advantage.abs().mean(),
    }
    statistics = {key: number.detach() for key, number in statistics.items()}
    return BehaviorLoss({"actor": actor, "critic": critic}, returns, statistics)


def critic_loss(
    critic: TwoHotHead, slow_critic: TwoHotHead, feature: Tensor, logits: Tensor, returns: Tensor, regularizer: float
) -> Tensor:  # fmt: skip
    """Cross-entropy (...) of the critic's logits (..., bins) with returns (...) and with the slow critic's mean."""
    with torch.no_grad():
        slow = slow_critic.mean(slow_critic(feature))
    return critic.loss(logits, returns) + regularizer * critic.loss(logits, slow)


def replay_value_loss(
    behavior: Behavior, slow_critic: TwoHotHead, feature: Tensor, reward: Tensor, last: Tensor, terminal: Tensor,
    bootstrap: Tensor, config: schema.Behavior,
) -> Tensor:  # fmt: skip
    """The critic on what really happened, (T - 1, B); its gradient reaches the world model through `feature`.

    Args:
        behavior: holds the critic.
        slow_critic: the slow copy of it.
        feature: [h, z] of the real sequence (T, B, F), with gradients.
        reward: (T, B).
        last: (T, B).
        terminal: (T, B).
        bootstrap: the imagined return that starts at each state (T, B).
        config: lambda, discount, regulariser.
    """
    live = (~terminal).float() * (1 - 1 / config.discount_horizon)
    returns = lambda_return(reward, live, bootstrap, last, config.return_lambda)
    logits = behavior.critic(feature[:-1])
    loss = critic_loss(behavior.critic, slow_critic, feature[:-1].detach(), logits, returns, config.slow_regularizer)
    return (~last[:-1]).float() * loss
