"""What a run says of itself at its start: what it is, what it will take, and, soon after, how long."""

import math
import shutil
import time
from pathlib import Path

import torch
from tqdm import tqdm

from agent.agent import Agent
from agent.networks import parameter_count
from agent.replay import Replay
from agent.replay_files import CHUNK
from agent.schema import Config
from agent.spaces import Image

CALIBRATION_UPDATES = 30
"""Updates, after the first few slow ones, from which the duration of the run is foretold."""
LINE_BYTES = 2500
"""What a line of metrics takes at most on disk, TensorBoard's copy included."""


def planned_updates(config: Config) -> int:
    """Updates from nothing until `steps` frames."""
    env, train = config.env, config.train
    agent_steps = config.steps / env.action_repeat - config.replay.prefill
    return max(0, int(agent_steps * train.ratio / (train.batch_size * train.batch_length)))


def introduce(
    config: Config, logdir: Path, agent: Agent, replay: Replay, foretold: int | None, note: str | None
) -> list[str]:  # fmt: skip
    """The lines that a run begins with.

    Args:
        config: the resolved configuration.
        logdir: where the run is kept.
        agent: that will learn.
        replay: that it learns from.
        foretold: bytes of the GPU's memory that updates will take, from `agent.footprint`; None on a CPU.
        note: what the environment has to say.
    """
    counts = agent.learner.parameter_counts()
    parts = ", ".join(f"{name} {count:,}" for name, count in counts.items())
    device = (
        torch.cuda.get_device_name(agent.device)
        if agent.device.type == "cuda"
        else f"cpu, {torch.get_num_threads()} threads"
    )
    precision = "bf16" if agent.dtype == torch.bfloat16 else "fp32"
    env, train = config.env, config.train
    first = config.replay.prefill * env.action_repeat
    lines = [
        f"run         {logdir}: {env.name}, core {config.core.name}, size {config.size}, seed {config.seed}",
        f"device      {device}, matrix products in {precision}, update {agent.mode}",
        *_about_ranks(config, agent),
        f"parameters  {sum(counts.values()):,}: {parts}",
        f"core        {_about_core(config, agent)}",
        f"replay      {_about_replay(agent, replay)}",
        *([] if foretold is None else [f"memory      {_about_memory(foretold, agent, replay)}"]),
        f"limits      {_about_limits(config, logdir, agent, replay)}",
        f"plan        {config.steps:,} frames from {env.amount} environments, {planned_updates(config):,} updates "
        f"of {train.batch_size} x {train.batch_length} steps, the first after {first:,} frames",
    ]
    return lines if note is None else [*lines, f"environment {note}"]


def _about_ranks(config: Config, agent: Agent) -> list[str]:
    ranks = agent.ranks.size
    if ranks == 1:
        return []
    return [
        f"ranks       {ranks}, each with {config.env.amount // ranks} of the environments, its own replay as below, and"
        f" {config.train.batch_size // ranks} sequences of every batch"
    ]


def _about_core(config: Config, agent: Agent) -> str:
    rssm = agent.world_model.rssm
    count, flops = parameter_count(rssm.core), rssm.core.step_flops(rssm.input_size)
    return (
        f"{config.core.name}: {count:,} parameters, state {rssm.core.state_bytes / 1e3:,.1f} kB a stream, "
        f"{flops / 1e6:,.2f} MFLOP of matrix products a step"
    )


def _about_replay(agent: Agent, replay: Replay) -> str:
    held, everything, states = replay.streams * replay.length, replay.nbytes / 2**30, replay.latent_nbytes / 2**30
    kept = "of every step" if replay.stride == 1 else f"of the heads of sequences only, one step in {replay.stride}"
    pixels = sum(math.prod(space.shape) for space in agent.observations.values() if isinstance(space, Image))
    images = f"{held * pixels / 2**30:.2f} GiB images and " if pixels else ""
    elsewhere = agent.device.type == "cuda" and agent.config.replay.device == "auto" and replay.device.type == "cpu"
    reason = " (more than half of what the GPU has free)" if elsewhere else ""
    return (
        f"{held:,} steps, {everything:.2f} GiB on {replay.device.type}{reason}, "
        f"of which {images}{states:.2f} GiB states {kept}"
    )


def _about_memory(foretold: int, agent: Agent, replay: Replay) -> str:
    """What is left is what the GPU has free now and what this process holds already, as agent and replay do."""
    here = replay.nbytes if replay.device == agent.device else 0
    free, whole = torch.cuda.mem_get_info(agent.device)
    left = free + torch.cuda.memory_reserved(agent.device)
    text = (
        f"about {(foretold + here) / 2**30:.2f} GiB of the GPU's {whole / 2**30:.1f}: {here / 2**30:.2f} replay, the"
        " rest weights, optimizer and an update at its peak while uncompiled; compiled it takes less"
    )
    return text + (f"; NOT ENOUGH: {left / 2**30:.2f} GiB are free" if left < foretold + here else "")


def checkpoint_bytes(keep: int, agent: Agent, replay: Replay) -> int:
    """What all checkpoints of a run take on disk at most: `keep`, the best one, and one that is being written."""
    learned = sum(parameter.nbytes for parameter in agent.learner.parameters)
    slow = sum(parameter.nbytes for parameter in agent.learner.slow_critic.parameters())
    rows = replay.nbytes - replay.latent_nbytes
    of_chunk = rows * CHUNK // replay.length
    of_rank = (keep + 1) * (replay.latent_nbytes + of_chunk) + rows + of_chunk
    return (keep + 2) * (3 * learned + slow) + agent.ranks.size * of_rank


def _about_limits(config: Config, logdir: Path, agent: Agent, replay: Replay) -> str:
    needed = checkpoint_bytes(config.checkpoint.keep, agent, replay)
    logs = LINE_BYTES * config.steps // config.log.every
    held = replay.nbytes + 5 * sum(parameter.nbytes for parameter in agent.learner.parameters)
    text = (
        f"disk {needed / 2**30:.2f} GiB of checkpoints ({config.checkpoint.keep} newest, the best, one being written)"
        f" and about {logs / 2**20:.0f} MiB of logs and 0.2 kB an episode; memory {held / 2**30:.2f} GiB"
        " of replay, weights and optimizer, and what torch, one update and the environments take"
    )
    free = shutil.disk_usage(logdir).free
    return text + (f"; NOT ENOUGH: the disk has {free / 2**30:.2f} GiB free" if free < needed + logs else "")


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
