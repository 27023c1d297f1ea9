"""Several runs side by side, a process each, which keep a GPU busier than one after another."""

import itertools
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from agent import devices
from agent import logdir as logdirs
from agent.errors import UserError
from agent.results import read_metric
from agent.schema import Config
from agent.side_by_side import Job, SideBySide

LAST_EPISODES = 10
TRAIN = "agent.commands.train_agent"

Choice = dict[str, str | None]
"""A value for each flag; None where the flag is not given."""


def combinations(given: Mapping[str, Sequence[str | None]]) -> dict[str, Choice]:
    """All combinations of the values that each flag is given, by the name of the run: the values that vary.

    Raises:
        UserError: a flag is given a value twice.
    """
    for flag, values in given.items():
        repeated = [value for value in values if values.count(value) > 1]
        if repeated:
            raise UserError(f"--{flag}: {repeated[0]} is given twice")
    varied = [flag for flag, values in given.items() if len(values) > 1 or (flag == "seeds" and values[0] is not None)]
    choices = [dict(zip(given, values, strict=True)) for values in itertools.product(*given.values())]
    return {"-".join(_word(flag, choice[flag]) for flag in varied): choice for choice in choices}


def _word(flag: str, value: str | None) -> str:
    """What a folder is called by a value."""
    return f"seed{value}" if flag == "seeds" else str(value).replace("/", "_")


def train_several(configs: Mapping[str, Config], out: Path, parallel: int | None) -> None:
    """Train a run of each configuration, in the folders `out/<name>`; those that exist go on.

    Args:
        configs: by name.
        out: the folder of all.
        parallel: how many at a time; None is all on a GPU, and on the CPU as many as it has cores, which are the most.

    Raises:
        UserError: a folder holds another run, or a run failed; the others have saved.
        SystemExit: a signal came, and all runs have saved; the same call goes on from there.
    """
    for name, config in configs.items():
        logdirs.check(config, out / name)
    on_gpu = devices.choose(next(iter(configs.values())).device).type == "cuda"
    print(f"{len(configs)} runs in {out}, side by side; what each says: {out / next(iter(configs))}.log and so on")
    if on_gpu and "CUDA_MPS_PIPE_DIRECTORY" not in os.environ:
        print("processes share a GPU better under NVIDIA's MPS: start nvidia-cuda-mps-control -d beforehand")
    with TemporaryDirectory() as folder:
        jobs = [Job.of(TRAIN, name, config, out, Path(folder)) for name, config in configs.items()]
        with SideBySide(jobs, parallel, not on_gpu) as processes:
            for job in processes:
                _, returns = read_metric(job.logdir)
                late = returns[-LAST_EPISODES:]
                mean = f"mean return of the last {len(late)} episodes {late.mean():.1f}" if len(late) else "no episode"
                processes.tell(f"{job.name}: done, {mean}")
