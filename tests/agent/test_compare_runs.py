"""compare_runs.py: the settings that differ, returns at the same frames, speed."""

from collections.abc import Callable
from pathlib import Path

from test_results import write_run

SCRIPT = Path(__file__).parents[2] / "scripts/compare_runs.py"
Run = Callable[..., int]


def test_settings_are_compared_over_their_seeds(run_script: Run, tmp_path: Path, capsys) -> None:  # type: ignore[no-untyped-def]
    runs = [write_run(tmp_path / f"a{seed}", seed=seed, slope=slope) for seed, slope in ((0, 9.0), (1, 11.0))]
    runs += [write_run(tmp_path / "b", "train.ratio=4", seed=0, frames=20_000, rate=80.0)]
    assert run_script(*map(str, runs), "--bins", "10000") == 0
    tables = capsys.readouterr().out.strip().split("\n\n")
    settings, returns, speed = ([line.split(" | ") for line in table.splitlines()] for table in tables)
    assert settings[0] == ["| setting", "gru debug", "gru debug train.ratio=4.0 |"]
    assert settings[2:] == [["| seed", "0, 1", "0 |"], ["| train.ratio", "8.0", "4.0 |"]]
    # Means over 1..10 and 11..20 thousand frames; t for one degree of freedom is 12.7062.
    assert returns[2] == ["| 10,000", f"55 ± {12.7062 * 5.5:.3g} (2)", "5.5 |"]
    assert returns[3] == ["| 20,000", f"155 ± {12.7062 * 15.5:.3g} (2)", "15.5 |"]
    assert len(returns) == 4, "only bins that all have reached"
    assert speed[2] == ["| updates/s", "50", "80 |"]


def test_seeds_of_one_setting_are_compared_with_each_other(run_script: Run, tmp_path: Path, capsys) -> None:  # type: ignore[no-untyped-def]
    runs = [write_run(tmp_path / f"a{seed}", seed=seed) for seed in (0, 1)]
    assert run_script(*map(str, runs)) == 0
    out = capsys.readouterr().out
    assert "| setting | a0 | a1 |" in out and "| seed | 0 | 1 |" in out
    assert "| 40,000 | " in out and "±" not in out


def test_mistakes_are_one_line(run_script: Run, tmp_path: Path, capsys) -> None:  # type: ignore[no-untyped-def]
    one, young = write_run(tmp_path / "a"), write_run(tmp_path / "b", frames=0)
    for words, message in (
        ([one], "two runs or more"),
        ([one, young, "--bins", "0"], "--bins 0"),
        ([one, tmp_path], "give the folder of a run"),
    ):
        assert run_script(*map(str, words)) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1
    assert run_script(str(one), str(young)) == 2
    assert "there is nothing to compare it with" in capsys.readouterr().err
    far = write_run(tmp_path / "c", "train.ratio=4", frames=1000)
    (far / "metrics.jsonl").write_text('{"step": 900000, "episode/return": 1.0}\n')
    assert run_script(str(one), str(far)) == 0
    assert "no bin of" in capsys.readouterr().out
