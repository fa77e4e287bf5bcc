"""Gini coefficients, densities, components and mixtures against closed forms."""

import numpy as np
import pytest

from errors import UserError
from metrics.latent_space import (
    PrincipalComponents,
    densities,
    discrimination,
    gini_coefficient,
    interpolate,
    principal_colours,
    uniformity,
)


def test_gini_of_equal_of_two_and_of_exponential_values():
    assert gini_coefficient(np.full(17, 0.3)) == pytest.approx(0.0, abs=1e-15)
    assert gini_coefficient(np.array([3.0, 1.0])) == pytest.approx((3 - 1) / (2 * (3 + 1)), rel=1e-15)
    assert gini_coefficient(np.array([0.0, 0.0, 0.0, 5.0])) == pytest.approx(3 / 4, rel=1e-15)
    quantiles = -np.log1p(-(np.arange(20000) + 0.5) / 20000)  # of an exponential distribution: 1/2
    assert gini_coefficient(quantiles) == pytest.approx(0.5, abs=1e-4)
    values = np.random.default_rng(0).random(50)
    differences = np.abs(values[:, None] - values).mean() / (2 * values.mean())  # its definition
    assert gini_coefficient(values) == pytest.approx(differences, rel=1e-12)


def test_density_is_a_sum_of_gaussians_of_scott_s_bandwidth():
    points = np.random.default_rng(1).normal(size=(2000, 2)) @ np.array([[2.0, 0.5], [0.0, 0.3]])
    cov = np.cov(points.T) * len(points) ** (-2 / 6)  # n^(-1 / (d + 4)) times the standard deviation
    inverse, norm = np.linalg.inv(cov), 2 * np.pi * np.sqrt(np.linalg.det(cov))
    offsets = points[:7, None] - points
    expected = np.exp(-0.5 * np.einsum("qni,ij,qnj->qn", offsets, inverse, offsets)).mean(1) / norm
    np.testing.assert_allclose(densities(points)[:7], expected, rtol=1e-10)


@pytest.mark.parametrize("shape", [(200, 12), (12, 200)])
def test_components_are_those_of_the_singular_value_decomposition(shape):
    points = np.random.default_rng(2).normal(3.0, np.linspace(1, 4, shape[1]), shape)
    axes = PrincipalComponents(points, 5)
    _, values, vectors = np.linalg.svd(points - points.mean(0), full_matrices=False)
    np.testing.assert_allclose(axes.variances, values[:5] ** 2 / len(points), rtol=1e-10)
    np.testing.assert_allclose(np.abs(axes.directions.T @ vectors[:5].T), np.eye(5), atol=1e-8)
    np.testing.assert_allclose(axes.explained, (values[:5] ** 2).sum() / (values**2).sum(), rtol=1e-10)
    np.testing.assert_allclose(axes.project(points, whiten=True).var(0), 1.0, rtol=1e-9)


def test_a_flat_cloud_has_fewer_components():
    points = np.random.default_rng(3).normal(size=(50, 2)) @ np.random.default_rng(4).normal(size=(2, 30))
    assert len(PrincipalComponents(points, 5).variances) == 2
    with pytest.raises(UserError, match="collapsed"):
        uniformity(points[:, :1], seed=0)


def test_an_even_cloud_is_more_uniform_than_clusters_and_a_seed_repeats():
    generator = np.random.default_rng(5)
    even = generator.uniform(-1, 1, (150, 2))
    clusters = generator.normal(size=(150, 2)) * np.where(np.arange(150) % 2, 0.02, 1.0)[:, None]
    first, second = uniformity(even, 0), uniformity(clusters, 0, with_tsne=False)
    assert first["gini-pca"] < 0.2 < 0.3 < second["gini-pca"]
    assert first == uniformity(even, 0)
    assert first["gini-pca"] == gini_coefficient(densities(PrincipalComponents(even, 2).project(even)))
    assert set(second) == {"gini-pca"}
    assert 0 < first["gini"] < 0.3 and 0.95 < first["normalized-entropy"] < 1


def test_a_mixture_finds_planted_clusters_and_not_more_in_one_gaussian():
    generator = np.random.default_rng(6)
    labels = np.arange(600) % 3
    centres = 8 * np.eye(3, 20)
    points = centres[labels] + generator.normal(size=(600, 20))
    split = np.arange(600) < 400
    arguments = points[split], points[~split], labels[split], labels[~split]
    values = discrimination(*arguments, [3], seed=0)
    assert values["AMI-3"] == pytest.approx(1.0, abs=1e-12)
    assert values["gain-3"] == values["log-likelihood-3"] - values["log-likelihood-1"] > 0.05
    scaled = discrimination(100 * arguments[0] + 7, 100 * arguments[1] + 7, *arguments[2:], [3], seed=0)
    for name, value in values.items():
        assert scaled[name] == pytest.approx(value, rel=1e-6), name
    noise = generator.normal(size=(600, 4))
    single = discrimination(noise[:400], noise[400:], labels[:400], labels[400:], [3], seed=0)
    assert single["gain-3"] < 0.01 and abs(single["AMI-3"]) < 0.03
    # whitened: a standard normal has −(1 + log 2π)/2 nats a dimension
    assert single["log-likelihood-1"] == pytest.approx(-0.5 * (1 + np.log(2 * np.pi)), abs=0.06)


def test_bic_is_its_definition():
    points = np.random.default_rng(7).normal(size=(500, 3))
    values = discrimination(points, points, np.zeros(500), np.zeros(500), [2], seed=0)
    assert "AMI-2" not in values
    parameters = 2 * 3 + 2 * 3 + 1
    expected = -2 * values["log-likelihood-2"] + parameters * np.log(500) / (500 * 3)
    assert values["BIC-2"] == pytest.approx(expected, rel=1e-9)


def test_the_way_keeps_its_ends_and_its_length():
    generator = np.random.default_rng(8)
    start, end = generator.normal(size=(2, 4, 3, 3))
    way = interpolate(start, end, 5)
    np.testing.assert_allclose(way[0], start, atol=1e-12)
    np.testing.assert_allclose(way[-1], end, atol=1e-12)
    lengths = np.linalg.norm(way.reshape(5, -1), axis=1)
    np.testing.assert_allclose(lengths, np.linspace(lengths[0], lengths[-1], 5), rtol=1e-12)
    np.testing.assert_allclose(interpolate(start, start, 3), np.stack([start] * 3), atol=1e-12)
    np.testing.assert_allclose(interpolate(start, end, 3, spherical=False)[1], (start + end) / 2, rtol=1e-12)


def test_colours_show_the_leading_components():
    latents = np.zeros((2, 5, 4, 4))
    latents[0, 3] = np.arange(16).reshape(4, 4)  # the only variance
    colours, explained = principal_colours(latents)
    assert colours.shape == (2, 3, 4, 4) and colours.dtype == np.uint8
    assert explained == pytest.approx(1.0)
    assert np.all(np.diff(colours[0, 0].ravel().astype(int)) >= 0) and colours[0, 0].max() == 255
    assert not colours[1].any() and not colours[:, 1:].any()
