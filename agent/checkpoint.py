"""Checkpoints: files that are whole or absent, carry their checksum in their name, and run no code when read."""

import hashlib
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from agent.errors import UserError, writing

FORMAT = "dreamer-that-remembers"
VERSION = 2  # of the files' layout; raise it when an old file can no longer be read
DIGITS = 16  # of the SHA-256 of a file, in its name


def save(directory: Path, step: int, state: dict[str, Any], keep: int) -> Path:
    """Writes directory/step_<12 digits>_<checksum>.pt, then removes others of this step and all but the newest `keep`.

    Args:
        directory: where checkpoints lie; made if missing.
        step: of the run.
        state: nested dicts, lists, plain types and tensors.
        keep: how many stay, this one among them.

    Raises:
        UserError: the file cannot be written; those before are as they were.
    """
    with writing(directory):
        for leftover in directory.glob("*.tmp"):  # of a run that was killed while it wrote
            leftover.unlink()
    path = write(directory / f"step_{step:012d}", state)
    with writing(path):
        for other in candidates(directory):
            if other != path and _step(other) == step:
                other.unlink()
        for surplus in candidates(directory)[keep:]:
            surplus.unlink()
    return path


def keep_as_best(path: Path) -> None:
    """Gives a checkpoint the second name best_..., under which it outlives its first one; there is one best."""
    best = path.with_name(path.name.replace("step_", "best_", 1))
    temporary = best.with_name(best.name + ".tmp")
    with writing(best):
        try:
            temporary.unlink(missing_ok=True)
            try:
                os.link(path, temporary)
            except OSError:  # not every file system has links
                shutil.copyfile(path, temporary)
            os.replace(temporary, best)
        finally:
            temporary.unlink(missing_ok=True)
        for other in path.parent.glob("best_*.pt"):
            if other != best:
                other.unlink()
        _sync_directory(path.parent)


def candidates(directory: Path) -> list[Path]:
    """Checkpoints of a run, whole or not, highest step first."""
    found = [path for path in directory.glob("step_*.pt") if re.fullmatch(r"step_\d+(_[0-9a-f]+)?\.pt", path.name)]
    return sorted(found, key=lambda path: (_step(path), path.stat().st_mtime_ns), reverse=True)


def latest(directory: Path) -> Path | None:
    """The checkpoint of the highest step, None if there is none."""
    return next(iter(candidates(directory)), None)


def recover(
    directory: Path,
    notify: Callable[[str], None],
    check: Callable[[dict[str, Any]], None] = lambda state: None,
) -> tuple[Path, dict[str, Any]] | None:
    """The newest checkpoint that can be read, and its state; None if there are none at all.

    Args:
        directory: where checkpoints lie.
        notify: told of each one that is passed over, in one line.
        check: raises UserError for a state that cannot be gone on with.

    Raises:
        UserError: there are checkpoints, and none is fit.
    """
    found = candidates(directory)
    for number, path in enumerate(found):
        try:
            state = load(path)
            check(state)
            return path, state
        except UserError as error:
            if number + 1 == len(found):
                raise
            notify(f"{error}; trying the one before")
    return None


def set_aside(used: Path) -> None:
    """Calls the checkpoints that are newer than the one gone on with refused_...: they were passed over."""
    newer = candidates(used.parent)
    with writing(used.parent):
        for path in newer[: newer.index(used)]:
            path.rename(path.with_name(f"refused_{path.name}"))


def best_of(directory: Path) -> Path | None:
    """The checkpoint of the highest mean return, None if there is none."""
    return next(iter(sorted(directory.glob("best_*.pt"))), None)


def write(stem: Path, state: dict[str, Any]) -> Path:
    """Writes `state` to the file <stem>_<checksum>.pt, which appears under that name only when it is whole and on disk.

    Raises:
        UserError: it cannot be written; nothing is left of it.
    """
    temporary = stem.with_name(stem.name + ".tmp")
    with writing(stem):
        stem.parent.mkdir(parents=True, exist_ok=True)
        try:
            _write(temporary, {"format": FORMAT, "version": VERSION, "state": state})
            path = stem.with_name(f"{stem.name}_{_checksum(temporary)}.pt")
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)  # after a failure, gives a full disk its room back
        _sync_directory(stem.parent)
    return path


def load(path: Path) -> dict[str, Any]:
    """The state given to save(), on the CPU, mapped from the file: a tensor that nobody reads costs nothing.

    Raises:
        UserError: the file is missing, damaged, of another version or no checkpoint of this project.
    """
    verify(path)
    return peek(path)


def verify(path: Path) -> None:
    """Reads the whole file; UserError if it is missing or differs from the checksum in its name."""
    match = re.fullmatch(rf".+_([0-9a-f]{{{DIGITS}}})\.pt", path.name)
    if not match:
        raise UserError(f"{path}: not a checkpoint of this version of the project (its name has no checksum)")
    try:
        checksum = _checksum(path)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from error
    if checksum != match[1]:
        raise UserError(f"{path}: damaged (its checksum is {checksum}, not {match[1]})")


def peek(path: Path) -> dict[str, Any]:
    """As load(), without looking at the checksum first."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # what a foreign or damaged file makes torch.load raise has no common base
        raise UserError(f"{path}: damaged or no checkpoint") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise UserError(f"{path}: not a checkpoint of this project")
    version, state = content.get("version"), content.get("state")
    if not isinstance(version, int) or version != VERSION:
        raise UserError(f"{path}: checkpoint version {version}, this code reads {VERSION}")
    if not isinstance(state, dict):
        raise UserError(f"{path}: damaged or no checkpoint")
    return state


def _step(path: Path) -> int:
    return int(path.stem.split("_")[1])


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


def _checksum(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:DIGITS]


def _sync_directory(directory: Path) -> None:
    """Makes a rename in `directory` survive a power cut."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
