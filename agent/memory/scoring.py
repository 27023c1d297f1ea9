"""What one trained agent remembers: on the gap that it was trained on, on longer ones, and how soon it learned it."""

import dataclasses
import json
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from agent.agent import Agent
from agent.errors import UserError
from agent.evaluation import evaluate, load
from agent.memory.config import Evaluation
from agent.schema import Config
from envs import probe
from envs.probes.task import Task

PREFIX = "probe_"
Result = dict[str, Any]
"""What `score_run` gives, in plain values."""


def score_run(logdir: Path, evaluation: Evaluation, device: Any = "auto") -> Result:
    """Evaluate the newest checkpoint of a run on its probe.

    Returns:
        `score_name` ("score", or "return" where the probe has no score), `gaps` (by factor: `value` of that name,
        `accuracy`, and `recall_<label>_<bound>`), `curve`, `reached`, `items`, `floors` as scores, `parameters`,
        `state_bytes`, `updates_per_second` while training, and what was asked for.

    Raises:
        UserError: there is no run or no checkpoint, or it is damaged or of no probe.
    """
    player = load(logdir, device)
    return {
        "evaluation": dataclasses.asdict(evaluation),
        "steps": player.config.steps,
        **_about(player),
        **_learning(logdir, evaluation),
        "gaps": {str(factor): _at_gap(player, factor, evaluation) for factor in _factors(player.config, evaluation)},
    }


def task_of(config: Config) -> Any:
    """The probe's settings: a Task, or those of a probe without gap and floors.

    Raises:
        UserError: the environment is no probe.
    """
    if not config.env.name.startswith(PREFIX):
        raise UserError(f"{config.env.name} is no probe of memory; give a run on one of {PREFIX}<task>_<level>")
    return probe.parse(config.env.name.removeprefix(PREFIX), config.env.options)[0]


def _factors(config: Config, evaluation: Evaluation) -> Sequence[int]:
    """By how much to stretch the gap; not at all where a probe has none."""
    return evaluation.gaps if isinstance(task_of(config), Task) else [1]


def _at_gap(player: Agent, factor: int, evaluation: Evaluation) -> dict[str, float]:
    task = task_of(player.config)
    options = {"gap": factor * task.gap} if isinstance(task, Task) else {}
    found = evaluate(player, evaluation.episodes, evaluation.seed, options)
    metrics = found["metrics"]
    return {"value": metrics.get("score", found["mean"])} | {
        name: value for name, value in metrics.items() if name == "accuracy" or name.startswith("recall_")
    }


def _about(player: Agent) -> Result:
    task, core = task_of(player.config), player.world_model.rssm.core
    known = isinstance(task, Task)
    return {
        "score_name": "score" if known else "return",
        "items": task.items if known else None,
        "floors": {name: task.score(accuracy) for name, accuracy in task.floors().items()} if known else {},
        "parameters": sum(player.learner.parameter_counts().values()),
        "state_bytes": core.state_bytes,
    }


def _learning(logdir: Path, evaluation: Evaluation) -> Result:
    """The curve of training, and where it first reached the bar.

    `curve` is [frames, mean over the last `window` episodes] at each time when episodes ended and a whole window had;
    `reached` has the frames and the updates of its first point at or above the bar, or is None.
    """
    lines = _metrics(logdir)
    scored = any("episode/score" in line for line in lines)
    name = "episode/score" if scored else "episode/return"
    values: list[float] = []
    means: dict[int, float] = {}
    for line in lines:
        if name in line:
            values.append(float(line[name]))
            if len(values) >= evaluation.window:
                means[line["step"]] = statistics.fmean(values[-evaluation.window :])
    frames = next((step for step, mean in means.items() if scored and mean >= evaluation.reached), None)
    updates = [(line["step"], line["updates"]) for line in lines if "updates" in line]
    rates = [rate for line in lines if math.isfinite(rate := float(line.get("time/updates_per_second", 0))) and rate]
    return {
        "curve": [[step, mean] for step, mean in means.items()],
        "reached": None if frames is None else {"frames": frames, "updates": _interpolate(updates, frames)},
        "updates": updates[-1][1] if updates else 0,
        "updates_per_second": statistics.median(rates) if rates else None,
    }


def _metrics(logdir: Path) -> list[dict[str, Any]]:
    file = logdir / "metrics.jsonl"
    try:
        return [json.loads(line) for line in file.read_text().splitlines()]
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: cannot be read ({error}); give the --logdir of a training run") from None


def _interpolate(points: Sequence[tuple[int, float]], at: int) -> int:
    """The value at `at` on straight lines from (0, 0) through the points; beyond the last one, its value."""
    left = (0, 0.0)
    for right in points:
        if right[0] >= at:
            share = (at - left[0]) / (right[0] - left[0]) if right[0] > left[0] else 1.0
            return round(left[1] + share * (right[1] - left[1]))
        left = right
    return round(left[1])
