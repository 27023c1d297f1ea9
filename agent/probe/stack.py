"""Many seeds as one model: parameters with an axis of seeds in front, and one vectorised call for all of them."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import functional_call, vmap

from agent.cores import State
from agent.cores.reads import Read
from agent.probe.model import SequenceModel
from envs.probes.noisy_recall import Batch

Tensors = dict[str, Tensor]


class Stack:
    """S models of one kind. `parameters` are tensors (S, ...); those inside `models` are not used.

    Seeds that run together take the same path through their core's code. A core whose schedule moves one seed on to
    another path, as the release of an orthogonalised read does, puts it into another group.

    Args:
        models: of equal shapes, on the device where they run.
        dtype: of matrix products.
        tokens_at_once: most tokens of all seeds in one call; a batch of one seed is not split for training.
        compiled: compile the loss.
    """

    def __init__(self, models: Sequence[SequenceModel], dtype: torch.dtype, tokens_at_once: int, compiled: bool):
        self.models = list(models)
        self.dtype = dtype
        self.tokens_at_once = tokens_at_once
        self.compiled = compiled
        named = [dict(model.named_parameters()) for model in models]
        self.parameters: Tensors = {key: torch.stack([one[key].detach() for one in named]) for key in named[0]}
        self.paths = [0] * len(self.models)  # how often each seed's core has taken another path
        self._losses: dict[int, Callable[..., Tensor]] = {}
        self._of_group: dict[tuple[int, ...], tuple[slice | Tensor, Tensors]] = {}  # see `_place`

    def gradients(self, batch: Batch) -> tuple[Tensor, Tensors]:
        """Loss (S,) and its gradients, as `parameters`, on each seed's own batch: tensors (S, B, T)."""
        losses = torch.zeros(len(self.models), device=batch.inputs.device)
        gradients = {key: torch.zeros_like(value) for key, value in self.parameters.items()}
        for group in self.groups(batch.inputs[0].numel()):
            index, buffers = self._place(group)
            parameters = {key: value[index].requires_grad_() for key, value in self.parameters.items()}
            rows = [part[index] for part in (batch.inputs, batch.targets, batch.trained)]
            loss = self._loss(group)(parameters, buffers, *rows)
            found = torch.autograd.grad(loss.sum(), list(parameters.values()))
            for key, gradient in zip(parameters, found, strict=True):
                gradients[key][index] = gradient
            losses[index] = loss.detach()
        return losses, gradients

    @torch.no_grad()
    def run(self, tokens: Tensor) -> Iterator[tuple[list[int], slice, Tensor, State]]:
        """All seeds on the same tokens (N, T), in pieces.

        Yields the seeds of a piece, its rows, the logits (seeds, rows, T, vocab) and the memory (seeds, rows, ...).
        """
        rows = max(1, min(len(tokens), self.tokens_at_once // tokens.shape[1]))
        for group in self.groups(rows * tokens.shape[1]):
            index, buffers = self._place(group)
            parameters = {key: value[index] for key, value in self.parameters.items()}
            for start in range(0, len(tokens), rows):
                piece = slice(start, start + rows)
                call = vmap(self._call(group), in_dims=(0, 0, None))
                logits, state = call(parameters, buffers, tokens[piece])
                yield group, piece, logits, state

    def groups(self, tokens: int) -> list[list[int]]:
        """Seeds that run together, for this many tokens of each: of one path, of nearly equal numbers."""
        most = max(1, self.tokens_at_once // tokens)
        found = []
        for path in sorted(set(self.paths)):
            seeds = [seed for seed, own in enumerate(self.paths) if own == path]
            size = math.ceil(len(seeds) / math.ceil(len(seeds) / most))
            found += [seeds[start : start + size] for start in range(0, len(seeds), size)]
        return found

    def schedule(self, steps: int, metrics: Sequence[Mapping[str, float]]) -> None:
        """Let each seed's core change with training, by its own metrics."""
        for seed, (model, own) in enumerate(zip(self.models, metrics, strict=True)):
            self.paths[seed] += model.core.schedule(steps, own)
        self._of_group.clear()

    def state_dict(self) -> dict[str, Any]:
        """Parameters, and the buffers and path of each seed."""
        buffers = [{key: value.clone() for key, value in model.named_buffers()} for model in self.models]
        return {"parameters": self.parameters, "buffers": buffers, "paths": self.paths}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over a saved state, parameters in place."""
        for key, value in self.parameters.items():
            value.copy_(state["parameters"][key])
        for model, buffers in zip(self.models, state["buffers"], strict=True):
            model.load_state_dict(model.state_dict() | buffers, strict=False)
        self.paths = list(state["paths"])
        self._of_group.clear()

    def _call(self, group: list[int]) -> Callable[[Tensors, Tensors, Tensor], tuple[Tensor, State]]:
        """One seed's forward pass, with the code path of the group."""
        template = self.models[group[0]]
        return lambda parameters, buffers, tokens: functional_call(
            template, (parameters, buffers), (tokens, self.dtype)
        )

    def _loss(self, group: list[int]) -> Callable[..., Tensor]:
        """The mean loss (seeds,) of a group on its rows (seeds, B, T), compiled once for each path."""

        def loss(parameters: Tensors, buffers: Tensors, inputs: Tensor, targets: Tensor, trained: Tensor) -> Tensor:
            logits, _ = vmap(self._call(group))(parameters, buffers, inputs)
            each = F.cross_entropy(logits.flatten(0, 2), targets.flatten(), reduction="none").view_as(targets)
            return (each * trained).sum((1, 2)) / trained.sum((1, 2))

        if not self.compiled:
            return loss
        path = self.paths[group[0]]
        if path not in self._losses:
            # Where the compiler does not get through a core under vmap, that one runs as it is.
            self._losses[path] = torch.compile(loss, dynamic=False)
        return self._losses[path]

    def _place(self, group: list[int]) -> tuple[slice | Tensor, Tensors]:
        """Where a group's seeds lie, and its buffers (seeds, ...), kept until the next `schedule`."""
        key = tuple(group)
        if key not in self._of_group:
            contiguous = group == list(range(group[0], group[-1] + 1))
            device = next(iter(self.parameters.values())).device
            index = slice(group[0], group[-1] + 1) if contiguous else torch.tensor(group, device=device)
            self._of_group[key] = index, self._buffers(group)
        return self._of_group[key]

    def _buffers(self, group: list[int]) -> Tensors:
        """Buffers (seeds, ...) of a group.

        What a read keeps is left out where all seeds of the path agree on it, so that it is the template's own, without
        an axis of seeds: a kernel is faster so.
        """
        reads = {name for name, module in self.models[0].named_modules() if isinstance(module, Read)}
        alike = [seed for seed, path in enumerate(self.paths) if path == self.paths[group[0]]]
        every = [dict(model.named_buffers()) for model in self.models]
        found = {}
        for key in every[0]:
            of_read = key.rpartition(".")[0] in reads
            if not of_read or not all(torch.equal(every[seed][key], every[alike[0]][key]) for seed in alike):
                found[key] = torch.stack([every[seed][key] for seed in group])
        return found
