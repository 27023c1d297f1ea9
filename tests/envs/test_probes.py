"""The tasks of the probes: floors and optimum by simulation, gaps, and what episodes must be like."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from gymnasium import spaces

from envs.errors import EnvError
from envs.probe import TASKS, make
from envs.probes import noisy_recall
from envs.probes.continuous_recall import ContinuousRecall
from envs.probes.count import Count
from envs.probes.delay import Delay
from envs.probes.overwrite import Overwrite
from envs.probes.recall import NoisyRecall
from envs.probes.repeat_lag import RepeatLag
from envs.probes.store_recall import StoreRecall
from envs.probes.task import NOT_ASKED

LEVELS = [f"{name}_{level}" for name in TASKS for level in ("easy", "base", "hard")]

SMALL = [
    NoisyRecall(slots=24),
    StoreRecall(pairs=4, delay=3, queries=3),
    ContinuousRecall(pairs=4, dims=8, queries=4, blur=0.5, delay=3),
    Delay(classes=3, items=2, delay=5),
    RepeatLag(symbols=3, lag=4, questions=10),
    RepeatLag(symbols=3, lag=6, backwards=True),
    Overwrite(keys=4, writes=10, delay=3),
    Count(symbols=2, modulo=3, steps=20),
    Count(symbols=2, modulo=100, steps=12),
]
IDS = [f"{type(task).__name__}-{index}" for index, task in enumerate(SMALL)]


def play(task, policy, rng):
    """Return the episode and which of its actions were right; `policy` gives actions for observations."""
    episode = task.draw(rng)
    actions = [policy({key: value[t] for key, value in episode.shown.items()}) for t in range(task.length)]
    return episode, np.array(actions) == episode.answer


def accuracy(task, make_policy, episodes):
    """Share of right answers, and its standard error."""
    rng, hits = np.random.default_rng(0), []
    for _ in range(episodes):
        episode, right = play(task, make_policy(), rng)
        hits.append(right[episode.answer != NOT_ASKED])
    hits = np.concatenate(hits)
    return hits.mean(), math.sqrt(0.25 / len(hits))


@pytest.mark.parametrize("name", LEVELS)
def test_levels_have_the_shapes_they_promise_and_a_perfect_policy(name):
    task = make(name).task
    rng = np.random.default_rng(1)
    episode, right = play(task, task.policy(), rng)
    space = spaces.Dict(task.entries)
    assert set(episode.shown) == set(task.entries)
    for t in range(task.length + 1):
        assert space.contains({key: value[t] for key, value in episode.shown.items()})
    for array in (episode.answer, *episode.labels.values()):
        assert array.shape == (task.length,)
    asked = episode.answer != NOT_ASKED
    assert asked.any()
    assert ((episode.answer[asked] >= 0) & (episode.answer[asked] < task.actions)).all()
    assert 0 < task.floor < task.optimum <= 1
    if not name.startswith("continuous"):
        assert right[asked].all()
        numbers = task.metrics(episode, right)
        assert numbers["score"] == numbers["accuracy"] == 1.0
        assert all(value == 1.0 for value in numbers.values())


@pytest.mark.parametrize("task", SMALL, ids=IDS)
def test_best_policy_reaches_the_optimum_in_closed_form(task):
    share, error = accuracy(task, task.policy, 1500 if task.optimum < 1 else 50)
    assert abs(share - task.optimum) <= (4 * error if task.optimum < 1 else 0)


@pytest.mark.parametrize("task", SMALL, ids=IDS)
def test_guessing_reaches_the_floor_in_closed_form(task):
    guess = clock(task) if isinstance(task, Count) else lambda: lambda observation: 0
    share, error = accuracy(task, guess, 1500)
    assert abs(share - task.floor) <= 4 * error
    assert abs(task.score(share)) < 0.1


def clock(task):
    """Make policies that know the step, and the likeliest count there from 2,000 other episodes."""
    rng, tally = np.random.default_rng(7), np.zeros((task.length, task.modulo))
    for _ in range(2000):
        answer = task.draw(rng).answer
        steps = np.flatnonzero(answer != NOT_ASKED)
        tally[steps, answer[steps]] += 1
    best = tally.argmax(1)

    def make_policy():
        steps = iter(best)
        return lambda observation: next(steps)

    return make_policy


def test_floor_of_counting_matches_the_binomial_distribution():
    # Exact counts of a symbol that is shown with p = 1/4 at each step: the mode of Binomial(t, 1/4).
    task = Count(symbols=4, modulo=1000, steps=32, noise=0.0, asked=0.01)
    p = 0.99 / 4
    modes = [max(math.comb(t, n) * p**n * (1 - p) ** (t - n) for n in range(t + 1)) for t in range(32)]
    assert task.floor == pytest.approx(np.mean(modes))
    parity = Count(symbols=2, modulo=2, steps=2000, noise=0.0)
    assert parity.floor == pytest.approx(0.5, abs=0.01)


def test_bag_of_values_is_worth_one_over_pairs():
    rng = np.random.default_rng(0)
    for task in (StoreRecall(pairs=4, queries=4), ContinuousRecall(pairs=4, queries=4)):
        hits = []
        for _ in range(1500):
            answer = task.draw(rng).answer
            answer = answer[answer != NOT_ASKED]
            hits.append(answer == rng.choice(answer))  # all values are asked for, once each
        assert np.mean(hits) == pytest.approx(task.floors()["bag"], abs=1e-9)
        assert task.floors()["bag"] == 1 / 4


def test_floors_of_memories_that_do_not_overwrite():
    task = Overwrite(keys=4, values=6, writes=12, delay=2)
    rng, hits = np.random.default_rng(0), {"any_write": [], "first_write": []}
    for _ in range(3000):
        episode = task.draw(rng)
        tokens, asked = episode.shown["token"], episode.shown["asked"]
        for step in np.flatnonzero(asked):
            places = np.flatnonzero((tokens[:step] == tokens[step]) & (asked[:step] == 0))
            values = tokens[places + 1] - task.keys
            assert len(values) == episode.labels["writes"][step]
            hits["any_write"].append(rng.choice(values) == episode.answer[step])
            hits["first_write"].append(values[0] == episode.answer[step])
    for name, closed in task.floors().items():
        assert np.mean(hits[name]) == pytest.approx(closed, abs=4 * math.sqrt(0.25 / len(hits[name])))


def test_expected_questions_of_the_stream():
    for task in (NoisyRecall(slots=12), NoisyRecall(slots=6, noise=0.8, keys=3), NoisyRecall(slots=12, gap=3)):
        rng = np.random.default_rng(0)
        counts = [(task.draw(rng).answer != NOT_ASKED).sum() for _ in range(4000)]
        assert np.mean(counts) == pytest.approx(task.expected_questions, abs=4 * np.std(counts) / math.sqrt(4000))
    assert NoisyRecall().expected_questions == pytest.approx(43.5, abs=0.2)  # measured on MAD's own generator


def test_stream_is_distributed_as_the_sequences_of_the_probe_of_cores():
    sequences = noisy_recall.NoisyRecall(vocab=11, length=24, noise=0.5, noise_vocab=3)
    batch = sequences.sample(4000, torch.Generator().manual_seed(0))
    task, rng = NoisyRecall(slots=12, keys=4, values=4, noise_tokens=3, noise=0.5), np.random.default_rng(0)
    episodes = [task.draw(rng) for _ in range(4000)]
    tokens = np.stack([episode.shown["token"][:-1] for episode in episodes])
    asked = np.stack([episode.answer != NOT_ASKED for episode in episodes])
    for ours, theirs in ((asked, batch.scored.numpy()), *((tokens == t, batch.inputs.numpy() == t) for t in range(11))):
        np.testing.assert_allclose(ours.mean(0), theirs.mean(0), atol=5 * math.sqrt(2 * 0.25 / 4000))


def test_stream_keeps_the_rules_of_noisy_recall():
    task = NoisyRecall(slots=40, keys=4, values=5, noise_tokens=3, noise=0.5)
    rng, kinds = np.random.default_rng(0), []
    for _ in range(200):
        episode = task.draw(rng)
        slots, answer = episode.shown["token"].reshape(-1, 2), episode.answer
        known, last = {}, {}
        for index, (one, two) in enumerate(slots):
            kinds.append(one < 4)
            if one >= 4:
                assert one >= 9 and two >= 9  # noise comes in slots of its own
                assert answer[2 * index] == NOT_ASKED
                continue
            assert 4 <= two < 9
            assert answer[2 * index] == known.get(one, NOT_ASKED)
            if one in known:
                assert two - 4 == known[one]
                assert episode.labels["age"][2 * index] == 2 * index - last[one]
            known[one], last[one] = two - 4, 2 * index + 1
        assert (answer[1::2] == NOT_ASKED).all()
        assert answer[-1] != NOT_ASKED or len(known) == 1
    assert np.mean(kinds) == pytest.approx(0.5 * 39 / 40 + 0.5 / 40 + 1 / 40, abs=0.02)


@pytest.mark.parametrize("gap", [2, 4])
@pytest.mark.parametrize("task", SMALL, ids=IDS)
def test_gap_moves_what_is_needed_away(task, gap):
    far = dataclasses.replace(task, gap=gap)
    assert far.entries == task.entries and far.actions == task.actions

    def ages(each):
        rng = np.random.default_rng(0)
        drawn = [each.draw(rng) for _ in range(400)]
        return np.concatenate([episode.labels["age"][episode.answer != NOT_ASKED] for episode in drawn])

    # Distances of a few steps are whole numbers, and the number of questions is fixed, hence the tolerance.
    assert np.mean(ages(far)) / np.mean(ages(task)) == pytest.approx(gap, rel=0.25)
    episode, right = play(far, far.policy(), np.random.default_rng(0))
    if task.optimum == 1:
        assert right[episode.answer != NOT_ASKED].all()


def test_recall_is_told_apart_by_powers_of_two():
    task = RepeatLag(symbols=2, lag=3, backwards=True)
    episode = task.draw(np.random.default_rng(0))
    right = np.zeros(6, bool)
    right[4] = True
    assert list(episode.labels["age"][3:]) == [1, 3, 5]
    numbers = task.metrics(episode, right)
    assert numbers == {
        "accuracy": pytest.approx(1 / 3),
        "score": pytest.approx((1 / 3 - 1 / 2) / (1 / 2)),
        "recall_age_1": 0.0,
        "recall_age_4": 1.0,
        "recall_age_8": 0.0,
    }


def test_score_counts_the_items_held():
    task = StoreRecall(pairs=8, values=8, queries=8)
    held = 4 / 8 + (1 - 4 / 8) * task.floor  # four known, guesses at the rest
    assert 8 * task.score(held) == pytest.approx(4)


@pytest.mark.parametrize(
    ("kind", "options", "words"),
    [
        (NoisyRecall, {"noise": 1.0}, "noise is 1; allowed is 0 to 0.99"),
        (NoisyRecall, {"slots": 2.5}, "slots is 2.5; give an integer"),
        (NoisyRecall, {"gap": 0}, "gap is 0; allowed is 1 to inf"),
        (StoreRecall, {"pairs": 9}, "pairs is 9; allowed is at most the number of keys"),
        (StoreRecall, {"queries": 9}, "at most pairs, which is 8"),
        (ContinuousRecall, {"dims": 4}, "pairs is 8; allowed is at most the number of dims"),
        (Overwrite, {"writes": 3}, "at least keys, which is 8"),
        (Delay, {"distractors": 1}, "distractors is 1; give true or false"),
    ],
)
def test_wrong_options_are_told_on_one_line(kind, options, words):
    with pytest.raises(EnvError, match=words) as caught:
        kind(**options)
    assert "\n" not in str(caught.value)
