"""What is shown of an agent: predictions against the model by hand, pictures, and that looking changes nothing."""

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from PIL import Image, ImageSequence
from test_resume import NEVER, OFTEN, assert_same, die_at, lines, scramble, small_config, state

from agent.agent import Agent
from agent.distributions import symexp
from agent.environment import make_env
from agent.training import train
from agent.video import as_gif
from agent.view.episode import Episode, core_inputs, cut, play_episode, spread
from agent.view.figure import as_png, draw, entries
from agent.view.film import BAR, GAP, HEADER, MARGIN, OBSERVED, PREDICTED, TILE, TITLE, film
from agent.view.open_loop import Predicted, Sequences, predict
from agent.view.training import newest_windows, replayed
from agent.world_model.rssm import Latent

SCRIPT = Path(__file__).parents[2] / "scripts" / "view_agent.py"
B, T, CONTEXT = 3, 9, 4
REALS = gymnasium.spaces.Box(-1, 1, (2,), np.float32)

Make = Callable[..., Any]


@pytest.fixture
def given(make_agent: Make) -> Make:
    """Function of a core: an agent with heads that are not 0, and sequences with an episode that begins in mid-way."""

    def make(core: str = "gru", *settings: str) -> tuple[Agent, Sequences]:
        agent = make_agent(REALS, settings, core=core)
        for parameter in agent.learner.parameters:
            parameter.data += 0.1 * torch.randn_like(parameter)
        rssm = agent.world_model.rssm
        state, _ = rssm.initial(B)
        _, state = rssm.core.sequence(torch.randn(B, 5, rssm.input_size), state, torch.zeros(B, 5, dtype=torch.bool))
        first = torch.zeros(B, T, dtype=torch.bool)
        first[1, 2] = first[2, CONTEXT + 2] = True
        z = torch.nn.functional.one_hot(torch.randint(rssm.classes, (B, rssm.groups)), rssm.classes).float()
        observation = {"place": torch.randn(B, T, 3), "signal": torch.randint(4, (B, T))}
        state = {key: value.detach() for key, value in state.items()}
        return agent, Sequences(observation, torch.rand(B, T, 2) * 2 - 1, torch.randn(B, T), first, state, z)

    return make


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(3)


@pytest.mark.parametrize("core", ["gru", "ortho_mlstm", "attention"])
@pytest.mark.parametrize("act", [False, True])
@torch.no_grad()
def test_predictions_are_those_of_stepping_the_model_by_hand(given: Make, core: str, act: bool) -> None:
    agent, sequences = given(core)
    found = predict(agent, sequences, CONTEXT, generator(), act)

    model, rssm = agent.world_model, agent.world_model.rssm
    noise = torch.rand(T, B, rssm.groups, generator=generator())
    seen = {key: value[:, :CONTEXT] for key, value in sequences.observation.items()}
    # The context all at once, as in training.
    posterior = rssm.observe(
        sequences.state, sequences.z, sequences.previous_action[:, :CONTEXT], sequences.first[:, :CONTEXT],
        model.encoder(seen, torch.float32), noise[:CONTEXT].transpose(0, 1),
    )  # fmt: skip
    features = list(rssm.feature(posterior.latent, torch.float32).unbind(1))
    state, z = {key: value[:, -1] for key, value in posterior.latent.state.items()}, posterior.latent.z[:, -1]
    for t in range(CONTEXT, T):
        action = agent.behavior.actor(features[-1]).mode() if act else sequences.previous_action[:, t]
        x = rssm.core_input(z, action, torch.zeros(B, dtype=torch.bool), torch.float32)
        h, state = rssm.core.step(x, state, torch.zeros(B, dtype=torch.bool))
        z = rssm._sample(rssm.prior_log_probs(h, torch.float32), noise[t])
        features.append(rssm.feature(Latent(state, h, z), torch.float32))
    feature = torch.stack(features, 1)
    decoded = model.decoder(feature)
    torch.testing.assert_close(found.model["place"], symexp(decoded["place"]), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.model["signal"], decoded["signal"].argmax(-1))
    torch.testing.assert_close(found.model_reward, model.reward.mean(model.reward(feature)), rtol=1e-4, atol=1e-5)
    assert found.truth["place"] is sequences.observation["place"] and found.reward is sequences.reward
    assert found.valid.tolist() == [[True] * T, [True] * T, [True] * (CONTEXT + 2) + [False] * (T - CONTEXT - 2)]


def test_what_comes_after_the_context_is_seen_by_nobody(given: Make) -> None:
    agent, sequences = given()
    before = predict(agent, sequences, CONTEXT, generator()).model["place"]
    for place, changes in ((CONTEXT, False), (CONTEXT - 1, True)):
        observation = {key: value.clone() for key, value in sequences.observation.items()}
        observation["place"][:, place] += 3
        after = predict(agent, sequences._replace(observation=observation), CONTEXT, generator()).model["place"]
        assert bool((after != before)[:, CONTEXT:].any()) == changes


@pytest.mark.parametrize("core", ["gru", "ortho_mlstm", "mesa", "attention"])
def test_numbers_are_in_fp32_where_products_are_in_bf16(given: Make, core: str) -> None:
    agent, sequences = given(core, "precision=bf16")
    found = predict(agent, sequences, CONTEXT, generator(), act=True)
    assert found.model_reward.dtype == found.model["place"].dtype == torch.float32
    rssm = agent.learner.frozen_world_model.module.rssm
    seen = rssm.core.inspect(torch.randn(T, rssm.input_size).bfloat16(), torch.arange(T) == 0)
    assert all(part is None or (part.dtype == torch.float32 and part.isfinite().all()) for part in seen)
    assert seen.weights is not None or seen.size is not None


def test_sequences_are_cut_with_what_the_memory_held_before(given: Make) -> None:
    agent, sequences = given("ortho_mlstm")
    rssm, steps = agent.world_model.rssm, 12
    z = torch.nn.functional.one_hot(torch.randint(rssm.classes, (steps, rssm.groups)), rssm.classes).float()
    first = torch.arange(steps) == 0
    observation = {"place": torch.randn(steps, 3), "signal": torch.randint(4, (steps,))}
    episode = Episode(observation, torch.randn(steps, 2), torch.randn(steps), first, z)
    found = cut(agent, episode, [0, 3, 8], 4)
    state, before = rssm.initial(1)
    for t in range(steps):
        if t in (0, 3, 8):
            row = (0, 3, 8).index(t)
            for key, value in state.items():
                torch.testing.assert_close(found.state[key][row], value[0], rtol=1e-4, atol=1e-5)
            assert t == 0 or torch.equal(found.z[row], before[0])
            assert torch.equal(found.reward[row], episode.reward[t : t + 4])
            assert torch.equal(found.observation["place"][row], observation["place"][t : t + 4])
        x = rssm.core_input(before, episode.previous_action[t, None], first[t, None], torch.float32)
        torch.testing.assert_close(core_inputs(agent, episode)[t, None], x)
        with torch.no_grad():
            _, state = rssm.core.step(x, state, first[t, None])
        before = z[t, None]


def test_sequences_are_spread_over_the_episode() -> None:
    assert spread(500, 64, 3) == [0, 218, 436]
    assert spread(64, 64, 3) == [0] and spread(65, 64, 3) == [0, 1]


def test_an_episode_is_played_to_its_end_or_to_the_last_step_asked_for(debug_config: Make) -> None:
    config = debug_config("env.time_limit=9")
    env = make_env(config)
    agent = Agent(env.observation_space, env.action_space, config, torch.device("cpu"))
    for longest, steps in ((6, 6), (50, 10)):
        episode = play_episode(agent, 0, longest)
        assert episode.reward.tolist() == [0.0] + [1.0] * (steps - 1)
        assert episode.first.tolist() == [True] + [False] * (steps - 1)
        assert episode.previous_action[0].abs().max() == 0 and (episode.previous_action[1:].sum(-1) == 1).all()
        assert all(len(value) == steps for value in episode.observation.values())
        assert len({tuple(row.tolist()) for row in next(iter(episode.observation.values()))}) == steps


def predicted() -> Predicted:
    """Two sequences of four steps with two observed ones; the episode of the second one ends before the last step."""
    truth = {"image": torch.rand(2, 4, 16, 32, 3), "place": torch.randn(2, 4, 9), "token": torch.randint(5, (2, 4))}
    truth["place"][..., 4] *= 1e-3
    model = {"image": truth["image"].clone(), "place": torch.randn(2, 4, 9), "token": torch.randint(5, (2, 4))}
    model["image"][1] = 1 - truth["image"][1]
    valid = torch.tensor([[True] * 4, [True, True, True, False]])
    return Predicted(truth, model, torch.randn(2, 4), torch.randn(2, 4), valid, context=2)


def test_a_film_shows_truth_model_and_error_and_when_observation_ends() -> None:
    seen = predicted()
    frames = film(seen, "image", ["one", "two"], "open loop")
    times = TILE // 16
    height, width = 16 * times, 32 * times
    assert frames.dtype == np.uint8
    assert frames.shape == (4, HEADER + BAR + TITLE + 3 * (height + GAP), MARGIN + 2 * (width + GAP), 3)
    tops = [HEADER + BAR + TITLE + row * (height + GAP) for row in range(3)]
    second = MARGIN + width + GAP
    for t in range(4):
        assert tuple(frames[t, 1, 1]) == (OBSERVED if t < 2 else PREDICTED)
        shown = frames[t, tops[0] : tops[0] + height : times, MARGIN : MARGIN + width : times]
        np.testing.assert_array_equal(shown, (255 * seen.truth["image"][0, t]).round().byte().numpy())
        error = frames[t, tops[2] : tops[2] + height, MARGIN : MARGIN + width]
        assert set(np.unique(error)) <= {127, 128}, "the model is right, so the error is grey"
        error = frames[t, tops[2] : tops[2] + height : times, second : second + width : times].astype(int)
        if t < 3:  # the model says 1 - truth there, so that half of 1 + model - truth is that too
            assert np.abs(error - (255 * (1 - seen.truth["image"][1, t])).numpy()).max() <= 1
        over = frames[t, tops[1] + 1, second + 1]
        assert (tuple(over) == (225, 225, 225)) == (t == 3)
    assert film(seen, "image", ["one", "two"], "imagined", error=False).shape[1] == tops[2]


def test_a_gif_has_all_frames_in_their_order() -> None:
    frames = np.stack([np.full((8, 8, 3), 60 * t, np.uint8) for t in range(4)])
    gif = Image.open(io.BytesIO(as_gif(frames, fps=10)))
    assert gif.n_frames == 4 and gif.info["duration"] == 100
    for t in range(4):
        gif.seek(t)
        assert abs(int(np.asarray(gif.convert("RGB"))[0, 0, 0]) - 60 * t) <= 2


def test_a_figure_draws_what_varies_most_and_marks_where_observation_ends() -> None:
    seen = predicted()
    rows, amount = entries(seen)
    assert amount == 10 and len(rows) == 7 and "token" in rows and "place[4]" not in rows
    figure = draw(seen, ["one", "two"], "open loop", "title")
    assert len(figure.axes) == 2 * 8 and "10 entries" in figure.get_suptitle()
    axes = figure.axes[-1]  # the reward of the second sequence
    line, truth, observing, open_loop = axes.lines
    assert list(line.get_xdata()) == [2.5, 2.5] and list(truth.get_xdata()) == [1, 2, 3, 4]
    np.testing.assert_array_equal(truth.get_ydata(), [*seen.reward[1, :3], np.nan])
    np.testing.assert_array_equal(observing.get_ydata(), seen.model_reward[1, :2])
    np.testing.assert_array_equal(open_loop.get_ydata(), [*seen.model_reward[1, 1:3], np.nan])
    assert Image.open(io.BytesIO(as_png(figure))).size[0] > 800


@pytest.mark.parametrize("core", ["gru", "mlstm"])
def test_the_newest_windows_of_replay_are_shown(
    make_agent: Make, make_replay: Make, core: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    agent = make_agent(REALS, core=core)
    replay = make_replay(agent)
    stride, length = replay.stride, replay.window - 1
    index = newest_windows(replay, 3)
    last = (40 - replay.window) // stride * stride
    earlier = last - (replay.window if stride == 1 else 2 * stride)
    assert index.T.tolist() == [[0, last], [1, last], [0, earlier]]
    rows, latents = replay.gather(index)
    found = replayed(agent, replay, index)
    assert found.first.shape == (3, length) and torch.equal(found.observation["place"], rows["place"][:, 1:])
    torch.testing.assert_close(found.previous_action, agent.action.encode(rows["action"][:, :-1]))
    assert torch.equal(found.z.argmax(-1), latents["z"].long())
    assert {f"state/{key}" for key in found.state} | {"z"} == set(latents)
    monkeypatch.setattr(type(replay), "held", (0, length))
    assert newest_windows(replay, 3).shape == (2, 0)


def pictures(logdir: Path) -> dict[str, list[tuple[int, bytes]]]:
    """By tag the steps and files of the pictures in TensorBoard's events."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(logdir), size_guidance={"images": 0}).Reload()
    return {tag: [(e.step, e.encoded_image_string) for e in events.Images(tag)] for tag in events.Tags()["images"]}


@pytest.mark.parametrize("core", ["gru", "ortho_mlstm"])
def test_a_run_that_shows_its_predictions_is_the_run_that_does_not(
    core: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(small_config(120, NEVER, core=core), tmp_path / "plain")
    shown = ("log.tensorboard=true", "log.open_loop_every=59")
    logdir = tmp_path / "shown"
    die_at(monkeypatch, 80, 120, OFTEN, *shown, logdir=logdir, core=core)
    scramble()
    train(small_config(120, NEVER, *shown, core=core), logdir)
    assert lines(logdir) == lines(tmp_path / "plain")
    assert_same(state(tmp_path / "plain"), state(logdir))
    found = pictures(logdir)
    assert list(found) == ["open_loop/figure"]
    assert {step for step, _ in found["open_loop/figure"]} == {58, 116}
    assert all(Image.open(io.BytesIO(file)).format == "PNG" for _, file in found["open_loop/figure"])


def test_no_pictures_are_drawn_where_nobody_asks(tmp_path: Path) -> None:
    train(small_config(60, NEVER, "log.tensorboard=true", "log.open_loop_every=null"), tmp_path)
    assert not pictures(tmp_path)


@pytest.mark.parametrize(("core", "views"), [("gru", "memory"), ("mesa", "open_loop,imagined,memory")])
def test_the_script_writes_pictures_of_a_run(
    core: str, views: str, tmp_path: Path, run_script: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    train(small_config(40, NEVER, core=core), tmp_path / "run")
    capsys.readouterr()
    words = ("--logdir", str(tmp_path / "run"), "--out", str(tmp_path / "new" / "view"), "--length", "12")
    assert run_script(*words, "--show", views) == 0
    files = [Path(line) for line in capsys.readouterr().out.splitlines()]
    assert [file.name for file in files] == [f"{view}.png" for view in views.split(",")]
    assert sorted(files) == sorted((tmp_path / "new" / "view").iterdir())
    assert all(np.asarray(Image.open(file).convert("L")).std() > 10 for file in files)


@pytest.mark.parametrize("steps", [3, 500])
def test_a_video_of_the_policy_has_as_many_steps_as_asked(
    steps: int, tmp_path: Path, run_script: Callable[..., int], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Rendering(gymnasium.Wrapper[Any, Any, Any, Any]):
        frames = 0

        def render(self) -> Any:
            Rendering.frames += 1
            return np.random.default_rng(Rendering.frames).integers(256, size=(8, 8, 3), dtype=np.uint8)

    def make(config: Any, render: bool = False) -> Any:
        assert render
        return Rendering(make_env(config))

    train(small_config(40, NEVER), tmp_path)
    monkeypatch.setattr("agent.evaluation.make_env", make)
    assert run_script("--logdir", str(tmp_path), "--show", "policy", "--steps", str(steps)) == 0
    episode = 33  # rows of one, from its first observation to its last
    with Image.open(tmp_path / "view" / "policy.gif") as video:
        shown = len(list(ImageSequence.Iterator(video)))
    assert shown == Rendering.frames == min(steps, episode)
