"""Noisy recall against a slow reader that knows the rules, and against numbers measured from MAD's own generator."""

from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch

from envs.errors import EnvError
from envs.probes.noisy_recall import Batch, MultiQueryRecall, NoisyRecall


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def whole(batch: Batch) -> np.ndarray:
    """Inputs and the last target: the tokens (B, S, 2) of all slots."""
    assert torch.equal(batch.inputs[:, 1:], batch.targets[:, :-1])
    tokens = torch.cat([batch.inputs, batch.targets[:, -1:]], 1)
    return tokens.unflatten(1, (-1, 2)).numpy()


def read_sequence(task: NoisyRecall, slots: np.ndarray, scored: np.ndarray) -> dict[str, Any]:
    """Reads one sequence (S, 2) slot by slot, checks it, and says what it saw; scored (S,) is of values."""
    keys = task.keys
    bound: dict[int, int] = {}
    seen: dict[int, int] = {}  # slot in which a key was shown last
    last_value = None
    found: dict[str, Any] = {"pairs": 0, "known": 0, "rebound": 0, "gaps": [], "bag": [], "last": []}
    for t, (key, value) in enumerate(slots):
        if key >= 2 * keys:
            assert 2 * keys <= value < task.vocab, "noise comes in pairs of noise tokens"
            assert not scored[t]
            continue
        assert 0 <= key < keys
        assert keys <= value < 2 * keys
        if scored[t]:
            assert bound[key] == value, "what is scored follows from what was shown"
            counts = Counter(bound.values())
            found["bag"].append(counts[value] == max(counts.values()) and value == min(
                other for other, count in counts.items() if count == max(counts.values())
            ))  # fmt: skip
            found["last"].append(last_value == value)
            found["gaps"].append(2 * (t - seen[key]))
        elif key in bound:
            found["rebound"] += t < len(slots) - 1
        found["known"] += key in bound
        found["pairs"] += 1
        bound[key], seen[key], last_value = value, t, value
    assert slots[-1, 0] < keys
    found["end"] = bool(scored[-1])
    return found


def read_batch(task: NoisyRecall, batch: Batch) -> list[dict[str, Any]]:
    scored = torch.cat([torch.zeros_like(batch.scored[:, :1]), batch.scored], 1).unflatten(1, (-1, 2)).numpy()
    assert not scored[..., 0].any(), "only values are scored"
    return [
        read_sequence(task, slots, own[:, 1]) for slots, own in zip(whole(batch), scored, strict=True)
    ]  # fmt: skip


TASKS = [
    NoisyRecall(32, 128, 0.2, 16),
    NoisyRecall(96, 96, 0.8, 16),
    NoisyRecall(12, 40, 0.0, 4),
    NoisyRecall(32, 128, 0.4, 8, rebind=0.3),
]


@pytest.mark.parametrize("task", TASKS)
def test_every_sequence_follows_the_rules(task: NoisyRecall) -> None:
    batch = task.sample(60, generator())
    assert batch.inputs.shape == batch.targets.shape == batch.scored.shape == (60, task.length - 1)
    assert batch.inputs.dtype == torch.int64
    assert batch.trained.all()
    found = read_batch(task, batch)
    assert all(each["end"] for each in found), "the last slot is a known key"
    if task.rebind == 0:
        assert all(each["known"] == len(each["gaps"]) and not each["rebound"] for each in found)
    # Without a guarantee, noise at 0.8 would leave some of 60 sequences of 48 slots without a pair.
    assert all(each["pairs"] >= 2 for each in found)


def test_a_share_of_slots_is_noise_and_one_is_exempt() -> None:
    task, batch = NoisyRecall(32, 64, 0.7, 16), 4000
    slots = task.sample_slots(batch, generator())
    share = slots.pair[:, :-1].float().mean().item()
    expected = 0.3 + 0.7 / 32  # the exempt slot is any of 32
    assert share == pytest.approx(expected, abs=4 * (expected * (1 - expected) / (batch * 31)) ** 0.5)
    assert slots.pair[:, -1].all()


def test_with_nothing_but_noise_one_pair_is_left() -> None:
    slots = NoisyRecall(32, 16, 1.0, 16).sample_slots(2000, generator())
    left = slots.pair[:, :-1].sum(1)
    assert set(left.tolist()) == {0, 1}
    assert (left == 0).float().mean().item() == pytest.approx(1 / 8, abs=0.03)  # the exempt slot was the last
    assert torch.equal(slots.known[:, -1], left == 1)
    only = slots.pair[:, :-1].float().argmax(1)
    rows = left == 1
    assert torch.equal(slots.key.gather(1, only[:, None])[rows, 0], slots.key[rows, -1])
    assert (slots.pair[:, :-1].sum(0) / 2000).numpy() == pytest.approx(np.full(7, 1 / 8), abs=0.03)


def assert_uniform(values: torch.Tensor, amount: int) -> None:
    counts = torch.bincount(values.flatten(), minlength=amount).double()
    assert len(counts) == amount
    expected = counts.sum() / amount
    chi = ((counts - expected) ** 2 / expected).sum().item()
    assert chi < amount + 5 * (2 * amount) ** 0.5


def test_keys_values_and_noise_are_uniform_and_values_are_drawn_with_replacement() -> None:
    task = NoisyRecall(32, 64, 0.3, 16)
    slots = task.sample_slots(3000, generator())
    assert_uniform(slots.key[:, :-1][slots.pair[:, :-1]], 8)
    assert_uniform(slots.value[slots.bound], 8)
    assert_uniform(slots.noise[~slots.pair], 16)
    first, second = slots.noise[~slots.pair].unbind(-1)
    assert_uniform(first * 16 + second, 256)  # independent
    # The second key of a sequence has the first one's value once in eight times.
    same = []
    for values in (slots.value[row][slots.bound[row]] for row in range(1000)):
        same += [bool(values[0] == values[1])] if len(values) > 1 else []
    assert np.mean(same) == pytest.approx(1 / 8, abs=0.035)


def test_the_last_key_is_uniform_among_those_shown_however_often() -> None:
    slots = NoisyRecall(8, 12, 0.0, 4).sample_slots(6000, generator())  # two keys, five slots before the last
    ones = slots.key[:, :-1].sum(1)
    once = ones == 1  # key 1 was shown once, key 0 four times
    assert once.sum() > 500
    assert slots.key[once, -1].float().mean().item() == pytest.approx(0.5, abs=0.07)
    assert (slots.key[ones == 0, -1] == 0).all() and (slots.key[ones == 5, -1] == 1).all()


def test_a_rebound_key_has_its_new_value_from_then_on() -> None:
    task = NoisyRecall(24, 128, 0.3, 8, rebind=0.25)
    found = read_batch(task, task.sample(300, generator()))
    rebound = sum(each["rebound"] for each in found)
    known = sum(each["known"] for each in found) - len(found)  # the last slot never binds
    assert rebound / known == pytest.approx(0.25, abs=0.02)


# Measured from the original generator: scored positions, median and 95 % gap in tokens, bag, last.
MEASURED = {
    (32, 128, 0.2): (43.5, 12, 48, 0.34, 0.25),
    (32, 128, 0.8): (7.8, 28, 92, 0.39, 0.32),
    (144, 128, 0.2): (16.4, 32, 96, 0.10, 0.07),
    (80, 512, 0.8): (27.1, 104, 348, 0.15, 0.09),
    (96, 768, 0.8): (44.7, 150, 496, 0.12, 0.07),
    (96, 1024, 0.8): (67.5, 170, 612, 0.11, 0.06),
}


@pytest.mark.parametrize("setting", MEASURED)
def test_floors_and_gaps_are_those_of_the_original(setting: tuple[int, int, float]) -> None:
    scored, median, far, bag, last = MEASURED[setting]
    task = NoisyRecall(*setting, 16)
    batch = task.sample(600, generator())
    floors = task.floors(batch)
    assert batch.scored.sum(1).float().mean().item() == pytest.approx(scored, rel=0.03)
    assert floors["chance"] == 2 / (setting[0] - 16)
    assert floors["bag"] == pytest.approx(bag, abs=0.015)
    assert floors["last"] == pytest.approx(last, abs=0.012)
    gaps = np.concatenate([each["gaps"] for each in read_batch(task, Batch(*(part[:200] for part in batch)))])
    assert np.median(gaps) == pytest.approx(median, rel=0.12)
    assert np.quantile(gaps, 0.95) == pytest.approx(far, rel=0.12)


@pytest.mark.parametrize("task", TASKS)
def test_floors_are_what_the_reader_counts(task: NoisyRecall) -> None:
    batch = task.sample(40, generator(1))
    found = read_batch(task, batch)
    floors = task.floors(batch)
    for name in ("bag", "last"):
        assert floors[name] == pytest.approx(np.mean(np.concatenate([each[name] for each in found])), abs=1e-6)


def test_the_generator_alone_decides() -> None:
    task = NoisyRecall(32, 64, 0.5, 16)
    first, again, other = (task.sample(4, generator(seed)) for seed in (3, 3, 4))
    assert torch.equal(first.inputs, again.inputs)
    assert not torch.equal(first.inputs, other.inputs)


# ---- multi-query recall --------------------------------------------------------------------------------------


def test_multi_query_recall_follows_its_rules() -> None:
    task = MultiQueryRecall(64, 48, 8, power=0.1, random_fill=False)
    batch = task.sample(300, generator())
    assert batch.inputs.shape == batch.targets.shape == (300, 48)
    assert torch.equal(batch.trained, batch.scored)
    for inputs, targets, scored in zip(batch.inputs, batch.targets, batch.scored, strict=True):
        keys, values = inputs[:16:2].tolist(), inputs[1:16:2].tolist()
        assert len(set(keys)) == len(set(values)) == 8
        assert min(keys) >= 1 and max(keys) < 32 <= min(values) and max(values) < 64
        places = scored.nonzero()[:, 0]
        assert len(places) == 8 and (places >= 16).all() and (places % 2 == 0).all()
        pairs = dict(zip(keys, values, strict=True))
        assert {key: pairs[key] for key in inputs[places].tolist()} == pairs
        assert targets[places].tolist() == [pairs[key] for key in inputs[places].tolist()]
        assert (inputs[16:][~scored[16:]] == 0).all()
    assert task.floors(batch) == {"chance": 1 / 32, "bag": 1 / 8}


@pytest.mark.parametrize("power", [0.1, 1.0])
def test_queries_lie_as_the_power_law_has_them(power: float) -> None:
    """A single query is at place n, of 8, with probability n^(power - 1) over their sum."""
    batch = MultiQueryRecall(32, 18, 1, power, random_fill=True).sample(6000, generator())
    share = batch.scored[:, 2::2].float().mean(0).numpy()
    weight = np.arange(1, 9) ** (power - 1)
    assert share == pytest.approx(weight / weight.sum(), abs=0.02)


def test_the_rest_is_random_where_that_is_asked_for() -> None:
    batch = MultiQueryRecall(32, 40, 2, 0.5, random_fill=True).sample(2000, generator())
    assert_uniform(batch.inputs[:, 4:][~batch.scored[:, 4:]], 32)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: NoisyRecall(33, 128, 0.2, 16), "even"),
        (lambda: NoisyRecall(16, 128, 0.2, 16), "vocab 16"),
        (lambda: NoisyRecall(32, 127, 0.2, 16), "length 127"),
        (lambda: NoisyRecall(32, 128, 1.2, 16), "noise 1.2"),
        (lambda: NoisyRecall(32, 128, 0.2, 16, rebind=-1), "rebind -1"),
        (lambda: MultiQueryRecall(33, 64, 4, 0.1, True), "vocab 33"),
        (lambda: MultiQueryRecall(32, 64, 16, 0.1, True), "pairs 16"),
        (lambda: MultiQueryRecall(64, 64, 20, 0.1, True), "80 or more"),
        (lambda: MultiQueryRecall(64, 64, 4, 0.0, True), "power 0"),
    ],
)
def test_a_number_out_of_range_is_told_in_one_line(make: Any, message: str) -> None:
    with pytest.raises(EnvError, match=message) as caught:
        make()
    assert "\n" not in str(caught.value)
