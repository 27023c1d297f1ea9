"""What runs leave behind, read for plots and tables."""

import json
from pathlib import Path

import numpy as np

from agent.errors import UserError


def read_metric(logdir: str | Path, name: str = "episode/return") -> tuple[np.ndarray, np.ndarray]:
    """One metric of a run, finished or still under way.

    Args:
        logdir: folder of a training run.
        name: as it stands in `metrics.jsonl`. `episode/return` is the sum of the rewards of a training episode.

    Returns:
        Environment frames (N,) int64 and values (N,) float64, in the order of training; empty if there are none yet.

    Raises:
        UserError: the folder has no readable `metrics.jsonl`.
    """
    try:
        lines = (Path(logdir) / "metrics.jsonl").read_text().split("\n")[:-1]  # a last line may be half written
        entries = [entry for line in lines if name in (entry := json.loads(line))]
        frames = np.array([entry["step"] for entry in entries], np.int64)
        return frames, np.array([entry[name] for entry in entries], np.float64)
    except OSError as error:
        raise UserError(f"{logdir}: metrics.jsonl cannot be read ({error.strerror}); give a run's folder") from None
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{logdir}: metrics.jsonl is damaged ({error})") from None
