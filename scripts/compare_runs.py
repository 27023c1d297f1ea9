"""What differs between runs: their settings, their returns at the same frames, their speed."""

import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

from agent.command_line import make_parser, run_main
from agent.errors import UserError
from agent.intervals import interval
from agent.probe.report import markdown
from agent.results import RETURN, Logged, Setting, bin_width, gather, read_metric, read_runs


def main() -> None:
    """Read the flags and the runs, print three tables."""
    parser = make_parser(
        "Compare runs, seeds of one setting together: the settings that differ, a metric in bins that all have "
        "reached, as the mean and its 95% interval over seeds, and updates per second. Prints Markdown. If all runs "
        "are seeds of one setting, each is compared with the others.",
        [
            "python scripts/compare_runs.py runs/gru-* runs/ortho-*",
            "python scripts/compare_runs.py runs/a runs/b --bins 20000 --metric episode/score",
        ],
        flags=(),
    )
    parser.add_argument("logdir", nargs="+", type=Path, help="folders of runs")
    parser.add_argument("--bins", metavar="N", type=int, help="frames in a bin; if not given, for about ten bins")
    parser.add_argument("--metric", metavar="NAME", default=RETURN, help=f"what to compare ({RETURN})")
    arguments = parser.parse_args()
    if len(arguments.logdir) < 2:
        raise UserError("give the folders of two runs or more")
    if arguments.bins is not None and arguments.bins < 1:
        raise UserError(f"--bins {arguments.bins}: give 1 or more")

    runs = read_runs(arguments.logdir, arguments.metric, lambda line: print(line, file=sys.stderr))
    settings = gather(runs)
    if len(settings) == 1:
        settings = [Setting(settings[0].task, run.logdir.name, [run]) for run in runs]
    if len(settings) == 1:
        raise UserError(f"only {runs[0].logdir} has {arguments.metric} yet; there is nothing to compare it with")
    several = len({setting.task for setting in settings}) > 1
    names = [f"{setting.task} {setting.name}" if several else setting.name for setting in settings]

    width = arguments.bins or bin_width(min(int(run.frames.max()) for run in runs), 10)
    print(markdown(["setting", *names], differing_settings(settings)))
    lines = returns(settings, width)
    if lines:
        print(markdown([f"{arguments.metric}, frames to", *names], lines))
    else:
        print(f"no bin of {width:,} frames in which all have {arguments.metric}; try other --bins\n")
    print(markdown(["", *names], [["updates/s", *(speed(setting.runs) for setting in settings)]]))


def differing_settings(settings: Sequence[Setting]) -> list[list[str]]:
    """For each key whose values differ, the values that the runs of each setting have; first of all the seeds."""
    keys = dict.fromkeys(["seed", *(key for setting in settings for run in setting.runs for key in run.config)])
    lines = []
    for key in keys:
        cells = [", ".join(dict.fromkeys(str(run.config.get(key, "")) for run in setting.runs)) for setting in settings]
        if len(set(cells)) > 1:
            lines.append([key, *cells])
    return lines


def returns(settings: Sequence[Setting], width: int) -> list[list[str]]:
    """For each bin in which every setting has something, what each has, in a column of its own."""
    curves = [setting.curve(width) for setting in settings]
    shared = sorted(set.intersection(*(set(curve) for curve in curves)))
    return [[f"{edge:,}", *(mean_and_interval(curve[edge]) for curve in curves)] for edge in shared]


def mean_and_interval(values: Sequence[float]) -> str:
    """Mean, half its interval, and of how many runs."""
    half = interval(values)
    return f"{statistics.mean(values):.4g}" + ("" if half is None else f" ± {half:.3g} ({len(values)})")


def speed(runs: Sequence[Logged]) -> str:
    """The median over all that the runs have logged, pauses for checkpoints included."""
    rates = [rate for run in runs for rate in read_metric(run.logdir, "time/updates_per_second")[1] if rate]
    return f"{statistics.median(rates):.3g}" if rates else ""


if __name__ == "__main__":
    run_main(main)
