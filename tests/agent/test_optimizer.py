"""LaProp against its formulas in NumPy fp64."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

from agent.optimizer import LaProp
from agent.schema import Optimizer

SHAPES = [(6, 4), (5,), (3, 2), ()]


def settings(**changes: float) -> Optimizer:
    values = {"lr": 1e-2, "agc": 0.3, "beta1": 0.9, "beta2": 0.99, "eps": 1e-20, "warmup": 0} | changes
    return Optimizer(behavior_lr=None, **values)


def problem(steps: int) -> tuple[list[np.ndarray], list[list[np.ndarray]]]:
    """Weights, one of them zero, and gradients, some far above and some far below the clipping limit."""
    random = np.random.default_rng(0)
    weights = [random.normal(size=shape) for shape in SHAPES]
    weights[2] = np.zeros(SHAPES[2])
    sizes = [30.0, 1e-3, 1.0, 0.1]
    gradients = [
        [size * (1 + t) * random.normal(size=shape) for shape, size in zip(SHAPES, sizes, strict=True)]
        for t in range(steps)
    ]
    return weights, gradients


def reference(
    weights: list[np.ndarray],
    gradients: list[list[np.ndarray]],
    c: Optimizer,
    order: str = "clip rms average",
) -> list[np.ndarray]:
    """The weights after all steps, the three parts of a step in any order."""
    results = []
    for k, start in enumerate(weights):
        w = start.copy()
        v, m = np.zeros_like(w), np.zeros_like(w)
        for t, step in enumerate(gradients, start=1):
            g = step[k]
            for part in order.split():
                if part == "clip":
                    limit = c.agc * max(1e-3, np.sqrt((w**2).sum()))
                    g = g * min(1, limit / np.sqrt((g**2).sum()))
                elif part == "rms":
                    v = c.beta2 * v + (1 - c.beta2) * g**2
                    g = g / (np.sqrt(v / (1 - c.beta2**t)) + c.eps)
                else:
                    m = c.beta1 * m + (1 - c.beta1) * g
                    g = m / (1 - c.beta1**t)
            rate = c.lr * min(1, (t - 1) / c.warmup) if c.warmup else c.lr
            w = w - rate * g
        results.append(w)
    return results


def parameters(weights: list[np.ndarray]) -> list[nn.Parameter]:
    return [nn.Parameter(torch.tensor(weight, dtype=torch.float32)) for weight in weights]


def tensors(gradients: list[np.ndarray]) -> list[torch.Tensor]:
    return [torch.tensor(gradient, dtype=torch.float32) for gradient in gradients]


def distance(ours: list[nn.Parameter], theirs: list[np.ndarray]) -> float:
    return max(np.abs(a.detach().numpy() - b).max() for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("warmup", [0, 3, 1000])
def test_steps_follow_the_formulas(warmup: int) -> None:
    weights, gradients = problem(5)
    config = settings(warmup=warmup)
    ours = parameters(weights)
    optimizer = LaProp(ours, config)
    for step in gradients:
        optimizer.step(tensors(step))
    expected = reference(weights, gradients, config)
    assert distance(ours, expected) < 2e-6
    assert max(np.abs(a - b).max() for a, b in zip(expected, weights, strict=True)) > 5e-5


@pytest.mark.parametrize(
    "order", ["rms clip average", "clip average rms", "average rms clip", "rms average", "clip rms"]
)
def test_the_order_of_clipping_scaling_and_averaging_matters(order: str) -> None:
    weights, gradients = problem(5)
    ours = parameters(weights)
    optimizer = LaProp(ours, settings())
    for step in gradients:
        optimizer.step(tensors(step))
    assert distance(ours, reference(weights, gradients, settings(), order)) > 1e-3


def test_warm_up_starts_at_zero_and_ends_at_lr() -> None:
    weights, gradients = problem(8)
    ours = parameters(weights)
    optimizer = LaProp(ours, settings(warmup=4))
    rates = []
    for t, step in enumerate(gradients):
        rates.append(optimizer.step(tensors(step))["learning_rate"].item())
        if t == 0:
            assert distance(ours, weights) < 1e-7
    np.testing.assert_allclose(rates, 1e-2 * np.array([0, 0.25, 0.5, 0.75, 1, 1, 1, 1]), rtol=1e-6)


def test_a_share_scales_the_step_of_its_own_parameter_alone() -> None:
    weights, gradients = problem(1)
    shares = [1.0, 0.25, *[2.0] * (len(weights) - 2)]
    whole, shared = parameters(weights), parameters(weights)
    LaProp(whole, settings()).step(tensors(gradients[0]))
    LaProp(shared, settings(), shares).step(tensors(gradients[0]))
    for share, start, a, b in zip(shares, weights, whole, shared, strict=True):
        moved = a.detach().numpy() - start
        assert np.abs(moved).max() > 1e-3
        np.testing.assert_allclose(b.detach().numpy() - start, share * moved, atol=1e-6)


def test_reported_norms_are_those_before_the_step() -> None:
    weights, gradients = problem(1)
    found = LaProp(parameters(weights), settings()).step(tensors(gradients[0]))
    for name, arrays in (("gradient_norm", gradients[0]), ("weight_norm", weights)):
        expected = np.sqrt(sum((array**2).sum() for array in arrays))
        assert found[name].item() == pytest.approx(expected, rel=1e-5)


def test_weights_of_norm_zero_move() -> None:
    weight = nn.Parameter(torch.zeros(3, 2))
    optimizer = LaProp([weight], settings())
    optimizer.step([torch.ones(3, 2)])
    torch.testing.assert_close(weight.detach(), torch.full((3, 2), -1e-2))


def test_gradients_of_zero_leave_the_weights_alone_and_finite() -> None:
    weight = nn.Parameter(torch.randn(3, 2))
    before = weight.detach().clone()
    LaProp([weight], settings()).step([torch.zeros(3, 2)])
    assert torch.equal(weight.detach(), before)


def test_a_saved_state_goes_on_identically() -> None:
    weights, gradients = problem(6)
    ours = parameters(weights)
    optimizer = LaProp(ours, settings(warmup=4))
    for step in gradients[:3]:
        optimizer.step(tensors(step))
    resumed = [nn.Parameter(parameter.detach().clone()) for parameter in ours]
    other = LaProp(resumed, settings(warmup=4))
    places = [tensor.data_ptr() for tensor in (other.count, *other.square, *other.momentum)]
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert [tensor.data_ptr() for tensor in (other.count, *other.square, *other.momentum)] == places
    for step in gradients[3:]:
        optimizer.step(tensors(step))
        other.step(tensors(step))
    assert all(torch.equal(a, b) for a, b in zip(ours, resumed, strict=True))


def test_an_unwanted_step_changes_nothing_whatever_its_gradients_are() -> None:
    weights, gradients = problem(3)
    for first in (True, False):
        one, other = (LaProp(parameters(weights), settings(warmup=5)) for _ in range(2))
        for number, step in enumerate(gradients):
            if (number == 0 and first) or (number == 2 and not first):
                before = copy.deepcopy((one.parameters, one.state_dict()))
                poisoned = [gradient.fill_(torch.nan) for gradient in tensors(step)]
                one.step(poisoned, torch.tensor(False))
                for mine, old in zip(one.parameters, before[0], strict=True):
                    assert mine.numpy().tobytes() == old.numpy().tobytes()
                assert one.state_dict()["count"] == before[1]["count"]
                for name in ("square", "momentum"):
                    for mine, old in zip(getattr(one, name), before[1][name], strict=True):
                        assert mine.numpy().tobytes() == old.numpy().tobytes()
            one.step(tensors(step), torch.tensor(True))
            other.step(tensors(step))
        for mine, theirs in zip(one.parameters, other.parameters, strict=True):
            assert torch.equal(mine, theirs)
