"""Time the update: from sampling replay to the optimizer's step, on rows of noise."""

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from argparse import SUPPRESS
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

STARTED = time.time()  # before anything that takes long to import

from agent.command_line import config_from_arguments, make_parser, run_main, tell  # noqa: E402
from agent.config import parse_settings  # noqa: E402
from agent.errors import UserError, writing  # noqa: E402

Row = dict[str, Any]

READY = "ready"
COMPILING = 0.6
"""The share of the time for --scaling in which all must have compiled; the rest is for timing them."""

COLUMNS = {
    "core": "", "size": "", "posterior": "", "precision": "", "batch": "", "length": "", "starts": "", "cache": "",
    "ms": ".2f",
    "ms_p10": ".2f", "ms_p90": ".2f", "updates_per_s": ".1f", "first_update_s": ".1f", "steady_s": ".1f",
    "peak_gib": ".2f", "foretold_gib": ".2f", "times_plain": ".1f", "kernels": ".0f", "busy": ".2f", "error": "",
}  # fmt: skip
RECURRENT, OBSERVATION = "rssm.posterior=recurrent", "rssm.posterior=observation"
# What is asked of every change first: each line is a core, a size and settings, and whether it is also timed with the
# compiler's cache filled.
ON_CUDA: list[tuple[str, str, tuple[str, ...], bool]] = [
    ("gru", "12m", (RECURRENT,), True),
    ("ortho_mlstm", "12m", (OBSERVATION,), True),
    ("mlstm", "12m", (OBSERVATION,), False),
    ("gru", "1m", (RECURRENT,), False),
    ("gru", "12m", (RECURRENT, "train.batch_size=64"), False),
    ("gru", "12m", (RECURRENT, "precision=fp32"), False),
    ("gru", "12m", (OBSERVATION,), False),
    ("gru", "12m", (RECURRENT, "train.batch_length=128"), False),
    ("gru", "100m", (RECURRENT,), False),
]
# How the cost grows, and what is also asked of the cores; each line is timed with the compiler's cache filled.
SCALING: list[tuple[str, str, tuple[str, ...]]] = [
    *(("gru", size, (RECURRENT,)) for size in ("1m", "wide", "12m", "25m", "50m", "100m")),
    *(("gru", "12m", (RECURRENT, f"train.batch_size={batch}")) for batch in (4, 64, 256)),
    *(("gru", "12m", (RECURRENT, f"train.batch_length={length}")) for length in (16, 256)),
    *(("gru", "12m", (RECURRENT, f"behavior.imagination_starts={starts}")) for starts in (4, 16)),
    *((core, size, (OBSERVATION,)) for core in ("mlstm", "ortho_mlstm") for size in ("wide", "12m")),
    *((core, "12m", (OBSERVATION, "behavior.imagination_starts=16")) for core in ("mlstm", "ortho_mlstm")),
    ("mlstm", "12m", (OBSERVATION, "train.batch_size=64")),
    ("mlstm", "100m", (OBSERVATION,)),
]
ON_CPU: list[tuple[str, str, tuple[str, ...], bool]] = [
    ("gru", "1m", (RECURRENT, "precision=fp32"), False),
    ("gru", "1m", (RECURRENT, "precision=bf16"), False),
    ("gru", "1m", (RECURRENT, "precision=fp32", "compile=full"), True),
    ("gru", "1m", (RECURRENT, "precision=bf16", "compile=full"), True),
    ("ortho_mlstm", "1m", (OBSERVATION, "precision=fp32"), False),
    ("gru", "1m", (RECURRENT, "precision=fp32", "train.batch_size=8"), False),
    ("gru", "1m", (RECURRENT, "precision=fp32", "train.batch_length=32"), False),
]


def main() -> None:
    """Read the flags; time one configuration in this process, or each of a list in its own."""
    parser = make_parser(
        "Time the agent's update: milliseconds (median, 10th and 90th percentile over chunks of 10), seconds from the "
        "start of the process to the first update, peak memory, and on a GPU the kernels of an update and the share "
        "of the time in which one runs. One configuration, printed as JSON; or with --matrix a choice of cores, sizes, "
        "posteriors, precisions, batches and lengths, each in its own process and first with an empty compiler cache; "
        "or with --scaling another, for which all compile side by side before each is timed alone.",
        [
            "python scripts/benchmark_agent.py --env dmc_walker --size 12m --updates 300",
            "python scripts/benchmark_agent.py --env dmc_walker --matrix --minutes 8 --out speed.json",
            "python scripts/benchmark_agent.py --env dmc_walker --scaling --minutes 9 --out scaling.json",
        ],
        flags=("env", "core", "size", "device", "config", "set"),
    )
    parser.add_argument("--updates", metavar="N", type=int, default=200, help="updates to time (200)")
    parser.add_argument("--threads", metavar="N", type=int, help="threads on the CPU")
    parser.add_argument("--kernels", action="store_true", help="also list the kernels that take longest, on stderr")
    parser.add_argument("--plain", action="store_true", help="also time the update as one would first write it")
    parser.add_argument(
        "--inductor", metavar="key=value", nargs="*", default=[], help="compiler settings, as max_autotune=true"
    )
    parser.add_argument("--matrix", action="store_true", help="time a choice of configurations")
    parser.add_argument(
        "--scaling", action="store_true", help="time others, as size, batch, length and starts of imagination grow"
    )
    parser.add_argument("--minutes", metavar="M", type=float, default=8, help="time for all of them (8)")
    parser.add_argument("--out", metavar="FILE", type=Path, help="also write them as JSON, after every line")
    parser.add_argument("--in-turn", action="store_true", help=SUPPRESS)  # a child of --scaling: waits before it times
    arguments = parser.parse_args()
    _check(arguments)
    news: list[str] = []
    config = config_from_arguments(arguments, news.append)
    inductor = _inductor_settings(arguments.inductor)
    if arguments.matrix or arguments.scaling:
        import envs

        env = config.env
        envs.make(env.name, action_repeat=env.action_repeat, time_limit=env.time_limit, options=env.options).close()
        _time_matrix(arguments)
        return

    import torch

    from agent import devices
    from agent.update_timing import time_updates

    devices.choose(config.device)
    for line in news:
        tell(line)
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    for key, value in inductor.items():
        setattr(torch._inductor.config, key, value)
    show = (lambda text: print(text, file=sys.stderr)) if arguments.kernels else None
    turn = _wait_for_turn if arguments.in_turn else lambda: None
    print(json.dumps(time_updates(config, STARTED, arguments.updates, show, arguments.plain, turn)))


def _wait_for_turn() -> None:
    """Tell the parent that all is compiled, and wait for its word."""
    print(READY, flush=True)
    sys.stdin.readline()


def _check(arguments: Any) -> None:
    """UserError for numbers that mean nothing, and for a file that could not be written."""
    for flag, least in (("updates", 1), ("threads", 1), ("minutes", 0)):
        value = getattr(arguments, flag)
        if value is not None and value < least:
            raise UserError(f"--{flag} {value}: give {least} or more")
    if arguments.matrix and arguments.scaling:
        raise UserError("--matrix and --scaling are two choices of configurations; leave out one of them")
    if arguments.out and not (arguments.matrix or arguments.scaling):
        raise UserError(f"--out {arguments.out} is for --matrix and --scaling; one configuration is printed on stdout")
    if arguments.out and (arguments.out.is_dir() or not arguments.out.parent.is_dir()):
        raise UserError(f"--out {arguments.out}: give a file in a folder that exists")


def _inductor_settings(settings: Sequence[str]) -> dict[str, Any]:
    """The compiler's settings by name."""
    found = parse_settings(settings, "--inductor") if settings else {}
    if found:
        import torch._inductor.config as known  # takes seconds

        for key in found:
            if not hasattr(known, key):
                raise UserError(f"--inductor {key}: torch's compiler has no such setting")
    return found


def _time_matrix(arguments: Any) -> None:
    """Time as many of the listed configurations as fit, and print a line as soon as each is known."""
    import torch

    cuda = torch.cuda.is_available() if arguments.device in (None, "auto") else arguments.device == "cuda"
    rows: list[Row] = []
    print("  ".join(COLUMNS))
    deadline = STARTED + 60 * arguments.minutes
    if arguments.scaling:
        timed = _rows_in_turn(SCALING, arguments, deadline)
    else:
        timed = _rows(ON_CUDA if cuda else ON_CPU, arguments, deadline)
    for row in timed:
        rows.append(row)
        print("  ".join(_cell(row, column).rjust(len(column)) for column in COLUMNS), flush=True)
        if arguments.out:
            with writing(arguments.out):
                arguments.out.write_text(json.dumps(rows, indent=1) + "\n")


def _rows(cases: Sequence[tuple[str, str, tuple[str, ...], bool]], arguments: Any, deadline: float) -> Iterator[Row]:
    for core, size, settings, again in cases:
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as cache:
            for state in ("cold", "warm") if again else ("cold",):
                asked = {"core": core, "size": size, "settings": list(settings), "cache": state}
                print(f"{core} {size} {' '.join(settings)} ({state}) ...", end="\r", file=sys.stderr, flush=True)
                yield asked | _in_its_own_process(core, size, settings, cache, arguments, deadline - time.time())


def _in_its_own_process(
    core: str, size: str, settings: Sequence[str], cache: str, arguments: Any, seconds: float
) -> Row:  # fmt: skip
    if seconds <= 0:
        return {"error": "no time left"}
    environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": cache, "TRITON_CACHE_DIR": f"{cache}/triton"}
    command = _command(core, size, settings, arguments)
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=seconds)
    except subprocess.TimeoutExpired:
        return {"error": "out of time"}
    return _row(done.returncode, done.stdout, done.stderr)


def _rows_in_turn(
    cases: Sequence[tuple[str, str, tuple[str, ...]]], arguments: Any, deadline: float
) -> Iterator[Row]:  # fmt: skip
    """Time cases one after the other, while those that have compiled wait and hold their memory."""
    share = max(1, (os.cpu_count() or 1) // len(cases))
    environment = os.environ | {"TORCHINDUCTOR_COMPILE_THREADS": str(share)}
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "env": environment}
    with contextlib.ExitStack() as stack:
        children = []
        for case in cases:
            errors = stack.enter_context(tempfile.TemporaryFile("w+"))
            child = subprocess.Popen([*_command(*case, arguments), "--in-turn"], stderr=errors, **pipes)
            stack.callback(child.kill)
            children.append((case, child, errors))
        now = time.time()
        _wait_until_ready([child for _, child, _ in children], now + COMPILING * (deadline - now))
        for (core, size, settings), child, errors in children:
            asked = {"core": core, "size": size, "settings": list(settings)}
            try:
                output, _ = child.communicate("go\n", timeout=max(1, deadline - time.time()))
            except subprocess.TimeoutExpired:
                yield asked | {"error": "out of time"}
                continue
            errors.seek(0)
            yield asked | _row(child.returncode, output, errors.read())


def _wait_until_ready(children: Sequence[subprocess.Popen[str]], deadline: float) -> None:
    """Wait until every child has told that it is ready, or has ended; at the deadline end those that have not."""
    with ThreadPoolExecutor(len(children)) as pool:
        told = [pool.submit(child.stdout.readline) for child in children if child.stdout]
        try:
            for amount, _ in enumerate(as_completed(told, max(1, deadline - time.time())), 1):
                print(f"{amount} of {len(children)} have compiled ...", end="\r", file=sys.stderr, flush=True)
        except TimeoutError:
            for child, answer in zip(children, told, strict=True):
                if not answer.done():
                    child.kill()


def _command(core: str, size: str, settings: Sequence[str], arguments: Any) -> list[str]:
    """What times one configuration."""
    flags = {"env": arguments.env, "core": core, "size": size, "device": arguments.device, "config": arguments.config}
    command = [sys.executable, __file__, "--updates", str(arguments.updates)]
    for flag, value in flags.items():
        command += [] if value is None else [f"--{flag}", str(value)]
    command += ["--plain"] if arguments.plain else []
    command += [] if arguments.threads is None else ["--threads", str(arguments.threads)]
    return [*command, "--set", *arguments.set, *settings, "--inductor", *arguments.inductor]


def _row(status: int, output: str, errors: str) -> Row:
    """What a process that timed one configuration printed, or why it did not."""
    if status:
        return {"error": (errors.strip().splitlines() or ["no message"])[-1]}
    row: Row = json.loads(output.splitlines()[-1])
    return row


def _cell(row: Row, column: str) -> str:
    value = row.get(column)
    return "-" if value is None else format(value, COLUMNS[column])


if __name__ == "__main__":
    run_main(main)
