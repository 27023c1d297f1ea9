"""What runs leave behind, read for plots and tables: metrics over frames, and runs gathered by what was trained."""

import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from agent.config import Values, flat, may_change_on_resume, read_yaml, resolve
from agent.errors import UserError

RETURN = "episode/return"

Curve = dict[int, list[float]]
"""For each bin its right edge, in environment frames, and the mean of each run that has anything in it."""


def read_metric(logdir: str | Path, name: str = RETURN) -> tuple[np.ndarray, np.ndarray]:
    """One metric of a run, finished or still under way.

    Args:
        logdir: folder of a training run.
        name: as it stands in `metrics.jsonl`. `episode/return` is the sum of the rewards of a training episode.

    Returns:
        Environment frames (N,) int64 and values (N,) float64, in the order of training; empty if there are none yet.

    Raises:
        UserError: the folder has no readable `metrics.jsonl`.
    """
    try:
        lines = (Path(logdir) / "metrics.jsonl").read_text().split("\n")[:-1]  # a last line may be half written
        entries = [entry for line in lines if name in (entry := json.loads(line))]
        frames = np.array([entry["step"] for entry in entries], np.int64)
        return frames, np.array([entry[name] for entry in entries], np.float64)
    except OSError as error:
        raise UserError(f"{logdir}: metrics.jsonl cannot be read ({error.strerror}); give a run's folder") from None
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{logdir}: metrics.jsonl is damaged ({error})") from None


@dataclasses.dataclass(frozen=True)
class Logged:
    """One metric of a run, (N,) frames and values, and the run's settings by dotted key."""

    logdir: Path
    config: Values
    frames: np.ndarray
    values: np.ndarray

    def binned(self, width: int) -> dict[int, float]:
        """The mean in each bin of `width` frames that has any, by its right edge."""
        edges = -(-self.frames // width) * width
        return {int(edge): float(self.values[edges == edge].mean()) for edge in np.unique(edges)}


@dataclasses.dataclass(frozen=True)
class Setting:
    """Runs of one configuration, which differ in their seed alone."""

    task: str
    name: str  # of what was trained; no other setting of this task has it
    runs: list[Logged]

    def curve(self, width: int) -> Curve:
        """The mean of each run in bins of `width` frames."""
        found: Curve = {}
        for run in self.runs:
            for edge, mean in run.binned(width).items():
                found.setdefault(edge, []).append(mean)
        return dict(sorted(found.items()))


def read_runs(logdirs: Sequence[Path], metric: str, notify: Callable[[str], None]) -> list[Logged]:
    """The runs that have the metric already; `notify` is told of those that do not.

    Raises:
        UserError: a folder holds no run or is given twice, or no run has the metric.
    """
    places = [logdir.resolve() for logdir in logdirs]
    if repeated := next((place for place in places if places.count(place) > 1), None):
        raise UserError(f"{repeated} is given twice, and would count as two runs; give every run once")
    if none := next((logdir for logdir in logdirs if not (logdir / "config.yaml").is_file()), None):
        raise UserError(f"{none} holds no config.yaml; give the folder of a run")
    runs = [Logged(logdir, read_yaml(logdir / "config.yaml"), *read_metric(logdir, metric)) for logdir in logdirs]
    found = [run for run in runs if len(run.frames)]
    if not found:
        raise UserError(f"none of these runs has {metric} yet; let one train longer, or correct the name")
    for run in runs:
        if not len(run.frames):
            notify(f"{run.logdir}: no {metric} yet; left out")
    return found


def gather(runs: Sequence[Logged]) -> list[Setting]:
    """Runs by what was trained: those that differ in their seed, and in what may differ when a run goes on, are one.

    A setting is called by its core, its size and, as `--set` would say it, what else was chosen differently from
    another setting of the same task, core and size.
    """
    groups: dict[str, list[Logged]] = {}
    for run in runs:
        groups.setdefault(json.dumps(_trained(run.config), sort_keys=True, default=str), []).append(run)
    settings: list[Setting] = []
    for task in dict.fromkeys(str(run.config.get("env.name")) for run in runs):
        own = [group for group in groups.values() if group[0].config.get("env.name") == task]
        called = [f"{group[0].config.get('core.name')} {group[0].config.get('size')}" for group in own]
        chosen = [_chosen(group[0].config) for group in own]
        for group, name, words in zip(own, called, chosen, strict=True):
            alike = [set(others) for other, others in zip(called, chosen, strict=True) if other == name]
            name = " ".join([name, *(word for word in words if word not in set.intersection(*alike))])
            taken = name in [setting.name for setting in settings if setting.task == task]
            settings.append(Setting(task, f"{name} ({group[0].logdir.name})" if taken else name, group))
    return settings


def _trained(config: Values) -> Values:
    return {key: value for key, value in config.items() if key != "seed" and not may_change_on_resume(key)}


def _chosen(config: Values) -> list[str]:
    """`key=value` of what differs from what environment, core and size give by themselves."""
    try:
        usual = flat(resolve(config.get("env.name"), config.get("core.name"), config.get("size")))
    except UserError:  # a run of another version, or of a core that is no longer installed
        return []
    return [f"{key}={value}" for key, value in _trained(config).items() if usual.get(key) != value]


def bin_width(frames: int, bins: int) -> int:
    """A width of 1, 2 or 5 times a power of ten that cuts `frames` into at least this many bins, or of 1."""
    power = 10 ** max(0, int(np.floor(np.log10(max(1, frames / bins)))))
    return max(factor * power for factor in (1, 2, 5) if factor == 1 or factor * power <= frames / bins)
