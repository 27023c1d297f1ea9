"""Noisy recall as a stream: at every key that was seen before, name its value, which the next step then shows.

The rules are those of noisy_recall.py beside, which writes the same sequences for sequence models: Poli et al.,
"Mechanistic Design and Scaling of Hybrid Architectures" (2024), noisy in-context recall with many queries.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from gymnasium import spaces

from envs.probes.task import Episode, option, unanswered
from envs.probes.tokens import KeyValueTask


@dataclass(frozen=True, kw_only=True)
class NoisyRecall(KeyValueTask):
    """Slots of two steps, noise or a key and its value; the action at a known key is the answer.

    A key's value is drawn, with replacement, when the key first appears, and stays for the episode. The last slot is
    a pair of a known key, and one slot, drawn among all, is exempt from noise, so that there is such a key.
    """

    LEVELS: ClassVar[dict[str, dict[str, Any]]] = {
        "easy": {"slots": 32},
        "base": {},
        "hard": {"keys": 32, "values": 32, "noise": 0.8, "slots": 256},
    }

    slots: int = option(64, 2)

    @property
    def total_slots(self) -> int:  # noqa: D102
        return self.slots * self.gap

    @property
    def items(self) -> int:  # noqa: D102
        return self.keys

    @property
    def length(self) -> int:
        """Two steps a slot; the last value is shown when all is over."""
        return 2 * self.total_slots - 1

    @property
    def entries(self) -> dict[str, spaces.Space]:  # noqa: D102
        return {"token": spaces.Discrete(self.vocabulary.size)}

    @property
    def expected_questions(self) -> float:
        """Expected number of answers asked for in an episode, its highest expected return.

        Pairs, less the keys among them that appear first: n pairs show K (1 - (1 - 1/K)^n) of K keys on average, and
        a binomial n of S slots with probability p makes that K (1 - (1 - p/K)^S).
        """
        slots, keys, p = self.total_slots, self.keys, (1 - self.noise) / self.gap
        others = (slots - 1) * p - keys * (1 - (1 - p / keys) ** (slots - 1)) + 1 - (1 - p) ** (slots - 1)
        exempt = 2 + (slots - 2) * p - keys * (1 - (1 - 1 / keys) * (1 - p / keys) ** (slots - 2))
        return others / slots + exempt * (1 - 1 / slots)

    def draw(self, rng: np.random.Generator) -> Episode:  # noqa: D102
        slots = self.total_slots
        pair = rng.random(slots) < (1 - self.noise) / self.gap
        pair[rng.integers(slots)] = True
        pair[-1] = True
        keys = rng.integers(self.keys, size=slots)
        known = np.unique(keys[:-1][pair[:-1]])
        if len(known):
            keys[-1] = rng.choice(known)
        of_key = rng.integers(self.values, size=self.keys)
        tokens = self.vocabulary.draw_noise(rng, 2 * slots)
        answer, age = unanswered(self.length)
        shown: dict[int, int] = {}  # by key the step that last showed its value
        for slot in np.flatnonzero(pair):
            key, step = int(keys[slot]), 2 * int(slot)
            tokens[step], tokens[step + 1] = key, self.keys + of_key[key]
            if key in shown:
                answer[step], age[step] = of_key[key], step - shown[key]
            shown[key] = step + 1
        return Episode({"token": tokens}, answer, {"age": age})
