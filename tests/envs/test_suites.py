"""Adapters to suites of others: what they say when the package is absent, and what they do when it is there."""

import builtins
import importlib.util
import os

import numpy as np
import pytest
from gymnasium import spaces

import envs
from envs import memory_maze, rendering
from envs.check import check_env
from envs.errors import EnvError
from envs.streams import Streams

needs_popgym = pytest.mark.skipif(importlib.util.find_spec("popgym") is None, reason="popgym is not installed")
needs_minigrid = pytest.mark.skipif(importlib.util.find_spec("minigrid") is None, reason="minigrid is not installed")
needs_maze = pytest.mark.skipif(importlib.util.find_spec("memory_maze") is None, reason="memory-maze is not installed")


@pytest.mark.parametrize(
    ("name", "package", "command"),
    [
        ("popgym_RepeatPreviousEasy", "popgym", "pip install popgym==1.0.7"),
        ("minigrid_MemoryS7", "minigrid", "pip install minigrid==3.2.0"),
        ("memorymaze_9x9", "memory_maze", "pip install memory-maze==1.0.3 gym==0.26.2"),
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
