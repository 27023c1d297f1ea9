"""A run whose environments break goes on without the broken episodes, and stops in words if they do it too often."""

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from test_resume import NEVER, OFTEN, assert_same, die_at, lines, scramble, small_config, state

from agent import checkpoint, training
from agent.incidents import TRACEBACKS
from agent.replay import Replay
from agent.training import train
from envs.errors import EnvironmentFailure

SCRIPT = Path(__file__).parents[2] / "scripts" / "train_agent.py"
FAULTY = "gym_chase:Faulty-v0"
MANY = "env.restarts=1000"


def test_no_row_of_a_broken_episode_is_ever_sampled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Broken episodes are those with the target to the right; what broke before it was known could be sampled."""
    runs: list[training.Run] = []
    served: list[torch.Tensor] = []
    sample = Replay.sample

    def watched(self: Replay, batch: int) -> torch.Tensor:
        index = sample(self, batch)
        served.append(self.gather(index)[0]["observation"])
        return index

    def go(self: training.Run, found: Any) -> None:
        runs.append(self)
        original(self, found)

    original = training.Run.go
    monkeypatch.setattr(Replay, "sample", watched)
    monkeypatch.setattr(training.Run, "go", go)
    train(small_config(600, NEVER, MANY, "replay.prefill=100", env=FAULTY), tmp_path)
    assert torch.isfinite(torch.cat(served)).all()

    replay, log = runs[0].replay, lines(tmp_path)
    restarts = [line["env/restarts"] for line in log if "env/restarts" in line]
    assert len(restarts) >= 4 and restarts[-1] > len(restarts) - 1
    assert all(line["episode/length"] == 32 for line in log if "episode/length" in line)
    held, end = replay.rows(*replay.held), replay.held[1]
    place = torch.arange(end)
    ended = torch.zeros(2, end, dtype=torch.bool)  # rows of broken episodes, by what they show
    for stream in range(2):
        starts = [*place[held["is_first"][stream]].tolist(), end]
        for begin, stop in itertools.pairwise(starts):
            last = bool(held["is_last"][stream, stop - 1])
            assert (stop - begin, last) == (32 + 1, True) or stop - begin == 9 or stop == end
            ended[stream, begin:stop] = stop - begin == 9 and not last and stop < end
            assert bool(held["observation"][stream, begin, 1] > 0) == (stop - begin == 9) or stop == end
    assert ended.sum() >= 4 * 9

    again = torch.cat([replay.sample(64) for _ in range(60)], dim=1)  # (2, 3840) of fewer than 600 windows
    seen = torch.zeros(2, end, dtype=torch.bool)
    for offset in range(replay.window):
        seen[again[0], again[1] + offset] = True
    assert not (seen & ended).any()
    assert (seen | ended)[:, : end - replay.window].float().mean() > 0.7  # what lies between is served

    told = [line for line in capsys.readouterr().err.splitlines() if line.startswith("broken ")]
    assert any("observation 'observation' that holds NaN" in line and "the 9 steps" in line for line in told)
    assert any("raised RuntimeError in reset: the track is blocked" in line and "the 0 steps" in line for line in told)
    text = (tmp_path / TRACEBACKS).read_text()
    assert "Traceback" in text and "the track is blocked" in text


def test_a_killed_run_with_broken_environments_ends_as_one_that_never_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = (MANY, "env.amount=3", "replay.capacity=120")
    train(small_config(180, *settings, NEVER, env=FAULTY), tmp_path / "whole")
    logdir = tmp_path / "killed"
    for frames in (60, 120):
        scramble()
        die_at(monkeypatch, frames, 180, *settings, OFTEN, env=FAULTY, logdir=logdir)
    scramble()
    train(small_config(180, *settings, NEVER, env=FAULTY), logdir)
    expected = lines(tmp_path / "whole")
    assert lines(logdir) == expected and sum("env/restarts" in line for line in expected) >= 3
    assert_same(state(tmp_path / "whole"), state(logdir))
    assert state(logdir)["replay"]["discarded"]


def test_used_up_restarts_end_the_run_and_the_same_command_goes_on(tmp_path: Path) -> None:
    train(small_config(40, NEVER, "env.restarts=2", env=FAULTY), tmp_path)
    before = {path: path.read_bytes() for path in (tmp_path / "checkpoints").rglob("step_*.pt")}
    assert len(before) == 1
    with pytest.raises(EnvironmentFailure, match="env.restarts=2 is used up"):
        train(small_config(2000, NEVER, "env.restarts=2", env=FAULTY), tmp_path)
    after = {path: path.read_bytes() for path in (tmp_path / "checkpoints").rglob("step_*.pt")}
    assert before.items() < after.items() and len(after) == 2
    for path in after:
        checkpoint.verify(path)
    (newest,) = after.keys() - before.keys()
    assert checkpoint.load(newest)["streams"]["restarts"] == 2
    train(small_config(400, NEVER, MANY, env=FAULTY), tmp_path)
    assert lines(tmp_path)[-1]["step"] == 400


def test_a_script_ends_with_one_line_and_status_2(
    run_script: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--env", "gym_chase:Fragile-v0", "--size", "debug", "--device", "cpu", "--logdir", str(tmp_path / "run")]
    assert run_script(*words, "--set", "env.restarts=1", "log.tensorboard=false") == 2
    text = capsys.readouterr().err
    last = text.splitlines()[-1]
    assert "Traceback" not in text and last.startswith("train_agent.py: environment ")
    assert "the motor is too hot" in last and "env.restarts=1 is used up" in last
    assert lines(tmp_path / "run")[-1]["env/restarts"] == 1
