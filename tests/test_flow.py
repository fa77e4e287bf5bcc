"""The interpolant: its derivatives, its conversions against the exact Gaussian flow, and the times of training."""

import math

import pytest
import torch
from scipy import stats

from diffusion.flow import (
    PATH_TYPES,
    add_noise,
    data_and_noise,
    interpolant,
    interpolant_rate,
    score_from_velocity,
    settled_shift,
    shift_times,
    training_times,
    velocity,
)
from tests.gaussian_flow import gaussian_flow

PATHS = pytest.mark.parametrize("path_type", PATH_TYPES)
TIMES = (0.01, 0.3, 0.5, 0.9, 1.0)


@PATHS
def test_ends(path_type):
    alpha, sigma = interpolant(torch.tensor([0.0, 1.0]).double(), path_type)
    torch.testing.assert_close(alpha, torch.tensor([1.0, 0.0]).double(), atol=1e-15, rtol=0)
    torch.testing.assert_close(sigma, torch.tensor([0.0, 1.0]).double(), atol=1e-15, rtol=0)


def test_values():
    t = torch.tensor([0.25, 0.5]).double()
    assert [c.tolist() for c in interpolant(t, "linear")] == [[0.75, 0.5], [0.25, 0.5]]
    alpha, sigma = interpolant(t, "cosine")
    torch.testing.assert_close(alpha, torch.tensor([math.cos(math.pi / 8), math.sqrt(0.5)]).double())
    torch.testing.assert_close(alpha.square() + sigma.square(), torch.ones(2).double(), atol=1e-15, rtol=0)


@PATHS
def test_rates_are_the_derivatives(path_type):
    t = torch.linspace(0, 1, 11, dtype=torch.float64, requires_grad=True)
    for coefficient, rate in zip(interpolant(t, path_type), interpolant_rate(t, path_type), strict=True):
        (slope,) = torch.autograd.grad(coefficient.sum(), t)
        torch.testing.assert_close(rate, slope, atol=1e-14, rtol=0)
    step = 1e-5
    with torch.no_grad():
        ahead, behind = interpolant(t + step, path_type), interpolant(t - step, path_type)
        for a, b, rate in zip(ahead, behind, interpolant_rate(t, path_type), strict=True):
            torch.testing.assert_close((a - b) / (2 * step), rate, atol=1e-9, rtol=0)


@PATHS
def test_velocity_is_the_derivative_of_the_noisy_sample(path_type):
    generator = torch.Generator().manual_seed(0)
    x, noise = (torch.randn(5, 4, 3, 3, generator=generator).double() for _ in range(2))
    t = torch.linspace(0.05, 0.95, 5).double()
    derivative = torch.autograd.functional.jvp(lambda time: add_noise(x, time, noise, path_type), t, torch.ones(5))[1]
    torch.testing.assert_close(velocity(x, t, noise, path_type), derivative, atol=1e-12, rtol=0)


@PATHS
def test_data_and_noise_are_recovered(path_type):
    generator = torch.Generator().manual_seed(1)
    x, noise = (torch.randn(6, 4, 2, 2, generator=generator).double() for _ in range(2))
    t = torch.tensor([0.0, 0.1, 0.5, 0.7, 0.99, 1.0]).double()
    v, x_t = velocity(x, t, noise, path_type), add_noise(x, t, noise, path_type)
    found = data_and_noise(v, x_t, t, path_type)
    torch.testing.assert_close(found[0], x, atol=1e-10, rtol=0)
    torch.testing.assert_close(found[1], noise, atol=1e-10, rtol=0)


@PATHS
@pytest.mark.parametrize("diagonal", [True, False])
@pytest.mark.parametrize("time", TIMES)
def test_conversions_on_gaussian_data(path_type, diagonal, time):
    """Velocity, score, data and noise against the closed forms, to 1e-10."""
    flow = gaussian_flow(path_type, diagonal)
    x_t = 2 * torch.randn(20, 3, generator=torch.Generator().manual_seed(2)).double()
    t = torch.full((20,), time).double()
    v, score = flow.velocity(x_t, float(t[0])), flow.score(x_t, float(t[0]))
    assert (score_from_velocity(v, x_t, t, path_type) - score).abs().max() < 1e-10
    assert (score_from_velocity(v, x_t, t[:1], path_type) - score).abs().max() < 1e-10
    data, noise = data_and_noise(v, x_t, t, path_type)
    expected_data, expected_noise = flow.data_and_noise(x_t, float(t[0]))
    assert (data - expected_data).abs().max() < 1e-10
    assert (noise - expected_noise).abs().max() < 1e-10


@PATHS
def test_uniform_times(path_type):
    draws = torch.rand(1000)
    assert torch.equal(training_times(draws, "uniform", path_type), draws)


@PATHS
def test_lognormal_times(path_type):
    """The noise-to-data ratio σ_t/α_t of 100,000 times is log-normal: Kolmogorov–Smirnov p above 1e-3."""
    draws = torch.randn(100_000, generator=torch.Generator().manual_seed(3)).double()
    t = training_times(draws, "lognormal", path_type)
    assert 0 < t.min() < t.max() < 1
    alpha, sigma = interpolant(t, path_type)
    p = stats.kstest((sigma / alpha).log().numpy(), "norm").pvalue
    print(f"{path_type}: KS p {p:.3f}")
    assert p > 1e-3
    torch.testing.assert_close((sigma / alpha).log(), draws, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("path_type", ["linear", "cosine"])
@pytest.mark.parametrize("shift", [0.25, 1.5, 6.93])
def test_a_shift_multiplies_the_ratio_of_noise_to_data(path_type, shift):
    t = torch.linspace(0, 1, 101, dtype=torch.float64)
    shifted = shift_times(t, shift, path_type)
    assert shifted[0] == 0 and shifted[-1] == 1
    inner, before = shifted[1:-1].tolist(), t[1:-1].tolist()
    for there, here in zip(inner, before, strict=True):  # by angles and by hand, not by the interpolant
        ratio = math.tan(math.pi * here / 2) if path_type == "cosine" else here / (1 - here)
        now = math.tan(math.pi * there / 2) if path_type == "cosine" else there / (1 - there)
        assert now == pytest.approx(shift * ratio, rel=1e-12)
    torch.testing.assert_close(shift_times(shifted, 1 / shift, path_type), t, rtol=0, atol=1e-15)
    single = shift_times(t.float(), shift, path_type)
    assert single.max() <= 1 and torch.equal(single[[0, -1]], torch.tensor([0.0, 1.0]))


def test_the_shift_as_published():
    """t' = s·t / (1 + (s − 1)·t), and s = √(dims / 4096): f16d32 at 256 px has 8,192 numbers, f8d4 4,096."""
    t = torch.rand(1000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(shift_times(t, 3.0), 3 * t / (1 + 2 * t), rtol=1e-14, atol=0)
    assert settled_shift("auto", (32, 16, 16)) == pytest.approx(2**0.5)
    assert settled_shift("auto", (4, 32, 32)) == 1
    assert settled_shift(0.3, (4, 32, 32)) == 0.3
    assert shift_times(t, 1.0) is t  # what was drawn without a shift stays bit for bit


def test_a_shifted_lognormal_is_a_lognormal_around_the_shift():
    """The ratio of noise to data is exp n, so that of shifted times is s·exp n = exp(n + log s)."""
    normal = torch.randn(1000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for path_type in ("linear", "cosine"):
        moved = training_times(normal + math.log(2.5), "lognormal", path_type)
        torch.testing.assert_close(training_times(normal, "lognormal", path_type, 2.5), moved, rtol=1e-12, atol=0)


def test_unknown_names():
    with pytest.raises(ValueError, match="path type"):
        interpolant(torch.zeros(1), "quadratic")
    with pytest.raises(ValueError, match="weighting"):
        training_times(torch.zeros(1), "logit")
