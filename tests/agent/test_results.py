"""Runs read for plots and tables: which belong together, what they are called, and what the two scripts say of them."""

import csv
import json
import statistics
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from agent.config import dump, resolve
from agent.errors import UserError
from agent.learning_curves import LABEL_WIDTH, band, in_lines
from agent.published import normalised, read_published, read_scales
from agent.results import bin_width, gather, read_metric, read_runs

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "scripts/plot_runs.py"
PUBLISHED = ROOT / "docs/results/published"
Run = Callable[..., int]


def write_run(
    logdir: Path, *settings: str, env: str = "dmc_walker", core: str = "gru", seed: int = 0, slope: float = 1.0,
    frames: int = 40_000, rate: float = 50.0, **flags: object,
) -> Path:  # fmt: skip
    """A run whose return is `slope` for each 1000 frames, told every 1000."""
    logdir.mkdir()
    flags = {"device": "cpu"} | flags
    config = resolve(env, core, "debug", seed=seed, settings=settings, **flags)  # type: ignore[arg-type]
    (logdir / "config.yaml").write_text(dump(config))
    lines = [{"step": step, "episode/return": slope * step / 1000} for step in range(1000, frames + 1, 1000)]
    lines += [{"step": frames, "time/updates_per_second": rate}]
    (logdir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return logdir


def names(*logdirs: Path) -> dict[str, list[str]]:
    settings = gather(read_runs(logdirs, "episode/return", print))
    return {f"{setting.task} {setting.name}": [run.logdir.name for run in setting.runs] for setting in settings}


def test_a_metric_is_read_while_the_run_writes(tmp_path: Path) -> None:
    logdir = write_run(tmp_path / "run", frames=3000)
    with (logdir / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4000, "episode/ret')
    frames, values = read_metric(logdir)
    assert (frames.tolist(), values.tolist()) == ([1000, 2000, 3000], [1.0, 2.0, 3.0])
    assert read_metric(logdir, "time/updates_per_second")[1].tolist() == [50.0]
    assert len(read_metric(logdir, "absent")[0]) == 0
    with pytest.raises(UserError, match=r"metrics\.jsonl cannot be read"):
        read_metric(tmp_path)
    (logdir / "metrics.jsonl").write_text("{]\n")
    with pytest.raises(UserError, match="damaged"):
        read_metric(logdir)


def test_seeds_of_one_setting_are_one_whatever_may_change_on_resume(tmp_path: Path) -> None:
    one = write_run(tmp_path / "a", seed=0, steps=1000)
    other = write_run(tmp_path / "b", "log.every=50", seed=1, steps=2000, device="auto")
    assert names(one, other) == {"dmc_walker_walk gru debug": ["a", "b"]}


def test_settings_of_one_core_and_size_are_called_by_what_was_chosen_and_is_not_shared(tmp_path: Path) -> None:
    shared = "train.ratio=4"
    runs = [
        write_run(tmp_path / "a", shared),
        write_run(tmp_path / "b", shared, "optimizer.lr=1e-3"),
        write_run(tmp_path / "c", shared, core="mlstm"),
        write_run(tmp_path / "d", shared, "core.conv=2", "rssm.posterior=recurrent", core="mlstm"),
        write_run(tmp_path / "e", "rssm.unimix=0.02", core="attention"),
        write_run(tmp_path / "f", env="dmc_cheetah_run"),
    ]
    assert list(names(*runs)) == [
        "dmc_walker_walk gru debug",
        "dmc_walker_walk gru debug optimizer.lr=0.001",
        "dmc_walker_walk mlstm debug",
        "dmc_walker_walk mlstm debug core.conv=2 rssm.posterior=recurrent",
        "dmc_walker_walk attention debug",
        "dmc_cheetah_run gru debug",
    ]


def test_runs_whose_configuration_no_longer_resolves_keep_names_of_their_own(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / name, f"train.ratio={ratio}") for name, ratio in (("a", 4), ("b", 8))]
    for run in runs:
        file = run / "config.yaml"
        file.write_text(file.read_text().replace("name: gru", "name: bygone"))
    assert list(names(*runs)) == ["dmc_walker_walk bygone debug", "dmc_walker_walk bygone debug (b)"]


def test_bins_end_at_their_edge(tmp_path: Path) -> None:
    (run,) = read_runs([write_run(tmp_path / "a", frames=5000)], "episode/return", print)
    assert run.binned(2000) == {2000: 1.5, 4000: 3.5, 6000: 5.0}


@pytest.mark.parametrize(
    ("frames", "width"), [(210_000, 20_000), (100_000, 10_000), (99_000, 5000), (55, 5), (3, 1), (2_000, 200)]
)
def test_the_width_of_bins_is_round(frames: int, width: int) -> None:
    assert bin_width(frames, 10) == width


def test_the_table_the_csv_and_the_figure(run_script: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = [write_run(tmp_path / f"gru{seed}", seed=seed, slope=slope) for seed, slope in ((0, 9.0), (1, 11.0))]
    runs += [write_run(tmp_path / "mlstm", core="mlstm", frames=30_000)]
    runs += [write_run(tmp_path / "cheetah", env="dmc_cheetah_run")]
    target = tmp_path / "curves.csv"
    assert run_script(*map(str, runs), "--csv", str(target), "--figure", str(tmp_path / "curves.png")) == 0
    with target.open() as file:
        rows = [row for row in csv.DictReader(file) if row["setting"] == "gru debug" and "walker" in row["task"]]
    assert [int(row["frames"]) for row in rows] == [10_000, 20_000, 30_000, 40_000]
    # Bins hold the mean of 21..30 thousand frames; t for one degree of freedom is 12.7062.
    mean, half = 25.5 * 10, 12.7062 * 25.5
    assert float(rows[2]["mean"]) == pytest.approx(mean)
    assert float(rows[2]["interval"]) == pytest.approx(half, rel=1e-3)
    assert rows[2]["runs"] == "2"
    published = read_published(PUBLISHED)["dmc_walker_walk"]
    theirs = float(published.mean[published.frames == 30_000][0])
    out = capsys.readouterr().out
    expected = (
        f"| dmc_walker_walk | gru debug | 2 | 20,000-30,000 | 255 ± 324 | 0.255 | {theirs:.4g} | {mean / theirs:.2f} |"
    )
    assert expected in out
    assert f"| 2 tasks | gru debug | - | - | - | mean {(0.255 + 0.0355) / 2:.3f}, median" in out
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_a_long_label_has_lines_of_whole_words() -> None:
    words = ["mlstm", "debug", "core.head_dim=32", "rssm.read_after_observation=true", "optimizer.behavior_lr=0.001"]
    lines = in_lines(" ".join(words)).split("\n")
    assert len(lines) > 1
    assert max(map(len, lines)) <= LABEL_WIDTH
    assert " ".join(lines).split() == words


@pytest.mark.parametrize(
    ("values", "amount", "low", "high"),
    [
        ([2.0, 8.0], 2, 2.0, 8.0),
        ([3.0], 2, 3.0, 3.0),  # where one of two has ended
        ([3.0], 5, 3.0, 3.0),
        ([1.0, 2.0, 3.0], 3, 2 - 4.30265 / 3**0.5, 2 + 4.30265 / 3**0.5),  # t for two degrees of freedom, deviation 1
        ([1.0, 3.0], 3, 2 - 12.7062, 2 + 12.7062),
    ],
)
def test_two_runs_are_shaded_between_them_and_more_by_their_interval(
    values: list[float], amount: int, low: float, high: float
) -> None:
    assert band(values, amount) == pytest.approx((low, high), rel=1e-4)


def test_a_run_without_the_metric_is_left_out(run_script: Run, tmp_path: Path, capsys) -> None:  # type: ignore[no-untyped-def]
    runs = [write_run(tmp_path / "old"), write_run(tmp_path / "new", frames=0)]
    assert run_script(*map(str, runs)) == 0
    assert "new: no episode/return yet; left out" in capsys.readouterr().err
    assert run_script(str(runs[0]), "--metric", "episode/score") == 2
    assert "none of these runs has episode/score yet" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["absent"], "give the folder of a run"),
        (["run", "--bins", "0"], "--bins 0"),
        (["run", "--figure", "absent/curves.png"], "--figure absent/curves.png: give a file in a folder that exists"),
        (["run", "--figure", "curves.xyz"], "--figure curves.xyz: give a file that ends in"),
        (["run", "--csv", "absent/curves.csv"], "--csv absent/curves.csv: give a file in a folder that exists"),
        (["run", "run"], "run is given twice"),
        (["run", "--published", "absent.csv"], "absent.csv: cannot be read"),
        (["run", "--published", "broken"], "it needs the columns task, frames, mean, min, max"),
    ],
)
def test_a_mistake_is_one_line(
    run_script: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    words: list[str], message: str,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    write_run(tmp_path / "run", frames=3000)
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "a.csv").write_text("task,frames,mean\nx,1,2\n")
    assert run_script(*words) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_the_scales_give_the_published_mean_and_median_of_atari() -> None:
    """1.247 and 0.494 human-normalised at 400,000 frames are what the article's data give."""
    curves, scales = read_published(PUBLISHED), read_scales(PUBLISHED)
    games = [task for task in curves if task.startswith("atari_")]
    scores = [normalised(task, float(curves[task].mean[-1]), scales) for task in games]
    assert len(games) == 26
    assert statistics.mean(scores) == pytest.approx(1.247, abs=1e-3)  # type: ignore[type-var]
    assert statistics.median(scores) == pytest.approx(0.494, abs=1e-3)  # type: ignore[type-var]
    assert normalised("dmc_walker_walk_vision", 250.0, scales) == 0.25
    assert normalised("gym_CartPole-v1", 250.0, scales) is None


def test_published_curves_are_known_by_the_names_of_environments() -> None:
    curves = read_published(PUBLISHED)
    at = {task: curves[task].at(frames) for task, frames in (("dmc_walker_walk", 100_000), ("dmc_finger_spin", 2e5))}
    assert at == {"dmc_walker_walk": pytest.approx(475.2, abs=1), "dmc_finger_spin": pytest.approx(855, abs=30)}
    assert curves["dmc_walker_walk_vision"].at(15_000) == pytest.approx(
        np.mean(curves["dmc_walker_walk_vision"].mean[:2])
    )
    assert curves["dmc_walker_walk"].at(600_000) is None
