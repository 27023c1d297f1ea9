"""Learning curves of settings, each the mean over its runs and its interval: as a table, a CSV and a figure."""

import csv
import statistics
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from agent.errors import writing
from agent.intervals import CONFIDENCE, interval
from agent.probe.figure import label_frames, load_pyplot
from agent.probe.report import markdown
from agent.published import Published, normalised
from agent.results import RETURN, Setting

LABEL_WIDTH = 56
"""Characters in a line of the legend, which else would be wider than its panel."""


def table(
    settings: Sequence[Setting],
    width: int,
    published: Mapping[str, Published],
    scales: Mapping[str, tuple[float, float]],
) -> str:
    """Where each setting stands in the last bin that all of its task have reached, as Markdown."""
    lines: list[list[str]] = []
    scores: dict[str, list[float]] = {}
    for task in dict.fromkeys(setting.task for setting in settings):
        curves = {setting.name: setting.curve(width) for setting in settings if setting.task == task}
        shared = set.intersection(*map(set, curves.values()))
        for name, curve in curves.items():
            edge = max(shared or curve)
            mean, half = statistics.mean(curve[edge]), interval(curve[edge])
            score, theirs = normalised(task, mean, scales), published[task].at(edge) if task in published else None
            if score is not None:
                scores.setdefault(name, []).append(score)
            lines.append([
                task, name, str(len(curve[edge])), f"{edge - width:,}-{edge:,}",
                f"{mean:.4g}" + ("" if half is None else f" ± {half:.3g}"),
                "" if score is None else f"{score:.3f}",
                "" if theirs is None else f"{theirs:.4g}",
                "" if not theirs else f"{mean / theirs:.2f}",
            ])  # fmt: skip
    for name, values in scores.items():
        if len(values) > 1:
            both = f"mean {statistics.mean(values):.3f}, median {statistics.median(values):.3f}"
            lines.append([f"{len(values)} tasks", name, "", "", "", both, "", ""])
    header = ["task", "setting", "runs", "frames", f"mean, {100 * CONFIDENCE:g}% interval", "normalised",
              "published", "share of it"]  # fmt: skip
    return markdown(header, lines)


def write_csv(file: Path, settings: Sequence[Setting], width: int) -> None:
    """One line for each setting and bin; the interval is half its width, and empty for one run."""
    with writing(file), file.open("w", newline="") as stream:
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow(["task", "setting", "frames", "mean", "interval", "runs"])
        for setting in settings:
            for edge, values in setting.curve(width).items():
                half = interval(values)
                shown = "" if half is None else f"{half:.4g}"
                writer.writerow(
                    [setting.task, setting.name, edge, f"{statistics.mean(values):.6g}", shown, len(values)]
                )


def draw(
    file: Path, settings: Sequence[Setting], width: int, published: Mapping[str, Published], metric: str, title: str
) -> None:
    """The curves as a figure, one panel for each task; a setting has one colour in all of them.

    Thin lines are runs. What is drawn of them and of published curves sets the limits: a few seeds may have an interval
    many times as wide. Of two it would cover everything, so it is drawn from three on, and of two what is between them.
    """
    pyplot = load_pyplot()
    tasks = list(dict.fromkeys(setting.task for setting in settings))
    colors = {name: f"C{i % 10}" for i, name in enumerate(dict.fromkeys(setting.name for setting in settings))}
    columns = 2 if len(tasks) == 4 else min(3, len(tasks))
    rows = -(-len(tasks) // columns)
    figure, grid = pyplot.subplots(
        rows, columns, figsize=(max(7, 4.6 * columns), 4.2 * rows if rows == 1 else 3.4 * rows),
        layout="constrained", squeeze=False,
    )  # fmt: skip
    for axes in grid.flat[len(tasks) :]:
        axes.set_axis_off()
    for task, axes in zip(tasks, grid.flat, strict=False):
        own = [setting for setting in settings if setting.task == task]
        last = max(max(setting.curve(width)) for setting in own)
        if task in published:
            _draw_published(axes, published[task], last)
        for setting in own:
            _draw_runs(axes, setting, width, colors[setting.name])
        low, high = axes.get_ylim()
        for setting in own:
            _draw_mean(axes, setting, width, colors[setting.name])
        axes.set(title=task, xlabel="environment frames", xlim=(0, 1.02 * last), ylim=(min(0, low), high))
        axes.set_ylabel("return of training episodes" if metric == RETURN else metric)
        label_frames(axes, last)
        axes.grid(color="0.92")
        axes.set_axisbelow(True)
        axes.legend(fontsize=7, loc="best")
    if title:
        figure.suptitle(title)
    with writing(file):
        figure.savefig(file, dpi=120)
    pyplot.close(figure)


def _draw_runs(axes: Any, setting: Setting, width: int, color: str) -> None:
    for run in setting.runs:
        means = run.binned(width)
        axes.plot(list(means), list(means.values()), color=color, lw=0.6, alpha=0.6)


def _draw_mean(axes: Any, setting: Setting, width: int, color: str) -> None:
    curve, amount = setting.curve(width), len(setting.runs)
    edges, means = list(curve), [statistics.mean(values) for values in curve.values()]
    spread = "range" if amount == 2 else f"{100 * CONFIDENCE:g}% interval"
    told = f", mean and {spread} of {amount}" if amount > 1 else ""
    axes.plot(edges, means, color=color, lw=1.8, label=in_lines(setting.name + told))
    if amount > 1:
        low, high = zip(*(band(values, amount) for values in curve.values()), strict=True)
        axes.fill_between(edges, low, high, color=color, alpha=0.15, lw=0)


def in_lines(label: str) -> str:
    """A label broken between words into lines of at most `LABEL_WIDTH` characters."""
    return textwrap.fill(label, LABEL_WIDTH, break_long_words=False, break_on_hyphens=False)


def band(values: Sequence[float], amount: int) -> tuple[float, float]:
    """What is shaded about the mean of a bin, in which not all of `amount` runs need to be."""
    if amount == 2:
        return min(values), max(values)
    mean, half = statistics.mean(values), interval(values) or 0.0
    return mean - half, mean + half


def _draw_published(axes: Any, curve: Published, last: int) -> None:
    seen = curve.frames <= 1.05 * last
    axes.fill_between(
        curve.frames[seen], curve.low[seen], curve.high[seen], color="0.9", lw=0, label="published, each seed within"
    )
    axes.plot(curve.frames[seen], curve.mean[seen], color="0.25", ls="--", lw=1.2, label="published, mean")
