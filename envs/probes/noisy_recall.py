"""Associative recall as sequences of tokens: MAD's noisy in-context recall, and Zoology's multi-query recall.

Sources: Poli et al., "Mechanistic Design and Scaling of Hybrid Architectures" (2024), task noisy in-context recall with
many queries; Arora et al., "Zoology: Measuring and Improving Recall in Efficient Language Models" (2023), task MQAR.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from envs.errors import EnvError


class Batch(NamedTuple):
    """Sequences to predict: T inputs each, and at each of them the answer."""

    inputs: Tensor  # (B, T) int64
    targets: Tensor  # (B, T) int64
    trained: Tensor  # bool (B, T): where the loss is taken
    scored: Tensor  # bool (B, T): where accuracy is taken, values of keys that were seen before


class RecallTask(ABC):
    """A distribution over sequences."""

    vocab: int
    """Tokens are 0 .. vocab - 1."""

    @abstractmethod
    def sample(self, batch: int, generator: torch.Generator) -> Batch:
        """Fresh sequences (batch, T), on the generator's device."""

    @abstractmethod
    def floors(self, batch: Batch) -> dict[str, float]:
        """What needs no memory of associations scores on a batch, by the name of the guess."""


class Slots(NamedTuple):
    """S slots of two steps before they are written as tokens; what the RL form of the task is made of too."""

    pair: Tensor  # bool (B, S): whether the slot shows a key and its value; the others are noise
    key: Tensor  # (B, S) index of the key, below `keys`; of no meaning in noise
    value: Tensor  # (B, S) index of its value, below `keys`
    known: Tensor  # bool (B, S): a pair whose value follows from what was shown before
    bound: Tensor  # bool (B, S): a pair that gives its key a new value
    noise: Tensor  # (B, S, 2) indices of noise tokens


@dataclass(frozen=True)
class NoisyRecall(RecallTask):
    """Pairs of keys and values among slots of noise; next token prediction, scored at values of known keys.

    A sequence is length / 2 slots of two tokens. Each slot but the last is noise with probability `noise` (two tokens,
    independent), else a key, drawn uniformly, and its value. A value is drawn uniformly, with replacement, when its key
    is first used, and stays; with `rebind` above 0, a later use draws a new one with that probability, and from then on
    the new one counts. The last slot is a pair whose key was shown before. One slot, drawn among all, is exempt from
    noise, so that there is such a key; if that one is the last and all others are noise, no key is known.

    Tokens: keys, then as many values, then noise. Inputs are all tokens but the last, targets all but the first.

    Raises:
        EnvError: a number is out of range.
    """

    vocab: int  # keys, values and noise together
    length: int
    noise: float
    noise_vocab: int
    rebind: float = 0.0

    def __post_init__(self) -> None:
        pairs = self.vocab - self.noise_vocab
        if self.noise_vocab < 1 or pairs < 2 or pairs % 2:
            raise EnvError(
                f"vocab {self.vocab} with noise vocab {self.noise_vocab}: as many keys as values should be left, "
                "so give an even number above the noise vocab, which is at least 1"
            )
        if self.length < 4 or self.length % 2:
            raise EnvError(f"length {self.length}: sequences are slots of two tokens; give an even number from 4 on")
        for name, share in (("noise", self.noise), ("rebind", self.rebind)):
            if not 0 <= share <= 1:
                raise EnvError(f"{name} {share:g}: give a probability, between 0 and 1")

    @property
    def keys(self) -> int:
        """How many keys there are, and how many values."""
        return (self.vocab - self.noise_vocab) // 2

    def sample(self, batch: int, generator: torch.Generator) -> Batch:  # noqa: D102
        slots = self.sample_slots(batch, generator)
        pairs = torch.stack([slots.key, self.keys + slots.value], -1)
        tokens = torch.where(slots.pair[..., None], pairs, 2 * self.keys + slots.noise).flatten(1)
        scored = torch.stack([torch.zeros_like(slots.known), slots.known], -1).flatten(1)[:, 1:]
        return Batch(tokens[:, :-1], tokens[:, 1:], torch.ones_like(scored), scored)

    def sample_slots(self, batch: int, generator: torch.Generator) -> Slots:
        """The slots of `batch` sequences."""
        shape, device = (batch, self.length // 2), generator.device
        last = shape[1] - 1

        def uniform(*size: int) -> Tensor:
            return torch.rand(size, generator=generator, device=device)

        def choice(amount: int, *size: int) -> Tensor:
            return torch.randint(amount, size, generator=generator, device=device)

        pair = uniform(*shape) >= self.noise
        pair.scatter_(1, choice(shape[1], batch, 1), True)
        pair[:, last] = True
        key = choice(self.keys, *shape)
        # The last key is uniform among those shown: the shown one that comes first in a random order.
        times = torch.zeros(batch, self.keys, dtype=torch.int32, device=device)
        shown = times.scatter_add(1, key[:, :last], pair[:, :last].int()) > 0
        key[:, last] = (uniform(batch, self.keys) + shown).argmax(-1)
        again = uniform(*shape) < self.rebind
        again[:, last] = False
        known, bound, source = self._bindings(pair, key, again)
        value = choice(self.keys, *shape).gather(1, source)
        return Slots(pair, key, value, known, bound, choice(self.noise_vocab, *shape, 2))

    def _bindings(self, pair: Tensor, key: Tensor, again: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Which slots are known, which bind, and from which slot each has its value, all (B, S)."""
        slot = torch.arange(key.shape[1], device=key.device).expand_as(key)
        # In the order of keys, then time, the uses of a key are neighbours. Noise is the use of one more key.
        group = torch.where(pair, key, self.keys)
        order = (group * key.shape[1] + slot).argsort(-1)
        group = group.gather(1, order)
        first = F.pad(group[:, 1:] != group[:, :-1], (1, 0), value=True)
        bound = first | again.gather(1, order)
        source = order.gather(1, torch.where(bound, slot, 0).cummax(-1).values)
        back = order.argsort(-1)
        bound, source = bound.gather(1, back) & pair, source.gather(1, back)
        return pair & ~bound, bound, source

    def floors(self, batch: Batch) -> dict[str, float]:
        """Scores of guessing any value, the value that most keys have at the time, and the value shown last."""
        keys, vocab = self.keys, self.vocab - self.noise_vocab
        tokens = torch.cat([batch.inputs, batch.targets[:, -1:]], 1).unflatten(1, (-1, 2))  # (B, S, 2)
        scored = batch.scored[:, ::2]
        pair = tokens[..., 0] < keys
        key, value = tokens[..., 0].clamp(max=keys - 1), tokens[..., 1].clamp(keys, vocab - 1) - keys

        # A binding counts from its own slot to the next binding of its key.
        slots = key.shape[1]
        slot = torch.arange(slots, device=key.device).expand_as(key)
        bound = pair & ~scored
        group = torch.where(bound, key, keys)
        order = (group * slots + slot).argsort(-1)
        group = group.gather(1, order)
        following = F.pad(torch.where(group[:, 1:] == group[:, :-1], order[:, 1:], slots), (0, 1), value=slots)
        until = following.gather(1, order.argsort(-1))
        counts = torch.zeros(len(key), (slots + 1) * keys, dtype=torch.int32, device=key.device)
        counts = counts.scatter_add(1, slot * keys + value, bound.int())
        counts = counts.scatter_add(1, until * keys + value, -bound.int())
        counts = counts.unflatten(1, (slots + 1, keys)).cumsum(1)[:, :-2]  # after each slot but the last

        latest = torch.where(pair, slot, 0).cummax(-1).values
        guesses = {"bag": counts.argmax(-1), "last": value.gather(1, latest)[:, :-1]}
        right = {name: (guess == value[:, 1:])[scored[:, 1:]] for name, guess in guesses.items()}
        return {"chance": 1 / keys} | {name: hits.float().mean().item() for name, hits in right.items()}


@dataclass(frozen=True)
class MultiQueryRecall(RecallTask):
    """All pairs first, then each key once more, whose value is the answer but is not shown.

    Keys are 1 .. vocab / 2 - 1 and values vocab / 2 .. vocab - 1, both without replacement. The queries lie at even
    places of the rest, the n-th of them (from 1) with a weight of n^(power - 1); what is left is filled with 0, or with
    random tokens. The loss is taken where accuracy is, at queries.

    Raises:
        EnvError: a number is out of range.
    """

    vocab: int
    length: int
    pairs: int
    power: float
    random_fill: bool

    def __post_init__(self) -> None:
        if self.vocab < 4 or self.vocab % 2:
            raise EnvError(f"vocab {self.vocab}: half of it is values; give an even number from 4 on")
        if not 1 <= self.pairs < self.vocab // 2:
            raise EnvError(f"pairs {self.pairs}: with vocab {self.vocab} there are 1 to {self.vocab // 2 - 1} keys")
        if self.length % 2 or self.length < 4 * self.pairs:
            raise EnvError(
                f"length {self.length}: {self.pairs} pairs and queries need an even {4 * self.pairs} or more"
            )
        if self.power <= 0:
            raise EnvError(f"power {self.power:g}: give a positive number, 0.01 puts most queries early")

    def sample(self, batch: int, generator: torch.Generator) -> Batch:  # noqa: D102
        device, half, context = generator.device, self.vocab // 2, 2 * self.pairs

        def uniform(*size: int) -> Tensor:
            return torch.rand(size, generator=generator, device=device)

        keys = 1 + uniform(batch, half - 1).topk(self.pairs).indices
        values = half + uniform(batch, half).topk(self.pairs).indices
        # Largest exponential-scaled uniforms: draws without replacement in proportion to the weights.
        space = (self.length - context) // 2
        weight = torch.arange(1, space + 1, device=device) ** (self.power - 1)
        places = context + 2 * (uniform(batch, space).log() / weight).topk(self.pairs).indices
        inputs = torch.zeros(batch, self.length, dtype=torch.int64, device=device)
        if self.random_fill:
            inputs.random_(self.vocab, generator=generator)
        inputs[:, :context] = torch.stack([keys, values], -1).flatten(1)
        inputs.scatter_(1, places, keys)
        targets = torch.zeros_like(inputs).scatter_(1, places, values)
        scored = torch.zeros_like(inputs, dtype=torch.bool).scatter_(1, places, True)
        return Batch(inputs, targets, scored, scored)

    def floors(self, batch: Batch) -> dict[str, float]:
        """Scores of guessing any value, and any of those shown."""
        return {"chance": 2 / self.vocab, "bag": 1 / self.pairs}
