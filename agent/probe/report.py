"""What the probe says at the end: one row for each experiment, as a Markdown table."""

import statistics
from collections.abc import Sequence
from typing import Any

Row = dict[str, Any]
"""An experiment's configuration under `config`, its names, and what `Trainer.result` gives."""

HEADER = (
    "task", "core", "lr", "seeds", "accuracy: mean (min, median, max)", "macro", "floor: bag, last, chance",
    "solved", "escaped: of seeds, median step", "effective rank", "read by another core", "parameters", "state",
    "ms/step", "seeds/hour", "without evaluations: stacked, one by one",
)  # fmt: skip


def table(rows: Sequence[Row]) -> str:
    """Rows as a Markdown table. Columns that no row fills are left out."""
    return markdown(HEADER, [_cells(row) for row in rows])


def markdown(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A table without the columns that no line fills; a cell that is empty elsewhere becomes a dash."""
    kept = [i for i in range(len(header)) if any(line[i] for line in lines)]
    shown = [[header[i] for i in kept], ["---"] * len(kept), *([line[i] or "-" for i in kept] for line in lines)]
    return "\n".join("| " + " | ".join(line) + " |" for line in shown) + "\n"


def sentence(row: Row) -> str:
    """One experiment in one line."""
    final = row["curves"]["accuracy"][-1]
    escaped = [step for step in row["escape_step"] if step is not None]
    when = f" at step {statistics.median(escaped):g} (median)" if escaped else ""
    return (
        f"{row['name']}: accuracy {statistics.mean(final):.3f} (floor {max(row['floors'].values()):.3f}), "
        f"{row['solved']} of {len(final)} seeds solved, {len(escaped)} escaped{when}, {row['seconds']:.0f} s"
    )


def _cells(row: Row) -> list[str]:
    config, floors, curves = row["config"], row["floors"], row["curves"]
    final, macro = curves["accuracy"][-1], curves["macro_accuracy"][-1]
    escaped = [step for step in row["escape_step"] if step is not None]
    ranks = [curves[key][-1] for key in sorted(curves) if key.startswith("effective_rank")]
    task = config["task"]
    details = f"noise {task['noise']:g}" if task["name"] == "noisy_recall" else f"{task['pairs']} pairs"
    return [
        row["preset"] or f"{task['name']} {task['vocab']}/{task['length']}, {details}",
        row["core"],
        f"{config['training']['lr']:g}",
        str(len(final)),
        f"{statistics.mean(final):.3f} ({min(final):.3f}, {statistics.median(final):.3f}, {max(final):.3f})",
        f"{statistics.mean(macro):.3f}",
        ", ".join(f"{floors[name]:.3f}" if name in floors else "-" for name in ("bag", "last", "chance")),
        f"{row['solved']} of {len(final)}",
        f"{len(escaped)}, {statistics.median(escaped):g}" if escaped else "0",
        ", ".join(f"{statistics.mean(rank):.1f}" for rank in ranks),
        "; ".join(f"{name} {statistics.mean(values):.3f}" for name, values in row["swap"].items()),
        f"{row['parameters']:,}",
        f"{row['state_numbers']:,}",
        f"{1000 * row['seconds'] / config['training']['steps']:.0f}",
        f"{row['seeds_per_hour']:.0f}",
        f"{row['stacked_per_hour']:.0f}, {row['alone_per_hour']:.0f}" if "alone_per_hour" in row else "",
    ]
