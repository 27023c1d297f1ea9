"""A run that begins uncompiled while another process compiles."""

import dataclasses
import math
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch

from agent import compile_ahead, training
from agent.compile_ahead import CompilingAhead, compile_once, is_wanted, what_is_compiled
from agent.compiler import how_updates_begin
from agent.distributed import Ranks
from agent.errors import UserError
from agent.results import read_metric
from agent.schema import Config
from agent.training import train

Make = Callable[..., Any]

ROOT = Path(__file__).parents[2]
OBSERVATIONS = gymnasium.spaces.Dict({"place": gymnasium.spaces.Box(-1, 1, (3,), np.float32)})
ACTION = gymnasium.spaces.Discrete(3)
CPU = torch.device("cpu")


def alive(process: int) -> bool:
    """Whether there is such a process, and it has not ended."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.parametrize(("ranks", "settings"), [(Ranks(0, 2), []), (Ranks(), ["deterministic=true"])])
def test_a_run_that_may_not_change_over_is_refused(debug_config: Make, ranks: Ranks, settings: list[str]) -> None:
    assert is_wanted(debug_config("compile=ahead"), torch.device("cpu"), Ranks())
    with pytest.raises(UserError, match="compile: ahead .* use full"):
        is_wanted(debug_config("compile=ahead", *settings), torch.device("cpu"), ranks)
    assert not is_wanted(debug_config("compile=auto", *settings), torch.device("cuda"), ranks)


def test_a_run_on_a_gpu_compiles_ahead_by_itself(debug_config: Make) -> None:
    assert is_wanted(debug_config("compile=auto"), torch.device("cuda"), Ranks())
    assert not is_wanted(debug_config("compile=auto"), torch.device("cpu"), Ranks())
    assert not is_wanted(debug_config("compile=full"), torch.device("cuda"), Ranks())


def test_updates_begin_with_what_needs_no_compiler() -> None:
    assert how_updates_begin("ahead", on_gpu=True) == "graph"
    assert how_updates_begin("ahead", on_gpu=False) == "eager"
    assert how_updates_begin("auto", on_gpu=True) == how_updates_begin("full", on_gpu=True) == "full"


def test_a_configuration_reaches_another_process(debug_config: Make) -> None:
    for core in ("gru", "mlstm"):
        config = debug_config(core=core)
        assert pickle.loads(pickle.dumps(config)) == config


class Compiler:
    """In place of the process: done when it is asked for the tenth time."""

    def __init__(self, failed: bool):
        self.failed = failed
        self.asked = 0
        self.stopped = False

    def is_done(self) -> bool:
        self.asked += 1
        return self.asked == 10

    def has_failed(self) -> bool:
        return self.failed

    def stop(self) -> None:
        self.stopped = True


@pytest.fixture
def config(debug_config: Make, traced_regions: None) -> Config:
    """Of a run that begins uncompiled."""
    settings = ["env.parallel=false", "log.tensorboard=false", "log.every=4", "replay.prefill=32", "train.batch_size=2"]
    settings += ["train.batch_length=4", "behavior.imagination_horizon=2", "train.ratio=2", "env.amount=2"]
    config: Config = debug_config("env.name=gym_CartPole-v1", "compile=ahead", *settings)
    return dataclasses.replace(config, steps=80)


@pytest.mark.parametrize("failed", [False, True])
def test_a_run_goes_on_compiled_when_the_compiler_is_done(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], failed: bool
) -> None:
    compiler, modes = Compiler(failed), []
    monkeypatch.setattr(compile_ahead, "CompilingAhead", lambda *arguments: compiler)
    use = training.Agent.use

    def noted(agent: training.Agent, mode: Any) -> None:
        modes.append(mode)
        use(agent, mode)

    monkeypatch.setattr(training.Agent, "use", noted)
    train(config, tmp_path / "run")
    told = capsys.readouterr().err
    assert modes == ["full"]
    change = "failed in the other process; the next update compiles" if failed else "done; the next update loads it"
    assert told.index("compiling   in another process") < told.index(change)
    assert compiler.asked == 10 and not compiler.stopped
    _, losses = read_metric(tmp_path / "run", "loss/reconstruction")
    assert len(losses) > 2 and all(map(math.isfinite, losses))


def test_a_run_that_ends_before_ends_the_compiler(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiler = Compiler(failed=False)
    monkeypatch.setattr(compile_ahead, "CompilingAhead", lambda *arguments: compiler)
    train(dataclasses.replace(config, steps=6), tmp_path / "run")
    assert compiler.stopped


def test_the_process_can_be_stopped(debug_config: Make) -> None:
    ahead = CompilingAhead(OBSERVATIONS, ACTION, debug_config(), CPU)
    process = ahead._process.pid
    assert process is not None and alive(process) and not ahead.is_done()
    ahead.stop()
    assert ahead.is_done() and ahead.has_failed() and not alive(process)


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks for processes in /proc")
def test_the_process_ends_with_a_killed_run(tmp_path: Path) -> None:
    program = tmp_path / f"{uuid.uuid4()}.py"
    program.write_text("""
if __name__ == "__main__":
    import sys
    import torch
    import agent
    from agent.compile_ahead import CompilingAhead
    config = agent.resolve("gym_CartPole-v1", size="debug", device="cpu")
    env = agent.make_env(config)
    ahead = CompilingAhead(env.observation_space, env.action_space, config, torch.device("cpu"))
    print(ahead._process.pid, flush=True)
    sys.stdin.read()
""")
    environment = os.environ | {"PYTHONPATH": str(ROOT), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, program], env=environment, stdin=pipe, stdout=pipe, text=True) as main:
        assert main.stdout is not None
        process = int(main.stdout.readline())
        assert alive(process)
        main.send_signal(signal.SIGKILL)
    deadline = time.monotonic() + 60  # only of a failure
    while alive(process):
        assert time.monotonic() < deadline
        time.sleep(0.02)


class Clock:
    """Counts up whenever it is read, and can be waited for."""

    def __init__(self) -> None:
        self.now, self._read = 0, threading.Condition()

    def __call__(self) -> float:
        with self._read:
            self.now += 1
            self._read.notify_all()
            return self.now

    def wait(self, until: int) -> None:
        with self._read:
            assert self._read.wait_for(lambda: self.now >= until, timeout=60)


@pytest.fixture
def clock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Clock:
    """In place of the time; the compiler's cache is empty."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    clock = Clock()
    monkeypatch.setattr(compile_ahead, "time", SimpleNamespace(time=clock))
    return clock


def together(clock: Clock, names: list[str], fill: Callable[[str], None]) -> None:
    """Call `compile_once` for each name, side by side; nothing is filled before all have begun."""

    def fill_late(name: str) -> None:
        clock.wait(len(names))
        fill(name)

    threads = [threading.Thread(target=compile_once, args=(name, lambda name=name: fill_late(name))) for name in names]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def test_runs_that_start_together_compile_once(clock: Clock) -> None:
    filled: list[str] = []
    together(clock, ["same", "same", "same"], filled.append)
    assert filled == ["same"]
    compile_once("same", lambda: filled.append("again"))  # begins later: the cache may be another one by now
    assert filled == ["same", "again"]


def test_what_differs_is_compiled_side_by_side(clock: Clock) -> None:
    both = threading.Barrier(2, timeout=60)
    together(clock, ["one", "other"], lambda name: both.wait() and None)
    assert not both.broken


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_where_compiling_fails_the_next_one_compiles(clock: Clock) -> None:
    tries: list[str] = []

    def fail_once(name: str) -> None:
        tries.append(name)
        if len(tries) == 1:
            raise RuntimeError("no memory")

    together(clock, ["same", "same", "same"], fail_once)
    assert len(tries) == 2


def test_a_cache_that_cannot_be_written_is_no_hindrance(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "file"))
    filled: list[int] = []
    compile_once("name", lambda: filled.append(1))
    assert filled


def test_seeds_compile_the_same_and_other_settings_do_not(debug_config: Make) -> None:
    def name(*settings: str, action: gymnasium.Space[Any] = ACTION, **asked: Any) -> str:
        return what_is_compiled(OBSERVATIONS, action, debug_config(*settings, **asked), CPU)

    same = ("seed=7", "steps=99", "log.every=5", "env.amount=3", "replay.prefill=77", "checkpoint.keep=9")
    assert len({name(), *(name(setting) for setting in same)}) == 1
    others = ("optimizer.lr=1e-3", "behavior.entropy=1e-3", "heads.units=24", "precision=bf16", "train.batch_size=5")
    names = [name(), name(core="mlstm"), name(action=gymnasium.spaces.Discrete(4)), *(name(other) for other in others)]
    assert len(set(names)) == len(names)


FILL = """
import sys
if __name__ == "__main__":
    import torch
    from torch._dynamo.utils import counters
    import agent
    from agent.compile_ahead import CompilingAhead, compile_update
    config = agent.resolve("gym_CartPole-v1", size="debug", device="cpu", settings=sys.argv[1:])
    env = agent.make_env(config)
    arguments = env.observation_space, env.action_space, config, torch.device("cpu")
    ahead = CompilingAhead(*arguments)
    ahead._process.join()
    assert ahead._process.exitcode == 0
    counters.clear()
    compile_update(*arguments)
    print(counters["inductor"]["fxgraph_cache_hit"], counters["inductor"]["fxgraph_cache_miss"])
"""


@pytest.mark.slow
def test_the_run_loads_all_that_the_process_has_compiled(tmp_path: Path) -> None:
    (tmp_path / "fill.py").write_text(FILL)
    settings = ["behavior.imagination_horizon=1", "train.batch_length=4", "train.batch_size=2", "env.amount=1"]
    settings += ["heads.encoder_layers=1", "heads.decoder_layers=1", "heads.actor_layers=1", "heads.critic_layers=1"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    done = subprocess.run(
        [sys.executable, tmp_path / "fill.py", *settings], env=environment, capture_output=True, text=True, check=True
    )
    hits, misses = map(int, done.stdout.split())
    assert hits > 5 and misses == 0
