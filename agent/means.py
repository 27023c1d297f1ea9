"""Metrics that stay on the device until somebody asks for their means."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from agent.distributed import ALONE, Ranks


class Means:
    """Sums what updates report and gives the means over all ranks, in one wait for the device."""

    def __init__(self, device: torch.device, ranks: Ranks = ALONE):
        self._device, self._ranks = device, ranks
        self._names: list[str] = []
        self._sums = torch.zeros(0, device=device)  # the last one counts the updates that were fine
        self._amount = 0

    def add(self, metrics: Mapping[str, Tensor], fine: Tensor) -> None:
        """Take in numbers (0-d tensors), of the same names at every call; they count only if `fine`, a bool ()."""
        if not self._names:
            self._names = list(metrics)
            self._sums = torch.zeros(len(metrics) + 1, device=self._device)
        numbers = [metrics[name].float() for name in self._names]
        told = torch.stack([*numbers, torch.ones_like(numbers[0])])
        self._sums += torch.where(fine, told, torch.zeros_like(told))
        self._amount += 1

    def take(self) -> dict[str, float]:
        """The means since the last call; empty if nothing came.

        `skipped_updates` says how many updates were not fine.
        """
        if not self._amount:
            return {}
        *sums, count = self._ranks.mean([self._sums])[0].tolist()
        skipped = self._amount - count
        self._sums.zero_()
        self._amount = 0
        means = {name: number / count for name, number in zip(self._names, sums, strict=True)} if count else {}
        return means | {"skipped_updates": skipped}

    def state_dict(self) -> dict[str, Any]:
        """What is summed so far."""
        return {"names": list(self._names), "sums": self._sums, "amount": self._amount}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from there."""
        self._names, self._amount = list(state["names"]), state["amount"]
        self._sums = state["sums"].to(self._device, copy=True)
