"""The update as one would first write it: what the fast one is tested against, and timed against.

One step after the other under plain autograd, no frozen twins, no shared scan, sums over time as loops, parameters one
by one. It asks the same modules for the same losses and draws the same noise in the same order, so that from equal
weights both make equal ones, up to rounding. REINFORCE, one process.
"""

import torch
from torch import Tensor

from agent.learner import Learner, part
from agent.world_model import Batch
from agent.world_model.rssm import Latent, Posterior

Tensors = dict[str, Tensor]


class PlainUpdate:
    """`Learner.learn` on a learner's weights, with optimizer moments of its own; all products in fp32."""

    dtype = torch.float32

    def __init__(self, learner: Learner):
        self.learner, self.count = learner, 0
        self.square = [torch.zeros_like(parameter) for parameter in learner.parameters]
        self.momentum = [torch.zeros_like(parameter) for parameter in learner.parameters]

    def __call__(self, rows: Tensors, context: Tensors) -> tuple[Tensors, Tensors]:
        """One update in place; arguments and fresh latents as of `Learner.learn`, and each loss as a number."""
        losses, latent = self.losses(rows, context)
        means = {name: loss.mean() for name, loss in losses.items()}
        total = torch.stack([getattr(self.learner.config.loss, name) * mean for name, mean in means.items()]).sum()
        self.descend(list(torch.autograd.grad(total, self.learner.parameters)))
        kept = slice(self.learner.stride - 1, None, self.learner.stride)
        state = {key: value[:, kept] for key, value in latent.state.items()}
        return self.learner.latents(state, latent.z[:, kept]), means

    def losses(self, rows: Tensors, context: Tensors) -> tuple[Tensors, Latent]:
        """Every loss, arrays of different shapes, and the states inferred (B, T, ...)."""
        learner = self.learner
        batch = learner.as_batch(rows)
        posterior = self._observe(batch, part(context, "state"), context["z"])
        feature = learner.world_model.rssm.feature(posterior.latent, self.dtype)
        losses, _ = learner.world_model.losses(batch, posterior, feature)
        first = batch.first.shape[1] - (learner.config.behavior.imagination_starts or batch.first.shape[1])
        features, actions = self._imagine(posterior.latent, first)
        returns = self._judge(features, actions, losses)
        losses["replay_value"] = self._replay_value(batch, feature, returns[0].unflatten(0, (len(feature), -1)), first)
        return losses, posterior.latent

    def _observe(self, batch: Batch, state: Tensors, index: Tensor) -> Posterior:
        """Infer the states of a batch; codes `index` (B, G) before it."""
        model, rssm = self.learner.world_model, self.learner.world_model.rssm
        token = model.encoder(batch.observation, self.dtype)
        z = torch.nn.functional.one_hot(index.long(), rssm.classes).float()
        uniform = torch.rand(*batch.first.shape, rssm.groups, device=token.device)
        latents, log_probs = [], []
        for t in range(batch.first.shape[1]):
            latent, log_prob = rssm.observe_step(
                state, z, batch.previous_action[:, t], batch.first[:, t], token[:, t], uniform[:, t]
            )
            state, z = latent.state, latent.z
            latents.append(latent)
            log_probs.append(log_prob)
        states = {key: torch.stack([latent.state[key] for latent in latents], 1) for key in state}
        h, z = (torch.stack([getattr(latent, name) for latent in latents], 1) for name in ("h", "z"))
        return Posterior(Latent(states, h, z), torch.stack(log_probs, 1))

    @torch.no_grad()
    def _imagine(self, start: Latent, first: int) -> tuple[Tensor, Tensor]:
        """H steps from each of N states, those from step `first` on: features (H + 1, N, F), actions (H, N, A)."""
        learner, rssm = self.learner, self.learner.world_model.rssm
        state = {key: value[:, first:].flatten(0, 1) for key, value in start.state.items()}
        h, z = start.h[:, first:].flatten(0, 1), start.z[:, first:].flatten(0, 1)
        horizon = learner.config.behavior.imagination_horizon
        noise = learner.action.noise((horizon, h.shape[0]), h.device)
        uniform = torch.rand(horizon, h.shape[0], rssm.groups, device=h.device)
        features, actions = [rssm.feature(Latent(state, h, z), self.dtype)], []
        for t in range(horizon):
            actions.append(learner.behavior.actor(features[-1]).sample(noise[t]))
            state, h, z = rssm.imagine_step(state, z, actions[-1], uniform[t], self.dtype)
            features.append(rssm.feature(Latent(state, h, z), self.dtype))
        return torch.stack(features), torch.stack(actions)

    def _judge(self, feature: Tensor, action: Tensor, losses: Tensors) -> Tensor:
        """Add the losses of actor and critic; gives the lambda-returns (H, N)."""
        learner, config = self.learner, self.learner.config.behavior
        model, critic = learner.world_model, learner.behavior.critic
        with torch.no_grad():
            reward = model.reward.mean(model.reward(feature))
            live = model.continuation.probability(feature)
            value = critic.mean(critic(feature))
            returns = _lambda_returns(reward, live, value, torch.zeros_like(live), config.return_lambda)
            low, high = (torch.quantile(returns, q / 100) for q in (config.return_low, config.return_high))
            for average, now in zip((learner.normalizer.low, learner.normalizer.high), (low, high), strict=True):
                average.copy_((1 - config.return_rate) * average + config.return_rate * now)
            advantage = (returns - value[:-1]) / max(1.0, float(learner.normalizer.high - learner.normalizer.low))
            weight = live.cumprod(0)[:-1]
        policy = learner.behavior.actor(feature[:-1])
        losses["actor"] = -weight * (advantage * policy.log_prob(action) + config.entropy * policy.entropy())
        losses["critic"] = weight * self._critic_loss(feature[:-1], returns)
        return returns

    def _critic_loss(self, feature: Tensor, returns: Tensor) -> Tensor:
        """Features (..., F) with gradients or without, returns (...) -> (...)."""
        critic, slow = self.learner.behavior.critic, self.learner.slow_critic
        with torch.no_grad():
            followed = slow.mean(slow(feature))
        logits = critic(feature)
        return critic.loss(logits, returns) + self.learner.config.behavior.slow_regularizer * critic.loss(
            logits, followed
        )

    def _replay_value(self, batch: Batch, feature: Tensor, bootstrap: Tensor, first: int) -> Tensor:
        """The critic on what happened from step `first` on: feature (B, T, F), bootstrap (B, K) -> (K - 1, B)."""
        config = self.learner.config.behavior
        live = (~batch.terminal.T[first:]).float() * (1 - 1 / config.discount_horizon)
        last = batch.last.T[first:].float()
        returns = _lambda_returns(batch.reward.T[first:], live, bootstrap.T, last, config.return_lambda)
        return (1 - last[:-1]) * self._critic_loss(feature.transpose(0, 1)[first:-1], returns)

    @torch.no_grad()
    def descend(self, gradients: list[Tensor]) -> None:
        """LaProp with adaptive clipping, one parameter after the other; then the slow critic and the frozen twins."""
        c, learner = self.learner.config.optimizer, self.learner
        rate = c.lr * min(1.0, self.count / c.warmup) if c.warmup else c.lr
        self.count += 1
        behaving = {id(parameter) for parameter in learner.behavior.parameters()}
        for weight, gradient, v, m in zip(learner.parameters, gradients, self.square, self.momentum, strict=True):
            limit = c.agc * max(1e-3, float(weight.norm()))
            gradient = gradient * min(1.0, limit / max(1e-30, float(gradient.norm())))
            v.copy_(c.beta2 * v + (1 - c.beta2) * gradient**2)
            scaled = gradient / ((v / (1 - c.beta2**self.count)).sqrt() + c.eps)
            m.copy_(c.beta1 * m + (1 - c.beta1) * scaled)
            own = c.behavior_lr / c.lr if c.behavior_lr and id(weight) in behaving else 1.0
            weight.copy_(weight - own * rate * m / (1 - c.beta1**self.count))
        slow_rate = learner.config.behavior.slow_rate
        for slow, weight in zip(learner.slow_critic.parameters(), learner.behavior.critic.parameters(), strict=True):
            slow.copy_((1 - slow_rate) * slow + slow_rate * weight)
        learner.refresh()


def _lambda_returns(reward: Tensor, live: Tensor, value: Tensor, last: Tensor, mix: float) -> Tensor:
    """R_t = r + c ((1 - mix) v + mix R) at t + 1, and R = v where an episode was cut; arrays (T, N) -> (T - 1, N)."""
    returns = [value[-1]]
    for t in reversed(range(1, reward.shape[0])):
        mixed = (1 - mix) * value[t] + mix * torch.where(last[t].bool(), value[t], returns[-1])
        returns.append(reward[t] + live[t] * mixed)
    return torch.stack(returns[:0:-1])
