"""A suite's figure: for each probe the curves, where seeds end, longer gaps, and accuracy by age, every seed shown."""

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from agent.intervals import interval
from agent.memory.report import Row, accuracy_by_age, at
from agent.probe.figure import columns, label_frames, load_pyplot


def draw(file: Path, rows: Sequence[Row]) -> None:
    """Write the figure of finished runs.

    Raises:
        UserError: matplotlib is missing.
    """
    pyplot = load_pyplot()
    probes = list(dict.fromkeys(row["probe"] for row in rows))
    cores = list(dict.fromkeys(row["core"] for row in rows))
    colors = {core: f"C{i % 10}" for i, core in enumerate(cores)}
    figure, grid = pyplot.subplots(
        len(probes), 4, figsize=(15, 3.2 * len(probes) + 0.5), layout="constrained", squeeze=False,
        gridspec_kw={"width_ratios": (1.3, 1, 1, 1)},
    )  # fmt: skip
    for probe, (curves, ends, gaps, ages) in zip(probes, grid, strict=True):
        own = [row for row in rows if row["probe"] == probe]
        name = own[0]["results"][0]["score_name"]
        for row in own:
            _curves(curves, row, colors[row["core"]])
            _gaps(gaps, row, colors[row["core"]])
            _ages(ages, row, colors[row["core"]])
        _ends(ends, own, colors)
        window = own[0]["results"][0]["evaluation"]["window"]
        curves.set(title=f"{probe}: {name} in training", xlabel=f"frames (means of {window} episodes)")
        label_frames(curves, curves.get_xlim()[1])
        curves.legend(fontsize=8, loc="best")
        ends.set(title=f"{name} at the end")
        gaps.set(title=f"{name} at longer gaps", xlabel="gap / trained gap")
        ages.set(title="accuracy by age", xlabel="age in steps, at most", ylim=(-0.04, 1.04))
        if name == "score":
            for axes in (curves, ends, gaps):
                axes.set_ylim(min(-0.2, axes.get_ylim()[0]), 1.05)
                axes.axhline(0, color="0.4", lw=1, ls=":", zorder=0)
    figure.savefig(file, dpi=130)
    pyplot.close(figure)


def _curves(axes: Any, row: Row, color: str) -> None:
    for seed, result in enumerate(row["results"]):
        steps, values = [point[0] for point in result["curve"]], [point[1] for point in result["curve"]]
        axes.plot(steps, values, color=color, lw=1.1, alpha=0.75, label=None if seed else row["core"])


def _ends(axes: Any, rows: Sequence[Row], colors: Mapping[str, str]) -> None:
    values = {row["core"]: at(row, 1) for row in rows}
    columns(axes, values, colors)
    limits = axes.get_ylim()  # of the points: an interval of two seeds may be many times as long
    for place, (core, points) in enumerate(values.items()):
        half = interval(points)
        if half is not None:
            axes.errorbar(place, statistics.mean(points), half, color=colors[core], capsize=5, lw=1.2, zorder=1)
    axes.set_ylim(limits)


def _gaps(axes: Any, row: Row, color: str) -> None:
    factors = sorted(int(factor) for factor in row["results"][0]["gaps"])
    _lines(axes, {factor: at(row, factor) for factor in factors}, color)
    axes.set_xscale("log", base=2)
    axes.set_xticks(factors, [f"{factor}x" for factor in factors])


def _ages(axes: Any, row: Row, color: str) -> None:
    found = accuracy_by_age(row)
    _lines(axes, found, color)
    axes.set_xscale("log", base=2)
    if found:
        axes.set_xticks(list(found), [str(age) for age in found])


def _lines(axes: Any, values: Mapping[int, Sequence[float]], color: str) -> None:
    """The mean as a line, every seed as a point."""
    axes.plot(list(values), [statistics.mean(points) for points in values.values()], color=color, lw=1.4)
    for place, points in values.items():
        axes.plot([place] * len(points), points, "o", color=color, ms=3.5, alpha=0.7, mew=0)
