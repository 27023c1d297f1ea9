"""Checkpoints: round trip, atomicity, refusal of what is damaged or foreign, random generators."""

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
from agent.random_state import random_state, set_random_state


def example(value: int) -> dict[str, Any]:
    return {
        "weights": torch.full((1000,), float(value)),
        "steps": value,
        "nested": {"list": [1, None, "a", 2**127]},
    }


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def steps(directory: Path) -> list[int]:
    return [int(path.name.split("_")[1]) for path in checkpoint.candidates(directory)]


def assert_holds(path: Path, value: int) -> None:
    state = checkpoint.load(path)
    assert state["steps"] == value and state["nested"] == {"list": [1, None, "a", 2**127]}
    assert torch.equal(state["weights"], torch.full((1000,), float(value)))


def refuse(line: str) -> None:
    raise AssertionError(line)


def test_round_trip_keeps_the_newest(tmp_path: Path) -> None:
    directory = tmp_path / "new" / "checkpoints"
    assert checkpoint.latest(directory) is None and checkpoint.recover(directory, refuse) is None
    for step in (9, 10, 200, 12345):
        path = checkpoint.save(directory, step, example(step), keep=2)
    assert steps(directory) == [12345, 200]
    assert checkpoint.latest(directory) == path
    assert_holds(path, 12345)
    found, state = checkpoint.recover(directory, refuse)  # type: ignore[misc]
    assert found == path and state["steps"] == 12345


def test_latest_goes_by_number_and_ignores_other_files(tmp_path: Path) -> None:
    for step in (5, 10**12):  # thirteen digits sort before twelve by name
        checkpoint.save(tmp_path, step, example(1), keep=5)
    (tmp_path / "step_best.pt").write_bytes(b"mine")
    (tmp_path / "step_000000000007.tmp").write_bytes(b"left by a crash")
    assert steps(tmp_path) == [10**12, 5]


def test_leftovers_go_and_foreign_files_stay(tmp_path: Path) -> None:
    (tmp_path / "step_000000000007.tmp").write_bytes(b"left by a crash")
    (tmp_path / "step_best.pt").write_bytes(b"mine")
    path = checkpoint.save(tmp_path, 8, example(8), keep=1)
    assert names(tmp_path) == [path.name, "step_best.pt"]


def test_saving_the_same_step_again_replaces_it(tmp_path: Path) -> None:
    mapped = checkpoint.load(checkpoint.save(tmp_path, 3, example(1), keep=1))
    path = checkpoint.save(tmp_path, 3, example(2), keep=1)
    assert names(tmp_path) == [path.name]
    assert_holds(path, 2)
    assert torch.equal(mapped["weights"], torch.ones(1000))  # an open mapping still sees the old file


def test_the_best_outlives_the_newest(tmp_path: Path) -> None:
    for step in (1, 2, 3, 4):
        path = checkpoint.save(tmp_path, step, example(step), keep=1)
        if step in (1, 2):
            checkpoint.keep_as_best(path)
            checkpoint.keep_as_best(path)  # again, as a run does that died before it could
    best = checkpoint.best_of(tmp_path)
    assert best is not None and names(tmp_path) == [best.name, path.name]
    assert_holds(best, 2)
    assert steps(tmp_path) == [4]


@pytest.mark.parametrize("name", ["replace", "fsync"])
def test_a_failing_disk_leaves_the_old_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    path = checkpoint.save(tmp_path, 1, example(1), keep=1)

    def fail(*arguments: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, name, fail)
    with pytest.raises(UserError, match="step_000000000002.*Permission denied"):
        checkpoint.save(tmp_path, 2, example(2), keep=1)
    assert names(tmp_path) == [path.name]
    assert_holds(path, 1)


def test_file_and_directory_are_on_disk_before_older_ones_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = checkpoint.save(tmp_path, 1, example(1), keep=1)
    told: list[str] = []
    fsync, replace = os.fsync, os.replace

    def watched_fsync(descriptor: int) -> None:
        assert first.exists()
        told.append("directory" if os.path.isdir(f"/proc/self/fd/{descriptor}") else "file")
        fsync(descriptor)

    def watched_replace(*paths: Any) -> None:
        told.append("rename")
        replace(*paths)

    monkeypatch.setattr(os, "fsync", watched_fsync)
    monkeypatch.setattr(os, "replace", watched_replace)
    checkpoint.save(tmp_path, 2, example(2), keep=1)
    assert told == ["file", "rename", "directory"] and not first.exists()


def test_a_crash_before_the_rename_leaves_the_old_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = checkpoint.save(tmp_path, 1, example(1), keep=1)

    def write_half(content: object, file: Any) -> None:
        file.write(b"half a checkpoint")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(torch, "save", write_half)
        checkpoint.save(tmp_path, 1, example(2), keep=1)
    assert_holds(path, 1)
    assert checkpoint.latest(tmp_path) == path


def test_a_full_disk_is_named_and_keeps_the_old_checkpoint(tmp_path: Path) -> None:
    path = checkpoint.save(tmp_path, 1, example(1), keep=1)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))  # the write itself fails, as on a full disk
    try:
        with pytest.raises(UserError, match="step_000000000002.*File too large") as caught:
            checkpoint.save(tmp_path, 2, {"weights": torch.zeros(1_000_000)}, keep=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "\n" not in str(caught.value)
    assert names(tmp_path) == [path.name]
    assert_holds(path, 1)


def test_a_directory_that_cannot_be_made_is_a_user_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        checkpoint.save(tmp_path / "file" / "checkpoints", 1, example(1), keep=1)


def flipped(content: bytes, bit: int) -> bytes:
    place, mask = bit // 8, 1 << bit % 8
    return content[:place] + bytes([content[place] ^ mask]) + content[place + 1 :]


def test_damaged_files_are_refused_and_the_one_before_is_used(tmp_path: Path) -> None:
    good = checkpoint.save(tmp_path, 1, example(1), keep=3)
    bad = checkpoint.save(tmp_path, 2, example(2), keep=3)
    whole, bits = bad.read_bytes(), np.random.default_rng(0)
    damaged = [whole[: len(whole) // 2], whole[:-1], b"", b"hello\n", whole + b"0"]
    damaged += [flipped(whole, int(bits.integers(8 * len(whole)))) for _ in range(200)]
    for content in damaged:
        bad.write_bytes(content)
        told: list[str] = []
        found = checkpoint.recover(tmp_path, told.append)
        assert found is not None and found[0] == good and found[1]["steps"] == 1
        assert len(told) == 1 and bad.name in told[0] and "damaged" in told[0] and "\n" not in told[0]
    good.write_bytes(good.read_bytes()[:-1])
    with pytest.raises(UserError, match=f"{good.name}: damaged"):
        checkpoint.recover(tmp_path, told.append)
    with pytest.raises(UserError, match="missing_0123456789abcdef.pt.*No such file"):
        checkpoint.load(tmp_path / "missing_0123456789abcdef.pt")


def test_what_was_passed_over_is_set_aside(tmp_path: Path) -> None:
    first, second, third = (checkpoint.save(tmp_path, step, example(step), keep=3) for step in (1, 2, 3))
    checkpoint.set_aside(second)
    assert names(tmp_path) == sorted([f"refused_{third.name}", first.name, second.name])
    checkpoint.save(tmp_path, 4, example(4), keep=2)
    assert steps(tmp_path) == [4, 2]  # a refused one does not count


def named_rightly(path: Path) -> Path:
    """The file under a name that has its checksum."""
    import hashlib

    checksum = hashlib.sha256(path.read_bytes()).hexdigest()[: checkpoint.DIGITS]
    return path.rename(path.with_name(f"{path.stem}_{checksum}.pt"))


def test_other_versions_and_other_projects_are_refused(tmp_path: Path) -> None:
    other = {"format": checkpoint.FORMAT, "version": checkpoint.VERSION + 1, "state": {}}
    torch.save(other, tmp_path / "step_3.pt")
    with pytest.raises(UserError, match=f"version {checkpoint.VERSION + 1}, this code reads {checkpoint.VERSION}"):
        checkpoint.load(named_rightly(tmp_path / "step_3.pt"))
    torch.save({"weights": torch.zeros(3)}, tmp_path / "step_4.pt")
    with pytest.raises(UserError, match="step_4_.*not a checkpoint of this project"):
        checkpoint.load(named_rightly(tmp_path / "step_4.pt"))
    torch.save({"version": 1, "state": {}}, tmp_path / "step_000000000005.pt")
    with pytest.raises(UserError, match="step_000000000005.pt.*no checksum"):
        checkpoint.load(tmp_path / "step_000000000005.pt")


class Malice:
    """What pickle would turn into a call."""

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (Path("malice_was_here"),)


def test_no_code_of_a_file_is_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    content = {"format": checkpoint.FORMAT, "version": checkpoint.VERSION, "state": {"agent": Malice()}}
    torch.save(content, tmp_path / "step_1.pt")
    path = named_rightly(tmp_path / "step_1.pt")
    with pytest.raises(UserError, match="damaged or no checkpoint"):
        checkpoint.load(path)
    assert names(tmp_path) == [path.name]
    torch.load(path, weights_only=False)  # it is malicious indeed
    assert (tmp_path / "malice_was_here").exists()


def test_random_generators_go_on_after_a_round_trip(tmp_path: Path) -> None:
    def draw() -> list[float]:
        normal = np.random.standard_normal(3)  # noqa: NPY002 - an odd amount leaves half of a pair in the generator
        return [random.random(), random.gauss(0, 1), *normal.tolist(), *torch.rand(5).tolist()]

    draw()
    path = checkpoint.save(tmp_path, 1, random_state(), keep=1)
    expected = draw()
    assert draw() != expected
    set_random_state(checkpoint.load(path))
    assert draw() == expected
