import subprocess
import sys

import numpy as np
import pytest
import test_tiny
from gymnasium import spaces

import envs
from envs.actions import unit_action_space
from envs.errors import EnvError
from envs.wrappers import DictObservation, observation_entry


def test_dmc_walker_has_the_suites_observations_as_vectors():
    env = envs.make("dmc_walker_walk", action_repeat=2)
    shapes = {key: space.shape for key, space in env.observation_space.items()}
    assert shapes == {"orientations": (14,), "height": (1,), "velocity": (9,)}
    assert env.action_space == spaces.Box(-1.0, 1.0, (6,), np.float32)
    observation, _ = env.reset(seed=1)
    again, _ = env.reset(seed=1)
    other, _ = env.reset(seed=2)
    assert env.observation_space.contains(observation)
    np.testing.assert_array_equal(observation["orientations"], again["orientations"])
    assert np.abs(observation["orientations"] - other["orientations"]).max() > 1e-3


def test_dmc_episode_of_1000_control_steps_is_truncated_not_terminated():
    env = envs.make("dmc_pendulum_swingup", action_repeat=4)
    env.reset(seed=0)
    for step in range(1, 251):
        _, _, terminated, truncated, _ = env.step(np.zeros(1, np.float32))
        assert (terminated, truncated) == (False, step == 250)


def test_dmc_time_limit_replaces_the_suites_own():
    env = envs.make("dmc_pendulum_swingup", time_limit=1200)
    env.reset(seed=0)
    flags = [env.step(np.zeros(1, np.float32))[2:4] for _ in range(1200)]
    assert flags == [(False, False)] * 1199 + [(False, True)]


def test_dmc_end_by_the_tasks_own_rules_is_terminal():
    from dm_env import StepType, TimeStep

    env = envs.make("dmc_cartpole_balance")
    env.reset(seed=0)
    suite = env.unwrapped._env
    zeros = suite.observation_spec()
    observation = {key: np.zeros(spec.shape) for key, spec in zeros.items()}
    for discount, flags in ((0.0, (True, False)), (1.0, (False, True))):
        suite.step = lambda action, d=discount: TimeStep(StepType.LAST, 1.0, d, observation)
        assert env.step(np.zeros(1, np.float32))[2:4] == flags


def test_dmc_keeps_to_itself_what_its_own_models_will_have_to_change():
    script = "import envs; envs.make('dmc_cheetah_run'); from absl import logging; logging.warning('for users')"
    told = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stderr
    assert "for users" in told and "deprecated" not in told


def test_domain_with_underscores_is_found():
    assert envs.make("dmc_ball_in_cup_catch").action_space.shape == (2,)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("dmc_walker_wolk", "did you mean dmc_walker_walk?"),
        ("dmc_zzzzzzzz", "dmc_<domain>_<task>"),
        ("gym_CartPol-v1", "did you mean gym_CartPole-v1?"),
        ("gym_CartPole-v77", "did you mean gym_CartPole-v"),
        ("gym_no_such_module_here:Thing-v0", "pip install no_such_module_here"),
        ("walker", "dmc_<domain>_<task>, gym_<Id>"),
        ("gym_", "dmc_<domain>_<task>, gym_<Id>"),
    ],
)
def test_unknown_name_is_one_line_with_help(name, expected):
    with pytest.raises(EnvError) as caught:
        envs.make(name)
    assert name in str(caught.value)
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("arguments", [{"action_repeat": 0}, {"time_limit": 0}])
def test_numbers_out_of_range_are_named(arguments):
    with pytest.raises(EnvError, match=next(iter(arguments))):
        envs.make("gym_Tiny-v0", **arguments)


def test_gym_module_prefix_imports_the_module():
    env = envs.make("gym_test_tiny:Tiny-v0")
    assert env.observation_space == spaces.Dict({"observation": spaces.Box(0, 1000, (2,), np.float32)})
    assert env.action_space == spaces.Discrete(3)


def test_action_repeat_sums_rewards_and_stops_at_the_end():
    env = envs.make("gym_Tiny-v0", action_repeat=2)
    env.reset(seed=0)
    assert env.step(0)[1:4] == (1.0 + 2.0, False, False)
    assert env.step(0)[1:4] == (3.0, True, False)


def test_time_limit_counts_agent_steps_and_is_no_terminal():
    env = envs.make("gym_Tiny-v0", time_limit=2)
    env.reset(seed=0)
    assert env.step(0)[2:4] == (False, False)
    assert env.step(0)[2:4] == (False, True)


@pytest.mark.parametrize(
    ("action", "expected"),
    [
        # bounds: [0, 10], [-2, 2], (-inf, inf), [0, inf)
        ([0.0, 0.0, 0.0, 0.0], [5, 0, 0, 0]),
        ([1.0, 0.5, 0.5, 0.5], [10, 1, 0.5, 0.5]),
        ([-7.0, 7.0, 7.0, -7.0], [0, 2, 1, 0]),
    ],
)
def test_actions_are_clipped_and_stretched_to_finite_bounds(action, expected):
    env = envs.make("gym_TinyContinuous-v0")
    assert env.action_space == spaces.Box(-1.0, 1.0, (4,), np.float32)
    env.reset(seed=0)
    observation, *_ = env.step(np.array(action, np.float32))
    np.testing.assert_allclose(observation["observation"], expected)


def test_discrete_observations_start_at_zero_and_binary_ones_become_floats():
    class Source(test_tiny.Tiny):
        def __init__(self):
            super().__init__()
            self.observation_space = spaces.Dict(
                card=spaces.Discrete(4, start=2),
                pair=spaces.MultiDiscrete([[2, 3]]),
                bits=spaces.MultiBinary(2),
            )

        def _observe(self):
            return {"card": 5, "pair": np.array([[1, 2]]), "bits": np.array([0, 1], np.int8)}

    env = DictObservation(Source())
    observation, _ = env.reset(seed=0)
    assert env.observation_space.contains(observation)
    assert observation["card"] == 3
    np.testing.assert_array_equal(observation["pair"], [1, 2])
    np.testing.assert_array_equal(observation["bits"], np.array([0, 1], np.float32))


def test_unsupported_spaces_say_what_to_do():
    with pytest.raises(EnvError, match="reserved"):
        observation_entry("reward", spaces.Discrete(2))
    with pytest.raises(EnvError, match="Tuple"):
        observation_entry("observation", spaces.Tuple([spaces.Discrete(2)]))
    with pytest.raises(EnvError, match="Box of integers"):
        unit_action_space(spaces.Box(0, 5, (2,), np.int32))


def test_an_environment_without_render_mode_does_not_render():
    with pytest.raises(EnvError, match="'gym_faulty:Sound-v0' does not render images .*do without rendering"):
        envs.make("gym_faulty:Sound-v0", render=True)
