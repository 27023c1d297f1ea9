"""A probe's task as a gymnasium environment, and many of them in lockstep as one vector environment."""

from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces
from gymnasium.utils import seeding
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space

from envs.errors import EnvError
from envs.probes.task import NOT_ASKED, Task
from envs.probes.tiles import Tiles

Observation = dict[str, Any]


class Shown:
    """How observations look: as the entries of a task, or painted as one image.

    Raises:
        EnvError: the encoding is neither "tokens" nor "image", or the task cannot be painted.
    """

    def __init__(self, task: Task, encoding: str) -> None:
        """Choose the space of a single observation."""
        if encoding not in ("tokens", "image"):
            raise EnvError(f"option encoding is {encoding!r}; give tokens or image")
        self._tiles = Tiles(task.entries) if encoding == "image" else None
        self.space = spaces.Dict({"image": self._tiles.space} if self._tiles else task.entries)

    def __call__(self, shown: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Entries (N, ...) -> the observation's entries (N, ...)."""
        return {"image": self._tiles.paint(shown)} if self._tiles else shown


class ProbeEnv(gymnasium.Env):
    """One probe. +1 for each right answer, 0 else; `signed` pays -1 for each wrong one.

    The last step's info has `episode_metrics`, see `Task.metrics`.
    """

    metadata: dict[str, Any] = {"render_modes": []}  # noqa: RUF012 - gymnasium's form

    def __init__(self, task: Task, *, encoding: str = "tokens", signed: bool = False) -> None:
        """Play `task`."""
        self.task = task
        self._show = Shown(task, encoding)
        self._wrong = -1.0 if signed else 0.0
        self.observation_space = self._show.space
        self.action_space = spaces.Discrete(task.actions)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Observation, dict[str, Any]]:
        """Draw an episode; the same seed draws the same one."""
        super().reset(seed=seed)
        self._episode = self.task.draw(self.np_random)
        self._right = np.zeros(self.task.length, bool)
        self._step = 0
        return self._observe(), {}

    def step(self, action: Any) -> tuple[Observation, float, bool, bool, dict[str, Any]]:
        """Score the action, show what comes next."""
        answer = self._episode.answer[self._step]
        self._right[self._step] = right = bool(action == answer)
        reward = 0.0 if answer == NOT_ASKED else 1.0 if right else self._wrong
        self._step += 1
        ended = self._step == self.task.length
        info = {"episode_metrics": self.task.metrics(self._episode, self._right)} if ended else {}
        return self._observe(), reward, ended, False, info

    def _observe(self) -> Observation:
        shown = self._show({key: value[self._step, None] for key, value in self._episode.shown.items()})
        return {key: value[0].copy() for key, value in shown.items()}


class ProbeVectorEnv(VectorEnv):
    """`num_envs` probes in lockstep: episodes of a task have one length, so that all begin and end together.

    Environment i draws the episodes that a ProbeEnv with the same seed draws.
    """

    metadata: dict[str, Any] = {"autoreset_mode": AutoresetMode.NEXT_STEP}  # noqa: RUF012 - gymnasium's form

    def __init__(self, task: Task, num_envs: int, *, encoding: str = "tokens", signed: bool = False) -> None:
        """Play `task` `num_envs` times."""
        self.task, self.num_envs = task, num_envs
        self._show = Shown(task, encoding)
        self._wrong = -1.0 if signed else 0.0
        self.single_observation_space, self.single_action_space = self._show.space, spaces.Discrete(task.actions)
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)
        self._generators = [seeding.np_random()[0] for _ in range(num_envs)]

    def reset(
        self, *, seed: int | list[int | None] | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Observation, dict[str, Any]]:
        """Draw an episode for each; environment i has the seed `seed + i`, or the i-th of a list."""
        if seed is not None:
            seeds = [seed + i for i in range(self.num_envs)] if isinstance(seed, int) else seed
            for index, each in enumerate(seeds):
                if each is not None:
                    self._generators[index] = seeding.np_random(each)[0]
        self._episodes = [self.task.draw(rng) for rng in self._generators]
        self._shown = {key: np.stack([each.shown[key] for each in self._episodes], 1) for key in self.task.entries}
        self._answer = np.stack([each.answer for each in self._episodes], 1)  # (T, N), as the entries (T + 1, N, ...)
        self._right = np.zeros(self._answer.shape, bool)
        self._step = 0
        return self._observe(), {}

    def step(self, actions: np.ndarray) -> tuple[Observation, np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        """Score the actions (N,), show what comes next; after the last step the actions only ask for new episodes."""
        nothing = np.zeros(self.num_envs, bool)
        if self._step == self.task.length:
            observation, info = self.reset()
            return observation, np.zeros(self.num_envs), nothing, nothing.copy(), info
        answer = self._answer[self._step]
        self._right[self._step] = right = actions == answer
        reward = np.where(right, 1.0, np.where(answer == NOT_ASKED, 0.0, self._wrong))
        self._step += 1
        ended = self._step == self.task.length
        return self._observe(), reward, nothing | ended, nothing, self._metrics() if ended else {}

    def _observe(self) -> Observation:
        shown = self._show({key: value[self._step] for key, value in self._shown.items()})
        return {key: value.copy() for key, value in shown.items()}

    def _metrics(self) -> dict[str, Any]:
        infos: dict[str, Any] = {}
        for index, episode in enumerate(self._episodes):
            metrics = self.task.metrics(episode, self._right[:, index])
            infos = self._add_info(infos, {"episode_metrics": metrics}, index)
        return infos
