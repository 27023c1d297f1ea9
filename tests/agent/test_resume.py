"""A run that dies at any moment and is started again is the run that never stopped."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from agent import checkpoint, replay_files, training
from agent import config as configuration
from agent.errors import UserError
from agent.logging import MetricsLogger, memory
from agent.replay import Replay
from agent.replay_files import ReplayFiles
from agent.schema import Config
from agent.training import train

ROOT = Path(__file__).parents[2]
CHASE = "gym_chase:Chase-v0"
OFTEN, NEVER = "checkpoint.minutes=0.002", "checkpoint.minutes=1e9"


def small_config(steps: int, *settings: str, core: str = "gru", env: str = CHASE) -> Config:
    base = ["log.tensorboard=false", "log.every=20", "env.amount=2", "env.parallel=false", "replay.prefill=32"]
    base += ["behavior.imagination_horizon=2", "train.ratio=4"]
    return configuration.resolve(
        env=env, core=core, size="debug", device="cpu", steps=steps, settings=[*base, *settings]
    )


def lines(logdir: Path) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in (logdir / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if not key.startswith("time/")} for line in found]


class Killed(BaseException):
    """Nobody catches it, as nobody catches SIGKILL."""


def die_at(
    monkeypatch: pytest.MonkeyPatch, frames: int, steps: int, *settings: str, logdir: Path, **asked: Any
) -> None:
    """Train until the run has told of `frames` frames; no checkpoint is written then."""
    write = MetricsLogger.write

    def dying(self: MetricsLogger, step: int, metrics: Any) -> None:
        write(self, step, metrics)
        if step >= frames and "updates" in metrics:
            raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(MetricsLogger, "write", dying)
        train(small_config(steps, *settings, **asked), logdir)


def state(logdir: Path) -> dict[str, Any]:
    path = checkpoint.latest(logdir / "checkpoints")
    assert path is not None
    saved = checkpoint.load(path)
    kept = ("agent", "carry", "streams", "ratio", "random", "rows", "episodes")
    return {key: saved[key] for key in kept} | {"replay": held(logdir / "checkpoints" / "replay", saved["replay"])}


def held(folder: Path, needed: dict[str, Any]) -> dict[str, Any]:
    """All that a saved replay holds. Which rows lie in which file is another matter: it depends on when was saved."""
    latest = checkpoint.load(folder / needed["latest"])
    specs = {key: (tuple(value.shape[2:]), value.dtype) for key, value in latest["tensors"].items()}
    latents = {key: specs.pop(key) for key in list(specs) if key == "z" or key.startswith("state/")}
    window = small_config(1).train.batch_length + 1
    replay = Replay(
        specs, latents, streams=latest["streams"], capacity=latest["streams"] * (latest["next"] + 2 * window),
        window=window, device=torch.device("cpu"), seed=0, online_queue=False, stride=latest["stride"],
    )  # fmt: skip
    ReplayFiles(folder).load(needed, replay)
    return replay.state_dict()


def assert_same(one: Any, other: Any, path: str = "") -> None:
    assert type(one) is type(other), path
    if isinstance(one, dict):
        assert one.keys() == other.keys(), path
        for key in one:
            assert_same(one[key], other[key], f"{path}/{key}")
    elif isinstance(one, list):
        assert len(one) == len(other), path
        for index, (a, b) in enumerate(zip(one, other, strict=True)):
            assert_same(a, b, f"{path}/{index}")
    elif isinstance(one, torch.Tensor):
        assert one.dtype == other.dtype and one.numpy().tobytes() == other.numpy().tobytes(), path
    else:
        assert one == other, path


def scramble() -> None:
    """What a new process begins with is not what this one left."""
    torch.manual_seed(99)
    random.seed(99)
    np.random.seed(99)  # noqa: NPY002
    torch.rand(7)


@pytest.mark.parametrize(
    ("core", "settings"),
    [
        ("gru", ["env.amount=3"]),
        ("gru", ["precision=bf16", "replay.capacity=60"]),
        ("mlstm", ["core.heads=2", "core.head_dim=4"]),
    ],
)
def test_a_killed_run_ends_as_one_that_never_stopped(
    core: str, settings: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(replay_files, "CHUNK", 10)
    train(small_config(180, *settings, NEVER, core=core), tmp_path / "whole")
    logdir = tmp_path / "killed"
    asked: dict[str, Any] = {"logdir": logdir, "core": core}
    die_at(monkeypatch, 40, 180, *settings, NEVER, **asked)  # before the first checkpoint
    for frames in (80, 140):
        scramble()
        die_at(monkeypatch, frames, 180, *settings, OFTEN, **asked)
    scramble()
    train(small_config(180, *settings, NEVER, core=core), logdir)
    expected = lines(tmp_path / "whole")
    assert lines(logdir) == expected
    assert sum("episode/return" in line for line in expected) >= 3
    assert any(line.get("loss/actor") for line in expected) and not any("episode/cut" in line for line in expected)
    assert_same(state(tmp_path / "whole"), state(logdir))


def test_when_the_newest_checkpoint_is_damaged_the_one_before_leads_to_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    train(small_config(200, NEVER), tmp_path / "whole")
    logdir = tmp_path / "killed"
    die_at(monkeypatch, 120, 200, "checkpoint.minutes=1e-9", logdir=logdir)
    newest, before = checkpoint.candidates(logdir / "checkpoints")
    newest.write_bytes(newest.read_bytes()[:-7])
    train(small_config(200, NEVER), logdir)
    told = capsys.readouterr().err
    assert f"{newest.name}: damaged" in told and f"resumed     {before.name}" in told
    assert lines(logdir) == lines(tmp_path / "whole")
    assert_same(state(tmp_path / "whole"), state(logdir))


def test_a_run_that_is_given_more_steps_is_the_longer_run(tmp_path: Path) -> None:
    train(small_config(240, NEVER), tmp_path / "whole")
    for steps in (100, 240):
        train(small_config(steps, NEVER), tmp_path / "longer")
    assert lines(tmp_path / "longer") == lines(tmp_path / "whole")
    assert_same(state(tmp_path / "whole")["agent"], state(tmp_path / "longer")["agent"])


def test_an_episode_that_cannot_be_lived_through_again_is_cut_and_not_reported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    env = "gym_chase:Restless-v0"
    train(small_config(100, NEVER, env=env), tmp_path)  # amid the second episodes of 32 steps
    train(small_config(240, NEVER, env=env), tmp_path)
    assert "cut         episodes of environments 0, 1" in capsys.readouterr().err
    found = lines(tmp_path)
    (cut,) = [line for line in found if "episode/cut" in line]
    assert cut == {"step": 100, "episode/cut": 2.0}
    lengths = [line["episode/length"] for line in found if "episode/length" in line]
    assert lengths == [32.0] * len(lengths) and len(lengths) == 6
    assert state(tmp_path)["replay"]["tensors"]["is_first"][
        :, 50
    ].all()  # the first row after the cut, where gather() ends the one before


def test_a_checkpoint_of_another_run_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train(small_config(60, NEVER), tmp_path / "one")
    train(small_config(80, NEVER, "seed=1"), tmp_path / "other")
    (foreign,) = checkpoint.candidates(tmp_path / "other" / "checkpoints")
    (tmp_path / "one" / "checkpoints" / foreign.name).write_bytes(foreign.read_bytes())
    train(small_config(100, NEVER), tmp_path / "one")
    assert "a checkpoint of another run lies here, with seed=1 and not 0" in capsys.readouterr().err
    (tmp_path / "three").mkdir()
    (tmp_path / "three" / "config.yaml").write_text(configuration.dump(small_config(60, "seed=3")))
    (tmp_path / "three" / "checkpoints").mkdir()
    (tmp_path / "three" / "checkpoints" / foreign.name).write_bytes(foreign.read_bytes())
    before = {path: path.read_bytes() for path in (tmp_path / "three").rglob("*") if path.is_file()}
    with pytest.raises(UserError, match="a checkpoint of another run"):
        train(small_config(100, "seed=3"), tmp_path / "three")
    assert before == {path: path.read_bytes() for path in (tmp_path / "three").rglob("*") if path.is_file()}


def test_a_full_disk_stops_with_one_line_and_the_run_goes_on_when_there_is_room(tmp_path: Path) -> None:
    logdir = tmp_path / "run"
    settings = ["log.every=20", "env.amount=2", "env.parallel=false", "replay.prefill=32", "log.tensorboard=false"]
    settings += ["behavior.imagination_horizon=2", "train.ratio=4"]
    command = [
        sys.executable, "scripts/train_agent.py", "--env", CHASE, "--size", "debug", "--device", "cpu",
        "--logdir", str(logdir), "--steps", "100", "--set", *settings,
    ]  # fmt: skip
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests' / 'agent'}"}

    def run(largest_file: int) -> subprocess.CompletedProcess[str]:
        line = f"ulimit -f {largest_file}; " + " ".join(command)  # in KiB
        return subprocess.run(["bash", "-c", line], cwd=ROOT, env=environment, capture_output=True, text=True)

    train(small_config(60), logdir)
    before = {path: path.read_bytes() for path in (logdir / "checkpoints").rglob("*.pt")}
    config = (logdir / "config.yaml").read_text().replace("steps: 60", "steps: 100")
    result = run(100)  # less than a checkpoint, more than the log
    assert result.returncode == 2 and "Traceback" not in result.stderr
    last = result.stderr.splitlines()[-1]
    assert "checkpoints" in last and "File too large" in last and "make room" in last
    assert {path: path.read_bytes() for path in (logdir / "checkpoints").rglob("*.pt")} == before
    assert (logdir / "config.yaml").read_text() == config
    assert run(4).returncode == 2  # not even the log can grow
    assert {path: path.read_bytes() for path in (logdir / "checkpoints").rglob("*.pt")} == before
    train(small_config(100), logdir)
    assert lines(logdir)[-1]["step"] == 100


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train(small_config(60, NEVER), tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    write_text = Path.write_text

    def refuse(self: Path, text: str, **arguments: Any) -> int:
        if tmp_path in self.parents:
            raise OSError(30, "Read-only file system")
        return write_text(self, text, **arguments)

    with monkeypatch.context() as patch, pytest.raises(UserError, match="Read-only file system"):
        patch.setattr(Path, "write_text", refuse)
        train(small_config(100, NEVER), tmp_path)
    assert before == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}


def test_a_run_killed_before_it_had_written_its_configuration_can_start(tmp_path: Path) -> None:
    (tmp_path / "config.yaml.tmp").write_text("half a conf")
    train(small_config(40, NEVER), tmp_path)
    assert not (tmp_path / "config.yaml.tmp").exists()


def test_neither_memory_nor_open_files_grow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the second half of a run whose replay has long been full, with a checkpoint every few rows."""
    torch.set_num_threads(1)
    seen: list[tuple[int, int]] = []
    write = MetricsLogger.write

    def watching(self: MetricsLogger, step: int, metrics: Any) -> None:
        write(self, step, metrics)
        if "updates" in metrics:
            seen.append((memory("cpu"), len(os.listdir("/proc/self/fd"))))

    save, saves = training.Run.save, 0

    def counted(self: training.Run) -> None:
        nonlocal saves
        saves += 1
        save(self)

    monkeypatch.setattr(MetricsLogger, "write", watching)
    monkeypatch.setattr(training.Run, "save", counted)
    settings = ["replay.capacity=120", "train.ratio=1", "log.every=40", "checkpoint.minutes=0.001"]
    train(small_config(2400, *settings), tmp_path)
    assert len(seen) == 60 and saves > 20
    bytes_held, files = zip(*seen[20:], strict=True)
    assert max(files) == min(files)
    assert max(bytes_held[20:]) - max(bytes_held[:20]) < 2**20
    on_disk = [path.name.split("_")[0] for path in (tmp_path / "checkpoints").rglob("*.pt")]
    assert sorted(set(on_disk)) == ["best", "latest", "step"]
    assert len(on_disk) == 5  # two checkpoints, their replays, the best


def test_too_many_skipped_updates_end_the_run_and_leave_the_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(small_config(80, NEVER), tmp_path)
    before = {path: path.read_bytes() for path in (tmp_path / "checkpoints").rglob("*.pt")}
    monkeypatch.setattr("agent.learner.replay_value_loss", lambda *arguments: torch.full((7, 4), torch.inf))
    with pytest.raises(UserError, match="not finite at .* loss/replay_value.*train.max_skipped"):
        train(small_config(400, NEVER, "train.max_skipped=3"), tmp_path)
    assert before == {path: path.read_bytes() for path in (tmp_path / "checkpoints").rglob("*.pt")}
    told = [line["skipped_updates"] for line in lines(tmp_path) if "skipped_updates" in line]
    assert told[-1] > 0 and told[0] == 0
    batch = min((tmp_path / "not_finite").glob("*.pt"))
    assert "loss/replay_value" in checkpoint.load(batch)["names"]
