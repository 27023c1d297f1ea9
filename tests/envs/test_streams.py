import os
import re
import signal

import numpy as np
import pytest
import test_tiny

from envs import episodes
from envs.errors import EnvError, EnvironmentFailure
from envs.streams import Finished, Streams

TINY = f"gym_{test_tiny.__name__}:"  # importing the module registers its ids


def step(streams):
    """Take one step with action 0."""
    streams.send(np.zeros(streams.amount, np.int64))
    return streams.receive()


def collect(streams, steps):
    """Step with action 0 and stack the rows over time: (T, N, ...)."""
    rows = [streams.reset()]
    rows += [step(streams) for _ in range(steps)]
    return {key: np.stack([row[key] for row in rows]) for key in rows[0]}


@pytest.mark.parametrize(("name", "length", "terminal"), [("Tiny-v0", 3, True), ("TinyLimited-v0", 2, False)])
def test_flags_line_up_with_the_episodes(name, length, terminal):
    streams = Streams(TINY + name, 2, parallel=False, seed=0)
    rows = collect(streams, 2 * (length + 1))
    time = np.arange(2 * (length + 1) + 1) % (length + 1)  # step within the episode
    for stream in range(2):
        np.testing.assert_array_equal(rows["observation"][:, stream, 0], time)
        np.testing.assert_array_equal(rows["is_first"][:, stream], time == 0)
        np.testing.assert_array_equal(rows["is_last"][:, stream], time == length)
        np.testing.assert_array_equal(rows["is_terminal"][:, stream], (time == length) & terminal)
        np.testing.assert_array_equal(rows["reward"][:, stream], time)
    assert rows["reward"].dtype == np.float32
    assert rows["observation"].dtype == np.float32


def test_finished_gives_return_and_length_of_each_episode():
    streams = Streams("gym_Tiny-v0", 2, parallel=False, seed=0)
    streams.reset()
    finished = []
    for _ in range(8):
        step(streams)
        finished.append(streams.finished)
    ended = [Finished(0, 6.0, 3, {}), Finished(1, 6.0, 3, {})]
    assert finished == [[], [], ended, [], [], [], ended, []]


def test_parallel_and_serial_streams_give_the_same_rows():
    serial = Streams(TINY + "Tiny-v0", 3, parallel=False, seed=5, action_repeat=2)
    parallel = Streams(TINY + "Tiny-v0", 3, parallel=True, seed=5, action_repeat=2)
    try:
        expected, rows = collect(serial, 9), collect(parallel, 9)
        assert parallel.observation_space == serial.observation_space
        processes = [worker.process for worker in parallel._workers]
        os.kill(processes[0].pid, signal.SIGINT)  # Ctrl-C is the main process' business
        parallel.send(np.zeros(3, np.int64))
    finally:
        parallel.close()
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert len(np.unique(rows["observation"][0, :, 1])) == 3  # every stream has a seed of its own
    for key in expected:
        np.testing.assert_array_equal(rows[key], expected[key], err_msg=key)


@pytest.mark.parametrize("parallel", [False, True])
def test_failing_environment_is_named_with_its_traceback(parallel):
    name = TINY + "TinyFailing-v0"
    draws = [np.random.default_rng(seed).uniform() for seed in range(16, 19)]
    guilty = [index for index, draw in enumerate(draws) if draw > 0.7]
    assert guilty == [1]
    streams = Streams(name, 3, parallel=parallel, seed=16)
    try:
        streams.reset()
        with pytest.raises(EnvironmentFailure) as caught:
            step(streams)
    finally:
        streams.close()
    raised = f"environment 1 ({name}) raised ValueError in step: a gear broke at 100 %d"
    assert re.fullmatch(re.escape(raised) + r" \(.*test_tiny\.py:\d+\)", str(caught.value))
    assert caught.value.details.startswith("Traceback") and "test_tiny.py" in caught.value.details
    assert (caught.value.index, caught.value.name) == (1, name)


def test_killed_process_is_named():
    streams = Streams(TINY + "Tiny-v0", 2, parallel=True, seed=0)
    processes = [worker.process for worker in streams._workers]
    try:
        streams.reset()
        os.kill(processes[1].pid, signal.SIGKILL)
        with pytest.raises(EnvironmentFailure, match=r"environment 1 .* exit code -9"):
            step(streams)
    finally:
        streams.close()
    assert not any(process.is_alive() for process in processes)


def actions_at(time):
    return (np.arange(3) + time) % 3


@pytest.mark.parametrize("parallel", [False, True])
@pytest.mark.parametrize("saved_at", [0, 5, 6, 7, 8, 9, 10])  # first, last and inner rows of episodes are among them
def test_restored_streams_go_on_as_if_never_stopped(parallel, saved_at):
    def run(streams, row, begin):
        rows, finished = [row], [streams.finished]
        for time in range(begin, 25):
            streams.send(actions_at(time))
            rows.append(streams.receive())
            finished.append(streams.finished)
        return {key: np.stack([row[key] for row in rows]) for key in rows[0]}, finished

    whole = Streams(TINY + "TinyMoody-v0", 3, parallel=False, seed=4)
    expected, finished = run(whole, whole.reset(), 0)
    assert expected["is_last"].sum() > 5 and len(np.unique(expected["observation"][:, :, 1])) > 20
    stopped = Streams(TINY + "TinyMoody-v0", 3, parallel=False, seed=4)
    stopped.reset()
    for time in range(saved_at):
        stopped.send(actions_at(time))
        stopped.receive()
    resumed = Streams(TINY + "TinyMoody-v0", 3, parallel=parallel, seed=4)
    try:
        row, cut = resumed.restore(stopped.state_dict())
        assert cut == []
        again = resumed.state_dict()  # a run may be stopped again at once
        rows, ends = run(resumed, row, saved_at)
    finally:
        resumed.close()
    for key in expected:
        np.testing.assert_array_equal(rows[key], expected[key][saved_at:], err_msg=key)
        np.testing.assert_array_equal(again["row"][key], expected[key][saved_at])
    assert ends[1:] == finished[saved_at + 1 :]


@pytest.mark.parametrize("task", ["walker_walk", "finger_turn_hard"])
def test_physics_are_lived_through_again(task):
    """From a simulation that has played other episodes before, by one that has not."""
    pytest.importorskip("dm_control")
    whole = Streams(f"dmc_{task}", 2, parallel=False, seed=3, action_repeat=2, time_limit=15)
    resumed = Streams(f"dmc_{task}", 2, parallel=False, seed=3, action_repeat=2, time_limit=15)
    random = np.random.default_rng(0)
    whole.reset()
    for _ in range(40):
        whole.send(random.uniform(-1, 1, (2, *whole.action_space.shape)).astype(np.float32))
        whole.receive()
    _, cut = resumed.restore(whole.state_dict())
    assert cut == [] and min(whole._lengths) > 5
    for _ in range(20):
        actions = random.uniform(-1, 1, (2, *whole.action_space.shape)).astype(np.float32)
        whole.send(actions)
        resumed.send(actions)
        expected, row = whole.receive(), resumed.receive()
        for key in expected:
            np.testing.assert_array_equal(row[key], expected[key], err_msg=key)


def test_every_episode_has_a_seed_of_its_own():
    streams = Streams("gym_Tiny-v0", 2, parallel=False, seed=0)
    rows = collect(streams, 40)
    assert len(np.unique(rows["observation"][:, :, 1])) == 2 * 11


def test_an_environment_that_its_seed_does_not_govern_is_cut():
    streams = Streams(TINY + "TinyForgetful-v0", 2, parallel=False, seed=0)
    collect(streams, 2)
    row, cut = streams.restore(streams.state_dict())
    assert cut == [0, 1]
    assert row["is_first"].all() and not row["is_last"].any() and not row["reward"].any()
    for _ in range(3):
        step(streams)
    ended = [(episode.index, episode.episode_return, episode.length) for episode in streams.finished]
    assert ended == [(0, 6.0, 3), (1, 6.0, 3)]  # nothing of the cut episode counts


def test_too_long_an_episode_is_cut_and_the_others_are_not(monkeypatch):
    monkeypatch.setattr(episodes, "LONGEST", 3)
    streams = Streams(TINY + "TinyMoody-v0", 3, parallel=False, seed=4)
    streams.reset()
    while max(streams._lengths) < 5:
        step(streams)
    lengths = streams._lengths.copy()
    assert min(lengths) <= 3
    row, cut = streams.restore(streams.state_dict())
    assert cut == [index for index in range(3) if lengths[index] > 3]
    np.testing.assert_array_equal(row["is_first"], (lengths > 3) | (lengths == 0))


def test_after_a_failure_new_episodes_begin():
    streams = Streams(TINY + "TinyNan-v0", 2, parallel=False, seed=0)
    streams.reset()
    step(streams)
    with pytest.raises(EnvironmentFailure):
        step(streams)
    row, cut = streams.restore(streams.state_dict())
    assert cut == [0, 1] and row["is_first"].all()


@pytest.mark.parametrize("parallel", [False, True])
@pytest.mark.parametrize(
    ("name", "what"), [("TinyNan", "observation 'observation' that holds NaN"), ("TinyInfinite", "the reward inf")]
)
def test_a_number_that_is_not_finite_is_named_with_its_environment(name, what, parallel):
    streams = Streams(f"{TINY}{name}-v0", 2, parallel=parallel, seed=0)
    try:
        streams.reset()
        step(streams)
        with pytest.raises(EnvironmentFailure, match=f"environment 0 .*{name}-v0.* gave {what}") as caught:
            step(streams)
        assert "\n" not in str(caught.value)
    finally:
        streams.close()


def test_mistakes_come_before_any_process_starts():
    with pytest.raises(EnvError, match="number of environments is 0"):
        Streams("gym_Tiny-v0", 0, parallel=True, seed=0)
    with pytest.raises(EnvError, match="did you mean dmc_walker_walk"):
        Streams("dmc_walker_wak", 2, parallel=True, seed=0)
