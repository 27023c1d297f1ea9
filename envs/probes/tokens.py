"""What the recall probes share: keys, values and noise as tokens, and pairs of them among slots of noise."""

from abc import abstractmethod
from dataclasses import dataclass
from typing import Any

import numpy as np

from envs.probes.task import Policy, Task, option


@dataclass(frozen=True)
class Vocabulary:
    """Keys come first, then values, then noise."""

    keys: int
    values: int
    noise: int

    @property
    def size(self) -> int:
        """How many tokens there are."""
        return self.keys + self.values + self.noise

    def is_value(self, token: int) -> bool:
        """Whether a token is a value."""
        return self.keys <= token < self.keys + self.values

    def draw_noise(self, rng: np.random.Generator, amount: int) -> np.ndarray:
        """`amount` tokens of noise, all equally likely."""
        return self.keys + self.values + rng.integers(self.noise, size=amount)


@dataclass(frozen=True, kw_only=True)
class KeyValueTask(Task):
    """A task whose answers are values of keys; `noise` is the share of noise among slots of two steps.

    With `gap` there are as many pairs as without it, in that many times the slots.
    """

    keys: int = option(8, 1)
    values: int = option(8, 2)
    noise_tokens: int = option(16, 1)
    noise: float = option(0.2, 0, 0.99)

    @property
    def vocabulary(self) -> Vocabulary:
        """The tokens."""
        return Vocabulary(self.keys, self.values, self.noise_tokens)

    @property
    @abstractmethod
    def total_slots(self) -> int:
        """Slots of two steps at the start of an episode."""

    @property
    def actions(self) -> int:  # noqa: D102
        return self.values

    @property
    def floor(self) -> float:
        """1 / values: any value is as likely as another."""
        return 1 / self.values

    def store(self, keys: np.ndarray, values: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Pairs of indices (P,), in their order, at random places among the slots; the other slots are noise.

        Returns:
            Tokens (2 S,), and for every pair the step (P,) that shows its value.
        """
        tokens = self.vocabulary.draw_noise(rng, 2 * self.total_slots)
        places = 2 * np.sort(rng.permutation(self.total_slots)[: len(keys)])
        tokens[places], tokens[places + 1] = keys, self.keys + values
        return tokens, places + 1

    def policy(self) -> Policy:
        """Answers a key with the value that followed it last."""
        vocabulary, known, before = self.vocabulary, dict[int, int](), -1

        def act(observation: dict[str, Any]) -> int:
            nonlocal before
            token = int(observation["token"])
            if vocabulary.is_value(token):
                known[before] = token - vocabulary.keys
            before = token
            return known.get(token, 0)

        return act
