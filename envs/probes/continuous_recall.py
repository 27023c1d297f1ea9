"""Recall by likeness: keys are directions, asked for with noise on them; values stay discrete."""

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import numpy as np
from gymnasium import spaces

from envs.errors import EnvError
from envs.probes.task import Episode, Policy, Task, option, unanswered

NO_VALUE = 0


@dataclass(frozen=True, kw_only=True)
class ContinuousRecall(Task):
    """Pairs among noise, a delay of noise, then noisy looks at some keys, whose values are asked for.

    Keys are orthonormal directions, fresh in every episode, shown clean with their pair: first the key, then its
    value. Noise is a random unit vector a step, without a value. A question shows a key with Gaussian noise of
    standard deviation `blur` on every coordinate. `gap` stretches the slots of the pairs and the delay.
    """

    LEVELS: ClassVar[dict[str, dict[str, Any]]] = {
        "easy": {"pairs": 4, "delay": 4, "queries": 4, "blur": 0.1},
        "base": {},
        "hard": {"dims": 32, "values": 32, "pairs": 16, "noise": 0.8, "delay": 128, "queries": 16},
    }

    dims: int = option(16, 2)
    values: int = option(8, 2)
    pairs: int = option(8, 2)
    noise: float = option(0.2, 0, 0.99)
    delay: int = option(32, 0)
    queries: int = option(8, 1)
    blur: float = option(0.3, 1e-3)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.pairs > min(self.dims, self.values):
            raise EnvError(f"option pairs is {self.pairs}; allowed is at most the number of dims and of values")
        if self.queries > self.pairs:
            raise EnvError(f"option queries is {self.queries}; allowed is at most pairs, which is {self.pairs}")

    @property
    def _slots(self) -> int:
        return round(self.pairs * self.gap / (1 - self.noise))

    @property
    def items(self) -> int:  # noqa: D102
        return self.pairs

    @property
    def length(self) -> int:  # noqa: D102
        return 2 * self._slots + self.delay * self.gap + self.queries

    @property
    def entries(self) -> dict[str, spaces.Space]:
        """The direction, the value (0: none), and whether it is a question."""
        direction = spaces.Box(-np.inf, np.inf, (self.dims,), np.float32)
        return {"key": direction, "value": spaces.Discrete(1 + self.values), "asked": spaces.Discrete(2)}

    @property
    def actions(self) -> int:  # noqa: D102
        return self.values

    @property
    def floor(self) -> float:
        """1 / values: any value is as likely as another."""
        return 1 / self.values

    @cached_property
    def optimum(self) -> float:
        """The nearest of P orthonormal keys is the right one: integral of phi(z) Phi(z + 1 / blur)^(P - 1) dz."""
        z = np.linspace(-10, 10, 4001)
        below = np.array([0.5 * (1 + math.erf((place + 1 / self.blur) / math.sqrt(2))) for place in z])
        density = np.exp(-(z**2) / 2) / math.sqrt(2 * math.pi)
        return float(np.sum(density * below ** (self.pairs - 1)) * (z[1] - z[0]))

    def floors(self) -> dict[str, float]:
        """`bag`: to know which values there are, and not whose."""
        return {"bag": 1 / self.pairs}

    def draw(self, rng: np.random.Generator) -> Episode:  # noqa: D102
        shown = unit(rng.standard_normal((self.length + 1, self.dims)))
        value, asked = np.full(self.length + 1, NO_VALUE), np.zeros(self.length + 1, int)
        answer, age = unanswered(self.length)
        keys = orthonormal(rng, self.pairs, self.dims)
        values = rng.permutation(self.values)[: self.pairs]
        places = 2 * rng.permutation(self._slots)[: self.pairs]
        shown[places], value[places + 1] = keys, 1 + values
        chosen = rng.permutation(self.pairs)[: self.queries]
        questions = np.arange(self.length - self.queries, self.length)
        shown[questions] = keys[chosen] + self.blur * rng.standard_normal((self.queries, self.dims))
        asked[questions], answer[questions] = 1, values[chosen]
        age[questions] = questions - (places[chosen] + 1)
        return Episode({"key": shown.astype(np.float32), "value": value, "asked": asked}, answer, {"age": age})

    def policy(self) -> Policy:
        """The value of the key that the question is nearest to."""
        keys, values, before = list[np.ndarray](), list[int](), np.zeros(self.dims)

        def act(observation: dict[str, Any]) -> int:
            nonlocal before
            if observation["value"] != NO_VALUE:
                keys.append(before)
                values.append(int(observation["value"]) - 1)
            before = observation["key"]
            return values[int(np.argmax(np.stack(keys) @ before))] if observation["asked"] else 0

        return act


def unit(vectors: np.ndarray) -> np.ndarray:
    """Vectors (..., d) scaled to length 1."""
    return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)


def orthonormal(rng: np.random.Generator, amount: int, dims: int) -> np.ndarray:
    """Orthonormal rows (amount, dims) in uniformly random directions."""
    q, r = np.linalg.qr(rng.standard_normal((dims, amount)))
    return (q * np.sign(np.diag(r))).T
