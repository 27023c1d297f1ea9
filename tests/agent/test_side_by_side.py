"""Processes side by side: order, how many at once, what a failure or a signal does to the others; seeds of a run."""

import itertools
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from agent.errors import UserError
from agent.logdir import new_logdir
from agent.schema import Config
from agent.side_by_side import Job, SideBySide, frames_so_far, last_words

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "scripts" / "train_agent.py"
SAVES = """
import json, os, pathlib, signal, sys, time
folder = pathlib.Path(sys.argv[1])
folder.mkdir(exist_ok=True)
def stop(number, frame):
    (folder / "saved").touch()
    sys.exit(128 + number)
signal.signal(signal.SIGTERM, stop)
signal.signal(signal.SIGINT, stop)
(folder / "metrics.jsonl").write_text(json.dumps({"step": 7}) + "\\n" + "{half a li")
(folder / "alive").touch()
deadline = time.monotonic() + 60
while not (folder / "end").exists() and time.monotonic() < deadline:
    time.sleep(0.01)
"""
FAILS = "import sys; print('worker.py: the disk is full', file=sys.stderr); sys.exit(2)"


def job(folder: Path, name: str, program: str = SAVES) -> Job:
    return Job(name, [sys.executable, "-c", program, str(folder / name)], folder / name, steps=10)


def wait_for(*files: Path) -> None:
    deadline = time.monotonic() + 60
    while not all(file.exists() for file in files):
        assert time.monotonic() < deadline, files
        time.sleep(0.01)


def alive(folder: Path) -> int:
    return len(list(folder.glob("*/alive")))


def test_so_many_run_at_a_time_and_each_that_ends_makes_room(tmp_path: Path) -> None:
    jobs = [job(tmp_path, name) for name in "abc"]

    def end_them() -> None:
        wait_for(tmp_path / "a/alive", tmp_path / "b/alive")
        time.sleep(0.5)  # time in which a third one could begin
        begun.append(alive(tmp_path))
        for name in "bac":
            wait_for(tmp_path / name / "alive")
            (tmp_path / name / "end").touch()

    begun: list[int] = []
    thread = threading.Thread(target=end_them)
    thread.start()
    with SideBySide(jobs, 2, on_cpu=False) as processes:
        names = {ended.name for ended in processes}
    thread.join()
    assert names == {"a", "b", "c"} and begun == [2]
    assert frames_so_far(tmp_path / "a") == 7  # by the last whole line
    assert frames_so_far(tmp_path / "none") == 0


def test_a_failure_is_told_in_its_own_words_and_the_others_save(tmp_path: Path) -> None:
    class Waiting(SideBySide):
        def _start(self, job: Job) -> None:
            if job.name == "bad":
                wait_for(tmp_path / "good/alive")
            super()._start(job)

    jobs = [job(tmp_path, "good"), job(tmp_path, "bad", FAILS)]
    with (
        pytest.raises(UserError, match=r"^bad failed: the disk is full \(more in .*bad\.log\)$"),
        Waiting(jobs, None, on_cpu=False) as processes,
    ):
        list(processes)
    assert (tmp_path / "good/saved").exists()
    assert last_words(tmp_path / "bad.log") == "the disk is full"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_reaches_every_run_and_none_begins_after_it(
    number: signal.Signals, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt() -> None:
        wait_for(tmp_path / "a/alive", tmp_path / "b/alive")
        os.kill(os.getpid(), number)

    thread = threading.Thread(target=interrupt)
    before = signal.getsignal(number)
    with pytest.raises(SystemExit) as ended, SideBySide([job(tmp_path, n) for n in "abc"], 2, on_cpu=False) as runs:
        thread.start()
        list(runs)
    thread.join()
    assert ended.value.code == 128 + number
    assert "the same command goes on" in capsys.readouterr().err
    assert (tmp_path / "a/saved").exists() and (tmp_path / "b/saved").exists() and not (tmp_path / "c").exists()
    assert signal.getsignal(number) is before


def test_several_values_of_flags_are_a_run_of_each_combination(
    run_script: Callable[..., int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: dict[str, Config] = {}
    monkeypatch.setattr("agent.several.train_several", lambda configs, out, parallel: found.update(configs))
    envs, cores = ["gym_CartPole-v1", "gym_package.module:A/B-v0"], ["gru", "mlstm"]
    words = ["--env", ",".join(envs), "--core", ",".join(cores), "--size", "debug", "--seeds", "3,4"]
    assert run_script(*words, "--logdir", str(tmp_path), "--set", "train.ratio=7") == 0
    assert len(found) == 8
    for env, core, seed in itertools.product(envs, cores, (3, 4)):
        config = found[f"{env.replace('/', '_')}-{core}-seed{seed}"]
        assert (config.env.name, config.core.name, config.seed) == (env, core, seed)
        assert (config.size, config.train.ratio) == ("debug", 7)
    found.clear()
    assert run_script("--env", envs[0], "--core", "gru,mlstm", "--seed", "5", "--size", "debug") == 0
    assert {name: (config.core.name, config.seed) for name, config in found.items()} == {
        "gru": ("gru", 5),
        "mlstm": ("mlstm", 5),
    }


def test_a_new_folder_is_named_after_what_its_runs_have_in_common(
    debug_config: Callable[..., Config], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    gru, mlstm = debug_config(), debug_config(core="mlstm")
    assert new_logdir(gru) == Path("runs/gym_CartPole-v1-gru-debug-seed0-1")
    assert new_logdir(gru, mlstm) == Path("runs/gym_CartPole-v1-debug-seed0-1")
    Path("runs/gym_CartPole-v1-debug-seed0-1").mkdir(parents=True)
    assert new_logdir(gru, mlstm) == Path("runs/gym_CartPole-v1-debug-seed0-2")


def test_many_names_before_the_bar_are_counted(tmp_path: Path) -> None:
    with SideBySide([job(tmp_path, "a" * 30), job(tmp_path, "b" * 30)], 2, on_cpu=False) as runs:
        runs._start(runs.waiting.pop(0))
        runs._show()
        assert runs.bar.desc == "a" * 30 + ": "
        runs._start(runs.waiting.pop(0))
        runs._show()
        assert runs.bar.desc == "2 runs: "


def test_each_seed_is_the_run_that_it_would_be_alone(
    run_script: Callable[..., int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), str(ROOT / "tests/agent")]))
    monkeypatch.syspath_prepend(ROOT / "tests/agent")
    command = ["--env", "gym_chase:Chase-v0", "--size", "debug", "--device", "cpu", "--steps", "160"]
    settings = ["--set", "env.parallel=false", "log.tensorboard=false", "log.every=40"]
    assert run_script(*command, "--seeds", "3,4", "--logdir", str(tmp_path / "both"), *settings) == 0
    assert "seed3: done, mean return" in capsys.readouterr().out
    assert run_script(*command, "--seed", "4", "--logdir", str(tmp_path / "alone"), *settings) == 0

    def told(folder: Path) -> list[dict[str, float]]:
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        return [{key: value for key, value in line.items() if not key.startswith("time/")} for line in lines]

    assert told(tmp_path / "both/seed4") == told(tmp_path / "alone")
    assert told(tmp_path / "both/seed4") != told(tmp_path / "both/seed3")
    steps = told(tmp_path / "both/seed3")[-1]["step"]
    command[-1] = "240"
    assert run_script(*command, "--seeds", "3,4", "--logdir", str(tmp_path / "both"), *settings) == 0
    assert told(tmp_path / "both/seed3")[-1]["step"] > steps
