import gymnasium
import numpy as np
import pytest
from gymnasium import spaces

import envs
from envs.check import check_env


class Good(gymnasium.Env):
    """Three numbers that follow a seed, episodes of 5 steps. The faulty ones below each change one thing."""

    observation_space = spaces.Dict(place=spaces.Box(-1, 1, (3,), np.float32), card=spaces.Discrete(4))
    action_space = spaces.Discrete(2)

    def observe(self):
        return {"place": self.np_random.uniform(-1, 1, 3).astype(np.float32), "card": 2}

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.count = 0
        return self.observe(), {}

    def step(self, action):
        self.count += 1
        return self.observe(), 1.0, self.count == 5, False, {}


def showing(**changes):
    """Return a class whose observation has `changes`; None removes the key."""

    def observe(self):
        observation = {**Good.observe(self), **changes}
        return {key: value for key, value in observation.items() if value is not None}

    return type("Faulty", (Good,), {"observe": observe})


def stepping(place, value):
    """Return a class whose step() returns `value` at position `place` of its five."""

    def step(self, action):
        result = list(Good.step(self, action))
        result[place] = value
        return tuple(result)

    return type("Faulty", (Good,), {"step": step})


def with_space(**space):
    return type("Faulty", (Good,), space)


class Unseeded(Good):
    def observe(self):
        return {"place": np.random.default_rng().uniform(-1, 1, 3).astype(np.float32), "card": 2}


class Mutating(Good):
    buffer = np.zeros(3, np.float32)

    def observe(self):
        self.buffer[:] = self.np_random.uniform(-1, 1, 3)
        return {"place": self.buffer, "card": 2}


class Raising(Good):
    def step(self, action):
        raise KeyError("left")


class FourThings(Good):
    def step(self, action):
        return Good.step(self, action)[:4]


class BareReset(Good):
    def reset(self, *, seed=None, options=None):
        return super().reset(seed=seed)[0]


@pytest.mark.parametrize(
    ("faulty", "words"),
    [
        (with_space(observation_space=None), ["observation_space is NoneType", "gymnasium.spaces"]),
        (with_space(observation_space=spaces.Dict(is_first=spaces.Discrete(2))), ["reserved", "rename"]),
        (with_space(action_space=spaces.Text(3)), ["action space is a Text", "wrap"]),
        (showing(place=np.ones(4, np.float32)), ["'place'", "shape (4,)", "(3,)"]),
        (showing(place=np.ones(3, np.float64)), ["'place'", "dtype float64", ".astype(np.float32)"]),
        (showing(place=[0.0, 0.0, 0.0]), ["'place'", "is a list", "numpy array"]),
        (showing(place=np.array([0, np.nan, 0], np.float32)), ["'place'", "NaN"]),
        (showing(place=np.array([0, 2, 0], np.float32)), ["'place'", "2.0 at [1]", "clip"]),
        (showing(card=4), ["'card'", "4, outside", "Discrete(4)"]),
        (showing(card=None), ["no 'card'", "every key"]),
        (showing(extra=1), ["'extra'", "leave it out"]),
        (stepping(0, np.zeros(3)), ["ndarray", "return a dict"]),
        (stepping(1, np.ones(1)), ["reward", "one finite number"]),
        (stepping(1, float("nan")), ["reward nan", "one finite number"]),
        (stepping(1, None), ["reward None", "one finite number"]),
        (stepping(2, 0), ["terminated as int", "bool(terminated)"]),
        (stepping(3, None), ["truncated as NoneType", "bool(truncated)"]),
        (Unseeded, ["reset(seed=0)", "self.np_random"]),
        (Mutating, ["in place", ".copy()"]),
        (Raising, ["step() number 1 raised KeyError: 'left'"]),
        (FourThings, ["five things"]),
        (BareReset, ["return observation, info"]),
    ],
)
def test_every_fault_is_explained_once(faulty, words):
    problems = check_env(faulty(), steps=20)
    assert len(problems) == 1, problems
    for word in words:
        assert word in problems[0]
    assert "\n" not in problems[0]


def test_good_environment_has_no_problems():
    assert check_env(Good(), steps=20) == []


def test_made_environments_have_no_problems():
    assert check_env(envs.make("gym_CartPole-v1"), steps=50) == []
    assert check_env(envs.make("dmc_cartpole_swingup", time_limit=20), steps=50) == []


def test_endless_episode_is_only_mentioned(caplog):
    assert check_env(stepping(2, False)(), steps=20) == []
    assert "no episode ended in 20 steps" in caplog.text


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("nan", "step() number 2 gave observation 'observation' that holds NaN"),
        ("range", "step() number 2 gave observation 'observation' that is 1000.5 at [1], outside of [0.0, 1000.0]"),
        ("raise", "step() number 2 raised ValueError: a gear broke at 100 %d"),
    ],
)
def test_faults_of_made_environments_are_explained_once(kind, words):
    (problem,) = check_env(envs.make(f"gym_faulty:Ruined{kind.title()}-v0"), steps=20)
    assert problem.startswith(words)
