"""Fréchet distances and the moments they need, against closed forms and other routes to the same number."""

import numpy as np
import pytest
import scipy.linalg
import torch

from metrics.frechet import Gaussian, Moments, frechet_distance

GENERATOR = np.random.default_rng(0)
ROTATION = np.linalg.qr(GENERATOR.normal(size=(24, 24)))[0]


def gaussian_of(features: np.ndarray) -> Gaussian:
    """By numpy, for features ``[N, D]``."""
    return Gaussian(features.mean(0), np.cov(features, rowvar=False))


def rotated(mean: np.ndarray, variances: np.ndarray) -> Gaussian:
    return Gaussian(ROTATION @ mean, ROTATION @ np.diag(variances) @ ROTATION.T)


def test_equal_gaussians_are_at_distance_0():
    for count in (10, 500):  # fewer samples than dimensions, and more
        a = gaussian_of(GENERATOR.normal(3, 2, (count, 24)))
        assert frechet_distance(a, a) <= 1e-12 * np.trace(a.cov)


def test_shifted_means():
    """The squared distance of the means, whatever the covariance."""
    shift = GENERATOR.normal(size=24)
    for count in (10, 500):
        a = gaussian_of(GENERATOR.normal(size=(count, 24)))
        assert frechet_distance(a, Gaussian(a.mean + shift, a.cov)) == pytest.approx(shift @ shift, rel=1e-6)


def test_diagonal_covariances():
    """Sum of (√a − √b)², in the axes and in any other common basis, with variances over ten orders of magnitude."""
    a, b = (10.0 ** GENERATOR.uniform(-8, 2, 24) for _ in range(2))
    means = GENERATOR.normal(size=(2, 24))
    expected = ((means[0] - means[1]) ** 2).sum() + ((np.sqrt(a) - np.sqrt(b)) ** 2).sum()
    plain = [Gaussian(mean, np.diag(values)) for mean, values in zip(means, (a, b), strict=True)]
    turned = [rotated(mean, values) for mean, values in zip(means, (a, b), strict=True)]
    assert frechet_distance(*plain) == pytest.approx(expected, rel=1e-6)
    assert frechet_distance(*turned) == pytest.approx(expected, rel=1e-6)


def test_covariances_of_full_rank_against_the_matrix_square_root():
    a, b = (gaussian_of(GENERATOR.normal(size=(200, 24)) @ GENERATOR.normal(size=(24, 24))) for _ in range(2))
    root = scipy.linalg.sqrtm(a.cov @ b.cov).real
    expected = ((a.mean - b.mean) ** 2).sum() + np.trace(a.cov + b.cov - 2 * root)
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-6)


def test_fewer_samples_than_dimensions():
    """The overlap is then the nuclear norm of the products of all pairs of centred vectors; no covariance needed."""
    x, y = GENERATOR.normal(size=(9, 300)), GENERATOR.normal(0.2, 1.3, (13, 300))
    centred = [(z - z.mean(0)) / np.sqrt(len(z) - 1) for z in (x, y)]
    overlap = np.linalg.svd(centred[0] @ centred[1].T, compute_uv=False).sum()
    squares = sum((z**2).sum() for z in centred)
    expected = ((x.mean(0) - y.mean(0)) ** 2).sum() + squares - 2 * overlap
    assert frechet_distance(gaussian_of(x), gaussian_of(y)) == pytest.approx(expected, rel=1e-6)


def test_supports_that_do_not_meet():
    """Variances in different dimensions have no overlap: the traces add up."""
    a, b = (np.zeros(24) for _ in range(2))
    a[:5], b[5:9] = 3.0, 7.0
    assert frechet_distance(rotated(a * 0, a), rotated(b * 0, b)) == pytest.approx(15 + 28, rel=1e-6)
    assert frechet_distance(rotated(a * 0, a), rotated(b * 0, b * 0)) == pytest.approx(15, rel=1e-6)


@pytest.mark.parametrize("count", [7, 200])
def test_one_set_inside_another(count):
    """A set and the same set twice over: covariances differ by a factor r, the distance is tr C·(1 − √r)²."""
    x = GENERATOR.normal(size=(count, 24))
    a, b = gaussian_of(x), gaussian_of(np.concatenate([x, x]))
    ratio = 2 * (count - 1) / (2 * count - 1)
    assert frechet_distance(a, b) == pytest.approx(np.trace(a.cov) * (1 - np.sqrt(ratio)) ** 2, rel=1e-6)


def test_another_number_of_dimensions_is_refused():
    with pytest.raises(ValueError, match="24 and 8 dimensions"):
        frechet_distance(Gaussian(np.zeros(24), np.eye(24)), Gaussian(np.zeros(8), np.eye(8)))


@pytest.mark.parametrize("batch", [1, 7, 64, 5000])
def test_streamed_moments(batch):
    """Those of numpy in one piece, for any batch, in float32 features as far from 0 as 10⁴ of their deviations."""
    features = GENERATOR.normal(100, 0.01, (5000, 6)).astype(np.float32)
    moments = Moments(6)
    for part in torch.from_numpy(features).split(batch):
        moments.update(part)
    expected = gaussian_of(features.astype(np.float64))
    found = moments.gaussian()
    np.testing.assert_allclose(found.mean, expected.mean, rtol=1e-12)
    np.testing.assert_allclose(found.cov, expected.cov, rtol=1e-6, atol=1e-12)


def test_moments_of_several_processes():
    """Shares of 0, 1 and many vectors merge to the whole."""
    features = GENERATOR.normal(5, 2, (300, 6))
    total = Moments(6)
    for part in np.split(features, [0, 1, 120]):
        share = Moments(6)
        if len(part):
            share.update(torch.from_numpy(part))
        share.flush()
        total.merge(len(part), share.mean, share.scatter)
    np.testing.assert_allclose(total.gaussian().cov, np.cov(features, rowvar=False), rtol=1e-9, atol=1e-12)
    with pytest.raises(ValueError, match="needs 2 vectors"):
        Moments(6).gaussian()
