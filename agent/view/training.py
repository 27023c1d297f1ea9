"""While training, what the model predicts of replayed sequences, as pictures in TensorBoard."""

from collections.abc import Callable
from importlib.util import find_spec

import torch
from torch import Tensor

from agent.agent import Agent
from agent.distributions import one_hot
from agent.logging import MetricsLogger
from agent.replay import Replay
from agent.schema import Config
from agent.video import as_gif
from agent.view.figure import as_png, draw
from agent.view.film import film
from agent.view.open_loop import Sequences, predict

SEQUENCES = 3
CONTEXT = 5
FRAMES_PER_SECOND = 8


class OpenLoopPictures:
    """Writes them every `log.open_loop_every` frames, and changes nothing else: training draws the same numbers.

    Args:
        config: of the run.
        logger: where they go.
        note: is told once if figures cannot be drawn.
    """

    def __init__(self, config: Config, logger: MetricsLogger, note: Callable[[str], None]) -> None:
        self._config, self._logger = config, logger
        self._every = config.log.open_loop_every if config.log.tensorboard else None
        self._draws = find_spec("matplotlib") is not None
        if self._every is not None and not self._draws:
            note(
                "view        no figures of predictions in TensorBoard, as matplotlib is missing: pip install matplotlib"
            )

    def __call__(self, agent: Agent, replay: Replay, frames: int) -> None:
        """Write pictures if it is time to, after `frames` frames."""
        env = self._config.env
        frames_a_row = env.amount * env.action_repeat
        if self._every is None or frames // frames_a_row % max(1, self._every // frames_a_row) or not agent.updates:
            return
        index = newest_windows(replay, SEQUENCES)
        if index.shape[1] == 0:
            return
        given = replayed(agent, replay, index)
        context = min(CONTEXT, given.first.shape[1] - 1)
        predicted = predict(agent, given, context, torch.Generator().manual_seed(self._config.seed))
        newest = int(index[1].max())
        titles = [
            f"environment {stream + 1}" + (f", {newest - start} steps before" if start < newest else "")
            for stream, start in index.T.tolist()
        ]
        for key in predicted.images:
            frames_of_film = film(predicted, key, titles, "open loop")
            size = frames_of_film.shape[1:3]
            self._logger.image(frames, f"open_loop/{key}", as_gif(frames_of_film, FRAMES_PER_SECOND), size)
        if self._draws:
            figure = draw(predicted, titles, "open loop", f"{env.name} after {frames:,} frames")
            width, height = (round(100 * inches) for inches in figure.get_size_inches())
            self._logger.image(frames, "open_loop/figure", as_png(figure), (height, width))


def newest_windows(replay: Replay, amount: int) -> Tensor:
    """The newest windows that do not overlap, at most `amount`, as int64 (2, B) like those of `Replay.sample`."""
    oldest, following = replay.held
    spacing = -(-replay.window // replay.stride) * replay.stride  # windows start at heads
    last = (following - replay.window) // replay.stride * replay.stride
    starts = range(last, oldest - 1, -spacing)[:amount]
    windows = [(stream, start) for start in starts for stream in range(replay.streams)]
    return torch.tensor(windows[:amount], dtype=torch.int64).reshape(-1, 2).T


def replayed(agent: Agent, replay: Replay, index: Tensor) -> Sequences:
    """These windows of replay, index (2, B), as sequences of window - 1 steps on the agent's device."""
    gathered = replay.gather(index.to(replay.device))
    rows, latents = ({key: value.to(agent.device) for key, value in part.items()} for part in gathered)
    later = {key: value[:, 1:] for key, value in rows.items()}
    memory = {key.removeprefix("state/"): value for key, value in latents.items() if key.startswith("state/")}
    return Sequences(
        {key: later[key] for key in agent.observations},
        agent.action.encode(rows["action"][:, :-1]), later["reward"], later["is_first"],
        memory, one_hot(latents["z"], agent.world_model.rssm.classes),
    )  # fmt: skip
