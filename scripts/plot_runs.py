"""Draw learning curves of runs, and write them as a small CSV."""

import csv
import json
import statistics
from importlib.util import find_spec
from pathlib import Path

from agent.command_line import Parser, run_main
from agent.errors import UserError, writing

Curve = list[tuple[int, list[float]]]
"""For each bin its right edge, in environment frames, and the returns of the episodes that ended in it."""


def read_curve(logdir: Path, width: int) -> Curve:
    """Returns of training episodes in bins of `width` frames.

    Raises:
        UserError: the folder has no readable metrics.jsonl.
    """
    bins: dict[int, list[float]] = {}
    try:
        for line in (logdir / "metrics.jsonl").read_text().splitlines():
            entry = json.loads(line)
            if "episode/return" in entry:
                edge = -(-int(entry["step"]) // width) * width
                bins.setdefault(edge, []).append(float(entry["episode/return"]))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{logdir}: no readable metrics.jsonl ({error}); give the folder of a run") from None
    return sorted(bins.items())


def read_published(file: Path, task: str) -> tuple[list[int], list[float], list[float], list[float]]:
    """Frames, mean, lowest and highest seed of a published curve: columns task, frames, mean, min, max."""
    try:
        with file.open() as stream:
            rows = [row for row in csv.DictReader(stream) if row["task"] == task]
        frames = [int(row["frames"]) for row in rows]
        mean, low, high = ([float(row[column]) for row in rows] for column in ("mean", "min", "max"))
    except (OSError, KeyError, ValueError) as error:
        raise UserError(f"--published {file}: {error}; it needs the columns task, frames, mean, min, max") from None
    if not rows:
        raise UserError(f"--published {file}: has no task {task}; give one that it has by --task")
    return frames, mean, low, high


def write_csv(file: Path, curves: dict[str, Curve]) -> None:
    """One line for each run and bin."""
    with writing(file), file.open("w", newline="") as stream:
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow(["run", "frames", "mean", "min", "max", "episodes"])
        for name, curve in curves.items():
            for edge, returns in curve:
                numbers = (statistics.mean(returns), min(returns), max(returns))
                writer.writerow([name, edge, *(f"{number:.1f}" for number in numbers), len(returns)])


def draw(file: Path, curves: dict[str, Curve], published: tuple | None, title: str) -> None:
    """The curves as a figure."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.2), layout="constrained")
    last = max(edge for curve in curves.values() for edge, _ in curve)
    if published:
        shown = [i for i, frames in enumerate(published[0]) if frames <= 1.1 * last]
        frames, mean, low, high = ([column[i] for i in shown] for column in published)
        axes.fill_between(frames, low, high, color="0.88", label="published, lowest to highest seed")
        axes.plot(frames, mean, color="black", linestyle="--", label="published, mean")
    for name, curve in curves.items():
        axes.plot([edge for edge, _ in curve], [statistics.mean(returns) for _, returns in curve], label=name)
    axes.set(xlabel="environment frames", ylabel="return of training episodes", title=title)
    axes.set_ylim(bottom=min(0, axes.get_ylim()[0]))
    axes.legend(fontsize=8)
    with writing(file):
        figure.savefig(file, dpi=120)


def check_files(csv_file: Path | None, figure: Path | None) -> None:
    """UserError if what is asked for cannot be written, as far as this can be known beforehand."""
    for flag, file in (("--csv", csv_file), ("--figure", figure)):
        if file and (file.is_dir() or not file.parent.is_dir()):
            raise UserError(f"{flag} {file}: give a file in a folder that exists")
    if figure and figure.suffix not in (".png", ".svg"):
        raise UserError(f"--figure {figure}: give a file that ends in .png or .svg")
    if figure and not find_spec("matplotlib"):
        raise UserError("--figure needs matplotlib: pip install matplotlib")


def main() -> None:
    """Read the flags, read the runs, write what was asked for."""
    parser = Parser(description=__doc__, allow_abbrev=False)
    parser.add_argument("logdir", nargs="+", type=Path, help="folders of runs; the last part of each is its name")
    parser.add_argument("--bins", metavar="N", type=int, default=10_000, help="frames in a bin (10000)")
    parser.add_argument("--figure", metavar="FILE", type=Path, help="write a figure, .png or .svg")
    parser.add_argument("--csv", metavar="FILE", type=Path, help="write run, frames, mean, min, max, episodes")
    parser.add_argument("--published", metavar="FILE", type=Path, help="CSV of a published curve to draw behind")
    parser.add_argument("--task", metavar="NAME", default="dmc_walker_walk", help="task of the published curve")
    parser.add_argument("--title", metavar="TEXT", default="", help="title of the figure")
    arguments = parser.parse_args()
    if arguments.bins < 1:
        raise UserError(f"--bins {arguments.bins}: give 1 or more")
    names = [logdir.name for logdir in arguments.logdir]
    if repeated := next((name for name in names if names.count(name) > 1), None):
        raise UserError(f"{repeated} is the name of two folders; give runs whose folders have different names")
    check_files(arguments.csv, arguments.figure)
    curves = {logdir.name: read_curve(logdir, arguments.bins) for logdir in arguments.logdir}
    if empty := next((name for name, curve in curves.items() if not curve), None):
        raise UserError(f"{empty}: no episode has ended yet; let it train longer")
    published = read_published(arguments.published, arguments.task) if arguments.published else None
    for name, curve in curves.items():
        print(f"{name}: " + " ".join(f"{edge}:{statistics.mean(returns):.1f}" for edge, returns in curve))
    if arguments.csv:
        write_csv(arguments.csv, curves)
    if arguments.figure:
        draw(arguments.figure, curves, published, arguments.title)


if __name__ == "__main__":
    run_main(main)
