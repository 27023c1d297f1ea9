"""Episodes that begin from seeds of their own, so that a running one can be lived through again."""

import multiprocessing
import random
from typing import Any, NamedTuple

import gymnasium
import numpy as np

LONGEST = 100_000  # agent steps of an episode that are remembered; a longer one cannot be lived through again


class Past(NamedTuple):
    """A running episode: its number, the actions (L, ...) since its beginning, the observation that they led to.

    Without an observation it is lost, and the next one begins in its place.
    """

    episode: int
    actions: np.ndarray
    observation: dict[str, np.ndarray] | None


class Episodes(gymnasium.Wrapper):
    """Makes each episode of an environment a function of a seed and the actions in it.

    A reset with a seed begins episode 0 from that seed; episode k > 0 begins from a seed drawn from it and k. So an
    environment needs no way to save its state: `past`, set before a reset with a seed, has that reset begin the same
    episode again and take the same actions. If that leads to another observation, the environment depends on more than
    its seed and actions; then its next episode begins, and `cut` says so.

    A step after the last one of an episode begins the next episode, as in gymnasium's vector environments.

    Attributes:
        past: what the next reset is to live through again.
        cut: whether the newest `past` could not be.
        over: whether the episode has ended, so that the next step begins another one.
    """

    def __init__(self, env: gymnasium.Env) -> None:
        """Seed the episodes of `env`."""
        super().__init__(env)
        self.past: Past | None = None
        self.cut = False
        self._seed = 0
        self._episode = -1
        self.over = False

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """Begin the next episode; with a seed the first one, or the one of `past`."""
        self._episode += 1
        if seed is not None:
            self._seed, self._episode = seed, 0
        past, self.past, self.cut = self.past, None, False
        if past is None:
            return self._begin(), {}
        self._episode = past.episode
        observation = None if past.observation is None else self._relive(past.actions)
        self.cut = observation is None or not equal(observation, past.observation)
        if self.cut:
            self._episode += 1
            observation = self._begin()
        return observation, {}

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        """Take one step, or begin the next episode after the end of one."""
        if self.over:
            observation, info = self.reset()
            return observation, 0.0, False, False, info
        observation, reward, terminated, truncated, info = self.env.step(action)
        self.over = bool(terminated or truncated)
        return observation, reward, terminated, truncated, info

    def _begin(self) -> Any:
        seed = self._seed
        if self._episode:
            seed = int(np.random.SeedSequence([seed, self._episode]).generate_state(1)[0] // 2)
        if multiprocessing.parent_process() is not None:  # here no other environment draws from these
            random.seed(seed)
            np.random.seed(seed)  # noqa: NPY002
        self.over = False
        return self.env.reset(seed=seed)[0]

    def _relive(self, actions: np.ndarray) -> Any:
        """Take the actions anew; None if the episode ends before the last of them."""
        observation = self._begin()
        for action in actions:
            if self.over:
                return None
            observation = self.step(action)[0]
        return observation


class Memory:
    """The actions of the running episodes of N environments, in few bytes."""

    def __init__(self, amount: int, action: gymnasium.Space[Any]) -> None:
        """Remember nothing yet; `action` is the action space of one environment."""
        assert action.shape is not None
        assert action.dtype is not None
        self._shape, self._dtype = action.shape, action.dtype
        self._limit = LONGEST * int(np.prod(self._shape)) * self._dtype.itemsize
        self._bytes = [bytearray() for _ in range(amount)]

    def add(self, actions: np.ndarray) -> None:
        """Remember one action (N, ...) of each; of an episode that is too long nothing more."""
        for memory, action in zip(self._bytes, np.asarray(actions, self._dtype), strict=True):
            if len(memory) <= self._limit:
                memory += action.tobytes()

    def forget(self, ended: np.ndarray) -> None:
        """Forget the episodes of the environments where `ended` (N,) is true."""
        for index in np.flatnonzero(ended):
            self._bytes[index].clear()

    def actions(self) -> list[np.ndarray | None]:
        """The actions (L, ...) of each running episode, None where it is too long."""
        return [
            None if len(memory) > self._limit else np.frombuffer(bytes(memory), self._dtype).reshape(-1, *self._shape)
            for memory in self._bytes
        ]

    def load(self, actions: list[np.ndarray | None]) -> None:
        """Take over what `actions` gave."""
        overlong = bytes(self._limit + 1)
        self._bytes = [bytearray(overlong if memory is None else memory.tobytes()) for memory in actions]


def equal(observation: dict[str, Any], other: dict[str, np.ndarray] | None) -> bool:
    """Whether two observations of one environment are the same, bit for bit."""
    return other is not None and all(
        np.asarray(observation[key], value.dtype).tobytes() == value.tobytes() for key, value in other.items()
    )
