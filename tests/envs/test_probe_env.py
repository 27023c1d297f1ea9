"""Probes as environments: rewards, metrics, images, vector form, names, and what reaches a run's log."""

import json

import gymnasium
import numpy as np
import pytest
from gymnasium.vector import AutoresetMode, SyncVectorEnv

import envs
from agent.config import CONFIGS, resolve
from envs import probe
from envs.check import check_env
from envs.errors import EnvError
from envs.probes.probe_env import ProbeEnv, ProbeVectorEnv
from envs.probes.repeat_lag import RepeatLag
from envs.streams import Streams

TASKS = [name for name, (kind, _) in probe.PRESETS.items() if name.endswith("easy") and "masked" not in name]
PRESETS = sorted(path.stem for path in (CONFIGS / "env").glob("probe_*.yaml"))


@pytest.mark.parametrize("name", TASKS)
def test_probes_are_sound_and_follow_their_seed(name):
    one, other = envs.make(f"probe_{name}"), envs.make(f"probe_{name}")
    assert check_env(one, steps=200) == []
    shown = []
    for env in (one, other):
        first, _ = env.reset(seed=3)
        shown.append([first, *(env.step(0)[0] for _ in range(env.unwrapped.task.length))])
    for a, b in zip(*shown, strict=True):
        assert all(np.array_equal(a[key], b[key]) for key in a)
    again = [one.reset(seed=seed)[0] for seed in range(8)]
    assert any(not np.array_equal(a[key], again[0][key]) for a in again[1:] for key in a)


@pytest.mark.parametrize(("signed", "wrong"), [(False, 0.0), (True, -1.0)])
def test_right_answers_pay_one(signed, wrong):
    env = ProbeEnv(RepeatLag(symbols=3, lag=2, questions=4), signed=signed)
    observation, _ = env.reset(seed=0)
    symbols, rewards = [], []
    for step in range(6):
        symbols.append(int(observation["symbol"]))
        right = symbols[step - 2] if step >= 2 else 0
        action = right if step != 4 else (right + 1) % 3
        observation, reward, terminated, truncated, info = env.step(action)
        rewards.append(reward)
        assert (terminated, truncated) == (step == 5, False)
        assert bool(info) == (step == 5)
    assert rewards == [0, 0, 1, 1, wrong, 1]
    assert info["episode_metrics"]["accuracy"] == 0.75
    assert info["episode_metrics"]["score"] == pytest.approx((0.75 - 1 / 3) / (2 / 3))


@pytest.mark.parametrize("name", [*TASKS, "delay_base"])
def test_vector_form_plays_what_single_ones_play(name):
    kind, options = probe.PRESETS[name]
    task = kind(**options)
    single = SyncVectorEnv([lambda: ProbeEnv(task, signed=True)] * 3, autoreset_mode=AutoresetMode.NEXT_STEP)
    vector = ProbeVectorEnv(task, 3, signed=True)
    assert vector.single_observation_space == single.single_observation_space
    assert vector.observation_space == single.observation_space
    rng = np.random.default_rng(0)
    results = single.reset(seed=5), vector.reset(seed=5)
    for _ in range(2 * task.length + 3):
        for key, value in results[0][0].items():
            np.testing.assert_array_equal(results[1][0][key], value)
            assert results[1][0][key].dtype == value.dtype
        for a, b in zip(results[0][1:-1], results[1][1:-1], strict=True):
            np.testing.assert_array_equal(a, b)
        np.testing.assert_equal(results[1][-1], results[0][-1])
        actions = rng.integers(task.actions, size=3)
        results = single.step(actions), vector.step(actions)


def test_gymnasium_makes_the_vector_form():
    vector = gymnasium.make_vec("probes/RepeatLagEasy-v0", 3, vectorization_mode="vector_entry_point", questions=2)
    assert isinstance(vector.unwrapped, ProbeVectorEnv)
    assert vector.num_envs == 3
    with pytest.raises(EnvError, match="not made in lockstep"):
        gymnasium.make_vec("probes/MaskedCartpoleEasy-v0", 2, vectorization_mode="vector_entry_point")


def test_streams_tell_the_metrics():
    arguments = {"seed": 0, "options": {"questions": 3}}
    fast = Streams("probe_repeat_lag_easy", 3, parallel=False, **arguments)
    slow = Streams("probe_repeat_lag_easy", 3, parallel=True, **arguments)
    try:
        rows = fast.reset(), slow.reset()
        ended = []
        for step in range(11):
            for key in rows[1]:
                np.testing.assert_array_equal(rows[0][key], rows[1][key], err_msg=key)
            for streams in (fast, slow):
                streams.send(np.full(3, step % 4))
            rows = fast.receive(), slow.receive()
            assert fast.finished == slow.finished
            ended += fast.finished
    finally:
        fast.close()
        slow.close()
    assert [episode.index for episode in ended] == [0, 1, 2, 0, 1, 2]
    for episode in ended:
        assert episode.length == 4
        assert episode.metrics["accuracy"] == pytest.approx(episode.episode_return / 3)
        assert set(episode.metrics) == {"accuracy", "score", "recall_age_1"}


def test_streams_limit_the_time_of_probes():
    streams = Streams("probe_repeat_lag_easy", 2, parallel=False, seed=0, time_limit=3)
    streams.reset()
    for _ in range(3):
        streams.send(np.zeros(2, np.int64))
        row = streams.receive()
    assert row["is_last"].all() and not row["is_terminal"].any()
    assert [episode.metrics for episode in streams.finished] == [{}, {}]


def test_images_tell_all_categories_apart():
    env = probe.make("store_recall_hard", options={"encoding": "image"})
    plain = probe.make("store_recall_hard")
    assert check_env(plain, steps=50) == []
    seen = {}
    for seed in range(3):
        (image, _), (tokens, _) = env.reset(seed=seed), plain.reset(seed=seed)
        for _ in range(304):
            assert env.observation_space.contains(image)
            code = (int(tokens["token"]), int(tokens["asked"]))
            assert seen.setdefault(code, image["image"].tobytes()) == image["image"].tobytes()
            image, tokens = env.step(0)[0], plain.step(0)[0]
    assert len(seen) > 80 and len(set(seen.values())) == len(seen)


def test_what_cannot_be_painted_says_so():
    with pytest.raises(EnvError, match="cannot paint 'key'"):
        probe.make("continuous_recall_easy", options={"encoding": "image"})


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("probe_noisy_recal_base", {}, "did you mean probe_noisy_recall_base"),
        ("probe_x", {}, "names are probe_noisy_recall_easy"),
        ("probe_delay_base", {"delays": 3}, "no option 'delays'; did you mean delay"),
        ("probe_delay_base", {"delay": -3}, "'probe_delay_base': option delay is -3"),
        ("probe_delay_base", {"encoding": "sound"}, "give tokens or image"),
        ("probe_masked_walker_easy", {"gap": 2}, "no option 'gap'"),
        ("probe_masked_cheetah_easy", {"cue_steps": 2}, "only the body walker"),
        ("dmc_walker_walk", {"gap": 2}, "no options, and gap was given"),
        ("gym_CartPole-v1", {"gap": 2}, "refuses the options"),
    ],
)
def test_mistakes_are_told_on_one_line(name, options, words):
    with pytest.raises(EnvError, match=words) as caught:
        envs.make(name, options=options)
    assert "\n" not in str(caught.value)


def test_gymnasium_knows_the_probes_by_their_ids():
    env = gymnasium.make("probes/NoisyRecallBase-v0", gap=2)
    assert env.unwrapped.task.gap == 2 and env.unwrapped.task.length == 255
    assert len(probe.PRESETS) == sum(name.startswith("probes/") for name in gymnasium.registry)


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_resolve_to_environments_that_can_be_made(preset):
    config = resolve(preset, size="debug", device="cpu")
    env = envs.make(config.env.name, options=config.env.options)
    env.reset(seed=0)
    env.close()


def test_every_level_of_every_task_is_a_preset():
    assert {f"probe_{name}" for name in probe.PRESETS if "masked" not in name} <= set(PRESETS)


def test_bsuite_presets_are_delays_that_pay_plus_or_minus_one():
    config = resolve("probe_bsuite_memory_len", size="debug", device="cpu", settings=["env.options.delay=5"])
    assert config.env.options == {"delay": 5, "classes": 2, "distractors": False, "signed": True}
    env = envs.make(config.env.name, options=config.env.options)
    for seed in range(4):
        observation, _ = env.reset(seed=seed)
        cue = int(observation["cue"][0])
        for _ in range(6):
            observation, reward, *_ = env.step(0)
            assert reward == 0 and observation["cue"][0] == 0
        assert observation["asked"] == 1
        assert env.step(0)[1:3] == (1.0 if cue == 1 else -1.0, True)


def test_a_run_logs_the_score_of_each_episode(tmp_path):
    from agent import evaluation
    from agent.training import train

    settings = ["env.amount=2", "log.tensorboard=false", "env.options.questions=7"]
    config = resolve("probe_repeat_lag_easy", size="debug", device="cpu", steps=90, settings=settings)
    train(config, tmp_path / "run")
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    episodes = [line for line in lines if "episode/return" in line]
    assert len(episodes) == 10
    for line in episodes:
        assert line["episode/accuracy"] == pytest.approx(line["episode/return"] / 7)
        assert line["episode/score"] == pytest.approx((line["episode/accuracy"] - 0.25) / 0.75)
    agent = evaluation.load(tmp_path / "run")
    results = evaluation.evaluate(agent, 3, options={"gap": 4})
    assert results["lengths"] == [11, 11, 11]
    assert results["metrics"]["recall_age_4"] == results["metrics"]["accuracy"]
    assert results["mean"] == pytest.approx(7 * results["metrics"]["accuracy"])
