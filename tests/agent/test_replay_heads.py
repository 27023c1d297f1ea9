"""Replay that keeps latents at heads only, against plain Python lists that never forget."""

from collections import deque
from typing import Any

import numpy as np
import pytest
import torch
from test_replay import CPU, LATENTS, ROWS, fill, make, row_at, starts_of, value
from torch import Tensor

from agent import checkpoint
from agent.errors import UserError
from agent.replay import Replay, storage_bytes

STREAMS, WINDOW = 3, 5
strides = pytest.mark.parametrize("stride", [1, 2, 4])


class Plain:
    """Every row ever added, and the latents of every head, by stream and position."""

    def __init__(self, length: int, stride: int):
        self.length, self.stride = length // stride * stride, stride
        self.amount = self.oldest = 0
        self.latents: dict[tuple[int, int], dict[str, Tensor]] = {}
        self.waiting: deque[tuple[int, int]] = deque()

    def add(self) -> None:
        position, self.amount = self.amount, self.amount + 1
        self.oldest = max(self.oldest, self.amount - self.length)
        if position % self.stride == 0:
            for stream in range(STREAMS):
                self.latents[stream, position] = {key: value(stream, position)[key] for key in LATENTS}
        # Of stride 1 every row is trained on or is context once; with heads the last row is the next context.
        apart = WINDOW if self.stride == 1 else WINDOW - 1
        start = self.amount - WINDOW
        if start >= 0 and start % apart == 0:
            self.waiting.extend((stream, start) for stream in range(STREAMS))
        self.drop()

    def drop(self) -> None:
        self.waiting = deque(window for window in self.waiting if window[1] >= self.oldest)

    def windows(self) -> list[tuple[int, int]]:
        starts = range(0, self.amount - WINDOW + 1, self.stride)
        return [(stream, start) for stream in range(STREAMS) for start in starts if start >= self.oldest]

    def write_back(self, windows: list[tuple[int, int]], fresh: dict[str, Tensor]) -> None:
        for i, (stream, start) in enumerate(windows):
            for k, position in enumerate(range(start + self.stride, start + WINDOW, self.stride)):
                self.latents[stream, position] = {key: fresh[key][i, k] for key in fresh}

    def check(self, replay: Replay) -> None:
        """All windows that replay can give hold what is known."""
        assert len(replay) == STREAMS * (self.amount - self.oldest)
        assert replay.ready(1) == bool(self.windows())
        if not self.windows():
            return
        rows, latents = replay.gather(torch.tensor(self.windows()).T)
        for i, (stream, start) in enumerate(self.windows()):
            assert rows["action"][i].tolist() == [[stream, start + offset] for offset in range(WINDOW)]
            for key in LATENTS:
                assert torch.equal(latents[key][i], self.latents[stream, start][key]), (stream, start)


@strides
@pytest.mark.parametrize("length", [8, 13, 20])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_long_life_equals_the_plain_lists(stride: int, length: int, seed: int, tmp_path: Any) -> None:
    random = np.random.default_rng(seed)
    replay, plain = make(length=length, stride=stride, online_queue=True), Plain(length, stride)
    written = 0
    for step in range(130):
        row = row_at(plain.amount)
        if plain.amount % stride:  # nobody looks at the latents of a row that is no head
            row |= {key: torch.full_like(row[key], 77) for key in LATENTS}
        replay.add(row)
        plain.add()
        if random.random() < 0.3 and plain.windows():
            windows = starts_of(replay.sample(2))
            due = [plain.waiting.popleft() for _ in range(min(2, len(plain.waiting)))]
            assert windows[: len(due)] == due
            assert set(windows) <= set(plain.windows())
            heads = (WINDOW - 1) // stride
            written += 1
            fresh = {
                key: (torch.arange(2 * heads * shape[0]) + written).reshape(2, heads, *shape).to(dtype)
                for key, (shape, dtype) in LATENTS.items()
            }
            if abs(windows[0][1] - windows[1][1]) >= WINDOW or windows[0][0] != windows[1][0]:  # none overlaps
                replay.write_back(torch.tensor(windows).T, fresh)
                plain.write_back(windows, fresh)
        if random.random() < 0.1:
            if random.random() < 0.5:
                plain.length = int(random.choice([8, 12, 21, 28])) // stride * stride
            path = checkpoint.save(tmp_path, step, replay.state_dict(), keep=1)
            replay = make(length=plain.length, stride=stride, online_queue=True, seed=99)
            fill(replay, 0, int(random.integers(20)))  # what is loaded replaces it
            replay.load_state_dict(checkpoint.load(path))
            plain.oldest = max(plain.oldest, plain.amount - plain.length)
            plain.drop()
        plain.check(replay)
    assert written > 10


@pytest.mark.parametrize("amount", [5, 20, 31, 54])
def test_starts_are_uniform_over_the_heads_of_whole_windows(amount: int) -> None:
    replay = make(stride=4)
    fill(replay, 0, amount)
    starts = [start for start in range(0, amount - 4, 4) if start >= amount - 20]
    counts = {(stream, start): 0 for stream in range(3) for start in starts}
    for window in starts_of(replay.sample(500 * len(counts))):
        counts[window] += 1  # KeyError: no head, or a window that is not whole
    freedom = len(counts) - 1
    statistic = sum((count - 500) ** 2 / 500 for count in counts.values())
    assert abs(statistic - freedom) < 4 * (2 * freedom) ** 0.5


def test_the_head_after_a_window_is_refreshed_and_no_other() -> None:
    replay = make(stride=4)
    fill(replay, 0, 20)
    fresh = {"stoch": torch.full((1, 1, 4), 9), "deter": torch.full((1, 1, 5), -1.0)}
    replay.write_back(torch.tensor([[1], [8]]), fresh)
    heads = [(stream, start) for stream in range(3) for start in (0, 4, 8, 12)]
    _, latents = replay.gather(torch.tensor(heads).T)
    for i, (stream, start) in enumerate(heads):
        expected = fresh["deter"][0, 0] if (stream, start) == (1, 12) else value(stream, start)["deter"]
        assert torch.equal(latents["deter"][i], expected)


def test_every_trained_row_is_served_once_by_the_online_queue() -> None:
    replay, trained = make(stride=4, online_queue=True, length=40), []
    for position in range(33):
        replay.add(row_at(position))
        if position in (11, 32):
            served = starts_of(replay.sample(6 if position == 11 else 18))
            trained += [(stream, start + offset) for stream, start in served for offset in range(1, 5)]
    assert sorted(trained) == [(stream, position) for stream in range(3) for position in range(1, 33)]


def test_a_cut_stream_is_marked_in_chunks_too() -> None:
    replay = make(streams=1, stride=4)
    for position in range(9):
        row = row_at(position, 1)
        row["is_first"], row["is_last"] = torch.tensor([position in (0, 3, 6)]), torch.tensor([False])
        replay.add(row)
    rows, _ = replay.gather(torch.tensor([[0, 0], [0, 4]]))
    assert rows["is_last"].tolist() == [[False, False, True, False, False], [False, True, False, False, False]]


def test_lengths_are_whole_chunks_and_bytes_are_known_before_they_are_taken() -> None:
    replay = make(capacity=3 * 15 + 2, stride=4)
    assert (replay.length, replay.heads) == (12, 3)
    row, latent = 3 * 4 + 4 + 2 * 8 + 3, 4 + 5 * 4
    assert replay.nbytes == 3 * (12 * row + 3 * latent)
    assert replay.latent_nbytes == 3 * 3 * latent
    assert replay.nbytes == storage_bytes(ROWS, LATENTS, streams=3, capacity=47, stride=4)


def test_too_small_a_capacity_for_two_chunks_is_refused() -> None:
    with pytest.raises(UserError, match=r"replay.capacity: 23 .* keep 4 rows .* at least 24"):
        make(capacity=23, stride=4)
    make(capacity=24, stride=4)


def test_a_stride_that_cuts_windows_unevenly_is_refused() -> None:
    with pytest.raises(ValueError, match="stride 3"):
        make(stride=3)


def test_a_replay_of_another_stride_is_not_loaded() -> None:
    saved = make(stride=4)
    fill(saved, 0, 9)
    replay = make()
    with pytest.raises(UserError, match="latents of one row in 4, this agent stores those of one in 1"):
        replay.load_state_dict(saved.state_dict())
    assert len(replay) == 0


def test_a_file_from_before_there_were_strides_is_of_stride_one() -> None:
    saved = make()
    fill(saved, 0, 9)
    state = saved.state_dict()
    del state["stride"]
    replay = make()
    replay.load_state_dict(state)
    assert len(replay) == 27 and replay.device == CPU
