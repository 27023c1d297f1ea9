"""One run of a suite in a process of its own: train to the end, evaluate, write what was found beside the run."""

import json
import sys
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
    """Arguments: the configuration's file, the run's folder, the section `evaluation` as JSON."""
    config = configuration.load(Path(sys.argv[1]))
    logdir = Path(sys.argv[2])
    train(config, logdir)
    write_json(logdir / RESULT, score_run(logdir, Evaluation(**json.loads(sys.argv[3])), config.device))


if __name__ == "__main__":
    run_main(main)
