"""The world model: encoder, RSSM, decoder and heads, and the losses that train them."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from agent.cores import make_core
from agent.distributions import entropy, kl_divergence
from agent.schema import Config
from agent.spaces import Action, Space
from agent.world_model.encoder import Decoder, Encoder, Observation, chosen
from agent.world_model.heads import AnticipationHead, ContinuationHead, TwoHotHead
from agent.world_model.rssm import RSSM, Posterior


class Batch(NamedTuple):
    """T steps of B sequences, each with the action that led to it. Everything is (B, T, ...)."""

    observation: Observation
    previous_action: Tensor  # (B, T, A), one-hot where discrete
    reward: Tensor  # received on arriving at the step
    first: Tensor
    last: Tensor
    terminal: Tensor


class WorldModel(nn.Module):
    """What the agent believes about its environment.

    Attributes:
        observations: the entries of an observation that the encoder reads or the decoder reconstructs.
    """

    def __init__(self, observations: dict[str, Space], action: Action, config: Config):
        super().__init__()
        heads, keys = config.heads, config.observation
        encoded = chosen(observations, keys.encode, "observation.encode")
        decoded = chosen(observations, keys.decode, "observation.decode")
        self.observations = {key: space for key, space in observations.items() if key in encoded | decoded}
        self.encoder = Encoder(encoded, heads)
        self.rssm = RSSM(
            lambda input_size: make_core(config.core.name, input_size, config.core),
            action.width, self.encoder.token_size, config.rssm,
        )  # fmt: skip
        size = self.rssm.feature_size
        self.decoder = Decoder(decoded, size, self.rssm.core.feature_size, heads)
        self.reward = TwoHotHead(size, heads.units, heads.reward_layers, heads.bins)
        self.anticipation = (
            AnticipationHead(size, action.width, heads.units, heads.reward_layers, heads.bins)
            if config.loss.anticipation
            else None
        )
        self.continuation = ContinuationHead(size, heads.units, heads.continuation_layers)
        self.scales = config.loss
        self.discount = 1 - 1 / config.behavior.discount_horizon

    def losses(
        self, batch: Batch, posterior: Posterior, feature: Tensor
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The losses of a batch, arrays (B, T) or (B, T - 1), and statistics for the log, each a number.

        Args:
            batch: what happened.
            posterior: the states inferred from it.
            feature: [h, z] (B, T, F) of these states.
        """
        prior = self.rssm.prior_log_probs(posterior.latent.h, feature.dtype)
        seen = posterior.log_probs
        free = self.scales.free_nats
        dynamics = kl_divergence(seen.detach(), prior)
        # The same value with the gradient on the other side.
        representation = kl_divergence(seen, prior.detach())
        reconstruction = self.decoder.losses(feature, batch.observation)
        losses = {
            "dynamics": dynamics.clamp(min=free),
            "representation": representation.clamp(min=free),
            "reconstruction": torch.stack(list(reconstruction.values())).sum(0),
            "reward": self.reward.loss(self.reward(feature), batch.reward),
            # The discount is part of the target, so that imagination needs no other.
            "continuation": self.continuation.loss(feature, (~batch.terminal).float() * self.discount),
        }
        if self.anticipation is not None:
            losses["anticipation"] = self._anticipation_loss(self.anticipation, batch, feature)
        statistics = {
            "kl": dynamics.mean(),
            "prior_entropy": entropy(prior).mean(),
            "posterior_entropy": entropy(seen).mean(),
        }
        return losses, {key: value.detach() for key, value in statistics.items()}

    def _anticipation_loss(self, head: AnticipationHead, batch: Batch, feature: Tensor) -> Tensor:
        """What each action brings, as predicted where it is chosen, (B, T - 1); nothing across the border of episodes.

        Reward and next observation are predicted after the action, by asking the memory again. A vector that is all of
        the memory holds their causes before it, too. Of a matrix one sees what was asked for, and nothing but this loss
        (and the critic's, which knows no action) asks for what the coming action should depend on.
        """
        action = batch.previous_action[:, 1:]
        logits = head.anticipate(feature[:, :-1], (action / action.abs().clamp(min=1)).to(feature.dtype))
        return (~batch.first[:, 1:]).float() * head.loss(logits, batch.reward[:, 1:])
