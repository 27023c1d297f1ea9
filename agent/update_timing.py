"""How long the agent's update takes, on rows of noise: from sampling replay to new weights and refreshed latents."""

import resource
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.autograd import DeviceType

import envs
from agent import devices
from agent.agent import Agent
from agent.footprint import foretold_on_gpu
from agent.plain_update import PlainUpdate
from agent.random_state import make_deterministic
from agent.rehearsal import rehearsing
from agent.replay import Replay
from agent.schema import Config

WARM_UP = 20  # updates in which regions compile, the graph is captured and clocks rise
CHUNK = 10  # updates between two readings of the clock, since waiting for a GPU costs time too
PLAIN = 10  # plain updates to time, the first two apart
PROFILED = 5  # updates whose kernels are counted

Row = dict[str, Any]


def time_updates(
    config: Config, started: float, amount: int, show: Callable[[str], None] | None = None, plain: bool = False,
    turn: Callable[[], None] = lambda: None,
) -> Row:  # fmt: skip
    """Measure the update of one configuration.

    Args:
        config: what to build.
        started: `time.time()` at which this process began.
        amount: updates to time.
        show: given a table of the kernels in which an update spends most of its time.
        plain: time the update as one would first write it, eager and in fp32, too: `agent.plain_update`.
        turn: called between warm-up and timing; it may wait until nothing else runs here.

    Returns:
        What ran (device, threads, parameters, ...); `first_update_s` and `steady_s`, from the start of the process to
        the end of the first and of the last warm-up update; `ms`, the median time of an update, with `ms_p10` and
        `ms_p90` over chunks of 10; `updates_per_s`; `peak_gib` of the GPU, or of the process on a CPU; on a GPU also
        `foretold_gib`, what a run would have said of that at its start, `kernels` an update, and the share `busy` of
        the time in which one was running; if asked for, `plain_ms` and
        `times_plain`, how many times `ms` that is.
    """
    device = devices.choose(config.device)
    make_deterministic(config, device)  # as a run does: it decides on kernels, and under which name code is kept
    env = envs.make(config.env.name, action_repeat=config.env.action_repeat, options=config.env.options)
    spaces = env.observation_space, env.action_space
    foretold = foretold_on_gpu(*spaces, config, device)
    if foretold is not None:
        torch.cuda.reset_peak_memory_stats(device)  # of what foretelling took
    agent, replay = rehearsing(*spaces, config, device)

    def update() -> None:
        agent.update(replay.sample(config.train.batch_size))

    update()
    first = _now(device, time.time) - started
    for _ in range(WARM_UP):
        update()
    steady = _now(device, time.time) - started
    turn()
    chunks = []
    for _ in range(max(2, amount // CHUNK)):
        before = _now(device)
        for _ in range(CHUNK):
            update()
        chunks.append((_now(device) - before) * 1000 / CHUNK)
    deciles = statistics.quantiles(chunks, n=10)
    median = statistics.median(chunks)
    if show is not None:
        show(_kernel_table(update, device))
    row = _description(config, agent, device) | {
        "first_update_s": first, "steady_s": steady, "updates": len(chunks) * CHUNK,
        "ms": median, "ms_p10": deciles[0], "ms_p90": deciles[-1], "updates_per_s": 1000 / median,
        "peak_gib": _peak_bytes(device) / 2**30,
    }  # fmt: skip
    if device.type == "cuda":
        row |= _profiled(update, device)
    if foretold is not None:
        row["foretold_gib"] = (foretold + replay.nbytes) / 2**30
    if plain:
        row |= {"plain_ms": (slow := _plain_ms(agent, replay)), "times_plain": slow / median}
    return row | {"loss_dynamics": agent.take_metrics()["loss/dynamics"]}  # not finite: it was no real update


def _plain_ms(agent: Agent, replay: Replay) -> float:
    """Median time of the plain update."""
    update = PlainUpdate(agent.learner)
    times = []
    for _ in range(PLAIN):
        before = _now(agent.device)
        rows, context = replay.gather(replay.sample(agent.config.train.batch_size))
        update(rows, context)
        times.append((_now(agent.device) - before) * 1000)
    return statistics.median(times[2:])


def _now(device: torch.device, clock: Callable[[], float] = time.perf_counter) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return clock()


def _description(config: Config, agent: Agent, device: torch.device) -> Row:
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "threads": torch.get_num_threads(), "torch": torch.__version__,
        "core": config.core.name, "size": config.size, "posterior": config.rssm.posterior,
        "precision": "bf16" if agent.dtype == torch.bfloat16 else "fp32", "compile": agent.mode,
        "batch": config.train.batch_size, "length": config.train.batch_length,
        "starts": config.behavior.imagination_starts or config.train.batch_length,
        "parameters": sum(agent.learner.parameter_counts().values()),
    }  # fmt: skip


def _peak_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _profiled(update: Callable[[], None], device: torch.device) -> Row:
    """Kernels, copies and fills an update, and the share of the time in which at least one of them runs."""
    _now(device)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(PROFILED):
            update()
        _now(device)
    on_gpu = [event for event in profile.events() or [] if event.device_type == DeviceType.CUDA]
    spans = [(event.time_range.start, event.time_range.end) for event in on_gpu]
    return {"kernels": len(spans) / PROFILED, "busy": busy_share(spans)}


def busy_share(spans: Sequence[tuple[float, float]]) -> float | None:
    """The share of the time from the first start to the last end that the spans (start, end) cover together."""
    if not spans:
        return None
    covered, reached = 0.0, -float("inf")
    for start, end in sorted(spans):
        covered += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    whole = reached - min(start for start, _ in spans)
    return covered / whole if whole else 1.0


def _kernel_table(update: Callable[[], None], device: torch.device) -> str:
    with torch.profiler.profile() as profile:
        update()
        _now(device)
    by = f"self_{device.type}_time_total"
    return str(profile.key_averages().table(sort_by=by, row_limit=40, max_name_column_width=70))
