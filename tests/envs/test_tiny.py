"""Small environments for the tests beside, registered on import as Tiny-v0 and so on, and checked here."""

import itertools

import gymnasium
import numpy as np
from gymnasium import spaces

from envs.check import check_env


class Tiny(gymnasium.Env):
    """Counts its steps, also as reward; terminal after `terminal` of them, truncated after `limit`."""

    def __init__(self, terminal=3, limit=100, fail_at=None, render_mode=None):
        self.observation_space = spaces.Box(0, 1000, (2,), np.float64)
        self.action_space = spaces.Discrete(3, start=-1)
        self.terminal, self.limit, self.fail_at = terminal, limit, fail_at

    def _observe(self):
        return np.array([self.count, self.draw], np.float64)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.count, self.draw = 0, self.np_random.uniform()
        return self._observe(), {}

    def step(self, action):
        assert self.action_space.contains(action)
        self.count += 1
        if self.fail_at is not None and self.draw > self.fail_at:
            raise ValueError("a gear broke at 100 %d")
        return self._observe(), float(self.count), self.count >= self.terminal, self.count >= self.limit, {}


class Continuous(Tiny):
    """Shows the action that it was given."""

    def __init__(self, **arguments):
        super().__init__(**arguments)
        self.observation_space = spaces.Box(-np.inf, np.inf, (2, 2), np.float32)
        low, high = np.array([[0, -2], [-np.inf, 0]]), np.array([[10, 2], [np.inf, np.inf]])
        self.action_space = spaces.Box(low.astype(np.float32), high.astype(np.float32), dtype=np.float32)
        self.given = np.zeros((2, 2), np.float32)

    def _observe(self):
        return self.given

    def step(self, action):
        self.given = action
        return action, 0.0, False, False, {}


class Moody(Tiny):
    """Ends after as many steps as its seed says; what it shows depends on its actions and its draws."""

    def __init__(self, **arguments):
        super().__init__(**arguments)
        self.observation_space = spaces.Box(-1000, 1000, (2,), np.float64)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.terminal, self.draw = int(self.np_random.integers(1, 9)), 0.0
        return self._observe(), {}

    def step(self, action):
        result = super().step(action)
        self.draw += float(action) * self.np_random.uniform()
        return self._observe(), *result[1:]


class Forgetful(Tiny):
    """Depends on something that no seed governs."""

    lives = itertools.count()

    def _observe(self):
        return np.array([self.count, next(Forgetful.lives)], np.float64)


class Nan(Tiny):
    """The second entry, or else the reward, is not a number at step 2."""

    def __init__(self, of_reward=False, **arguments):
        super().__init__(**arguments)
        self.of_reward = of_reward

    def step(self, action):
        observation, reward, *ends = super().step(action)
        if self.count == 2:
            observation[1], reward = (0, np.inf) if self.of_reward else (np.nan, 0)
        return observation, reward, *ends


gymnasium.register("TinyMoody-v0", Moody)
gymnasium.register("TinyForgetful-v0", Forgetful)
gymnasium.register("TinyNan-v0", Nan)
gymnasium.register("TinyInfinite-v0", Nan, kwargs={"of_reward": True})
gymnasium.register("Tiny-v0", Tiny)
gymnasium.register("TinyLimited-v0", Tiny, kwargs={"terminal": 100, "limit": 2})
gymnasium.register("TinyContinuous-v0", Continuous)
gymnasium.register("TinyFailing-v0", Tiny, kwargs={"fail_at": 0.7})


def test_tiny_environments_are_sound():
    assert check_env(Tiny(), steps=20) == []
    assert check_env(Continuous(), steps=20) == []
