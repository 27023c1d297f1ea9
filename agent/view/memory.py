"""A memory over an episode as a figure: ranks of its matrices, and how old what it reads is."""

from typing import Any

import numpy as np
from torch import Tensor

from agent.cores.core import Inspection
from agent.cores.inspection import mean_age
from agent.view.figure import new_figure

HEADS = 6
"""Heads of a block whose weights are drawn, at most; they are spread over all of them, the lines show all."""
FAINTEST = 1e-3  # share of what is read that still has a colour


def draw_memory(seen: Inspection, reward: Tensor, title: str) -> Any:
    """The figure of T steps: the reward (T,) of each step, and below it what the core tells."""
    if seen.weights is not None:
        return _draw_heads(seen, seen.weights, reward, title)
    lines = {"reward": reward, "size of the state": seen.size, "its change in a step": seen.change}
    known = {name: values for name, values in lines.items() if values is not None}
    figure = new_figure(figsize=(9, 1.9 * len(known) + 0.6))
    for axes, (name, values) in zip(figure.subplots(len(known), squeeze=False)[:, 0], known.items(), strict=True):
        _draw_line(axes, name, values)
    figure.suptitle(title, fontsize=11, x=0.01, ha="left")
    return figure


def _draw_heads(seen: Inspection, weights: Tensor, reward: Tensor, title: str) -> Any:
    """Of weights (N, H, T, T): for each block the lines of all heads, and the weights of some."""
    blocks, heads = weights.shape[:2]
    shown = sorted({round(place) for place in np.linspace(0, heads - 1, min(heads, HEADS))})
    figure = new_figure(figsize=(max(9, 2.8 * len(shown) + 1), 2.2 + 5.4 * blocks))
    top, *parts = figure.subfigures(1 + 2 * blocks, 1, height_ratios=(1.4, *[2.1, 2.9] * blocks))
    _draw_line(top.subplots(), "reward", reward)
    for block in range(blocks):
        _draw_lines(parts[2 * block], seen, block)
        maps = parts[2 * block + 1].subplots(1, len(shown), squeeze=False)[0]
        for axes, head in zip(maps, shown, strict=True):
            image = _draw_weights(axes, weights[block, head])
            axes.set_title(f"block {block + 1}, head {head + 1}: what is read", fontsize=9)
        maps[0].set_ylabel("step that reads", fontsize=9)
        bar = parts[2 * block + 1].colorbar(image, ax=list(maps), fraction=0.03)
        bar.set_label("share of the weights", fontsize=8)
        bar.ax.tick_params(labelsize=7)
    figure.suptitle(title, fontsize=11, x=0.01, ha="left")
    return figure


def _draw_lines(figure: Any, seen: Inspection, block: int) -> None:
    """Ranks, where there are such, and mean ages of all heads of a block over time."""
    from matplotlib import colormaps

    assert seen.weights is not None
    lines = {"age of what is read, in steps": _numbers(mean_age(seen.weights[block]))}  # (H, T)
    if seen.rank is not None:
        lines = {"effective rank of the memory": _numbers(seen.rank[block])} | lines
    for axes, (name, values) in zip(figure.subplots(1, len(lines), squeeze=False)[0], lines.items(), strict=True):
        heads, amount = values.shape
        steps, colors = np.arange(1, amount + 1), colormaps["viridis"](np.linspace(0, 0.85, heads))
        for head, (line, color) in enumerate(zip(values, colors, strict=True)):
            named = heads <= HEADS or head in (0, heads - 1)
            axes.plot(steps, line, color=color, lw=1.1, label=f"head {head + 1}" if named else None)
        if name.startswith("age"):
            axes.plot(steps, (steps - 1) / 2, color="0.5", lw=1, ls=":", label="all steps alike")
        axes.set_title(f"block {block + 1}: {name}", fontsize=9)
        axes.set_xlabel("step of the episode", fontsize=9)
        axes.set_ylim(0, 1.08 * values.max() + 0.1)
        axes.margins(x=0)
        axes.tick_params(labelsize=8)
        axes.legend(fontsize=7, loc="best", ncols=2, framealpha=0.7)


def _draw_weights(axes: Any, weights: Tensor) -> Any:
    """The sizes of one head's weights (T, T), each row divided by its sum."""
    from matplotlib.colors import LogNorm

    size, end = np.abs(_numbers(weights)), len(weights) + 0.5
    share = size / np.maximum(size.sum(-1, keepdims=True), np.finfo(size.dtype).tiny)
    future = np.triu(np.ones_like(share, dtype=bool), 1)
    drawn = np.ma.array(np.maximum(share, FAINTEST), mask=future)
    axes.set_xlabel("step that wrote", fontsize=9)
    axes.tick_params(labelsize=8)
    return axes.imshow(
        drawn, origin="lower", cmap="magma_r", norm=LogNorm(FAINTEST, 1), interpolation="nearest",
        extent=(0.5, end, 0.5, end),
    )  # fmt: skip


def _draw_line(axes: Any, name: str, values: Tensor) -> None:
    """Numbers (T,) over the episode."""
    axes.plot(np.arange(1, len(values) + 1), _numbers(values), color="0.25", lw=1)
    axes.set_ylabel(name, fontsize=9)
    axes.set_xlabel("step of the episode", fontsize=9)
    axes.tick_params(labelsize=8)
    axes.margins(x=0)


def _numbers(values: Tensor) -> np.ndarray:
    return values.float().cpu().numpy()
