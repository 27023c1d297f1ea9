"""Distributions and squashings of DreamerV3, as functions and small classes over tensors.

Random draws take their noise as an argument: eager, compiled and captured runs then see the same draws, and a test
can choose them.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor


def symlog(x: Tensor) -> Tensor:
    """sign(x) * ln(1 + |x|), elementwise."""
    return x.sign() * x.abs().log1p()


def symexp(x: Tensor) -> Tensor:
    """The inverse of symlog: sign(x) * (exp(|x|) - 1), elementwise."""
    return x.sign() * x.abs().expm1()


def twohot_bins(count: int) -> Tensor:
    """Positions (count,) of the two-hot bins: symexp-spaced, mirrored, an exact 0 in the middle. `count` is odd."""
    half = symexp(torch.linspace(-20, 0, (count + 1) // 2, dtype=torch.float64))
    return torch.cat([half, -half[:-1].flip(0)]).float()


def twohot_mean(logits: Tensor, bins: Tensor) -> Tensor:
    """The expected value (...) under logits (..., bins).

    Each bin is paired with its mirror image and weighted by the difference of their probabilities, so that equal logits
    give exactly 0 whatever order or fused multiply-add the device sums with: bins reach 4.85e8.
    """
    probs = logits.float().softmax(-1)
    positive = bins.shape[0] // 2 + 1
    difference = probs[..., positive:] - probs[..., : positive - 1].flip(-1)
    return (difference * bins[positive:]).sum(-1)


def twohot_loss(logits: Tensor, target: Tensor, bins: Tensor) -> Tensor:
    """Cross-entropy (...) of logits (..., bins) with `target` (...) spread over its two neighbouring bins.

    The target is not squashed: it is interpolated linearly between bins that are spaced by symexp.
    """
    log_probs = logits.float().log_softmax(-1)
    target = target.float().clamp(bins[0], bins[-1]).contiguous()
    above = torch.searchsorted(bins, target, right=True).clamp(1, bins.shape[0] - 1)
    below = above - 1
    weight = (target - bins[below]) / (bins[above] - bins[below])
    picked = torch.gather(log_probs, -1, torch.stack([below, above], -1))  # (..., 2)
    return -((1 - weight) * picked[..., 0] + weight * picked[..., 1])


def unimix_log_probs(logits: Tensor, unimix: float) -> Tensor:
    """Log-probabilities (..., C) of (1 - unimix) * softmax(logits) + unimix / C, in at least fp32."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return (logits.softmax(-1) * (1 - unimix) + unimix / logits.shape[-1]).log()


def one_hot(index: Tensor, classes: int) -> Tensor:
    """Index (...) of any integer type -> (..., classes) in fp32.

    By comparison, in one kernel: `torch.nn.functional.one_hot` takes int64, and checks its range in another.
    """
    return (index.unsqueeze(-1) == torch.arange(classes, device=index.device)).float()


def categorical_sample(probs: Tensor, uniform: Tensor) -> Tensor:
    """One-hot samples (..., C) in the dtype of `probs` (..., C), by inversion of `uniform` (...) in [0, 1)."""
    cumulative = probs.detach().cumsum(-1)
    # Scaled by the largest sum and not by 1, since rounding can leave it below the largest uniform number. `amax` and
    # not the last element, since only so is all of this one compiled kernel.
    beyond = cumulative <= uniform.unsqueeze(-1) * cumulative.amax(-1, keepdim=True)
    index = beyond.sum(-1, keepdim=True).clamp(max=probs.shape[-1] - 1)
    return one_hot(index.squeeze(-1), probs.shape[-1]).to(probs.dtype)


def straight_through(sample: Tensor, probs: Tensor) -> Tensor:
    """`sample` (..., C) with the gradient of `probs` (..., C)."""
    return sample + (probs - probs.detach())


def kl_divergence(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p || q) (...) of groups of categoricals (..., G, C), summed over groups."""
    return (log_p.exp() * (log_p - log_q)).sum((-2, -1))


def entropy(log_p: Tensor) -> Tensor:
    """Entropy (...) in nats of groups of categoricals (..., G, C), summed over groups."""
    return -(log_p.exp() * log_p).sum((-2, -1))


@dataclass
class NormalPolicy:
    """Independent normals over a continuous action (..., A): mean within (-1, 1), deviation within (0.1, 1)."""

    mean: Tensor
    std: Tensor

    @classmethod
    def from_output(cls, mean: Tensor, std: Tensor) -> "NormalPolicy":
        """From the two raw outputs (..., A) of a network: tanh of the one, 0.1 + 0.9 sigmoid(. + 2) of the other."""
        return cls(mean.float().tanh(), 0.9 * torch.sigmoid(std.float() + 2) + 0.1)

    def sample(self, noise: Tensor) -> Tensor:
        """An action (..., A) from standard normal noise (..., A). Not clipped: the environment does that."""
        return self.mean + self.std * noise

    def mode(self) -> Tensor:
        """The most likely action (..., A)."""
        return self.mean

    def log_prob(self, action: Tensor) -> Tensor:
        """Log-density (...), summed over the action's dimensions."""
        scaled = (action - self.mean) / self.std
        return (-0.5 * scaled.square() - self.std.log() - 0.5 * math.log(2 * math.pi)).sum(-1)

    def entropy(self) -> Tensor:
        """Entropy (...) in nats, summed over the action's dimensions."""
        return (0.5 + 0.5 * math.log(2 * math.pi) + self.std.log()).sum(-1)


@dataclass
class CategoricalPolicy:
    """Independent categoricals over a discrete action: one group of logits for each of its components."""

    log_probs: list[Tensor]  # one (..., C_i) for each component

    @classmethod
    def from_output(cls, logits: Tensor, sizes: tuple[int, ...]) -> "CategoricalPolicy":
        """From raw logits (..., sum of sizes). No unimix: the reference configures it, and its code never reads it."""
        return cls([part.log_softmax(-1) for part in logits.float().split(sizes, -1)])

    def sample(self, noise: Tensor) -> Tensor:
        """A one-hot action (..., sum of sizes) from uniform noise (..., components)."""
        draws = [categorical_sample(log_p.exp(), u) for log_p, u in zip(self.log_probs, noise.unbind(-1), strict=True)]
        return torch.cat(draws, -1)

    def mode(self) -> Tensor:
        """The most likely action, one-hot (..., sum of sizes)."""
        modes = [one_hot(log_p.argmax(-1), log_p.shape[-1]) for log_p in self.log_probs]
        return torch.cat(modes, -1)

    def log_prob(self, action: Tensor) -> Tensor:
        """Log-probability (...) of a one-hot action (..., sum of sizes)."""
        return (torch.cat(self.log_probs, -1) * action).sum(-1)

    def entropy(self) -> Tensor:
        """Entropy (...) in nats, summed over components."""
        return torch.stack([-(log_p.exp() * log_p).sum(-1) for log_p in self.log_probs]).sum(0)


@dataclass
class HybridPolicy:
    """Reals and choices at once, independent of one another: an action is (..., A) reals and then one-hot codes."""

    reals: NormalPolicy
    choices: CategoricalPolicy

    def _parts(self, both: Tensor) -> tuple[Tensor, Tensor]:
        """What concerns reals and what concerns choices, of actions or noise."""
        reals, choices = both.tensor_split([self.reals.mean.shape[-1]], -1)
        return reals, choices

    def sample(self, noise: Tensor) -> Tensor:
        """An action from noise: standard normal for each real, then uniform for each choice."""
        reals, choices = self._parts(noise)
        return torch.cat([self.reals.sample(reals), self.choices.sample(choices)], -1)

    def mode(self) -> Tensor:
        """The most likely action."""
        return torch.cat([self.reals.mode(), self.choices.mode()], -1)

    def log_prob(self, action: Tensor) -> Tensor:
        """Log-density (...) of all parts together."""
        reals, choices = self._parts(action)
        return self.reals.log_prob(reals) + self.choices.log_prob(choices)

    def entropy(self) -> Tensor:
        """Entropy (...) in nats, summed over parts."""
        return self.reals.entropy() + self.choices.entropy()


Policy = NormalPolicy | CategoricalPolicy | HybridPolicy
