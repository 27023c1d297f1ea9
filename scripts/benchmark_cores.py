"""Time the recurrent cores: a step, a sequence, and a sequence with its gradients."""

import sys
from argparse import ArgumentTypeError
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from agent.command_line import make_parser, names, run_main
from agent.errors import UserError

COLUMNS = ("core", "form", "size", "batch", "length", "pass", "ms", "ms_p10", "ms_p90", "error")


def counts(text: str) -> list[int]:
    """Positive integers between commas."""
    words = names(text)
    if not all(word.isdecimal() and int(word) for word in words):
        raise ArgumentTypeError(f"{text!r} should be positive integers, as in 16 or 16,1024")
    return [int(word) for word in words]


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as aligned columns; what was not timed says why."""
    lines = [list(COLUMNS)]
    for row in rows:
        shown = {key: f"{value:.3f}" if key.startswith("ms") else str(value) for key, value in row.items()}
        shown["error"] = row.get("refused") or f"{row['error']:.1e}"
        lines.append([shown.get(column) or "-" for column in COLUMNS])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    to_the_right = [column in ("batch", "length", "ms", "ms_p10", "ms_p90") for column in COLUMNS]
    aligned = [
        [cell.rjust(width) if right else cell.ljust(width) for cell, width, right in zip(*each, strict=True)]
        for each in ((line, widths, to_the_right) for line in lines)
    ]
    return "\n".join("  ".join(line).rstrip() for line in aligned)


def main() -> None:
    """Read the flags, check and time, print a table."""
    parser = make_parser(
        "Time the recurrent cores. Each is first checked against its own steps in fp32, values and gradients, and not "
        "timed if it is wrong. Prints a table: milliseconds (median, 10th and 90th percentile) and the largest error.",
        [
            "python scripts/benchmark_cores.py --size 12m",
            "python scripts/benchmark_cores.py --cores gru,attention --batch 16,1024 --length 64 --out cores.json",
            "python scripts/benchmark_cores.py --cores attention --set core.window=128 precision=fp32",
        ],
        flags=("device", "set"),
    )
    parser.add_argument("--cores", metavar="NAME,...", type=names, help="files in configs/core/; all if not given")
    parser.add_argument("--size", metavar="NAME,...", type=names, default=[None], help="sizes, as for training")
    parser.add_argument("--batch", metavar="N,...", type=counts, default=[16], help="numbers of streams (16)")
    parser.add_argument("--length", metavar="N,...", type=counts, default=[64], help="lengths of sequences (64)")
    parser.add_argument(
        "--passes", metavar="NAME,...", type=names, default=["step", "forward", "training"],
        help="of step, forward, training (forward and backward), loop and loop_training (the same by steps), read, "
        "read_training, read_loop and read_loop_training (one memory alone); the first three if not given",
    )  # fmt: skip
    parser.add_argument(
        "--forms", metavar="NAME,...", type=names, help="of a core that has these forms, only them; all if not given"
    )
    parser.add_argument("--repeats", metavar="N", type=int, default=50, help="calls to time (50)")
    parser.add_argument("--graph", action="store_true", help="time calls of a CUDA graph instead of eager ones")
    parser.add_argument("--out", metavar="FILE", type=Path, help="also write the numbers as JSON")
    arguments = parser.parse_args()

    import torch

    from agent import devices
    from agent.core_timing import PASSES, list_cases, measure, passes_at
    from agent.writing import write_json

    cases = list_cases(arguments.cores, arguments.size, arguments.device, arguments.set, arguments.forms)
    device = devices.choose(cases[0].config.device)
    if unknown := set(arguments.passes) - set(PASSES):
        raise UserError(f"--passes {min(unknown)}: choose from {', '.join(PASSES)}")
    if arguments.repeats < 1:
        raise UserError(f"--repeats {arguments.repeats}: time at least one call")
    if arguments.graph and device.type != "cuda":
        raise UserError("--graph needs a CUDA device; leave it out on the CPU")
    if arguments.out and (arguments.out.is_dir() or not arguments.out.parent.is_dir()):
        raise UserError(f"--out {arguments.out}: give a file in a folder that exists")

    on_gpu = device.type == "cuda"
    rows: list[dict[str, Any]] = []
    result = {
        "device": torch.cuda.get_device_name(device) if on_gpu else f"cpu x{torch.get_num_threads()}",
        "torch": torch.__version__, "graph": arguments.graph, "repeats": arguments.repeats, "rows": rows,
    }  # fmt: skip
    planned = [passes_at(case, at, arguments.length, arguments.passes) for case in cases for at in arguments.length]
    with tqdm(total=len(arguments.batch) * sum(map(len, planned)), unit="row", file=sys.stderr) as bar:
        for case in cases:
            bar.set_description(" ".join(filter(None, (case.name, case.form, case.config.size))))
            for row in measure(
                case, arguments.batch, arguments.length, arguments.passes,
                device=device, repeats=arguments.repeats, graph=arguments.graph,
            ):  # fmt: skip
                rows.append(row)
                bar.update()
                if arguments.out:  # after every row, so that an interruption loses none
                    write_json(arguments.out, result)
    print(f"{result['device']}, torch {torch.__version__}, {rows[0]['precision']}")
    print(table(rows))
    if any("refused" in row for row in rows):
        sys.exit(1)


if __name__ == "__main__":
    run_main(main)
