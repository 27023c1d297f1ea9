"""The world model's losses against their formulas in NumPy fp64, and which loss trains what."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from agent.distributions import unimix_log_probs
from agent.schema import Config
from agent.spaces import Categories, Space, Vector
from agent.world_model import Batch, WorldModel
from agent.world_model.encoder import network_input
from agent.world_model.rssm import Latent, Posterior

B, T = 3, 4
SPACES: dict[str, Space] = {
    "choice": Categories((3,), scalar=True),
    "choices": Categories((2, 4), scalar=False),
    "place": Vector(5),
}
Make = Callable[..., Any]


@pytest.fixture
def make_model(debug_config: Callable[..., Config]) -> Make:
    """Function of settings: a world model whose heads of zeros are moved away from zero."""

    def make(*settings: str) -> WorldModel:
        model = WorldModel(SPACES, Vector(2), debug_config(*settings))
        torch.nn.init.normal_(model.reward.output.weight, std=0.3)
        return model

    return make


def batch() -> Batch:
    observation = {
        "choice": torch.randint(3, (B, T)),
        "choices": torch.stack([torch.randint(2, (B, T)), torch.randint(4, (B, T))], -1),
        "place": torch.randn(B, T, 5) * 10,
    }
    terminal = torch.zeros(B, T, dtype=torch.bool)
    terminal[0, 1] = terminal[2, 3] = True
    last = terminal.clone()
    last[1, 2] = True
    first = torch.zeros(B, T, dtype=torch.bool)
    return Batch(observation, torch.randn(B, T, 2), torch.randn(B, T) * 5, first, last, terminal)


def posterior(model: WorldModel, spread: Tensor | float = 1.0) -> Posterior:
    """Random states whose h and log-probabilities are leaves with gradients."""
    rssm = model.rssm
    h = torch.randn(B, T, rssm.core.feature_size).requires_grad_()
    log_probs = unimix_log_probs(torch.randn(B, T, rssm.groups, rssm.classes) * spread, 0.01).requires_grad_()
    z = torch.nn.functional.one_hot(torch.randint(rssm.classes, (B, T, rssm.groups)), rssm.classes).float()
    return Posterior(Latent({"deter": h}, h, z), log_probs)


def feature_of(model: WorldModel, found: Posterior) -> Tensor:
    return model.rssm.feature(found.latent, torch.float32)


def fp64(tensor: Tensor) -> np.ndarray:
    return tensor.detach().double().numpy()


def log_softmax(logits: np.ndarray) -> np.ndarray:
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def reference_kl(model: WorldModel, found: Posterior) -> np.ndarray:
    """KL(q || p) (B, T), both mixed with 1 % of the uniform, summed over groups."""
    rssm = model.rssm
    logits = fp64(rssm.prior(found.latent.h)).reshape(B, T, rssm.groups, rssm.classes)
    p = 0.99 * np.exp(log_softmax(logits)) + 0.01 / rssm.classes
    log_q = fp64(found.log_probs)
    return (np.exp(log_q) * (log_q - np.log(p))).sum((-2, -1))


def test_network_input_squashes_reals_and_spells_out_choices_in_the_order_of_keys() -> None:
    observation = batch().observation
    expected = np.zeros((B, T, 3 + 2 + 4 + 5))
    for b in range(B):
        for t in range(T):
            expected[b, t, observation["choice"][b, t]] = 1
            expected[b, t, 3 + observation["choices"][b, t, 0]] = 1
            expected[b, t, 5 + observation["choices"][b, t, 1]] = 1
    place = fp64(observation["place"])
    expected[..., 9:] = np.sign(place) * np.log(1 + np.abs(place))
    shuffled = {key: SPACES[key] for key in ("place", "choices", "choice")}
    np.testing.assert_allclose(network_input(observation, shuffled).numpy(), expected, rtol=1e-5, atol=1e-6)


def test_kl_losses_are_clamped_at_the_free_nats(make_model: Make) -> None:
    model = make_model("loss.free_nats=1.0")
    with torch.no_grad():
        model.rssm.prior[-1].weight.mul_(0.1)
    spread = torch.tensor([0.1, 0.3, 1.0, 3.0]).view(T, 1, 1)
    found = posterior(model, spread)
    kl = reference_kl(model, found)
    assert (kl < 1).any()
    assert (kl > 1).any()
    losses, statistics = model.losses(batch(), found, feature_of(model, found))
    for name in ("dynamics", "representation"):
        np.testing.assert_allclose(fp64(losses[name]), np.maximum(kl, 1), rtol=1e-4)
    assert statistics["kl"].item() == pytest.approx(kl.mean(), rel=1e-4)
    (gradient,) = torch.autograd.grad(losses["representation"].sum(), found.log_probs)
    assert ((gradient.abs().sum((-2, -1)) > 0).numpy() == (kl > 1)).all()


def test_reconstruction_sums_over_the_entries_of_all_keys(make_model: Make) -> None:
    model, data = make_model(), batch()
    found = posterior(model)
    feature = feature_of(model, found)
    predicted = {key: fp64(value) for key, value in model.decoder(feature).items()}
    place = fp64(data.observation["place"])
    expected = ((predicted["place"] - np.sign(place) * np.log(1 + np.abs(place))) ** 2).sum(-1)
    parts = [
        (predicted["choice"], data.observation["choice"]),
        (predicted["choices"][..., :2], data.observation["choices"][..., 0]),
        (predicted["choices"][..., 2:], data.observation["choices"][..., 1]),
    ]
    for logits, target in parts:
        expected -= np.take_along_axis(log_softmax(logits), target.numpy()[..., None], -1)[..., 0]
    losses, _ = model.losses(data, found, feature)
    assert losses["reconstruction"].shape == (B, T)
    np.testing.assert_allclose(fp64(losses["reconstruction"]), expected, rtol=1e-4)


def test_reward_is_a_twohot_cross_entropy(make_model: Make) -> None:
    model, data = make_model(), batch()
    found = posterior(model)
    feature = feature_of(model, found)
    expected = twohot_cross_entropy(fp64(model.reward(feature)), fp64(data.reward))
    losses, _ = model.losses(data, found, feature)
    np.testing.assert_allclose(fp64(losses["reward"]), expected, rtol=1e-3)


def twohot_cross_entropy(logits: np.ndarray, target: np.ndarray) -> np.ndarray:
    """Of logits (..., 255) with numbers (...), each between its two symexp-spaced neighbours."""
    log_probs = log_softmax(logits)
    half = np.linspace(-20, 0, 128)
    negative = -(np.exp(-half) - 1)
    bins = np.concatenate([negative, -negative[:-1][::-1]])
    expected = np.empty(target.shape)
    for place, number in np.ndenumerate(target):
        above = int(np.searchsorted(bins, number))
        share = (number - bins[above - 1]) / (bins[above] - bins[above - 1])
        expected[place] = -(1 - share) * log_probs[place][above - 1] - share * log_probs[place][above]
    return expected


def test_anticipation_predicts_the_next_reward_where_the_action_is_chosen(make_model: Make) -> None:
    model, data = make_model("loss.anticipation=1.0"), batch()
    head = model.anticipation
    assert head is not None
    torch.nn.init.normal_(head.output.weight, std=0.3)
    data.first[1, 3] = True  # after the time limit at [1, 2]; the action there leads nowhere
    found = posterior(model)
    feature = feature_of(model, found)
    expected = np.zeros((B, T - 1))
    for b in range(B):
        for t in range(T - 1):
            if not data.first[b, t + 1]:
                action = data.previous_action[b, t + 1]
                done = np.clip(fp64(action), -1, 1)  # what the environment makes of it
                share = 1 + fp64(head.weight_of_action.weight) @ done + fp64(head.weight_of_action.bias)
                logits = fp64(head.output.weight) @ (fp64(head.mlp(feature[b, t])) * share) + fp64(head.output.bias)
                expected[b, t] = twohot_cross_entropy(logits, fp64(data.reward[b, t + 1]))
    losses, _ = model.losses(data, found, feature)
    np.testing.assert_allclose(fp64(losses["anticipation"]), expected, rtol=1e-3)
    (reached,) = torch.autograd.grad(losses["anticipation"].sum(), found.latent.h)
    assert (reached[0, :-1] != 0).any(-1).all() and not reached[:, -1].any() and not reached[1, 2].any()
    assert make_model().anticipation is None


def test_continuation_target_is_zero_or_the_discount(make_model: Make) -> None:
    model, data = make_model("behavior.discount_horizon=333"), batch()
    found = posterior(model)
    feature = feature_of(model, found)
    target = (1 - fp64(data.terminal)) * (1 - 1 / 333)  # the time limit at [1, 2] continues
    p = 1 / (1 + np.exp(-fp64(model.continuation(feature))))
    expected = -target * np.log(p) - (1 - target) * np.log(1 - p)
    losses, _ = model.losses(data, found, feature)
    np.testing.assert_allclose(fp64(losses["continuation"]), expected, rtol=1e-4)
    np.testing.assert_allclose(fp64(model.continuation.probability(feature)), p, rtol=1e-5)


def trained_by(model: WorldModel, loss: Tensor, leaves: dict[str, Tensor]) -> set[str]:
    """The leaves and the parts of the model that receive a gradient."""
    named = leaves | dict(model.named_parameters())
    found = torch.autograd.grad(
        loss, list(named.values()), retain_graph=True, allow_unused=True, materialize_grads=True
    )
    touched = [name for name, gradient in zip(named, found, strict=True) if gradient.abs().max() > 0]
    return {".".join(name.split(".")[: 2 if name.startswith("rssm") else 1]) for name in touched}


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("dynamics", {"rssm.prior", "h"}),
        ("representation", {"log_probs"}),
        ("reconstruction", {"decoder", "h"}),
        ("reward", {"reward", "h"}),
        ("continuation", {"continuation", "h"}),
    ],
)
def test_each_loss_trains_only_its_own_side(make_model: Make, name: str, expected: set[str]) -> None:
    model = make_model("loss.free_nats=0.0")
    found = posterior(model)
    losses, _ = model.losses(batch(), found, feature_of(model, found))
    leaves = {"h": found.latent.h, "log_probs": found.log_probs}
    assert trained_by(model, losses[name].sum(), leaves) == expected


def test_the_two_kl_losses_at_one_step_reach_prior_and_posterior_apart(make_model: Make) -> None:
    model = make_model("loss.free_nats=0.0", "rssm.posterior=observation")
    data = batch()
    state, z = model.rssm.initial(B)
    token = model.encoder(data.observation, torch.float32)
    first = torch.ones(B, T, dtype=torch.bool)  # no code reaches the next step's memory
    found = model.rssm.observe(state, z, data.previous_action, first, token, torch.rand(B, T, model.rssm.groups))
    losses, _ = model.losses(data, found, feature_of(model, found))
    dynamics = trained_by(model, losses["dynamics"].sum(), {})
    assert "rssm.prior" in dynamics
    assert not {"rssm.posterior", "encoder"} & dynamics
    assert trained_by(model, losses["representation"].sum(), {}) == {"rssm.posterior", "encoder"}


def test_a_new_reward_head_predicts_exactly_zero(debug_config: Callable[..., Config]) -> None:
    model = WorldModel(SPACES, Vector(2), debug_config())
    feature = torch.randn(7, model.rssm.feature_size) * 10
    assert torch.equal(model.reward.mean(model.reward(feature)), torch.zeros(7))
