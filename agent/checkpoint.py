"""Checkpoints: whole or absent files of one run, and the state of the global random generators."""

import os
import random
import re
from pathlib import Path
from typing import Any

import numpy as np
import torch

from agent.errors import UserError

VERSION = 1  # of the file's layout; raise it when an old file can no longer be read


def save(directory: Path, step: int, state: dict[str, Any], keep: int) -> None:
    """Writes directory/step_<12 digits>.pt and then removes all but the newest `keep` checkpoints.

    The file takes its name only when it is whole and on disk: a crash leaves the last good one.

    state: nested dicts, lists, plain types and tensors. Raises UserError if the file cannot be written.
    """
    path = directory / f"step_{step:012d}.pt"
    temporary = path.with_name(path.name + ".tmp")
    try:
        directory.mkdir(parents=True, exist_ok=True)
        for leftover in directory.glob("step_*.pt.tmp"):
            leftover.unlink()
        try:
            _write(temporary, {"version": VERSION, "state": state})
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)  # after a failure, gives a full disk its room back
        _sync_directory(directory)
        older = [other for other in _checkpoints(directory) if other != path]
        for surplus in older[: max(len(older) - (keep - 1), 0)]:
            surplus.unlink()
    except OSError as error:
        raise UserError(
            f"{path}: cannot write the checkpoint ({error.strerror or error}); make room or choose another --logdir"
        ) from error


def latest(directory: Path) -> Path | None:
    """The checkpoint of the highest step, None if there is none."""
    return next(reversed(_checkpoints(directory)), None)


def load(path: Path) -> dict[str, Any]:
    """The state given to save(), on the CPU, mapped from the file: a tensor that nobody reads costs nothing.

    Raises UserError if the file is missing, damaged, of another version or no checkpoint of this
    project.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # what a foreign or damaged file makes torch.load raise has no common base
        reason = getattr(error, "strerror", None) or "damaged or no checkpoint"
        raise UserError(f"{path}: cannot read the checkpoint ({reason}); choose another one") from error
    if not isinstance(content, dict) or not {"version", "state"} <= content.keys():
        raise UserError(f"{path}: not a checkpoint of this project; choose another one")
    if content["version"] != VERSION:
        raise UserError(
            f"{path}: checkpoint version {content['version']}, this code reads {VERSION};"
            " use the code that wrote it or train anew"
        )
    state: dict[str, Any] = content["state"]
    return state


def random_state() -> dict[str, Any]:
    """State of Python's, NumPy's and torch's global generators, CUDA's too if the process uses CUDA."""
    version, internal, gauss = random.getstate()
    numpy = np.random.get_state(legacy=False)  # noqa: NPY002
    assert isinstance(numpy, dict)
    key = numpy["state"]["key"].tolist()
    return {
        "python": [version, list(internal), gauss],
        "numpy": {**numpy, "state": {"key": key, "pos": int(numpy["state"]["pos"])}},
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [],
    }


def set_random_state(state: dict[str, Any]) -> None:
    """Puts the generators where random_state() found them; CUDA states without a device here are left out."""
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    numpy = state["numpy"]
    key = np.array(numpy["state"]["key"], dtype=np.uint32)
    np.random.set_state({**numpy, "state": {"key": key, "pos": numpy["state"]["pos"]}})  # noqa: NPY002
    torch.set_rng_state(state["torch"])
    devices = range(torch.cuda.device_count())
    for device, device_state in zip(devices, state["cuda"], strict=False):
        torch.cuda.set_rng_state(device_state, device)


def _write(path: Path, content: dict[str, Any]) -> None:
    """Raises OSError whenever the file could not be written whole."""
    try:
        with open(path, "wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
    except RuntimeError as error:  # torch.save, closing its archive, hides the full disk behind its own complaint
        if isinstance(error.__context__, OSError):
            raise error.__context__ from error
        raise


def _sync_directory(directory: Path) -> None:
    """Makes a rename in `directory` survive a power cut."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _checkpoints(directory: Path) -> list[Path]:
    """Checkpoints in `directory`, lowest step first."""
    found = [(re.fullmatch(r"step_(\d+)\.pt", path.name), path) for path in directory.glob("step_*.pt")]
    return [path for _, path in sorted((int(match[1]), path) for match, path in found if match)]
