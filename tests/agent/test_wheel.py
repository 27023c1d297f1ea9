"""The wheel: what it installs runs outside of the checkout, with its configurations and by the commands' names."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from agent.config import CONFIGS

ROOT = Path(__file__).parents[2]
COMMANDS = ("train-agent", "evaluate-agent", "view-agent", "probe-memory", "evaluate-memory")


def pip(*words: str) -> None:
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet", *words]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder into which the wheel of a copy of the sources was installed."""
    work = tmp_path_factory.mktemp("wheel")
    sources = work / "sources"
    sources.mkdir()  # a build leaves its traces beside the sources, so that it gets its own
    for name in ("agent", "configs", "envs", "scripts"):
        shutil.copytree(ROOT / name, sources / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, sources)
    pip("wheel", str(sources), "--no-deps", "--no-index", "--no-build-isolation", "--wheel-dir", str(work))
    (wheel,) = work.glob("*.whl")
    pip("install", str(wheel), "--no-deps", "--no-index", "--target", str(work / "installed"))
    return work / "installed"


@pytest.fixture
def run(installed: Path, tmp_path: Path):  # type: ignore[no-untyped-def]
    """Function of a command and its words: what it printed on stdout and stderr, run in an empty folder."""

    def run(command: str, *words: str) -> tuple[str, str]:
        environment = os.environ | {"PYTHONPATH": str(installed), "OMP_NUM_THREADS": "1"}
        program = [sys.executable, str(installed / "bin" / command)] if command in COMMANDS else [command]
        done = subprocess.run([*program, *words], cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout, done.stderr

    return run


def test_an_agent_is_trained_and_evaluated(run, installed: Path, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    where, _ = run(sys.executable, "-c", "import agent, envs; print(agent.__file__, envs.__file__)")
    assert all(Path(file).is_relative_to(installed) for file in where.split())
    words = ("--env", "dmc_walker", "--size", "debug", "--steps", "200", "--set", "train.ratio=16", "env.time_limit=20")
    _, told = run("train-agent", *words, "--logdir", "walker")
    assert "done: 200 frames" in told
    assert (tmp_path / "walker" / "config.yaml").exists()
    results, _ = run("evaluate-agent", "--logdir", "walker", "--episodes", "1")
    assert '"episodes": 1' in results


@pytest.mark.parametrize("command", COMMANDS)
def test_help_shows_how_the_command_is_called(run, command: str) -> None:  # type: ignore[no-untyped-def]
    text, _ = run(command, "--help")
    assert f"usage: {command} " in text
    assert f"\n  {command} --" in text and "scripts/" not in text


def test_every_configuration_is_installed(installed: Path) -> None:
    ours = {path.relative_to(CONFIGS): path.read_text() for path in CONFIGS.rglob("*.yaml")}
    theirs = installed / "configs"
    assert {path.relative_to(theirs): path.read_text() for path in theirs.rglob("*.yaml")} == ours
