"""How well stacked models recall: accuracy on scored positions, and what their cores say of their memories."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from agent.probe.stack import Stack
from envs.probes.noisy_recall import Batch

RECORDED = ("rank", "alpha")
"""A core's diagnostics that are worth a curve have one of these in their names."""


class Scores(NamedTuple):
    """One number for each of S seeds."""

    accuracy: list[float]  # share of scored tokens that are right
    macro: list[float]  # mean of the shares of all classes
    diagnostics: dict[str, list[float]]

    def of(self, seed: int) -> dict[str, float]:
        """All numbers of one seed, by name."""
        own = {"accuracy": self.accuracy[seed], "macro_accuracy": self.macro[seed]}
        return own | {key: values[seed] for key, values in self.diagnostics.items()}


@torch.no_grad()
def score(stack: Stack, batch: Batch, vocab: int) -> Scores:
    """Score all seeds on the same sequences (N, T)."""
    seeds, device = len(stack.models), batch.inputs.device
    shown, guessed, right = (torch.zeros(seeds, vocab, device=device) for _ in range(3))
    numbers: dict[str, list[Tensor]] = {}
    for group, rows, logits, state in stack.run(batch.inputs):
        targets, scored = batch.targets[rows], batch.scored[rows]
        guesses, answers = logits.argmax(-1)[:, scored], targets[scored]  # (seeds, scored), (scored)
        hit = (guesses == answers).float()
        for place, seed in enumerate(group):
            shown[seed] += torch.bincount(answers, minlength=vocab)
            guessed[seed] += torch.bincount(guesses[place], minlength=vocab)
            right[seed] += torch.bincount(answers, hit[place], minlength=vocab)
            if rows.start == 0:  # one piece says enough of memories
                core = stack.models[seed].core
                for key, value in core.diagnostics({name: part[place] for name, part in state.items()}).items():
                    if any(word in key for word in RECORDED):
                        numbers.setdefault(key, [torch.zeros(())] * seeds)[seed] = value
    return Scores(
        (right.sum(1) / shown.sum(1)).tolist(),
        macro_accuracy(shown, guessed, right).tolist(),
        {key: [value.item() for value in values] for key, values in numbers.items()},
    )


def macro_accuracy(shown: Tensor, guessed: Tensor, right: Tensor) -> Tensor:
    """The mean over classes of the share that is right, as MAD takes it: counts (S, vocab) -> (S,).

    A class that was neither shown nor guessed is left out; one that was only guessed counts as 0.
    """
    share = right / shown.clamp(min=1)
    return share.sum(1) / ((shown + guessed) > 0).sum(1)


def read_with(stack: Stack, models: list[Any]) -> Stack | None:
    """The trained parameters in models with another core, or None where they do not fit."""
    shapes = {key: tuple(value.shape[1:]) for key, value in stack.parameters.items()}
    if {key: tuple(value.shape) for key, value in models[0].named_parameters()} != shapes:
        return None
    other = Stack(models, stack.dtype, stack.tokens_at_once, compiled=False)
    other.parameters = stack.parameters
    return other
