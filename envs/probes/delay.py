"""Delay, the T-maze without its corridor: a cue, a wait, and the choice that the cue tells.

Bakker, "Reinforcement Learning with Long Short-Term Memory" (2002), and the passive form of Ni et al., "When Do
Transformers Shine in RL?" (2023). With one item of two classes and blanks it is bsuite's memory_len, with many items
its memory_size (Osband et al., "Behaviour Suite for Reinforcement Learning", 2020).
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from gymnasium import spaces

from envs.probes.task import Episode, Policy, Task, option, unanswered

BLANK = 0


@dataclass(frozen=True, kw_only=True)
class Delay(Task):
    """The first step shows `items` cues of `classes` each, the last asks for one of them; only that one is scored.

    The wait between them shows blanks, or with `distractors` tokens of noise. `gap` stretches the wait.
    """

    LEVELS: ClassVar[dict[str, dict[str, Any]]] = {
        "easy": {"classes": 2, "delay": 4},
        "base": {},
        "hard": {"classes": 16, "delay": 512},
    }

    classes: int = option(4, 2)
    items: int = option(1, 1)
    delay: int = option(64, 0)
    distractors: bool = option(True)
    noise_tokens: int = option(4, 1)

    @property
    def length(self) -> int:  # noqa: D102
        return self.delay * self.gap + 2

    @property
    def entries(self) -> dict[str, spaces.Space]:
        """For each item blank, a class or noise; and which item is asked for, 0 none."""
        shown = 1 + self.classes + (self.noise_tokens if self.distractors else 0)
        return {"cue": spaces.MultiDiscrete([shown] * self.items), "asked": spaces.Discrete(self.items + 1)}

    @property
    def actions(self) -> int:  # noqa: D102
        return self.classes

    @property
    def floor(self) -> float:
        """1 / classes: any class is as likely as another."""
        return 1 / self.classes

    def draw(self, rng: np.random.Generator) -> Episode:  # noqa: D102
        wait = self.delay * self.gap
        cues = np.full((self.length + 1, self.items), BLANK)
        item, classes = rng.integers(self.items), rng.integers(self.classes, size=self.items)
        cues[0] = 1 + classes
        if self.distractors:
            cues[1 : 1 + wait] = 1 + self.classes + rng.integers(self.noise_tokens, size=(wait, self.items))
        asked = np.zeros(self.length + 1, int)
        answer, age = unanswered(self.length)
        asked[wait + 1], answer[wait + 1], age[wait + 1] = 1 + item, classes[item], wait + 1
        return Episode({"cue": cues, "asked": asked}, answer, {"age": age})

    def policy(self) -> Policy:  # noqa: D102
        cues: list[np.ndarray] = []

        def act(observation: dict[str, Any]) -> int:
            cues.append(observation["cue"])
            return int(cues[0][observation["asked"] - 1]) - 1 if observation["asked"] else 0

        return act
