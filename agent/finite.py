"""Numbers that are not finite: found on the device, named on the host, and the batch that had them kept."""

from typing import NamedTuple

import torch
from torch import Tensor

from agent.distributed import ALONE, Ranks

Tensors = dict[str, Tensor]


class Found(NamedTuple):
    """What went wrong since the last look."""

    names: list[str]  # of the tensors, those that were not finite most often first; of this rank, perhaps none
    batch: Tensors  # the first batch in which something was not finite, on the CPU
    most_in_a_row: int  # updates that were skipped one after the other


class Watch:
    """Says in every update whether all its numbers are finite, without waiting for the device.

    Of each tensor the largest size is taken, which is NaN or infinite if any of its numbers is. What is found is
    counted on the device until `look` asks for it. After the first update nothing is allocated that lasts, so that
    updates can be captured. If something is wrong on one rank, the update is wrong on all.
    """

    def __init__(self, device: torch.device, ranks: Ranks = ALONE):
        self._ranks = ranks
        self.names: list[str] = []
        self.in_a_row = torch.zeros((), dtype=torch.int64, device=device)
        self._most_in_a_row = torch.zeros_like(self.in_a_row)
        self._counts = self.in_a_row.new_zeros(0)
        self._batch: Tensors = {}

    @torch.no_grad()
    def check(self, tensors: Tensors, batch: Tensors) -> Tensor:
        """Whether all of these are finite, on all ranks, bool ().

        Args:
            tensors: by the name they are called in messages; the same names at every call, of floating point.
            batch: (B, ...) what the update learns from, to keep if something is wrong.
        """
        sizes = torch.stack([size.float() for size in torch._foreach_norm(list(tensors.values()), float("inf"))])
        finite = sizes.isfinite()
        fine = self._ranks.all(finite.all())
        if not self.names:
            self.names = list(tensors)
            self._counts = self._counts.new_zeros(len(tensors))
            self._batch = {key: torch.zeros_like(value) for key, value in batch.items()}
        self._counts += ~finite
        first = ~fine & (self._most_in_a_row == 0)
        for key, kept in self._batch.items():
            kept.copy_(torch.where(first, batch[key], kept))
        self.in_a_row.copy_((self.in_a_row + 1) * ~fine)
        self._most_in_a_row.copy_(torch.maximum(self._most_in_a_row, self.in_a_row))
        return fine

    def look(self) -> Found | None:
        """What was not finite since the last look, None if everything was; waits for the device."""
        most = int(self._most_in_a_row)
        if not most:
            return None
        counts = self._counts.tolist()
        names = [self.names[i] for i in sorted(range(len(counts)), key=lambda i: -counts[i]) if counts[i]]
        found = Found(names, {key: value.cpu().clone() for key, value in self._batch.items()}, most)
        self._counts.zero_()
        self._most_in_a_row.zero_()
        return found


def restore(tensors: list[Tensor], before: list[Tensor], fine: Tensor) -> None:
    """Tensors as they were `before`, unless everything is `fine`; in place."""
    for tensor, old in zip(tensors, before, strict=True):
        tensor.copy_(torch.where(fine, tensor, old))


def first_not_finite(tensors: Tensors) -> tuple[str, int] | None:
    """The key and the row of the first of the tensors (N, ...) that is not finite; waits for the device."""
    for key, value in tensors.items():
        wrong = ~value.isfinite().flatten(1).all(1)
        if wrong.any():
            return key, int(wrong.nonzero()[0, 0])
    return None
