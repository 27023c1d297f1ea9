"""Categorical observations as pictures, so that a convolutional encoder has something to read."""

import math

import numpy as np
from gymnasium import spaces

from envs.errors import EnvError

SIZE = 64  # height and width, pixels
CELLS = 4  # a glyph is 4x4 coloured cells, so that hundreds of them are told apart


class Tiles:
    """Paints every category as a tile with a fixed random glyph; one tile for each variable, row by row.

    Raises:
        EnvError: an entry is not categorical, or there are too many variables.
    """

    def __init__(self, entries: dict[str, spaces.Space]) -> None:
        """Draw the glyphs for `entries`, always the same ones."""
        sizes: list[int] = []
        for key, space in entries.items():
            match space:
                case spaces.Discrete():
                    sizes.append(int(space.n))
                case spaces.MultiDiscrete():
                    sizes += [int(size) for size in space.nvec]
                case _:
                    raise EnvError(f"option encoding is image; it cannot paint {key!r}, which is not categorical")
        self._side = math.ceil(math.sqrt(len(sizes)))
        if SIZE // self._side < CELLS:
            raise EnvError(f"option encoding is image; {len(sizes)} variables are too many to paint")
        rng = np.random.default_rng(0)
        self._glyphs = [rng.integers(256, size=(size, CELLS, CELLS, 3), dtype=np.uint8) for size in sizes]
        self.space = spaces.Box(0, 255, (SIZE, SIZE, 3), np.uint8)

    def paint(self, shown: dict[str, np.ndarray]) -> np.ndarray:
        """Entries (N,) or (N, k), in the order of the spaces -> images uint8 (N, 64, 64, 3)."""
        codes = np.concatenate([value.reshape(len(value), -1) for value in shown.values()], -1)
        image = np.zeros((len(codes), SIZE, SIZE, 3), np.uint8)
        scale = SIZE // self._side // CELLS
        tile = scale * CELLS
        for index, glyphs in enumerate(self._glyphs):
            row, column = (tile * place for place in divmod(index, self._side))
            painted = glyphs[codes[:, index]].repeat(scale, 1).repeat(scale, 2)
            image[:, row : row + tile, column : column + tile] = painted
        return image
