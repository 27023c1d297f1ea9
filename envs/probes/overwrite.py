"""Overwriting: keys get new values again and again, and only the last one counts."""

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from gymnasium import spaces

from envs.errors import EnvError
from envs.probes.task import Episode, option, unanswered
from envs.probes.tokens import KeyValueTask


@dataclass(frozen=True, kw_only=True)
class Overwrite(KeyValueTask):
    """Writes among noise, a delay, then every key once, whose present value is asked for.

    Every key is written once, and the writes left over go to keys drawn uniformly, all in random order, so that every
    key can be asked for: w, the writes of a key, is 1 + Binomial(writes - keys, 1 / keys). Values are drawn with
    replacement. `gap` stretches the slots of the writes and the delay.
    """

    LEVELS: ClassVar[dict[str, dict[str, Any]]] = {
        "easy": {"keys": 2, "writes": 4, "delay": 4},
        "base": {},
        "hard": {"writes": 64, "noise": 0.4, "delay": 32},
    }

    writes: int = option(16, 1)
    delay: int = option(8, 0)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.writes < self.keys:
            raise EnvError(f"option writes is {self.writes}; allowed is at least keys, which is {self.keys}")

    @property
    def total_slots(self) -> int:  # noqa: D102
        return round(self.writes * self.gap / (1 - self.noise))

    @property
    def items(self) -> int:  # noqa: D102
        return self.keys

    @property
    def length(self) -> int:  # noqa: D102
        return 2 * self.total_slots + self.delay * self.gap + self.keys

    @property
    def entries(self) -> dict[str, spaces.Space]:
        """The token, and whether it is a question."""
        return {"token": spaces.Discrete(self.vocabulary.size), "asked": spaces.Discrete(2)}

    def floors(self) -> dict[str, float]:
        """`any_write`: a memory that adds and never erases, and gives any of a key's values; `first_write`."""
        extra = self.writes - self.keys
        p = 1 / self.keys
        chance = [math.comb(extra, n) * p**n * (1 - p) ** (extra - n) for n in range(extra + 1)]
        any_write = sum(weight / (1 + count) for count, weight in enumerate(chance))
        return {
            "any_write": any_write + (1 - any_write) / self.values,
            "first_write": chance[0] + (1 - chance[0]) / self.values,
        }

    def draw(self, rng: np.random.Generator) -> Episode:  # noqa: D102
        extra = rng.integers(self.keys, size=self.writes - self.keys)
        keys = rng.permutation(np.concatenate([np.arange(self.keys), extra]))
        values = rng.integers(self.values, size=self.writes)
        stored, steps = self.store(keys, values, rng)
        last = np.zeros(self.keys, int)
        np.maximum.at(last, keys, np.arange(self.writes))  # by key its last write
        pause = self.vocabulary.draw_noise(rng, self.delay * self.gap)
        asked = rng.permutation(self.keys)
        tokens = np.concatenate([stored, pause, asked, self.vocabulary.draw_noise(rng, 1)])
        flags = np.zeros(self.length + 1, int)
        (answer, age), writes = unanswered(self.length), np.ones(self.length, int)
        questions = np.arange(self.length - self.keys, self.length)
        flags[questions], answer[questions] = 1, values[last[asked]]
        age[questions] = questions - steps[last[asked]]
        writes[questions] = np.bincount(keys, minlength=self.keys)[asked]
        return Episode({"token": tokens, "asked": flags}, answer, {"age": age, "writes": writes})
