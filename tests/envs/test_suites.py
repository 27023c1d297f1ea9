"""Adapters to suites of others: what they say when the package is absent, and what they do when it is there."""

import builtins
import importlib.util
import os

import gymnasium
import numpy as np
import pytest
from gymnasium import spaces

import envs
from agent.config import CONFIGS
from envs import atari, memory_maze, rendering
from envs.check import check_env
from envs.errors import EnvError
from envs.streams import Streams
from envs.wrappers import ActionRepeat

needs_popgym = pytest.mark.skipif(importlib.util.find_spec("popgym") is None, reason="popgym is not installed")
needs_minigrid = pytest.mark.skipif(importlib.util.find_spec("minigrid") is None, reason="minigrid is not installed")
needs_atari = pytest.mark.skipif(importlib.util.find_spec("ale_py") is None, reason="ale-py is not installed")
needs_crafter = pytest.mark.skipif(importlib.util.find_spec("crafter") is None, reason="crafter is not installed")
needs_bsuite = pytest.mark.skipif(importlib.util.find_spec("bsuite") is None, reason="bsuite is not installed")
needs_maze = pytest.mark.skipif(importlib.util.find_spec("memory_maze") is None, reason="memory-maze is not installed")


@pytest.mark.parametrize(
    ("name", "package", "command"),
    [
        ("popgym_RepeatPreviousEasy", "popgym", "pip install popgym==1.0.7"),
        ("minigrid_MemoryS7", "minigrid", "pip install minigrid==3.2.0"),
        ("memorymaze_9x9", "memory_maze", "pip install memory-maze==1.0.3 gym==0.26.2"),
        ("atari100k_pong", "ale_py", "pip install ale-py==0.12.1"),
        ("crafter_reward", "crafter", "pip install crafter==1.8.3"),
        ("bsuite_memory_len_5", "bsuite", "pip install bsuite==0.3.6"),
    ],
)
def test_absent_packages_name_the_command_on_one_line(name, package, command, monkeypatch):
    monkeypatch.setattr(rendering, "load_suite", lambda render: None)  # a process renders, or it does not
    plain = builtins.__import__

    def refuse(module, *arguments, **more):
        if module.split(".")[0] == package:
            raise ModuleNotFoundError(f"No module named {package!r}", name=package)
        return plain(module, *arguments, **more)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(EnvError, match=command) as caught:
        envs.make(name)
    assert "\n" not in str(caught.value)


EVERY = [
    # name, module, action repeat, options, shape of an entry
    ("gym_CartPole-v1", "gymnasium", 1, {}, (4,)),
    ("gym_HalfCheetah-v5", "imageio", 1, {}, (17,)),
    ("gym_LunarLander-v3", "Box2D", 1, {}, (8,)),
    pytest.param("gym_CarRacing-v3", "Box2D", 4, {"image_size": 64}, (64, 64, 3), marks=pytest.mark.slow),
    ("dmc_reacher_easy", "dm_control", 2, {}, (2,)),
    ("atari100k_pong", "ale_py", 4, {"image_size": 64}, (64, 64, 3)),
    (
        "atari_ms_pacman",
        "ale_py",
        4,
        {"image_size": 96, "gray": True, "sticky": 0.25, "all_actions": True},
        (96, 96, 1),
    ),
    pytest.param("crafter_reward", "crafter", 1, {}, (64, 64, 3), marks=pytest.mark.slow),
    ("bsuite_memory_len_5", "bsuite", 1, {}, (3,)),
    ("bsuite_catch_0", "bsuite", 1, {}, (50,)),
    ("popgym_RepeatPreviousEasy", "popgym", 1, {}, ()),
    ("minigrid_MemoryS7", "minigrid", 1, {}, (147,)),
    ("minigrid_MemoryS7", "minigrid", 1, {"pixels": True, "image_size": 64}, (64, 64, 3)),
]


@pytest.mark.parametrize(("name", "module", "repeat", "options", "shape"), EVERY, ids=lambda value: str(value)[:24])
def test_every_suite_is_sound_for_a_thousand_steps(name, module, repeat, options, shape):
    pytest.importorskip(module, reason=f"{module} is not installed")
    env = envs.make(name, action_repeat=repeat, options=options)
    assert shape in [entry.shape for entry in env.observation_space.values()]
    assert check_env(env, steps=1000) == []
    env.close()


@needs_popgym
@pytest.mark.parametrize(
    "task", ["RepeatPreviousEasy", "AutoencodeEasy", "CountRecallEasy", "PositionOnlyPendulumEasy", "HigherLowerEasy"]
)
def test_popgym_tasks_are_sound(task):
    env = envs.make(f"popgym_{task}")
    assert check_env(env, steps=300) == []


@needs_popgym
def test_popgym_pays_about_one_a_step_and_tells_its_own_return():
    results = {}
    for rescale in (True, False):
        streams = Streams("popgym_RepeatPreviousEasy", 2, parallel=False, seed=0, options={"rescale": rescale})
        streams.reset()
        finished = []
        while not finished:
            streams.send(np.zeros(2, np.int64))
            streams.receive()
            finished = streams.finished
        results[rescale] = finished[0]
        streams.close()
    own = results[False].episode_return
    assert -1 <= own < 0
    assert results[False].metrics["popgym_return"] == pytest.approx(own)
    assert results[True].metrics["popgym_return"] == pytest.approx(own)
    assert results[True].episode_return == pytest.approx(51 * own, rel=1e-5)


@needs_popgym
def test_popgym_mistakes_are_told():
    with pytest.raises(EnvError, match="did you mean popgym_RepeatPreviousEasy"):
        envs.make("popgym_RepeatPreviusEasy")
    with pytest.raises(EnvError, match="has one option, rescale"):
        envs.make("popgym_RepeatPreviousEasy", options={"scale": 2})


@needs_minigrid
def test_minigrid_cells_are_categories():
    env = envs.make("minigrid_MemoryS7")
    assert env.observation_space["cells"] == spaces.MultiDiscrete(np.tile([11, 6, 4], 49))
    assert env.observation_space["direction"] == spaces.Discrete(4)
    assert check_env(env, steps=600) == []
    with pytest.raises(EnvError, match="did you mean minigrid_MemoryS7"):
        envs.make("minigrid_MemoryS77")


@needs_maze
def test_memory_maze_is_a_picture_and_follows_its_seed():
    if os.environ.setdefault("MUJOCO_GL", "egl") == "disabled":
        pytest.skip("dm_control was told in this process not to render")
    options = {"own_time_limit": True, "render": False, "options": {}}
    env = memory_maze.make("9x9", **options)
    assert env.observation_space["image"] == spaces.Box(0, 255, (64, 64, 3), np.uint8)
    assert env.action_space == spaces.Discrete(6)
    shown = [env.reset(seed=seed)[0]["image"] for seed in (1, 1, 2)]
    assert np.array_equal(shown[0], shown[1]) and not np.array_equal(shown[0], shown[2])
    observation, reward, terminated, truncated, _ = env.step(1)
    assert env.observation_space.contains(observation)
    assert (reward, terminated, truncated) == (0.0, False, False)
    with pytest.raises(EnvError, match="sizes are 9x9"):
        envs.make("memorymaze_10x10")
    with pytest.raises(EnvError, match="refuses {'depth': 1}"):
        memory_maze.make("9x9", **options | {"options": {"depth": 1}})


def test_every_suite_has_an_adapter_and_a_preset():
    presets = {path.stem for path in CONFIGS.glob("env/*.yaml") if "_" not in path.stem}
    assert presets == set(envs.ADAPTERS)


class Flickering(gymnasium.Env):
    """Stands in for a console: frame t is all t, and game over is after 40 frames."""

    observation_space = spaces.Box(0, 255, (20, 16, 3), np.uint8)
    action_space = spaces.Discrete(6)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.frame, self.acted = 0, []
        return self.show(), {}

    def step(self, action):
        self.frame += 1
        self.acted.append(action)
        return self.show(), 1.0, self.frame >= 40, False, {}

    def show(self):
        image = np.zeros((20, 16, 3), np.uint8)
        image[self.frame % 20] = 100 + self.frame
        return image


def test_an_atari_action_shows_the_brighter_of_its_last_two_frames():
    env = ActionRepeat(atari.Screen(Flickering(), noops=0), 4)
    shown = env.reset(seed=0)[0]["image"]
    assert (shown[0] == 100).all() and not shown[1:].any()
    shown, reward, *_ = env.step(2)
    shown = shown["image"]
    assert (shown[3] == 103).all() and (shown[4] == 104).all() and not shown[[0, 1, 2, *range(5, 20)]].any()
    assert reward == 4.0 and env.unwrapped.acted == [2] * 4


def test_atari_episodes_begin_with_one_to_thirty_frames_without_action():
    env = atari.Screen(Flickering(), noops=30)
    begun = set()
    for seed in range(300):
        env.reset(seed=seed)
        assert set(env.unwrapped.acted) == {0}
        begun.add(env.unwrapped.frame)
    assert begun == set(range(1, 31))


@needs_atari
def test_atari_games_follow_their_protocol():
    env = envs.make("atari100k_pong", action_repeat=4)
    assert env.observation_space == spaces.Dict(image=spaces.Box(0, 255, (210, 160, 3), np.uint8))
    assert env.action_space == spaces.Discrete(6)
    ale = env.unwrapped.ale
    assert ale.getFloat("repeat_action_probability") == 0
    env.reset(seed=0)
    before = ale.getEpisodeFrameNumber()
    env.step(0)
    assert ale.getEpisodeFrameNumber() - before == 4
    first, again, other = (env.reset(seed=seed)[0]["image"] for seed in (1, 1, 5))
    assert np.array_equal(first, again)
    sticky = envs.make("atari_pong", options={"sticky": 0.25, "all_actions": True})
    assert sticky.action_space == spaces.Discrete(18)
    assert sticky.unwrapped.ale.getFloat("repeat_action_probability") == 0.25


@needs_atari
@pytest.mark.parametrize(
    ("task", "options", "expected"),
    [
        ("pongg", {}, "unknown game 'pongg' of Atari; did you mean pong?"),
        ("pong", {"grey": True}, "has no option 'grey'; did you mean gray?"),
        ("pong", {"sticky": 2}, "option sticky is 2; allowed is 0 to 1"),
        ("pong", {"gray": 1}, "option gray is 1; give true or false"),
        ("pong", {"noops": -1}, "option noops is -1; allowed is 0 to inf"),
    ],
)
def test_atari_mistakes_are_told(task, options, expected):
    with pytest.raises(EnvError, match=expected.replace("?", r"\?")):
        envs.make(f"atari100k_{task}", options=options)


@needs_crafter
def test_crafter_tells_what_was_achieved_and_ends_by_death_or_in_time():
    env = envs.make("crafter_reward")
    assert check_env(env, steps=100) == []
    env.reset(seed=0)
    game = env.unwrapped._env
    game._player.inventory["sapling"] = 1
    game._player.achievements["collect_wood"] = 2
    assert env.step(0)[1] == pytest.approx(1.0)
    game._player.health = 0
    observation, reward, terminated, truncated, info = env.step(0)
    assert terminated and not truncated
    metrics = info["episode_metrics"]
    assert metrics["achievements"] == 1.0 and metrics["collect_wood"] == 1.0 and metrics["collect_diamond"] == 0.0
    assert len(metrics) == 23
    env.reset(seed=0)
    env.unwrapped._env._step = 9999
    assert env.step(0)[2:4] == (False, True)
    shown = [env.reset(seed=seed)[0]["image"] for seed in (1, 1, 2)]
    assert np.array_equal(shown[0], shown[1]) and not np.array_equal(shown[0], shown[2])


@needs_bsuite
def test_bsuite_has_its_settings_and_rules():
    env = envs.make("bsuite_memory_len_5")
    env.reset(seed=0)
    lengths = []
    for _ in range(3):
        steps, over = 0, False
        while not over:
            _, reward, terminated, truncated, _ = env.step(0)
            steps, over = steps + 1, terminated or truncated
        assert terminated and abs(reward) == 1.0
        lengths.append(steps)
        env.reset()
    assert set(lengths) == {7}  # one cue, six steps of memory
    with pytest.raises(EnvError, match="did you mean bsuite_memory_len_5"):
        envs.make("bsuite_memory_len_55")
    with pytest.raises(EnvError, match="has no options"):
        envs.make("bsuite_memory_len_5", options={"memory": 3})


@needs_minigrid
def test_minigrid_shows_a_picture_of_what_the_agent_sees():
    env = envs.make("minigrid_MemoryS7", options={"pixels": True})
    assert env.observation_space["image"] == spaces.Box(0, 255, (56, 56, 3), np.uint8)
    assert env.reset(seed=0)[0]["image"].std() > 5
    with pytest.raises(EnvError, match="option pixels .* is 3; it is true or false"):
        envs.make("minigrid_MemoryS7", options={"pixels": 3})
