"""A suite's runs in one folder, each in a process of its own: what is finished is reused, what was stopped goes on."""

import dataclasses
import json
import sys
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory

import envs
from agent import devices
from agent import logdir as logdirs
from agent.errors import UserError
from agent.memory.config import Evaluation, Run, Suite
from agent.memory.report import rows, sentence, table
from agent.memory.scoring import Result, task_of
from agent.memory.worker import RESULT
from agent.schema import Config
from agent.side_by_side import Job, SideBySide
from agent.writing import write_json, write_text

WORKER = "agent.memory.worker"


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
        devices.choose(run.config.device)
        _check_env(run.config)
    if not find_spec("matplotlib"):
        notify("matplotlib is missing, so there will be no figure: pip install matplotlib")
    results = {run.name: result for run in suite.runs if (result := _finished(run, out, suite.evaluation))}
    for name, result in results.items():
        notify(f"{sentence(name, result)} (finished before)")
    if results:
        report(suite.runs, results, out)
    waiting = {run.name: run for run in suite.runs if run.name not in results}
    on_cpu = any(devices.choose(run.config.device).type == "cpu" for run in waiting.values())
    with TemporaryDirectory() as folder:
        evaluation = json.dumps(dataclasses.asdict(suite.evaluation))
        jobs = [Job.of(WORKER, run.name, run.config, out, Path(folder), evaluation) for run in waiting.values()]
        with SideBySide(jobs, suite.parallel, on_cpu) as processes:
            for job in processes:
                result = _finished(waiting[job.name], out, suite.evaluation)
                assert result is not None
                results[job.name] = result
                with processes.bar.external_write_mode(file=sys.stderr):
                    notify(sentence(job.name, result))
                report(suite.runs, results, out)


def report(runs: Sequence[Run], results: dict[str, Result], out: Path) -> None:
    """Write the table, the numbers and, where matplotlib is installed, the figure."""
    gathered = rows(runs, results)
    write_text(out / "results.md", table(gathered))
    write_json(out / "results.json", gathered)
    if find_spec("matplotlib"):
        from agent.memory.figure import draw

        draw(out / "figure.png", gathered)


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
