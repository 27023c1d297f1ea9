"""Scalar maps and their fits, against other ways to compute them."""

import numpy as np
import pytest
import torch

from agent.cores.maps import MAPS, chebyshev_fit, evaluate, make_map, on_matrices, on_scalars

S = np.linspace(0, 1, 20_001)


def singular_values_mapped(matrix: torch.Tensor, name: str, steps: int) -> torch.Tensor:
    u, s, v = np.linalg.svd(matrix.numpy(), full_matrices=False)
    return torch.from_numpy(u @ np.diag(on_scalars(make_map(name, steps), s)) @ v)


def test_cubic_is_newton_schulz() -> None:
    s = S
    for _ in range(5):
        s = s * (3 - s**2) / 2
    np.testing.assert_allclose(on_scalars(make_map("cubic", 5), S), s, rtol=1e-13)


@pytest.mark.parametrize(
    ("name", "steps", "low", "tolerance"), [("pe2", 1, 0.1, 0.0631), ("pe3", 1, 0.05, 0.0071), ("polar", 1, 1e-5, 1e-9)]
)
def test_maps_come_near_one(name: str, steps: int, low: float, tolerance: float) -> None:
    values = on_scalars(make_map(name, steps), np.linspace(low, 1, 20_001))
    assert np.abs(values - 1).max() <= tolerance


@pytest.mark.parametrize("name", MAPS)
@pytest.mark.parametrize("shape", [(5, 5), (3, 6), (6, 3)])
def test_on_matrices_it_acts_on_singular_values(name: str, shape: tuple[int, int]) -> None:
    matrix = torch.randn(*shape, dtype=torch.float64)
    matrix /= matrix.norm()
    expected = singular_values_mapped(matrix, name, 3)
    torch.testing.assert_close(on_matrices(make_map(name, 3), matrix), expected, rtol=1e-9, atol=1e-9)
    both = torch.stack([matrix, 0.1 * matrix])
    torch.testing.assert_close(on_matrices(make_map(name, 3), both)[0], expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("degree", "bound"), [(17, 0.014), (21, 0.0044), (25, 0.0013)])
def test_fit_of_five_cubic_steps_is_within_the_stated_bound(degree: int, bound: float) -> None:
    cubic = make_map("cubic", 5)
    error = evaluate(chebyshev_fit(cubic, degree), S) - on_scalars(cubic, S)
    assert 0.8 * bound < np.abs(error).max() < bound


@pytest.mark.parametrize(
    ("name", "steps", "degree"), [("cubic", 5, 9), ("cubic", 5, 21), ("cubic", 8, 21), ("pe2", 1, 21)]
)
def test_fit_is_minimax(name: str, steps: int, degree: int) -> None:
    """By Chebyshev's theorem: the error is at its largest, with alternating signs, once more than there are terms."""
    chain, coefficients = make_map(name, steps), chebyshev_fit(make_map(name, steps), degree)
    error = evaluate(coefficients, S) - on_scalars(chain, S)
    extreme = np.abs(error) > 0.999 * np.abs(error).max()
    signs = np.sign(error[extreme])
    assert 1 + (np.diff(signs) != 0).sum() >= len(coefficients) + 1


def test_fit_has_the_known_coefficients() -> None:
    eight = [2.2645, -1.9967, 1.1894, -0.7464, 0.4695, -0.2893, 0.1711, -0.0946, 0.0461]
    ten = [2.2739, -2.0154, 1.2082, -0.7651, 0.4882, -0.3079, 0.1897, -0.1130, 0.0641, -0.0338, 0.0155]
    np.testing.assert_allclose(chebyshev_fit(make_map("cubic", 5), 17), eight, atol=2e-4)
    np.testing.assert_allclose(chebyshev_fit(make_map("cubic", 5), 21), ten, atol=2e-4)


def test_a_polynomial_is_fitted_exactly() -> None:
    pe2 = make_map("pe2", 1)
    for degree in (25, 31):
        np.testing.assert_allclose(evaluate(chebyshev_fit(pe2, degree), S), on_scalars(pe2, S), atol=1e-12)


def test_a_degree_far_beyond_what_is_needed_is_fitted_too() -> None:
    cubic = make_map("cubic", 5)
    np.testing.assert_allclose(evaluate(chebyshev_fit(cubic, 61), S), on_scalars(cubic, S), atol=1e-8)


def test_evaluate_is_the_chebyshev_series() -> None:
    coefficients = np.array([0.3, -1.2, 0.7])
    x = 2 * S**2 - 1
    series = coefficients[0] + coefficients[1] * x + coefficients[2] * (2 * x**2 - 1)
    np.testing.assert_allclose(evaluate(coefficients, S), S * series, atol=1e-14)


def test_what_cannot_be_fitted_is_an_error() -> None:
    for degree in (0, 8, -3):
        with pytest.raises(ValueError, match="odd and positive"):
            chebyshev_fit(make_map("cubic", 5), degree)
    with pytest.raises(KeyError):
        make_map("spherical", 5)
