"""Experiments one after the other in one folder: what is finished is reused, what is interrupted goes on."""

import dataclasses
import json
import os
import signal
import sys
import warnings
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import torch
from tqdm import tqdm

from agent import devices
from agent.errors import UserError
from agent.probe.config import Experiment, Probe, as_values
from agent.probe.report import Row, sentence, table
from agent.probe.training import Trainer, run, seeds_per_hour
from agent.writing import write_json, write_text


def run_suite(experiments: Sequence[Experiment], out: Path, alone: int, notify: Callable[[str], None]) -> None:
    """Run what is not finished, and write `results.md`, `results.json` and `figure.png` after each experiment.

    Args:
        experiments: of different names, each of which gets a folder.
        out: the folder of them all.
        alone: updates of one seed by itself to time before each experiment, for comparison; 0 for none.
        notify: told each result in one line.

    Raises:
        UserError: the folder holds the same names with other configurations, or cannot be written.
        SystemExit: SIGINT or SIGTERM came, after a checkpoint; the same call goes on from there.
    """
    # Attention on the CPU runs seed after seed, which costs less than it is worth telling.
    warnings.filterwarnings("ignore", "There is a performance drop because we have not yet implemented the batching")
    for each in experiments:
        devices.choose(each.probe.compute.device)
        _check(out / each.name, each)
    if not find_spec("matplotlib"):
        notify("matplotlib is missing, so there will be no figure: pip install matplotlib")
    for each in experiments:
        if not (out / each.name / "config.json").exists():
            write_json(out / each.name / "config.json", _configuration(each))
    rows: list[Row] = []
    todo = [each for each in experiments if not (out / each.name / "result.json").exists()]
    with _Progress(todo) as progress:
        for each in experiments:
            file = out / each.name / "result.json"
            row: Row | None = json.loads(file.read_text()) if each not in todo else None
            row = row or progress.run(each, out / each.name, alone)
            if row is None:
                progress.stop(out / each.name)
            if each in todo:
                write_json(file, row)
            rows.append(row)
            progress.write(sentence(row), notify)
            report(rows, out)


def report(rows: Sequence[Row], out: Path) -> None:
    """Write the table, the numbers and, where matplotlib is installed, the figure."""
    write_text(out / "results.md", table(rows))
    write_json(out / "results.json", list(rows))
    if find_spec("matplotlib"):
        from agent.probe.figure import draw

        draw(out / "figure.png", rows)


class _Progress:
    """Runs experiments under one bar that counts tokens, until a signal."""

    def __init__(self, experiments: Sequence[Experiment]):
        self.bar = tqdm(
            total=sum(_tokens(each.probe) * each.probe.training.steps for each in experiments),
            unit="tok", unit_scale=True, dynamic_ncols=True, file=sys.stderr, disable=not experiments,
            mininterval=0.5 if sys.stderr.isatty() else 30,
        )  # fmt: skip
        self.signal: int | None = None

    def __enter__(self) -> "_Progress":
        self.before = {kind: signal.signal(kind, self._note_signal) for kind in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for kind, handler in self.before.items():
            signal.signal(kind, handler)
        self.bar.close()

    def run(self, experiment: Experiment, folder: Path, alone: int) -> Row | None:
        """The row of an experiment, or None if a signal came."""
        probe, counted = experiment.probe, None
        self.bar.set_description(experiment.name, refresh=False)
        one = dataclasses.replace(probe, training=dataclasses.replace(probe.training, seeds=1))

        def told(trainer: Trainer) -> bool:
            nonlocal counted
            if counted is None:  # what an earlier sitting did is done, but says nothing of the speed
                counted = trainer.step - 1
                self.bar.initial += counted * _tokens(probe)
                self.bar.n += counted * _tokens(probe)
            self.bar.update((trainer.step - counted) * _tokens(probe))
            counted = trainer.step
            if trainer.evaluated and trainer.evaluated[-1] == trainer.step:
                accuracy = trainer.curves["accuracy"][-1]
                solved = sum(value >= probe.evaluation.solved for value in accuracy)
                shown = f"step {trainer.step}, accuracy {sum(accuracy) / len(accuracy):.2f}, {solved} solved"
                self.bar.set_postfix_str(shown, refresh=False)
            return self.signal is not None

        try:
            timed: Row = {}
            if alone:
                timed = {"stacked_per_hour": seeds_per_hour(probe, alone), "alone_per_hour": seeds_per_hour(one, alone)}
            result = run(probe, folder / "checkpoints", told)
        except torch.OutOfMemoryError:
            most = probe.compute.tokens_at_once
            raise UserError(f"{experiment.name}: out of memory; lower compute.tokens_at_once, now {most}") from None
        return None if result is None else _configuration(experiment) | result | timed

    def write(self, line: str, notify: Callable[[str], None]) -> None:
        """Tell a line without tearing the bar."""
        with self.bar.external_write_mode(file=sys.stderr):
            notify(line)

    def stop(self, folder: Path) -> NoReturn:
        """End the program as the signal asks for."""
        assert self.signal is not None
        name = signal.Signals(self.signal).name
        self.bar.close()
        print(f"stopped by {name}; saved in {folder}, and the same command goes on from there", file=sys.stderr)
        sys.exit(128 + self.signal)

    def _note_signal(self, kind: int, _: FrameType | None) -> None:
        if self.signal is not None:  # a second one does not wait
            signal.signal(kind, signal.SIG_DFL)
            os.kill(os.getpid(), kind)
        self.signal = kind


def _tokens(probe: Probe) -> int:
    """Tokens of all seeds in one update."""
    return probe.training.seeds * probe.training.batch * probe.task.length


def _configuration(experiment: Experiment) -> dict[str, Any]:
    """What identifies an experiment, in plain values."""
    config = as_values(experiment.probe)
    label = experiment.preset or f"{config['task']['name']} {config['task']['vocab']}/{config['task']['length']}"
    return {
        "name": experiment.name,
        "preset": experiment.preset,
        "task": label,
        "core": experiment.core,
        "config": config,
    }


def _check(folder: Path, experiment: Experiment) -> None:
    """Raise UserError if the folder holds another configuration than this one; how it is computed may change."""
    file = folder / "config.json"
    if not file.exists():
        return
    try:
        saved = dict(_leaves(json.loads(file.read_text())["config"]))
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{file}: cannot be read ({error}); choose another --out") from None
    now = dict(_leaves(json.loads(json.dumps(as_values(experiment.probe)))))
    for key in sorted(saved | now):
        if not key.startswith("compute.") and saved.get(key) != now.get(key):
            raise UserError(
                f"{folder}: holds this experiment with {key} {saved.get(key)}, and now it is {now.get(key)}; "
                "choose another --out"
            )


def _leaves(values: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    found: list[tuple[str, Any]] = []
    for key, value in values.items():
        found += _leaves(value, f"{prefix}{key}.") if isinstance(value, dict) else [(prefix + key, value)]
    return found
