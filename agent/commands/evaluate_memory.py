"""Train cores on probes of memory and report what they remember, or evaluate one trained agent on longer gaps."""

import json
from pathlib import Path

from agent.command_line import command, make_parser, names
from agent.errors import UserError

OF_SUITE = ("cores", "probes", "suite", "seeds", "steps", "parallel", "out")


@command
def main() -> None:
    """Read the flags; train and evaluate what is not finished, or evaluate one run; print a table."""
    parser = make_parser(
        "Train each core on each probe of a suite over several seeds, evaluate on the trained gap and on longer ones, "
        "and write results.md, results.json and figure.png; the same command goes on after an interruption. "
        "With --logdir, evaluate one trained agent on its probe and print JSON.",
        [
            "python scripts/evaluate_memory.py --cores gru,mlstm,ortho_mlstm --suite quick",
            "python scripts/evaluate_memory.py --suite base --probes noisy_recall,delay --out runs/memory_base",
            "python scripts/evaluate_memory.py --suite base --probes noisy_recall --cores gru,mlstm:conv=2 --seeds 5",
            "python scripts/evaluate_memory.py --logdir runs/memory/noisy_recall-gru-seed0",
        ],
        flags=("steps", "device", "logdir", "set"),
    )
    parser.add_argument("--suite", metavar="NAME", help="a file of configs/suite/: quick (default), recall, base, full")
    parser.add_argument(
        "--cores", metavar="NAME,...", type=names,
        help="cores, each perhaps with keys of its own, as mlstm:conv=2:unit_norm=true; else the suite's",
    )  # fmt: skip
    parser.add_argument("--probes", metavar="NAME,...", type=names, help="only these of the suite's probes")
    parser.add_argument("--seeds", metavar="N", type=int, help="runs of each core on each probe")
    parser.add_argument("--parallel", metavar="N", type=int, help="runs side by side; on the CPU at most its cores")
    parser.add_argument("--out", metavar="DIR", type=Path, help="folder of the suite's runs (runs/memory)")
    arguments = parser.parse_args()
    if arguments.logdir is not None:
        other = next((flag for flag in OF_SUITE if getattr(arguments, flag) is not None), "set" * bool(arguments.set))
        if other:
            raise UserError(f"--{other} is for a suite, and --logdir for one trained agent; leave out one of them")
        evaluate_run(arguments.logdir, arguments.device or "auto")
        return

    from agent.config import parse_value
    from agent.memory.config import load_suite
    from agent.memory.suite import run_suite

    steps = None if arguments.steps is None else parse_value(arguments.steps, "--steps")
    out = arguments.out or Path("runs/memory")
    suite = load_suite(
        arguments.suite or "quick", arguments.cores, arguments.probes, arguments.seeds, steps, arguments.parallel,
        arguments.device, arguments.set,
    )  # fmt: skip
    run_suite(suite, out, print)
    print(f"\n{(out / 'results.md').read_text()}\nin {out}: results.md, results.json, figure.png")


def evaluate_run(logdir: Path, device: str) -> None:
    """Print what the agent of a run remembers."""
    from agent.memory.config import default_evaluation
    from agent.memory.scoring import score_run

    print(json.dumps({"logdir": str(logdir), **score_run(logdir, default_evaluation(), device)}, indent=1))
