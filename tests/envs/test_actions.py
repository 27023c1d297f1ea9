"""Actions that are Dicts and Tuples of parts, as one array of the agent and back."""

import pickle

import gymnasium
import numpy as np
import pytest
import test_tiny
from gymnasium import spaces

import envs
from envs.actions import Hybrid, UnitAction, unit_action_space
from envs.check import check_env
from envs.errors import EnvError
from envs.streams import Streams

ARM = spaces.Dict(
    grip=spaces.Discrete(3, start=-1),
    move=spaces.Box(np.array([[0, -2]], np.float32), np.array([[10, 2]], np.float32)),
    rest=spaces.Tuple([spaces.MultiBinary(2), spaces.MultiDiscrete([[4], [2]]), spaces.Box(-1, 1, (1,), np.float64)]),
)


class Arm(test_tiny.Tiny):
    """Takes a Dict with parts of every kind, shows its numbers."""

    def __init__(self, render_mode=None):
        super().__init__(terminal=20)
        self.observation_space = spaces.Box(-100, 100, (8,), np.float64)
        self.action_space = ARM
        self.given = None

    def reset(self, *, seed=None, options=None):
        self.given = None
        return super().reset(seed=seed)

    def _observe(self):
        if self.given is None:
            return np.zeros(8)
        bits, choices, extra = self.given["rest"]
        parts = [self.given["grip"], *self.given["move"].ravel(), *bits, *choices.ravel(), *extra]
        return np.array(parts, np.float64)

    def step(self, action):
        assert self.action_space.contains(action), action
        self.given = action
        self.count += 1
        return self._observe(), 1.0, self.count >= self.terminal, False, {}


gymnasium.register("Arm-v0", Arm)


@pytest.mark.parametrize(
    ("space", "expected"),
    [
        (ARM, Hybrid(3, [3, 2, 2, 4, 2])),
        (spaces.Tuple([spaces.Discrete(2), spaces.Discrete(5)]), spaces.MultiDiscrete([2, 5])),
        (
            spaces.Dict(a=spaces.Box(0, 9, (2,), np.float32), b=spaces.Box(0, 1, (1, 1), np.float32)),
            spaces.Box(-1, 1, (3,)),
        ),
        (spaces.MultiBinary(3), spaces.MultiDiscrete([2, 2, 2])),
        (spaces.Dict(only=spaces.Discrete(4)), spaces.MultiDiscrete([4])),
    ],
)
def test_parts_become_one_array(space, expected):
    found = unit_action_space(space)
    assert found == expected and type(found) is type(expected)


def test_each_part_gets_its_share_in_its_own_form():
    env = UnitAction(Arm())
    action = env.action(np.array([-1.0, 0.5, 3.0, 2, 0, 1, 3, 1], np.float32))
    assert ARM.contains(action)
    assert action["grip"] == 1
    np.testing.assert_allclose(action["move"], [[0, 1]])
    bits, choices, extra = action["rest"]
    np.testing.assert_array_equal(bits, [0, 1])
    np.testing.assert_array_equal(choices, [[3], [1]])
    np.testing.assert_allclose(extra, [1.0])  # clipped


def test_an_environment_with_parts_is_sound_and_passes_through_streams():
    assert check_env(Arm(), steps=60) == []
    env = envs.make("gym_Arm-v0")
    assert check_env(env, steps=60) == []
    streams = Streams("gym_Arm-v0", 2, parallel=False, seed=0)
    assert isinstance(streams.action_space, Hybrid)
    streams.reset()
    streams.send(np.array([[0, 0, 0, 0, 1, 1, 2, 1], [1, -1, 0.5, 2, 0, 0, 3, 0]], np.float32))
    shown = streams.receive()["observation"]
    np.testing.assert_allclose(shown, [[-1, 5, 0, 1, 1, 2, 1, 0], [1, 10, -2, 0, 0, 3, 0, 0.5]])
    state = streams.state_dict()
    streams.close()
    again = Streams("gym_Arm-v0", 2, parallel=False, seed=0)
    row, cut = again.restore(state)
    assert cut == []
    np.testing.assert_array_equal(row["observation"], shown)
    again.close()


def test_hybrid_samples_are_whole_where_they_are_choices():
    space = Hybrid(1, [2, 3])
    space.seed(0)
    samples = np.stack([space.sample() for _ in range(200)])
    assert all(space.contains(sample) for sample in samples)
    assert set(samples[:, 1]) == {0, 1} and set(samples[:, 2]) == {0, 1, 2}
    assert len(set(samples[:, 0])) == 200 and np.abs(samples[:, 0]).max() <= 1
    assert not space.contains(np.array([0, 0.5, 1], np.float32))
    assert not space.contains(np.array([0, 0, 3], np.float32))
    copy = pickle.loads(pickle.dumps(space))
    assert copy == space and copy.sizes == (2, 3) and copy.reals == 1


@pytest.mark.parametrize(
    ("space", "expected"),
    [
        (spaces.Dict(a=spaces.Text(3), b=spaces.Discrete(2)), "has a part that is a Text"),
        (spaces.Tuple([spaces.Box(0, 5, (2,), np.int32)]), "has a part that is a Box of integers"),
        (spaces.Dict(), "has no parts"),
    ],
)
def test_parts_that_cannot_be_taken_are_named(space, expected):
    with pytest.raises(EnvError, match=expected):
        unit_action_space(space)
