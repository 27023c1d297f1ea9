"""Replay against plain Python lists that never forget."""

from typing import Any

import pytest
import torch
from torch import Tensor

from agent import checkpoint
from agent.errors import UserError
from agent.replay import Replay, choose_device, storage_bytes

CPU = torch.device("cpu")
FLAGS: dict[str, tuple[tuple[int, ...], torch.dtype]] = dict.fromkeys(
    ("is_first", "is_last", "is_terminal"), ((), torch.bool)
)
ROWS = {
    "position": ((3,), torch.float32),
    "reward": ((), torch.float32),
    "action": ((2,), torch.int64),
    **FLAGS,
}
LATENTS = {"stoch": ((4,), torch.uint8), "deter": ((5,), torch.float32)}
EPISODE = 7


def make(streams: int = 3, length: int = 20, window: int = 5, **changes: Any) -> Replay:
    settings: dict[str, Any] = {
        "rows": ROWS,
        "latents": LATENTS,
        "device": CPU,
        "seed": 0,
        "online_queue": False,
    }
    return Replay(**{**settings, "streams": streams, "capacity": streams * length, "window": window, **changes})


def value(stream: int, position: int) -> dict[str, Tensor]:
    """The row a stream has at a position: every value tells which one it is; streams end episodes apart."""
    phase = (position + 2 * stream) % EPISODE
    identity = 1000.0 * stream + position
    return {
        "position": torch.tensor([identity, -identity, position]),
        "reward": torch.tensor(identity / 8),
        "action": torch.tensor([stream, position]),
        "is_first": torch.tensor(phase == 0),
        "is_last": torch.tensor(phase == EPISODE - 1),
        "is_terminal": torch.tensor(phase == EPISODE - 1 and stream == 1),
        "stoch": torch.tensor([stream, position % 256, position // 256, 7], dtype=torch.uint8),
        "deter": torch.full((5,), identity + 0.5),
    }


def row_at(position: int, streams: int = 3) -> dict[str, Tensor]:
    rows = [value(stream, position) for stream in range(streams)]
    return {key: torch.stack([row[key] for row in rows]) for key in rows[0]}


def fill(replay: Replay, begin: int, end: int) -> None:
    for position in range(begin, end):
        replay.add(row_at(position, replay.streams))


def starts_of(index: Tensor) -> list[tuple[int, int]]:
    return [(int(stream), int(start)) for stream, start in index.T]


@pytest.mark.parametrize("amount", [5, 13, 20, 21, 39, 40, 267])
def test_windows_hold_exactly_the_rows_added(amount: int) -> None:
    replay = make()
    fill(replay, 0, amount)
    oldest = max(0, amount - 20)
    assert len(replay) == 3 * (amount - oldest)
    windows = [(stream, start) for stream in range(3) for start in range(oldest, amount - 5 + 1)]
    rows, latents = replay.gather(torch.tensor(windows).T)
    assert rows.keys() == ROWS.keys() and latents.keys() == LATENTS.keys()
    for i, (stream, start) in enumerate(windows):
        expected = [value(stream, start + offset) for offset in range(5)]
        for key in ROWS:
            assert rows[key].dtype == ROWS[key][1]
            assert torch.equal(rows[key][i], torch.stack([row[key] for row in expected])), (
                key,
                stream,
                start,
            )
        for key in LATENTS:
            assert torch.equal(latents[key][i], expected[0][key]), (key, stream, start)


@pytest.mark.parametrize("amount", [11, 53])
def test_starts_are_uniform_over_all_whole_windows(amount: int) -> None:
    replay = make()
    fill(replay, 0, amount)
    oldest = max(0, amount - 20)
    counts = {(stream, start): 0 for stream in range(3) for start in range(oldest, amount - 5 + 1)}
    index = replay.sample(500 * len(counts))
    assert index.dtype == torch.int64 and index.shape == (2, 500 * len(counts)) and index.device == CPU
    for window in starts_of(index):
        counts[window] += 1  # KeyError: a window that is not whole
    freedom = len(counts) - 1
    statistic = sum((count - 500) ** 2 / 500 for count in counts.values())
    assert abs(statistic - freedom) < 4 * (2 * freedom) ** 0.5


def test_same_seed_same_samples_and_other_seed_others() -> None:
    one, same, other = make(), make(), make(seed=1)
    for replay in (one, same, other):
        fill(replay, 0, 20)
    first = one.sample(50)
    assert torch.equal(first, same.sample(50))
    assert not torch.equal(first, other.sample(50))
    assert not torch.equal(first, one.sample(50))


def test_online_queue_serves_every_window_once_before_uniform_samples() -> None:
    replay, waiting, served = make(online_queue=True), [], []
    for position in range(100):
        replay.add(row_at(position))
        if (position + 1) % 5 == 0:
            waiting += [(stream, position - 4) for stream in range(3)]
        if position >= 4 and position % 2 == 0:
            due, waiting = waiting[:2], waiting[2:]
            got = starts_of(replay.sample(2))
            assert got[: len(due)] == due
            served += due
    assert len(set(served)) == len(served) > 50
    assert set(served + waiting) == {(stream, start) for stream in range(3) for start in range(0, 100, 5)}


def test_online_queue_drops_what_was_overwritten() -> None:
    replay = make(online_queue=True)
    fill(replay, 0, 33)  # positions 13..32 are held
    expected = [(stream, start) for start in (15, 20, 25) for stream in range(3)]
    assert starts_of(replay.sample(9)) == expected
    counts = {start for _, start in starts_of(replay.sample(3000))}
    assert counts == set(range(13, 29))


def test_ready_needs_prefill_and_a_whole_window() -> None:
    replay = make()
    fill(replay, 0, 4)
    assert not replay.ready(1)
    fill(replay, 4, 5)
    assert replay.ready(15) and not replay.ready(16)
    with pytest.raises(UserError, match="replay.prefill: 61"):
        replay.ready(61)


@pytest.mark.parametrize("amount", [20, 47])
def test_write_back_is_seen_by_later_context_rows_and_only_there(amount: int) -> None:
    replay = make()
    fill(replay, 0, amount)
    truth = {(s, p): value(s, p) for s in range(3) for p in range(amount - 20, amount)}
    windows = [(0, amount - 20), (2, amount - 5), (1, amount - 12), (1, amount - 8)]  # the last two touch
    fresh = {
        "stoch": torch.arange(64).reshape(4, 4, 4).to(torch.uint8) + 100,
        "deter": -torch.arange(80.0).reshape(4, 4, 5).requires_grad_(),
    }
    replay.write_back(torch.tensor(windows).T, fresh)
    for i, (stream, start) in enumerate(windows):
        for offset in range(1, 5):
            truth[stream, start + offset].update({key: fresh[key][i, offset - 1] for key in LATENTS})
    context = [(s, p) for s, p in truth if p <= amount - 5]
    rows, latents = replay.gather(torch.tensor(context).T)
    assert not latents["deter"].requires_grad
    for i, window in enumerate(context):
        for key in LATENTS:
            assert torch.equal(latents[key][i], truth[window][key]), (key, window)
        assert torch.equal(rows["position"][i, 0], truth[window]["position"])
    stored = replay.state_dict()["tensors"]["deter"]  # rows too late to start a window, too
    for (stream, position), row in truth.items():
        assert torch.equal(stored[stream, position % 20], row["deter"])


def test_overlapping_write_back_leaves_one_of_the_values() -> None:
    replay = make()
    fill(replay, 0, 20)
    fresh = {key: torch.ones((2, 4, *LATENTS[key][0])) for key in LATENTS}
    fresh = {key: torch.stack([tensor[0], 2 * tensor[1]]) for key, tensor in fresh.items()}
    replay.write_back(torch.tensor([[1, 1], [3, 4]]), fresh)
    _, latents = replay.gather(torch.tensor([[1] * 7, list(range(3, 10))]))
    assert torch.equal(latents["deter"][0], value(1, 3)["deter"])
    for position, deter in zip(range(4, 9), latents["deter"][1:6], strict=True):
        allowed = [w + 1.0 for w, start in enumerate((3, 4)) if start < position < start + 5]
        assert deter[0] in allowed and torch.equal(deter, deter[:1].expand(5))
    assert torch.equal(latents["deter"][6], value(1, 9)["deter"])


def test_missing_is_last_before_is_first_is_patched_in_the_copy() -> None:
    replay = make(streams=2)
    firsts, lasts = {0: (0, 3, 6), 1: (0, 4)}, {0: (2,), 1: ()}
    for position in range(8):
        row = row_at(position, 2)
        row["is_first"] = torch.tensor([position in firsts[stream] for stream in range(2)])
        row["is_last"] = torch.tensor([position in lasts[stream] for stream in range(2)])
        replay.add(row)
    rows, _ = replay.gather(torch.tensor([[0, 0, 1, 1], [1, 2, 3, 0]]))
    expected = [[2], [2, 5], [3], [3]]  # the last row of the first window cannot see what comes after it
    for i, (start, ends) in enumerate(zip((1, 2, 3, 0), expected, strict=True)):
        assert rows["is_last"][i].tolist() == [start + offset in ends for offset in range(5)]
    assert replay.state_dict()["tensors"]["is_last"].sum() == 1  # the stored rows are as they were added


@pytest.mark.parametrize("amount", [0, 8, 20, 53])
def test_save_and_load_go_on_identically(amount: int, tmp_path: Any) -> None:
    one, two = make(online_queue=True), make(online_queue=True, seed=99)
    fill(two, 0, 11)  # what is loaded replaces it
    fill(one, 0, amount)
    if amount:
        one.sample(4)
    two.load_state_dict(checkpoint.load(checkpoint.save(tmp_path, amount, one.state_dict(), keep=1)))
    for position in range(amount, amount + 45):
        for replay in (one, two):
            replay.add(row_at(position))
        assert len(one) == len(two)
        if one.ready(15):
            index = one.sample(4)
            assert torch.equal(index, two.sample(4))
            ours, theirs = one.gather(index), two.gather(index)
            for mine, other in zip(ours, theirs, strict=True):
                assert all(torch.equal(mine[key], other[key]) for key in mine)
            fresh = {
                "stoch": torch.full((4, 4, 4), position),
                "deter": torch.full((4, 4, 5), -1.0 * position),
            }
            one.write_back(index, fresh)
            two.write_back(index, fresh)


@pytest.mark.parametrize(("amount", "length"), [(13, 31), (53, 31), (53, 8), (13, 8), (20, 27)])
def test_loading_into_another_capacity_keeps_the_newest(amount: int, length: int) -> None:
    source, target = make(online_queue=True), make(online_queue=True, length=length)
    fill(source, 0, amount)
    for extra in (0, 3, 40):  # right after loading, and when the larger ring fills up and wraps
        target.load_state_dict(source.state_dict())
        again = make(online_queue=True, length=length)
        fill(target, amount, amount + extra)
        again.load_state_dict(target.state_dict())  # a ring neither full nor begun at 0 is saved right, too
        oldest = max(0, amount - 20, amount + extra - length)
        windows = [(stream, start) for stream in range(3) for start in range(oldest, amount + extra - 5 + 1)]
        for replay in (target, again):
            assert len(replay) == 3 * (amount + extra - oldest)
            rows, latents = replay.gather(torch.tensor(windows).T)
            for i, (stream, start) in enumerate(windows):
                assert rows["action"][i].tolist() == [[stream, start + offset] for offset in range(5)]
                assert torch.equal(latents["deter"][i], value(stream, start)["deter"])
        assert set(starts_of(target.sample(4000))) == set(windows)


def test_state_holds_only_what_is_held() -> None:
    replay = make(length=1000)
    fill(replay, 0, 9)
    tensors = replay.state_dict()["tensors"]
    assert all(tensor.shape[:2] == (3, 9) for tensor in tensors.values())
    assert all(tensor.untyped_storage().nbytes() == tensor.nbytes for tensor in tensors.values())


def test_loading_a_mismatch_names_it_and_changes_nothing() -> None:
    state = make().state_dict()
    wider = {**LATENTS, "deter": ((6,), torch.float32)}
    typed = {**ROWS, "action": ((2,), torch.float32)}
    fewer = {key: spec for key, spec in ROWS.items() if key != "reward"}
    cases: list[tuple[dict[str, Any], str]] = [
        ({"streams": 2}, "3 environments, but env.amount is 2"),
        ({"latents": wider}, r"deter is torch.float32 \(5,\), this agent stores torch.float32 \(6,\)"),
        ({"rows": typed}, "action is torch.int64"),
        ({"rows": fewer}, "reward is not stored by this agent"),
        ({"rows": {**ROWS, "camera": ((2,), torch.uint8)}}, "camera is not in it"),
    ]
    for changes, message in cases:
        replay = make(**changes)
        with pytest.raises(UserError, match=message) as caught:
            replay.load_state_dict(state)
        assert "\n" not in str(caught.value)
        assert len(replay) == 0


def test_rows_of_other_keys_or_shapes_are_refused() -> None:
    replay, row = make(), row_at(0)
    with pytest.raises(ValueError, match="replay stores"):
        replay.add({key: row[key] for key in row if key != "deter"})
    with pytest.raises(ValueError, match="reward"):
        replay.add({**row, "reward": row["reward"][:1]})
    assert len(replay) == 0


def test_too_small_a_capacity_is_refused() -> None:
    with pytest.raises(UserError, match="replay.capacity: 14.*at least 15"):
        make(capacity=14)


def test_too_large_a_capacity_is_refused() -> None:
    with pytest.raises(UserError, match="replay.capacity.*GB"):
        make(capacity=3 * 10**15)


def test_bytes_are_known_before_they_are_taken() -> None:
    per_row = 3 * 4 + 4 + 2 * 8 + 3 + 4 + 5 * 4
    assert make(capacity=61).nbytes == storage_bytes(ROWS, LATENTS, streams=3, capacity=61) == 60 * per_row


def test_device_follows_the_agent_and_its_free_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1000, 4000))
    assert choose_device("auto", 500, cuda) == cuda
    assert choose_device("auto", 501, cuda) == CPU
    assert choose_device("cuda", 501, cuda) == cuda
    assert choose_device("cpu", 1, cuda) == CPU
    assert choose_device("auto", 1, CPU) == CPU
    with pytest.raises(UserError, match="replay.device"):
        choose_device("cuda", 1, CPU)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_gather_and_write_back_run_in_a_cuda_graph() -> None:
    device = torch.device("cuda")
    replay, reference = make(device=device), make()
    fill(replay, 0, 33)
    fill(reference, 0, 33)
    index = torch.zeros((2, 4), dtype=torch.int64, device=device)
    index[1] = 13
    fresh = {
        "stoch": torch.zeros((4, 4, 4), dtype=torch.uint8, device=device),
        "deter": torch.zeros((4, 4, 5), device=device),
    }
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):  # a host synchronisation in here raises
        rows, latents = replay.gather(index)
        replay.write_back(index, fresh)
    for step in range(10):
        windows = torch.tensor([[0, 1, 2, 2], [13 + step, 14 + step, 15 + step, 20 + step]])
        values = {key: torch.full(tensor.shape, step, dtype=tensor.dtype) for key, tensor in fresh.items()}
        expected = reference.gather(windows)
        reference.write_back(windows, values)
        index.copy_(windows)
        for key in fresh:
            fresh[key].copy_(values[key])
        graph.replay()
        for mine, other in zip((rows, latents), expected, strict=True):
            assert all(torch.equal(mine[key].cpu(), other[key]) for key in other)
        for each in (replay, reference):
            each.add(row_at(33 + step))
