"""A training run: collect, learn, log, save; stopped at any time and gone on with by the same command."""

import itertools
import os
import signal
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from agent import checkpoint
from agent import config as configuration
from agent.agent import Agent
from agent.errors import UserError
from agent.logging import LiveLine, MetricsLogger, memory
from agent.networks import parameter_count
from agent.ratio import Ratio
from agent.replay import Replay, choose_device, storage_bytes
from agent.schema import Config
from envs.errors import EnvironmentFailure
from envs.streams import Row, Streams

CALIBRATION_UPDATES = 30
"""Updates, after the first few slow ones, from which the duration of the run is foretold."""


def choose_training_device(config: Config) -> torch.device:
    """The device that `config.device` means here.

    Raises:
        UserError: cuda is asked for and there is none.
    """
    available = torch.cuda.is_available()
    if config.device == "cuda" and not available:
        raise UserError(
            "device: cuda, but torch finds no CUDA device here; use --device cpu, or install a CUDA build of torch"
        )
    return torch.device("cuda" if available and config.device != "cpu" else "cpu")


def train(config: Config, logdir: Path) -> None:
    """Train until `config.steps` environment frames, or go on with the run that `logdir` holds.

    Raises:
        UserError: `logdir` holds a run of another configuration, or something of `config` cannot be done here.
    """
    started = time.monotonic()
    Run(config, logdir, choose_training_device(config), started).go(check_logdir(config, logdir))


def check_logdir(config: Config, logdir: Path) -> Path | None:
    """The checkpoint to go on from, None if `logdir` is new. Changes nothing on disk."""
    file = logdir / "config.yaml"
    if file.exists():
        for key, held, asked in configuration.differences(configuration.load(file), config):
            if not configuration.may_change_on_resume(key):
                raise UserError(
                    f"{logdir} holds a run with {key}={held}, and this command asks for {asked}; "
                    "resume with the same command, or give another --logdir"
                )
    elif logdir.exists() and any(logdir.iterdir()):
        raise UserError(f"{logdir} is not empty and holds no run (no config.yaml); give another --logdir")
    return checkpoint.latest(logdir / "checkpoints")


def claim_logdir(config: Config, logdir: Path) -> None:
    """Write the configuration into `logdir`, once everything that can be wrong with it has been found right."""
    try:
        logdir.mkdir(parents=True, exist_ok=True)
        (logdir / "config.yaml").write_text(configuration.dump(config))
    except OSError as error:
        raise UserError(f"{logdir} cannot be written ({error.strerror}); give another --logdir") from error


class Run:
    """The parts of a run and the loop over them."""

    def __init__(self, config: Config, logdir: Path, device: torch.device, started: float):
        self.config, self.logdir, self.device, self.started = config, logdir, device, started
        torch.manual_seed(config.seed)
        np.random.seed(config.seed)  # noqa: NPY002 - environments of others may draw from it
        self.rows = 0  # rows collected from each environment
        self.episodes = 0
        self.stop_signal: int | None = None
        self.streams: Streams | None = None
        self.ratio = Ratio(config.train.ratio, config.train.batch_size * config.train.batch_length)

    # ---- counting ---------------------------------------------------------------------------------------------

    @property
    def frames(self) -> int:
        """Environment frames so far: rows times environments times action repeat."""
        return self.rows * self.config.env.amount * self.config.env.action_repeat

    def planned_updates(self) -> int:
        """Updates from nothing until `steps` frames."""
        env, train = self.config.env, self.config.train
        agent_steps = self.config.steps / env.action_repeat - self.config.replay.prefill
        return max(0, int(agent_steps * train.ratio / (train.batch_size * train.batch_length)))

    # ---- the run ----------------------------------------------------------------------------------------------

    def go(self, resumed: Path | None) -> None:
        """Set everything up, run to the end or to a signal, and save."""
        saved = checkpoint.load(resumed) if resumed else None
        if saved:
            self.rows, self.episodes = saved["rows"], saved["episodes"]
        env = self.config.env
        # An environment cannot be saved: a resumed run begins new episodes, from a seed of its own.
        seed = int(np.random.SeedSequence([self.config.seed, self.rows]).generate_state(1)[0] // 2)
        self.streams = Streams(
            env.name, env.amount, parallel=env.parallel, seed=seed,
            action_repeat=env.action_repeat, time_limit=env.time_limit, options=env.options,
        )  # fmt: skip
        try:
            self.agent = Agent(self.streams.observation_space, self.streams.action_space, self.config, self.device)
            self.replay = self._make_replay()
            self.agent.attach(self.replay)
            if saved:
                self._restore(saved)
            claim_logdir(self.config, self.logdir)
            self.logger = MetricsLogger(self.logdir, self.config.log.tensorboard, self.frames)
            if saved:
                self.logger.truncate(saved["metrics_position"])
            self.line = LiveLine(self.config.steps, self.frames, self.device.type)
            self._introduce(resumed)
            del saved
            with SignalsHeld(self):
                try:
                    self._loop()
                except EnvironmentFailure:
                    self.save()  # what was learned so far is worth keeping
                    raise
        finally:
            self.streams.close()
        self._finish()

    def _make_replay(self) -> Replay:
        config, (rows, latents) = self.config, self.agent.row_specs()
        amount, window = config.env.amount, config.train.batch_length + 1
        stride = self.agent.replay_stride
        # No more than this run can fill, in whole strides.
        wanted = -(-config.steps // (config.env.action_repeat * amount)) * amount
        needed = max(wanted, 2 * window * amount, config.replay.prefill + amount)
        capacity = min(config.replay.capacity, -(-needed // (amount * stride)) * amount * stride)
        nbytes = storage_bytes(rows, latents, streams=amount, capacity=capacity, stride=stride)
        return Replay(
            rows, latents, streams=amount, capacity=capacity, window=window, seed=config.seed, stride=stride,
            device=choose_device(config.replay.device, nbytes, self.device), online_queue=config.replay.online_queue,
        )  # fmt: skip

    def _loop(self) -> None:
        assert self.streams is not None
        config, agent, replay = self.config, self.agent, self.replay
        carry = agent.initial(self.streams.amount)
        row = self.streams.reset()
        saved = logged = time.monotonic()
        logged_frames, logged_updates = self.frames, agent.updates
        log_rows = max(1, config.log.every // (config.env.amount * config.env.action_repeat))
        foretell = Foretelling(agent.updates)
        while self.frames < config.steps and self.stop_signal is None:
            values = tensors(row)
            action, carry = agent.act(values, values["is_first"], carry)
            replay.add(values | {"action": action} | agent.latents(carry.state, carry.z))
            self.streams.send(action.cpu().numpy())
            if replay.ready(config.replay.prefill):
                for _ in range(self.ratio.updates(self.streams.amount)):
                    agent.update(replay.sample(config.train.batch_size))
                    self._tell_first_update()
            row = self.streams.receive()
            self.rows += 1

            self._report_episodes()
            self.line.update(self.frames, agent.updates)
            if told := foretell(agent.updates, self.planned_updates()):
                self.line.note(told)
            now = time.monotonic()
            if self.rows % log_rows == 0:
                rates = {
                    "updates": agent.updates,
                    "time/updates_per_second": (agent.updates - logged_updates) / (now - logged),
                    "time/frames_per_second": (self.frames - logged_frames) / (now - logged),
                    "time/memory_gib": memory(self.device.type) / 2**30,
                }
                metrics = agent.take_metrics()
                self.logger.write(self.frames, metrics | rates)
                if metrics:
                    agent.schedule(metrics)
                logged, logged_frames, logged_updates = now, self.frames, agent.updates
            if now - saved > 60 * config.checkpoint.minutes:
                self.save()
                saved = time.monotonic()

    def _report_episodes(self) -> None:
        assert self.streams is not None
        for episode in self.streams.finished:
            self.episodes += 1
            numbers = {
                "episode/return": episode.episode_return,
                "episode/length": episode.length,
                "episode/count": self.episodes,
                **{f"episode/{name}": value for name, value in episode.metrics.items()},
            }
            self.logger.write(self.frames, numbers)
            self.line.update(self.frames, self.agent.updates, episode.episode_return)

    def _finish(self) -> None:
        self.save()
        self.line.close()
        self.logger.close()
        if self.stop_signal is None:
            self.line.note(f"done: {self.frames:,} frames, {self.episodes} episodes; run in {self.logdir}")
            return
        name = signal.Signals(self.stop_signal).name
        self.line.note(f"stopped by {name} at {self.frames:,} frames and saved; the same command goes on from here")
        sys.exit(128 + self.stop_signal)

    # ---- saving -----------------------------------------------------------------------------------------------

    def save(self) -> None:
        """Write a checkpoint of everything but the environments."""
        state = {
            "agent": self.agent.state_dict(),
            "replay": self.replay.state_dict(),
            "ratio": self.ratio.state_dict(),
            "random": checkpoint.random_state(),
            "rows": self.rows,
            "episodes": self.episodes,
            "metrics_position": self.logger.position(),
        }
        checkpoint.save(self.logdir / "checkpoints", self.frames, state, self.config.checkpoint.keep)

    def _restore(self, saved: Mapping[str, Any]) -> None:
        self.agent.load_state_dict(saved["agent"])
        self.replay.load_state_dict(saved["replay"])
        self.ratio.load_state_dict(saved["ratio"])
        checkpoint.set_random_state(saved["random"])

    # ---- telling ----------------------------------------------------------------------------------------------

    def _introduce(self, resumed: Path | None) -> None:
        config, agent = self.config, self.agent
        counts = agent.parameter_counts()
        parts = ", ".join(f"{name} {count:,}" for name, count in counts.items())
        device = (
            torch.cuda.get_device_name(self.device)
            if self.device.type == "cuda"
            else f"cpu, {torch.get_num_threads()} threads"
        )
        precision = "bf16" if agent.dtype == torch.bfloat16 else "fp32"
        env, train = config.env, config.train
        first = config.replay.prefill * env.action_repeat
        lines = [
            f"run         {self.logdir}: {env.name}, core {config.core.name}, size {config.size}, seed {config.seed}",
            f"device      {device}, matrix products in {precision}, update {agent.mode}",
            f"parameters  {sum(counts.values()):,}: {parts}",
            f"core        {self._about_core()}",
            f"replay      {self._about_replay()}",
            f"plan        {config.steps:,} frames from {env.amount} environments, {self.planned_updates():,} updates "
            f"of {train.batch_size} x {train.batch_length} steps, the first after {first:,} frames",
        ]
        if resumed:
            lines.append(
                f"resumed     {resumed.name}: {self.frames:,} frames, {agent.updates:,} updates, new episodes begin"
            )
        for text in lines:
            self.line.note(text)
        self._first_update_told = False

    def _about_core(self) -> str:
        rssm = self.agent.world_model.rssm
        count, flops = parameter_count(rssm.core), rssm.core.step_flops(rssm.input_size)
        return (
            f"{self.config.core.name}: {count:,} parameters, state {rssm.core.state_bytes / 1e3:,.1f} kB a stream, "
            f"{flops / 1e6:,.2f} MFLOP of matrix products a step"
        )

    def _about_replay(self) -> str:
        replay = self.replay
        held, everything, states = replay.streams * replay.length, replay.nbytes / 2**30, replay.latent_nbytes / 2**30
        kept = "of every step" if replay.stride == 1 else f"of the heads of sequences only, one step in {replay.stride}"
        return f"{held:,} steps, {everything:.2f} GiB on {replay.device.type}, of which {states:.2f} GiB states {kept}"

    def _tell_first_update(self) -> None:
        if not self._first_update_told:
            self._first_update_told = True
            if self.device.type == "cuda":
                torch.cuda.synchronize()
            self.line.note(f"first update {time.monotonic() - self.started:.1f} s after the start")


class Foretelling:
    """Says once, after a short calibration, how long the rest will take."""

    def __init__(self, updates: int):
        self.start = updates + 10  # the first ones compile and capture
        self.since = 0.0
        self.done = False

    def __call__(self, updates: int, planned: int) -> str | None:
        """The line to print, at the one moment when it is known."""
        if self.done or updates < self.start:
            return None
        if not self.since:
            self.since, self.start = time.monotonic(), updates
        if updates < self.start + CALIBRATION_UPDATES:
            return None
        self.done = True
        rate = (updates - self.start) / (time.monotonic() - self.since)
        left = max(0, planned - updates)
        duration = tqdm.format_interval(left / rate)
        return f"calibrated  {rate:.3g} updates/s with acting, so {duration} for the {left:,} updates left"


class SignalsHeld:
    """While it is open, SIGINT and SIGTERM ask the run to stop after its present step; a second one ends it at once."""

    def __init__(self, run: Run):
        self.run = run
        self.before: dict[int, Any] = {}

    def __enter__(self) -> None:
        for number in (signal.SIGINT, signal.SIGTERM):
            self.before[number] = signal.signal(number, self._ask)

    def __exit__(self, *error: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self.run.stop_signal = number
        self.run.line.note(f"{signal.Signals(number).name}: saving after this step; again to stop at once")
        signal.signal(number, self.before[number])


def tensors(row: Row) -> dict[str, Tensor]:
    """A row of the environments as tensors (N, ...) that share its memory."""
    return {key: torch.from_numpy(np.ascontiguousarray(value)) for key, value in row.items()}


def new_logdir(config: Config) -> Path:
    """A folder under `runs/` that does not exist yet, named after what is trained."""
    name = f"{config.env.name}-{config.core.name}-{config.size}-seed{config.seed}".replace("/", "_")
    for number in itertools.count(1):
        path = Path("runs") / f"{name}-{number}"
        if not os.path.lexists(path):
            return path
    raise AssertionError("unreachable")
