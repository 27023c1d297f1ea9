"""A suite of probes: what it writes, that it goes on, its statistics, and how it ends on a mistake."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from agent.agent import Agent
from agent.environment import make_env
from agent.intervals import interval, t_quantile
from agent.memory.config import default_evaluation, load_suite, suite_names
from agent.memory.scoring import _interpolate, _learning

SCRIPT = Path(__file__).parents[2] / "scripts/evaluate_memory.py"
TINY = [
    "--suite",
    "quick",
    "--cores",
    "gru,mlstm",
    "--seeds",
    "1",
    "--steps",
    "640",
    "--parallel",
    "1",
    "--device",
    "cpu",
]
SETTINGS = [
    "--set", "train.batch_size=2", "train.batch_length=8", "heads.units=8", "rssm.classes=4", "train.ratio=4",
    "replay.prefill=320", "log.every=100",
]  # fmt: skip
Run = Callable[..., int]


def test_a_suite_is_trained_evaluated_and_reused(
    run_script: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_script(*TINY, "--out", str(tmp_path), *SETTINGS) == 0
    rows = json.loads((tmp_path / "results.json").read_text())
    assert [row["core"] for row in rows] == ["gru", "mlstm"]
    for row in rows:
        (result,) = row["results"]
        assert result["updates"] > 0
        assert set(result["gaps"]) == {"1", "2", "4"}
        assert all(-1 <= gap["value"] <= 1 for gap in result["gaps"].values())
    table = (tmp_path / "results.md").read_text()
    assert "| noisy_recall | gru |" in table
    assert (tmp_path / "figure.png").stat().st_size > 1000
    capsys.readouterr()

    metrics = tmp_path / "noisy_recall-gru-seed0" / "metrics.jsonl"
    before = metrics.stat().st_mtime_ns
    assert run_script(*TINY, "--out", str(tmp_path), *SETTINGS) == 0
    assert capsys.readouterr().out.count("(finished before)") == 2
    assert metrics.stat().st_mtime_ns == before
    assert (tmp_path / "results.md").read_text() == table

    assert run_script("--logdir", str(tmp_path / "noisy_recall-gru-seed0"), "--device", "cpu") == 0
    assert json.loads(capsys.readouterr().out)["gaps"] == rows[0]["results"][0]["gaps"]


@pytest.mark.parametrize("name", suite_names())
def test_every_suite_resolves_and_gives_each_run_a_seed_of_its_own(name: str) -> None:
    suite = load_suite(name, device="cpu")
    assert len({run.name for run in suite.runs}) == len(suite.runs)
    for run in suite.runs:
        assert run.name.endswith(f"seed{run.config.seed}")
        assert run.config.core.name == run.core
        assert run.config.env.name.startswith("probe_")


@pytest.mark.parametrize("name", suite_names())
def test_the_cores_of_a_suite_are_compared_at_equal_parameters(name: str) -> None:
    of_core = {run.core: run.config for run in load_suite(name, seeds=1, device="cpu").runs}  # on the last probe
    counts = {}
    for core, config in of_core.items():
        env = make_env(config)
        agent = Agent(env.observation_space, env.action_space, config, torch.device("cpu"))
        counts[core] = sum(agent.learner.parameter_counts().values())
        env.close()
    assert len(counts) >= 3
    assert max(counts.values()) < 1.1 * min(counts.values()), counts


@pytest.mark.parametrize(
    ("freedom", "t"), [(1, 12.7062), (2, 4.30265), (3, 3.18245), (4, 2.77645), (9, 2.26216), (30, 2.04227)]
)
def test_quantiles_are_those_of_the_table(freedom: int, t: float) -> None:
    assert t_quantile(freedom) == pytest.approx(t, rel=1e-5)


def test_interval_of_a_mean() -> None:
    assert interval([0.5]) is None
    assert interval([1.0, 2.0, 3.0]) == pytest.approx(4.30265 / 3**0.5, rel=1e-5)


def test_the_first_time_at_the_bar_is_told_in_frames_and_updates(tmp_path: Path) -> None:
    evaluation = default_evaluation()
    window = evaluation.window
    lines = [{"step": 100, "episode/score": 0.0}] * window
    lines += [{"step": 200 + i, "episode/score": 1.0} for i in range(window)]
    lines += [{"step": 0, "updates": 0}, {"step": 400, "updates": 100}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = _learning(tmp_path, evaluation)
    # The mean of a window is at the bar when that share of it are the episodes with score 1.
    frames = 200 + round(evaluation.reached * window) - 1
    assert found["reached"] == {"frames": frames, "updates": round(frames / 4)}
    assert found["curve"][0] == [100, 0.0]
    assert found["curve"][-1] == [200 + window - 1, 1.0]


def test_between_points_lines_are_straight() -> None:
    points = [(10, 0.0), (20, 10.0), (40, 20.0)]
    assert [_interpolate(points, at) for at in (5, 10, 15, 30, 40, 99)] == [0, 0, 5, 15, 20, 20]


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--suite", "quik"], "quick"),
        (["--cores", "gru,abacus"], "abacus"),
        (["--probes", "chess"], "chess"),
        (["--seeds", "0"], "seeds"),
        (["--cores", "gru,gru"], "asked for twice"),
        (["--logdir", "nowhere"], "nowhere"),
        (["--logdir", "nowhere", "--suite", "quick"], "--suite"),
    ],
)
def test_mistakes_are_one_line(
    words: list[str], named: str, run_script: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    assert run_script(*words, *([] if "--logdir" in words else ["--device", "cpu"])) == 2
    message = capsys.readouterr().err
    assert named in message
    assert len(message.strip().splitlines()) == 1
    assert not list(tmp_path.iterdir())
