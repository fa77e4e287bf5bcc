"""Measures of latents on latents whose answer is known, and against loops that follow the definitions."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.integrate import quad
from scipy.special import gammaln, ive

from diffusion.counted_noise import Purpose, counted_normal
from errors import UserError
from metrics.diffusability import encode_diffused, measure_diffusability, moved_shapes
from metrics.encoding import normalise
from metrics.equivariance import TRANSFORMS, unexplained_share
from metrics.latent_measures import (
    channel_correlation,
    channel_covariance,
    participation_ratio,
    spectral_slope,
    sphere_uniformity,
    two_nearest_dimension,
)
from metrics.probes import Latents
from metrics.spatial_structure import (
    correlation_decay,
    correlogram,
    far_distance,
    foreground_grid,
    grid_distances,
    local_against_distant,
    otsu_threshold,
    region_similarity,
)
from metrics.velocity_variance import TIMES, covariance_spectrum, gaussian_velocity_variance, velocity_variance
from models.latent_statistics import EPSILON, LatentStatistics
from models.tokenizers import Tokenizer
from models.tokenizers.kl import Posterior


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def low_pass(count: int = 200, channels: int = 6, side: int = 16, waves: int = 3) -> torch.Tensor:
    """White noise of which only the lowest ``waves``² coefficients of the DCT are left."""
    place = (torch.arange(side, dtype=torch.float64) + 0.5) * math.pi / side
    basis = torch.cos(torch.arange(waves, dtype=torch.float64)[:, None] * place)
    return torch.einsum("ncuv,ui,vj->ncij", normal(count, channels, waves, waves), basis, basis)


def permuted(latents: torch.Tensor, seed: int = 1) -> torch.Tensor:
    """The positions of each image in another order of its own."""
    count, _, height, width = latents.shape
    order = torch.rand(count, height * width, generator=torch.Generator().manual_seed(seed)).argsort(1)
    return latents.flatten(2).gather(2, order[:, None].expand(-1, latents.shape[1], -1)).view_as(latents)


# spatial structure


def test_the_scales_of_distances_are_the_published_ones_on_a_side_of_16():
    assert [far_distance(side, side) for side in (2, 4, 8, 16, 32)] == [2, 2, 3, 6, 12]
    distances = grid_distances(2, 3)
    assert distances.tolist()[0] == [0, 1, 2, 1, 2, 3] and torch.equal(distances, distances.T)


def test_structure_is_what_loops_over_pairs_find():
    latents, side = low_pass(5, 3, 8) + 0.3 * normal(5, 3, 8, 8, seed=2), 8
    near, far, by_distance = [], [], {}
    for image in latents.numpy():
        places = [(row, column) for row in range(side) for column in range(side)]
        for a in places:
            for b in places:
                u, v = (image[:, row, column] for row, column in (a, b))
                cosine = u @ v / np.sqrt((u @ u) * (v @ v))
                distance = abs(a[0] - b[0]) + abs(a[1] - b[1])
                by_distance.setdefault(distance, []).append(cosine)
                near += [cosine] if distance == 1 else []
                far += [cosine] if distance >= 3 else []
    cosines, pairs = correlogram(latents)
    expected = [np.mean(by_distance[distance]) for distance in range(15)]
    np.testing.assert_allclose(cosines, expected, rtol=0, atol=1e-12)
    assert [int(n) * 5 for n in pairs] == [len(by_distance[distance]) for distance in range(15)]
    assert local_against_distant(latents) == pytest.approx(np.mean(near) - np.mean(far), abs=1e-12)
    slope = np.polyfit([1, 2, 3, 4], expected[1:5], 1)[0]
    assert correlation_decay(latents) == pytest.approx(-slope, abs=1e-12)


def test_region_similarity_is_what_loops_over_pairs_find():
    side = 6
    latents = normal(7, 3, side, side, seed=3)
    foreground = torch.rand(7, side, side, generator=torch.Generator().manual_seed(4)) < 0.4
    foreground[5], foreground[6] = False, True  # nothing to compare with
    scores = []
    for image, mask in zip(latents.numpy(), foreground.numpy(), strict=True):
        unit = image / np.linalg.norm(image, axis=0)
        differences = []
        for a in np.argwhere(mask):
            inside = [b for b in np.argwhere(mask) if np.abs(a - b).sum() == 1]
            outside = [b for b in np.argwhere(~mask) if np.abs(a - b).sum() >= 3]
            if inside and outside:
                at = unit[:, a[0], a[1]]
                similar, other = ([at @ unit[:, row, column] for row, column in these] for these in (inside, outside))
                differences.append(np.mean(similar) - np.mean(other))
        scores += [np.mean(differences)] if differences else []
    assert len(scores) == 5
    assert region_similarity(latents, foreground) == pytest.approx(np.mean(scores), abs=1e-12)
    assert math.isnan(region_similarity(latents[5:], foreground[5:]))


def test_white_noise_has_no_structure_and_a_smooth_field_loses_it_with_its_order():
    white, smooth = normal(400, 8, 16, 16), low_pass()
    mask = torch.zeros(400, 16, 16, dtype=torch.bool)
    mask[:, 5:11, 5:11] = True
    assert abs(local_against_distant(white)) < 2e-3 and abs(correlation_decay(white)) < 1e-3
    assert abs(region_similarity(white, mask)) < 5e-3
    assert local_against_distant(smooth) > 0.5 and correlation_decay(smooth) > 0.05
    mixed = permuted(smooth)
    assert abs(local_against_distant(mixed)) < 0.01 and abs(correlation_decay(mixed)) < 2e-3
    assert abs(region_similarity(mixed, mask[:200])) < 0.02 < 0.5 < region_similarity(smooth, mask[:200])
    torch.testing.assert_close(channel_covariance(mixed), channel_covariance(smooth))  # the positions are the same


def test_a_region_s_own_code_has_structure_that_ends_at_its_border():
    mask = torch.zeros(3, 16, 16, dtype=torch.bool)
    mask[:, 2:6, 2:6] = True
    latents = torch.where(mask[:, None], 1.0, -1.0).expand(-1, 4, -1, -1)
    assert region_similarity(latents, mask) == pytest.approx(2.0, abs=1e-12)


def test_the_foreground_is_what_differs_from_the_border():
    images = torch.full((2, 3, 32, 32), 200, dtype=torch.uint8)
    images[0, 1, 9:14, 17:22] = 90
    images[1, :, 3, 3] = 10
    images[0, :, 0, 0] = 190  # a little noise
    grid = foreground_grid(images, 4, 4)
    expected = torch.zeros(2, 1, 4, 4)
    expected[0, 0, 1, 2] = expected[1, 0, 0, 0] = 1
    assert torch.equal(grid, expected)
    assert not foreground_grid(images[:, :, 20:28, :8], 1, 1).any()  # one colour has none


def test_otsu_s_threshold_is_the_best_of_all():
    levels = (np.random.default_rng(0).normal([60, 150], [20, 30], (500, 2)).clip(0, 255)).astype(np.int64)
    variances = []
    for threshold in range(255):
        low, high = levels[levels <= threshold], levels[levels > threshold]
        weight = len(low) / levels.size
        variances.append(weight * (1 - weight) * (low.mean() - high.mean()) ** 2 if len(low) and len(high) else 0)
    both = torch.from_numpy(np.stack([levels, levels[::-1] // 2]))
    assert otsu_threshold(both)[0] == int(np.argmax(variances))


# spectrum, channels, dimension


@pytest.mark.parametrize(("height", "width"), [(16, 16), (8, 12), (4, 4)])
def test_a_power_law_has_its_exponent_as_slope(height, width):
    u, v = np.arange(height)[:, None], np.arange(width)
    frequency = np.hypot(u / height, v / width)
    frequency[0, 0] = 1.0
    rows, columns = (
        np.sqrt(np.where(np.arange(n)[:, None] > 0, 2, 1) / n)
        * np.cos(np.pi * np.arange(n)[:, None] * (np.arange(n) + 0.5) / n)
        for n in (height, width)
    )
    signs = np.random.default_rng(0).choice([-1.0, 1.0], (9, 2, height, width))
    for exponent in (0.0, -1.0, -2.5):
        fields = np.einsum("ncuv,ui,vj->ncij", signs * frequency ** (exponent / 2), rows, columns)
        assert spectral_slope(torch.from_numpy(fields)) == pytest.approx(exponent, abs=1e-10)


def test_white_noise_is_flat_and_a_low_pass_field_steep():
    assert abs(spectral_slope(normal(400, 8, 16, 16))) < 0.02
    frequency = np.hypot(np.arange(16)[:, None], np.arange(16))[np.arange(256).reshape(16, 16) > 0] / 16
    passed = (np.add.outer(np.arange(16) // 3, np.arange(16) // 3) == 0).flatten()[1:]
    power = np.where(passed, 1.0, 1e-12 * passed.mean())  # the floor
    expected = np.polyfit(np.log(frequency), np.log(power), 1)[0]
    assert spectral_slope(low_pass()) == pytest.approx(expected, rel=0.01) and expected < -6
    assert math.isnan(spectral_slope(torch.ones(3, 2, 4, 4)))


def test_channels_correlate_as_they_were_mixed():
    mixing = torch.tensor([[1.0, 0, 0], [0.6, 0.8, 0], [0, 0, 2.0]], dtype=torch.float64)
    latents = torch.einsum("dc,nchw->ndhw", mixing, normal(500, 3, 8, 8)) + torch.tensor([5.0, 0, 1]).view(3, 1, 1)
    covariance = channel_covariance(latents)
    expected = np.cov(latents.permute(1, 0, 2, 3).flatten(1).numpy(), bias=True)
    np.testing.assert_allclose(covariance, expected, rtol=0, atol=1e-12)
    pairs = np.corrcoef(latents.permute(1, 0, 2, 3).flatten(1).numpy())[np.triu_indices(3, 1)]
    assert channel_correlation(covariance) == pytest.approx(np.abs(pairs).mean(), abs=1e-12)
    assert channel_correlation(covariance) == pytest.approx(0.6 / 3, abs=0.01)
    assert channel_correlation(channel_covariance(normal(500, 8, 8, 8))) < 0.01
    assert channel_correlation(torch.tensor([[1.0, 0.0], [0.0, 0.0]])) == 0


def test_participation_counts_the_directions_that_share_the_variance():
    assert participation_ratio(torch.linalg.eigvalsh(channel_covariance(normal(2000, 7, 4, 4)))) == pytest.approx(
        7, rel=1e-3
    )
    assert participation_ratio(torch.tensor([3.0, 3.0, 0.0])) == 2
    assert participation_ratio(torch.tensor([3.0, 1.0])) == pytest.approx(16 / 10)
    for shape in ((40, 12), (12, 40)):
        points = normal(*shape)
        covariance = np.cov(points.numpy().T, bias=True)
        expected = np.trace(covariance) ** 2 / np.square(covariance).sum()
        assert participation_ratio(covariance_spectrum(points)) == pytest.approx(expected, rel=1e-10)


def test_uniformity_is_its_definition_and_that_of_a_sphere():
    points = normal(30, 5)
    unit = points / points.norm(dim=1, keepdim=True)
    pairs = [math.exp(-2 * float((unit[i] - unit[j]).square().sum())) for i in range(30) for j in range(30) if i != j]
    assert sphere_uniformity(points) == pytest.approx(math.log(np.mean(pairs)), abs=1e-12)
    assert sphere_uniformity(torch.ones(9, 4)) == pytest.approx(0.0, abs=1e-12)
    channels, order = 16, 16 / 2 - 1  # the mean of exp(4·cos) over a sphere: a Bessel function
    log_mean = gammaln(channels / 2) - order * math.log(2) + math.log(ive(order, 4)) + 4
    assert sphere_uniformity(normal(4000, channels)) == pytest.approx(log_mean - 4, abs=0.01)


@pytest.mark.parametrize("dimension", [1, 2, 5])
def test_two_neighbours_tell_the_dimension_of_a_flat_sheet(dimension):
    plane = torch.rand(2500, dimension, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    turned = plane @ torch.linalg.qr(normal(20, 20))[0][:dimension] + 3
    assert two_nearest_dimension(turned) == pytest.approx(dimension, rel=0.1)
    few = turned[:60]
    logs = []
    for i in range(60):
        nearest = sorted(float((few[i] - few[j]).norm()) for j in range(60) if j != i)
        logs.append(math.log(nearest[1] / nearest[0]))
    assert two_nearest_dimension(few) == pytest.approx(59 / sum(logs), rel=1e-8)
    assert two_nearest_dimension(torch.cat([few, few[:1]])) == pytest.approx(58 / sum(logs[1:]), rel=0.1)


# the velocity


def test_a_gaussian_s_velocity_variance_is_the_integral_over_time():
    spectrum = [4.0, 1.0, 0.25, 0.0]
    integrals = [quad(lambda t, v=v: v / ((1 - t) ** 2 * v + t**2) if v else 0.0, 0, 1)[0] for v in spectrum]
    found = gaussian_velocity_variance(torch.tensor(spectrum, dtype=torch.float64), 4)
    assert found == pytest.approx(np.mean(integrals), rel=1e-9)
    white = covariance_spectrum(normal(20000, 6))
    assert gaussian_velocity_variance(white, 6) == pytest.approx(math.pi / 2, rel=0.01)


def test_no_predictor_beats_the_variance_of_a_gaussian():
    """In one direction, with many points, the kernel finds it too; the bound is within a few per cent of it."""
    for scale in (0.3, 1.0, 3.0):
        points = scale * normal(1500, 1)
        found = velocity_variance(points, torch.arange(1500), covariance_spectrum(points), 0)
        assert found == pytest.approx(math.pi / 2 * scale, rel=0.05)
    points = normal(800, 12)
    found = velocity_variance(points, torch.arange(800), covariance_spectrum(points), 0)
    assert found == pytest.approx(math.pi / 2, rel=0.03)


def test_the_variance_of_two_points_is_far_below_a_gaussian_s():
    """x = ±1 in each of d equal coordinates: given x_t, x is tanh of the log-odds. Integrated numerically."""
    d, t = 4, (np.arange(16) + 0.5) / 16
    noise, weights = np.polynomial.hermite_e.hermegauss(60)
    weights = weights / weights.sum()
    expected = 0.0
    for time in t:  # by symmetry x = 1; the sum of the d coordinates of x_t is all that counts
        total = d * (1 - time) + time * math.sqrt(d) * noise
        error = (1 - np.tanh((1 - time) * total / time**2)) ** 2
        variance = 1 / ((1 - time) ** 2 * d + time**2)  # of the linear predictor along (1, …, 1), over d coordinates
        expected += min((weights * error).sum() / time**2, variance) / 16
    points = normal(1500, 1).sign().expand(-1, d)
    spectrum = covariance_spectrum(points)
    found = velocity_variance(points, torch.arange(1500), spectrum, 0)
    assert found == pytest.approx(expected, rel=0.05)
    assert found < 0.7 * gaussian_velocity_variance(spectrum, d)


def test_the_kernel_is_the_mean_of_the_other_images():
    """One time of it by loops, where the linear predictor knows nothing useful (a spectrum far too large)."""
    points, items = normal(12, 3), torch.arange(5, 17)
    expected = 0.0
    for step in range(TIMES):
        t = (step + 0.5) / TIMES
        noisy = (1 - t) * points + t * counted_normal(7, items, step, (3,)).double()
        errors = []
        for i in range(12):
            others = [j for j in range(12) if j != i]
            logs = np.array([-float((noisy[i] - (1 - t) * points[j]).square().sum()) / (2 * t * t) for j in others])
            weights = np.exp(logs - logs.max())
            mean = sum(w * points[j] for w, j in zip(weights / weights.sum(), others, strict=True))
            errors.append(float((mean - points[i]).square().sum()) / 3)
        expected += np.mean(errors) / t**2 / TIMES
    useless = torch.full((30000,), 1e12, dtype=torch.float64)
    assert velocity_variance(points, items, useless, 7) == pytest.approx(expected, rel=1e-9)


# equivariance


def pooled(images: torch.Tensor) -> torch.Tensor:
    return F.avg_pool2d(images.double(), 4)


def smooth_images(count: int = 6) -> torch.Tensor:
    """Multiples of 4 in blocks of 2×2, so that halving needs no rounding."""
    small = torch.randint(0, 60, (count, 3, 16, 16), generator=torch.Generator().manual_seed(0)) * 4
    return small.repeat_interleave(2, 2).repeat_interleave(2, 3).to(torch.uint8)


def test_mean_pooling_is_exactly_equivariant():
    images = smooth_images()
    for name, transform in TRANSFORMS.items():
        expected, found = transform.of_latents(pooled(images), pooled(transform.of_images(images, 4)))
        assert unexplained_share(expected, found) < 1e-25, name


def test_a_code_of_a_fixed_place_is_not():
    weights = normal(3, 8, 8, seed=5)
    images = smooth_images()
    for name in ("flip", "rotation", "shift"):
        transform = TRANSFORMS[name]
        moved = pooled(transform.of_images(images, 4)) * weights
        assert unexplained_share(*transform.of_latents(pooled(images) * weights, moved)) > 0.5, name
    assert unexplained_share(*TRANSFORMS["flip"].of_latents(pooled(images), pooled(images))) > 0.5


def test_the_share_is_that_of_the_variance():
    found = normal(50, 2, 4, 4) * 2 + 7
    assert unexplained_share(found.mean((0, 2, 3), keepdim=True).expand_as(found), found) == pytest.approx(1.0)
    wrong = found + 0.5 * normal(50, 2, 4, 4, seed=1)
    variance = np.square(found.numpy() - found.numpy().mean((0, 2, 3), keepdims=True)).sum()
    expected = np.square((wrong - found).numpy()).sum() / variance
    assert unexplained_share(wrong, found) == pytest.approx(expected, rel=1e-12)
    assert math.isnan(unexplained_share(found, torch.ones_like(found)))


class MeanPooling(Tokenizer):
    """Means of 4×4 pixels and a standard deviation for each: exactly equivariant, and its samples are known."""

    downsampling = 4
    architecture = from_architecture = decode = encoder_last_layer = decoder_last_layer = None

    def __init__(self):
        super().__init__(latent_channels=3)

    def encode(self, images):
        mean = pooled(images).float()
        return Posterior(mean, torch.full_like(mean, 2 * math.log(5.0)))

    def stored_shape(self, resolution):
        return 6, resolution // 4, resolution // 4

    def sample(self, stored, noise):
        return stored[:, :3] + stored[:, 3:] * noise


def test_what_is_measured_are_posterior_samples_and_errors_of_means():
    """Through the same path as probe.py, with a tokenizer whose every answer is known."""
    images = smooth_images(12)
    tokenizer, statistics = MeanPooling(), LatentStatistics(3)
    statistics.load(torch.tensor([100.0, 110.0, 120.0]), torch.tensor([50.0, 40.0, 60.0]))
    items = np.arange(3, 15)
    data = SimpleNamespace(images=SimpleNamespace(resolution=32), items=items)
    latents = Latents(statistics.normalize(pooled(images)), data, torch.device("cpu"), seed=9)
    diffused = encode_diffused(latents, tokenizer, statistics, statistics, lambda function, shape: function(images))
    assert set(diffused.errors) == {"flip", "rotation", "shift", "scale"} and max(diffused.errors.values()) < 1e-10
    noise = counted_normal(9, torch.from_numpy(items), 0, (3, 8, 8), Purpose.POSTERIOR)
    expected = latents.values + 5.0 * noise / statistics.std[:, None, None]
    torch.testing.assert_close(diffused.samples, expected.float(), rtol=1e-5, atol=1e-5)
    assert diffused.foreground.shape == (12, 8, 8)
    outcome = measure_diffusability(latents, diffused, 10)
    assert outcome.values["LDS"] == local_against_distant(diffused.samples)
    chosen = [0, 1, 2, 4, 5, 6, 7, 9, 10, 11]  # ten of twelve, evenly spread
    spectrum = covariance_spectrum(diffused.samples[chosen].flatten(1))
    assert outcome.values["velocity-gaussian"] == gaussian_velocity_variance(spectrum, 192)
    assert outcome.settings == {"points": 10, "compared": 10, "dimensions": 192, "latent": "sample"}


def test_samples_of_a_vae_without_statistics_are_normalised_by_their_own():
    """Not by the means', which lack the posterior's variance; equivariance is that of means all the same."""
    images = smooth_images(12)
    tokenizer, items, values = MeanPooling(), np.arange(12), pooled(images).float()
    statistics = normalise(values, None)
    data = SimpleNamespace(images=SimpleNamespace(resolution=32), items=items)
    latents = Latents(values, data, torch.device("cpu"), seed=9)
    diffused = encode_diffused(latents, tokenizer, statistics, None, lambda function, shape: function(images))
    noise = counted_normal(9, torch.from_numpy(items), 0, (3, 8, 8), Purpose.POSTERIOR)
    raw = (pooled(images) + 5.0 * noise).numpy()
    mean, variance = raw.mean((0, 2, 3), keepdims=True), raw.var((0, 2, 3), ddof=1, keepdims=True)
    expected = (raw - mean) / np.sqrt(variance + EPSILON)
    np.testing.assert_allclose(diffused.samples.numpy(), expected, rtol=0, atol=1e-5)
    assert max(diffused.errors.values()) < 1e-10


class PackedPooling(MeanPooling):
    """The same with patches of 2×2 positions in the channels, as FLUX.2's latents are."""

    downsampling, packing = 8, 2

    def encode(self, images):
        plain = super().encode(images)
        return Posterior(F.pixel_unshuffle(plain.mean, 2), F.pixel_unshuffle(plain.logvar, 2))

    def stored_shape(self, resolution):
        return 24, resolution // 8, resolution // 8

    def latent_shape(self, resolution):
        return 12, resolution // 8, resolution // 8

    def sample(self, stored, noise):
        return stored[:, :12] + stored[:, 12:] * noise


def test_positions_in_the_channels_move_as_well():
    images, statistics = smooth_images(12), LatentStatistics(12)
    values = statistics.normalize(F.pixel_unshuffle(pooled(images), 2))
    data = SimpleNamespace(images=SimpleNamespace(resolution=32), items=np.arange(12))
    latents = Latents(values, data, torch.device("cpu"), seed=9)
    diffused = encode_diffused(
        latents, PackedPooling(), statistics, statistics, lambda function, shape: function(images)
    )
    assert set(diffused.errors) == {"flip", "rotation", "shift", "scale"} and max(diffused.errors.values()) < 1e-10


class OneSize(MeanPooling):
    """Of 32 px images alone, as an RAE is."""

    def latent_shape(self, resolution):
        if resolution != 32:
            raise UserError("32 px only")
        return super().latent_shape(resolution)


def test_a_tokenizer_of_one_resolution_goes_without_the_error_under_scale():
    images, tokenizer, statistics = smooth_images(6), OneSize(), LatentStatistics(3)
    assert set(moved_shapes(MeanPooling(), 32)) == set(TRANSFORMS) == {*moved_shapes(tokenizer, 32), "scale"}
    data = SimpleNamespace(images=SimpleNamespace(resolution=32), items=np.arange(6))
    latents = Latents(statistics.normalize(pooled(images)), data, torch.device("cpu"), seed=0)
    diffused = encode_diffused(latents, tokenizer, statistics, statistics, lambda function, shape: function(images))
    values = measure_diffusability(latents, diffused, 6).values
    assert values["scale-error"] is None and values["flip-error"] == pytest.approx(0, abs=1e-10)


def test_what_is_not_defined_is_none():
    """Images of 12 px and latents of 3×3: halves cannot be encoded, and one colour has no foreground."""
    images = torch.full((5, 3, 12, 12), 7, dtype=torch.uint8)
    tokenizer, statistics = MeanPooling(), LatentStatistics(3)
    data = SimpleNamespace(images=SimpleNamespace(resolution=12), items=np.arange(5))
    latents = Latents(statistics.normalize(pooled(images)), data, torch.device("cpu"), seed=0)
    diffused = encode_diffused(latents, tokenizer, statistics, statistics, lambda function, shape: function(images))
    values = measure_diffusability(latents, diffused, 5).values
    undefined = {name for name, value in values.items() if value is None}
    assert undefined == {"SRSS", "flip-error", "rotation-error", "shift-error", "scale-error"}
