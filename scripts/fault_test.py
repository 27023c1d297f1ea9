"""Kill a training run again and again, and see whether it ends as the run that was never stopped."""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from agent.command_line import config_from_arguments, make_parser, run_main
from agent.errors import UserError

STARTING, WRITING, RUNNING = "while it starts", "while it writes a checkpoint", "while it runs"
PATIENCE = 600.0
"""Seconds in which the run must get as far as the next kill."""


def frames_done(logdir: Path) -> int:
    """The step of the last whole line of the metrics."""
    try:
        lines = (logdir / "metrics.jsonl").read_bytes().split(b"\n")[:-1]
    except FileNotFoundError:
        return 0
    return int(json.loads(lines[-1])["step"]) if lines else 0


def is_writing(logdir: Path) -> bool:
    """Whether a file of a checkpoint is being written."""
    return any((logdir / "checkpoints").rglob("*.tmp"))


def waits(kind: str, logdir: Path, frames: int, luck: random.Random) -> Iterator[None]:
    """Yields until the moment to kill has come."""
    if kind == STARTING:
        moment = time.monotonic() + luck.uniform(0, 6)
        while time.monotonic() < moment:
            yield
        return
    while frames_done(logdir) < frames:
        yield
    moment = time.monotonic() + luck.uniform(0, 0.5)
    while time.monotonic() < moment:
        yield
    while kind == WRITING and not is_writing(logdir):
        yield


def run_and_kill(command: list[str], kind: str, logdir: Path, frames: int, luck: random.Random) -> bool:
    """Start the run and kill it; false if it was done before."""
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    deadline = time.monotonic() + PATIENCE
    for _ in waits(kind, logdir, frames, luck):
        if process.poll() is not None:
            if process.returncode:
                raise UserError(f"the run failed by itself: {last_line(process.stderr.read())}")
            return False
        if time.monotonic() > deadline:
            process.kill()
            raise UserError(f"the run did not reach {frames} frames in {PATIENCE:.0f} s")
        time.sleep(0 if kind == WRITING else 0.01)
    time.sleep(luck.uniform(0, 0.004) if kind == WRITING else 0)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    return True


def metrics(logdir: Path) -> list[dict[str, Any]]:
    """The lines of the metrics without what the clock says."""
    lines = [json.loads(line) for line in (logdir / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if not key.startswith("time/")} for line in lines]


def differences(one: Any, other: Any, path: str = "") -> Iterator[str]:
    """The places where two checkpoints differ, bit for bit."""
    import torch

    if isinstance(one, dict) and isinstance(other, dict) and one.keys() == other.keys():
        for key in one:
            yield from differences(one[key], other[key], f"{path}/{key}")
    elif isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
        for index, (a, b) in enumerate(zip(one, other, strict=True)):
            yield from differences(a, b, f"{path}/{index}")
    elif isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        if one.dtype != other.dtype or one.shape != other.shape or one.numpy().tobytes() != other.numpy().tobytes():
            yield path
    elif one != other:
        yield path


def content(logdir: Path) -> dict[str, Any]:
    """The newest checkpoint with its replay, less what depends on when checkpoints were written."""
    from agent import checkpoint

    path = checkpoint.latest(logdir / "checkpoints")
    if path is None:
        raise UserError(f"{logdir} holds no checkpoint")
    state = checkpoint.load(path)
    folder = logdir / "checkpoints" / "replay"
    files = [*(chunk["file"] for chunk in state["replay"]["chunks"]), state["replay"]["latest"]]
    kept = ("agent", "carry", "streams", "ratio", "random", "rows", "episodes")
    return {key: state[key] for key in kept} | {"replay": [checkpoint.load(folder / name) for name in files]}


def check_command(arguments: argparse.Namespace) -> None:
    """Find the mistakes that would end every run, before there is one."""
    import envs

    env = config_from_arguments(arguments).env
    envs.make(env.name, action_repeat=env.action_repeat, time_limit=env.time_limit, options=env.options).close()


def last_line(text: str) -> str:
    """What a program said last."""
    return (text.strip().splitlines() or ["it said nothing"])[-1]


def main() -> None:
    """Train once undisturbed and once killed, and compare."""
    parser = make_parser(
        "Kill a run with SIGKILL at random moments, start it again each time, and compare metrics.jsonl (without"
        " time/*) and the last checkpoint, bit for bit, with those of a run that was never stopped. Exit status 1 if"
        " they differ.",
        [
            "python scripts/fault_test.py --kills 20",
            "python scripts/fault_test.py --kills 5 --env dmc_walker --core mlstm --steps 3000",
        ],
        flags=("env", "core", "size", "device", "steps", "seed", "set"),
    )
    parser.set_defaults(env="gym_CartPole-v1", core="gru", size="debug", device="cpu", steps="6000", seed="0")
    parser.add_argument("--kills", metavar="N", type=int, default=20, help="how often the run is killed")
    parser.add_argument("--seconds", metavar="S", type=float, default=1.5, help="time between two checkpoints")
    arguments = parser.parse_args()
    if arguments.kills < 1:
        raise UserError(f"--kills {arguments.kills}: give 1 or more")
    if not arguments.seconds > 0:
        raise UserError(f"--seconds {arguments.seconds}: give more than 0")
    check_command(arguments)
    work = Path(tempfile.mkdtemp(prefix="fault_test_"))
    settings = ["log.every=100", f"checkpoint.minutes={arguments.seconds / 60}", *arguments.set]
    script = Path(__file__).with_name("train_agent.py")
    common = [sys.executable, str(script), "--env", arguments.env, "--core", arguments.core, "--size", arguments.size]
    common += ["--steps", arguments.steps, "--seed", arguments.seed, "--device", arguments.device]
    common += ["--set", *settings, "--logdir"]

    print(f"two runs in {work}", flush=True)
    undisturbed = subprocess.run([*common, str(work / "whole")], stderr=subprocess.PIPE, text=True)
    if undisturbed.returncode:
        raise UserError(f"the undisturbed run failed: {last_line(undisturbed.stderr)}")
    luck, logdir = random.Random(int(arguments.seed)), work / "killed"
    steps, killed = int(float(arguments.steps)), dict.fromkeys((STARTING, WRITING, RUNNING), 0)
    for number in range(arguments.kills):
        kind = luck.choices((STARTING, WRITING, RUNNING), (1, 2, 2))[0]
        frames = int(steps * (number + luck.random()) / (arguments.kills + 1))
        if not run_and_kill([*common, str(logdir)], kind, logdir, frames, luck):
            print(f"done before kill {number + 1}; give more --steps", flush=True)
            break
        killed[kind] += 1
        print(f"kill {number + 1}, {kind}: {frames_done(logdir)} frames were told", flush=True)
    last = subprocess.run([*common, str(logdir)], stderr=subprocess.PIPE, text=True)
    if last.returncode:
        raise UserError(f"the killed run does not go on: {last_line(last.stderr)}")

    one, other = metrics(work / "whole"), metrics(logdir)
    unlike = [] if one == other else [f"metrics.jsonl ({len(one)} and {len(other)} lines)"]
    unlike += differences(content(work / "whole"), content(logdir))
    told = ", ".join(f"{amount} {kind}" for kind, amount in killed.items())
    print(f"{sum(killed.values())} kills ({told}); {len(one)} lines of metrics and the last checkpoints compared")
    if unlike:
        print("DIFFERENT: " + ", ".join(unlike[:10]))
        sys.exit(1)
    print("equal, bit for bit")
    if sum(killed.values()) < arguments.kills:
        sys.exit(1)


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # so small an agent is no faster with more
    run_main(main)
