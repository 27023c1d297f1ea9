"""Many environments as endless streams of rows, stepped in processes of their own or in this one."""

import dataclasses
import functools
import multiprocessing
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

import envs
from envs.episodes import Memory, Past
from envs.errors import EnvError, EnvironmentFailure
from envs.workers import FAREWELL, Inside, Outside
from envs.wrappers import RESERVED

Row = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Finished:
    """An episode that has ended."""

    index: int  # of its environment
    episode_return: float
    length: int  # agent steps
    metrics: dict[str, float]  # what the environment itself told, in `info["episode_metrics"]` of the last step


@dataclasses.dataclass(frozen=True)
class Broken:
    """An environment that broke and was started anew, or could not be."""

    index: int
    rows: int  # of its broken episode that were given out
    failure: EnvironmentFailure


class Streams:
    """N environments side by side, each an endless stream of rows: the next episode follows the last.

    A row is a dict of the observation's entries (N, ...) and `reward` float32, `is_first`, `is_last`,
    `is_terminal` bool, all (N,). `reward` belongs to arriving at the row and is 0 at a first one;
    `is_terminal` marks an end by the environment's own rules, not by a time limit. The action that answers an
    `is_last` row is ignored; the next row is the first of the next episode.

    Environment i is first reset with `seed + i`, and each later episode with a seed drawn from that and its number:
    equal seeds and actions give equal rows. So streams are saved as the actions of the running episodes, and restored
    by taking them again (see `envs.episodes`).

    An environment that raises, hangs, gives a value that its spaces do not allow (NaN and infinity are none), changes
    its spaces, or whose process dies is started anew, and its next episode begins: its row is a first one. What was
    given out of the broken episode is told in `broken`, and does not count as an episode. The next such failure after
    `restarts` of them is raised.

    Attributes:
        observation_space, action_space: of a single environment, as `envs.make` gives them.
        amount: N.
        finished: every episode that ended in the newest row.
        note: what the environment wants said when a run begins, or None.
        broken: every failure since the row before, the one that was raised included.
        restarts: how often an environment was started anew, all together.
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
        timeout: float | None = None,
        restarts: int = 0,
    ) -> None:
        """Make `amount` environments `name`, each in a process of its own if `parallel`.

        The other arguments are those of `envs.make`, but for two: `timeout` is the seconds in which a process must
        answer (None: for ever; an environment in this process cannot be timed), and after `restarts` failures the next
        one is raised.

        Raises:
            EnvError: the environment cannot be made (see `envs.make`), or `amount` is below 1.
            EnvironmentFailure: its constructor raised something else, hung, or its process died.
        """
        if amount < 1:
            raise EnvError(f"the number of environments is {amount}; give 1 or more")
        make = functools.partial(envs.make, name, action_repeat=action_repeat, time_limit=time_limit, options=options)
        self.amount = amount
        self.finished: list[Finished] = []
        self.broken: list[Broken] = []
        self.restarts = 0
        self._allowed, self._timeout = restarts, timeout
        self._seed = seed
        self._pending = False
        self._failed = False
        self._newest: Row | None = None
        self._episodes = np.full(amount, -1)
        self._last = np.zeros(amount, bool)
        self._returns = np.zeros(amount)
        self._lengths = np.zeros(amount, int)
        if parallel:
            # Here first: mistakes come before any process starts, and what holds for all of a process, such as which GL
            # library it uses, is chosen before the server of processes imports anything.
            make().close()
            preload(name)
        kind: type[Inside | Outside] = Outside if parallel else Inside
        self._workers = [kind(make, name, index) for index in range(amount)]
        try:
            for worker in self._workers:
                worker.start()
            *spaces, notes = zip(*(worker.receive(timeout) for worker in self._workers), strict=True)
            pairs = list(zip(*spaces, strict=True))
            for index, pair in enumerate(pairs):
                if pair != pairs[0]:
                    raise EnvError(
                        f"environment {index} ({name}) has the spaces {pair}, and environment 0 {pairs[0]};"
                        " all must have the same"
                    )
        except BaseException:
            self._kill()
            raise
        self.observation_space, self.action_space = self._spaces = pairs[0]
        self.note: str | None = notes[0]
        self._memory = Memory(amount, self.action_space)

    def reset(self) -> Row:
        """Start every environment anew from its seed and return the first row."""
        self._episodes[:] = -1
        observations, _ = self._begin([None] * self.amount)
        self._last = np.ones(self.amount, bool)  # what follows a last row is a first row
        nothing = np.zeros(self.amount, bool)
        return self._row(observations, np.zeros(self.amount), nothing, nothing, [{}] * self.amount)

    def state_dict(self) -> dict[str, Any]:
        """The running episodes, as arrays, lists and plain types; after a failure or amid a step they are lost."""
        return {
            "row": None if self._failed or self._pending else self._newest,
            "episodes": self._episodes.tolist(),
            "actions": self._memory.actions(),
            "returns": self._returns.tolist(),
            "lengths": self._lengths.tolist(),
            "restarts": self.restarts,
        }

    def restore(self, state: dict[str, Any]) -> tuple[Row, list[int]]:
        """Go on from `state_dict`; needs the arguments that those streams had.

        Returns:
            The newest row, and which environments could not be brought back: their episodes are cut, and the row holds
            the first of their next ones.
        """
        nothing = np.zeros(self.amount, bool)
        self.restarts = state.get("restarts", 0)
        self._episodes, self._lengths = np.array(state["episodes"]) - 1, np.array(state["lengths"])
        observations, cut = self._begin(self._pasts(state))
        self._last = ~nothing
        row = self._row(observations, np.zeros(self.amount), nothing, nothing, [{}] * self.amount)
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
        for worker, action in zip(self._workers, actions, strict=True):
            worker.send("step", action)
        self._memory.add(actions)
        self._pending = True

    def receive(self) -> Row:
        """Wait for the step that `send` started and return its row.

        Raises:
            EnvironmentFailure: an environment broke, and no more restarts are allowed. Close the streams then.
        """
        if not self._pending:
            raise RuntimeError("receive() without send(): every send is answered by one receive")
        self._pending = False
        answers, failed = self._gather([self._timeout] * self.amount)
        rows = np.where(self._last, 0, self._lengths + 1)
        self.broken = [Broken(index, int(rows[index]), failure) for index, failure in failed.items()]
        for index, failure in failed.items():
            observation = self._replace(index, failure, self._episodes[index] + 1 + self._last[index])
            answers[index] = (observation, 0.0, False, False, {})
        self._last = self._last | [index in failed for index in range(self.amount)]  # a first row follows
        observations, rewards, terminated, truncated, metrics = zip(*answers, strict=True)
        return self._row(observations, np.array(rewards), np.array(terminated), np.array(truncated), metrics)

    def close(self) -> None:
        """End the environments and their processes; a step under way may finish, a failure ends them."""
        if not self._failed:
            for worker in self._workers:
                worker.ask_to_end()
        self._kill(0.0 if self._failed else FAREWELL)

    def _kill(self, patience: float = 0.0) -> None:
        deadline = time.monotonic() + patience
        for worker in self._workers:
            worker.kill(max(0.0, deadline - time.monotonic()))

    def _gather(self, timeouts: list[float | None]) -> tuple[list[Any], dict[int, EnvironmentFailure]]:
        """The answer of each worker, None where it failed, and the failures by index."""
        answers, failed = [], {}
        for index, (worker, timeout) in enumerate(zip(self._workers, timeouts, strict=True)):
            try:
                answers.append(worker.receive(timeout))
            except EnvironmentFailure as failure:
                answers.append(None)
                failed[index] = failure
            except BaseException:  # Ctrl-C: answers half read can never be sorted out again
                self._failed = True
                raise
        return answers, failed

    def _begin(self, pasts: Sequence[Past | None]) -> tuple[list[dict[str, Any]], np.ndarray]:
        """Have each environment begin, or live through its past: the observations, and which pasts were cut (N,)."""
        for index, (worker, past) in enumerate(zip(self._workers, pasts, strict=True)):
            worker.send("begin", self._seed + index, past)
        steps = [1 if past is None else 1 + len(past.actions) for past in pasts]
        answers, failed = self._gather([None if self._timeout is None else self._timeout * n for n in steps])
        known = [past is not None and past.observation is not None for past in pasts]  # else it had been cut before
        rows = np.where(known, self._lengths, 0)  # the newest row was not given out again
        self.broken = [Broken(index, int(rows[index]), failure) for index, failure in failed.items()]
        cut = np.array([answer is None or answer[1] for answer in answers])
        self._episodes += cut
        for index, failure in failed.items():
            answers[index] = self._replace(index, failure, self._episodes[index] + 1), True
        return [observation for observation, _ in answers], cut

    def _replace(self, index: int, failure: EnvironmentFailure, episode: int) -> dict[str, Any]:
        """Start a broken environment anew with `episode`, or one after it; the observation that it begins with."""
        worker = self._workers[index]
        try:
            while True:
                if self.restarts >= self._allowed:
                    raise exhausted(failure, self._allowed)
                self.restarts += 1
                try:
                    worker.start()
                    check_spaces(worker.receive(self._timeout)[:2], self._spaces, failure)
                    worker.send("begin", self._seed + index, Past(episode - 1, np.zeros(0), None))
                    observation: dict[str, Any] = worker.receive(self._timeout)[0]
                except EnvironmentFailure as another:
                    failure, episode = another, episode + 1
                    self.broken.append(Broken(index, 0, failure))
                else:
                    self._episodes[index] = episode - 1  # the row to come is its first
                    return observation
        except BaseException:
            self._failed = True
            raise

    def _row(
        self,
        observations: Sequence[dict[str, Any]],
        reward: np.ndarray,
        terminated: np.ndarray,
        truncated: np.ndarray,
        metrics: Sequence[dict[str, float]],
    ) -> Row:
        first, last = self._last, terminated | truncated
        self._returns = np.where(first, 0.0, self._returns + reward)
        self._lengths = np.where(first, 0, self._lengths + 1)
        self._last = last
        self.finished = [
            Finished(index, float(self._returns[index]), int(self._lengths[index]), metrics[index])
            for index in np.flatnonzero(last).tolist()
        ]
        self._episodes += first
        self._memory.forget(first)
        flags = {"is_first": first, "is_last": last, "is_terminal": terminated}
        self._newest = {**self._stacked(observations), "reward": reward.astype(np.float32), **flags}
        return self._newest

    def _stacked(self, observations: Sequence[dict[str, Any]]) -> Row:
        return {
            key: np.array([observation[key] for observation in observations], space.dtype)
            for key, space in self.observation_space.items()
        }


def exhausted(failure: EnvironmentFailure, allowed: int) -> EnvironmentFailure:
    """The failure that ends it all, told as such."""
    text = str(failure)
    if allowed:
        text += f"; env.restarts={allowed} is used up: mend it, or allow more"
    return EnvironmentFailure(text, failure.index, failure.name, failure.details)


def check_spaces(found: Any, expected: Any, failure: EnvironmentFailure) -> None:
    """Raise EnvironmentFailure if an environment that was started anew has other spaces than before."""
    if found != expected:
        raise EnvironmentFailure(
            f"environment {failure.index} ({failure.name}) changed its spaces: started anew it has {found},"
            f" before it had {expected}",
            failure.index,
            failure.name,
        )


def observation_keys(row: Row) -> list[str]:
    """The entries of a row that the environment itself names."""
    return [key for key in row if key not in RESERVED]


def spread(chosen: np.ndarray, values: np.ndarray) -> np.ndarray:
    """A mask (N,) in the shape (N, 1, ...) that fits values (N, ...)."""
    return chosen.reshape(-1, *[1] * (values.ndim - 1))


def preload(name: str) -> None:
    """Have the server, from which processes are forked, import what environment `name` needs."""
    suite, _, task = name.partition("_")
    modules = envs.ADAPTERS[suite].preload(task) if suite in envs.ADAPTERS else []
    multiprocessing.get_context("forkserver").set_forkserver_preload(["__main__", *modules])
