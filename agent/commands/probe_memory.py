"""Train small sequence models around cores on noisy recall, many seeds at once, and report how well they remember."""

from pathlib import Path

from agent.command_line import command, make_parser, names
from agent.errors import UserError

NUMBERS = {
    "vocab": ("task.vocab", "tokens in all, noise included"),
    "length": ("task.length", "tokens of a sequence"),
    "noise": ("task.noise", "share of slots that are noise"),
    "noise-vocab": ("task.noise_vocab", "tokens that are noise"),
    "rebind": ("task.rebind", "probability that a known key gets a new value; the last one counts"),
    "pairs": ("task.pairs", "keys of a sequence of mqar"),
    "steps": ("training.steps", "updates"),
    "batch": ("training.batch", "sequences in an update"),
    "warmup": ("training.warmup", "updates over which the learning rate rises"),
    "seeds": ("training.seeds", "models that train side by side"),
}
WORDS = {
    "task": ("task.name", "noisy_recall or mqar"),
    "schedule": ("training.schedule", "cosine or constant"),
}


@command
def main() -> None:
    """Read the flags, train what is not yet trained, print a table."""
    parser = make_parser(
        "Train a small sequence model around each core on fresh data of noisy associative recall, many seeds at once, "
        "and report accuracy beside what guessing gives, how many seeds are solved, and when each left the plateau. "
        "Writes results.md, results.json and figure.png; the same command goes on after an interruption.",
        [
            "python scripts/probe_memory.py --core ortho_mlstm --quick",
            "python scripts/probe_memory.py --core ortho_mlstm --vocab 96 --length 1024",
            "python scripts/probe_memory.py --cores mlstm,ortho_mlstm --preset source --time-alone 20 --compile",
            "python scripts/probe_memory.py --cores ortho_mlstm:map_steps=3,ortho_mlstm:map_steps=8 --lr 1e-3,3e-3",
            "python scripts/probe_memory.py --core ortho_mlstm:alpha_schedule=release --schedule constant",
        ],
        flags=("device", "set"),
    )
    parser.add_argument(
        "--core", "--cores", metavar="NAME,...", type=names, default=["ortho_mlstm"],
        help="cores to probe (ortho_mlstm), each perhaps with keys of its own, as mlstm:conv=2:unit_norm=true",
    )  # fmt: skip
    parser.add_argument("--preset", metavar="NAME,...", type=names, help="settings in configs/probe/preset/")
    parser.add_argument("--quick", action="store_true", help="preset quick, with mlstm beside the core; for a CPU")
    parser.add_argument("--lr", metavar="X,...", type=names, default=[], help="learning rates, each for every core")
    for flag, (key, text) in (NUMBERS | WORDS).items():
        parser.add_argument(f"--{flag}", dest=key, metavar="NAME" if flag in WORDS else "N", help=text)
    parser.add_argument("--compile", action="store_true", default=None, dest="compute.compile", help="compile the step")
    parser.add_argument("--time-alone", metavar="N", type=int, default=0, help="also time N updates of one seed alone")
    parser.add_argument("--out", metavar="DIR", type=Path, default=Path("runs/probe"), help="folder (runs/probe)")
    arguments = parser.parse_args()
    if arguments.quick and arguments.preset:
        raise UserError("--quick is a preset itself; leave out one of --quick and --preset")
    if arguments.time_alone < 0:
        raise UserError(f"--time-alone {arguments.time_alone}: give the number of updates to time, or leave it out")

    from agent.config import parse_value
    from agent.probe.config import experiments
    from agent.probe.suite import run_suite

    given = vars(arguments)
    flags = {key: given[key] for key in (*(key for key, _ in WORDS.values()), "compute.compile")}
    for flag, (key, _) in NUMBERS.items():
        flags[key] = None if given[key] is None else parse_value(given[key], f"--{flag}")
    flags["compute.device"] = arguments.device
    cores = arguments.core
    if arguments.quick and "mlstm" not in cores:
        cores = ["mlstm", *cores]
    presets = ["quick"] if arguments.quick else arguments.preset or [""]
    run_suite(
        experiments(cores, presets, arguments.lr, arguments.set, flags), arguments.out, arguments.time_alone, print
    )
    print(f"\n{(arguments.out / 'results.md').read_text()}\nin {arguments.out}: results.md, results.json, figure.png")
