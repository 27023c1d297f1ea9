"""Checkpoints: round trip, atomicity, refusal of what is no checkpoint, random generators."""

import os
import random
import resource
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from agent import checkpoint
from agent.errors import UserError


def example(value: int) -> dict[str, Any]:
    return {
        "weights": torch.full((1000,), float(value)),
        "steps": value,
        "nested": {"list": [1, None, "a", 2**127]},
    }


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def assert_holds(path: Path, value: int) -> None:
    state = checkpoint.load(path)
    assert state["steps"] == value and state["nested"] == {"list": [1, None, "a", 2**127]}
    assert torch.equal(state["weights"], torch.full((1000,), float(value)))


def test_round_trip_keeps_the_newest(tmp_path: Path) -> None:
    directory = tmp_path / "new" / "checkpoints"
    assert checkpoint.latest(directory) is None
    for step in (9, 10, 200, 12345):
        checkpoint.save(directory, step, example(step), keep=2)
    assert names(directory) == ["step_000000000200.pt", "step_000000012345.pt"]
    newest = checkpoint.latest(directory)
    assert newest == directory / "step_000000012345.pt"
    assert_holds(newest, 12345)


def test_latest_goes_by_number_and_ignores_other_files(tmp_path: Path) -> None:
    for step in (5, 10**12):  # thirteen digits sort before twelve by name
        checkpoint.save(tmp_path, step, example(1), keep=5)
    (tmp_path / "step_best.pt").write_bytes(b"mine")
    (tmp_path / "step_000000000007.pt.tmp").write_bytes(b"left by a crash")
    assert checkpoint.latest(tmp_path) == tmp_path / f"step_{10**12}.pt"


def test_leftovers_go_and_foreign_files_stay(tmp_path: Path) -> None:
    (tmp_path / "step_000000000007.pt.tmp").write_bytes(b"left by a crash")
    (tmp_path / "notes.tmp").write_bytes(b"mine")
    (tmp_path / "step_best.pt").write_bytes(b"mine")
    checkpoint.save(tmp_path, 8, example(8), keep=1)
    assert names(tmp_path) == ["notes.tmp", "step_000000000008.pt", "step_best.pt"]


def test_saving_the_same_step_again_replaces_it(tmp_path: Path) -> None:
    checkpoint.save(tmp_path, 3, example(1), keep=1)
    mapped = checkpoint.load(tmp_path / "step_000000000003.pt")
    checkpoint.save(tmp_path, 3, example(2), keep=1)
    assert_holds(tmp_path / "step_000000000003.pt", 2)
    assert torch.equal(mapped["weights"], torch.ones(1000))  # an open mapping still sees the old file


def test_a_failing_rename_leaves_the_old_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint.save(tmp_path, 1, example(1), keep=1)

    def fail(source: Path, target: Path) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(UserError, match="step_000000000002.pt.*Permission denied"):
        checkpoint.save(tmp_path, 2, example(2), keep=1)
    assert names(tmp_path) == ["step_000000000001.pt"]
    assert_holds(tmp_path / "step_000000000001.pt", 1)


def test_a_crash_before_the_rename_leaves_the_old_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint.save(tmp_path, 1, example(1), keep=1)

    def write_half(content: object, file: Any) -> None:
        file.write(b"half a checkpoint")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(torch, "save", write_half)
        checkpoint.save(tmp_path, 1, example(2), keep=1)
    assert_holds(tmp_path / "step_000000000001.pt", 1)
    assert checkpoint.latest(tmp_path) == tmp_path / "step_000000000001.pt"


def test_a_full_disk_is_named_and_keeps_the_old_checkpoint(tmp_path: Path) -> None:
    checkpoint.save(tmp_path, 1, example(1), keep=1)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))  # the write itself fails, as on a full disk
    try:
        with pytest.raises(UserError, match="step_000000000002.pt.*File too large") as caught:
            checkpoint.save(tmp_path, 2, {"weights": torch.zeros(1_000_000)}, keep=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "\n" not in str(caught.value)
    assert names(tmp_path) == ["step_000000000001.pt"]
    assert_holds(tmp_path / "step_000000000001.pt", 1)


def test_a_directory_that_cannot_be_made_is_a_user_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write"):
        checkpoint.save(tmp_path / "file" / "checkpoints", 1, example(1), keep=1)


def test_truncated_foreign_and_missing_files_are_refused(tmp_path: Path) -> None:
    checkpoint.save(tmp_path, 1, example(1), keep=1)
    whole = (tmp_path / "step_000000000001.pt").read_bytes()
    contents = {
        "half.pt": whole[: len(whole) // 2],
        "last.pt": whole[:-1],
        "empty.pt": b"",
        "text.pt": b"hello\n",
    }
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=name) as caught:
            checkpoint.load(tmp_path / name)
        assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="missing.pt.*No such file"):
        checkpoint.load(tmp_path / "missing.pt")


def test_other_versions_and_other_projects_are_refused(tmp_path: Path) -> None:
    torch.save({"version": checkpoint.VERSION + 1, "state": {}}, tmp_path / "newer.pt")
    with pytest.raises(UserError, match=f"newer.pt.*version {checkpoint.VERSION + 1}"):
        checkpoint.load(tmp_path / "newer.pt")
    torch.save({"weights": torch.zeros(3)}, tmp_path / "foreign.pt")
    with pytest.raises(UserError, match="foreign.pt.*not a checkpoint"):
        checkpoint.load(tmp_path / "foreign.pt")


def test_random_generators_go_on_after_a_round_trip(tmp_path: Path) -> None:
    def draw() -> list[float]:
        normal = np.random.standard_normal(3)  # noqa: NPY002 - an odd amount leaves half of a pair in the generator
        return [random.random(), random.gauss(0, 1), *normal.tolist(), *torch.rand(5).tolist()]

    draw()
    checkpoint.save(tmp_path, 1, checkpoint.random_state(), keep=1)
    expected = draw()
    assert draw() != expected
    checkpoint.set_random_state(checkpoint.load(tmp_path / "step_000000000001.pt"))
    assert draw() == expected
