"""The agent with a core whose memory is large and parallel in time: heads, second read, schedule, what is logged."""

import copy
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from outer_product import RELEASE, OuterProduct, OuterProductConfig
from torch import Tensor

from agent import checkpoint
from agent import config as configuration
from agent.agent import Agent
from agent.cores import make_core
from agent.cores.gru import BlockGRU, BlockGRUConfig
from agent.errors import UserError
from agent.replay import Replay
from agent.training import train
from agent.world_model.rssm import Latent

BOX = gymnasium.spaces.Box(-1, 1, (2,), np.float32)
CORE, T = "outer_product", 8
READ = "rssm.read_after_observation=true"
FAST = ("optimizer.warmup=0", "optimizer.lr=1e-2")
both_posteriors = pytest.mark.parametrize("posterior", ["recurrent", "observation"])
with_and_without_read = pytest.mark.parametrize("read", [False, True])
Make = Callable[..., Any]


@pytest.fixture
def make(make_agent: Make, make_replay: Make) -> Make:
    """Function of settings: an agent with the large core, and a replay it learns from."""

    def made(*settings: str, seed: int = 0) -> tuple[Agent, Replay]:
        agent = make_agent(BOX, ["rssm.posterior=observation", *settings], core=CORE, seed=seed)
        replay = make_replay(agent)
        agent.attach(replay)
        return agent, replay

    return made


def heads_of(replay: Replay) -> dict[str, Tensor]:
    """Every stored latent (streams, heads, ...)."""
    return {key: replay.state_dict()["tensors"][key].clone() for key in ("state/M", "z")}


def act_through(agent: Agent, amount: int, steps: int, first: Tensor) -> dict[str, Tensor]:
    """What an agent saw, drew, kept and gave its actor over `steps` steps: (amount, steps, ...)."""
    rssm, carry = agent.world_model.rssm, agent.initial(amount)
    columns: list[dict[str, Tensor]] = []
    features: list[Tensor] = []
    agent.learner.frozen_actor.module.register_forward_pre_hook(lambda _, inputs: features.append(inputs[0].clone()))
    for t in range(steps):
        seen = {"place": torch.randn(amount, 3), "signal": torch.randint(4, (amount,))}
        torch.manual_seed(t)
        noise = torch.rand(amount, rssm.groups)
        torch.manual_seed(t)
        previous = carry.action
        _, carry = agent.act(seen, first[:, t], carry)
        columns.append({**seen, "noise": noise, "previous": previous, "M": carry.state["M"], "z": carry.z})
    found = {key: torch.stack([column[key] for column in columns], 1) for key in columns[0]}
    return found | {"feature": torch.stack(features, 1)}


# ---- the core of these tests, and what is counted of a core --------------------------------------------------


def test_the_core_of_these_tests_is_the_same_in_parallel_and_in_steps() -> None:
    core, first = OuterProduct(5, OuterProductConfig(width=3)).double(), torch.rand(2, 7) < 0.3
    x, state = torch.randn(2, 7, 5).double(), {"M": torch.randn(2, 3, 3).double()}
    h, states = core.sequence(x, state, first, keep=range(7))
    for t in range(7):
        expected, state = core.step(x[:, t], state, first[:, t])
        torch.testing.assert_close(h[:, t], expected)
        torch.testing.assert_close(states["M"][:, t], state["M"])


def test_only_a_memory_much_wider_than_its_output_is_large() -> None:
    for name in ("debug", "1m", "400m"):
        core = configuration.resolve(env="gym_CartPole-v1", size=name, device="cpu").core
        with torch.device("meta"):
            assert not make_core("gru", 4, core).state_is_large
    assert OuterProduct(4, OuterProductConfig(width=3)).state_is_large
    assert not OuterProduct(4, OuterProductConfig(width=2)).state_is_large


def test_state_bytes_and_operations_are_those_of_one_step_of_one_stream() -> None:
    core = BlockGRU(10, BlockGRUConfig(deter=24, hidden=7, blocks=4))
    weights = sum(parameter.numel() for parameter in core.parameters() if parameter.dim() > 1)
    assert core.state_bytes == 4 * 24
    assert core.step_flops(10) == 2 * weights
    outer = OuterProduct(10, OuterProductConfig(width=6))
    assert outer.state_bytes == 4 * 36
    assert outer.step_flops(10) == 2 * (10 * 18 + 36)
    assert all(parameter.device.type == "cpu" for parameter in outer.parameters())


# ---- replay keeps heads --------------------------------------------------------------------------------------


@both_posteriors
@with_and_without_read
def test_an_update_refreshes_the_next_heads_and_no_others(make: Make, posterior: str, read: bool) -> None:
    agent, replay = make(f"rssm.posterior={posterior}", f"rssm.read_after_observation={str(read).lower()}")
    rssm, before = agent.world_model.rssm, heads_of(replay)
    assert agent.replay_stride == replay.stride == T
    assert before["state/M"].shape == (2, 5, 8, 8)
    windows = torch.tensor([[0, 1, 1], [8, 0, 24]])
    rows, context = replay.gather(windows)
    torch.manual_seed(5)
    uniform = torch.rand(3, T, rssm.groups)
    state, z = {"M": context["state/M"]}, torch.eye(rssm.classes)[context["z"].long()]
    with torch.no_grad():
        for t in range(T):
            token = agent.world_model.encoder({key: rows[key][:, t + 1] for key in ("place", "signal")}, torch.float32)
            action = agent.action.encode(rows["action"][:, t])
            latent, _ = rssm.observe_step(state, z, action, rows["is_first"][:, t + 1], token, uniform[:, t])
            state, z = latent.state, latent.z
    torch.manual_seed(5)
    agent.update(windows)
    after = heads_of(replay)
    written = torch.zeros(2, 5, dtype=torch.bool)
    for b, (stream, start) in enumerate(windows.T.tolist()):
        head = start // T + 1
        written[stream, head] = True
        torch.testing.assert_close(after["state/M"][stream, head], state["M"][b], rtol=1e-4, atol=1e-5)
        assert torch.equal(after["z"][stream, head].long(), z[b].argmax(-1))
    for key in before:
        assert torch.equal(after[key][~written], before[key][~written])
        assert not torch.equal(after[key][written], before[key][written])


def test_an_agent_and_a_replay_of_different_strides_do_not_work_together(make: Make, make_agent: Make) -> None:
    _, replay = make()
    with pytest.raises(AssertionError, match="keeps other latents"):
        make_agent(BOX).attach(replay)


# ---- read after observation ----------------------------------------------------------------------------------


def test_a_core_that_cannot_be_read_twice_is_refused_in_one_line(make_agent: Make) -> None:
    with pytest.raises(UserError, match="rssm.read_after_observation: BlockGRU") as caught:
        make_agent(BOX, [READ])
    assert "\n" not in str(caught.value)


@with_and_without_read
@both_posteriors
def test_acting_gives_the_features_of_training(make: Make, posterior: str, read: bool) -> None:
    agent, _ = make(f"rssm.posterior={posterior}", f"rssm.read_after_observation={str(read).lower()}")
    model, rssm, amount, steps = agent.world_model, agent.world_model.rssm, 3, 6
    first = torch.zeros(amount, steps, dtype=torch.bool)
    first[:, 0] = first[1, 3] = True
    acted = act_through(agent, amount, steps, first)
    token = model.encoder({key: acted[key] for key in ("place", "signal")}, torch.float32)
    found = rssm.observe(*rssm.initial(amount), acted["previous"], first, token, acted["noise"])
    feature = rssm.feature(found.latent, torch.float32)
    assert feature.shape == (amount, steps, rssm.feature_size)
    assert rssm.feature_size == rssm.core.feature_size + rssm.code_size + (rssm.core.read_size if read else 0)
    torch.testing.assert_close(feature.detach(), acted["feature"], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.latent.state["M"].detach(), acted["M"], rtol=1e-4, atol=1e-5)
    if read:  # r is what the memory after the step holds for what z asks
        query = rssm.query(acted["z"].flatten(-2)).detach()
        expected = torch.einsum("btk,btkv->btv", query, acted["M"])
        torch.testing.assert_close(acted["feature"][..., -8:], expected, rtol=1e-4, atol=1e-5)
        assert expected.abs().max() > 1e-3


@both_posteriors
def test_gradients_of_what_is_read_equal_those_of_a_plain_loop(make: Make, posterior: str) -> None:
    agent, _ = make(f"rssm.posterior={posterior}", READ)
    rssm = agent.world_model.rssm.double()
    first = torch.zeros(2, T, dtype=torch.bool)
    first[1, 3] = True
    state = {"M": torch.randn(2, 8, 8).double().requires_grad_()}
    _, z = rssm.initial(2)
    token, action = torch.randn(2, T, agent.world_model.encoder.token_size).double(), torch.rand(2, T, 2).double()
    uniform, weight = torch.rand(2, T, rssm.groups).double(), torch.randn(2, T, rssm.core.read_size).double()
    found = rssm.observe(state, z.double(), action, first, token, uniform)
    together = rssm.feature(found.latent, torch.float64)
    latent, features = Latent(state, torch.empty(0), z.double()), []
    for t in range(T):
        latent, _ = rssm.observe_step(latent.state, latent.z, action[:, t], first[:, t], token[:, t], uniform[:, t])
        features.append(rssm.feature(latent, torch.float64))
    sources = [state["M"], *rssm.query.parameters(), *rssm.core.parameters(), *rssm.z_input.parameters()]
    results = []
    for feature in (together, torch.stack(features, 1)):
        answer = feature[..., -rssm.core.read_size :]
        results.append([feature, *torch.autograd.grad((weight * answer).sum(), sources)])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-10)
        assert theirs.abs().max() > 0


def test_imagination_reads_the_memory_after_every_step(make: Make) -> None:
    agent, _ = make(READ)
    rssm = agent.world_model.rssm
    z = torch.nn.functional.one_hot(torch.randint(rssm.classes, (2, 3, rssm.groups)), rssm.classes).float()
    start = Latent({"M": torch.randn(2, 3, 8, 8)}, torch.randn(2, 3, 8), z)
    found = agent.learner._judged(*agent.learner._imagine(start))
    assert found.feature.shape == (agent.config.behavior.imagination_horizon + 1, 6, rssm.feature_size)
    state, code, no = {"M": start.state["M"].flatten(0, 1)}, z.flatten(0, 1), torch.zeros(6, dtype=torch.bool)
    for t, feature in enumerate(found.feature):
        if t:
            x = rssm.core_input(code, found.action[t - 1], no, torch.float32)
            h, state = rssm.core.step(x, state, no)
            torch.testing.assert_close(feature[:, :8], h.detach(), rtol=1e-4, atol=1e-5)
            code = feature[:, 8:-8].unflatten(-1, (rssm.groups, rssm.classes))
        expected = torch.einsum("nk,nkv->nv", rssm.query(code.flatten(1)), state["M"])
        torch.testing.assert_close(feature[:, -8:], expected.detach(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("gradient", "dtype"), [("reinforce", torch.bfloat16), ("dynamics", torch.float32)])
def test_imagination_carries_the_memory_as_the_core_asks_unless_gradients_go_through_it(
    make_agent: Make, monkeypatch: pytest.MonkeyPatch, gradient: str, dtype: torch.dtype
) -> None:
    learner = make_agent(BOX, ["precision=bf16", f"behavior.gradient={gradient}"], core="mlstm").learner
    step, seen = learner._imagine_step, []
    monkeypatch.setattr(
        learner, "_imagine_step", lambda state, *rest: seen.append(state["memory_0"].dtype) or step(state, *rest)
    )
    rssm = learner.world_model.rssm
    state, z = rssm.initial(6)
    start = {key: value.unsqueeze(0) for key, value in state.items()}
    learner._imagine(Latent(start, torch.zeros(1, 6, rssm.core.feature_size), z.unsqueeze(0)))
    assert seen == [dtype] * learner.config.behavior.imagination_horizon


@with_and_without_read
@pytest.mark.parametrize("gradient", ["reinforce", "dynamics"])
def test_every_weight_learns(make: Make, gradient: str, read: bool) -> None:
    agent, replay = make(*FAST, f"rssm.read_after_observation={str(read).lower()}", f"behavior.gradient={gradient}")
    before = [parameter.detach().clone() for parameter in agent.learner.parameters]
    for _ in range(2):
        agent.update(replay.sample(4))
    assert not any(torch.equal(a, b) for a, b in zip(agent.learner.parameters, before, strict=True))
    assert all(np.isfinite(list(agent.take_metrics().values())))


# ---- diagnostics and schedule ----------------------------------------------------------------------------------


def test_metrics_tell_of_the_core(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    agent, replay = make()
    core, seen = agent.world_model.rssm.core, {}
    windows = torch.tensor([[0, 1], [8, 24]])

    def optimize(gradients: list[Tensor], *rest: Any) -> dict[str, Tensor]:
        of = dict(zip(map(id, agent.learner.parameters), gradients, strict=True))
        seen["gradient"] = torch.cat([of[id(parameter)].flatten() for parameter in core.parameters()]).norm().item()
        return {}

    monkeypatch.setattr(agent.learner.optimizer, "step", optimize)
    agent.update(windows)
    metrics = agent.take_metrics()
    after = heads_of(replay)["state/M"]
    ends = torch.stack([after[stream, start // T + 1] for stream, start in windows.T.tolist()])
    assert metrics["core/norm"] == pytest.approx(ends.norm(dim=(1, 2)).mean().item(), rel=1e-4)
    assert metrics["core/gradient_norm"] == pytest.approx(seen["gradient"], rel=1e-4)
    assert seen["gradient"] > 0


def updated(agent: Agent, replay: Replay, times: int) -> None:
    for _ in range(times):
        agent.update(replay.sample(4))
        agent.schedule(agent.take_metrics())


def answers(agent: Agent) -> list[Tensor]:
    """What the core and its frozen twin answer to the same input."""
    cores = (agent.world_model.rssm.core, agent.learner.frozen_world_model.module.rssm.core)
    x, state = torch.ones(1, agent.world_model.rssm.input_size), {"M": torch.ones(1, 8, 8)}
    return [core.step(x, state, torch.tensor([False]))[0].detach() for core in cores]


def test_a_schedule_is_followed_by_core_and_twin_and_drops_what_was_captured(make: Make) -> None:
    agent, replay = make("optimizer.lr=1e-30")
    updated(agent, replay, 1)
    update, act, (before, _) = agent._update, agent._act, answers(agent)
    updated(agent, replay, RELEASE - 2)
    assert agent._update is update and agent._act is act  # a buffer has changed, the path has not
    for answer in answers(agent):
        torch.testing.assert_close(answer, before * (1 + (RELEASE - 1) / 8) / (1 + 1 / 8))
    updated(agent, replay, 1)
    assert agent._update is not update and agent._act is not act
    for answer in answers(agent):
        torch.testing.assert_close(answer, 2 * before * (1 + RELEASE / 8) / (1 + 1 / 8))
    update = agent._update
    updated(agent, replay, 2)
    assert agent._update is update


def test_a_schedule_goes_on_in_a_loaded_agent(make: Make) -> None:
    agent, replay = make(*FAST)
    updated(agent, replay, RELEASE + 1)
    other, other_replay = make(*FAST, seed=1)
    assert other.world_model.rssm.core.factor == 1
    other_replay.load_state_dict(copy.deepcopy(replay.state_dict()))
    other.load_state_dict(copy.deepcopy(agent.state_dict()))
    assert other.world_model.rssm.core.factor == other.learner.frozen_world_model.module.rssm.core.factor == 2
    for ours, theirs in zip(answers(agent), answers(other), strict=True):
        assert torch.equal(ours, theirs)
    for one, rows in ((agent, replay), (other, other_replay)):
        torch.manual_seed(7)
        updated(one, rows, 2)
    for ours, theirs in zip(agent.learner.parameters, other.learner.parameters, strict=True):
        assert torch.equal(ours, theirs)


# ---- a whole run -----------------------------------------------------------------------------------------------


def test_a_run_keeps_heads_says_so_and_goes_on(
    debug_config: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = (
        "env.name=gym_chase:Chase-v0", "env.amount=2", "env.parallel=false", "log.tensorboard=false", "log.every=40",
        "rssm.posterior=observation", READ,
    )  # fmt: skip
    base = debug_config(*settings, core=CORE)
    for steps in (150, 230):  # the first one stops in the midst of a chunk
        train(dataclasses.replace(base, steps=steps), tmp_path)
    told = capsys.readouterr().err
    assert "outer_product: 792 parameters, state 0.3 kB a stream, 0.00 MFLOP of matrix products a step" in told
    assert "GiB states of the heads of sequences only, one step in 8" in told
    saved = checkpoint.load(checkpoint.latest(tmp_path / "checkpoints"))  # type: ignore[arg-type]
    assert saved["rows"] == 115
    assert saved["replay"]["chunks"] == []
    tensors = checkpoint.load(tmp_path / "checkpoints" / "replay" / saved["replay"]["latest"])["tensors"]
    assert tensors["reward"].shape[1] == 115 and tensors["state/M"].shape[1] == 15
    assert saved["agent"]["world_model"]["rssm.core.doubled"]
