"""Environments that break, whichever way, are named, started anew, and leave no trace of the broken episode."""

import re

import faulty
import numpy as np
import pytest
from faulty import DEADLY, KINDS, Faulty

from envs.errors import EnvError, EnvironmentFailure
from envs.streams import Streams

SEED = 45
"""Of all first four episodes of three environments, only the first one of environment 1 has a draw above LUCK."""
ROWS = 12
EPISODE = 4
"""Rows of a whole episode."""


def name_of(kind, level="Faulty"):
    return f"gym_faulty:{level}{kind.title()}-v0"


def play(streams, row, steps):
    """Rows (T, N, ...), what broke by time, and what finished by time."""
    rows, broken, finished = [row], [streams.broken], [streams.finished]
    for time in range(steps):
        streams.send((np.arange(streams.amount) + time) % 3)
        rows.append(streams.receive())
        broken.append(streams.broken)
        finished.append(streams.finished)
    return {key: np.stack([row[key] for row in rows]) for key in rows[0]}, broken, finished


def sound_rows(steps=ROWS + EPISODE):
    streams = Streams("gym_faulty:Sound-v0", 3, parallel=False, seed=SEED)
    return play(streams, streams.reset(), steps)[0]


def without(rows, begin, end):
    """The rows of environment 1 when those from `begin` to `end` - 1 are not played."""
    return {key: np.concatenate([value[:begin, 1], value[end:, 1]]) for key, value in rows.items()}


def assert_rows(rows, index, expected):
    for key, value in expected.items():
        np.testing.assert_array_equal(rows[key][:, index], value[: len(rows[key])], err_msg=key)


def test_the_seed_breaks_one_episode():
    draws = sound_rows()["observation"][::EPISODE, :, 1]  # (4 episodes, 3 environments)
    assert draws.shape == (5, 3) and np.argwhere(draws > faulty.LUCK).tolist() == [[0, 1]]


@pytest.mark.parametrize(
    ("kind", "parallel"),
    [*((kind, False) for kind in KINDS), ("nan", True), *((kind, True) for kind in DEADLY)],
)
def test_a_broken_environment_is_named_and_its_next_episode_begins(kind, parallel):
    streams = Streams(name_of(kind), 3, parallel=parallel, seed=SEED, timeout=3, restarts=1)
    try:
        rows, broken, finished = play(streams, streams.reset(), ROWS)
    finally:
        streams.close()
    assert [bool(each) for each in broken] == [time == 2 for time in range(ROWS + 1)]
    (told,) = broken[2]
    assert (told.index, told.rows, streams.restarts) == (1, 2, 1)
    assert re.match(rf"environment 1 \({name_of(kind)}\) {(KINDS | DEADLY)[kind]}", str(told.failure))
    assert "\n" not in str(told.failure)
    expected = sound_rows()
    for index in (0, 2):
        assert_rows(rows, index, {key: value[:, index] for key, value in expected.items()})
    assert_rows(rows, 1, without(expected, 2, EPISODE))
    assert rows["is_first"][2, 1] and rows["reward"][2, 1] == 0
    ended = [(time, each.index, each.length) for time, told in enumerate(finished) for each in told]
    assert [each[:2] for each in ended] == [(3, 0), (3, 2), (5, 1), (7, 0), (7, 2), (9, 1), (11, 0), (11, 2)]
    assert all(length == 3 for _, _, length in ended)


def test_another_action_space_is_noticed_when_it_is_used():
    streams = Streams(name_of("action"), 3, parallel=False, seed=SEED, restarts=1)
    _, broken, _ = play(streams, streams.reset(), 3)
    (told,) = broken[3]
    assert "gave action_space, which became Discrete(5) and was Discrete(3, start=-1)" in str(told.failure)


def test_what_is_infinite_to_the_agent_is_not_finite():
    streams = Streams(name_of("huge"), 3, parallel=False, seed=SEED)
    with pytest.raises(EnvironmentFailure, match="holds NaN or infinite"):
        play(streams, streams.reset(), 3)


def test_an_episode_that_cannot_begin_is_passed_over():
    """Another seed: episode 1 of environment 1 raises in its reset, after episode 0 ended well."""
    seed = next(seed for seed in range(1000) if begins(seed) == [False, True, False])
    sound = Streams("gym_faulty:Sound-v0", 2, parallel=False, seed=seed - 1)
    expected = play(sound, sound.reset(), ROWS)[0]
    streams = Streams(name_of("reset"), 2, parallel=False, seed=seed - 1, restarts=100)
    rows, broken, finished = play(streams, streams.reset(), EPISODE + 2)
    (told,) = broken[EPISODE]
    assert (told.index, told.rows) == (1, 0) and "raised RuntimeError in reset: stuck" in str(told.failure)
    assert [each.index for each in finished[EPISODE - 1]] == [0, 1]
    assert_rows(rows, 1, without(expected, EPISODE, 2 * EPISODE))


def begins(seed):
    """Whether the first three episodes of an environment of this seed raise in their reset."""
    streams = Streams("gym_faulty:Sound-v0", 1, parallel=False, seed=seed)
    return (play(streams, streams.reset(), 2 * EPISODE)[0]["observation"][::EPISODE, 0, 1] > faulty.LUCK).tolist()


@pytest.mark.parametrize("parallel", [False, True])
def test_when_restarts_are_used_up_the_failure_is_raised(parallel):
    streams = Streams(name_of("raise", "Ruined"), 2, parallel=parallel, seed=0, restarts=3)
    processes = [getattr(worker, "process", None) for worker in streams._workers]
    try:
        streams.reset()
        used_up = "raised ValueError.*; env.restarts=3 is used up: mend it, or allow more"
        with pytest.raises(EnvironmentFailure, match=used_up):
            for _ in range(5):
                streams.send(np.zeros(2, np.int64))
                streams.receive()
    finally:
        streams.close()
    assert [(broken.index, broken.rows) for broken in streams.broken] == [(0, 2), (1, 2)]
    assert streams.state_dict()["row"] is None and streams.restarts == 3
    assert not any(process.is_alive() for process in processes if process)


def test_what_does_not_start_again_counts_too(monkeypatch):
    streams = Streams(name_of("raise"), 3, parallel=False, seed=SEED, restarts=2)
    row = streams.reset()
    monkeypatch.setattr(Faulty, "__init__", lambda self, **arguments: 1 / 0)
    with pytest.raises(
        EnvironmentFailure,
        match="environment 1: .* raised ZeroDivisionError when it was made: .*; env.restarts=2 is used up",
    ):
        play(streams, row, 3)
    assert [broken.rows for broken in streams.broken] == [2, 0, 0]


def test_other_spaces_after_a_new_start_are_a_failure(monkeypatch):
    streams = Streams(name_of("raise"), 3, parallel=False, seed=SEED, restarts=1)
    row = streams.reset()
    make = Faulty.__init__

    def changed(self, **arguments):
        make(self, **arguments)
        self.action_space = faulty.spaces.Discrete(2)

    monkeypatch.setattr(Faulty, "__init__", changed)
    with pytest.raises(EnvironmentFailure, match=r"changed its spaces: started anew it has .*Discrete\(2\)"):
        play(streams, row, 3)


def test_environments_with_unlike_spaces_are_refused(monkeypatch):
    make, made = Faulty.__init__, []

    def growing(self, **arguments):
        make(self, **arguments)
        made.append(self)
        self.action_space = faulty.spaces.Discrete(len(made))

    monkeypatch.setattr(Faulty, "__init__", growing)
    with pytest.raises(EnvError, match=r"environment 1 .* has the spaces .*, and environment 0 "):
        Streams("gym_faulty:Sound-v0", 2, parallel=False, seed=0)


@pytest.mark.parametrize("saved_at", [1, 2, 3, 6])  # before, at and after the failure
@pytest.mark.parametrize("parallel", [False, True])
def test_restored_streams_break_again_where_they_broke(saved_at, parallel):
    whole = Streams(name_of("raise"), 3, parallel=False, seed=SEED, restarts=5)
    expected, broken, _ = play(whole, whole.reset(), ROWS)
    stopped = Streams(name_of("raise"), 3, parallel=False, seed=SEED, restarts=5)
    play(stopped, stopped.reset(), saved_at)
    resumed = Streams(name_of("raise"), 3, parallel=parallel, seed=SEED, restarts=5)
    try:
        row, cut = resumed.restore(stopped.state_dict())
        assert cut == []
        rows = [row]
        for time in range(saved_at, ROWS):
            resumed.send((np.arange(3) + time) % 3)
            rows.append(resumed.receive())
            assert [each.rows for each in resumed.broken] == [each.rows for each in broken[time + 1]]
    finally:
        resumed.close()
    for key in expected:
        np.testing.assert_array_equal(np.stack([row[key] for row in rows]), expected[key][saved_at:], err_msg=key)
    assert resumed.restarts == whole.restarts == 1


def test_what_breaks_while_it_is_lived_through_again_is_cut(monkeypatch):
    monkeypatch.setattr(Faulty, "healthy", True)
    streams = Streams(name_of("raise"), 3, parallel=False, seed=SEED, restarts=1)
    play(streams, streams.reset(), 3)
    monkeypatch.setattr(Faulty, "healthy", False)
    row, cut = streams.restore(streams.state_dict())
    assert cut == [1] and row["is_first"].tolist() == [False, True, False]
    (told,) = streams.broken
    assert (told.index, told.rows, streams.restarts) == (1, 3, 1)
    expected = sound_rows()
    np.testing.assert_array_equal(row["observation"][1], expected["observation"][EPISODE, 1])
    np.testing.assert_array_equal(row["observation"][0], expected["observation"][3, 0])
