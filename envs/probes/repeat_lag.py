"""Repetition: at every step the symbol of some steps ago, or a whole list backwards.

The tasks RepeatPrevious and Autoencode of Morad et al., "POPGym" (2023), with symbols drawn with replacement.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from gymnasium import spaces

from envs.probes.task import Episode, Policy, Task, option, unanswered


@dataclass(frozen=True, kw_only=True)
class RepeatLag(Task):
    """A symbol a step, and after the first `lag` steps the answer is always the one shown `lag` steps ago.

    With `backwards`, `lag` symbols are shown and then asked for from the last to the first, under a mark that stands
    for "go on". To hold what is asked for takes lag * log2(symbols) bits. `gap` multiplies the lag.
    """

    LEVELS: ClassVar[dict[str, dict[str, Any]]] = {
        "easy": {"lag": 1, "questions": 31},
        "base": {},
        "hard": {"lag": 31},
    }

    symbols: int = option(4, 2)
    lag: int = option(15, 1)
    questions: int = option(64, 1)  # of the form that is not backwards
    backwards: bool = option(False)

    @property
    def _lag(self) -> int:
        return self.lag * self.gap

    @property
    def items(self) -> int:  # noqa: D102
        return self._lag

    @property
    def length(self) -> int:  # noqa: D102
        return self._lag + (self._lag if self.backwards else self.questions)

    @property
    def entries(self) -> dict[str, spaces.Space]:
        """The symbol, or the mark."""
        return {"symbol": spaces.Discrete(self.symbols + 1)}

    @property
    def actions(self) -> int:  # noqa: D102
        return self.symbols

    @property
    def floor(self) -> float:
        """1 / symbols: any symbol is as likely as another."""
        return 1 / self.symbols

    def draw(self, rng: np.random.Generator) -> Episode:  # noqa: D102
        shown = np.full(self.length + 1, self.symbols)
        symbols = rng.integers(self.symbols, size=self._lag if self.backwards else self.length)
        shown[: len(symbols)] = symbols
        answer, age = unanswered(self.length)
        ages = 1 + 2 * np.arange(self._lag) if self.backwards else self._lag
        age[self._lag :] = ages
        asked = np.arange(self._lag, self.length)
        answer[asked] = shown[asked - ages]
        return Episode({"symbol": shown}, answer, {"age": age})

    def policy(self) -> Policy:  # noqa: D102
        seen: list[int] = []

        def act(observation: dict[str, Any]) -> int:
            symbol = int(observation["symbol"])
            if symbol == self.symbols:  # the mark
                return seen.pop()
            seen.append(symbol)
            return seen[-1 - self._lag] if len(seen) > self._lag else 0

        return act
