"""Numbers that are not finite: an update that has one changes nothing, says which, and keeps the batch."""

import copy
from collections.abc import Callable
from pathlib import Path

import gymnasium
import numpy as np
import pytest
import torch
from torch import Tensor

from agent import checkpoint
from agent.agent import Agent
from agent.errors import UserError
from agent.finite import Watch, first_not_finite
from agent.incidents import Incidents
from agent.replay import Replay

Make = Callable[..., Agent]
MakeReplay = Callable[..., Replay]
DISCRETE = gymnasium.spaces.Discrete(3)
FAST = ["optimizer.warmup=0", "optimizer.lr=1e-3"]


def flat(value: object, path: str = "") -> dict[str, Tensor]:
    if isinstance(value, dict):
        return {k: v for key, entry in value.items() for k, v in flat(entry, f"{path}/{key}").items()}
    if isinstance(value, list):
        return {k: v for i, entry in enumerate(value) for k, v in flat(entry, f"{path}/{i}").items()}
    return {path: value} if isinstance(value, Tensor) else {}


def learned(agent: Agent, replay: Replay) -> dict[str, Tensor]:
    """All that an update changes: weights, optimizer, slow critic, normaliser, latents."""
    state = {key: value for key, value in agent.state_dict().items() if key not in ("means", "skipped_in_a_row")}
    return copy.deepcopy(flat({"agent": state, "replay": replay.state_dict()["tensors"]}))


def poison_reward(agent: Agent, replay: Replay) -> None:
    replay._rows["reward"][0, 12] = torch.nan


def poison_observation(agent: Agent, replay: Replay) -> None:
    replay._rows["place"][0, 12, 1] = torch.inf


def poison_state(agent: Agent, replay: Replay) -> None:
    key = next(key for key in replay._latents if key.startswith("state/"))
    replay._latents[key][0, 8] = -torch.inf


def poison_weight(agent: Agent, replay: Replay) -> None:
    """A weight that overflows in the forward pass."""
    agent.world_model.decoder.parameters().__next__().data[0] = 3e38


POISONS = {
    "row/reward": poison_reward,
    "row/place": poison_observation,
    "latent/state/": poison_state,
    "gradient/world_model.decoder": poison_weight,
}


@pytest.mark.parametrize("named", POISONS)
@pytest.mark.parametrize("on_update", [0, 2])
def test_a_poisoned_update_changes_nothing_and_is_named(
    named: str, on_update: int, make_agent: Make, make_replay: MakeReplay
) -> None:
    agent = make_agent(DISCRETE, FAST)
    replay = make_replay(agent)
    agent.attach(replay)
    good = torch.tensor([[1, 1, 1, 1], [0, 8, 16, 24]])
    for _ in range(on_update):
        agent.update(good)
    POISONS[named](agent, replay)
    before = learned(agent, replay)
    bad = torch.tensor([[0, 0, 1, 1], [8, 8, 0, 8]])
    agent.update(bad)
    after = learned(agent, replay)
    assert before.keys() == after.keys() and len(before) > 50
    for key in before:
        assert before[key].numpy().tobytes() == after[key].numpy().tobytes(), key
    metrics = agent.take_metrics()
    assert metrics["skipped_updates"] == 1
    assert all(np.isfinite(list(metrics.values())))
    found = agent.learner.watch.look()
    assert found is not None and found.most_in_a_row == 1
    assert any(name.startswith(named) for name in found.names)
    assert agent.learner.watch.look() is None
    rows, latents = replay.gather(bad)
    for key, value in found.batch.items():
        kind, _, name = key.partition("/")
        expected = (rows if kind == "row" else latents)[name]
        assert torch.equal(value.nan_to_num(), expected.nan_to_num()), key


def test_after_a_skipped_update_learning_goes_on_as_without_it(make_agent: Make, make_replay: MakeReplay) -> None:
    good, bad = torch.tensor([[1, 1, 1, 1], [0, 8, 16, 24]]), torch.tensor([[0, 0, 1, 1], [8, 8, 0, 8]])
    results = []
    for skipped in (False, True):
        agent = make_agent(DISCRETE, FAST)
        replay = make_replay(agent)
        agent.attach(replay)
        poison_reward(agent, replay)
        for number in range(3):
            if skipped and number == 1:
                agent.update(bad)
            torch.manual_seed(number)
            agent.update(good)
        results.append((learned(agent, replay), agent.take_metrics()))
    (one, metrics), (other, others) = results
    assert all(torch.equal(one[key].nan_to_num(), other[key].nan_to_num()) for key in one)
    assert metrics | {"skipped_updates": 1} == others  # means are over the updates that were made


def test_the_watch_counts_in_a_row_and_keeps_the_first_batch() -> None:
    watch = Watch(torch.device("cpu"))
    values = [1.0, torch.nan, torch.inf, 2.0, -torch.inf, 3.0]
    for number, value in enumerate(values):
        tensors = {"a": torch.tensor([[0.0, value]]), "b": torch.tensor(value if number == 2 else 0.0)}
        fine = watch.check(tensors, {"x": torch.tensor([number])})
        assert bool(fine) == bool(np.isfinite(value))
    found = watch.look()
    assert found is not None
    assert (found.names, found.most_in_a_row, found.batch) == (["a", "b"], 2, {"x": torch.tensor([1])})
    for _ in range(2):
        watch.check({"a": torch.tensor([[torch.nan]]), "b": torch.tensor(0.0)}, {"x": torch.tensor([7])})
    assert watch.look().most_in_a_row == 2  # type: ignore[union-attr]
    watch.check({"a": torch.tensor([[torch.nan]]), "b": torch.tensor(0.0)}, {"x": torch.tensor([8])})
    found = watch.look()
    assert found is not None and found.most_in_a_row == 3  # a row of them may be longer than the time between looks
    assert found.batch["x"].item() == 8


def test_the_run_stops_after_so_many_in_a_row(make_agent: Make, make_replay: MakeReplay, tmp_path: Path) -> None:
    agent = make_agent(DISCRETE, FAST)
    replay = make_replay(agent)
    agent.attach(replay)
    poison_reward(agent, replay)
    incidents = Incidents(tmp_path / "not_finite", most=6)
    assert incidents.look(agent, 0) is None
    for look in range(4):
        agent.update(torch.tensor([[0, 0, 1, 1], [8, 8, 0, 8]]))
        told = incidents.look(agent, look)
        assert told is not None and "row/reward" in told and f"{look + 1} updates in a row" in told
    kept = sorted((tmp_path / "not_finite").glob("*.pt"))
    assert len(kept) == 3  # no more are written
    saved = checkpoint.load(kept[0])
    assert saved["batch"]["row/reward"].isnan().any() and "row/reward" in saved["names"]
    agent.update(torch.tensor([[0, 0, 1, 1], [8, 8, 0, 8]]))
    agent.update(torch.tensor([[0, 0, 1, 1], [8, 8, 0, 8]]))
    with pytest.raises(UserError, match="row/reward.* 6 updates in a row.*train.max_skipped") as caught:
        incidents.look(agent, 9)
    assert "\n" not in str(caught.value)


def test_a_state_that_explodes_while_acting_stops_the_run(make_agent: Make, tmp_path: Path) -> None:
    agent = make_agent(DISCRETE)
    carry = agent.initial(3)
    incidents = Incidents(tmp_path, most=1)
    incidents.check_acting(carry, 0)
    key = next(iter(carry.state))
    carry.state[key][2] = torch.inf
    assert first_not_finite(carry.state) == (key, 2)
    with pytest.raises(UserError, match=f"acting: {key} of environment 2"):
        incidents.check_acting(carry, 0)
