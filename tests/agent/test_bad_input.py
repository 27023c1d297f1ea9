"""Every mistake gets one line that names it and says what to do, exit status 2, and changes nothing on disk."""

import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
from bad_inputs import TABLE, Bad
from test_resume import NEVER, small_config

from agent.training import train

SCRIPTS = Path(__file__).parents[2] / "scripts"
SCRIPT = SCRIPTS / "train_agent.py"  # run_script runs this, and the test sets it
SAME = "log.tensorboard=false log.every=20 env.amount=2 env.parallel=false replay.prefill=32"
SAME += " behavior.imagination_horizon=2 train.ratio=4"


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A short run of Chase in which episodes have ended."""
    logdir = tmp_path_factory.mktemp("finished") / "run"
    train(small_config(80, NEVER), logdir)
    return logdir


def content(folder: Path) -> dict[str, bytes | None]:
    return {str(path): path.read_bytes() if path.is_file() else None for path in sorted(folder.rglob("*"))}


def test_the_table_is_large_and_every_script_is_in_it() -> None:
    assert len(TABLE) >= 60
    assert {bad.script for bad in TABLE} == {path.stem for path in SCRIPTS.glob("*.py")}


@pytest.mark.parametrize("bad", TABLE, ids=lambda bad: f"{bad.script} {bad.words} {' '.join(bad.files)}"[:80])
def test_every_mistake_gets_one_line_that_says_what_to_do(
    bad: Bad,
    finished: Path,
    run_script: Callable[..., int],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    here, run, file = tmp_path / "here", tmp_path / "run", tmp_path / "file"
    here.mkdir()
    file.write_text("word")
    if "{run}" in bad.words:
        shutil.copytree(finished, run)
    (tmp_path / "temporary").mkdir()
    places = {"here": str(here), "run": str(run), "file": str(file), "same": SAME}
    for name, text in bad.files.items():
        pattern = name.format(**places).removeprefix(str(tmp_path) + "/")
        base, pattern = (tmp_path, pattern) if name.startswith("{run}") else (here, pattern)
        for path in list(base.glob(pattern)) or [base / pattern]:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.unlink(missing_ok=True)
            if text is not None:
                path.write_bytes(text if isinstance(text, bytes) else text.encode())
    for package in bad.hidden:
        monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    if bad.script == "fault_test":  # others start processes, which keep something there for as long as they live
        monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    monkeypatch.setattr(sys.modules[__name__], "SCRIPT", SCRIPTS / f"{bad.script}.py")
    monkeypatch.chdir(here)
    before = content(tmp_path)

    status = run_script(*bad.words.format(**places).split())

    out, err = capsys.readouterr()
    lines = err.splitlines()
    assert status == 2, (out, err)
    assert len(lines) == 1 and lines[0].startswith(f"{bad.script}.py: "), err
    assert "Traceback" not in out
    for words in bad.says:
        assert words.format(**places) in lines[0], lines[0]
    assert content(tmp_path) == before
