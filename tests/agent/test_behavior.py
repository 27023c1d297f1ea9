"""Actor and critic against their formulas in NumPy fp64."""

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from agent.behavior import (
    Actor,
    Behavior,
    Imagined,
    ReturnNormalizer,
    critic_loss,
    imagination_loss,
    lambda_return,
    replay_value_loss,
)
from agent.schema import Config
from agent.spaces import Categories, Space, Vector
from agent.world_model.heads import TwoHotHead

FEATURE, H, N = 6, 5, 8
ACTIONS: dict[str, Space] = {
    "continuous": Vector(3),
    "discrete": Categories((4,), scalar=True),
    "multi-discrete": Categories((2, 3), scalar=False),
}
Make = Callable[..., Any]


@pytest.fixture
def make(debug_config: Callable[..., Config]) -> Make:
    """Function of an action space and settings: behavior away from zero, another slow critic, config."""

    def make(action: Space, *settings: str) -> tuple[Behavior, TwoHotHead, Config]:
        config = debug_config(*settings)
        behavior = Behavior(FEATURE, action, config)
        for output in (behavior.critic.output, *behavior.actor.outputs):
            torch.nn.init.normal_(output.weight, std=0.3)
        # Far bins reach 4.85e8: left as likely as near ones, they would drown every reward.
        distance = (torch.arange(config.heads.bins) - config.heads.bins // 2).abs()
        behavior.critic.output.bias.data = -0.5 * distance
        slow = copy.deepcopy(behavior.critic).requires_grad_(False)
        slow.output.weight += 0.1 * torch.randn_like(slow.output.weight)
        return behavior, slow, config

    return make


def imagination(behavior: Behavior) -> Imagined:
    feature = torch.randn(H + 1, N, FEATURE)
    action = behavior.actor(feature[:-1]).sample(behavior.actor.space.noise((H, N), torch.device("cpu"))).detach()
    return Imagined(feature, action, torch.randn(H + 1, N) * 3, torch.rand(H + 1, N) * 0.5 + 0.5)


def fp64(tensor: Tensor) -> np.ndarray:
    return tensor.detach().double().numpy()


def brute_force(r: np.ndarray, live: np.ndarray, b: np.ndarray, last: np.ndarray, lam: float, t: int) -> np.ndarray:
    """R_t by recursion, as the formula says it."""
    if t == len(r) - 1:
        return b[t]
    cont = (1 - last[t + 1]) * lam
    later = brute_force(r, live, b, last, lam, t + 1)
    return r[t + 1] + live[t + 1] * ((1 - cont) * b[t + 1] + cont * later)


def cross_entropy(logits: np.ndarray, target: np.ndarray, bins: np.ndarray) -> np.ndarray:
    """Two-hot cross-entropy (...) of logits (..., bins) with targets (...) inside the outermost bins."""
    log_probs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    above = np.clip(np.searchsorted(bins, target, side="right"), 1, len(bins) - 1)
    share = (target - bins[above - 1]) / (bins[above] - bins[above - 1])
    low = np.take_along_axis(log_probs, (above - 1)[..., None], -1)[..., 0]
    high = np.take_along_axis(log_probs, above[..., None], -1)[..., 0]
    return -(1 - share) * low - share * high


def test_lambda_return_by_hand() -> None:
    reward, bootstrap = torch.tensor([9.0, 1.0, 2.0]), torch.tensor([9.0, 10.0, 20.0])
    live, never = torch.tensor([9.0, 0.5, 0.5]), torch.zeros(3, dtype=torch.bool)
    last_step = 2 + 0.5 * 20
    expected = [1 + 0.5 * (0.2 * 10 + 0.8 * last_step), last_step]
    torch.testing.assert_close(lambda_return(reward, live, bootstrap, never, 0.8), torch.tensor(expected))


@pytest.mark.parametrize("return_lambda", [0.0, 0.95, 1.0])
def test_lambda_return_equals_the_recursion(return_lambda: float) -> None:
    reward, bootstrap = torch.randn(2, 7, 4, dtype=torch.float64)
    last = torch.rand(7, 4) < 0.3
    terminal = last & (torch.rand(7, 4) < 0.5)
    assert last[1:].any()
    assert terminal[1:].any()
    live = (~terminal).double() * 0.9
    found = lambda_return(reward, live, bootstrap, last, return_lambda)
    arrays = (reward.numpy(), live.numpy(), bootstrap.numpy(), last.numpy().astype(float))
    expected = np.stack([brute_force(*arrays, return_lambda, t) for t in range(6)])
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-12)


def test_return_does_not_pass_the_end_of_an_episode() -> None:
    reward, bootstrap = torch.ones(4), torch.full((4,), 100.0)
    last = torch.tensor([False, True, False, False])
    live = torch.tensor([0.9, 0.0, 0.9, 0.9])  # terminal: what was received, and nothing after it
    assert lambda_return(reward, live, bootstrap, last, 0.95)[0] == 1
    live[1] = 0.9  # a time limit: the value of the last state stands for what would have followed
    assert lambda_return(reward, live, bootstrap, last, 0.95)[0] == pytest.approx(1 + 0.9 * 100)


def test_normalizer_averages_percentiles(debug_config: Callable[..., Config]) -> None:
    config = debug_config("behavior.return_rate=0.01", "behavior.return_low=5", "behavior.return_high=95")
    normalizer = ReturnNormalizer(config.behavior)
    low = high = 0.0
    scales = []
    for step in range(6):
        returns = torch.randn(5, 23) * 300 + 10 * step
        scale = normalizer.update(returns)
        low = 0.99 * low + 0.01 * np.percentile(fp64(returns), 5)
        high = 0.99 * high + 0.01 * np.percentile(fp64(returns), 95)
        assert normalizer.low.item() == pytest.approx(low, rel=1e-4)
        assert normalizer.high.item() == pytest.approx(high, rel=1e-4)
        assert scale.item() == pytest.approx(max(1, high - low), rel=1e-4)
        scales.append(scale.item())
    assert scales[-1] > 1


def test_normalizer_leaves_small_returns_small(debug_config: Callable[..., Config]) -> None:
    normalizer = ReturnNormalizer(debug_config().behavior)
    assert normalizer.update(torch.randn(100) * 1e-3).item() == 1
    assert normalizer.update(torch.tensor([5.0])).item() == 1


@pytest.mark.parametrize("action", ACTIONS.values(), ids=ACTIONS.keys())
def test_imagination_losses_follow_the_formulas(make: Make, action: Space) -> None:
    behavior, slow, config = make(action, "behavior.return_rate=0.5", "behavior.entropy=0.1")
    imagined = imagination(behavior)
    found = imagination_loss(
        behavior, behavior.critic, slow, ReturnNormalizer(config.behavior), imagined, config.behavior
    )

    bins = fp64(behavior.critic.bins)
    logits = fp64(behavior.critic(imagined.feature))
    value = fp64(behavior.critic.mean(behavior.critic(imagined.feature)))
    slow_value = fp64(slow.mean(slow(imagined.feature)))
    reward, c = fp64(imagined.reward), fp64(imagined.continuation)
    returns = np.stack([brute_force(reward, c, value, np.zeros_like(c), 0.95, t) for t in range(H)])
    np.testing.assert_allclose(fp64(found.returns), returns, rtol=1e-4)
    weight = np.stack([c[: t + 1].prod(0) for t in range(H)])
    scale = max(1, 0.5 * np.percentile(returns, 95) - 0.5 * np.percentile(returns, 5))
    assert scale > 1
    policy = behavior.actor(imagined.feature[:-1])
    log_prob, entropy = fp64(policy.log_prob(imagined.action)), fp64(policy.entropy())
    actor = -weight * ((returns - value[:-1]) / scale * log_prob + 0.1 * entropy)
    critic = weight * (cross_entropy(logits[:-1], returns, bins) + cross_entropy(logits[:-1], slow_value[:-1], bins))
    np.testing.assert_allclose(fp64(found.losses["actor"]), actor, rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(fp64(found.losses["critic"]), critic, rtol=1e-3, atol=1e-3)
    assert found.statistics["return_scale"].item() == pytest.approx(scale, rel=1e-4)


@pytest.mark.parametrize("name", ["actor", "critic"])
def test_actor_and_critic_losses_train_only_their_own_network(make: Make, name: str) -> None:
    behavior, slow, config = make(ACTIONS["continuous"])
    found = imagination_loss(
        behavior, behavior.critic, slow, ReturnNormalizer(config.behavior), imagination(behavior), config.behavior
    )
    named = dict(behavior.named_parameters())
    gradients = torch.autograd.grad(
        found.losses[name].sum(), list(named.values()), allow_unused=True, materialize_grads=True
    )
    touched = {key.split(".")[0] for key, g in zip(named, gradients, strict=True) if g.abs().max() > 0}
    assert touched == {name}


@pytest.mark.parametrize("action", ACTIONS.values(), ids=ACTIONS.keys())
def test_descent_makes_advantageous_actions_likelier(make: Make, action: Space) -> None:
    behavior, slow, config = make(action, "behavior.entropy=0.0")
    good = Imagined(*(tensor[:length, :1] for tensor, length in zip(imagination(behavior), (2, 1, 2, 2), strict=True)))
    good = good._replace(reward=torch.full((2, 1), 1e4))  # far from any value: the sign of the advantage is known
    for imagined, sign in ((good, 1), (good._replace(reward=-good.reward), -1)):
        loss = imagination_loss(
            behavior, behavior.critic, slow, ReturnNormalizer(config.behavior), imagined, config.behavior
        )
        actor = copy.deepcopy(behavior.actor)
        gradients = torch.autograd.grad(loss.losses["actor"].mean(), list(behavior.actor.parameters()))
        size = torch.stack([gradient.norm() for gradient in gradients]).norm()
        with torch.no_grad():
            for parameter, gradient in zip(actor.parameters(), gradients, strict=True):
                parameter -= 1e-3 * gradient / size
            before = behavior.actor(imagined.feature[:-1]).log_prob(imagined.action).mean()
            after = actor(imagined.feature[:-1]).log_prob(imagined.action).mean()
        assert sign * (after - before) > 1e-5


@pytest.mark.parametrize("action", ACTIONS.values(), ids=ACTIONS.keys())
def test_descent_raises_entropy_when_nothing_else_is_at_stake(make: Make, action: Space) -> None:
    behavior, slow, config = make(action, "behavior.entropy=1.0")
    torch.nn.init.zeros_(behavior.critic.output.weight)
    imagined = imagination(behavior)._replace(reward=torch.zeros(H + 1, N))
    loss = imagination_loss(
        behavior, behavior.critic, slow, ReturnNormalizer(config.behavior), imagined, config.behavior
    )
    before = behavior.actor(imagined.feature).entropy().mean().item()
    gradients = torch.autograd.grad(loss.losses["actor"].mean(), list(behavior.actor.parameters()))
    with torch.no_grad():
        for parameter, gradient in zip(behavior.actor.parameters(), gradients, strict=True):
            parameter -= 1e-2 * gradient
    assert behavior.actor(imagined.feature).entropy().mean().item() > before


def real_sequence(steps: int = 6, streams: int = 3) -> dict[str, Tensor]:
    last = torch.zeros(steps, streams, dtype=torch.bool)
    last[2, 0] = last[3, 1] = last[5, 2] = True
    terminal = last.clone()
    terminal[3, 1] = False
    return {
        "feature": torch.randn(steps, streams, FEATURE).requires_grad_(),
        "reward": torch.randn(steps, streams),
        "last": last,
        "terminal": terminal,
        "bootstrap": torch.randn(steps, streams) * 5,
    }


def test_replay_value_loss_follows_the_formula(make: Make) -> None:
    behavior, slow, config = make(ACTIONS["continuous"])
    real = real_sequence()
    loss = replay_value_loss(behavior, slow, **real, config=config.behavior)
    last, terminal = fp64(real["last"]), fp64(real["terminal"])
    live = (1 - terminal) * (1 - 1 / 333)
    arrays = (fp64(real["reward"]), live, fp64(real["bootstrap"]), last)
    returns = np.stack([brute_force(*arrays, 0.95, t) for t in range(5)])
    bins, feature = fp64(behavior.critic.bins), real["feature"].detach()[:-1]
    logits, slow_value = fp64(behavior.critic(feature)), fp64(slow.mean(slow(feature)))
    expected = (1 - last[:-1]) * (cross_entropy(logits, returns, bins) + cross_entropy(logits, slow_value, bins))
    np.testing.assert_allclose(fp64(loss), expected, rtol=1e-3, atol=1e-3)
    assert (loss[real["last"][:-1]] == 0).all()


def test_replay_value_loss_reaches_the_feature_but_not_through_targets(make: Make) -> None:
    behavior, slow, config = make(ACTIONS["continuous"])
    real = real_sequence()
    loss = replay_value_loss(behavior, slow, **real, config=config.behavior)
    (gradient,) = torch.autograd.grad(loss.sum(), real["feature"])
    reached = gradient.abs().sum(-1) > 0
    assert torch.equal(reached[:-1], ~real["last"][:-1])
    assert not reached[-1].any()

    fixed = real["feature"].detach()
    leaf = fixed[:-1].clone().requires_grad_()
    live = (~real["terminal"]).float() * (1 - 1 / 333)
    returns = lambda_return(real["reward"], live, real["bootstrap"], real["last"], 0.95)
    alone = critic_loss(behavior.critic, slow, fixed[:-1], behavior.critic(leaf), returns, 1.0)
    (expected,) = torch.autograd.grad((alone * ~real["last"][:-1]).sum(), leaf)
    torch.testing.assert_close(gradient[:-1], expected)


@pytest.mark.parametrize("action", ACTIONS.values(), ids=ACTIONS.keys())
def test_a_new_actor_is_near_the_middle(action: Space) -> None:
    policy = Actor(FEATURE, action, 64, 3)(torch.randn(50, FEATURE))
    if isinstance(action, Vector):
        assert 0 < policy.mean.abs().max() < 0.1
    else:
        uniform = -sum(np.log(size) for size in action.sizes)
        assert policy.entropy().min().item() == pytest.approx(-uniform, abs=0.01)


def test_a_new_critic_predicts_exactly_zero(debug_config: Callable[..., Config]) -> None:
    critic = Behavior(FEATURE, ACTIONS["continuous"], debug_config()).critic
    assert torch.equal(critic.mean(critic(torch.randn(9, FEATURE) * 10)), torch.zeros(9))
