"""Distributions against their formulas in NumPy fp64."""

from itertools import pairwise

import numpy as np
import pytest
import torch

from agent.distributions import (
    CategoricalPolicy,
    HybridPolicy,
    NormalPolicy,
    categorical_sample,
    entropy,
    kl_divergence,
    straight_through,
    symexp,
    symlog,
    twohot_bins,
    twohot_loss,
    twohot_mean,
    unimix_log_probs,
)

JUST_BELOW_ONE = float(np.nextafter(np.float32(1), np.float32(0)))


def softmax(logits: np.ndarray) -> np.ndarray:
    """(..., C) -> (..., C)."""
    powers = np.exp(logits - logits.max(-1, keepdims=True))
    return powers / powers.sum(-1, keepdims=True)


def reference_bins(count: int) -> np.ndarray:
    """sign(s) (exp|s| - 1) at equal spaces over [-20, 20], the negative half mirrored."""
    squashed = np.linspace(-20, 20, count)
    return np.sign(squashed) * (np.exp(np.abs(squashed)) - 1)


def twohot(target: float, bins: np.ndarray) -> np.ndarray:
    """The weights (bins,) of a target: linear between neighbours, all on the outermost bin beyond it."""
    weights = np.zeros(len(bins))
    if target <= bins[0]:
        weights[0] = 1
    elif target >= bins[-1]:
        weights[-1] = 1
    else:
        below = max(k for k in range(len(bins)) if bins[k] <= target)
        share = (target - bins[below]) / (bins[below + 1] - bins[below])
        weights[below], weights[below + 1] = 1 - share, share
    return weights


def test_symlog_and_symexp_follow_their_formulas() -> None:
    x = np.array([-1e4, -3.0, -0.5, 0.0, 1e-3, 1.0, 50.0])
    expected = np.sign(x) * np.log(1 + np.abs(x))
    np.testing.assert_allclose(symlog(torch.tensor(x)).numpy(), expected, rtol=1e-12)
    np.testing.assert_allclose(symexp(torch.tensor(expected)).numpy(), x, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("count", [5, 41, 255])
def test_bins_are_symexp_spaced_and_mirrored_about_an_exact_zero(count: int) -> None:
    bins = twohot_bins(count)
    np.testing.assert_allclose(bins.numpy(), reference_bins(count), rtol=1e-6, atol=1e-9)
    assert bins[count // 2] == 0
    assert torch.equal(bins, -bins.flip(0))
    assert (bins.diff() > 0).all()


def test_twohot_mean_is_the_expectation() -> None:
    bins = twohot_bins(41)
    logits = torch.randn(6, 41)
    logits[:, [0, 1, 2, -3, -2, -1]] -= 30  # the far bins would drown the near ones
    expected = (softmax(logits.double().numpy()) * bins.double().numpy()).sum(-1)
    np.testing.assert_allclose(twohot_mean(logits, bins).numpy(), expected, rtol=1e-3)


@pytest.mark.parametrize("count", [5, 255])
@pytest.mark.parametrize("level", [0.0, -3.7, 11.0])
def test_equal_logits_predict_exactly_zero(count: int, level: float) -> None:
    mean = twohot_mean(torch.full((3, 7, count), level), twohot_bins(count))
    assert torch.equal(mean, torch.zeros(3, 7))


def test_twohot_loss_on_between_and_beyond_bins() -> None:
    bins = twohot_bins(41)
    exact = bins.double().numpy()
    on = [exact[3], exact[20], exact[40], exact[0], exact[25]]
    between = [0.3, -0.3, 1.0, -7.0, 1234.5, 0.5 * (exact[30] + exact[31])]
    beyond = [1e10, -1e10]
    targets = np.array(on + between + beyond)
    logits = torch.randn(len(targets), 41)
    log_probs = np.log(softmax(logits.double().numpy()))
    expected = [-(twohot(t, exact) * row).sum() for t, row in zip(targets, log_probs, strict=True)]
    loss = twohot_loss(logits, torch.tensor(targets, dtype=torch.float32), bins)
    np.testing.assert_allclose(loss.numpy(), expected, rtol=1e-4)


@pytest.mark.parametrize("target", [0.0, 0.4, -12.0, 300.0])
def test_twohot_loss_is_least_where_the_mean_is_the_target(target: float) -> None:
    bins = twohot_bins(255)
    best = torch.tensor(np.log(twohot(target, bins.double().numpy()) + 1e-30), dtype=torch.float32)
    logits = best.clone().requires_grad_()
    loss = twohot_loss(logits, torch.tensor(target), bins)
    (gradient,) = torch.autograd.grad(loss, logits)
    assert gradient.abs().max() < 1e-5
    assert twohot_mean(best, bins).item() == pytest.approx(target, rel=1e-4, abs=1e-6)
    others = best + torch.randn(20, 255)
    assert (twohot_loss(others, torch.full((20,), target), bins) >= loss - 1e-6).all()


def test_unimix_log_probs() -> None:
    logits = torch.randn(3, 4, 5) * 20
    expected = np.log(0.99 * softmax(logits.double().numpy()) + 0.01 / 5)
    np.testing.assert_allclose(unimix_log_probs(logits, 0.01).numpy(), expected, rtol=1e-5, atol=1e-6)
    assert unimix_log_probs(logits.bfloat16(), 0.01).dtype == torch.float32
    assert unimix_log_probs(logits.double(), 0.01).dtype == torch.float64


def test_kl_and_entropy_sum_over_groups() -> None:
    logits = torch.randn(2, 3, 6, 5, dtype=torch.float64)
    other = torch.randn(2, 3, 6, 5, dtype=torch.float64)
    p, q = (0.9 * softmax(x.numpy()) + 0.1 / 5 for x in (logits, other))
    log_p, log_q = unimix_log_probs(logits, 0.1), unimix_log_probs(other, 0.1)
    kl, bits = np.zeros((2, 3)), np.zeros((2, 3))
    for group in range(6):
        for k in range(5):
            kl += p[..., group, k] * np.log(p[..., group, k] / q[..., group, k])
            bits -= p[..., group, k] * np.log(p[..., group, k])
    np.testing.assert_allclose(kl_divergence(log_p, log_q).numpy(), kl, rtol=1e-10)
    np.testing.assert_allclose(entropy(log_p).numpy(), bits, rtol=1e-10)


def test_categorical_sample_frequencies() -> None:
    probs = torch.tensor([0.1, 0.0, 0.55, 0.3, 0.05])
    uniform = (torch.arange(10_000) + 0.5) / 10_000  # every number once: frequencies without chance
    samples = categorical_sample(probs.expand(10_000, 5), uniform)
    assert torch.equal(samples.sum(-1), torch.ones(10_000))
    torch.testing.assert_close(samples.mean(0), probs, atol=2e-4, rtol=0)


def test_edge_noise_never_samples_the_impossible() -> None:
    probs = torch.tensor([[0.0, 0.5, 0.5, 0.0], [0.0, 0.0, 1.0, 0.0]])
    lowest = categorical_sample(probs, torch.zeros(2))
    highest = categorical_sample(probs, torch.full((2,), JUST_BELOW_ONE))
    assert lowest.argmax(-1).tolist() == [1, 2]
    assert highest.argmax(-1).tolist() == [2, 2]


def test_edge_noise_survives_rounding_of_the_cumulative_sum() -> None:
    probs = torch.rand(2000, 64).softmax(-1)
    probs[:, -8:] = 0
    probs = probs / probs.sum(-1, keepdim=True)
    highest = categorical_sample(probs, torch.full((2000,), JUST_BELOW_ONE))
    assert torch.equal(highest.sum(-1), torch.ones(2000))
    assert ((highest * probs).sum(-1) > 0).all()


def test_straight_through_has_the_sample_as_value_and_the_gradient_of_probs() -> None:
    logits = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(3, 5, dtype=torch.float64)
    probs = logits.softmax(-1)
    sample = categorical_sample(probs, torch.rand(3, dtype=torch.float64))
    value = straight_through(sample, probs)
    assert torch.equal(value, sample)
    (gradient,) = torch.autograd.grad((value * weight).sum(), logits)
    p, w = probs.detach().numpy(), weight.numpy()
    np.testing.assert_allclose(gradient.numpy(), p * (w - (p * w).sum(-1, keepdims=True)), rtol=1e-10)


def test_normal_policy() -> None:
    raw_mean, raw_std = torch.randn(4, 3) * 2, torch.randn(4, 3) * 3
    policy = NormalPolicy.from_output(raw_mean, raw_std)
    mean = np.tanh(raw_mean.double().numpy())
    std = 0.9 / (1 + np.exp(-(raw_std.double().numpy() + 2))) + 0.1
    noise = torch.randn(4, 3)
    action = policy.sample(noise)
    np.testing.assert_allclose(action.numpy(), mean + std * noise.numpy(), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(policy.mode().numpy(), mean, rtol=1e-5, atol=1e-6)

    a = action.double().numpy()
    density = np.exp(-((a - mean) ** 2) / (2 * std**2)) / np.sqrt(2 * np.pi * std**2)
    np.testing.assert_allclose(policy.log_prob(action).numpy(), np.log(density.prod(-1)), rtol=1e-4, atol=1e-5)

    grid = np.linspace(-12, 12, 200_001)  # the entropy as the integral that defines it
    spread = np.exp(-(grid**2) / (2 * std[..., None] ** 2)) / np.sqrt(2 * np.pi * std[..., None] ** 2)
    integral = -(spread * np.log(np.maximum(spread, 1e-300))).sum(-1) * (grid[1] - grid[0])
    np.testing.assert_allclose(policy.entropy().numpy(), integral.sum(-1), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("sizes", [(4,), (2, 5, 3)])
def test_categorical_policy(sizes: tuple[int, ...]) -> None:
    logits = torch.randn(6, sum(sizes)) * 2
    policy = CategoricalPolicy.from_output(logits, sizes)
    edges = np.cumsum((0, *sizes))
    parts = [softmax(logits.double().numpy()[:, a:b]) for a, b in pairwise(edges)]
    uniform = torch.rand(6, len(sizes))
    action = policy.sample(uniform)
    assert action.shape == (6, sum(sizes))
    log_prob, bits = np.zeros(6), np.zeros(6)
    for component, (start, p) in enumerate(zip(edges, parts, strict=False)):
        hot = action[:, start : start + p.shape[1]].numpy()
        assert (hot.sum(-1) == 1).all()
        for row in range(6):
            chosen = int(np.searchsorted(p[row].cumsum(), uniform[row, component].item(), side="right"))
            assert hot[row, chosen] == 1
            log_prob[row] += np.log(p[row, chosen])
            bits[row] -= (p[row] * np.log(p[row])).sum()
        best = policy.mode()[:, start : start + p.shape[1]].numpy()
        assert (best.argmax(-1) == p.argmax(-1)).all()
        assert (best.sum(-1) == 1).all()
    np.testing.assert_allclose(policy.log_prob(action).numpy(), log_prob, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(policy.entropy().numpy(), bits, rtol=1e-4, atol=1e-5)


def test_hybrid_policy_adds_what_its_parts_say() -> None:
    raw_mean, raw_std, logits = torch.randn(6, 2), torch.randn(6, 2), torch.randn(6, 3 + 4)
    reals = NormalPolicy.from_output(raw_mean, raw_std)
    policy = HybridPolicy(reals, CategoricalPolicy.from_output(logits, (3, 4)))
    normal, uniform = torch.randn(6, 2), torch.rand(6, 2)
    action = policy.sample(torch.cat([normal, uniform], -1))
    assert action.shape == (6, 2 + 3 + 4) and policy.mode().shape == action.shape

    mean = np.tanh(raw_mean.double().numpy())
    std = 0.9 / (1 + np.exp(-(raw_std.double().numpy() + 2))) + 0.1
    np.testing.assert_allclose(action[:, :2].numpy(), mean + std * normal.numpy(), rtol=1e-5, atol=1e-6)
    one, other = (softmax(logits.double().numpy()[:, part]) for part in (slice(0, 3), slice(3, 7)))
    z = (action[:, :2].double().numpy() - mean) / std
    log_prob = (-0.5 * z**2 - np.log(std * np.sqrt(2 * np.pi))).sum(-1)
    nats = 0.5 * np.log(2 * np.pi * np.e * std**2).sum(-1)
    for row in range(6):
        choices = [int((p[row].cumsum() <= u).sum()) for p, u in zip((one, other), uniform[row].tolist(), strict=True)]
        assert action[row, 2:5].argmax() == choices[0] and action[row, 5:].argmax() == choices[1]
        log_prob[row] += np.log(one[row, choices[0]] * other[row, choices[1]])
        nats[row] -= (one[row] * np.log(one[row])).sum() + (other[row] * np.log(other[row])).sum()
    np.testing.assert_allclose(policy.log_prob(action).numpy(), log_prob, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(policy.entropy().numpy(), nats, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(policy.mode()[:, :2].numpy(), mean, rtol=1e-5, atol=1e-6)
    assert (policy.mode()[:, 2:5].argmax(-1).numpy() == one.argmax(-1)).all()
