"""A trained agent on its environment: returns of whole episodes, and a video of one."""

import contextlib
import dataclasses
import itertools
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import gymnasium
import numpy as np
import torch
from tqdm import tqdm

from agent import checkpoint, devices
from agent import config as configuration
from agent.agent import Agent, Carry
from agent.arrays import tensors
from agent.environment import make_env
from agent.errors import UserError
from agent.video import check_video, write_video
from agent.world_model.encoder import Observation
from envs.errors import failing
from envs.streams import Finished, Streams


def load(
    logdir: str | Path, device: Literal["auto", "cpu", "cuda"] = "auto", render: bool = False, best: bool = False
) -> Agent:
    """The agent of the newest sound checkpoint in `logdir`, ready to act.

    Args:
        logdir: folder of a training run.
        device: where the agent is to live.
        render: prepare for `record`. A process chooses once whether dm_control renders, at its first environment.
        best: take the checkpoint before which the mean return of training was highest instead.

    Raises:
        UserError: there is no run or no checkpoint, or it is damaged or of another version of this project.
        EnvError: `render` is asked for, and the environment cannot.
    """
    logdir = Path(logdir)
    if not (logdir / "config.yaml").exists():
        raise UserError(f"{logdir} holds no run (no config.yaml); give the --logdir of a training run")
    directory = logdir / "checkpoints"
    path = checkpoint.best_of(directory) if best else checkpoint.latest(directory)
    if path is None and best and checkpoint.latest(directory):
        raise UserError(f"{logdir} holds no best checkpoint, as no episode had ended before one; leave out --best")
    if path is None:
        raise UserError(f"{logdir} holds no checkpoint yet; let its training run a while, or stop it with Ctrl-C")
    if device not in ("auto", "cpu", "cuda"):
        raise UserError(f"--device {device}: use auto, cpu or cuda")
    config = dataclasses.replace(configuration.load(logdir / "config.yaml"), device=device, compile="eager")
    found = None if best else checkpoint.recover(directory, lambda line: print(line, file=sys.stderr))
    saved = found[1] if found else checkpoint.load(path)
    env = make_env(config, render)
    agent = Agent(env.observation_space, env.action_space, config, devices.choose(config.device))
    env.close()
    agent.load_state_dict(saved["agent"], logdir)
    return agent


def evaluate(
    agent: Agent, episodes: int = 10, seed: int = 0, options: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Play whole episodes with the most likely action of each step, all side by side.

    Args:
        agent: the player.
        episodes: how many.
        seed: of environments and of the posterior.
        options: of the environment, laid over those it was trained with, as `{"gap": 2}`; spaces must stay the same.

    Returns:
        `mean`, `std` (of the population), `returns` and `lengths` (agent steps) of the episodes, and `metrics`: by
        name the mean of what the environment tells at the end of an episode, over the episodes where it does.
    """
    env = agent.config.env
    torch.manual_seed(seed)  # the posterior is sampled, also when the action is not
    streams = Streams(
        env.name,
        episodes,
        parallel=False,
        seed=seed,
        action_repeat=env.action_repeat,
        time_limit=env.time_limit,
        options={**env.options, **(options or {})},
    )
    results: dict[int, Finished] = {}
    # How long an episode is, only a time limit says; without one the bar counts steps and episodes.
    with contextlib.closing(streams), tqdm(desc="evaluation", total=env.time_limit, unit="step", disable=None) as bar:
        carry, row = agent.initial(episodes), streams.reset()
        while len(results) < episodes:
            values = tensors(row)
            action, carry = agent.act(values, values["is_first"], carry, mode=True)
            streams.send(action.cpu().numpy())
            row = streams.receive()
            for episode in streams.finished:
                results.setdefault(episode.index, episode)
            bar.set_postfix_str(f"{len(results)} of {episodes} episodes", refresh=False)
            bar.update()
    ended = [results[index] for index in range(episodes)]
    returns = [episode.episode_return for episode in ended]
    told = sorted({name for episode in ended for name in episode.metrics})
    return {
        "mean": float(np.mean(returns)),
        "std": float(np.std(returns)),
        "returns": returns,
        "lengths": [episode.length for episode in ended],
        "metrics": {
            name: float(np.mean([episode.metrics[name] for episode in ended if name in episode.metrics]))
            for name in told
        },
    }


def play(agent: Agent, env: gymnasium.Env[Any, Any], seed: int = 0) -> Iterator[tuple[Observation, float, Carry]]:
    """One episode with the most likely action of each step, up to its last observation.

    Yields:
        Each observation (1, ...), the reward for arriving there, and what the agent made of it.

    Raises:
        EnvironmentFailure: the environment failed.
    """
    torch.manual_seed(seed)
    with failing(f"environment {agent.config.env.name!r}", "when it was played", name=agent.config.env.name):
        carry, reward, over, first = agent.initial(1), 0.0, False, True
        observation, _ = env.reset(seed=seed)
        while True:
            values = tensors({key: np.asarray(value)[None] for key, value in observation.items()})
            action, carry = agent.act(values, torch.tensor([first]), carry, mode=True)
            yield values, reward, carry
            if over:
                return
            observation, gained, terminated, truncated, _ = env.step(action[0].cpu().numpy())
            reward, over, first = float(gained), bool(terminated or truncated), False


def record(agent: Agent, file: Path, seed: int = 0, longest: int | None = None) -> float:
    """Play one episode with the most likely actions and write it as a video; gives its return.

    Give `load` the argument `render=True` before. With `longest`, no more than this many steps are played.

    Raises:
        UserError: the environment does not render, or this kind of file cannot be written.
    """
    check_video(file)
    env = make_env(agent.config, render=True)
    total, frames = 0.0, []
    for _, reward, _ in itertools.islice(play(agent, env, seed), longest):
        total += reward
        with failing(f"environment {agent.config.env.name!r}", "when it was recorded", name=agent.config.env.name):
            frames.append(np.asarray(env.render()))
    env.close()
    write_video(file, np.stack(frames), fps=30)
    return total
