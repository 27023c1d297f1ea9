"""Images of environments: which observations are images, their form and size, and tasks seen in pictures."""

import importlib.util
import os
import subprocess
import sys

import gymnasium
import numpy as np
import pytest
import test_tiny
from gymnasium import spaces

import envs
from envs import dmc
from envs.check import check_env
from envs.errors import EnvError
from envs.images import as_image, is_image, resized
from envs.streams import Streams
from envs.wrappers import DictObservation

needs_gl = pytest.mark.skipif(
    os.environ.get("MUJOCO_GL") == "disabled", reason="no GL library is installed (apt-get install libegl1)"
)
FAST = {"fast_rendering": True}


def pixels(*shape, low=0, high=255, dtype=np.uint8):
    return spaces.Box(low, high, shape, dtype)


@pytest.mark.parametrize(
    ("space", "expected"),
    [
        (pixels(64, 96, 3), (64, 96, 3)),
        (pixels(3, 64, 96), (64, 96, 3)),
        (pixels(84, 84), (84, 84, 1)),
        (pixels(64, 64, 12), (64, 64, 12)),
        (pixels(7, 7, 3), None),  # codes of cells
        (pixels(128), None),  # memory of a console
        (pixels(64, 64, 3, high=1, dtype=np.float32), None),
        (spaces.Discrete(4), None),
    ],
)
def test_images_are_bytes_with_height_and_width(space, expected):
    assert is_image(space) == (expected is not None)
    if expected:
        value = space.sample()
        image = as_image(value, space.shape)
        assert image.shape == expected and image.flags.c_contiguous and not np.shares_memory(image, value)
        turned = value.transpose(1, 2, 0) if value.shape[0] == 3 else value.reshape(expected)
        np.testing.assert_array_equal(image, turned)
        with pytest.raises(ValueError, match="its space says"):
            as_image(value[:-1], space.shape)


def test_resizing_keeps_channels_apart_and_slopes_straight():
    image = np.zeros((210, 160, 3), np.uint8)
    image[..., 0] = np.arange(210)[:, None]
    image[..., 1] = 77
    image[..., 2] = np.arange(160)
    small = resized(image, 64)
    assert small.shape == (64, 64, 3) and small.dtype == np.uint8
    centres = (np.arange(64) + 0.5) / 64
    inner = slice(3, -3)  # at the border a slope has only one side
    np.testing.assert_allclose(small[inner, :, 0], np.tile(centres[inner, None] * 210 - 0.5, 64), atol=1)
    assert (small[..., 1] == 77).all()
    np.testing.assert_allclose(small[:, inner, 2], np.tile(centres[inner] * 160 - 0.5, (64, 1)), atol=1)
    assert resized(small, 64) is small


class Seeing(test_tiny.Tiny):
    """Shows two pictures and its step."""

    def __init__(self, render_mode=None):
        super().__init__(terminal=8)
        self.observation_space = spaces.Dict(
            front=pixels(40, 48, 3), count=spaces.Box(0, 99, (1,), np.float32), gray=pixels(32, 32)
        )

    def _observe(self):
        rng = np.random.default_rng(self.count)
        images = {
            key: rng.integers(256, size=self.observation_space[key].shape, dtype=np.uint8) for key in ("front", "gray")
        }
        return images | {"count": np.array([self.count], np.float32)}


gymnasium.register("Seeing-v0", Seeing)


def test_images_of_gymnasium_environments_come_in_one_size():
    env = envs.make("gym_Seeing-v0", options={"image_size": 16})
    assert {key: space.shape for key, space in env.observation_space.items()} == {
        "front": (16, 16, 3), "count": (1,), "gray": (16, 16, 1),
    }  # fmt: skip
    assert check_env(env, steps=50) == []
    source, _ = Seeing().reset(seed=0)
    shown, _ = env.reset(seed=0)
    np.testing.assert_array_equal(shown["front"], resized(source["front"], 16))
    plain = envs.make("gym_Seeing-v0")
    assert plain.observation_space["gray"] == pixels(32, 32, 1)
    assert check_env(plain, steps=50) == []


@pytest.mark.parametrize("size", [0, "big"])
def test_image_size_out_of_range_is_named(size):
    with pytest.raises(EnvError, match=f"image_size of environment 'gym_Seeing-v0' is {size!r}; give an integer"):
        envs.make("gym_Seeing-v0", options={"image_size": size})


def test_images_pass_through_streams_as_bytes():
    streams = Streams("gym_Seeing-v0", 2, parallel=False, seed=0)
    row = streams.reset()
    assert row["front"].shape == (2, 40, 48, 3) and row["front"].dtype == np.uint8
    assert streams.note is None
    streams.close()


def test_probes_may_be_shown_in_pictures():
    env = envs.make("probe_delay_easy", options={"encoding": "image"})
    assert [space.shape for space in env.observation_space.values()] == [(64, 64, 3)]
    assert check_env(env, steps=200) == []


def test_a_copy_is_given_of_what_an_environment_may_change():
    class Same(Seeing):
        def _observe(self):
            self.shown = getattr(self, "shown", None) or super()._observe()
            return self.shown

    env = DictObservation(Same())
    observation, _ = env.reset(seed=0)
    env.unwrapped.shown["front"][:] = 0
    assert observation["front"].any()


# ---- dm_control in pictures -----------------------------------------------------------------------------------


@needs_gl
def test_vision_shows_a_picture_that_follows_seed_and_action():
    env = envs.make("dmc_walker_walk_vision", action_repeat=2, options=FAST)
    assert env.observation_space == spaces.Dict(image=pixels(64, 64, 3))
    assert env.action_space == spaces.Box(-1.0, 1.0, (6,), np.float32)
    shown = [env.reset(seed=seed)[0]["image"] for seed in (1, 1, 2)]
    np.testing.assert_array_equal(shown[0], shown[1])
    assert (shown[0] != shown[2]).mean() > 0.01
    assert shown[0].std() > 10 and shown[0].flags.c_contiguous  # as torch needs it
    moved = env.step(np.ones(6, np.float32))[0]["image"]
    assert (moved != shown[2]).any()
    assert check_env(env, steps=100) == []


@needs_gl
def test_vision_may_show_the_state_too_and_draw_larger():
    env = envs.make("dmc_walker_walk_vision", options={"state": True, "image_size": 96} | FAST)
    shapes = {key: space.shape for key, space in env.observation_space.items()}
    assert shapes == {"orientations": (14,), "height": (1,), "velocity": (9,), "image": (96, 96, 3)}
    state = envs.make("dmc_walker_walk")
    observation, plain = env.reset(seed=3)[0], state.reset(seed=3)[0]
    np.testing.assert_array_equal(observation["orientations"], plain["orientations"])


@needs_gl
def test_a_picture_is_drawn_once_for_each_action_and_never_without_vision(monkeypatch):
    drawn = []
    plain = dmc.Suite.draw
    monkeypatch.setattr(dmc.Suite, "draw", lambda self, size: drawn.append(size) or plain(self, size))
    env = envs.make("dmc_walker_walk_vision", action_repeat=4, options=FAST)
    env.reset(seed=0)
    drawn.clear()
    for _ in range(3):
        env.step(np.zeros(6, np.float32))
    assert drawn == [64] * 3
    drawn.clear()
    state = envs.make("dmc_walker_walk")
    state.reset(seed=0)
    state.step(np.zeros(6, np.float32))
    assert drawn == []


@needs_gl
@pytest.mark.parametrize(("domain", "camera"), [("walker", 0), ("quadruped", 2)])
def test_cameras_are_those_of_the_published_curves(domain, camera):
    env = envs.make(f"dmc_{domain}_walk_vision", options=FAST)
    shown = env.reset(seed=0)[0]["image"]
    suite = env.unwrapped._env
    flags = {"shadow": False, "reflection": False}
    expected = suite.physics.render(64, 64, camera_id=camera, render_flag_overrides=flags)
    np.testing.assert_array_equal(shown, expected)


@needs_gl
def test_fast_rendering_draws_no_shadows_and_says_so():
    notes, images = [], []
    for fast in (False, True):
        streams = Streams("dmc_walker_walk_vision", 1, parallel=False, seed=0, options={"fast_rendering": fast})
        images.append(streams.reset()["image"].astype(int))
        notes.append(streams.note)
        quality = streams._workers[0]._host._env.unwrapped._env.physics.model.vis.quality
        assert (quality.shadowsize == 0) == fast
        streams.close()
    assert "as published" in notes[0] and "without shadows" in notes[1]
    difference = np.abs(images[0] - images[1]).mean()
    assert 0 < difference < 30


@needs_gl
def test_pictures_from_processes_are_those_of_this_process():
    rows = []
    for parallel in (False, True):
        streams = Streams("dmc_cartpole_swingup_vision", 2, parallel=parallel, seed=0, options=FAST)
        streams.reset()
        streams.send(np.ones((2, 1), np.float32))
        rows.append(streams.receive()["image"])
        streams.close()
    np.testing.assert_array_equal(*rows)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"fast_rendring": True}, "did you mean fast_rendering?"),
        ({"shadows": True}, "its options are image_size, fast_rendering, state"),
        ({"state": 1}, "option state is 1; give true or false"),
    ],
)
def test_options_of_vision_are_told(options, expected):
    with pytest.raises(EnvError, match=expected.replace("?", r"\?")):
        envs.make("dmc_walker_walk_vision", options=options)
    with pytest.raises(EnvError, match="has no options"):
        envs.make("dmc_walker_walk", options=options)


@needs_gl
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_triton_can_still_be_loaded_where_pictures_were_drawn():
    code = "import envs; envs.make('dmc_walker_walk_vision').reset(seed=0); import triton; print('alive')"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.stdout == "alive\n", done.stderr


@pytest.mark.parametrize(
    ("backend", "expected"),
    [
        ("osmesa", "apt-get install libosmesa6"),
        ("egl", "apt-get install libegl1 libgl1-mesa-dri"),
        ("glfw", "(there is no display): set MUJOCO_GL=egl and apt-get install libegl1"),
        ("disabled", "set MUJOCO_GL=egl before starting Python"),
    ],
)
def test_what_is_missing_for_drawing_is_named_on_one_line(backend, expected):
    code = """
from OpenGL.platform import ctypesloader
ctypesloader.loadLibrary = lambda *arguments, **more: None  # what it gives where a library is missing
import envs
try:
    envs.make("dmc_walker_walk_vision")
except envs.EnvError as error:
    print(error)
"""
    environment = {
        key: value for key, value in os.environ.items() if "DISPLAY" not in key and key != "PYOPENGL_PLATFORM"
    }
    environment |= {"MUJOCO_GL": backend, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert expected in done.stdout, done.stderr
    assert done.stdout.count("\n") == 1
