"""Draw learning curves of runs, seeds of one setting together, and tell where they stand beside published ones."""

import sys
from pathlib import Path

from agent.command_line import make_parser, run_main
from agent.errors import UserError
from agent.learning_curves import draw, table, write_csv
from agent.probe.figure import load_pyplot
from agent.published import read_published, read_scales
from agent.results import RETURN, bin_width, gather, read_runs

PUBLISHED = Path(__file__).parents[1] / "docs/results/published"
PUBLISHED_BIN = 10_000
"""Frames in a bin of the published curves."""


def check_files(csv: Path | None, figure: Path | None) -> None:
    """UserError if what is asked for cannot be written, as far as this can be known beforehand."""
    for flag, file in (("--csv", csv), ("--figure", figure)):
        if file and (file.is_dir() or not file.parent.is_dir()):
            raise UserError(f"{flag} {file}: give a file in a folder that exists")
    if figure and figure.suffix not in (".png", ".svg"):
        raise UserError(f"--figure {figure}: give a file that ends in .png or .svg")
    if figure:
        load_pyplot()


def main() -> None:
    """Read the flags, read the runs, write what was asked for."""
    parser = make_parser(
        "Learning curves of runs: the mean over seeds of one setting and its 95% interval, one panel for each task, "
        "with the published curve where there is one. Prints a table of where each setting stands at the last frames "
        "that all settings of a task have reached.",
        [
            "python scripts/plot_runs.py runs/* --figure curves.png",
            "python scripts/plot_runs.py runs/probe-* --metric episode/score --bins 5000 --csv curves.csv",
        ],
        flags=(),
    )
    parser.add_argument("logdir", nargs="+", type=Path, help="folders of runs")
    parser.add_argument("--metric", metavar="NAME", default=RETURN, help=f"what to draw ({RETURN})")
    parser.add_argument(
        "--bins", metavar="N", type=int,
        help="frames in a bin; if not given, as in the published curves, or for about 20 bins where there are none",
    )  # fmt: skip
    parser.add_argument("--figure", metavar="FILE", type=Path, help="write a figure, .png or .svg")
    parser.add_argument("--csv", metavar="FILE", type=Path, help="write task, setting, frames, mean, interval, runs")
    parser.add_argument(
        "--published", metavar="PATH", type=Path, default=PUBLISHED,
        help="published curves, a CSV of task, frames, mean, min, max or a folder of them (docs/results/published)",
    )  # fmt: skip
    parser.add_argument("--title", metavar="TEXT", default="", help="title of the figure")
    arguments = parser.parse_args()
    if arguments.bins is not None and arguments.bins < 1:
        raise UserError(f"--bins {arguments.bins}: give 1 or more")
    check_files(arguments.csv, arguments.figure)

    runs = read_runs(arguments.logdir, arguments.metric, lambda line: print(line, file=sys.stderr))
    settings = gather(runs)
    published, scales = {}, {}
    if arguments.metric == RETURN:
        try:
            published, scales = read_published(arguments.published), read_scales(arguments.published)
        except UserError as error:
            raise UserError(f"--published {error}") from None
    last = max(int(run.frames.max()) for run in runs)
    known = any(setting.task in published for setting in settings) and last >= PUBLISHED_BIN
    width = arguments.bins or (PUBLISHED_BIN if known else bin_width(last, 20))
    print(table(settings, width, published, scales))
    if arguments.csv:
        write_csv(arguments.csv, settings, width)
    if arguments.figure:
        draw(arguments.figure, settings, width, published, arguments.metric, arguments.title)


if __name__ == "__main__":
    run_main(main)
