"""Many environments as endless streams of rows, stepped in processes of their own or in this one."""

import contextlib
import dataclasses
import functools
import logging
import multiprocessing
import os
import signal
import threading
import traceback
from collections.abc import Iterator, Mapping
from multiprocessing.connection import wait
from typing import Any

import gymnasium
import numpy as np
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv

import envs
from envs.episodes import Episodes, Memory, Past
from envs.errors import EnvError, EnvironmentFailure
from envs.wrappers import RESERVED

logger = logging.getLogger(__name__)

FAREWELL = 5.0  # seconds that a step under way may take when the streams are closed

Row = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Finished:
    """An episode that has ended."""

    index: int  # of its environment
    episode_return: float
    length: int  # agent steps
    metrics: dict[str, float]  # what the environment itself told, in `info["episode_metrics"]` of the last step


class Streams:
    """N environments side by side, each an endless stream of rows: the next episode follows the last.

    A row is a dict of the observation's entries (N, ...) and `reward` float32, `is_first`, `is_last`,
    `is_terminal` bool, all (N,). `reward` belongs to arriving at the row and is 0 at a first one;
    `is_terminal` marks an end by the environment's own rules, not by a time limit. The action that answers an
    `is_last` row is ignored; the next row is the first of the next episode.

    Environment i is first reset with `seed + i`, and each later episode with a seed drawn from that and its number:
    equal seeds and actions give equal rows. So streams are saved as the actions of the running episodes, and restored
    by taking them again (see `envs.episodes`).

    No row holds NaN or infinity: the environment that gives one is named as a failure.

    Attributes:
        observation_space, action_space: of a single environment, as `envs.make` gives them.
        amount: N.
        finished: every episode that ended in the newest row.
        note: what the environment wants said when a run begins, or None.
    """

    def __init__(
        self,
        name: str,
        amount: int,
        *,
        parallel: bool,
        seed: int,
        action_repeat: int = 1,
        time_limit: int | None = None,
        options: Mapping[str, Any] | None = None,
    ) -> None:
        """Make `amount` environments `name`, each in a process of its own if `parallel`.

        Raises:
            EnvError: the environment cannot be made (see `envs.make`), or `amount` is below 1.
            EnvironmentFailure: its constructor raised something else.
        """
        if amount < 1:
            raise EnvError(f"the number of environments is {amount}; give 1 or more")
        makers = [
            functools.partial(
                make_reported, name, index, action_repeat=action_repeat, time_limit=time_limit, options=options
            )
            for index in range(amount)
        ]
        self.amount = amount
        self.finished: list[Finished] = []
        self._name = name
        self._seed = seed
        self._pending = False
        self._failed = False
        self._actions: np.ndarray | None = None
        self._newest: Row | None = None
        self._episodes = np.full(amount, -1)
        self._last = np.zeros(amount, bool)
        self._returns = np.zeros(amount)
        self._lengths = np.zeros(amount, int)
        self._envs: AsyncVectorEnv | SyncVectorEnv = make_parallel(name, makers) if parallel else make_serial(makers)
        self.observation_space = self._envs.single_observation_space
        self.action_space = self._envs.single_action_space
        self.note: str | None = self._envs.metadata.get("note")
        self._memory = Memory(amount, self.action_space)

    def reset(self) -> Row:
        """Start every environment anew from its seed and return the first row."""
        with self._reporting():
            observation, _ = self._envs.reset(seed=self._seed)
        nothing = np.zeros(self.amount, bool)
        self._episodes[:] = -1
        self._last = ~nothing  # what follows a last row is a first row
        return self._row(observation, np.zeros(self.amount), nothing, nothing, {})

    def state_dict(self) -> dict[str, Any]:
        """The running episodes, as arrays, lists and plain types; after a failure or amid a step they are lost."""
        return {
            "row": None if self._failed or self._pending else self._newest,
            "episodes": self._episodes.tolist(),
            "actions": self._memory.actions(),
            "returns": self._returns.tolist(),
            "lengths": self._lengths.tolist(),
        }

    def restore(self, state: dict[str, Any]) -> tuple[Row, list[int]]:
        """Go on from `state_dict`; needs the arguments that those streams had.

        Returns:
            The newest row, and which environments could not be brought back: their episodes are cut, and the row holds
            the first of their next ones.
        """
        nothing = np.zeros(self.amount, bool)
        with self._reporting():
            self._envs.set_attr("past", self._pasts(state))
            observation, _ = self._envs.reset(seed=self._seed)
            cut = np.array(self._envs.get_attr("cut"))
        self._episodes = np.array(state["episodes"]) - 1 + cut
        self._last = ~nothing
        row = self._row(observation, np.zeros(self.amount), nothing, nothing, {})
        if not cut.all():
            row = {key: np.where(spread(cut, value), value, state["row"][key]) for key, value in row.items()}
            self._returns = np.where(cut, 0.0, state["returns"])
            self._lengths = np.where(cut, 0, state["lengths"])
            self._memory.load(state["actions"])
            self._memory.forget(cut)
        self._newest, self._last = row, row["is_last"]
        return row, [int(index) for index in np.flatnonzero(cut)]

    def _pasts(self, state: dict[str, Any]) -> list[Past]:
        row, pasts = state["row"], []
        for index, (episode, actions) in enumerate(zip(state["episodes"], state["actions"], strict=True)):
            if row is None or actions is None:
                pasts.append(Past(episode, np.zeros(0), None))
            else:
                pasts.append(Past(episode, actions, {key: row[key][index] for key in observation_keys(row)}))
        return pasts

    def send(self, actions: np.ndarray) -> None:
        """Start one step; actions are (N, A) float32, (N,) int64 or (N, k) int64 as the space demands."""
        if isinstance(self._envs, AsyncVectorEnv):
            with self._reporting():
                self._envs.step_async(actions)
        self._memory.add(actions)
        self._actions = actions
        self._pending = True

    def receive(self) -> Row:
        """Wait for the step that `send` started and return its row.

        Raises:
            EnvironmentFailure: an environment raised, gave a number that is not finite, or its process died. Close
                the streams then.
        """
        if not self._pending:
            raise RuntimeError("receive() without send(): every send is answered by one receive")
        self._pending = False
        with self._reporting():
            if isinstance(self._envs, AsyncVectorEnv):
                observation, reward, terminated, truncated, infos = self._envs.step_wait()
            else:
                observation, reward, terminated, truncated, infos = self._envs.step(self._actions)
        return self._row(observation, reward, terminated, truncated, infos)

    def close(self) -> None:
        """End the environments and their processes; a step under way may finish, a failure ends them."""
        if not isinstance(self._envs, AsyncVectorEnv):
            self._envs.close()
        elif not self._envs.closed:
            if not self._failed:
                self._leave(self._envs)
            if self._failed:
                kill(self._envs)

    def _leave(self, vector: AsyncVectorEnv) -> None:
        """Close in order; whatever goes wrong counts as a failure."""
        try:
            with self._reporting():
                if self._pending:
                    vector.step_wait(timeout=FAREWELL)
                vector.close()
        except Exception:
            logger.debug("the environments could not be closed in order", exc_info=True)

    def _row(
        self,
        observation: Row,
        reward: np.ndarray,
        terminated: np.ndarray,
        truncated: np.ndarray,
        infos: dict[str, Any],
    ) -> Row:
        first, last = self._last, terminated | truncated
        self._returns = np.where(first, 0.0, self._returns + reward)
        self._lengths = np.where(first, 0, self._lengths + 1)
        self._last = last
        self.finished = [
            Finished(index, float(self._returns[index]), int(self._lengths[index]), metrics_of(infos, index))
            for index in np.flatnonzero(last).tolist()
        ]
        self._episodes += first
        self._memory.forget(first)
        flags = {"is_first": first, "is_last": last, "is_terminal": terminated}
        with np.errstate(over="ignore"):  # what overflows is not finite, and reported
            row = {**observation, "reward": reward.astype(np.float32), **flags}
        self._check_finite(row)
        self._newest = row
        return row

    def _check_finite(self, row: Row) -> None:
        for key, values in row.items():
            if values.dtype.kind != "f" or np.isfinite(values).all():
                continue
            index = int(np.flatnonzero(~np.isfinite(values.reshape(self.amount, -1)).all(1))[0])
            what = "reward" if key == "reward" else f"observation {key!r}"
            wrong = values[index].reshape(-1)[~np.isfinite(values[index].reshape(-1))][0]
            self._failed = True
            message = f"environment {index} ({self._name}) gave {what} with a value that is not finite ({wrong})"
            raise EnvironmentFailure(message, index, self._name)

    @contextlib.contextmanager
    def _reporting(self) -> Iterator[None]:
        """Remember a failure, and name the process that died where only a closed pipe is left of it."""
        try:
            with quiet_gymnasium():
                yield
        except BaseException as error:  # Ctrl-C included: answers half read can never be sorted out again
            self._failed = True
            if isinstance(error, EOFError | ConnectionError):
                raise self._death() from None
            raise

    def _death(self) -> EnvironmentFailure:
        processes = self._envs.processes if isinstance(self._envs, AsyncVectorEnv) else []
        wait([process.sentinel for process in processes], timeout=FAREWELL)  # the pipe closes a moment before
        for index, process in enumerate(processes):
            if process.exitcode is not None:
                message = (
                    f"environment {index} ({self._name}) died: its process ended with exit code"
                    f" {process.exitcode} (-9 often means out of memory; try fewer environments)"
                )
                return EnvironmentFailure(message, index, self._name)
        return EnvironmentFailure(f"an environment of {self._name} closed its connection", -1, self._name)


def metrics_of(infos: dict[str, Any], index: int) -> dict[str, float]:
    """The `episode_metrics` of environment `index`, from the infos of a vector environment.

    There a number is an array over environments, and an array of the same name after "_" says which of them have it.
    """
    metrics = infos.get("episode_metrics", {})
    told = [name for name in metrics if f"_{name}" in metrics and metrics[f"_{name}"][index]]
    return {name: float(metrics[name][index]) for name in told}


def observation_keys(row: Row) -> list[str]:
    """The entries of a row that the environment itself names."""
    return [key for key in row if key not in RESERVED]


def spread(chosen: np.ndarray, values: np.ndarray) -> np.ndarray:
    """A mask (N,) in the shape (N, 1, ...) that fits values (N, ...)."""
    return chosen.reshape(-1, *[1] * (values.ndim - 1))


def make_serial(makers: list[functools.partial]) -> SyncVectorEnv:
    """Put all environments in this process."""
    return SyncVectorEnv(makers, autoreset_mode=AutoresetMode.NEXT_STEP)


def make_parallel(name: str, makers: list[functools.partial]) -> AsyncVectorEnv:
    """Give each environment a process, forked from a clean server that has imported everything before.

    Forking from this process would copy its threads' locks, starting afresh would import everything N times.
    """
    suite, _, task = name.partition("_")
    modules = envs.ADAPTERS[suite].preload(task) if suite in envs.ADAPTERS else []
    multiprocessing.get_context("forkserver").set_forkserver_preload(["__main__", *modules])
    try:
        return AsyncVectorEnv(makers, shared_memory=True, context="forkserver", autoreset_mode=AutoresetMode.NEXT_STEP)
    except (EOFError, ConnectionError):
        message = f"an environment of {name} died while it was made in its process; its own words are above"
        raise EnvironmentFailure(message, -1, name) from None


def kill(vector: AsyncVectorEnv) -> None:
    """End all processes at once, without a word to them."""
    for process in vector.processes:
        process.kill()
        process.join()
    vector.closed = True


def make_reported(
    name: str, index: int, *, action_repeat: int, time_limit: int | None, options: Mapping[str, Any] | None
) -> gymnasium.Env:
    """Make environment `index`, whose errors carry its name and index; tie a process of its own to ours."""
    if multiprocessing.parent_process() is not None:
        # Ctrl-C and a job manager's signal reach all processes of a group, but the main one decides what follows.
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)
        threading.Thread(target=die_with_parent, daemon=True).start()
    with reporting(name, index, "make"):
        env = envs.make(name, action_repeat=action_repeat, time_limit=time_limit, options=options)
    return Reported(Episodes(env), name, index)


def die_with_parent() -> None:
    """Wait until the main process is gone, then leave at once, even from the middle of a step."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


class Reported(gymnasium.Wrapper):
    """Raises every error of an environment as EnvironmentFailure; of infos it keeps the one that is read."""

    def __init__(self, env: gymnasium.Env, name: str, index: int) -> None:
        """Report errors of `env` as those of environment `index` made by `name`."""
        super().__init__(env)
        self._name = name
        self._index = index

    def reset(self, **arguments: Any) -> tuple[Any, dict[str, Any]]:
        """Start an episode."""
        with reporting(self._name, self._index, "reset"):
            observation, _ = self.env.reset(**arguments)
        return observation, {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        """Take one step."""
        with reporting(self._name, self._index, "step"):
            observation, reward, terminated, truncated, info = self.env.step(action)
            metrics = {name: float(value) for name, value in info.get("episode_metrics", {}).items()}
            kept = {"episode_metrics": metrics} if metrics else {}
            return observation, float(reward), bool(terminated), bool(truncated), kept


@contextlib.contextmanager
def reporting(name: str, index: int, action: str) -> Iterator[None]:
    """Turn any error but a user's mistake into an EnvironmentFailure with the traceback in its message."""
    try:
        yield
    except EnvError:
        raise
    except Exception as error:
        summary = f"environment {index} ({name}) raised {type(error).__name__} in {action}: {error}"
        raise EnvironmentFailure(f"{summary}\n{traceback.format_exc()}", index, name) from None


@contextlib.contextmanager
def quiet_gymnasium() -> Iterator[None]:
    """Keep gymnasium from logging a worker's error, which is raised anyway.

    Its logger also formats the traceback with `%`, and so fails on every traceback that has a percent sign.
    """
    level = gymnasium.logger.min_level
    gymnasium.logger.min_level = gymnasium.logger.ERROR + 1
    try:
        yield
    finally:
        gymnasium.logger.min_level = level
