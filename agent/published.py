"""Published learning curves, and the scales on which returns of different tasks can be averaged."""

import csv
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from agent.errors import UserError

SCALES = "scales.csv"


class Published(NamedTuple):
    """A published curve: right edges of bins in frames; mean, lowest and highest seed, each (N,)."""

    frames: np.ndarray
    mean: np.ndarray
    low: np.ndarray
    high: np.ndarray

    def at(self, frames: int) -> float | None:
        """The mean at these frames, between bins on the line from one to the next; None beyond the curve."""
        if not self.frames[0] <= frames <= self.frames[-1]:
            return None
        return float(np.interp(frames, self.frames, self.mean))


def read_published(place: Path) -> dict[str, Published]:
    """All curves of a file, or of a folder's `*.csv`, by task; of a task in two files, the first.

    Raises:
        UserError: a file cannot be read or lacks a column.
    """
    found: dict[str, Published] = {}
    for file in sorted(place.glob("*.csv")) if place.is_dir() else [place]:
        if file.name == SCALES:
            continue
        rows: dict[str, list[tuple[float, ...]]] = {}
        for row in _rows(file):
            try:
                numbers = tuple(float(row[column]) for column in ("frames", "mean", "min", "max"))
                rows.setdefault(row["task"], []).append(numbers)
            except (KeyError, ValueError, TypeError) as error:
                raise UserError(f"{file}: {error}; it needs the columns task, frames, mean, min, max") from None
        found = {task: Published(*np.array(values).T) for task, values in rows.items()} | found
    return found


def read_scales(folder: Path) -> dict[str, tuple[float, float]]:
    """The returns that count as 0 and as 1 in a normalised table, by task or by suite; none if it has no such file."""
    file = folder / SCALES
    return {row["task"]: (float(row["low"]), float(row["high"])) for row in _rows(file)} if file.exists() else {}


def _rows(file: Path) -> list[dict[str, str]]:
    try:
        with file.open(newline="") as stream:
            return list(csv.DictReader(stream))
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror})") from None


def normalised(task: str, value: float, scales: Mapping[str, tuple[float, float]]) -> float | None:
    """The value on the scale of its task, or else of its suite; None where there is none."""
    scale = scales.get(task) or scales.get(task.partition("_")[0])
    return None if scale is None else (value - scale[0]) / (scale[1] - scale[0])
