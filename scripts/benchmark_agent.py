"""Time the update: from sampling replay to the optimizer's step, on rows of noise."""

import json
import statistics
import sys
import time

from agent.command_line import config_from_arguments, make_parser, run_main

WARM_UP = 20  # updates in which regions compile, the graph is captured and clocks rise


def main() -> None:
    """Read the flags, time, print one JSON object."""
    parser = make_parser(
        "Time the agent's update. Prints JSON: milliseconds an update (median, 10th and 90th percentile over chunks "
        "of 10), seconds to the first one, peak memory.",
        ["python scripts/benchmark_agent.py --env dmc_walker --size 12m --updates 300"],
        flags=("env", "core", "size", "device", "config", "set"),
    )
    parser.add_argument("--updates", metavar="N", type=int, default=200, help="updates to time")
    parser.add_argument("--profile", action="store_true", help="also list the kernels of one uncaptured update")
    arguments = parser.parse_args()
    config = config_from_arguments(arguments)
    started = time.monotonic()
    import torch

    import envs
    from agent.agent import Agent
    from agent.replay import Replay
    from agent.training import choose_training_device

    device = choose_training_device(config)
    env = envs.make(config.env.name, action_repeat=config.env.action_repeat, options=config.env.options)
    agent = Agent(env.observation_space, env.action_space, config, device)
    rows, latents = agent.row_specs()
    streams, window = config.env.amount, config.train.batch_length + 1
    replay = Replay(
        rows, latents, streams=streams, capacity=4 * window * streams, window=window,
        device=device, seed=0, online_queue=False, stride=agent.replay_stride,
    )  # fmt: skip
    carry = agent.initial(streams)
    for _ in range(4 * window):
        samples = [env.observation_space.sample() for _ in range(streams)]
        row = {key: torch.stack([torch.as_tensor(sample[key]) for sample in samples]) for key in samples[0]}
        flags = torch.zeros(streams, dtype=torch.bool)
        action, carry = agent.act(row, flags, carry)
        row |= {"reward": torch.rand(streams), "is_first": flags, "is_last": flags, "is_terminal": flags}
        replay.add(row | {"action": action} | agent.latents(carry.state, carry.z))
    agent.attach(replay)

    def wait() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.monotonic()

    agent.update(replay.sample(config.train.batch_size))
    first = wait() - started
    if arguments.profile:
        with torch.profiler.profile() as profile:
            agent.update(replay.sample(config.train.batch_size))
            wait()
        by = "self_cuda_time_total" if device.type == "cuda" else "self_cpu_time_total"
        table = profile.key_averages().table(sort_by=by, row_limit=25, max_name_column_width=60)
        print(table, file=sys.stderr)
    for _ in range(WARM_UP):
        agent.update(replay.sample(config.train.batch_size))
    ready, chunks = wait() - started, []
    for _ in range(max(1, arguments.updates // 10)):
        before = wait()
        for _ in range(10):
            agent.update(replay.sample(config.train.batch_size))
        chunks.append((wait() - before) * 100)  # milliseconds an update
    deciles = statistics.quantiles(chunks, n=10) if len(chunks) > 1 else chunks * 9
    metrics = agent.take_metrics()
    result = {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu x{torch.get_num_threads()}",
        "torch": torch.__version__,
        "size": config.size, "core": config.core.name, "posterior": config.rssm.posterior, "update": agent.mode,
        "precision": str(agent.dtype), "parameters": sum(agent.parameter_counts().values()),
        "ms": statistics.median(chunks), "ms_p10": deciles[0], "ms_p90": deciles[-1],
        "updates": len(chunks) * 10, "first_update_s": first, "steady_s": ready,
        "peak_gib": torch.cuda.max_memory_reserved(device) / 2**30 if device.type == "cuda" else None,
        "loss_dynamics": metrics["loss/dynamics"],
    }  # fmt: skip
    print(json.dumps(result))


if __name__ == "__main__":
    run_main(main)
