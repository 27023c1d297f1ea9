"""One run of a suite in a process of its own: train to the end, evaluate, write what was found beside the run."""

import json
from argparse import ArgumentParser
from pathlib import Path

from agent import config as configuration
from agent.command_line import run_main
from agent.memory.config import Evaluation
from agent.memory.scoring import score_run
from agent.training import train
from agent.writing import write_json

RESULT = "memory.json"
"""The file in a run's folder that says that it is finished."""


def main() -> None:
    """The command line of `Job.of`."""
    parser = ArgumentParser()
    parser.add_argument("--config", type=Path)
    parser.add_argument("--logdir", type=Path)
    parser.add_argument("evaluation", type=json.loads, help="the section `evaluation` as JSON")
    given = parser.parse_args()
    config = configuration.load(given.config)
    train(config, given.logdir)
    found = score_run(given.logdir, Evaluation(**given.evaluation), config.device)
    write_json(given.logdir / RESULT, found)


if __name__ == "__main__":
    run_main(main)
