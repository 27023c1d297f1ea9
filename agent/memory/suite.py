"""A suite's runs in one folder, each in a process of its own: what is finished is reused, what was stopped goes on."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from types import FrameType
from typing import NoReturn

from tqdm import tqdm

import envs
from agent import config as configuration
from agent import logdir as logdirs
from agent.errors import UserError
from agent.memory.config import Evaluation, Run, Suite
from agent.memory.report import rows, sentence, table
from agent.memory.scoring import Result, task_of
from agent.memory.worker import RESULT
from agent.probe.report import write_json, write_text
from agent.schema import Config
from agent.training import choose_training_device

POLL_SECONDS = 0.3


def run_suite(suite: Suite, out: Path, notify: Callable[[str], None]) -> None:
    """Train and evaluate what is not finished; `results.md`, `results.json` and `figure.png` follow each finished run.

    Args:
        suite: runs of different names, each of which gets a folder, which is the --logdir of its training.
        out: the folder of them all.
        notify: told each result in one line.

    Raises:
        UserError: the folder holds the same names with other configurations, cannot be written, or a run failed.
        SystemExit: SIGINT or SIGTERM came, and all runs have saved; the same call goes on from there.
    """
    for run in suite.runs:
        logdirs.check(run.config, out / run.name)
    for run in {run.probe: run for run in suite.runs}.values():
        choose_training_device(run.config)
        _check_env(run.config)
    if not find_spec("matplotlib"):
        notify("matplotlib is missing, so there will be no figure: pip install matplotlib")
    results = {run.name: result for run in suite.runs if (result := _finished(run, out, suite.evaluation))}
    for name, result in results.items():
        notify(f"{sentence(name, result)} (finished before)")
    if results:
        report(suite.runs, results, out)
    with TemporaryDirectory() as folder, _Workers(suite, out, Path(folder), set(results)) as workers:
        for run in workers:
            result = _finished(run, out, suite.evaluation)
            assert result is not None
            results[run.name] = result
            with workers.bar.external_write_mode(file=sys.stderr):
                notify(sentence(run.name, result))
            report(suite.runs, results, out)


def report(runs: Sequence[Run], results: dict[str, Result], out: Path) -> None:
    """Write the table, the numbers and, where matplotlib is installed, the figure."""
    gathered = rows(runs, results)
    write_text(out / "results.md", table(gathered))
    write_json(out / "results.json", gathered)
    if find_spec("matplotlib"):
        from agent.memory.figure import draw

        draw(out / "figure.png", gathered)


class _Workers:
    """Iterates over runs as they finish, a few side by side, under one bar that counts frames; until a signal."""

    def __init__(self, suite: Suite, out: Path, folder: Path, finished: set[str]):
        self.out, self.folder, self.evaluation = out, folder, suite.evaluation
        self.waiting = [run for run in suite.runs if run.name not in finished]
        self.running: dict[str, tuple[Run, subprocess.Popen[bytes]]] = {}
        processors = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        on_cpu = any(choose_training_device(run.config).type == "cpu" for run in self.waiting)
        self.amount = min(suite.parallel, processors) if on_cpu else suite.parallel
        self.threads = max(1, processors // self.amount)
        self.signal: int | None = None
        self.frames = {run.name: _frames(out / run.name) for run in self.waiting}
        self.bar = tqdm(
            total=sum(run.config.steps for run in self.waiting), initial=sum(self.frames.values()), unit="frame",
            unit_scale=True, dynamic_ncols=True, file=sys.stderr, disable=not self.waiting,
            mininterval=0.5 if sys.stderr.isatty() else 30,
        )  # fmt: skip

    def __enter__(self) -> "_Workers":
        self.before = {kind: signal.signal(kind, self._note_signal) for kind in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        self._forward(signal.SIGTERM)
        for _run, process in self.running.values():
            process.wait()
        for kind, handler in self.before.items():
            signal.signal(kind, handler)
        self.bar.close()

    def __iter__(self) -> "_Workers":
        return self

    def __next__(self) -> Run:
        while self.waiting or self.running:
            while self.waiting and len(self.running) < self.amount and self.signal is None:
                self._start(self.waiting.pop(0))
            ended = next((run for run, process in self.running.values() if process.poll() is not None), None)
            self._show()
            if ended is not None:
                status = self.running.pop(ended.name)[1].returncode
                if status == 0:
                    return ended
                if self.signal is None:
                    raise UserError(f"{ended.name} failed: {self._last_words(ended)}")
            elif self.signal is not None and not self.running:
                self._stop()
            else:
                time.sleep(POLL_SECONDS)
        raise StopIteration

    def _start(self, run: Run) -> None:
        """Start a run's process, in a session of its own, so that a Ctrl-C reaches it once and through this one."""
        config = self.folder / f"{run.name}.yaml"
        write_text(config, configuration.dump(run.config))
        write_text(self._log(run), "")
        words = [str(config), str(self.out / run.name), json.dumps(dataclasses.asdict(self.evaluation))]
        threads = {"OMP_NUM_THREADS": str(self.threads)} | dict(os.environ)  # what the user says counts
        with self._log(run).open("wb") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "agent.memory.worker", *words],
                stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, start_new_session=True, env=threads,
            )  # fmt: skip
        self.running[run.name] = run, process

    def _show(self) -> None:
        for name in self.running:
            frames = _frames(self.out / name)
            self.bar.update(frames - self.frames[name])
            self.frames[name] = frames
        self.bar.set_description(", ".join(self.running), refresh=False)

    def _log(self, run: Run) -> Path:
        """What the run's process says; beside the run's folder, which is its own to fill."""
        return self.out / f"{run.name}.log"

    def _last_words(self, run: Run) -> str:
        lines = self._log(run).read_text(errors="replace").split("\n")
        said = next((line for line in reversed(lines) if line.strip()), "it said nothing")
        return f"{said.removeprefix('worker.py: ')} (more in {self._log(run)})"

    def _stop(self) -> NoReturn:
        """End the program as the signal asks for."""
        assert self.signal is not None
        name = signal.Signals(self.signal).name
        self.bar.close()
        print(f"stopped by {name}; saved in {self.out}, and the same command goes on from there", file=sys.stderr)
        sys.exit(128 + self.signal)

    def _note_signal(self, kind: int, _: FrameType | None) -> None:
        again = self.signal is not None
        self.signal = kind
        self._forward(kind)  # to a run that has heard one already it means: at once
        if again:
            signal.signal(kind, signal.SIG_DFL)
            os.kill(os.getpid(), kind)

    def _forward(self, kind: int) -> None:
        for _run, process in self.running.values():
            if process.poll() is None:
                process.send_signal(kind)


def _check_env(config: Config) -> None:
    """Raise an error, which tells what, unless the configuration's environment is a probe that can be made."""
    task_of(config)
    env = config.env
    envs.make(
        env.name, action_repeat=env.action_repeat, time_limit=env.time_limit, render=False, options=env.options
    ).close()


def _finished(run: Run, out: Path, evaluation: Evaluation) -> Result | None:
    """The result of a run that was trained as long, and evaluated in the same way, as is asked for now."""
    file = out / run.name / RESULT
    if not file.exists():
        return None
    try:
        result = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: cannot be read ({error}); remove it, and the run is evaluated again") from None
    same = result["evaluation"] == dataclasses.asdict(evaluation) and result["steps"] >= run.config.steps
    return result if same else None


def _frames(logdir: Path) -> int:
    """Environment frames so far, by the last whole line of a run's log."""
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
