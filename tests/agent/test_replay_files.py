"""Replay on disk: what is written, what goes, and that it comes back as it was, latents refreshed since included."""

from pathlib import Path
from typing import Any

import pytest
import torch
from test_replay import fill, make

from agent import checkpoint, replay_files
from agent.errors import UserError
from agent.replay import Replay
from agent.replay_files import ReplayFiles


@pytest.fixture(autouse=True)
def _small_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replay_files, "CHUNK", 6)


def names(directory: Path) -> list[str]:
    return sorted("_".join(path.name.split("_")[:2]) for path in directory.iterdir())


def refresh(replay: Replay, number: int) -> None:
    index = replay.sample(4)
    fresh = {
        "stoch": torch.full((4, 4, 4), number, dtype=torch.uint8),
        "deter": torch.full((4, 4, 5), float(number)),
    }
    replay.write_back(index, fresh)


def assert_equal(one: Replay, other: Replay) -> None:
    ours, theirs = one.state_dict(), other.state_dict()
    assert {k: v for k, v in ours.items() if k != "tensors"} == {k: v for k, v in theirs.items() if k != "tensors"}
    for key, tensor in ours["tensors"].items():
        assert torch.equal(tensor, theirs["tensors"][key]), key


@pytest.mark.parametrize("length", [7, 20, 40])
def test_any_saved_moment_comes_back(length: int, tmp_path: Path) -> None:
    replay, files = make(length=length, online_queue=True), ReplayFiles(tmp_path / "replay")
    kept: list[Path] = []
    for number, end in enumerate([0, 4, 6, 9, 23, 24, 61, 62, 63, 64, 65, 66, 90]):
        fill(replay, replay.held[1], end)
        if replay.ready(1):
            refresh(replay, number)
        needed = files.write(replay, end)
        checkpoint.save(tmp_path, end, {"replay": needed}, keep=2)
        kept = checkpoint.candidates(tmp_path)
        files.sweep(kept)
        if number % 3 == 2:  # the run was stopped, and goes on
            files = ReplayFiles(tmp_path / "replay")
            again = make(length=length, online_queue=True, seed=9)
            files.load(checkpoint.load(kept[0])["replay"], again)
            assert_equal(replay, again)
            replay = again
        else:
            again = make(length=length, online_queue=True, seed=9)
            ReplayFiles(tmp_path / "replay").load(needed, again)
            assert_equal(replay, again)
        lengths = [end - begin for begin, end in ((c["begin"], c["end"]) for c in needed["chunks"])]
        assert all(amount == 6 for amount in lengths) and sum(lengths) <= length + 6
    for path in kept:  # the one before the newest is whole, too
        ReplayFiles(tmp_path / "replay").verify(checkpoint.load(path)["replay"])


def test_rows_are_written_once(tmp_path: Path) -> None:
    replay, files = make(length=100), ReplayFiles(tmp_path)
    fill(replay, 0, 20)
    files.write(replay, 20)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.glob("rows_*")}
    assert len(before) == 3
    fill(replay, 20, 26)
    refresh(replay, 1)
    needed = files.write(replay, 26)
    assert [chunk["begin"] for chunk in needed["chunks"]] == [0, 6, 12, 18]
    assert {path: path.stat().st_mtime_ns for path in before} == before
    latest = checkpoint.load(tmp_path / needed["latest"])
    assert latest["tensors"]["reward"].shape == (3, 2) and latest["tensors"]["deter"].shape == (3, 26, 5)


def test_disk_is_bounded_and_holds_nothing_in_vain(tmp_path: Path) -> None:
    replay, files = make(length=24), ReplayFiles(tmp_path / "replay")
    sizes = []
    for end in range(0, 400, 5):
        fill(replay, replay.held[1], end)
        checkpoint.save(tmp_path, end, {"replay": files.write(replay, end)}, keep=2)
        (tmp_path / "replay" / "rows_000000000000.tmp").write_bytes(b"left by a crash")
        files.sweep(checkpoint.candidates(tmp_path))
        needed = [checkpoint.load(path)["replay"] for path in checkpoint.candidates(tmp_path)]
        wanted = {name for each in needed for name in replay_files.names(each)}
        assert {path.name for path in (tmp_path / "replay").iterdir()} == wanted
        sizes.append(sum(path.stat().st_size for path in tmp_path.rglob("*.pt")))
    assert max(sizes[20:]) <= max(sizes[10:20])


def test_a_missing_or_damaged_file_is_named(tmp_path: Path) -> None:
    replay, files = make(), ReplayFiles(tmp_path)
    fill(replay, 0, 15)
    needed = files.write(replay, 15)
    files.verify(needed)
    for path in sorted(tmp_path.iterdir()):
        whole = path.read_bytes()
        for content in (whole[:-1], whole[:700] + b"x" + whole[701:], None):
            if content is None:
                path.unlink()
            else:
                path.write_bytes(content)
            with pytest.raises(UserError, match=path.name):
                files.verify(needed)
        path.write_bytes(whole)


def test_a_full_disk_leaves_what_was_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    replay, files = make(), ReplayFiles(tmp_path)
    fill(replay, 0, 8)
    needed = files.write(replay, 8)
    fill(replay, 8, 19)

    def fail(*arguments: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(UserError, match="No space left on device"):
        patch.setattr(torch, "save", fail)
        files.write(replay, 19)
    files.verify(needed)
    again = make(seed=5)
    files.load(files.write(replay, 19), again)  # and once there is room, all is well
    assert_equal(replay, again)
