"""docs/extend.md does what it says: its package is installed beside this repository, and its commands are run."""

import json
import os
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gymnasium
import pytest
from pages import blocks

import envs
from agent import config as configuration
from agent.cores import core
from agent.errors import UserError
from envs.errors import EnvError

See = Callable[[Path], None]
ROOT = Path(__file__).parents[2]
SCRIPTS = {name.replace("_", "-"): ROOT / "scripts" / f"{name}.py" for name in (
    "train_agent", "evaluate_agent", "probe_memory"
)}  # fmt: skip
PAGE = blocks("extend.md")
INSTALL = "pip install -e my_memory"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the page's files, and with its package installed in `packages`."""
    folder = tmp_path_factory.mktemp("extend")
    for block in PAGE:
        if block.file:
            path = folder / block.file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(block.text)
    install = ["pip", "install", "./my_memory", "--no-deps", "--no-index", "--no-build-isolation"]
    words = [sys.executable, "-m", *install, "--quiet", "--target", str(folder / "packages")]
    done = subprocess.run(words, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder


def run(place: Path, *words: object) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{place / 'packages'}", "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *map(str, words)], cwd=place, env=environment, capture_output=True, text=True
    )


def scripted(place: Path, line: str) -> subprocess.CompletedProcess[str]:
    command, *words = shlex.split(line)
    return run(place, SCRIPTS[command], *words)


def test_the_commands_run(place: Path) -> None:
    (shell,) = (block.text.splitlines() for block in PAGE if block.language == "sh")
    assert shell[0] == INSTALL
    for line in shell[1:]:
        done = scripted(place, line)
        assert done.returncode == 0, f"{line}: {done.stderr}"
    entries = [json.loads(line) for line in (place / "runs/corridor/metrics.jsonl").read_text().splitlines()]
    assert {entry["episode/score"] for entry in entries if "episode/score" in entry} == {-1.0, 1.0}
    assert "name: leaky" in (place / "runs/corridor/config.yaml").read_text()
    assert "leaky" in (place / "runs/probe/results.md").read_text()


def test_environment_and_core_keep_their_contracts(place: Path) -> None:
    done = [run(place, "-c", block.text) for block in PAGE if block.language == "python" and not block.file]
    assert [each.returncode for each in done] == [0], done[0].stderr
    assert done[0].stdout == "[]\n"


@pytest.fixture
def see(monkeypatch: pytest.MonkeyPatch) -> Iterator[See]:
    """Function of a folder: the packages in it are seen while the test runs."""
    monkeypatch.setattr(core, "CORES", dict(core.registered_cores()))
    before = set(sys.modules)

    def see(packages: Path) -> None:
        monkeypatch.syspath_prepend(packages)
        configuration._core_section.cache_clear()

    yield see
    configuration._core_section.cache_clear()
    for name in set(sys.modules) - before:
        if name.partition(".")[0] == "my_memory":
            del sys.modules[name]
    gymnasium.registry.pop("Corridor-v0", None)


def one_line(function: Callable[..., object], *words: object, **named: object) -> str:
    with pytest.raises((UserError, EnvError)) as caught:
        function(*words, **named)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"env": "corridr_short"}, "corridor_..."),
        ({"core": "leeky"}, "the nearest is leaky"),
        ({"settings": ["core.widht=3"]}, "the nearest is core.width"),
        ({"size": "400m"}, "choose from debug, tiny, 1m, wide, 12m"),
    ],
)
def test_what_a_package_adds_is_among_the_choices(place: Path, see: See, asked: dict[str, Any], message: str) -> None:
    see(place / "packages")
    asked = {"env": "corridor_short", "core": "leaky", "size": "debug"} | asked
    assert message in one_line(configuration.resolve, **asked)
    assert "corridor_short and corridor_long" in one_line(envs.make, "corridor_middle")


def with_entry_points(folder: Path, place: Path, env: str, core_line: str) -> Path:
    """The folder, into which the page's package is put with other entry points."""
    info = folder / "my_memory-0.1.dist-info"
    info.mkdir()
    (folder / "my_memory").symlink_to(place / "packages" / "my_memory")
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: my-memory\nVersion: 0.1\n")
    (info / "entry_points.txt").write_text(f"[{envs.ENTRY_POINTS}]\n{env}\n[{core.ENTRY_POINTS}]\n{core_line}\n")
    return folder


def test_a_suite_needs_no_file_of_settings(place: Path, tmp_path: Path, see: See) -> None:
    see(with_entry_points(tmp_path, place, "maze = my_memory.corridor:make", "leaky = my_memory.leaky:Leaky"))
    config = configuration.resolve("maze_short", size="debug")
    assert (config.env.name, config.env.parallel) == ("maze_short", True)
    env = envs.make("maze_short", options={"length": 7})
    assert env.unwrapped.length == 7  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("leaky = my_memory.absent:Leaky", "core leaky cannot be imported: No module named"),
        ("leaky = my_memory.leaky:Leakier", "core leaky cannot be imported: module"),
        ("leaky = my_memory.leaky:LeakyConfig", "LeakyConfig is no subclass of RecurrentCore"),
        ("other = my_memory.leaky:Leaky", "core leaky has a file and no class"),
    ],
)
def test_a_broken_entry_point_is_named(place: Path, tmp_path: Path, see: See, entry: str, message: str) -> None:
    see(with_entry_points(tmp_path, place, "corridor = my_memory.absent:make", entry))
    assert message in one_line(configuration.resolve, "corridor_short", "leaky", "debug")
    assert "corridor_...: my_memory.absent:make cannot be" in one_line(envs.make, "corridor_short")
