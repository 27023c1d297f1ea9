"""One environment of many, in this process or in one of its own: it answers commands, or fails with a cause."""

import contextlib
import fcntl
import logging
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import gymnasium
import numpy as np

from envs.episodes import Episodes, Past
from envs.errors import EnvError, EnvironmentFailure, WrongValue, failing

logger = logging.getLogger(__name__)

SLICE = 1.0  # seconds of waiting that count at once: of a pause of this process (Ctrl-Z) only one does
FAREWELL = 5.0  # seconds that a step under way may take when a process is to end

LARGEST = float(np.finfo(np.float32).max)

Make = Callable[[], gymnasium.Env]


class Host:
    """An environment and its answers to commands, in plain types; whatever goes wrong is an EnvironmentFailure."""

    def __init__(self, make: Make, name: str, index: int) -> None:
        """Make environment `index`, known as `name`; what a user can mend raises EnvError as it is."""
        self._name, self._index = name, index
        try:
            self._env = Episodes(make())
        except EnvironmentFailure as failure:
            raise EnvironmentFailure(f"environment {index}: {failure}", index, name, failure.details) from None

    def description(self) -> tuple[gymnasium.Space, gymnasium.Space, str | None]:
        """The observation and the action space, and what the environment wants said when a run begins."""
        return self._env.observation_space, self._env.action_space, self._env.metadata.get("note")

    def begin(self, seed: int, past: Past | None) -> tuple[Any, bool]:
        """Begin episode 0, or live through `past`; give the observation, and whether the past was cut."""
        with self._reporting("reset"):
            self._env.past = past
            observation, _ = self._env.reset(seed=seed)
            return observation, self._env.cut

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, float]]:
        """Take one step, or begin the next episode; give observation, reward, both ends, and the episode's metrics."""
        with self._reporting("reset" if self._env.over else "step"):
            observation, reward, terminated, truncated, info = self._env.step(action)
            for flag, value in (("terminated", terminated), ("truncated", truncated)):
                if value not in (True, False):
                    raise WrongValue(f"{flag} as {value!r}; return a bool, as in bool({flag})")
            reward = float(reward)
            if not abs(reward) <= LARGEST:
                raise WrongValue(f"the reward {reward}, which is not finite in float32; return one finite number")
            metrics = {name: float(value) for name, value in info.get("episode_metrics", {}).items()}
            return observation, reward, bool(terminated), bool(truncated), metrics

    def close(self) -> None:
        """Free what the environment holds."""
        self._env.close()

    def _reporting(self, action: str) -> contextlib.AbstractContextManager[None]:
        return failing(f"environment {self._index} ({self._name})", f"in {action}", self._index, self._name)


class Inside:
    """A worker in this process, which is quick, but whose environment can hang or crash all of it."""

    def __init__(self, make: Make, name: str, index: int) -> None:
        """Nothing happens before `start`."""
        self._arguments = make, name, index
        self._host: Host | None = None
        self._command: tuple[str, tuple[Any, ...]] = ("description", ())

    def start(self) -> None:
        """Make the environment, anew if there was one; `receive` then gives its spaces."""
        self.kill()
        self._command = ("description", ())

    def send(self, command: str, *arguments: Any) -> None:
        """Ask for something that Host can do."""
        self._command = (command, arguments)

    def receive(self, timeout: float | None) -> Any:
        """The answer; what fails raises EnvironmentFailure, a user's mistake EnvError. Time has no limit here."""
        if self._host is None:
            self._host = Host(*self._arguments)
        command, arguments = self._command
        return getattr(self._host, command)(*arguments)

    def ask_to_end(self) -> None:
        """Close the environment; an error in that is of no consequence any more."""
        self.kill()

    def kill(self, patience: float = 0.0) -> None:
        """Close the environment, however long it takes."""
        host, self._host = self._host, None
        if host is not None:
            try:
                host.close()
            except Exception:
                logger.debug("an environment could not be closed", exc_info=True)


class Outside:
    """A worker in a process of its own, forked from a clean server that has imported everything before.

    Forking from this process would copy its threads' locks, starting afresh would import everything each time.
    """

    def __init__(self, make: Make, name: str, index: int) -> None:
        """Nothing happens before `start`."""
        self._arguments = make, name, index
        self._name, self._index = name, index
        self._doing = "make"
        self._pipe: Connection | None = None
        self.process: Any = None

    def start(self) -> None:
        """Start the process, in place of the one before if there was one; `receive` then gives the spaces."""
        self.kill()
        context = multiprocessing.get_context("forkserver")
        self._pipe, theirs = context.Pipe()
        self._doing = "make"
        self.process = context.Process(target=serve, args=(*self._arguments, theirs), daemon=True)
        try:
            self.process.start()
        except OSError as error:  # no room for one more process
            self.process = None
            raise self._failure(f"got no process ({error.strerror or error}); try fewer environments") from None
        finally:
            theirs.close()

    def send(self, command: str, *arguments: Any) -> None:
        """Ask for something that Host can do; of a process that has died, `receive` tells."""
        assert self._pipe is not None
        self._doing = command
        with contextlib.suppress(OSError):
            self._pipe.send((command, arguments))

    def receive(self, timeout: float | None) -> Any:
        """The answer to the newest command.

        Args:
            timeout: seconds after which the environment counts as hung; None waits for ever.

        Raises:
            EnvironmentFailure: the environment failed or hung, or its process died; then only `start` and `kill` help.
            EnvError: a user's mistake, when it was made.
        """
        assert self._pipe is not None
        try:
            if not self._answers(timeout):
                raise self._failure(f"gave no answer to {self._doing}() within {timeout:g} s (env.timeout)")
            fine, answer = self._pipe.recv()
        except (EOFError, OSError):
            self.process.join(FAREWELL)  # the pipe closes a moment before
            code = self.process.exitcode
            how = "closed its connection" if code is None else f"died: its process ended with exit code {code}"
            hint = " (often means out of memory; try fewer environments)" if code == -signal.SIGKILL else ""
            raise self._failure(how + hint) from None
        if not fine:
            raise answer
        return answer

    def ask_to_end(self) -> None:
        """Have the process end after what it does now."""
        if self._pipe is not None:
            self.send("close")

    def kill(self, patience: float = 0.0) -> None:
        """End the process, if it does not end by itself within `patience` seconds."""
        if self.process is not None:
            self.process.join(patience)
            self.process.kill()
            self.process.join()
        if self._pipe is not None:
            self._pipe.close()
            self._pipe = None

    def _answers(self, timeout: float | None) -> bool:
        assert self._pipe is not None
        if timeout is None:
            return self._pipe.poll(None)
        slices, rest = divmod(timeout, SLICE)
        return any(self._pipe.poll(SLICE) for _ in range(int(slices))) or self._pipe.poll(rest)

    def _failure(self, cause: str) -> EnvironmentFailure:
        return EnvironmentFailure(f"environment {self._index} ({self._name}) {cause}", self._index, self._name)


def serve(make: Make, name: str, index: int, pipe: Connection) -> None:
    """Answer commands from `pipe` until it is closed: the whole life of a process."""
    # Ctrl-C and a job manager's signal reach all processes of a group, but the main one decides what follows.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    die_with_parent()
    try:
        host = Host(make, name, index)
        pipe.send((True, host.description()))
        while True:
            command, arguments = pipe.recv()
            if command == "close":
                break
            pipe.send((True, getattr(host, command)(*arguments)))
        with contextlib.suppress(Exception):
            host.close()
    except EnvError as error:
        pipe.send((False, error))
    except (EOFError, OSError):
        pass  # nobody listens any more


def die_with_parent() -> None:
    """See to it that this process is gone as soon as the main one is, even from the middle of a step."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    # The system itself then sends SIGIO, which ends a process even while its environment lets no Python run.
    with contextlib.suppress(OSError):  # not every system has signals from pipes
        fcntl.fcntl(parent.sentinel, fcntl.F_SETOWN, os.getpid())
        fcntl.fcntl(parent.sentinel, fcntl.F_SETFL, fcntl.fcntl(parent.sentinel, fcntl.F_GETFL) | os.O_ASYNC)

    def wait() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()
