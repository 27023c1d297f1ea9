"""Predicted vectors, choices and rewards as a figure: truth and model over time, sequences side by side."""

import io
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from agent.errors import UserError
from agent.view.open_loop import Predicted

ENTRIES = 7
"""Rows of the figure besides the reward's, at most: those entries that vary most."""
OBSERVED, TRUTH, MODEL = "#2e7d32", "0.25", "#c85a00"


def new_figure(**arguments: Any) -> Any:
    """A matplotlib Figure that belongs to no window, so that whatever a notebook draws with stays as it is.

    Raises:
        UserError: matplotlib is missing.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError("the figure needs matplotlib: pip install 'dreamer-that-remembers[plots]'") from None
    return Figure(layout="constrained", **arguments)


def as_png(figure: Any) -> bytes:
    """The figure as the bytes of a PNG file."""
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=100)
    return stream.getvalue()


def draw(predicted: Predicted, titles: Sequence[str], part: str, title: str) -> Any:
    """The figure of all entries that are no images.

    Args:
        predicted: the sequences.
        titles: of the sequences.
        part: what the steps that were not observed are called.
        title: of the figure; what it leaves out is said behind it.
    """
    rows, amount = entries(predicted)
    rows |= {"reward": (predicted.reward, predicted.model_reward)}
    left_out = f"; of {amount} entries the {len(rows) - 1} that vary most" if amount >= len(rows) else ""
    sequences, steps = predicted.valid.shape
    figure = new_figure(figsize=(max(9, 1.4 + 3.8 * sequences), 1.2 + 1.15 * len(rows)))
    grid = figure.subplots(len(rows), sequences, sharex=True, sharey="row", squeeze=False)
    for (name, (truth, model)), line in zip(rows.items(), grid, strict=True):
        line[0].set_ylabel(name, rotation=0, ha="right", va="center", fontsize=9)
        for column, axes in enumerate(line):
            _plot(axes, truth[column], model[column], predicted.valid[column], predicted.context)
    for axes, name in zip(grid[0], titles, strict=True):
        axes.set_title(name, fontsize=10)
    for axes in grid[-1]:
        axes.set_xlabel("step of the sequence", fontsize=9)
        axes.set_xlim(1, steps)
    handles, labels = grid[0][0].get_legend_handles_labels()
    labels[-1] = f"model, {part}"
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), fontsize=9, frameon=False)
    figure.suptitle(title + left_out, fontsize=11, x=0.01, ha="left")
    return figure


def entries(predicted: Predicted) -> tuple[dict[str, tuple[Tensor, Tensor]], int]:
    """Those entries that vary most, images left out: by name truth and model (B, T); and of how many they are."""
    found = {}
    for key, value in predicted.truth.items():
        if key in predicted.images:
            continue
        truth, model = (torch.atleast_3d(part) for part in (value, predicted.model[key]))
        for place in range(truth.shape[-1]):
            name = key if truth.shape[-1] == 1 else f"{key}[{place}]"
            found[name] = (truth[..., place], model[..., place])
    varied = sorted(found, key=lambda name: -found[name][0].float().var().item())[:ENTRIES]
    return {name: found[name] for name in found if name in varied}, len(found)


def _plot(axes: Any, truth: Tensor, model: Tensor, valid: Tensor, context: int) -> None:
    """One entry of one sequence, each (T,): lines of reals, marks of choices, between which there is nothing."""
    steps = np.arange(1, len(truth) + 1)
    known, said = (np.where(valid & value.isfinite(), value, np.nan) for value in (truth, model))
    choices = not truth.is_floating_point()
    ring: dict[str, Any] = {"ls": "", "marker": "o", "mfc": "none", "ms": 6} if choices else {"lw": 1.2}
    dot: dict[str, Any] = {"ls": "", "marker": ".", "ms": 6} if choices else {"lw": 1.4}
    joint = context if choices else context - 1  # a line goes on from where the other ends
    axes.axvspan(0.5, context + 0.5, color=OBSERVED, alpha=0.12, lw=0)
    axes.axvline(context + 0.5, color=OBSERVED, lw=1)
    axes.plot(steps, known, color=TRUTH, label="truth", **ring)
    axes.plot(steps[:context], said[:context], color=OBSERVED, label="model, observing", **dot)
    axes.plot(steps[joint:], said[joint:], color=MODEL, label="model", **dot)
    axes.tick_params(labelsize=8)
