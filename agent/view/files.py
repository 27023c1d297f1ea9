"""What there is to see of a trained agent, written to files."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from agent.agent import Agent
from agent.errors import UserError, writing
from agent.evaluation import record
from agent.video import write_video
from agent.view import PREDICTED
from agent.view.episode import Episode, core_inputs, cut, play_episode, spread
from agent.view.figure import as_png, draw, new_figure
from agent.view.film import film
from agent.view.memory import draw_memory
from agent.view.open_loop import predict

SEQUENCES = 3
"""Predicted sequences side by side."""
FRAMES_PER_SECOND = 8


class Look(NamedTuple):
    """How to look."""

    seed: int  # of the environment, the posterior and the model's samples
    steps: int  # of the episode, at most
    length: int  # of predicted sequences, at most
    context: int  # of these, the steps that are observed
    video: str  # the kind of file: gif or mp4


def write_views(agent: Agent, views: Sequence[str], out: Path, look: Look) -> Iterator[Path]:
    """Write some of open_loop, imagined, memory and policy, of one episode; gives each file once it is written.

    For `policy` give `load` the argument `render=True` before.

    Raises:
        UserError: a package is missing, the folder cannot be written, or the episode is too short for `look.context`.
        EnvironmentFailure: the environment failed.
    """
    episode = _played(agent, views, look) if set(views) - {"policy"} else None
    with writing(out):
        out.mkdir(parents=True, exist_ok=True)
    for view in views:
        if episode is None or view == "policy":
            file = out / f"policy.{look.video}"
            record(agent, file, look.seed, look.steps)
            yield file
        elif view == "memory":
            yield _write(out / "memory.png", as_png(_memory(agent, episode)))
        else:
            yield from _write_predictions(agent, episode, view, out, look)


def _played(agent: Agent, views: Sequence[str], look: Look) -> Episode:
    new_figure()  # if matplotlib is missing, that is said before anything is played
    episode = play_episode(agent, look.seed, look.steps)
    if set(views) & PREDICTED and len(episode.reward) <= look.context:
        raise UserError(f"--context {look.context}: the episode has {len(episode.reward)} steps; give fewer")
    return episode


def _write_predictions(agent: Agent, episode: Episode, view: str, out: Path, look: Look) -> Iterator[Path]:
    """Sequences of the episode, predicted with its actions or, `imagined`, with those that the policy takes there."""
    length = min(look.length, len(episode.reward))
    starts, imagined = spread(len(episode.reward), length, SEQUENCES), view == "imagined"
    generator = torch.Generator().manual_seed(look.seed)
    predicted = predict(agent, cut(agent, episode, starts, length), look.context, generator, act=imagined)
    part = "imagined" if imagined else "open loop"
    titles = [f"steps {start + 1} to {start + length}" for start in starts]
    for key in predicted.images:
        name = view if len(predicted.images) == 1 else f"{view}_{key}"
        file = out / f"{name}.{look.video}"
        write_video(file, film(predicted, key, titles, part, error=not imagined), FRAMES_PER_SECOND)
        yield file
    yield _write(out / f"{view}.png", as_png(draw(predicted, titles, part, _title(agent, part))))


def _memory(agent: Agent, episode: Episode) -> Any:
    seen = agent.learner.frozen_world_model.module.rssm.core.inspect(core_inputs(agent, episode), episode.first)
    return draw_memory(seen, episode.reward, _title(agent, "memory"))


def _title(agent: Agent, what: str) -> str:
    return f"{agent.config.env.name}, core {agent.config.core.name}, {agent.updates:,} updates: {what}"


def _write(file: Path, content: bytes) -> Path:
    with writing(file):
        file.write_bytes(content)
    return file
