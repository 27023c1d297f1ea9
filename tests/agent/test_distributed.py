"""Two processes that train one agent do what one does with the joint batch, and end together, in words."""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import two_ranks
from test_finite import flat
from test_resume import CHASE, NEVER, assert_same, lines, small_config

from agent import checkpoint, replay_files
from agent.dealing import deal, parts
from agent.distributed import ALONE, Ranks
from agent.errors import UserError
from agent.replay_files import ReplayFiles, names
from agent.training import train
from envs.streams import Streams

ROOT = Path(__file__).parents[2]
LAUNCH = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
ENVIRONMENT = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests' / 'agent'}", "OMP_NUM_THREADS": "1"}
ROUNDING = 3e-5
"""What fp32 may do in three updates, as a share of a tensor's largest number. The same sums in another order came to
1.01e-5 on an AMD EPYC, for a bias whose gradient is a sum of terms that cancel, and to less than 1e-5 on Intel's; a
rank that takes its own gradient for the mean comes to 9.7."""
PATIENCE = 120  # seconds, on a machine that does much else


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder that two_ranks.py has filled, and what it told."""
    folder = tmp_path_factory.mktemp("two")
    command = [*LAUNCH, "tests/agent/two_ranks.py", str(folder)]
    result = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=PATIENCE)
    return folder, result.stderr


def found(folder: Path) -> list[dict[str, Any]]:
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in (0, 1)]


def saved(logdir: Path) -> dict[str, Any]:
    path = checkpoint.latest(logdir / "checkpoints")
    assert path is not None
    return checkpoint.load(path)


# ---- the update --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("core", two_ranks.ACTIONS)
def test_an_update_of_two_ranks_is_that_of_the_joint_batch(core: str, both: tuple[Path, str]) -> None:
    """Weights, slow critic, both of the optimizer's averages, normaliser, latents and metrics, after three updates."""
    expected = two_ranks.results(*two_ranks.learn(core, ALONE))
    ours = flat(expected["agent"])
    assert expected["agent"]["normalizer"]["high"] - expected["agent"]["normalizer"]["low"] > 10  # it divides
    for rank, result in enumerate(found(both[0])):
        theirs = flat(result[core]["agent"])
        assert ours.keys() == theirs.keys() and len(ours) > 100
        for key in ours:
            largest = float(ours[key].abs().max()) if ours[key].is_floating_point() else 0.0
            if not key.startswith("/means/"):
                torch.testing.assert_close(theirs[key], ours[key], rtol=0, atol=ROUNDING * largest, msg=f"{rank} {key}")
        for key, latents in result[core]["latents"].items():
            torch.testing.assert_close(latents[0], expected["latents"][key][rank], rtol=1e-5, atol=1e-5)
        assert result[core]["metrics"].keys() == expected["metrics"].keys()
        for key, value in expected["metrics"].items():
            assert result[core]["metrics"][key] == pytest.approx(value, rel=1e-4, abs=1e-6), key


@pytest.mark.parametrize("core", two_ranks.ACTIONS)
def test_ranks_have_the_same_weights_bit_for_bit(core: str, both: tuple[Path, str]) -> None:
    one, other = ({k: v for k, v in r[core]["agent"].items() if k != "means"} for r in found(both[0]))
    assert_same(flat(one), flat(other))


def test_what_is_not_finite_on_one_rank_skips_the_update_on_both(both: tuple[Path, str]) -> None:
    one, other = (result["skip"] for result in found(both[0]))
    assert one == other
    assert one["same"] and one["skipped"] == 1 and one["in_a_row"] == 1
    assert one["told"].startswith("not finite at 7 frames: row/reward") and "of rank 1; 1 updates" in one["told"]
    (batch,) = (both[0] / "not_finite").glob("*.pt")
    assert checkpoint.load(batch)["batch"]["row/reward"].isnan().any() and str(batch) in one["told"]


# ---- the run -----------------------------------------------------------------------------------------------


def test_two_ranks_that_are_stopped_go_on_as_if_they_had_never_been(both: tuple[Path, str]) -> None:
    folder, _ = both
    whole, resumed = saved(folder / "whole"), saved(folder / "resumed")
    assert lines(folder / "resumed") == lines(folder / "whole")
    assert sum("episode/return" in line for line in lines(folder / "whole")) == 4
    assert whole["rows"] == 80 and len(parts(whole)) == 2
    assert_same(whole["agent"], resumed["agent"])
    for one, other in zip(parts(whole), parts(resumed), strict=True):
        for key in ("carry", "streams", "random", "means"):
            assert_same(one[key], other[key], key)
        files = [(folder / run / "checkpoints" / "replay") for run in ("whole", "resumed")]
        for a, b in zip(names(one["replay"]), names(other["replay"]), strict=True):
            assert_same(checkpoint.load(files[0] / a), checkpoint.load(files[1] / b))
    first, second = (part["streams"]["row"]["observation"] for part in parts(whole))
    assert not torch.equal(first, second)
    assert not torch.equal(*(part["random"]["torch"] for part in parts(whole)))


def test_environments_are_those_that_one_process_has(both: tuple[Path, str]) -> None:
    seed = int(np.random.SeedSequence([0, 0]).generate_state(1)[0] // 2)
    streams = Streams(CHASE, 2, parallel=False, seed=seed)
    expected = streams.reset()["observation"]
    streams.close()
    files = both[0] / "whole" / "checkpoints" / "replay"
    for rank, part in enumerate(parts(saved(both[0] / "whole"))):
        replay = checkpoint.load(files / part["replay"]["latest"])
        assert replay["streams"] == 1
        assert torch.equal(replay["tensors"]["observation"][0, 0], torch.from_numpy(expected[rank]))


def test_where_one_rank_fails_all_save_and_one_line_says_which_and_why(both: tuple[Path, str]) -> None:
    folder, told = both
    (line,) = [line for line in told.splitlines() if line.startswith("two_ranks.py: ")]
    assert line.startswith("two_ranks.py: rank ") and "holds NaN" in line and "env.restarts=2 is used up" in line
    state = saved(folder / "faulty")
    files = ReplayFiles(folder / "faulty" / "checkpoints" / "replay")
    for part in parts(state):
        files.verify(part["replay"])
    assert [part["streams"]["row"] is None for part in parts(state)].count(True) == 1
    assert max(part["streams"]["restarts"] for part in parts(state)) == 2


@contextlib.contextmanager
def two_processes(logdir: Path, *settings: str) -> Iterator[subprocess.Popen[str]]:
    """A run of two ranks, as the command line starts it, that would go on for long."""
    values = ["log.tensorboard=false", "log.every=20", "env.amount=2", "env.parallel=false", "replay.prefill=32"]
    values += ["behavior.imagination_horizon=2", "train.ratio=4", *settings]
    command = [*LAUNCH, "scripts/train_agent.py", "--env", CHASE, "--size", "debug", "--device", "cpu"]
    command += ["--steps", "100000", "--logdir", str(logdir), "--set", *values]
    process = subprocess.Popen(command, cwd=ROOT, env=ENVIRONMENT, stderr=subprocess.PIPE, text=True)
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.terminate()
        process.communicate()


def of_rank(launcher: int, rank: int) -> int:
    """The process of a rank."""
    children = Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split()
    (pid,) = [pid for pid in children if f"RANK={rank}" in Path(f"/proc/{pid}/environ").read_text().split("\0")]
    return int(pid)


def wait_for_frames(logdir: Path, frames: int) -> None:
    """Until a checkpoint of more than so many frames is there."""
    deadline = time.monotonic() + PATIENCE
    while not any(int(path.stem.split("_")[1]) > frames for path in (logdir / "checkpoints").glob("step_*.pt")):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_killed_rank_ends_the_job_and_one_process_goes_on_from_its_checkpoint(
    both: tuple[Path, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    logdir = tmp_path / "run"
    shutil.copytree(both[0] / "resumed", logdir)
    with two_processes(logdir, "checkpoint.minutes=0.01") as process:
        wait_for_frames(logdir, 160)
        os.kill(of_rank(process.pid, 1), signal.SIGKILL)
        _, told = process.communicate(timeout=PATIENCE)
    assert process.returncode == 1
    (line,) = [line for line in told.splitlines() if line.startswith("train_agent.py: ")]
    assert line.startswith("train_agent.py: rank 1 of 2 died without a word")
    assert sum("resumed     step_000000000160" in line for line in told.splitlines()) == 1  # the first rank's

    state, files = saved(logdir), ReplayFiles(logdir / "checkpoints" / "replay")
    rows, before = state["rows"], parts(state)
    held = [checkpoint.load(files.directory / part["replay"]["latest"])["tensors"] for part in before]
    observations = torch.cat([tensors["observation"][:, :rows] for tensors in held]).clone()
    places = torch.cat([part["streams"]["row"]["observation"] for part in before]).clone()
    capsys.readouterr()
    train(small_config(2 * rows + 40, NEVER), logdir)
    told = capsys.readouterr().err
    assert "written by 2 ranks, not 1" in told and "cut  " not in told
    alone = saved(logdir)
    (latest,) = names(alone["replay"])
    tensors = checkpoint.load(files.directory / latest)["tensors"]
    assert len(parts(alone)) == 1 and alone["rows"] == rows + 20
    assert torch.equal(tensors["observation"][:, :rows], observations)
    assert torch.equal(tensors["observation"][:, rows], places)  # the row that came next before
    steps = [line["step"] for line in lines(logdir)]
    assert steps == sorted(steps)
    assert alone["agent"]["updates"] > state["agent"]["updates"]


def test_ranks_whose_launcher_is_killed_agree_on_a_step_save_and_stop(both: tuple[Path, str], tmp_path: Path) -> None:
    logdir = tmp_path / "run"
    shutil.copytree(both[0] / "resumed", logdir)
    with two_processes(logdir, NEVER) as process:
        deadline = time.monotonic() + PATIENCE
        while lines(logdir)[-1]["step"] <= 180:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        process.kill()
        _, told = process.communicate(timeout=PATIENCE)  # the ranks have its end of the pipe, too
    assert sum(line.startswith("stopped by SIGTERM") for line in told.splitlines()) == 1
    assert saved(logdir)["rows"] * 2 >= 180 and len(parts(saved(logdir))) == 2


# ---- dealing out -------------------------------------------------------------------------------------------


def test_replay_is_dealt_out_to_other_ranks_and_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replay_files, "CHUNK", 10)
    agent = two_ranks.make_agent("gru", ALONE)
    joint = two_ranks.joint_replay(agent)
    joint.discard(1, 6)
    expected = {key: value for key, value in joint.state_dict().items() if key != "random"}
    assert len(expected["queue"]) == 7  # without the last window of stream 1
    needed = [ReplayFiles(tmp_path / "one").write(joint, 0)]
    halves = [two_ranks.make_replay(agent, 1) for _ in range(2)]
    for rank, half in enumerate(halves):
        files = ReplayFiles(tmp_path / "one", rank)
        files.load_dealt(needed, half, rank, seed=rank)
        needed_of_halves = files.write(half, 1)
        assert len(needed_of_halves["chunks"]) == 4
        assert half.state_dict()["streams"] == 1
        needed.append(needed_of_halves)
    again = two_ranks.make_replay(agent, 2)
    ReplayFiles(tmp_path / "one").load_dealt(needed[1:], again, 0, seed=5)
    assert_same({key: value for key, value in again.state_dict().items() if key != "random"}, expected)
    assert halves[1].state_dict()["discarded"] == [(0, 34, 40)] and halves[0].state_dict()["discarded"] == []
    draws = [half.sample(32)[1] for half in halves]
    assert not torch.equal(*draws)


def test_running_episodes_are_dealt_out_as_they_are() -> None:
    def part(first: int, amount: int, lost: bool = False) -> dict[str, Any]:
        places = torch.arange(first, first + amount)
        carry = {"state": {"h": places[:, None].float()}, "z": places[:, None, None], "action": places[:, None]}
        streams = {key: places.tolist() for key in ("episodes", "returns", "lengths")}
        streams |= {"actions": [torch.full((n,), n) for n in places.tolist()], "restarts": first}
        return {"carry": carry, "streams": streams | {"row": None if lost else {"reward": places.float()}}}

    for size in (1, 2, 3, 6):
        dealt = [deal([part(0, 2), part(2, 2), part(4, 2)], range(r, r + 6 // size)) for r in range(0, 6, 6 // size)]
        for first, given in zip(range(0, 6, 6 // size), dealt, strict=True):
            expected = part(first, 6 // size)
            expected["streams"]["restarts"] = 4
            assert_same(given, expected)
    lost = deal([part(0, 2), part(2, 2, lost=True)], range(4))["streams"]
    assert lost["row"] is None and lost["episodes"] == [0, 1, 2, 3]


def test_what_cannot_be_divided_is_named() -> None:
    assert Ranks(1, 4).share(8, "env.amount") == 2
    with pytest.raises(UserError, match="train.batch_size: 16 cannot be divided over 3 ranks; make it a multiple of 3"):
        Ranks(0, 3).share(16, "train.batch_size")


def test_alone_nothing_is_done() -> None:
    values = [torch.tensor([1.0, 2.0]), torch.tensor(3.0)]
    assert ALONE.mean(values) is values and ALONE.joined(values[0]) is values[0] and ALONE.all(values[1]) is values[1]
    assert ALONE.gather("it") == ["it"] and ALONE.highest(3, True) == [3, 1] and ALONE.seed(7) == 7
    with pytest.raises(UserError, match="as it was"), ALONE.ending_together():
        raise UserError("as it was")
