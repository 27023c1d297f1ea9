"""Training runs side by side, each in a process of its own, under one bar that counts the frames of all."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import NamedTuple, NoReturn

from tqdm import tqdm

from agent import config as configuration
from agent.errors import UserError
from agent.schema import Config
from agent.writing import write_text

POLL_SECONDS = 0.3
NAMES_WIDTH = 40
"""Characters for the names of runs before the bar; if they take more, their number stands there."""


class Job(NamedTuple):
    """A run to be trained by a command."""

    name: str
    command: list[str]
    logdir: Path  # the run's folder; what its process says stands beside it, in <logdir>.log
    steps: int  # its length in environment frames

    @classmethod
    def of(cls, module: str, name: str, config: Config, out: Path, folder: Path, *further: str) -> "Job":
        """A run of a module, told `--config FILE --logdir out/name` and what follows; the file is in `folder`."""
        file = folder / f"{name}.yaml"
        write_text(file, configuration.dump(config))
        command = [sys.executable, "-m", module, "--config", str(file), "--logdir", str(out / name), *further]
        return cls(name, command, out / name, config.steps)

    @property
    def log(self) -> Path:
        """What the process says, since the folder is its own to fill."""
        return self.logdir.with_name(f"{self.logdir.name}.log")


class SideBySide:
    """Runs jobs, and iterates over them as they finish. A context: at its end no process is left.

    SIGINT and SIGTERM are passed on, so that every run saves and stops; a second one ends them at once.

    Args:
        jobs: what to run, in this order.
        amount: how many at a time; None is all.
        on_cpu: whether they compute on the CPU, whose cores they then share, and of which each has one at least.

    Raises:
        UserError: a run failed; the others are stopped, and have saved.
        SystemExit: a signal came, and all runs have saved.
    """

    def __init__(self, jobs: Sequence[Job], amount: int | None, on_cpu: bool):
        self.waiting = list(jobs)
        self.running: dict[str, tuple[Job, subprocess.Popen[bytes]]] = {}
        processors = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        wanted = max(1, amount or len(jobs))
        self.amount = min(wanted, processors) if on_cpu else wanted
        self.threads = max(1, processors // self.amount)
        self.signal: int | None = None
        self.frames = {job.name: frames_so_far(job.logdir) for job in jobs}
        self.bar = tqdm(
            total=sum(job.steps for job in jobs), initial=sum(self.frames.values()), unit="frame",
            unit_scale=True, dynamic_ncols=True, file=sys.stderr, disable=not jobs,
            mininterval=0.5 if sys.stderr.isatty() else 30,
        )  # fmt: skip

    def __enter__(self) -> "SideBySide":
        self.before = {kind: signal.signal(kind, self._note_signal) for kind in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        self._forward(signal.SIGTERM)
        for _job, process in self.running.values():
            process.wait()
        for kind, handler in self.before.items():
            signal.signal(kind, handler)
        self.bar.close()

    def __iter__(self) -> "SideBySide":
        return self

    def __next__(self) -> Job:
        while self.waiting or self.running:
            while self.waiting and len(self.running) < self.amount and self.signal is None:
                self._start(self.waiting.pop(0))
            ended = next((job for job, process in self.running.values() if process.poll() is not None), None)
            self._show()
            if ended is not None:
                status = self.running.pop(ended.name)[1].returncode
                if status == 0:
                    return ended
                if self.signal is None:
                    raise UserError(f"{ended.name} failed: {last_words(ended.log)} (more in {ended.log})")
            elif self.signal is not None and not self.running:
                self._stop()
            else:
                time.sleep(POLL_SECONDS)
        raise StopIteration

    def tell(self, line: str) -> None:
        """Print a line on stdout, above the bar."""
        with self.bar.external_write_mode(file=sys.stderr):
            print(line, flush=True)

    def _start(self, job: Job) -> None:
        """Start a job's process, in a session of its own, so that a Ctrl-C reaches it once and through this one."""
        write_text(job.log, "")
        threads = {"OMP_NUM_THREADS": str(self.threads)} | dict(os.environ)  # what the user says counts
        with job.log.open("wb") as log:
            process = subprocess.Popen(
                job.command,
                stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, start_new_session=True, env=threads,
            )  # fmt: skip
        self.running[job.name] = job, process

    def _show(self) -> None:
        for name, (job, _) in self.running.items():
            frames = frames_so_far(job.logdir)
            self.bar.update(frames - self.frames[name])
            self.frames[name] = frames
        names = ", ".join(self.running)
        self.bar.set_description(names if len(names) <= NAMES_WIDTH else f"{len(self.running)} runs", refresh=False)

    def _stop(self) -> NoReturn:
        """End the program as the signal asks for."""
        assert self.signal is not None
        name = signal.Signals(self.signal).name
        self.bar.close()
        print(f"stopped by {name}; all runs have saved, and the same command goes on from there", file=sys.stderr)
        sys.exit(128 + self.signal)

    def _note_signal(self, kind: int, _: FrameType | None) -> None:
        again = self.signal is not None
        self.signal = kind
        self._forward(kind)  # to a run that has heard one already it means: at once
        if again:
            signal.signal(kind, signal.SIG_DFL)
            os.kill(os.getpid(), kind)

    def _forward(self, kind: int) -> None:
        for _job, process in self.running.values():
            if process.poll() is None:
                process.send_signal(kind)


def last_words(log: Path) -> str:
    """The last line that a process said, without its name."""
    lines = log.read_text(errors="replace").replace("\r", "\n").split("\n")
    said = next((line for line in reversed(lines) if line.strip()), "it said nothing")
    return said.split(".py: ", 1)[-1]


def frames_so_far(logdir: Path) -> int:
    """Environment frames of a run so far, by the last whole line of its log; 0 if it has none."""
    file = logdir / "metrics.jsonl"
    if not file.exists():
        return 0
    with file.open("rb") as stream:
        stream.seek(max(0, file.stat().st_size - 8192))
        lines = stream.read().split(b"\n")[:-1]
    try:
        return int(json.loads(lines[-1])["step"])
    except (IndexError, ValueError):
        return 0
