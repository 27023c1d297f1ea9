"""Wrappers for observations that are images: drawn once for each action, and brought to one size."""

from typing import Any

import gymnasium
import numpy as np
import PIL.Image
from gymnasium import spaces

SMALLEST = 16  # pixels: what is smaller in height or width is no picture, but a board or a table of codes


def is_image(space: spaces.Space) -> bool:
    """Whether a space is of pictures: bytes (height, width, channels), (channels, height, width) or (height, width)."""
    if not isinstance(space, spaces.Box) or space.dtype != np.uint8 or len(space.shape) not in (2, 3):
        return False
    return min(image_shape(space.shape)[:2]) >= SMALLEST


def image_shape(shape: tuple[int, ...]) -> tuple[int, int, int]:
    """(height, width, channels) of a picture whose array has this shape."""
    if len(shape) == 2:
        return shape[0], shape[1], 1
    first, second, third = shape
    return (second, third, first) if channels_first(shape) else (first, second, third)


def channels_first(shape: tuple[int, ...]) -> bool:
    """Whether this is (channels, height, width): of three axes the first is the shortest."""
    return len(shape) == 3 and shape[0] < min(shape[1:])


def as_image(value: Any, shape: tuple[int, ...]) -> np.ndarray:
    """A picture of `shape` as an array (height, width, channels) of its own.

    Raises:
        ValueError: it has another shape.
    """
    value = np.asarray(value, np.uint8)
    if value.shape != shape:
        raise ValueError(f"an image has shape {value.shape}, its space says {shape}")
    if channels_first(shape):
        value = np.moveaxis(value, 0, -1)
    return np.array(value.reshape(image_shape(shape)), order="C")


def resized(image: np.ndarray, size: int) -> np.ndarray:
    """Bytes (height, width, channels) -> (size, size, channels), smoothed where it shrinks."""
    if image.shape[:2] == (size, size):
        return image
    channels = [PIL.Image.fromarray(np.ascontiguousarray(image[..., channel])) for channel in range(image.shape[-1])]
    small = [np.asarray(channel.resize((size, size), PIL.Image.Resampling.BILINEAR)) for channel in channels]
    return np.stack(small, -1)


class ResizedImages(gymnasium.ObservationWrapper):
    """Every image of a Dict observation becomes one of `size` x `size` pixels."""

    def __init__(self, env: gymnasium.Env, size: int) -> None:
        """Resize the images of `env`."""
        super().__init__(env)
        self._size = size
        assert isinstance(env.observation_space, spaces.Dict)
        self._images = [key for key, space in env.observation_space.items() if is_image(space)]
        of_size = {key: picture(size, (env.observation_space[key].shape or ())[-1]) for key in self._images}
        self.observation_space = spaces.Dict({**env.observation_space, **of_size})

    def observation(self, observation: dict[str, Any]) -> dict[str, Any]:
        """Resize the images of one observation."""
        return {**observation, **{key: resized(observation[key], self._size) for key in self._images}}


def picture(size: int, channels: int) -> spaces.Space:
    """The space of images of `size` x `size` pixels."""
    return spaces.Box(0, 255, (size, size, channels), np.uint8)


class DrawnImage(gymnasium.ObservationWrapper):
    """Adds to a Dict observation the entry `image`, which the innermost environment draws by `draw(size)`.

    Outside of an action repeat it is drawn once for each action, and not for the frames that nobody sees.
    """

    def __init__(self, env: gymnasium.Env, size: int) -> None:
        """Draw `env` at `size` x `size` pixels."""
        super().__init__(env)
        self._size = size
        assert isinstance(env.observation_space, spaces.Dict)
        self.observation_space = spaces.Dict({**env.observation_space, "image": picture(size, 3)})

    def observation(self, observation: dict[str, Any]) -> dict[str, Any]:
        """Add the picture of what is now."""
        return {**observation, "image": self.unwrapped.draw(self._size)}  # type: ignore[attr-defined]
