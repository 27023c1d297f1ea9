"""What a probe is: rules that draw a whole episode before it begins, and what it is worth to remember in it."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import numpy as np
from gymnasium import spaces

from envs import options
from envs.options import option

NOT_ASKED = -1
"""The answer at a step whose action does not count."""

Policy = Callable[[dict[str, Any]], int]
"""Gives an action for each observation of one episode, in their order."""


class Episode(NamedTuple):
    """T steps. No action changes what is shown, so that all of it is known at the start."""

    shown: dict[str, np.ndarray]  # by entry of the observation (T + 1, ...): before each action, and after the last
    answer: np.ndarray  # (T,) int64: the right action, or NOT_ASKED
    labels: dict[str, np.ndarray]  # by name (T,) int64 from 1 on: what recall is told apart by, as "age" in steps


@dataclass(frozen=True, kw_only=True)
class Options(options.Options):
    """What a user may set about a probe: its fields.

    Attributes:
        LEVELS: by name the options that make the probe easy, middling or hard.
    """

    LEVELS: ClassVar[dict[str, dict[str, Any]]]


@dataclass(frozen=True, kw_only=True)
class Task(Options, ABC):
    """A distribution over episodes.

    Attributes:
        gap: how many times farther a use is from what it needs, all else equal; to see what a trained memory does
            beyond the distances that it was trained on.
    """

    gap: int = option(1, 1)

    @property
    @abstractmethod
    def length(self) -> int:
        """T: actions in every episode."""

    @property
    @abstractmethod
    def entries(self) -> dict[str, spaces.Space]:
        """The observation: Discrete, MultiDiscrete and one-dimensional Box spaces by name."""

    @property
    @abstractmethod
    def actions(self) -> int:
        """How many answers there are to choose from."""

    @property
    @abstractmethod
    def items(self) -> int:
        """P: things to hold at once. Who holds m of them and guesses otherwise has the score m / P."""

    @property
    @abstractmethod
    def floor(self) -> float:
        """Expected share of right answers of the best guess without memory, g."""

    @property
    def optimum(self) -> float:
        """Expected share of right answers of the best policy."""
        return 1.0

    def floors(self) -> dict[str, float]:
        """Expected shares of right answers of further guesses, by name: with a memory that is not the one asked for."""
        return {}

    @abstractmethod
    def draw(self, rng: np.random.Generator) -> Episode:
        """A fresh episode."""

    @abstractmethod
    def policy(self) -> Policy:
        """The best policy, for one episode; it sees what the agent sees, and forgets nothing."""

    def score(self, accuracy: float) -> float:
        """0 for the best guess without memory, 1 for the best policy: (accuracy - g) / (optimum - g)."""
        return (accuracy - self.floor) / (self.optimum - self.floor)

    def metrics(self, episode: Episode, right: np.ndarray) -> dict[str, float]:
        """What an episode tells about memory, given which actions were the right answer (T,).

        Returns:
            `accuracy`, `score`, and `recall_<label>_<bound>`, the accuracy where the label is at most the bound, a
            power of two, and above half of it. Nothing where nothing was asked.
        """
        asked = episode.answer != NOT_ASKED
        if not asked.any():
            return {}
        hits = right[asked]
        accuracy = float(hits.mean())
        numbers = {"accuracy": accuracy, "score": self.score(accuracy)}
        for name, label in episode.labels.items():
            bounds = 2 ** np.ceil(np.log2(label[asked])).astype(int)
            numbers |= {f"recall_{name}_{bound}": float(hits[bounds == bound].mean()) for bound in np.unique(bounds)}
        return numbers


def unanswered(steps: int) -> tuple[np.ndarray, np.ndarray]:
    """Answers (T,) of an episode where nothing is asked yet, and ones (T,) for a label."""
    return np.full(steps, NOT_ASKED), np.ones(steps, int)
