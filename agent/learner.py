"""What learns, and how: one update of world model, actor and critic, as one function of static shapes.

Source: Hafner et al., "Mastering diverse control tasks through world models" (Nature, 2025).
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor

from agent.behavior import (
    Behavior,
    Imagined,
    ReturnNormalizer,
    imagination_loss,
    replay_value_loss,
)
from agent.compiler import Mode, as_it_is, compiled
from agent.cores import State
from agent.distributed import Ranks
from agent.distributions import one_hot
from agent.errors import UserError
from agent.finite import Watch, restore
from agent.networks import Frozen, parameter_count
from agent.optimizer import LaProp
from agent.schema import Config
from agent.spaces import Action, Space, Vector
from agent.world_model import Batch, WorldModel
from agent.world_model.heads import TwoHotHead
from agent.world_model.rssm import Known, Latent, Posterior

Tensors = dict[str, Tensor]


class Learner:
    """World model, behavior, their frozen twins and the optimizer.

    Args:
        observations: what may be encoded and reconstructed.
        action: what the policy gives.
        config: the resolved configuration.
        device: where everything lives.
        dtype: of matrix products.
        ranks: those that learn together, from the mean of their gradients; all begin with the first one's weights.

    Raises:
        UserError: `config` asks for what these spaces cannot do.
    """

    def __init__(
        self, observations: dict[str, Space], action: Action, config: Config, device: torch.device, dtype: torch.dtype,
        ranks: Ranks,
    ):  # fmt: skip
        self.action, self.config, self.device, self.dtype, self.ranks = action, config, device, dtype, ranks
        self.world_model = WorldModel(observations, action, config).to(device)
        self.behavior = Behavior(self.world_model.rssm.feature_size, action, config).to(device)
        self.normalizer = ReturnNormalizer(config.behavior, ranks).to(device)
        ranks.spread(self.world_model)
        ranks.spread(self.behavior)
        modelled, behaving = list(self.world_model.parameters()), list(self.behavior.parameters())
        self.parameters = [*modelled, *behaving]
        of_core = {id(parameter) for parameter in self.world_model.rssm.core.parameters()}
        self._in_core = torch.tensor([float(id(one) in of_core) for one in self.parameters], device=device)
        parts = {"world_model": self.world_model, "behavior": self.behavior}
        self._gradient_names = [
            f"gradient/{whole}.{name}" for whole, module in parts.items() for name, _ in module.named_parameters()
        ]
        share = (config.optimizer.behavior_lr or config.optimizer.lr) / config.optimizer.lr
        shares = [1.0] * len(modelled) + [share] * len(behaving)
        self.optimizer = LaProp(self.parameters, config.optimizer, shares if share != 1 else None)

        self.frozen_actor = Frozen(self.behavior.actor, self.dtype)
        self.frozen_critic = Frozen(self.behavior.critic, self.dtype)
        self.through_model = config.behavior.gradient == "dynamics"
        if self.through_model and not isinstance(action, Vector):
            raise UserError("behavior.gradient: dynamics needs continuous actions; use reinforce")
        self.slow_critic = TwoHotHead(
            self.world_model.rssm.feature_size, config.heads.units, config.heads.critic_layers, config.heads.bins
        ).to(device).requires_grad_(False)  # fmt: skip
        self.slow_critic.load_state_dict(self.behavior.critic.state_dict())

        self.watch = Watch(device, ranks)

    def prepare(self, mode: Mode) -> None:
        """Make the frozen twin of the world model and the regions, compiled if `mode` is full.

        This is done anew when the core takes another path through its code.
        """
        self.frozen_world_model = Frozen(self.world_model, self.dtype)
        rssm = self.world_model.rssm
        region = partial(compiled, device=self.device) if mode == "full" else as_it_is
        self._know = region(self._known)
        self._chain = region(self.frozen_world_model.module.rssm.scan_step)
        self._batched = region(rssm.scan_step)
        self._run = region(rssm.run) if rssm.runs_in_parallel else self._run_through_time
        self._imagine_step = region(self._imagined_step)
        self._evaluate = region(self._losses)
        self._optimize = region(self._optimized)

    @property
    def stride(self) -> int:
        """The distance of the rows whose latents replay keeps: small ones at all, large ones at heads of sequences."""
        return self.config.train.batch_length if self.world_model.rssm.core.state_is_large else 1

    def latents(self, state: State, z: Tensor) -> dict[str, Tensor]:
        """Memory (..., ) and code (..., G, C) as replay stores them."""
        return {f"state/{key}": value.detach() for key, value in state.items()} | {
            "z": z.detach().argmax(-1).to(torch.uint8)
        }

    # ---- the update -------------------------------------------------------------------------------------------

    def learn(self, rows: dict[str, Tensor], context: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """One update of everything, in place; of nothing, if a number in it is not finite.

        Args:
            rows: (B, 1 + T, ...): one row of context, then those to learn from.
            context: latents of the context row (B, ...).

        Returns:
            Fresh latents of the steps that replay keeps, (B, K, ...), and metrics (numbers), with `finite` (bool).
        """
        # Noise is drawn between the compiled regions, so that it is the same however the update runs.
        uniform = torch.rand(*rows["is_first"][:, 1:].shape, self.world_model.rssm.groups, device=self.device)
        scale_before = [buffer.clone() for buffer in self.normalizer.buffers()]
        batch, z, known = self._know(rows, context["z"], uniform)
        posterior = self._run(part(context, "state"), z, known)
        feature, action = self._imagine(posterior.latent)
        total, latents, metrics = self._evaluate(batch, posterior, feature, action)
        gradients = torch.autograd.grad(total, self.parameters)
        fine = self._all_finite(rows, context, posterior.latent.state, part(metrics, "loss"), gradients)
        # What each rank found in its own gradients is known by now: their mean would not say whose they were.
        mean = self.ranks.mean(list(gradients))
        metrics |= self._optimize(mean, fine, self.optimizer.norms(mean))
        restore(list(self.normalizer.buffers()), scale_before, fine)
        return latents, metrics | {"finite": fine}

    def _known(self, rows: dict[str, Tensor], index: Tensor, uniform: Tensor) -> tuple[Batch, Tensor, Known]:
        """Region: what comes before the memory. Codes `index` (B, G) of the context, noise `uniform` (B, T, G)."""
        batch, rssm = self.as_batch(rows), self.world_model.rssm
        z = one_hot(index, rssm.classes)
        token = self.world_model.encoder(batch.observation, self.dtype)
        return batch, z, rssm.know(z, batch.previous_action, batch.first, token, uniform)

    def _run_through_time(self, state: State, z: Tensor, known: Known) -> Posterior:
        return self.world_model.rssm.run(state, z, known, self._chain, self._batched)

    def _losses(
        self, batch: Batch, posterior: Posterior, imagined_feature: Tensor, imagined_action: Tensor
    ) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
        """Region: everything after imagination. The number to descend, the latents that replay keeps, and metrics."""
        config, model, latent = self.config, self.world_model, posterior.latent
        feature = model.rssm.feature(latent, self.dtype)  # (B, T, F)
        losses, statistics = model.losses(batch, posterior, feature)
        imagined = self._judged(imagined_feature, imagined_action)
        behavior = imagination_loss(
            self.behavior, self.frozen_critic.module, self.slow_critic, self.normalizer, imagined, config.behavior
        )
        losses |= behavior.losses
        real, arrived, last, terminal = (
            self._starts(steps).transpose(0, 1) for steps in (feature, batch.reward, batch.last, batch.terminal)
        )
        bootstrap = behavior.returns[0].view(len(feature), -1)  # the return that starts at each real state
        losses["replay_value"] = replay_value_loss(
            self.behavior, self.slow_critic, real, arrived, last, terminal, bootstrap.T, config.behavior
        )
        means = {name: loss.mean() for name, loss in losses.items()}
        total = torch.stack([getattr(config.loss, name) * mean for name, mean in means.items()]).sum()
        metrics = {f"loss/{name}": mean.detach() for name, mean in means.items()} | statistics | behavior.statistics
        metrics |= self._core_diagnostics(latent.state)
        kept = slice(self.stride - 1, None, self.stride)
        return total, self.latents({k: v[:, kept] for k, v in latent.state.items()}, latent.z[:, kept]), metrics

    def _all_finite(
        self, rows: Tensors, context: Tensors, states: State, losses: Tensors, gradients: tuple[Tensor, ...]
    ) -> Tensor:
        """Whether all numbers of an update are, bool ()."""
        given = {f"row/{key}": value for key, value in rows.items()}
        given |= {f"latent/{key}": value for key, value in context.items()}
        named = {key: value for key, value in given.items() if value.is_floating_point()}
        named |= {f"new state/{key}": value.detach() for key, value in states.items()}
        named |= {f"loss/{key}": value.detach() for key, value in losses.items()}
        return self.watch.check(named | dict(zip(self._gradient_names, gradients, strict=True)), given)

    @torch.no_grad()
    def _follow(self, fine: Tensor) -> None:
        """Let what copies the learned weights follow them, the slow critic only if the update was fine."""
        for slow, weight in zip(self.slow_critic.parameters(), self.behavior.critic.parameters(), strict=True):
            slow.copy_(torch.where(fine, slow.lerp(weight, self.config.behavior.slow_rate), slow))
        self.refresh()

    def refresh(self) -> None:
        """Let the frozen twins follow the weights."""
        self.frozen_world_model.refresh()
        self.frozen_actor.refresh()
        self.frozen_critic.refresh()

    @torch.no_grad()
    def _optimized(self, gradients: list[Tensor], fine: Tensor, norms: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
        """Region: new weights if the update was fine, those of slow critic and frozen twins too; gradients' norms."""
        of_core = (norms[0].square() * self._in_core).sum().sqrt()
        statistics = {"core/gradient_norm": of_core} | self.optimizer.step(gradients, fine, norms)
        self._follow(fine)
        return statistics

    @torch.no_grad()
    def _core_diagnostics(self, states: State) -> dict[str, Tensor]:
        """What the core says of its memory after the last step of (B, T, ...)."""
        numbers = self.world_model.rssm.core.diagnostics({key: value[:, -1].detach() for key, value in states.items()})
        return {f"core/{name}": number for name, number in numbers.items()}

    def as_batch(self, rows: dict[str, Tensor]) -> Batch:
        """Rows (B, 1 + T, ...) -> the T steps to learn from. The action of the row before led to each step."""
        later = {key: value[:, 1:] for key, value in rows.items()}
        return Batch(
            {key: later[key] for key in self.world_model.observations},
            self.action.encode(rows["action"][:, :-1]),
            later["reward"], later["is_first"], later["is_last"], later["is_terminal"],
        )  # fmt: skip

    def _imagine(self, start: Latent) -> tuple[Tensor, Tensor]:
        """Act in imagination from the states of a batch, (B, T, ...): H steps from N = B * K, all or the last ones.

        Returns:
            Features (H + 1, N, F) and actions (H, N, A); gradients lead back to the actor where it learns through them.
        """
        horizon, rssm = self.config.behavior.imagination_horizon, self.frozen_world_model.module.rssm
        state = {key: self._starts(value).detach().flatten(0, 1) for key, value in start.state.items()}
        if not self.through_model:
            state = rssm.core.for_imagination(state, self.dtype)
        h, z = (self._starts(value).detach().flatten(0, 1) for value in (start.h, start.z))
        action_noise = self.action.noise((horizon, h.shape[0]), self.device)
        uniform = torch.rand(horizon, h.shape[0], rssm.groups, device=self.device)
        features, actions = [], []
        with torch.set_grad_enabled(self.through_model):
            for t in range(horizon):
                feature, action, (state, h, z) = self._imagine_step(state, h, z, action_noise[t], uniform[t])
                features.append(feature)
                actions.append(action)
            features.append(rssm.feature(Latent(state, h, z), self.dtype))
            return torch.stack(features), torch.stack(actions)

    def _starts(self, steps: Tensor) -> Tensor:
        """Of what lies along the steps of a batch (B, T, ...) that at the steps from which is imagined, (B, K, ...)."""
        return steps[:, -(self.config.behavior.imagination_starts or steps.shape[1]) :]

    def _judged(self, feature: Tensor, action: Tensor) -> Imagined:
        """Features (H + 1, N, F) and actions (H, N, A) with what the frozen model's heads say of them."""
        model = self.frozen_world_model.module
        with torch.set_grad_enabled(self.through_model):
            reward = model.reward.mean(model.reward(feature))
            return Imagined(feature, action, reward, model.continuation.probability(feature))

    def _imagined_step(
        self, state: State, h: Tensor, z: Tensor, action_noise: Tensor, uniform: Tensor
    ) -> tuple[Tensor, Tensor, Latent]:
        rssm = self.frozen_world_model.module.rssm
        feature = rssm.feature(Latent(state, h, z), self.dtype)
        # An action's gradient leads to what it brings about, but not through the actions that follow from that.
        actor = self.behavior.actor if self.through_model else self.frozen_actor.module
        action = actor(feature.detach()).sample(action_noise)
        return feature, action, rssm.imagine_step(state, z, action, uniform, self.dtype)

    # ---- keeping ----------------------------------------------------------------------------------------------

    def parameter_counts(self) -> dict[str, int]:
        """Learned numbers of each part; the slow critic is a copy and does not count."""
        model = self.world_model
        parts = {
            "encoder": model.encoder, "dynamics": model.rssm, "decoder": model.decoder, "reward": model.reward,
            "continuation": model.continuation, "actor": self.behavior.actor, "critic": self.behavior.critic,
        }  # fmt: skip
        parts |= {"anticipation": model.anticipation} if model.anticipation else {}
        return {name: parameter_count(module) for name, module in parts.items()}

    def state_dict(self) -> dict[str, Any]:
        """Everything that an update changes."""
        modules = {name: module.state_dict() for name, module in self._modules().items()}
        return modules | {"optimizer": self.optimizer.state_dict(), "skipped_in_a_row": self.watch.in_a_row}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over a saved state, in place; `prepare` and `refresh` come after it."""
        for name, module in self._modules().items():
            module.load_state_dict(state[name])
        self.optimizer.load_state_dict(state["optimizer"])
        self.watch.in_a_row.copy_(state["skipped_in_a_row"])

    def _modules(self) -> dict[str, torch.nn.Module]:
        return {
            "world_model": self.world_model,
            "behavior": self.behavior,
            "slow_critic": self.slow_critic,
            "normalizer": self.normalizer,
        }


def part(tensors: Tensors, prefix: str) -> Tensors:
    """The entries called `prefix/...`, without the prefix."""
    return {key.removeprefix(f"{prefix}/"): value for key, value in tensors.items() if key.startswith(f"{prefix}/")}
