"""Recall after a delay: pairs among noise, a stretch of noise, then some keys, whose values are asked for."""

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from gymnasium import spaces

from envs.errors import EnvError
from envs.probes.task import Episode, option, unanswered
from envs.probes.tokens import KeyValueTask


@dataclass(frozen=True, kw_only=True)
class StoreRecall(KeyValueTask):
    """Keys and values are drawn without replacement; no answer is ever shown.

    `noise` is the share of noise among the slots of the pairs. `gap` stretches these slots and the delay.
    """

    LEVELS: ClassVar[dict[str, dict[str, Any]]] = {
        "easy": {"pairs": 4, "delay": 4, "queries": 4},
        "base": {},
        "hard": {"keys": 32, "values": 32, "pairs": 16, "noise": 0.8, "delay": 128, "queries": 16},
    }

    pairs: int = option(8, 1)
    delay: int = option(32, 0)
    queries: int = option(8, 1)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.pairs > min(self.keys, self.values):
            raise EnvError(f"option pairs is {self.pairs}; allowed is at most the number of keys and of values")
        if self.queries > self.pairs:
            raise EnvError(f"option queries is {self.queries}; allowed is at most pairs, which is {self.pairs}")

    @property
    def total_slots(self) -> int:  # noqa: D102
        return round(self.pairs * self.gap / (1 - self.noise))

    @property
    def items(self) -> int:  # noqa: D102
        return self.pairs

    @property
    def length(self) -> int:  # noqa: D102
        return 2 * self.total_slots + self.delay * self.gap + self.queries

    @property
    def entries(self) -> dict[str, spaces.Space]:
        """The token, and whether it is a question."""
        return {"token": spaces.Discrete(self.vocabulary.size), "asked": spaces.Discrete(2)}

    def floors(self) -> dict[str, float]:
        """`bag`: to know which values there are, and not whose."""
        return {"bag": 1 / self.pairs}

    def draw(self, rng: np.random.Generator) -> Episode:  # noqa: D102
        keys = rng.permutation(self.keys)[: self.pairs]
        values = rng.permutation(self.values)[: self.pairs]
        stored, steps = self.store(keys, values, rng)
        pause = self.vocabulary.draw_noise(rng, self.delay * self.gap)
        asked = rng.permutation(self.pairs)[: self.queries]
        tokens = np.concatenate([stored, pause, keys[asked], self.vocabulary.draw_noise(rng, 1)])
        flags = np.zeros(self.length + 1, int)
        answer, age = unanswered(self.length)
        questions = np.arange(self.length - self.queries, self.length)
        flags[questions], answer[questions], age[questions] = 1, values[asked], questions - steps[asked]
        return Episode({"token": tokens, "asked": flags}, answer, {"age": age})
