"""Counting: how often a symbol was shown so far, modulo some number. The probe that needs a state, not a store.

Parity is its smallest form, which additive memories are known to fail and gated recurrent networks to learn: Merrill
et al., "The Illusion of State in State-Space Models" (2024); Grazzi et al., "Unlocking State-Tracking in Linear RNNs
Through Negative Eigenvalues" (2025).
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import numpy as np
from gymnasium import spaces

from envs.probes.task import Episode, Policy, Task, option, unanswered

NOISE = 0


@dataclass(frozen=True, kw_only=True)
class Count(Task):
    """Each step is noise, a question about one of the symbols, or else a symbol that counts, all drawn independently.

    A `modulo` above the number of steps asks for the exact count. `gap` multiplies the steps.
    """

    LEVELS: ClassVar[dict[str, dict[str, Any]]] = {
        "easy": {"symbols": 2, "modulo": 2, "steps": 16, "noise": 0.0},
        "base": {},
        "hard": {"symbols": 5, "modulo": 5, "steps": 256},
    }

    symbols: int = option(3, 1)
    modulo: int = option(3, 2)
    steps: int = option(64, 2)
    noise: float = option(0.2, 0, 0.99)
    asked: float = option(0.25, 0.01, 0.99)  # share of questions among steps without noise

    @property
    def items(self) -> int:  # noqa: D102
        return self.symbols

    @property
    def length(self) -> int:  # noqa: D102
        return self.steps * self.gap

    @property
    def entries(self) -> dict[str, spaces.Space]:
        """Noise, then the symbols, then the questions about them."""
        return {"token": spaces.Discrete(1 + 2 * self.symbols)}

    @property
    def actions(self) -> int:  # noqa: D102
        return self.modulo

    @cached_property
    def floor(self) -> float:
        """The likeliest count at each step, of one who sees a clock and nothing else.

        Before step t the count of a symbol is Binomial(t, p), p = (1 - noise) (1 - asked) / symbols, whatever is
        asked; so g = mean over t of max over r of P(Binomial(t, p) mod M = r), by the recursion over t.
        """
        p = (1 - self.noise) * (1 - self.asked) / self.symbols
        chance, best = np.eye(self.modulo)[0], 0.0  # chance (M,): of each count modulo M
        for _ in range(self.length):
            best += chance.max()
            chance = (1 - p) * chance + p * np.roll(chance, 1)
        return best / self.length

    def floors(self) -> dict[str, float]:
        """`chance`: any answer."""
        return {"chance": 1 / self.modulo}

    def draw(self, rng: np.random.Generator) -> Episode:  # noqa: D102
        noise, asked = rng.random(self.length) < self.noise, rng.random(self.length) < self.asked
        symbol = rng.integers(self.symbols, size=self.length)
        counts = ~noise & ~asked
        shown = np.where(noise, NOISE, 1 + symbol + self.symbols * asked)
        so_far = np.cumsum(np.eye(self.symbols, dtype=int)[symbol] * counts[:, None], 0)  # (T, symbols)
        count = so_far[np.arange(self.length), symbol]
        answer, age = unanswered(self.length)
        question = ~noise & asked
        answer[question] = count[question] % self.modulo
        age[:] = 1 + np.arange(self.length)  # how long it has been counting
        return Episode({"token": np.append(shown, NOISE)}, answer, {"age": age})

    def policy(self) -> Policy:  # noqa: D102
        counts = [0] * self.symbols

        def act(observation: dict[str, Any]) -> int:
            kind, symbol = divmod(int(observation["token"]) - 1, self.symbols)
            if kind == 0:
                counts[symbol] += 1
            return counts[symbol] % self.modulo if kind == 1 else 0

        return act
