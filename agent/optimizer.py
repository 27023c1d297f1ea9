"""DreamerV3's optimizer: clip each gradient against its weight, divide by its RMS, then average (LaProp's order).

Sources: adaptive gradient clipping, Brock et al. 2021 (arXiv 2102.06171); LaProp, Ziyin et al. 2020 (arXiv 2002.04839).
"""

from typing import Any

import torch
from torch import Tensor, nn

from agent.schema import Optimizer

# A weight of norm 0, such as a zero-initialised head, must still be able to move.
SMALLEST_WEIGHT_NORM = 1e-3


class LaProp:
    """All parameters of the agent under one optimizer, multi-tensor, without host synchronisation.

    For each parameter w with gradient g, at update t = 1, 2, ...:

        g <- g * min(1, agc * max(1e-3, |w|) / |g|)
        v <- beta2 v + (1 - beta2) g^2         g <- g / (sqrt(v / (1 - beta2^t)) + eps)
        m <- beta1 m + (1 - beta1) g           w <- w - lr_t m / (1 - beta1^t)

    lr_t rises linearly from 0, at the first update, to lr over `warmup` updates; each parameter learns at its share of
    lr_t, which is all of it if `shares` is None. The count lies on the device, so that a captured update goes on
    counting.
    """

    def __init__(self, parameters: list[nn.Parameter], config: Optimizer, shares: list[float] | None = None):
        self.parameters: list[Tensor] = [parameter.detach() for parameter in parameters]  # share storage
        self.config = config
        self.shares = shares
        self.count = torch.zeros((), dtype=torch.float64, device=parameters[0].device)
        self.square = [torch.zeros_like(parameter) for parameter in parameters]
        self.momentum = [torch.zeros_like(parameter) for parameter in parameters]

    @torch.no_grad()
    def norms(self, gradients: list[Tensor]) -> tuple[Tensor, Tensor]:
        """The norms of all P gradients and of all parameters, (P,) each."""
        return torch.stack(torch._foreach_norm(gradients)), torch.stack(torch._foreach_norm(self.parameters))

    @torch.no_grad()
    def step(
        self, gradients: list[Tensor], wanted: Tensor | None = None, norms: tuple[Tensor, Tensor] | None = None
    ) -> dict[str, Tensor]:
        """Update the parameters in place from gradients of their shapes, which are consumed.

        Args:
            gradients: one for each parameter.
            wanted: bool (); if it is false nothing changes, bit for bit, whatever the gradients hold. None is true.
            norms: what `norms` says of these gradients, for a compiled step: it would stack P numbers by P kernels.

        Returns:
            The global norms of gradients (before clipping) and parameters, and the learning rate, as numbers.
        """
        c = self.config
        if wanted is None:
            wanted = torch.ones_like(self.count, dtype=torch.bool)
        gradient_norms, weight_norms = norms or self.norms(gradients)
        limits = c.agc * weight_norms.clamp(min=SMALLEST_WEIGHT_NORM)
        clipping = 1 / (gradient_norms / limits).clamp(min=1)
        torch._foreach_mul_(gradients, list(clipping.unbind()))

        rate = c.lr * (self.count / c.warmup).clamp(max=1) if c.warmup else torch.full_like(self.count, c.lr)
        self.count += wanted
        zero, decay = torch.zeros_like(self.count, dtype=torch.float32), wanted.float()  # b^0 is 1: nothing decays
        gradients = [torch.where(wanted, gradient, zero) for gradient in gradients]
        torch._foreach_mul_(self.square, c.beta2**decay)
        torch._foreach_addcmul_(self.square, gradients, gradients, 1 - c.beta2)
        count = self.count.clamp(min=1)  # if the very first update is unwanted
        scale = torch.rsqrt(1 - c.beta2**count).float()
        denominator = torch._foreach_sqrt(self.square)
        torch._foreach_mul_(denominator, scale)
        torch._foreach_add_(denominator, c.eps)
        torch._foreach_div_(gradients, denominator)
        torch._foreach_mul_(self.momentum, c.beta1**decay)
        torch._foreach_add_(self.momentum, gradients, alpha=1 - c.beta1)
        size = (wanted * rate / (1 - c.beta1**count)).float()
        change = torch._foreach_mul(self.momentum, size)
        if self.shares is not None:
            change = torch._foreach_mul(change, self.shares)
        torch._foreach_sub_(self.parameters, change)
        return {
            "gradient_norm": gradient_norms.square().sum().sqrt(),
            "weight_norm": weight_norms.square().sum().sqrt(),
            "learning_rate": rate,
        }

    def state_dict(self) -> dict[str, Any]:
        """The count and both averages."""
        return {"count": self.count, "square": self.square, "momentum": self.momentum}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over a saved state, in place: captured updates hold on to these tensors."""
        self.count.copy_(state["count"])
        for name in ("square", "momentum"):
            for mine, saved in zip(getattr(self, name), state[name], strict=True):
                mine.copy_(saved)
