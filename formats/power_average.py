"""Averages of weights by a power function, and any length of them out of snapshots of a few.

Karras et al., Analyzing and Improving the Training Dynamics of Diffusion Models (EDM2, arXiv 2312.02696), section 3.1
and appendix C. At time t the average weighs the weights of time τ ≤ t by its profile (γ + 1)·τ^γ / t^(γ+1); its
relative length is the profile's standard deviation over t.
"""

import numpy as np

LARGEST_LENGTH = 12**-0.5  # of γ = 0, the plain mean over all of the training


def gamma_of(length: float) -> float:
    """The exponent γ of a relative length: the largest root of (γ + 2)²·(γ + 3) = (γ + 1) / length²."""
    inverse = length**-2
    return float(np.roots([1.0, 7.0, 16.0 - inverse, 12.0 - inverse]).real.max())


def decay_at(step: int, gamma: float) -> float:
    """β(t) = (1 − 1/t)^(γ+1), the weight of the old average in step t, counted from 1."""
    return (1 - 1 / step) ** (gamma + 1)


def half_life(step: int, gamma: float) -> float:
    """Steps before step t within which half of a profile's weight lies."""
    return step * (1 - 0.5 ** (1 / (gamma + 1)))


def combination(steps: np.ndarray, gammas: np.ndarray, step: int, gamma: float) -> tuple[np.ndarray, float]:
    """How averages add up to another one: least squares over profiles, among the sums that keep a constant as it is.

    Args:
        steps: of n averages, ``[n]``, none after ``step``.
        gammas: their exponents, ``[n]``; no two averages are equal in both.
        step: of the average that is wanted.
        gamma: its exponent.

    Returns:
        float64 ``[n]`` with sum 1, and how far the sum of profiles is from the one that is wanted, as a share of the
        latter's norm.
    """
    times, exponents = np.asarray(steps, np.float64) / step, np.asarray(gammas, np.float64)
    products = _inner_products(times[:, None], exponents[:, None], times, exponents)
    wanted = _inner_products(times, exponents, 1.0, gamma)
    norm = _inner_products(1.0, gamma, 1.0, gamma)
    scale = np.sqrt(np.diagonal(products))  # profiles of norm 1 make a better conditioned system
    system = np.block([[products / np.outer(scale, scale), 1 / scale[:, None]], [1 / scale, 0.0]])
    weights = np.linalg.lstsq(system, np.append(wanted / scale, 1.0), rcond=None)[0][:-1] / scale
    missed = norm - 2 * weights @ wanted + weights @ products @ weights
    return weights, float(np.sqrt(max(missed, 0.0) / norm))


def _inner_products(times_a, gammas_a, times_b, gammas_b) -> np.ndarray:
    """∫ p_a(τ)·p_b(τ) dτ of two profiles, broadcast over both."""
    times_a, gammas_a, times_b, gammas_b = np.broadcast_arrays(times_a, gammas_a, times_b, gammas_b)
    earlier, later = np.minimum(times_a, times_b), np.maximum(times_a, times_b)
    exponent = np.where(times_a > times_b, gammas_a, gammas_b)
    factor = (gammas_a + 1) * (gammas_b + 1) / (gammas_a + gammas_b + 1)
    return factor * (earlier / later) ** exponent / later
