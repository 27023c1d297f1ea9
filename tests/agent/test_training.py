"""Whole runs: an agent that learns, a run that is stopped and goes on, mistakes that change nothing on disk."""

import json
import os
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import agent
from agent import checkpoint, training
from agent import config as configuration
from agent.agent import Agent
from agent.errors import UserError
from agent.schema import Config
from agent.training import train
from envs.errors import EnvironmentFailure

ROOT = Path(__file__).parents[2]
CHASE = "gym_chase:Chase-v0"
SMALL = ["log.tensorboard=false", "log.every=200", "env.amount=2", "env.parallel=false"]


def small_config(steps: int, *settings: str) -> Config:
    return configuration.resolve(env=CHASE, size="debug", device="cpu", steps=steps, settings=[*SMALL, *settings])


def lines(logdir: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (logdir / "metrics.jsonl").read_text().splitlines()]


def without_times(logdir: Path) -> list[dict[str, float]]:
    return [{key: value for key, value in line.items() if not key.startswith("time/")} for line in lines(logdir)]


def test_a_tiny_agent_learns_far_beyond_random(tmp_path: Path) -> None:
    """Random actions get 3.5 of 32; standing on the target from the start would get 32."""
    torch.set_num_threads(1)  # so small a network is no faster with two, and threads that must share a core crawl
    settings = [
        "optimizer.lr=1e-3", "optimizer.warmup=100", "train.ratio=32", "train.batch_size=16", "train.batch_length=8",
        "rssm.hidden=32", "heads.units=32", "core.deter=64", "env.amount=4", "behavior.entropy=0.01",
        "behavior.imagination_horizon=8",
    ]  # fmt: skip
    train(small_config(4_000, *settings), tmp_path)
    returns = [line["episode/return"] for line in lines(tmp_path) if "episode/return" in line]
    assert statistics.mean(returns[:8]) < 8
    assert statistics.mean(returns[-24:]) > 20
    player = agent.load(tmp_path)
    assert agent.evaluate(player, episodes=8)["mean"] > 20


def test_equal_seeds_give_equal_runs(tmp_path: Path) -> None:
    for name in ("one", "two"):
        train(small_config(400), tmp_path / name)
    assert without_times(tmp_path / "one") == without_times(tmp_path / "two")
    assert len(without_times(tmp_path / "one")) > 5


def test_a_finished_run_goes_on_with_more_steps(tmp_path: Path) -> None:
    train(small_config(400), tmp_path)
    first = lines(tmp_path)
    updates = first[-1]["updates"] if "updates" in first[-1] else max(line.get("updates", 0) for line in first)
    train(small_config(800), tmp_path)
    both = lines(tmp_path)
    assert both[: len(first)] == first
    assert [line["step"] for line in both] == sorted(line["step"] for line in both)
    assert max(line.get("updates", 0) for line in both) > updates
    saved = checkpoint.load(checkpoint.latest(tmp_path / "checkpoints"))  # type: ignore[arg-type]
    assert saved["rows"] * 2 == 800


@pytest.mark.skipif(os.environ.get("MUJOCO_GL") == "disabled", reason="no GL library (apt-get install libegl1)")
def test_an_agent_that_sees_pictures_goes_on_where_it_was(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def run(steps: int, logdir: Path) -> None:
        settings = [*SMALL, "env.options.fast_rendering=true", "env.options.image_size=16", "replay.prefill=24"]
        name = "dmc_cartpole_swingup_vision"
        train(configuration.resolve(env=name, size="debug", device="cpu", steps=steps, settings=settings), logdir)

    run(96, tmp_path / "whole")
    told = capsys.readouterr().err
    assert "GiB images and" in told and "environment rendering without shadows" in told
    run(64, tmp_path / "parts")
    run(96, tmp_path / "parts")
    assert "cut " not in capsys.readouterr().err  # the same pictures came again
    whole, parts = (
        checkpoint.load(checkpoint.latest(tmp_path / name / "checkpoints"))["agent"]  # type: ignore[arg-type]
        for name in ("whole", "parts")
    )
    assert whole["updates"] == parts["updates"] > 4
    for key, weights in whole["world_model"].items():
        assert torch.equal(weights, parts["world_model"][key]), key


def test_lines_after_the_checkpoint_are_written_again_and_not_twice(tmp_path: Path) -> None:
    train(small_config(400), tmp_path)
    first = lines(tmp_path)
    with (tmp_path / "metrics.jsonl").open("a") as file:  # what a run wrote between its checkpoint and its death
        file.write('{"step": 500, "episode/return": 1.0}\n')
    train(small_config(600), tmp_path)
    after = lines(tmp_path)
    assert after[: len(first)] == first
    assert {"step": 500, "episode/return": 1.0} not in after


def test_a_signal_during_the_last_save_does_not_break_it_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    unheld: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: unheld.append(number))
    save = training.Run.save

    def interrupted_save(run: training.Run) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        save(run)

    monkeypatch.setattr(training.Run, "save", interrupted_save)
    try:
        train(small_config(200), tmp_path)
        assert unheld == []
        os.kill(os.getpid(), signal.SIGTERM)
        assert unheld == [signal.SIGTERM]
    finally:
        signal.signal(signal.SIGTERM, before)


def test_sigterm_saves_and_the_same_command_goes_on(tmp_path: Path) -> None:
    logdir = tmp_path / "run"
    command = [
        sys.executable, "scripts/train_agent.py", "--env", CHASE, "--size", "debug", "--device", "cpu",
        "--steps", "1000000", "--logdir", str(logdir), "--set", *SMALL, "env.parallel=true",
    ]  # fmt: skip
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests' / 'agent'}"}

    def run_until(step: int) -> None:
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True)
        while not (logdir / "metrics.jsonl").exists() or max([0, *(line["step"] for line in lines(logdir))]) < step:
            assert process.poll() is None, process.stderr.read()  # type: ignore[union-attr]
            time.sleep(0.1)
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=60)  # until the workers, who hold stderr too, are gone
        assert process.returncode == 128 + signal.SIGTERM
        assert "the same command goes on" in errors

    run_until(200)
    first = lines(logdir)
    run_until(max(int(line["step"]) for line in first) + 200)
    assert lines(logdir)[: len(first)] == first


def test_an_environment_that_breaks_too_often_is_named_and_what_was_learned_is_kept(tmp_path: Path) -> None:
    settings = [*SMALL, "replay.prefill=32", "env.restarts=0"]
    asked = {"env": "gym_chase:Fragile-v0", "size": "debug", "device": "cpu", "steps": 1000}
    with pytest.raises(EnvironmentFailure, match="environment 0 .*RuntimeError in step: the motor is too hot"):
        train(configuration.resolve(**asked, settings=settings), tmp_path)  # type: ignore[arg-type]
    saved = checkpoint.load(checkpoint.latest(tmp_path / "checkpoints"))  # type: ignore[arg-type]
    assert saved["rows"] == 33
    assert saved["agent"]["updates"] > 0


def test_a_gpu_whose_memory_is_full_is_a_mistake_that_says_what_to_lower(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: Agent, index: torch.Tensor) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(Agent, "update", full)
    with pytest.raises(UserError, match=r"memory .* lower train.batch_size, now \d+, .* replay.device=cpu$"):
        train(small_config(400), tmp_path)


@pytest.mark.parametrize("other", [{"seed": 1}, {"settings": [*SMALL, "optimizer.lr=1e-5"]}])
def test_a_logdir_of_another_configuration_is_refused(tmp_path: Path, other: dict[str, object]) -> None:
    train(small_config(100), tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    asked = {"env": CHASE, "size": "debug", "device": "cpu", "steps": 100, "settings": SMALL} | other
    with pytest.raises(UserError, match="holds a run with"):
        train(configuration.resolve(**asked), tmp_path)  # type: ignore[arg-type]
    assert before == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}


def test_a_foreign_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(UserError, match="not empty"):
        train(small_config(100), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_an_unknown_environment_leaves_no_logdir(tmp_path: Path) -> None:
    logdir = tmp_path / "run"
    command = [sys.executable, "scripts/train_agent.py", "--env", "dmc_walker_wolk", "--logdir", str(logdir)]
    result = subprocess.run(
        command, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True
    )
    assert result.returncode == 2
    assert "dmc_walker_walk" in result.stderr and "Traceback" not in result.stderr
    assert not logdir.exists()


def test_loading_a_folder_without_a_run_says_so(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no run"):
        agent.load(tmp_path)
