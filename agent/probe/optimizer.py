"""AdamW over stacked seeds: one fused step for all of them, each clipped by the norm of its own gradient.

Source: Loshchilov and Hutter, "Decoupled Weight Decay Regularization" (2019).
"""

import math
from typing import Any

import torch
from torch import Tensor

from agent.probe.config import Training

CLIP_EPS = 1e-6


def learning_rate(config: Training, step: int) -> float:
    """The rate of update `step`, counted from 0: a linear warm-up, times a cosine to 0 or nothing."""
    warmup = min(1.0, (step + 1) / config.warmup) if config.warmup else 1.0
    decay = (1 + math.cos(math.pi * step / config.steps)) / 2 if config.schedule == "cosine" else 1.0
    return config.lr * warmup * decay


class StackedAdamW:
    """AdamW works on each number alone, so that stacked parameters (S, ...) learn as S models would."""

    def __init__(self, parameters: dict[str, Tensor], config: Training):
        self.parameters = list(parameters.values())
        self.config = config
        self.optimizer = torch.optim.AdamW(
            self.parameters,
            lr=config.lr,
            betas=(config.beta1, config.beta2),
            weight_decay=config.weight_decay,
            fused=True,
        )

    @torch.no_grad()
    def step(self, gradients: dict[str, Tensor], step: int) -> None:
        """Update `step` (from 0) of the parameters, in place, by gradients of their shapes, which are consumed."""
        found = list(gradients.values())
        norm = torch.stack([gradient.flatten(1).norm(dim=1) for gradient in found]).norm(dim=0)  # (S,)
        scale = (self.config.clip / (norm + CLIP_EPS)).clamp(max=1)
        for parameter, gradient in zip(self.parameters, found, strict=True):
            parameter.grad = gradient.mul_(scale.view(-1, *[1] * (gradient.dim() - 1)))
        self.optimizer.param_groups[0]["lr"] = learning_rate(self.config, step)
        self.optimizer.step()
        for parameter in self.parameters:
            parameter.grad = None

    def state_dict(self) -> dict[str, Any]:
        """Both averages and the count."""
        return self.optimizer.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over a saved state."""
        self.optimizer.load_state_dict(state)
