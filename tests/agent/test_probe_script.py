"""The command: what it writes, that it goes on, and how it ends on a mistake."""

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from test_probe_stack import QUICK

from agent.errors import UserError
from agent.probe import suite
from agent.probe.config import experiments, resolve
from agent.probe.report import HEADER, table

SCRIPT = Path(__file__).parents[2] / "scripts/probe_memory.py"
CORES = "mlstm:width=12:heads=2:head_dim=8,ortho_mlstm:width=12:heads=2:head_dim=8"
Run = Callable[..., int]


def words(out: Path, cores: str = CORES) -> list[str]:
    return ["--cores", cores, "--quick", "--out", str(out), "--device", "cpu", "--set", *QUICK]


def test_a_folder_with_table_numbers_and_figure(
    run_script: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_script(*words(tmp_path), "--time-alone", "1") == 0
    rows = json.loads((tmp_path / "results.json").read_text())
    assert [row["core"] for row in rows] == ["mlstm", *CORES.split(",")], "quick has mlstm beside the core"
    for row in rows:
        assert len(row["curves"]["accuracy"]) == len(row["steps"]) == 2
        assert len(row["escape_step"]) == 3
        assert row["alone_per_hour"] > 0 and row["stacked_per_hour"] > 0
    assert rows[1]["swap"].keys() == {"ortho_mlstm"} and rows[2]["swap"].keys() == {"mlstm"}
    markdown = (tmp_path / "results.md").read_text()
    assert markdown in capsys.readouterr().out
    lines = markdown.splitlines()
    assert len(lines) == 2 + len(rows)
    assert all(line.count("|") == lines[0].count("|") for line in lines)
    final = rows[1]["curves"]["accuracy"][-1]
    assert f"{sum(final) / 3:.3f} ({min(final):.3f}, {sorted(final)[1]:.3f}, {max(final):.3f})" in lines[3]
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")


def test_what_is_finished_is_reused_and_what_was_stopped_goes_on(
    run_script: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = tmp_path / "whole"
    assert run_script(*words(whole)) == 0
    real, calls = suite.run, []

    def interrupted(probe, folder, told):  # type: ignore[no-untyped-def]
        calls.append(folder)

        def tell(trainer):  # type: ignore[no-untyped-def]
            if len(calls) == 2 and trainer.step == 2:
                os.kill(os.getpid(), signal.SIGINT)
            return told(trainer)

        return real(probe, folder, tell)

    monkeypatch.setattr(suite, "run", interrupted)
    handler = signal.getsignal(signal.SIGINT)
    parts = tmp_path / "parts"
    assert run_script(*words(parts)) == 128 + signal.SIGINT
    assert "the same command goes on" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGINT) is handler
    assert len(json.loads((parts / "results.json").read_text())) == 1
    assert run_script(*words(parts)) == 0
    assert len(calls) == 4, "the first experiment was not run again"
    ours, theirs = (json.loads((folder / "results.json").read_text()) for folder in (parts, whole))
    assert [row["curves"] for row in ours] == [row["curves"] for row in theirs]


def test_a_folder_of_another_configuration_is_left_alone(
    run_script: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_script(*words(tmp_path)) == 0
    before = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
    capsys.readouterr()
    assert run_script(*words(tmp_path), "training.beta2=0.9") == 2
    message = capsys.readouterr().err
    assert "training.beta2 0.999, and now it is 0.9" in message and message.count("\n") == 1
    assert run_script(*words(tmp_path), "compute.tokens_at_once=50") == 0
    assert {file: file.read_bytes() for file in before} == before


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--core", "mlstn"], "the nearest is mlstm"),
        (["--core", "mlstm:head_dims=8"], "the nearest is core.head_dim"),
        (["--core", "mlstm:heads"], "key=value"),
        (["--core", "mlstm,mlstm"], "twice"),
        (["--preset", "source_v96"], "the nearest is source_v96_"),
        (["--quick", "--preset", "source"], "leave out one"),
        (["--vocab", "33"], "vocab 33"),
        (["--noise", "1.5"], "task.noise: 1.5 is not allowed"),
        (["--steps", "many"], 'training.steps: "many" is not allowed'),
        (["--lr", "-1"], "training.lr: -1"),
        (["--schedule", "linear"], "training.schedule"),
        (["--set", "training.step=3"], "the nearest is training.steps"),
        (["--set", "size=large"], "size"),
        (["--time-alone", "-1"], "--time-alone -1"),
        (["--device", "cuda"], "cuda"),
    ],
)
def test_a_mistake_is_one_line_and_status_2(
    run_script: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str], given: list[str], message: str
) -> None:
    if given == ["--device", "cuda"] and torch.cuda.is_available():
        pytest.skip("there is one")
    assert run_script(*given, "--out", str(tmp_path / "out")) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_too_little_memory_is_told_with_the_key_that_helps(
    run_script: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: object) -> None:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(suite, "run", full)
    assert run_script(*words(tmp_path)) == 2
    assert "lower compute.tokens_at_once, now 600000" in capsys.readouterr().err


def test_presets_say_what_the_source_did() -> None:
    found = experiments(["mlstm", "ortho_mlstm"], ["source"], [], [], {})
    tasks = [(each.probe.task.vocab, each.probe.task.length) for each in found]
    assert tasks == [(80, 512)] * 2 + [(96, 768)] * 2 + [(96, 1024)] * 2
    for each in found:
        task, training, core = each.probe.task, each.probe.training, each.probe.core
        assert (task.noise, task.noise_vocab, training.batch, training.steps) == (0.8, 16, 64, 2000)
        assert (training.lr, training.weight_decay, training.clip, training.schedule) == (3e-3, 0.01, 1.0, "cosine")
        assert (core.blocks, core.heads, core.conv, core.unit_norm, training.warmup) == (1, 4, 4, False, 0)
    ladder = experiments(["mlstm"], ["capacity"], [], [], {})
    assert [(each.probe.task.vocab - 16) // 2 for each in ladder] == [32, 64, 128, 256]


def test_what_is_said_last_counts() -> None:
    probe = resolve(
        "ortho_mlstm:head_dim=8", "source_v80_512", ["core.head_dim=16", "core.heads=2", "task.length=64"],
        {"task.length": 32, "task.vocab": None},
    )  # fmt: skip
    assert (probe.core.head_dim, probe.core.heads, probe.core.map_steps) == (8, 2, 5)
    assert (probe.task.length, probe.task.vocab) == (32, 80)


def test_every_core_with_probe_sizes_has_all_of_them() -> None:
    for core in ("mlstm", "ortho_mlstm", "mesa", "attention", "gru"):
        for preset in ("source_v96_1024", "mad_base", "capacity_64", "quick"):
            assert resolve(core, preset, [], {}).core_name == core


def test_an_unwritable_folder_is_a_mistake(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    found = experiments(["mlstm"], ["quick"], [], QUICK, {})
    with pytest.raises(UserError, match="choose another --out"):
        suite.run_suite(found, tmp_path / "file", 0, print)


def test_the_table_leaves_out_what_nobody_has() -> None:
    row = {
        "preset": "quick", "core": "gru",
        "config": {"task": {"name": "noisy_recall", "noise": 0.2}, "training": {"lr": 0.1, "steps": 10}},
        "curves": {"accuracy": [[0.5, 0.9]], "macro_accuracy": [[0.5, 0.9]]},
        "floors": {"chance": 0.1, "bag": 0.2}, "escape_step": [None, 5], "solved": 1, "swap": {}, "parameters": 1000,
        "state_numbers": 16, "seconds": 1.0, "seeds_per_hour": 7.0,
    }  # fmt: skip
    header, _, line = table([row]).splitlines()
    assert "effective rank" not in header and "stacked" not in header
    assert "| 0.700 (0.500, 0.700, 0.900) |" in line and "| 0.200, -, 0.100 |" in line and "| 1, 5 |" in line
    assert header.count("|") == line.count("|") < len(HEADER) + 1
