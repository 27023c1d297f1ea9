"""Training all seeds of one experiment: fresh data, evaluations, checkpoints, and the result."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from agent import checkpoint, devices
from agent.networks import parameter_count
from agent.probe.config import Probe, core_for_swap
from agent.probe.model import make_model
from agent.probe.optimizer import StackedAdamW
from agent.probe.scoring import read_with, score
from agent.probe.stack import Stack
from envs.probes.noisy_recall import Batch

BLOCK = 16  # updates whose data is drawn at once; part of what a seed means
CHECKPOINT_SECONDS = 60.0

Curves = dict[str, list[list[float]]]
"""By name, for each evaluation, a number for each seed."""


class Trainer:
    """All seeds of one experiment, at some step of their training."""

    def __init__(self, probe: Probe):
        self.probe = probe
        self.device = devices.choose(probe.compute.device)
        bf16 = probe.compute.precision == "bf16" or (probe.compute.precision == "auto" and self.device.type == "cuda")
        self.dtype = torch.bfloat16 if bf16 else torch.float32
        self.task = probe.make_task()
        training = probe.training
        self.seeds = list(range(training.first_seed, training.first_seed + training.seeds))
        self.stack = self._stack(None)
        self.optimizer = StackedAdamW(self.stack.parameters, training)
        self.generator = torch.Generator(self.device)
        self.generator.manual_seed(probe.evaluation.seed)
        self.test = self.task.sample(probe.evaluation.sequences, self.generator)
        self.floors = self.task.floors(self.test)
        self.step = 0
        self.seconds = 0.0  # of training and evaluation, over all sittings
        self.evaluated: list[int] = []
        self.curves: Curves = {}
        self._block: tuple[int, Batch] | None = None
        self._losses: list[Tensor] = []

    def _stack(self, core: tuple[str, Any] | None) -> Stack:
        models = [make_model(self.probe, self.task.vocab, seed, core).to(self.device) for seed in self.seeds]
        compute = self.probe.compute
        compiled = compute.compile and models[0].core.parallel_in_time
        return Stack(models, self.dtype, compute.tokens_at_once, compiled)

    def train(self, until: int) -> None:
        """Update up to step `until`, and evaluate where that is due."""
        every, last = self.probe.evaluation.every, self.probe.training.steps
        while self.step < until:
            started = time.perf_counter()
            losses, gradients = self.stack.gradients(self._data(self.step))
            self.optimizer.step(gradients, self.step)
            self._losses.append(losses)
            self.step += 1
            if self.step % every == 0 or self.step == last:
                self._evaluate()
            self.seconds += time.perf_counter() - started

    def _data(self, step: int) -> Batch:
        """Each seed's sequences for one update, (S, B, T); a function of seed and step alone."""
        block, place = divmod(step, BLOCK)
        if self._block is None or self._block[0] != block:
            batch = self.probe.training.batch
            drawn = []
            for seed in self.seeds:
                self.generator.manual_seed(seed * 1_000_003 + block + 1)
                one = self.task.sample(BLOCK * batch, self.generator)
                drawn.append(Batch(one.inputs.short(), one.targets.short(), one.trained, one.scored))
            whole = (torch.stack(parts).unflatten(1, (BLOCK, batch)) for parts in zip(*drawn, strict=True))
            self._block = block, Batch(*whole)
        inputs, targets, trained, scored = (part[:, place] for part in self._block[1])
        return Batch(inputs.long(), targets.long(), trained, scored)

    def _evaluate(self) -> None:
        scores = score(self.stack, self.test, self.task.vocab)
        loss = torch.stack(self._losses).mean(0).tolist()
        self._losses = []
        self.evaluated.append(self.step)
        found = {"accuracy": scores.accuracy, "macro_accuracy": scores.macro, "loss": loss} | scores.diagnostics
        for key, values in found.items():
            self.curves.setdefault(key, []).append(values)
        numbers = [scores.of(seed) | {"loss": loss[seed]} for seed in range(len(self.seeds))]
        self.stack.schedule(self.step, numbers)

    def swapped(self) -> dict[str, list[float]]:
        """Token accuracy of every seed when its weights are read with other cores, by name of the core."""
        found = {}
        for name in self.probe.evaluation.swap:
            config = core_for_swap(self.probe, name) if name != self.probe.core_name else None
            other = read_with(self.stack, self._stack((name, config)).models) if config else None
            if other:
                found[name] = score(other, self.test, self.task.vocab).accuracy
        return found

    def result(self) -> dict[str, Any]:
        """All that is reported, in plain values; made after the last step."""
        training, evaluation = self.probe.training, self.probe.evaluation
        accuracy = self.curves["accuracy"]
        bar = evaluation.escape * max(self.floors.values())
        escapes = [
            next((step for step, row in zip(self.evaluated, accuracy, strict=True) if row[seed] > bar), None)
            for seed in range(len(self.seeds))
        ]
        model = self.stack.models[0]
        return {
            "seeds": self.seeds,
            "steps": self.evaluated,
            "curves": self.curves,
            "floors": self.floors,
            "escape_above": bar,
            "escape_step": escapes,
            "solved": sum(value >= evaluation.solved for value in accuracy[-1]),
            "swap": self.swapped(),
            "parameters": parameter_count(model),
            "state_numbers": sum(value.numel() for value in model.core.initial(1).values()),
            "seconds": self.seconds,
            "seeds_per_hour": 3600 * training.seeds / self.seconds,
            "device": torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "cpu",
            "precision": str(self.dtype).removeprefix("torch."),
            "torch": torch.__version__,
        }

    def save(self, folder: Path) -> None:
        """Write a checkpoint that `restore` goes on from as if nothing had happened."""
        state = {
            "step": self.step,
            "seconds": self.seconds,
            "evaluated": self.evaluated,
            "curves": self.curves,
            "losses": self._losses,
            "stack": self.stack.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }
        checkpoint.save(folder, self.step, state, keep=1)

    def restore(self, folder: Path) -> None:
        """Go on from the newest checkpoint of a folder, if there is one."""
        path = checkpoint.latest(folder)
        if path is None:
            return
        state = checkpoint.load(path)
        self.step, self.seconds, self.evaluated = state["step"], state["seconds"], state["evaluated"]
        self.curves, self._losses = state["curves"], [value.to(self.device) for value in state["losses"]]
        self.stack.load_state_dict(state["stack"])
        self.optimizer.load_state_dict(state["optimizer"])


def run(probe: Probe, folder: Path, told: Callable[[Trainer], bool]) -> dict[str, Any] | None:
    """Train to the end, or until `told`, called after every update, answers that it should stop.

    Returns:
        The result, or None when stopped; then the same call goes on from there.
    """
    trainer = Trainer(probe)
    trainer.restore(folder)
    saved = time.monotonic()
    while trainer.step < probe.training.steps:
        trainer.train(trainer.step + 1)
        stop = told(trainer)
        if stop or time.monotonic() - saved > CHECKPOINT_SECONDS:
            trainer.save(folder)
            saved = time.monotonic()
        if stop:
            return None
    return trainer.result()


def seeds_per_hour(probe: Probe, steps: int) -> float:
    """How many seeds an hour would train of this one, from the time that some updates take after a few others."""
    trainer = Trainer(probe)
    data = trainer._data(0)

    def update() -> None:
        _, gradients = trainer.stack.gradients(data)
        trainer.optimizer.step(gradients, 0)

    wait = torch.cuda.synchronize if trainer.device.type == "cuda" else lambda: None
    for _ in range(3):
        update()
    wait()
    started = time.perf_counter()
    for _ in range(steps):
        update()
    wait()
    each = (time.perf_counter() - started) / steps
    return 3600 * probe.training.seeds / (each * probe.training.steps)
