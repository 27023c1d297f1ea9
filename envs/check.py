"""check_env: what is wrong with an environment, in words."""

import copy
import logging
from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces

from envs.actions import unit_action_space
from envs.errors import EnvError, WrongValue, one_line
from envs.values import entry_problem, is_finite_scalar
from envs.wrappers import entries, observation_entry

logger = logging.getLogger(__name__)


def check_env(env: gymnasium.Env, steps: int = 1000) -> list[str]:
    """Run `env` for `steps` random steps and return its problems, one line each; an empty list: none found.

    Takes an environment of your own as it is, or one that `envs.make` has built. Each kind of problem is told
    once.
    An episode that does not end within `steps` is only mentioned in the log.
    """
    problems = space_problems(env)
    return problems or _Rollout(env).run(steps)


def space_problems(env: gymnasium.Env) -> list[str]:
    """Return what is wrong with the two spaces themselves."""
    problems = []
    for name in ("observation_space", "action_space"):
        space = getattr(env, name, None)
        if not isinstance(space, spaces.Space):
            problems.append(
                f"{name} is {type(space).__name__}, not a gymnasium space; "
                "set it in __init__ to one of gymnasium.spaces"
            )
            continue
        parts = entries(space) if name == "observation_space" else {"action": space}
        if not parts:
            problems.append("observation_space is a Dict without entries; give it at least one")
        for key, part in parts.items():
            try:
                if name == "observation_space":
                    observation_entry(key, part)
                else:
                    unit_action_space(part)
            except EnvError as error:
                problems.append(str(error))
    return problems


class _Rollout:
    """One run through an environment; `problems` maps the kind of a problem to its first message."""

    def __init__(self, env: gymnasium.Env) -> None:
        self.env = env
        self.problems: dict[str, str] = {}
        self.returned: tuple[Any, Any] | None = None  # the newest observation and a copy of it

    def run(self, steps: int) -> list[str]:
        self.env.action_space.seed(0)
        call = "reset()"
        try:
            self.check_reproducible()
            ended = False
            for step in range(1, steps + 1):
                call = f"step() number {step}"
                try:
                    over = self.step(call)
                except WrongValue as error:  # of an environment that envs.make has built: it does not go on after one
                    self.report(str(error)[:24], f"{call} gave {error}")
                    over = True
                if over:
                    ended = True
                    call = f"reset() after step {step}"
                    self.observe(self.reset(None), call)
            if not ended:
                logger.warning("no episode ended in %d steps; unless that is meant, set a time limit", steps)
        except _Stop:
            pass
        except Exception as error:
            message = f"{call} raised {type(error).__name__}: {one_line(error)}"
            self.report("raised", f"{message}; make it work for every action of action_space")
        return list(self.problems.values())

    def report(self, kind: str, message: str) -> None:
        self.problems.setdefault(kind, message)

    def check_reproducible(self) -> None:
        first = copy.deepcopy(self.observe(self.reset(0), "reset()"))
        second = self.observe(self.reset(0), "the second reset()")
        if not equal(first, second):
            self.report(
                "seed",
                "reset(seed=0) gave two different first observations; call super().reset(seed=seed) and "
                "draw all random numbers from self.np_random",
            )

    def reset(self, seed: int | None) -> Any:
        result = self.env.reset(seed=seed)
        if not isinstance(result, tuple) or len(result) != 2:
            self.report("reset", "reset() must return two things: return observation, info")
            raise _Stop
        return result[0]

    def step(self, call: str) -> bool:
        """Take one random step, check all that it returns, and tell whether the episode ended."""
        result = self.env.step(self.env.action_space.sample())
        if not isinstance(result, tuple) or len(result) != 5:
            needed = "observation, reward, terminated, truncated, info"
            self.report("step", f"step() must return five things: return {needed}")
            raise _Stop
        observation, reward, terminated, truncated, _ = result
        self.observe(observation, call)
        if not is_finite_scalar(reward):
            self.report("reward", f"{call} returned the reward {reward!r}; return one finite number, a float")
        for name, flag in (("terminated", terminated), ("truncated", truncated)):
            if not isinstance(flag, bool | np.bool_):
                kind = type(flag).__name__
                self.report(name, f"{call} returned {name} as {kind}; return a bool, as in bool({name})")
        return bool(np.any(terminated) or np.any(truncated))

    def observe(self, observation: Any, call: str) -> Any:
        """Check one observation against its space, and that the one before it was left alone."""
        if self.returned is not None and not equal(*self.returned):
            self.report(
                "mutated",
                f"{call} changed, in place, the observation returned before it; return array.copy()",
            )
        self.returned = (observation, copy.deepcopy(observation))
        space = self.env.observation_space
        if not isinstance(space, spaces.Dict):
            self.check_entry("observation", observation, space, call)
            return observation
        if not isinstance(observation, dict):
            kind = type(observation).__name__
            self.report("dict", f"{call} returned a {kind}; return a dict, as observation_space says")
            return observation
        for key in sorted(set(observation) - set(space)):
            message = f"{call} returned {key!r}, which observation_space lacks; add it there or leave it out"
            self.report(f"{key} extra", message)
        for key, part in space.items():
            if key in observation:
                self.check_entry(key, observation[key], part, call)
            else:
                message = f"{call} returned no {key!r}; return every key of observation_space, every time"
                self.report(f"{key} missing", message)
        return observation

    def check_entry(self, key: str, value: Any, space: spaces.Space, call: str) -> None:
        message = entry_problem(value, space)
        if message:
            self.report(f"{key}: {message[:12]}", f"{key!r} from {call} {message}")


class _Stop(Exception):
    """Nothing further can be checked."""


def equal(one: Any, other: Any) -> bool:
    """Compare two observations, NaN equal to NaN."""
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(equal(one[key], other[key]) for key in one)
    one, other = np.asarray(one), np.asarray(other)
    if one.dtype == object or other.dtype == object:
        return bool(np.all(one == other))
    return np.array_equal(one, other, equal_nan=np.issubdtype(one.dtype, np.floating))
