"""Whatever a configuration or a checkpoint holds: it is taken, or refused with a UserError in one line."""

import hashlib
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from agent import checkpoint
from agent import config as configuration
from agent.errors import UserError
from agent.logdir import find_checkpoint, identity
from agent.schema import Config

ALWAYS_THE_SAME = {
    "deadline": None,
    "derandomize": True,
    "database": None,
    "suppress_health_check": [HealthCheck.function_scoped_fixture],
}
BASE = configuration.resolve(env="gym_CartPole-v1", size="debug", device="cpu")
FLAT = configuration.flat(BASE)
KEYS = sorted(FLAT)
TEXT = configuration.dump(BASE)

# Pieces of YAML, so that what is drawn gets past the first character more often than not.
MARKS = st.sampled_from(
    [": ", "- ", "\n", "  ", "\t", "{", "}", "[", "]", "&a ", "*a", "!!python/name:os.system ", "!x ", "%YAML 1.1\n",
     "---\n", "...", "|\n", ">\n", "'", '"', "#", "? ", "<<: ", "\\", "\x00", "\ud800", "0x1F", "1e999", ".nan",
     "-.inf", "1_000", "0o9", "2026-01-01", "2026-99-99", "12:30:45", "null", "~", "true", "on", "=", ","]
)  # fmt: skip
YAML_TEXT = st.lists(st.one_of(MARKS, st.sampled_from(KEYS), st.text(max_size=4)), max_size=12).map("".join)
VALUES = st.recursive(
    st.one_of(
        st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8), st.binary(max_size=4), st.dates(),
        st.sampled_from([0, 1, -1, 2**31, 2**64, 10**400, 1e308, math.inf, "auto", "gru", "debug", "dmc_walker"]),
    ),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(st.one_of(st.text(max_size=4), st.integers(), st.none(), st.floats()), inner, max_size=3),
    ),
    max_leaves=6,
)  # fmt: skip


def only_user_errors(call: Callable[[], Any]) -> Any:
    """What `call` returns, None where it refuses; any exception but a UserError of one line fails the test."""
    try:
        return call()
    except UserError as error:
        message = str(error)
    assert len(message.splitlines()) == 1, message
    message.encode()  # a terminal can show it
    return None


@pytest.fixture(autouse=True)
def _files_are_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The project's own files, which no drawn value changes."""
    read, known = configuration.read_yaml, {}

    def cached(path: Path) -> dict[str, Any]:
        if configuration.CONFIGS not in path.parents:
            return read(path)
        if path not in known:
            known[path] = read(path)
        return dict(known[path])

    monkeypatch.setattr(configuration, "read_yaml", cached)


@settings(max_examples=100, **ALWAYS_THE_SAME)
@given(st.lists(st.tuples(st.one_of(st.sampled_from(KEYS), st.text(max_size=6)), YAML_TEXT), max_size=3))
def test_settings_of_the_command_line(pairs: list[tuple[str, str]]) -> None:
    words = [f"{key}={text}" for key, text in pairs]
    found = only_user_errors(lambda: configuration.resolve("gym_CartPole-v1", "gru", "debug", settings=words))
    assert found is None or isinstance(found, Config)


@settings(max_examples=200, **ALWAYS_THE_SAME)
@given(st.dictionaries(st.sampled_from([key for key in KEYS if key != "core.name"]), VALUES, min_size=1, max_size=3))
def test_values_of_every_kind(values: dict[str, Any]) -> None:
    found = only_user_errors(lambda: configuration._validate(FLAT | values))
    assert found is None or all(configuration.flat(found).get(key, value) == value for key, value in values.items())


@settings(max_examples=150, **ALWAYS_THE_SAME)
@given(st.one_of(st.binary(max_size=60), YAML_TEXT.map(lambda text: text.encode(errors="surrogatepass"))))
def test_files_of_users(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "own.yaml"
    file.write_bytes(content)
    only_user_errors(lambda: configuration.resolve("gym_CartPole-v1", "gru", "debug", file=file))


@settings(max_examples=100, **ALWAYS_THE_SAME)
@given(st.integers(0, len(TEXT)), st.integers(0, 12), YAML_TEXT)
def test_a_runs_own_configuration_that_was_changed(tmp_path: Path, place: int, length: int, text: str) -> None:
    file = tmp_path / "config.yaml"
    file.write_bytes((TEXT[:place] + text + TEXT[place + length :]).encode(errors="surrogatepass"))
    only_user_errors(lambda: configuration.load(file))


def with_checksum(folder: Path, content: bytes) -> Path:
    """A checkpoint file of this content, whose name says that it is whole."""
    path = folder / f"step_000000000005_{hashlib.sha256(content).hexdigest()[: checkpoint.DIGITS]}.pt"
    path.write_bytes(content)
    return path


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    folder = tmp_path_factory.mktemp("whole")
    state = {"run": identity(BASE), "replay": {"latest": "none.pt", "chunks": []}, "agent": {"w": torch.ones(50)}}
    return checkpoint.write(folder / "step_000000000005", state).read_bytes()


@settings(max_examples=300, **ALWAYS_THE_SAME)
@given(st.data())
def test_damaged_checkpoints(tmp_path: Path, whole: bytes, data: st.DataObject) -> None:
    """Cut off, with other bytes in places, or random; with a checksum that hides it, and with the old one."""
    content = bytearray(whole)
    for place in data.draw(st.lists(st.integers(0, len(whole) - 1), max_size=6)):
        content[place] = data.draw(st.integers(0, 255))
    content = content[: data.draw(st.one_of(st.just(len(whole)), st.integers(0, len(whole))))]
    damaged = data.draw(st.one_of(st.just(bytes(content)), st.binary(max_size=80)))
    path = with_checksum(tmp_path, damaged)
    state = only_user_errors(lambda: checkpoint.load(path))
    assert state is None or isinstance(state, dict)
    path.unlink()
    if damaged != whole:
        old = with_checksum(tmp_path, whole)
        old.write_bytes(damaged)
        with pytest.raises(UserError, match="damaged"):
            checkpoint.load(old)
        old.unlink()


PLAIN = st.recursive(
    st.one_of(st.none(), st.integers(), st.text(max_size=4), st.just(torch.zeros(2))),
    lambda inner: st.one_of(
        st.lists(inner, max_size=2),
        st.dictionaries(st.sampled_from(["format", "version", "state", "run", "replay", "latest", "chunks"]), inner),
    ),
)
OURS = {"format": checkpoint.FORMAT, "version": checkpoint.VERSION}


@settings(max_examples=150, **ALWAYS_THE_SAME)
@given(
    st.one_of(
        PLAIN,
        PLAIN.map(lambda version: OURS | {"version": version, "state": {}}),
        PLAIN.map(lambda state: OURS | {"state": state}),
        PLAIN.map(lambda replay: OURS | {"state": {"run": identity(BASE), "replay": replay}}),
    )
)
def test_sound_files_of_something_else(tmp_path: Path, content: Any) -> None:
    folder = tmp_path / "checkpoints"
    folder.mkdir(exist_ok=True)
    torch.save(content, folder / "new")
    path = with_checksum(folder, (folder / "new").read_bytes())
    assert only_user_errors(lambda: find_checkpoint(BASE, tmp_path, lambda line: None)) is None
    path.unlink()
