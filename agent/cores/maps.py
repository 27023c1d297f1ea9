"""Scalar maps that a read applies to the singular values of a memory, and their fit by odd polynomials.

A map is a chain of odd polynomials s -> a s + b s^3 + c s^5, applied to singular values in [0, 1] (a matrix divided by
its Frobenius norm has no others). On a matrix every step is a few products, X -> X (a I + b X'X + c (X'X)^2).

Sources: cubic Newton-Schulz is Bjorck and Bowie (1971); the quintics PE2 and PE3 equi-oscillate about 1 on [0.1, 1]
and [0.05, 1], as in Amsel et al., "The Polar Express" (2025).
"""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Map = tuple[tuple[float, float, float], ...]
"""The coefficients (a, b, c) of each step."""

CUBIC = (1.5, -0.5, 0.0)
PE2: Map = ((5.6037, -13.8837, 9.7334), (2.1306, -1.5116, 0.4020))
PE3: Map = ((6.7524, -18.3510, 13.2633), (2.5379, -1.8747, 0.4413), (1.9270, -1.3066, 0.3807))
POLAR_STEPS = 40  # of the cubic: what is above 1e-6 of the Frobenius norm becomes 1

MAPS = ("cubic", "pe2", "pe3", "polar")
GRID = 20_000  # points on which errors of a fit are looked for
EXCHANGES = 50


def make_map(name: str, steps: int) -> Map:
    """The map called `name`, one of MAPS; `steps` is for the cubic alone.

    `polar` sends every singular value to 1. It is a reference: gradients through it are as large as the smallest
    singular value is small.

    Raises:
        KeyError: no map has that name.
    """
    return {"cubic": (CUBIC,) * steps, "pe2": PE2, "pe3": PE3, "polar": (CUBIC,) * POLAR_STEPS}[name]


def on_scalars(chain: Map, s: NDArray[np.float64]) -> NDArray[np.float64]:
    """Where singular values s (...) in [0, 1] go."""
    for a, b, c in chain:
        square = s * s
        s = s * (a + square * (b + square * c))
    return s


def on_matrices(chain: Map, matrix: Tensor) -> Tensor:
    """The map on the singular values of matrices (..., K, V), each of spectral norm at most 1."""
    identity = torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
    for a, b, c in chain:
        gram = matrix.mT @ matrix
        matrix = matrix @ (a * identity + (b * gram + c * (gram @ gram) if c else b * gram))
    return matrix


def chebyshev_fit(chain: Map, degree: int) -> NDArray[np.float64]:
    """The odd polynomial of odd `degree` = 2 m + 1 that is nearest to a map on [0, 1] in the largest error (Remez).

    Returns:
        c (m + 1) of the form sum_j c_j s T_j(2 s^2 - 1) with T_j the Chebyshev polynomials.

    Raises:
        ValueError: the degree is even or not positive.
    """
    if degree < 1 or degree % 2 == 0:
        raise ValueError(f"degree ({degree}) must be odd and positive")
    terms = (degree + 1) // 2
    grid = np.sin(np.linspace(0, np.pi / 2, GRID + 1))[1:]  # dense near 1, and (as s is a factor) dense enough near 0
    # The extrema of a Chebyshev polynomial of degree 2 (m + 1) + 1 in (0, 1], from small to large.
    points = np.cos(np.pi * np.arange(terms, -1, -1) / (2 * terms + 1))
    for _ in range(EXCHANGES):
        signs = (-1.0) ** np.arange(terms + 1)
        system = np.concatenate([_basis(points, terms), signs[:, None]], 1)
        *coefficients, level = np.linalg.solve(system, on_scalars(chain, points))
        error = on_scalars(chain, grid) - _basis(grid, terms) @ coefficients
        largest = np.abs(error).max()
        if largest <= max(abs(level) * (1 + 1e-6), 1e-8):
            return np.asarray(coefficients)
        points = _alternating_extrema(grid, error, terms + 1)
    raise RuntimeError(f"the exchange for a polynomial of degree {degree} did not converge")


def evaluate(coefficients: NDArray[np.float64], s: NDArray[np.float64]) -> NDArray[np.float64]:
    """The polynomial sum_j c_j s T_j(2 s^2 - 1) at s (N,)."""
    return _basis(s, len(coefficients)) @ coefficients


def _basis(s: NDArray[np.float64], terms: int) -> NDArray[np.float64]:
    """The columns s T_j(2 s^2 - 1), (N, terms)."""
    return s[:, None] * np.polynomial.chebyshev.chebvander(2 * s * s - 1, terms - 1)


def _alternating_extrema(grid: NDArray[np.float64], error: NDArray[np.float64], amount: int) -> NDArray[np.float64]:
    """Points where the error is largest between two changes of its sign; of too many, the run with larger errors."""
    ends = np.flatnonzero(np.diff(np.sign(error))) + 1
    runs = np.split(np.arange(len(grid)), ends)
    peaks = np.array([run[np.abs(error[run]).argmax()] for run in runs])
    while len(peaks) > amount:
        peaks = peaks[1:] if abs(error[peaks[0]]) < abs(error[peaks[-1]]) else peaks[:-1]
    return grid[peaks]
