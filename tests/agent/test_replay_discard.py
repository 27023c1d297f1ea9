"""Discarded rows against a plain set of them: no window that holds one is served, and every other window is."""

from collections import Counter

import numpy as np
import pytest
from test_replay import fill, make, row_at, starts_of

from agent import checkpoint
from agent.replay import Replay

WINDOW = 5
DISCARDS = {8: [(1, 3)], 15: [(0, 6), (1, 2)], 23: [(1, 1)], 31: [(2, 31)], 44: [(0, 0)], 47: [(2, 3)]}
"""After so many rows: streams and how many of their newest rows go."""


def play(replay: Replay, begin: int, end: int, lost: set[tuple[int, int]]) -> None:
    """Add the rows of positions begin to end - 1, discard what DISCARDS says, and note it in `lost`."""
    for position in range(begin, end):
        replay.add(row_at(position))
        for stream, rows in DISCARDS.get(position + 1, []):
            replay.discard(stream, rows)
            lost |= {(stream, place) for place in range(position + 1 - rows, position + 1)}


def sound(replay: Replay, lost: set[tuple[int, int]]) -> list[tuple[int, int]]:
    oldest, end = replay.held
    return [
        (stream, start)
        for stream in range(3)
        for start in range(-(-oldest // replay.stride) * replay.stride, end - WINDOW + 1, replay.stride)
        if not any((stream, place) in lost for place in range(start, start + WINDOW))
    ]


@pytest.mark.parametrize("stride", [1, 4])
def test_uniform_draws_are_over_all_sound_windows_and_no_others(stride: int) -> None:
    replay, lost = make(stride=stride), set()
    for amount in range(1, 60):
        play(replay, amount - 1, amount, lost)
        expected = sound(replay, lost)
        assert replay.ready(1) == bool(expected)
        if expected:
            counts = Counter(starts_of(replay.sample(25 * len(expected))))
            assert set(counts) == set(expected), amount
    counts = Counter(starts_of(replay.sample(900 * len(expected))))
    assert np.allclose([counts[window] for window in expected], 900, atol=6 * np.sqrt(900))


@pytest.mark.parametrize("stride", [1, 4])
def test_the_online_queue_serves_sound_windows_only(stride: int) -> None:
    replay, lost = make(stride=stride, length=60, online_queue=True), set()
    plain = make(stride=stride, length=60, online_queue=True)
    play(replay, 0, 60, lost)
    fill(plain, 0, 60)
    waiting, all_of_them = list(replay._queue), list(plain._queue)
    assert len(all_of_them) > len(waiting) > 10
    assert waiting == [window for window in all_of_them if window in sound(replay, lost)]


def test_with_too_little_left_there_is_nothing_to_draw() -> None:
    replay = make(streams=2, length=8)
    fill(replay, 0, 8)
    replay.discard(0, 100)
    assert replay.ready(1)
    replay.discard(1, 4)
    assert not replay.ready(1)
    fill(replay, 8, 12)
    assert not replay.ready(1)
    fill(replay, 12, 13)
    assert replay.ready(1) and set(starts_of(replay.sample(50))) == {(0, 8), (1, 8)}


def test_draws_without_discarded_rows_are_those_of_a_replay_that_never_had_any() -> None:
    replay, plain = make(length=12), make(length=12)
    fill(replay, 0, 4)
    fill(plain, 0, 4)
    replay.discard(2, 3)
    fill(replay, 4, 16)
    fill(plain, 4, 16)
    assert replay.sample(100).equal(plain.sample(100))


@pytest.mark.parametrize("length", [20, 12])
def test_what_is_discarded_survives_save_and_load(length: int, tmp_path) -> None:
    replay, lost = make(online_queue=True), set()
    play(replay, 0, 24, lost)
    loaded = make(length=length, online_queue=True, seed=5)
    loaded.load_state_dict(checkpoint.load(checkpoint.write(tmp_path / "replay", replay.state_dict())))
    for amount in range(25, 50):
        play(loaded, amount - 1, amount, lost)
        expected = sound(loaded, lost)
        if expected:
            assert set(starts_of(loaded.sample(60))) <= set(expected), amount
    assert amount == 49 and expected
