"""The probe's figure: for each task, how long seeds stay on the plateau, every seed's curve, and where they end."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from agent.errors import UserError
from agent.probe.report import Row

FEW = 4
"""Columns whose names have room beside each other."""


def draw(file: Path, rows: Sequence[Row]) -> None:
    """Write the figure of finished experiments.

    Raises:
        UserError: matplotlib is missing.
    """
    pyplot = load_pyplot()
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    figure, grid = pyplot.subplots(
        len(tasks), 3, figsize=(13, 3.4 * len(tasks) + 0.6), layout="constrained", squeeze=False,
        gridspec_kw={"width_ratios": (1, 1.2, 1)},
    )  # fmt: skip
    labels = list(dict.fromkeys(_label(row, rows) for row in rows))
    palette = pyplot.get_cmap("tab10" if len(labels) <= 10 else "tab20")
    colors = {label: palette(i % palette.N) for i, label in enumerate(labels)}
    shown: dict[str, Any] = {}  # the line that stands for each label
    for task, (survival, curves, ends) in zip(tasks, grid, strict=True):
        own = [row for row in rows if row["task"] == task]
        for row in own:
            label = _label(row, rows)
            _survival(survival, row, label, colors[label])
            _curves(curves, row, colors[label])
        columns(ends, {_label(row, rows): row["curves"]["accuracy"][-1] for row in own}, colors)
        survival.set(title=f"{task}: seeds not yet escaped", xlabel="step", ylabel="share of seeds", ylim=(-0.03, 1.05))
        lines, names = survival.get_legend_handles_labels()
        shown |= dict(zip(names, lines, strict=True))
        curves.set(title="accuracy, each seed", xlabel="step", ylim=(-0.02, 1.04))
        ends.set(title="accuracy at the end, each seed", ylim=(-0.02, 1.04))
        if len(own) > FEW:
            ends.set_xticks([])
            ends.set_xlabel("in the order of the legend")
        for axes in (curves, ends):
            axes.axhline(max(own[0]["floors"].values()), color="0.4", lw=1, ls=":", zorder=0)
        curves.text(0.99, max(own[0]["floors"].values()) + 0.01, "floor", color="0.4", fontsize=8, ha="right",
                    transform=curves.get_yaxis_transform())  # fmt: skip
    # Below the panels: among several experiments there is no corner that is free.
    figure.legend(list(shown.values()), list(shown), loc="outside lower center", ncols=min(4, len(shown)), fontsize=8)
    figure.savefig(file, dpi=130)
    pyplot.close(figure)


def load_pyplot() -> Any:
    """Matplotlib's pyplot, drawing to files.

    Raises:
        UserError: matplotlib is missing.
    """
    try:
        import matplotlib
    except ImportError:
        raise UserError("the figure needs matplotlib: pip install 'dreamer-that-remembers[plots]'") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def _label(row: Row, rows: Sequence[Row]) -> str:
    """The core as the user wrote it, with its learning rate where there are several for one core and task."""
    alike = [other for other in rows if (other["task"], other["core"]) == (row["task"], row["core"])]
    return row["core"] + (f", lr {row['config']['training']['lr']:g}" if len(alike) > 1 else "")


def _survival(axes: Any, row: Row, label: str, color: Any) -> None:
    """A staircase that goes down by one seed at each escape, with a point for every seed."""
    seeds, last = len(row["seeds"]), row["steps"][-1]
    escapes = sorted(step for step in row["escape_step"] if step is not None)
    left = [(seeds - i) / seeds for i in range(len(escapes) + 1)]
    axes.step([0, *escapes, last], [*left, left[-1]], where="post", color=color, label=label)
    axes.plot(escapes, left[1:], "o", color=color, ms=4)


def _curves(axes: Any, row: Row, color: Any) -> None:
    axes.plot(row["steps"], row["curves"]["accuracy"], color=color, lw=0.9, alpha=0.6)


def label_frames(axes: Any, last: float) -> None:
    """Write the frames along x, of which `last` is the last, in thousands where there are tens of them."""
    if last >= 10_000:
        axes.xaxis.set_major_formatter(lambda frames, _: f"{frames / 1000:g}k" if frames else "0")


def columns(axes: Any, values: Mapping[str, Sequence[float]], colors: Mapping[str, Any]) -> None:
    """A column of points for each label, spread sideways in the order of seeds, and their mean as a bar."""
    for place, (label, points) in enumerate(values.items()):
        spread = [place + 0.5 * ((i + 0.5) / len(points) - 0.5) for i in range(len(points))]
        axes.plot(spread, points, "o", color=colors[label], ms=4, alpha=0.75, mew=0)
        axes.plot([place - 0.35, place + 0.35], [sum(points) / len(points)] * 2, color=colors[label], lw=1.5)
    axes.set_xticks(range(len(values)), [label.replace(":", "\n") for label in values], fontsize=8)
    axes.set_xlim(-0.6, len(values) - 0.4)
