"""Compiling in another process while this one already trains.

A user should not wait a minute for the first update, and compiling takes that long. So a run begins uncompiled: on a
GPU with the captured graph of single kernels, which is ready within seconds. Meanwhile a second process makes one
update of an agent of the same shapes and so fills the compiler's cache. When it has ended the run goes on compiled, for
which it then only has to load. Of several runs that start together, as seeds do, one compiles for all.
"""

import dataclasses
import fcntl
import hashlib
import multiprocessing
import os
import signal
import tempfile
import time
from collections.abc import Callable
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import Any

import torch
from gymnasium import spaces

from agent.compiler import CACHE_VARIABLE, use_lasting_cache
from agent.distributed import Ranks
from agent.errors import UserError
from agent.random_state import make_deterministic
from agent.rehearsal import rehearsing
from agent.schema import Config
from envs.workers import die_with_parent

NOT_COMPILED = {"seed", "steps", "env", "replay", "log", "checkpoint"}
"""Parts of a configuration in which runs may differ and still compile the same."""


def is_wanted(config: Config, device: torch.device, ranks: Ranks) -> bool:
    """Whether a run compiles ahead: where it is asked to, and by itself on a GPU, unless something forbids it.

    Raises:
        UserError: it is asked to, and may not change over at an update that nobody knows beforehand.
    """
    if config.compile != "ahead" and not (config.compile == "auto" and device.type == "cuda"):
        return False
    against = None
    if config.deterministic:
        against = "changes over at a time of its own, which deterministic forbids"
    elif ranks.size > 1:
        against = "is for one process, as all ranks must change over together"
    if against and config.compile == "ahead":
        raise UserError(f"compile: ahead {against}; use full")
    return against is None


class CompilingAhead:
    """The process that compiles; it ends by itself, with this one, or by `stop`."""

    def __init__(
        self, observations: spaces.Space[Any], action: spaces.Space[Any], config: Config, device: torch.device
    ):
        use_lasting_cache()  # before the environment is handed on
        context = multiprocessing.get_context("spawn")  # no process that has used CUDA may fork
        arguments = observations, action, config, device
        self._process: SpawnProcess = context.Process(target=_live, args=arguments, daemon=True)
        self._process.start()

    def is_done(self) -> bool:
        """Whether it has ended."""
        return not self._process.is_alive()

    def has_failed(self) -> bool:
        """Whether it has ended without filling the cache, so that the run has to compile by itself."""
        return self.is_done() and self._process.exitcode != 0

    def stop(self) -> None:
        """End it now."""
        self._process.terminate()
        self._process.join()


def _live(*arguments: Any) -> None:
    """The whole life of the process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes of a group, but the run decides
    die_with_parent()
    compile_once(what_is_compiled(*arguments), lambda: compile_update(*arguments))


def what_is_compiled(
    observations: spaces.Space[Any], action: spaces.Space[Any], config: Config, device: torch.device
) -> str:
    """A name that runs share if they compile the same code."""
    names = [field.name for field in dataclasses.fields(config) if field.name not in NOT_COMPILED]
    settings = {name: getattr(config, name) for name in names}
    decisive = observations, action, settings, device, torch.get_num_threads(), torch.__version__
    return hashlib.sha256(repr(decisive).encode()).hexdigest()


def compile_once(name: str, fill: Callable[[], None]) -> None:
    """Fill the compiler's cache, unless another process is filling it with the same: then wait for that one.

    Side by side they would take as many times the work, each the time of all. The file that is locked says when the
    cache was last filled; if that was before this call began, the compiler has to look for itself, as the cache may
    have been emptied since.

    Args:
        name: of what is filled in, from `what_is_compiled`.
        fill: does it. If it fails, or its process ends, the next one that waits begins.
    """
    begun = time.time()
    folder = Path(os.environ.get(CACHE_VARIABLE, tempfile.gettempdir())) / "being_compiled"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / name).open("a+")
        fcntl.flock(file, fcntl.LOCK_EX)  # until the file is closed
    except OSError:  # not writable, or without locks: then each for itself
        fill()
        return
    with file:
        file.seek(0)
        if float(file.read() or 0) > begun:
            return
        fill()
        file.truncate(0)
        file.write(str(time.time()))


def compile_update(
    observations: spaces.Space[Any], action: spaces.Space[Any], config: Config, device: torch.device
) -> None:
    """Make one compiled update as a run of this configuration would, for the cache."""
    make_deterministic(config, device)  # code is kept under a name to which this belongs
    agent, replay = rehearsing(observations, action, dataclasses.replace(config, compile="full"), device)
    agent.update(replay.sample(config.train.batch_size))
    agent.take_metrics()  # waits for the device
