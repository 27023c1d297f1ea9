"""Several seeds of one configuration, side by side: a process each, which keep a GPU busier than one after another."""

import dataclasses
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from agent import config as configuration
from agent import devices
from agent import logdir as logdirs
from agent.errors import UserError
from agent.results import read_metric
from agent.schema import Config
from agent.side_by_side import Job, SideBySide
from agent.writing import write_text

LAST_EPISODES = 10


def train_seeds(config: Config, seeds: Sequence[int], out: Path) -> None:
    """Train one run of each seed, in the folders `out/seed<n>`; those that exist go on.

    On a GPU all run at once, on the CPU as many as it has cores.

    Raises:
        UserError: a seed is given twice, a folder holds another run, or a run failed; the others have saved.
        SystemExit: a signal came, and all runs have saved; the same call goes on from there.
    """
    repeated = [seed for seed in seeds if list(seeds).count(seed) > 1]
    if repeated:
        raise UserError(f"--seeds: {repeated[0]} is given twice")
    configs = {f"seed{seed}": dataclasses.replace(config, seed=seed) for seed in seeds}
    for name, of_seed in configs.items():
        logdirs.check(of_seed, out / name)
    device = devices.choose(config.device)
    print(f"{len(seeds)} runs in {out}, side by side; what each says: {out / next(iter(configs))}.log and so on")
    if device.type == "cuda" and "CUDA_MPS_PIPE_DIRECTORY" not in os.environ:
        print("processes share a GPU better under NVIDIA's MPS: start nvidia-cuda-mps-control -d beforehand")
    with TemporaryDirectory() as folder:
        jobs = [_job(name, of_seed, out, Path(folder)) for name, of_seed in configs.items()]
        with SideBySide(jobs, None, device.type == "cpu") as processes:
            for job in processes:
                _, returns = read_metric(job.logdir)
                late = returns[-LAST_EPISODES:]
                mean = f"mean return of the last {len(late)} episodes {late.mean():.1f}" if len(late) else "no episode"
                processes.tell(f"{job.name}: done, {mean}")


def _job(name: str, config: Config, out: Path, folder: Path) -> Job:
    """The process that trains one seed; its configuration goes through a file in `folder`."""
    file = folder / f"{name}.yaml"
    write_text(file, configuration.dump(config))
    words = ["--config", str(file), "--logdir", str(out / name)]
    return Job(name, [sys.executable, "-m", "agent.commands.train_agent", *words], out / name, config.steps)
