"""What a suite says at the end: one row for each probe and core, as a Markdown table."""

import statistics
from collections.abc import Sequence
from typing import Any

from agent.intervals import CONFIDENCE, interval
from agent.memory.config import Run
from agent.memory.scoring import Result
from agent.probe.report import markdown

Row = dict[str, Any]
"""A probe and a core: their names, `seeds`, and for each of these in `results` what `score_run` gave."""


def rows(runs: Sequence[Run], results: dict[str, Result]) -> list[Row]:
    """Results by name of run, gathered by probe and core; pairs without any result are left out."""
    found: dict[tuple[str, str], Row] = {}
    for run in runs:
        if run.name in results:
            first = {"probe": run.probe, "core": run.core, "env": run.config.env.name, "seeds": [], "results": []}
            row = found.setdefault((run.probe, run.core), first)
            row["seeds"].append(run.config.seed)
            row["results"].append(results[run.name])
    return list(found.values())


def table(rows: Sequence[Row]) -> str:
    """Rows as a Markdown table. Columns that no row fills are left out."""
    factors = sorted({int(factor) for row in rows for result in row["results"] for factor in result["gaps"]})
    longer = [factor for factor in factors if factor != 1]
    bar = next((row["results"][0]["evaluation"]["reached"] for row in rows), 0.0)
    header = [
        "probe", "core", "seeds", f"score: mean, {100 * CONFIDENCE:g}% interval (each seed)", "items held",
        *(f"score at {factor}x the gap" for factor in longer),
        f"reached {bar:g}: of seeds, median frames, updates", "accuracy by age", "best floor", "parameters",
        "state", "updates/s",
    ]  # fmt: skip
    return markdown(header, [_cells(row, longer) for row in rows])


def sentence(name: str, result: Result) -> str:
    """One run in one line."""
    values = {int(factor): gap["value"] for factor, gap in result["gaps"].items()}
    longer = ", ".join(f"{value:.2f} at {factor}x" for factor, value in values.items() if factor != 1)
    reached, bar = result["reached"], result["evaluation"]["reached"]
    when = f"{bar:g} reached after {reached['frames']:,} frames" if reached else f"{bar:g} not reached"
    return f"{name}: {result['score_name']} {values[1]:.2f}, {longer + ', ' if longer else ''}{when}"


def at(row: Row, factor: int, name: str = "value") -> list[float]:
    """A number of each seed at a gap; seeds without it are left out."""
    gaps = [result["gaps"].get(str(factor), {}) for result in row["results"]]
    return [gap[name] for gap in gaps if name in gap]


def accuracy_by_age(row: Row) -> dict[int, list[float]]:
    """By upper bound of the age in steps, a power of two, the accuracy of each seed at the trained gap."""
    names = {name for result in row["results"] for name in result["gaps"].get("1", {}) if "recall_age_" in name}
    return {age: at(row, 1, f"recall_age_{age}") for age in sorted(int(name.rsplit("_", 1)[1]) for name in names)}


def _cells(row: Row, longer: Sequence[int]) -> list[str]:
    first, values = row["results"][0], at(row, 1)
    reached = [result["reached"] for result in row["results"] if result["reached"]]
    median = [round(statistics.median(each[key] for each in reached)) for key in ("frames", "updates") if reached]
    held = f"{max(0.0, statistics.mean(values)) * first['items']:.1f} of {first['items']}" if first["items"] else ""
    rates = [rate for result in row["results"] if (rate := result["updates_per_second"])]
    floors = first["floors"]
    best = max(floors, key=lambda name: floors[name], default="")
    return [
        row["probe"] + ("" if first["score_name"] == "score" else f" ({first['score_name']})"),
        row["core"],
        str(len(row["seeds"])),
        _mean(values) + f" ({', '.join(f'{value:.2f}' for value in values)})",
        held,
        *(_mean(at(row, factor)) if at(row, factor) else "" for factor in longer),
        (f"{len(reached)}, {median[0]:,}, {median[1]:,}" if reached else "0") if first["items"] else "",
        ", ".join(f"{age}: {statistics.mean(hits):.2f}" for age, hits in accuracy_by_age(row).items()),
        f"{best} {floors[best]:.2f}" if best else "",
        f"{first['parameters']:,}",
        f"{first['state_bytes'] / 1e3:.1f} kB",
        f"{statistics.median(rates):.1f}" if rates else "",
    ]


def _mean(values: Sequence[float]) -> str:
    half = interval(values)
    return f"{statistics.mean(values):.2f}" + ("" if half is None else f" ± {half:.2f}")
