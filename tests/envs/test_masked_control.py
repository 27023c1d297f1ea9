"""What MaskedControl hides, and that it hides it reproducibly and nothing else."""

import numpy as np
import pytest
from gymnasium import spaces

import envs
from envs.check import check_env
from envs.probe import PRESETS
from envs.probes.hiding import SPEEDS
from envs.probes.masked_control import MaskedControl

SHOWN = {
    "walker": {"height": 1, "orientations": 14},
    "cheetah": {"position": 8},
    "cartpole": {"position": 3},
    "pendulum": {"orientation": 2},
    "balance": {"observation": 2},
}
FULL = {"balance": "gym_CartPole-v1", "walker": "dmc_walker_walk"}


def rollout(env, seed, steps):
    """Observations and rewards of an episode of half-strength actions."""
    action = 1 if isinstance(env.action_space, spaces.Discrete) else np.full(env.action_space.shape, 0.5, np.float32)
    observations, rewards = [env.reset(seed=seed)[0]], []
    for _ in range(steps):
        observation, reward, *_ = env.step(action)
        observations.append(observation)
        rewards.append(reward)
    return observations, rewards


@pytest.mark.parametrize("body", SHOWN)
def test_velocities_are_hidden_and_levels_are_sound(body):
    env = envs.make(f"probe_masked_{body}_easy")
    assert {key: space.shape[0] for key, space in env.observation_space.items()} == SHOWN[body]
    assert check_env(env, steps=20) == []
    hard = envs.make(f"probe_masked_{body}_hard")
    assert check_env(hard, steps=20) == []
    full = envs.make(f"probe_masked_{body}_easy", options={"velocities": True})
    assert len(spaces.utils.flatten_space(full.observation_space).low) > sum(SHOWN[body].values())


@pytest.mark.parametrize("body", FULL)
def test_what_is_left_and_the_rewards_are_those_of_the_task(body):
    hidden = rollout(envs.make(f"probe_masked_{body}_easy"), 4, 8)
    full = rollout(envs.make(FULL[body]), 4, 8)
    assert hidden[1] == full[1]
    for seen, whole in zip(hidden[0], full[0], strict=True):
        for key, value in seen.items():
            np.testing.assert_array_equal(value, whole[key][[0, 2]] if body == "balance" else whole[key])


def test_noise_and_flicker_have_the_strength_asked_for():
    plain = np.concatenate([o["position"] for o in rollout(envs.make("probe_masked_cheetah_easy"), 1, 400)[0]])
    noisy = rollout(envs.make("probe_masked_cheetah_easy", options={"obs_noise": 0.3}), 1, 400)[0]
    difference = np.concatenate([o["position"] for o in noisy]) - plain
    assert difference.std() == pytest.approx(0.3, abs=0.02) and difference.mean() == pytest.approx(0, abs=0.02)
    dark = rollout(envs.make("probe_masked_cheetah_easy", options={"flicker": 0.25}), 1, 400)[0]
    zeros = np.array([not o["position"].any() for o in dark])
    assert zeros.mean() == pytest.approx(0.25, abs=4 * np.sqrt(0.25 * 0.75 / 401))
    kept = np.concatenate([o["position"] for o in dark])[np.repeat(~zeros, 8)]
    np.testing.assert_array_equal(kept, plain[np.repeat(~zeros, 8)])


def test_same_seed_hides_the_same():
    options = {"flicker": 0.3, "obs_noise": 0.2}
    runs = [rollout(envs.make("probe_masked_balance_easy", options=options), seed, 6)[0] for seed in (2, 2, 3)]
    runs = [np.stack([o["observation"] for o in run]) for run in runs]
    np.testing.assert_array_equal(runs[0], runs[1])
    assert not np.array_equal(runs[0], runs[2])


def test_early_cue_tells_the_speed_that_is_paid_for_then_nothing():
    env = envs.make("probe_masked_walker_easy", options={"cue_steps": 3})
    assert env.observation_space["cue"] == spaces.Discrete(4)
    speeds, returns = set(), {}
    for seed in range(12):
        observations, rewards = rollout(env, seed, 12)
        cues = [o["cue"] for o in observations]
        assert cues[:3] == [cues[0]] * 3 and cues[0] in (1, 2, 3) and cues[3:] == [0] * 10
        speeds.add(cues[0])
        assert env.unwrapped.task._move_speed == SPEEDS[cues[0] - 1]
        returns.setdefault(cues[0], []).append(sum(rewards))
    assert speeds == {1, 2, 3}
    assert np.mean(returns[1]) > np.mean(returns[3])  # to stand is paid in full at once, to run is not


def test_every_body_has_every_level():
    assert {name for name in PRESETS if name.startswith("masked")} == {
        f"masked_{body}_{level}" for body in SHOWN for level in MaskedControl.LEVELS
    }
