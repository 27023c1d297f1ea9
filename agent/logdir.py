"""The folder of a run: whose it is, what can be gone on with in it, and a new one."""

import itertools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from agent import checkpoint
from agent import config as configuration
from agent.dealing import parts
from agent.errors import UserError
from agent.replay_files import ReplayFiles, names
from agent.schema import Config

TEMPORARY = "config.yaml.tmp"
"""All that a run killed at its very start leaves."""


def check(config: Config, logdir: Path) -> None:
    """UserError if `logdir` holds something else than a run of this configuration. Changes nothing on disk."""
    file = logdir / "config.yaml"
    there = next(path for path in (logdir, *logdir.parents) if os.path.lexists(path))
    if not there.is_dir():
        raise UserError(f"{logdir} cannot be a folder, as {there} is a file; give another one, with --logdir or --out")
    if file.exists():
        for key, held, asked in configuration.differences(configuration.load(file), config):
            if not configuration.may_change_on_resume(key):
                raise UserError(
                    f"{logdir} holds a run with {key}={held}, and this command asks for {asked}; "
                    "resume with the same command, or give another --logdir"
                )
    elif logdir.exists() and any(path.name != TEMPORARY for path in logdir.iterdir()):
        raise UserError(f"{logdir} is not empty and holds no run (no config.yaml); give another --logdir")


def identity(config: Config) -> dict[str, Any]:
    """The settings, by dotted key, that all parts of one run have in common."""
    return {
        key: value for key, value in configuration.flat(config).items() if not configuration.may_change_on_resume(key)
    }


def is_of_a_run(state: dict[str, Any]) -> bool:
    """Whether this looks like what a training run saves."""
    try:
        replays = [part["replay"] for part in parts(state)]
        if not isinstance(state["run"], dict) or not all(isinstance(replay, dict) for replay in replays):
            return False
        return all(isinstance(name, str) for replay in replays for name in names(replay))
    except (KeyError, TypeError, IndexError):  # the last one of a tensor that is asked for an entry
        return False


def find_checkpoint(config: Config, logdir: Path, notify: Callable[[str], None]) -> tuple[Path, dict[str, Any]] | None:
    """The newest checkpoint of this run that is whole, with its replay, and its state; None if there are none at all.

    Args:
        config: of the run.
        logdir: its folder.
        notify: told of each checkpoint that is passed over.

    Raises:
        UserError: there are checkpoints, and none is fit.
    """
    files = ReplayFiles(logdir / "checkpoints" / "replay")

    def check_state(state: dict[str, Any]) -> None:
        if not is_of_a_run(state):
            raise UserError(f"{logdir}: a checkpoint here is not of a training run; remove it")
        theirs, ours = state["run"], identity(config)
        for key in ours | theirs:
            if theirs.get(key) != ours.get(key):
                raise UserError(
                    f"{logdir}: a checkpoint of another run lies here, with {key}={theirs.get(key)} and not"
                    f" {ours.get(key)}; remove it"
                )
        for part in parts(state):
            files.verify(part["replay"])

    return checkpoint.recover(logdir / "checkpoints", notify, check_state)


def claim(config: Config, logdir: Path) -> None:
    """Write the configuration into `logdir`, once everything that can be wrong with it has been found right."""
    file, text = logdir / "config.yaml", configuration.dump(config)
    try:
        logdir.mkdir(parents=True, exist_ok=True)
        temporary = logdir / TEMPORARY  # a full disk must not cost the run its configuration
        try:
            temporary.write_text(text)
            os.replace(temporary, file)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"{logdir} cannot be written ({error.strerror}); give another --logdir") from error


def new_logdir(*configs: Config) -> Path:
    """A folder under `runs/` that does not exist yet, named after what the configurations have in common."""
    named = [(config.env.name, config.core.name, config.size, f"seed{config.seed}") for config in configs]
    common = [values[0] for values in zip(*named, strict=True) if len(set(values)) == 1]
    name = "-".join(common or ["several"]).replace("/", "_")
    for number in itertools.count(1):
        path = Path("runs") / f"{name}-{number}"
        if not os.path.lexists(path):
            return path
    raise AssertionError("unreachable")
