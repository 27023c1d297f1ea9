"""A small environment to learn on: follow a target on a line. Importable by name, so that workers can make it."""

import itertools
from typing import Any

import gymnasium
import numpy as np

STEP = 0.2
LENGTH = 32


class Chase(gymnasium.Env[Any, Any]):
    """Reward 1 while the agent stands within half a step of a target that stays for one episode of 32 steps."""

    observation_space = gymnasium.spaces.Box(-2, 2, (2,), np.float32)
    action_space = gymnasium.spaces.Discrete(3)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        super().reset(seed=seed)
        self.place, self.target = self.np_random.uniform(-1, 1, 2)
        self.time = 0
        return self._observation(), {}

    def step(self, action: Any) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        self.place = float(np.clip(self.place + STEP * (int(action) - 1), -1, 1))
        self.time += 1
        reward = float(abs(self.place - self.target) <= STEP / 2)
        return self._observation(), reward, False, self.time >= LENGTH, {}

    def _observation(self) -> np.ndarray:
        return np.array([self.place, self.target], np.float32)


class Fragile(Chase):
    """Breaks in its second episode."""

    episodes = 0

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        self.episodes += 1
        return super().reset(seed=seed, options=options)

    def step(self, action: Any) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        if self.episodes == 2:
            raise RuntimeError("the motor is too hot")
        return super().step(action)


class Faulty(Chase):
    """Breaks at step 9 where its target is to the right, and in the reset where it is far to the right."""

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        result = super().reset(seed=seed, options=options)
        if self.target > 0.8:
            raise RuntimeError("the track is blocked")
        return result

    def step(self, action: Any) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        result = super().step(action)
        if self.time == 9 and self.target > 0:
            result[0][0] = np.nan
        return result


class Speaking(Chase):
    """Acts in a way that no agent here can."""

    action_space = gymnasium.spaces.Text(3)  # type: ignore[assignment]


class Unmakeable(Chase):
    """Has a mistake in its constructor."""

    def __init__(self) -> None:
        self.width = 1 / 0


class Restless(Chase):
    """Depends on more than its seed and actions."""

    lives = itertools.count()

    def _observation(self) -> np.ndarray:
        return np.array([self.place, next(self.lives) % 3], np.float32)


gymnasium.register("Restless-v0", entry_point=Restless)
gymnasium.register("Chase-v0", entry_point=Chase)
gymnasium.register("Fragile-v0", entry_point=Fragile)
gymnasium.register("Faulty-v0", entry_point=Faulty)
gymnasium.register("Speaking-v0", entry_point=Speaking)
gymnasium.register("Unmakeable-v0", entry_point=Unmakeable)
