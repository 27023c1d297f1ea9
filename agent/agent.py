"""The agent: acts on observations, learns from replay. One update is one function of static shapes."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from gymnasium import spaces
from torch import Tensor

from agent.behavior import (
    Behavior,
    Imagined,
    ReturnNormalizer,
    imagination_loss,
    replay_value_loss,
)
from agent.capture import Captured, Tensors
from agent.compiler import as_it_is, compiled
from agent.cores import State
from agent.distributed import ALONE, Ranks
from agent.distributions import one_hot
from agent.errors import UserError
from agent.finite import Watch, restore
from agent.means import Means
from agent.networks import Frozen, parameter_count
from agent.optimizer import LaProp
from agent.replay import Replay, Spec
from agent.schema import Config
from agent.spaces import Vector, action_from_gymnasium, from_gymnasium
from agent.world_model import Batch, WorldModel
from agent.world_model.encoder import Observation
from agent.world_model.heads import TwoHotHead
from agent.world_model.rssm import Known, Latent, Posterior

FLAGS: dict[str, Spec] = {
    "reward": ((), torch.float32),
    "is_first": ((), torch.bool),
    "is_last": ((), torch.bool),
    "is_terminal": ((), torch.bool),
}


class Carry(NamedTuple):
    """What the agent keeps between two steps of N environments."""

    state: State  # the core's memory (N, ...)
    z: Tensor  # (N, G, C)
    action: Tensor  # the last one (N, A)


class Agent:
    """World model, behavior and optimizer on one device.

    Args:
        observations: Dict space of an environment's observation, as `agent.make_env` gives it.
        action: its action space.
        config: the resolved configuration; `compile` and `precision` may still be `auto`.
        device: where everything lives.
        ranks: those that learn together, from the mean of their gradients; all begin with the first one's weights.

    Raises:
        UserError: a space is not supported, or `config` asks for what this device or these spaces cannot do.

    Source: Hafner et al., "Mastering diverse control tasks through world models" (Nature, 2025).
    """

    def __init__(
        self, observations: spaces.Space[Any], action: spaces.Space[Any], config: Config, device: torch.device,
        ranks: Ranks = ALONE,
    ):  # fmt: skip
        assert isinstance(observations, spaces.Dict), "envs.make gives dict observations"
        self.config, self.device, self.ranks = config, device, ranks
        given = {key: from_gymnasium(space, key) for key, space in sorted(observations.items())}
        self.action = action_from_gymnasium(action)
        on_gpu = device.type == "cuda"
        precision = config.precision if config.precision != "auto" else ("bf16" if on_gpu else "fp32")
        self.dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        self.mode = config.compile if config.compile != "auto" else ("full" if on_gpu else "eager")
        if self.mode == "graph" and not on_gpu:
            raise UserError("compile: graph needs a CUDA device; use eager or full on the CPU")

        self.world_model = WorldModel(given, self.action, config).to(device)
        self.observations = self.world_model.observations
        self.behavior = Behavior(self.world_model.rssm.feature_size, self.action, config).to(device)
        self.normalizer = ReturnNormalizer(config.behavior, ranks).to(device)
        ranks.spread(self.world_model)
        ranks.spread(self.behavior)
        modelled, behaving = list(self.world_model.parameters()), list(self.behavior.parameters())
        self.parameters = [*modelled, *behaving]
        of_core = {id(parameter) for parameter in self.world_model.rssm.core.parameters()}
        self._core_places = [place for place, one in enumerate(modelled) if id(one) in of_core]
        parts = {"world_model": self.world_model, "behavior": self.behavior}
        self._gradient_names = [
            f"gradient/{part}.{name}" for part, module in parts.items() for name, _ in module.named_parameters()
        ]
        share = (config.optimizer.behavior_lr or config.optimizer.lr) / config.optimizer.lr
        shares = [1.0] * len(modelled) + [share] * len(behaving)
        self.optimizer = LaProp(self.parameters, config.optimizer, shares if share != 1 else None)

        self.frozen_actor = Frozen(self.behavior.actor, self.dtype)
        self.frozen_critic = Frozen(self.behavior.critic, self.dtype)
        self.through_model = config.behavior.gradient == "dynamics"
        if self.through_model and not isinstance(self.action, Vector):
            raise UserError("behavior.gradient: dynamics needs continuous actions; use reinforce")
        self.slow_critic = TwoHotHead(
            self.world_model.rssm.feature_size, config.heads.units, config.heads.critic_layers, config.heads.bins
        ).to(device).requires_grad_(False)  # fmt: skip
        self.slow_critic.load_state_dict(self.behavior.critic.state_dict())

        self.watch = Watch(device, ranks)
        self.means = Means(device, ranks)
        self._captures = on_gpu and self.mode != "eager"
        self._replay: Replay | None = None
        self.updates = 0
        self._prepare()

    def _prepare(self) -> None:
        """Twin of the world model, compiled regions, captured graphs: what is made anew when its code path changes."""
        self.frozen_world_model = Frozen(self.world_model, self.dtype)
        rssm, region = self.world_model.rssm, compiled if self.mode == "full" else as_it_is
        self._know = region(self._known)
        self._chain = region(self.frozen_world_model.module.rssm.scan_step)
        self._batched = region(rssm.scan_step)
        self._run = region(rssm.run) if rssm.runs_in_parallel else self._run_through_time
        self._imagine_step = region(self._imagined_step)
        self._evaluate = region(self._losses)
        self._optimize = region(self._optimized)
        self._act = self._on_device(self.act_flat)
        self._update: Callable[[Tensors], Tensors] | None = None
        if self._replay is not None:
            self.attach(self._replay)

    def _on_device(self, function: Callable[[Tensors], Tensors]) -> Callable[[Tensors], Tensors]:
        """The function for inputs from anywhere: captured, or as it is on inputs brought to the agent's device."""
        if self._captures:
            return Captured(function, self.device)
        return lambda inputs: function({key: value.to(self.device) for key, value in inputs.items()})

    # ---- acting -----------------------------------------------------------------------------------------------

    def initial(self, amount: int) -> Carry:
        """What the agent keeps before the first step of `amount` environments."""
        state, z = self.world_model.rssm.initial(amount)
        return Carry(state, z, torch.zeros(amount, self.action.width, device=self.device))

    def act(self, observation: Observation, first: Tensor, carry: Carry, mode: bool = False) -> tuple[Tensor, Carry]:
        """Choose an action for each of N environments.

        Args:
            observation: tensors (N, ...) as the environment gives them.
            first: (N,) bool: an episode begins here, and what the agent kept is forgotten.
            carry: what this function gave for the step before.
            mode: the most likely action, instead of a sampled one.

        Returns:
            The action (N, ...) as the environment takes it, on the agent's device, and what to keep. With a CUDA graph,
            the next call overwrites both.
        """
        inputs = {f"observation/{key}": observation[key] for key in self.observations}
        inputs |= {f"state/{key}": value for key, value in carry.state.items()}
        inputs |= {"z": carry.z, "action": carry.action, "first": first, "mode": torch.tensor([mode])}
        outputs = self._act(inputs)
        state = {key: outputs[f"state/{key}"] for key in carry.state}
        return self.action.decode(outputs["action"]), Carry(state, outputs["z"], outputs["action"])

    @torch.no_grad()
    def act_flat(self, inputs: Tensors) -> Tensors:
        """`act` as a function of named tensors alone: the form that is captured as a CUDA graph, and exported."""
        model, amount = self.frozen_world_model.module, inputs["first"].shape[0]
        token = model.encoder(_part(inputs, "observation"), self.dtype)
        uniform = torch.rand(amount, model.rssm.groups, device=self.device)
        latent, _ = model.rssm.observe_step(
            _part(inputs, "state"), inputs["z"], inputs["action"], inputs["first"], token, uniform
        )
        policy = self.frozen_actor.module(model.rssm.feature(latent, self.dtype))
        sample = policy.sample(self.action.noise((amount,), self.device))
        action = torch.where(inputs["mode"], policy.mode(), sample)
        return {
            "action": action,
            "z": latent.z,
            **{f"state/{key}": value for key, value in latent.state.items()},
        }

    # ---- learning ---------------------------------------------------------------------------------------------

    @property
    def replay_stride(self) -> int:
        """The distance of the rows whose latents replay keeps: small ones at all, large ones at heads of sequences."""
        return self.config.train.batch_length if self.world_model.rssm.core.state_is_large else 1

    def row_specs(self) -> tuple[dict[str, Spec], dict[str, Spec]]:
        """What replay stores of each step: the transition with the action, and the agent's latents."""
        rows = {key: (space.shape, space.dtype) for key, space in self.observations.items()}
        rows |= FLAGS | {"action": (self.action.shape, self.action.dtype)}
        state, _ = self.world_model.rssm.initial(1)
        latents = {f"state/{key}": (tuple(value.shape[1:]), value.dtype) for key, value in state.items()}
        # z is one-hot, so the indices are all of it, and 4 * C times smaller.
        return rows, latents | {"z": ((self.world_model.rssm.groups,), torch.uint8)}

    def latents(self, state: State, z: Tensor) -> dict[str, Tensor]:
        """Memory (..., ) and code (..., G, C) as replay stores them."""
        return {f"state/{key}": value.detach() for key, value in state.items()} | {
            "z": z.detach().argmax(-1).to(torch.uint8)
        }

    def row(self, values: Tensors, action: Tensor, carry: Carry) -> Tensors:
        """What replay stores of a step (N, ...): of the environments' `values` what this agent uses, and its own."""
        kept = {key: values[key] for key in (*self.observations, *FLAGS)}
        return kept | {"action": action} | self.latents(carry.state, carry.z)

    def attach(self, replay: Replay) -> None:
        """Learn from this replay from now on. Sampled rows never leave the GPU if replay lies there too."""
        assert replay.stride == self.replay_stride, "replay keeps other latents than this agent writes back"
        self._replay = replay
        if replay.device == self.device:

            def update(inputs: Tensors) -> Tensors:
                latents, metrics = self._learn(*replay.gather(inputs["index"]))
                replay.write_back(inputs["index"], latents, metrics["finite"])
                return metrics

            self._update = self._on_device(update)
            return

        learn = self._on_device(self._learn_flat)

        def update_from_host(inputs: Tensors) -> Tensors:
            rows, latents = replay.gather(inputs["index"])
            given = {f"row/{key}": value for key, value in rows.items()}
            given |= {f"latent/{key}": value for key, value in latents.items()}
            results = learn(given)
            metrics = _part(results, "metric")
            fresh = {k: v.cpu() for k, v in _part(results, "latent").items()}
            replay.write_back(inputs["index"], fresh, metrics["finite"].cpu())
            return metrics

        self._update = update_from_host

    def _learn_flat(self, inputs: Tensors) -> Tensors:
        latents, metrics = self._learn(_part(inputs, "row"), _part(inputs, "latent"))
        return {f"latent/{k}": v for k, v in latents.items()} | {f"metric/{k}": v for k, v in metrics.items()}

    def update(self, index: Tensor) -> None:
        """One update from the sequences that replay sampled, index (2, B). Does not wait for the device."""
        assert self._update is not None, "attach a replay first"
        metrics = self._update({"index": index})
        self.updates += 1
        self.means.add({name: number for name, number in metrics.items() if name != "finite"}, metrics["finite"])

    def take_metrics(self) -> dict[str, float]:
        """Means of what the updates since the last call reported; waits for the device. Empty if there were none.

        `skipped_updates` says how many of them changed nothing, as a number in them was not finite.
        """
        return self.means.take()

    def schedule(self, metrics: Mapping[str, float]) -> None:
        """Let the core change with training, given the metrics just taken; what was captured is dropped if need be."""
        if self.world_model.rssm.core.schedule(self.updates, metrics):
            self._prepare()

    def _learn(
        self, rows: dict[str, Tensor], context: dict[str, Tensor]
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
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
        posterior = self._run(_part(context, "state"), z, known)
        feature, action = self._imagine(posterior.latent)
        total, latents, metrics = self._evaluate(batch, posterior, feature, action)
        gradients = torch.autograd.grad(total, self.parameters)
        fine = self._all_finite(rows, context, posterior.latent.state, _part(metrics, "loss"), gradients)
        # What each rank found in its own gradients is known by now: their mean would not say whose they were.
        metrics |= self._optimize(self.ranks.mean(list(gradients)), fine)
        restore(list(self.normalizer.buffers()), scale_before, fine)
        return latents, metrics | {"finite": fine}

    def _known(self, rows: dict[str, Tensor], index: Tensor, uniform: Tensor) -> tuple[Batch, Tensor, Known]:
        """Region: what comes before the memory. Codes `index` (B, G) of the context, noise `uniform` (B, T, G)."""
        batch, rssm = self._batch(rows), self.world_model.rssm
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
        bootstrap = behavior.returns[0].view(batch.reward.shape)  # the return that starts at each real state
        losses |= behavior.losses
        losses["replay_value"] = replay_value_loss(
            self.behavior, self.slow_critic, feature.transpose(0, 1),
            batch.reward.T, batch.last.T, batch.terminal.T, bootstrap.T, config.behavior,
        )  # fmt: skip
        means = {name: loss.mean() for name, loss in losses.items()}
        total = torch.stack([getattr(config.loss, name) * mean for name, mean in means.items()]).sum()
        metrics = {f"loss/{name}": mean.detach() for name, mean in means.items()} | statistics | behavior.statistics
        metrics |= self._core_diagnostics(latent.state)
        kept = slice(self.replay_stride - 1, None, self.replay_stride)
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
        self._refresh()

    def _refresh(self) -> None:
        self.frozen_world_model.refresh()
        self.frozen_actor.refresh()
        self.frozen_critic.refresh()

    @torch.no_grad()
    def _optimized(self, gradients: list[Tensor], fine: Tensor) -> dict[str, Tensor]:
        """Region: new weights if the update was fine, those of slow critic and frozen twins too; gradients' norms."""
        norms = torch.stack(torch._foreach_norm([gradients[place] for place in self._core_places]))
        statistics = {"core/gradient_norm": norms.square().sum().sqrt()} | self.optimizer.step(gradients, fine)
        self._follow(fine)
        return statistics

    @torch.no_grad()
    def _core_diagnostics(self, states: State) -> dict[str, Tensor]:
        """What the core says of its memory after the last step of (B, T, ...)."""
        numbers = self.world_model.rssm.core.diagnostics({key: value[:, -1].detach() for key, value in states.items()})
        return {f"core/{name}": number for name, number in numbers.items()}

    def _batch(self, rows: dict[str, Tensor]) -> Batch:
        """Rows (B, 1 + T, ...) -> the T steps to learn from. The action of the row before led to each step."""
        later = {key: value[:, 1:] for key, value in rows.items()}
        return Batch(
            {key: later[key] for key in self.observations},
            self.action.encode(rows["action"][:, :-1]),
            later["reward"], later["is_first"], later["is_last"], later["is_terminal"],
        )  # fmt: skip

    def _imagine(self, start: Latent) -> tuple[Tensor, Tensor]:
        """Act in imagination from every state of a batch, (B, T, ...): H steps from N = B * T states.

        Returns:
            Features (H + 1, N, F) and actions (H, N, A); gradients lead back to the actor where it learns through them.
        """
        horizon, rssm = self.config.behavior.imagination_horizon, self.frozen_world_model.module.rssm
        state = {key: value.detach().flatten(0, 1) for key, value in start.state.items()}
        h, z = start.h.detach().flatten(0, 1), start.z.detach().flatten(0, 1)
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
        """Everything that learning changes."""
        modules = {name: module.state_dict() for name, module in self._modules().items()}
        return modules | {
            "optimizer": self.optimizer.state_dict(), "updates": self.updates, "means": self.means.state_dict(),
            "skipped_in_a_row": self.watch.in_a_row,
        }  # fmt: skip

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over a saved state, in place."""
        for name, module in self._modules().items():
            module.load_state_dict(state[name])
        self.optimizer.load_state_dict(state["optimizer"])
        self.updates = state["updates"]
        self._prepare()  # what a core derives from its buffers may have changed
        self._refresh()
        self.means.load_state_dict(state["means"])
        self.watch.in_a_row.copy_(state["skipped_in_a_row"])

    def _modules(self) -> dict[str, torch.nn.Module]:
        return {
            "world_model": self.world_model,
            "behavior": self.behavior,
            "slow_critic": self.slow_critic,
            "normalizer": self.normalizer,
        }


def _part(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The entries called `prefix/...`, without the prefix."""
    return {key.removeprefix(f"{prefix}/"): value for key, value in tensors.items() if key.startswith(f"{prefix}/")}
