"""The agent as a whole: what an update reads, changes and writes back, and what acting keeps."""

import copy
from collections.abc import Callable
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from torch import Tensor

from agent import behavior
from agent.agent import Agent, Carry
from agent.behavior import BehaviorLoss, imagination_loss, lambda_return
from agent.errors import UserError
from agent.replay import Replay
from agent.schema import Config
from agent.world_model.rssm import Latent
from envs import actions

ACTIONS = {
    "continuous": gymnasium.spaces.Box(-1, 1, (2,), np.float32),
    "discrete": gymnasium.spaces.Discrete(3),
    "multi-discrete": gymnasium.spaces.MultiDiscrete([2, 5]),
    "hybrid": actions.Hybrid(2, [3, 4]),
}
BOX = ACTIONS["continuous"]
every_action = pytest.mark.parametrize("action", ACTIONS.values(), ids=ACTIONS.keys())
both_posteriors = pytest.mark.parametrize("posterior", ["recurrent", "observation"])
WINDOWS = torch.tensor([[0, 1, 0, 1], [2, 5, 20, 30]])  # (2, B) streams and starts that do not overlap
Make = Callable[..., Any]


def observation(amount: int) -> dict[str, Tensor]:
    return {"place": torch.randn(amount, 3), "signal": torch.randint(4, (amount,))}


def used_carry(agent: Agent, amount: int) -> Carry:
    """What the agent keeps after three steps."""
    carry = agent.initial(amount)
    for t in range(3):
        _, carry = agent.act(observation(amount), torch.full((amount,), t == 0), carry)
    return carry


def flat(carry: Carry) -> list[Tensor]:
    return [*carry.state.values(), carry.z, carry.action]


def learned(agent: Agent) -> list[Tensor]:
    """Everything that an update changes, copied."""
    modules = (agent.world_model, agent.behavior, agent.learner.slow_critic, agent.learner.normalizer)
    tensors = [value for module in modules for value in module.state_dict().values()]
    tensors += [agent.learner.optimizer.count, *agent.learner.optimizer.square, *agent.learner.optimizer.momentum]
    return [tensor.detach().clone() for tensor in tensors]


def stored_latents(replay: Replay, rows: int = 40) -> dict[str, Tensor]:
    """Every latent in replay (streams, rows, ...)."""
    index = torch.cartesian_prod(torch.arange(replay.streams), torch.arange(rows)).T
    _, latents = replay.gather(index)
    return {key: value.unflatten(0, (replay.streams, rows)).clone() for key, value in latents.items()}


def inferred(agent: Agent, replay: Replay, use_context: bool = True) -> dict[str, Tensor]:
    """The posterior latents (B, T, ...) of WINDOWS, step by step, with the noise that comes next."""
    rows, context = replay.gather(WINDOWS)
    rssm = agent.world_model.rssm
    state = {key.removeprefix("state/"): value for key, value in context.items() if key != "z"}
    z = torch.eye(rssm.classes)[context["z"].long()]
    if not use_context:
        state, z = rssm.initial(WINDOWS.shape[1])
    steps = agent.config.train.batch_length
    uniform = torch.rand(WINDOWS.shape[1], steps, rssm.groups)
    columns = []
    with torch.no_grad():
        for t in range(steps):
            seen = {key: rows[key][:, t + 1] for key in ("place", "signal")}
            token = agent.world_model.encoder(seen, torch.float32)
            previous = agent.action.encode(rows["action"][:, t])
            latent, _ = rssm.observe_step(state, z, previous, rows["is_first"][:, t + 1], token, uniform[:, t])
            state, z = latent.state, latent.z
            columns.append({f"state/{key}": value for key, value in state.items()} | {"z": z.argmax(-1)})
    return {key: torch.stack([column[key] for column in columns], 1) for key in columns[0]}


# ---- size and start ----------------------------------------------------------------------------------------


def test_parameter_count_of_size_1m_on_walker(debug_config: Callable[..., Config]) -> None:
    def box(size: int, limit: float = np.inf) -> gymnasium.spaces.Box:
        return gymnasium.spaces.Box(-limit, limit, (size,), np.float32)

    observations = gymnasium.spaces.Dict({"orientations": box(14), "height": box(1), "velocity": box(9)})
    agent = Agent(observations, box(6, 1.0), debug_config(size="1m"), torch.device("cpu"))
    assert sum(agent.learner.parameter_counts().values()) == 640_867
    assert sum(parameter.numel() for parameter in agent.learner.parameters) == 640_867
    assert len(agent.learner.parameters) == 85  # in as many tensors, since gradients are clipped tensor by tensor


def test_new_agent_predicts_no_reward_and_no_value(make_agent: Make) -> None:
    agent = make_agent(BOX)
    feature = torch.randn(20, agent.world_model.rssm.feature_size) * 10
    for head in (agent.world_model.reward, agent.behavior.critic, agent.learner.slow_critic):
        assert torch.equal(head.mean(head(feature)), torch.zeros(20))


def test_a_graph_needs_a_gpu(make_agent: Make) -> None:
    with pytest.raises(UserError, match="compile: graph needs a CUDA device"):
        make_agent(BOX, ["compile=graph"])


def test_an_unknown_space_is_named(make_agent: Make) -> None:
    with pytest.raises(UserError, match=r"action has the space .*MultiBinary"):
        make_agent(gymnasium.spaces.MultiBinary(3))


# ---- acting ------------------------------------------------------------------------------------------------


@every_action
@both_posteriors
def test_acts_and_learns(make_agent: Make, make_replay: Make, action: gymnasium.Space, posterior: str) -> None:
    agent = make_agent(action, [f"rssm.posterior={posterior}", "optimizer.warmup=0"])
    carry = agent.initial(5)
    for t in range(3):
        for mode in (False, True):
            chosen, carry = agent.act(observation(5), torch.full((5,), t == 0), carry, mode=mode)
            for one in chosen.numpy():
                # Samples of a continuous policy are clipped by the environment.
                one = np.clip(one, -1, 1) if action is BOX else one
                if isinstance(action, actions.Hybrid):
                    one[: action.reals] = one[: action.reals].clip(-1, 1)
                assert action.contains(np.asarray(one, action.dtype))
                assert action is not ACTIONS["discrete"] or one.shape == ()
    replay = make_replay(agent)
    agent.attach(replay)
    before = learned(agent)
    for _ in range(2):
        agent.update(replay.sample(4))
    after = learned(agent)
    assert all(tensor.isfinite().all() for tensor in after)
    changed = [not torch.equal(a, b) for a, b in zip(after, before, strict=True)]
    assert all(changed)
    metrics = agent.take_metrics()
    assert metrics["loss/reconstruction"] > 0
    assert all(np.isfinite(list(metrics.values())))
    assert agent.take_metrics() == {}


def test_first_forgets_what_was_kept(make_agent: Make) -> None:
    agent = make_agent(BOX)
    seen, kept, fresh = observation(4), used_carry(agent, 4), agent.initial(4)
    results = {}
    for name, carry, first in (
        ("kept", kept, True),
        ("fresh", fresh, True),
        ("going on", kept, False),
    ):
        torch.manual_seed(3)
        action, after = agent.act(seen, torch.full((4,), first), carry)
        results[name] = [action, *flat(after)]
    for ours, theirs, other in zip(results["kept"], results["fresh"], results["going on"], strict=True):
        assert torch.equal(ours, theirs)
        assert theirs.dtype == other.dtype
    assert not torch.equal(results["kept"][1], results["going on"][1])


def test_mode_takes_the_most_likely_action(make_agent: Make) -> None:
    agent = make_agent(BOX)
    action, carry = agent.act(observation(4), torch.ones(4, dtype=torch.bool), agent.initial(4), mode=True)
    h = carry.state["deter"]
    policy = agent.behavior.actor(agent.world_model.rssm.feature(Latent(carry.state, h, carry.z), torch.float32))
    torch.testing.assert_close(action, policy.mean.detach())


@both_posteriors
@every_action
def test_acting_infers_what_training_infers(make_agent: Make, action: gymnasium.Space, posterior: str) -> None:
    agent = make_agent(action, [f"rssm.posterior={posterior}"])
    rssm, amount, steps = agent.world_model.rssm, 3, 6
    first = torch.zeros(amount, steps, dtype=torch.bool)
    first[:, 0] = first[1, 3] = True
    carry = agent.initial(amount)
    seen, noise, previous, memory, codes = [], [], [], [], []
    for t in range(steps):
        seen.append(observation(amount))
        torch.manual_seed(t)
        noise.append(torch.rand(amount, rssm.groups))
        previous.append(carry.action)
        torch.manual_seed(t)
        _, carry = agent.act(seen[t], first[:, t], carry)
        memory.append(carry.state["deter"])
        codes.append(carry.z)
    together = {key: torch.stack([one[key] for one in seen], 1) for key in seen[0]}
    token = agent.world_model.encoder(together, torch.float32)
    found = rssm.observe(*rssm.initial(amount), torch.stack(previous, 1), first, token, torch.stack(noise, 1))
    torch.testing.assert_close(found.latent.state["deter"].detach(), torch.stack(memory, 1), rtol=1e-4, atol=1e-5)
    assert torch.equal(found.latent.z.argmax(-1), torch.stack(codes, 1).argmax(-1))
    assert torch.stack(previous, 1)[:, 1:].abs().max() > 0


# ---- learning ----------------------------------------------------------------------------------------------


def test_the_action_before_each_step_is_that_of_the_row_before(make_agent: Make, make_replay: Make) -> None:
    agent = make_agent(gymnasium.spaces.Discrete(60))
    rows, _ = make_replay(agent).gather(WINDOWS)
    rows["action"] = torch.arange(rows["action"].numel()).view_as(rows["action"])  # (B, 1 + T), all distinct
    batch = agent.learner.as_batch(rows)
    assert batch.previous_action.shape == (4, 8, 60)
    assert torch.equal(batch.previous_action.argmax(-1), rows["action"][:, :-1])
    for ours, key in (
        (batch.observation["place"], "place"),
        (batch.observation["signal"], "signal"),
        (batch.reward, "reward"),
        (batch.first, "is_first"),
        (batch.last, "is_last"),
        (batch.terminal, "is_terminal"),
    ):
        assert torch.equal(ours, rows[key][:, 1:])


@both_posteriors
def test_an_update_writes_its_posterior_back_to_its_rows_and_to_no_others(
    make_agent: Make, make_replay: Make, posterior: str
) -> None:
    agent = make_agent(BOX, [f"rssm.posterior={posterior}"])
    replay = make_replay(agent)
    agent.attach(replay)
    before = stored_latents(replay)
    torch.manual_seed(5)
    expected = inferred(agent, replay)
    torch.manual_seed(5)
    without_context = inferred(agent, replay, use_context=False)
    assert not torch.allclose(without_context["state/deter"], expected["state/deter"], atol=1e-3)
    torch.manual_seed(5)
    agent.update(WINDOWS)
    after = stored_latents(replay)

    written = torch.zeros(2, 40, dtype=torch.bool)
    for b, (stream, start) in enumerate(WINDOWS.T.tolist()):
        own = slice(start + 1, start + 9)
        written[stream, own] = True
        torch.testing.assert_close(after["state/deter"][stream, own], expected["state/deter"][b], rtol=1e-4, atol=1e-5)
        assert torch.equal(after["z"][stream, own].long(), expected["z"][b])
    for key in before:
        assert torch.equal(after[key][~written], before[key][~written])
        assert not torch.equal(after[key][written], before[key][written])


def test_the_critic_learns_from_what_happened_at_the_states_that_imagination_started_from(
    make_agent: Make, make_replay: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    agent = make_agent(BOX, ["optimizer.warmup=0", "optimizer.lr=0.01"])
    replay = make_replay(agent)
    agent.attach(replay)
    agent.update(WINDOWS)  # so that values differ from zero
    seen: dict[str, Any] = {}

    def recorded(*arguments: Any) -> BehaviorLoss:
        seen["imagined"] = arguments[4]
        seen["loss"] = behavior.imagination_loss(*arguments)
        return seen["loss"]

    def replay_value_loss(*arguments: Any) -> Tensor:
        seen["real"] = arguments[2:7]
        return behavior.replay_value_loss(*arguments)

    monkeypatch.setattr("agent.learner.imagination_loss", recorded)
    monkeypatch.setattr("agent.learner.replay_value_loss", replay_value_loss)
    agent.update(WINDOWS)
    rows, _ = replay.gather(WINDOWS)
    feature, reward, last, terminal, bootstrap = seen["real"]  # (T, B, ...)
    for ours, key in ((reward, "reward"), (last, "is_last"), (terminal, "is_terminal")):
        assert torch.equal(ours, rows[key][:, 1:].T)
    assert not torch.equal(last, terminal)
    assert feature.requires_grad
    for b in range(4):
        for t in range(8):
            start = 8 * b + t
            torch.testing.assert_close(feature[t, b].detach(), seen["imagined"].feature[0, start])
            assert bootstrap[t, b] == seen["loss"].returns[0, start]


def test_the_slow_critic_follows(make_agent: Make, make_replay: Make) -> None:
    agent = make_agent(BOX, ["optimizer.warmup=0", "optimizer.lr=0.01", "behavior.slow_rate=0.02"])
    replay = make_replay(agent)
    agent.attach(replay)
    for _ in range(2):
        before = [parameter.detach().double() for parameter in agent.learner.slow_critic.parameters()]
        agent.update(replay.sample(4))
        for slow, old, new in zip(
            agent.learner.slow_critic.parameters(), before, agent.behavior.critic.parameters(), strict=True
        ):
            expected = 0.98 * old + 0.02 * new.detach().double()
            torch.testing.assert_close(slow.double(), expected, rtol=1e-5, atol=1e-8)
        assert not torch.equal(agent.learner.slow_critic.output.weight, agent.behavior.critic.output.weight)


def test_the_first_update_of_a_warm_up_changes_no_weight(make_agent: Make, make_replay: Make) -> None:
    agent = make_agent(BOX, ["optimizer.warmup=10"])
    replay = make_replay(agent)
    agent.attach(replay)
    before = [parameter.detach().clone() for parameter in agent.learner.parameters]
    agent.update(replay.sample(4))
    assert all(torch.equal(a, b) for a, b in zip(agent.learner.parameters, before, strict=True))
    for _ in range(2):  # one moves the heads of zeros, the next the layers below them
        agent.update(replay.sample(4))
    assert not any(torch.equal(a, b) for a, b in zip(agent.learner.parameters, before, strict=True))
    assert agent.updates == 3


def test_a_scale_of_zero_switches_a_loss_off(make_agent: Make, make_replay: Make) -> None:
    agent = make_agent(BOX, ["optimizer.warmup=0", "loss.actor=0.0"])
    replay = make_replay(agent)
    agent.attach(replay)
    before = [parameter.detach().clone() for parameter in agent.behavior.actor.parameters()]
    agent.update(replay.sample(4))
    assert all(torch.equal(a, b) for a, b in zip(agent.behavior.actor.parameters(), before, strict=True))


def test_imagination_starts_at_every_state_and_carries_no_gradient(make_agent: Make) -> None:
    agent = make_agent(BOX)
    rssm = agent.world_model.rssm
    carry = used_carry(agent, 6)
    h = carry.state["deter"].view(2, 3, -1).requires_grad_()
    z = carry.z.view(2, 3, rssm.groups, rssm.classes)
    found = agent.learner._judged(*agent.learner._imagine(Latent({"deter": h}, h, z)))
    horizon = agent.config.behavior.imagination_horizon
    assert found.feature.shape == (horizon + 1, 6, rssm.feature_size)
    assert found.action.shape == (horizon, 6, 2)
    assert found.reward.shape == found.continuation.shape == (horizon + 1, 6)
    torch.testing.assert_close(found.feature[0], torch.cat([h.detach().flatten(0, 1), z.flatten(0, 1).flatten(1)], -1))
    assert not any(tensor.requires_grad for tensor in found)
    first = torch.zeros(6, dtype=torch.bool)
    state, code = {"deter": found.feature[0, :, : rssm.core.feature_size]}, z.flatten(0, 1)
    for t in range(horizon):
        after, state = rssm.core.step(rssm.core_input(code, found.action[t], first, torch.float32), state, first)
        feature = found.feature[t + 1]
        torch.testing.assert_close(feature[:, : rssm.core.feature_size], after.detach(), rtol=1e-4, atol=1e-5)
        code = feature[:, rssm.core.feature_size :].unflatten(-1, (rssm.groups, rssm.classes))
        assert torch.equal(code.sum(-1), torch.ones(6, rssm.groups))


# ---- keeping -----------------------------------------------------------------------------------------------


@every_action
@both_posteriors
def test_a_loaded_agent_goes_on_identically(
    make_agent: Make, make_replay: Make, action: gymnasium.Space, posterior: str
) -> None:
    settings = [f"rssm.posterior={posterior}", "optimizer.warmup=4"]
    agent = make_agent(action, settings)
    replay = make_replay(agent)
    agent.attach(replay)
    for _ in range(3):
        agent.update(replay.sample(4))
    other = make_agent(action, settings, seed=1)
    other_replay = make_replay(other)
    other_replay.load_state_dict(copy.deepcopy(replay.state_dict()))
    other.attach(other_replay)
    other.load_state_dict(copy.deepcopy(agent.state_dict()))
    assert other.updates == 3
    assert agent.learner.normalizer.high > agent.learner.normalizer.low
    assert all(torch.equal(a, b) for a, b in zip(learned(agent), learned(other), strict=True))
    saved = learned(agent)
    for one, memory in ((agent, replay), (other, other_replay)):
        torch.manual_seed(7)
        one.update(memory.sample(4))
        one.act(observation(3), torch.ones(3, dtype=torch.bool), one.initial(3))
    assert all(torch.equal(a, b) for a, b in zip(learned(agent), learned(other), strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(learned(agent), saved, strict=True))
    for key, value in stored_latents(replay).items():
        assert torch.equal(value, stored_latents(other_replay)[key])


def test_a_state_of_another_agent_is_told_in_one_line(make_agent: Make) -> None:
    other = make_agent(BOX, ["loss.anticipation=1.0"])
    with pytest.raises(UserError, match="runs/old: .*anticipation.* use the version that wrote it") as caught:
        make_agent(BOX).load_state_dict(other.state_dict(), "runs/old")
    assert "\n" not in str(caught.value)


def test_acting_uses_loaded_and_updated_weights(make_agent: Make) -> None:
    agent, other = make_agent(BOX), make_agent(BOX, seed=1)
    seen, first = observation(3), torch.ones(3, dtype=torch.bool)

    def act(one: Agent) -> Tensor:
        torch.manual_seed(0)
        return one.act(seen, first, one.initial(3))[0]

    assert not torch.equal(act(agent), act(other))
    other.load_state_dict(copy.deepcopy(agent.state_dict()))
    assert torch.equal(act(agent), act(other))


def test_gradient_through_the_model_equals_a_plain_loop_and_teaches_the_actor_alone(make_agent: Make) -> None:
    agent = make_agent(BOX, ["behavior.gradient=dynamics", "behavior.entropy=0.1", "behavior.imagination_horizon=4"])
    for output in (*agent.behavior.actor.outputs, agent.behavior.critic.output, agent.world_model.reward.output):
        torch.nn.init.normal_(output.weight, std=0.1)
    distance = (torch.arange(agent.config.heads.bins) - agent.config.heads.bins // 2).abs()
    for head in (agent.behavior.critic, agent.world_model.reward):  # far bins reach 4.85e8 and would drown all else
        head.output.bias.data.copy_(-0.5 * distance)  # in place, since frozen twins share it
    state, z = agent.world_model.rssm.initial(6)
    h = state["deter"] + 0.1 * torch.randn_like(state["deter"])
    start = Latent({"deter": h.unsqueeze(0)}, h.unsqueeze(0), z.unsqueeze(0))
    settings, actor = agent.config.behavior, agent.behavior.actor
    learned = dict(agent.world_model.named_parameters()) | dict(agent.behavior.named_parameters())

    torch.manual_seed(1)
    imagined = agent.learner._judged(*agent.learner._imagine(start))
    loss = imagination_loss(
        agent.behavior,
        agent.learner.frozen_critic.module,
        agent.learner.slow_critic,
        agent.learner.normalizer,
        imagined,
        settings,
    )
    found = torch.autograd.grad(loss.losses["actor"].mean(), list(learned.values()), materialize_grads=True)

    torch.manual_seed(1)
    action_noise = agent.action.noise((4, 6), agent.device)
    uniform = torch.rand(4, 6, agent.config.rssm.stoch)
    model, rssm = agent.world_model, agent.world_model.rssm
    features, state = [rssm.feature(Latent({"deter": h}, h, z), torch.float32)], {"deter": h}
    for t in range(4):
        action = actor(features[-1].detach()).sample(action_noise[t])
        state, h, z = rssm.imagine_step(state, z, action, uniform[t], torch.float32)
        features.append(rssm.feature(Latent(state, h, z), torch.float32))
    feature = torch.stack(features)
    reward, live = model.reward.mean(model.reward(feature)), model.continuation.probability(feature)
    value = agent.behavior.critic.mean(agent.behavior.critic(feature))
    returns = lambda_return(reward, live, value, torch.zeros_like(live), settings.return_lambda)
    scale = (agent.learner.normalizer.high - agent.learner.normalizer.low).clamp(min=1)
    entropy = actor(feature[:-1].detach()).entropy()
    plain = -live.detach().cumprod(0)[:-1] * ((returns - value[:-1]) / scale + 0.1 * entropy)
    expected = torch.autograd.grad(plain.mean(), list(actor.parameters()))

    of_actor = {name for name in learned if name.startswith("actor.")}
    for name, gradient in zip(learned, found, strict=True):
        assert (gradient.abs().max() > 0) == (name in of_actor), name
    ours = [gradient for name, gradient in zip(learned, found, strict=True) if name in of_actor]
    for gradient, reference in zip(ours, expected, strict=True):
        torch.testing.assert_close(gradient, reference, rtol=1e-4, atol=1e-6)


def test_discrete_actions_have_no_gradient_through_the_model(make_agent: Make) -> None:
    with pytest.raises(UserError, match="behavior.gradient: dynamics needs continuous actions"):
        make_agent(gymnasium.spaces.Discrete(3), ["behavior.gradient=dynamics"])
