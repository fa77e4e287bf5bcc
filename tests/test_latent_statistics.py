"""Latent statistics against ``torch.nn.BatchNorm2d`` and two-pass float64 moments."""

import pytest
import torch

from models.latent_statistics import LatentStatistics, latent_moments, mean_and_variance, normalize_by_batch
from runtime.processes import sum_over_processes


def latents(seed: int, batch: int = 6, offset: float = 2.0, scale: float = 3.0) -> torch.Tensor:
    z = torch.randn(batch, 4, 5, 7, generator=torch.Generator().manual_seed(seed))
    return offset + scale * z * torch.tensor([0.1, 1.0, 2.0, 5.0])[:, None, None]


def loaded_statistics() -> LatentStatistics:
    statistics = LatentStatistics(4)
    statistics.load(torch.tensor([1.0, -2.0, 0.0, 5.0]), torch.tensor([0.05, 1.0, 3.0, 40.0]))
    return statistics


def test_statistics_start_as_those_of_a_standard_normal():
    statistics = LatentStatistics(4)
    assert statistics.mean.tolist() == [0] * 4
    assert statistics.std.double().sub(1.0001**0.5).abs().max() < 1e-7


def test_normalize_is_the_formula():
    z = latents(0)
    mean, std = torch.tensor([1.0, -2.0, 0.0, 5.0]).double(), torch.tensor([0.05, 1.0, 3.0, 40.0]).double()
    expected = (z.double() - mean.view(1, 4, 1, 1)) / std.view(1, 4, 1, 1)
    torch.testing.assert_close(loaded_statistics().normalize(z).double(), expected, rtol=1e-5, atol=1e-6)


def test_denormalize_inverts_normalize():
    z, statistics = latents(1), loaded_statistics()
    torch.testing.assert_close(statistics.denormalize(statistics.normalize(z)), z, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(statistics.normalize(statistics.denormalize(z)), z, rtol=1e-4, atol=1e-5)


def test_loaded_std_is_what_latents_are_divided_by():
    torch.testing.assert_close(loaded_statistics().std, torch.tensor([0.05, 1.0, 3.0, 40.0]), rtol=1e-6, atol=0)


def test_half_precision_latents_are_normalised_in_float32():
    z = torch.full((1, 4, 1, 1), 60000.0, dtype=torch.float16)
    normalised = loaded_statistics().normalize(z)
    assert normalised.dtype == torch.float32
    assert normalised[0, 0].item() == pytest.approx((float(z[0, 0]) - 1) / 0.05, rel=1e-5)  # over float16's maximum


def test_updates_follow_a_batch_norm_without_affine():
    statistics = LatentStatistics(4)
    norm = torch.nn.BatchNorm2d(4, eps=1e-4, momentum=0.1, affine=False)
    for seed in range(5):
        z = latents(seed, batch=3 + seed, offset=seed)
        norm(z)
        statistics.update(latent_moments(z), momentum=0.1)
    torch.testing.assert_close(statistics.mean, norm.running_mean, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(statistics.var, norm.running_var, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(statistics.normalize(z), norm.eval()(z), rtol=1e-5, atol=1e-6)


def test_normalising_by_the_batch_is_a_batch_norm_in_training_mode():
    z = latents(3)
    norm = torch.nn.BatchNorm2d(4, eps=1e-4, affine=False)
    halves = [normalize_by_batch(part, latent_moments(z)) for part in z.chunk(2)]
    torch.testing.assert_close(torch.cat(halves), norm(z), rtol=1e-5, atol=1e-5)


def test_momentum_one_replaces_the_statistics():
    statistics, z = loaded_statistics(), latents(3)
    statistics.update(latent_moments(z), momentum=1.0)
    torch.testing.assert_close(statistics.mean.double(), z.double().mean((0, 2, 3)), rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(statistics.var.double(), z.double().var((0, 2, 3), correction=1), rtol=1e-6, atol=0)


def test_moments_of_micro_batches_add_up_to_those_of_the_batch():
    z = latents(4, batch=7)
    parts = latent_moments(z[:1]) + latent_moments(z[1:4]) + latent_moments(z[4:])
    torch.testing.assert_close(parts, latent_moments(z), rtol=1e-13, atol=0)
    assert parts.shape == (2 * 4 + 1,)
    assert parts[-1] == 7 * 5 * 7


def test_variance_is_unbiased_over_batch_and_positions():
    z = latents(5)
    mean, var = mean_and_variance(latent_moments(z))
    torch.testing.assert_close(mean, z.double().mean((0, 2, 3)), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(var, z.double().var((0, 2, 3), correction=1), rtol=1e-11, atol=0)


def test_a_large_offset_does_not_drown_a_small_spread():
    noise = torch.randn(8, 4, 16, 16, generator=torch.Generator().manual_seed(6))
    z = (1e3 + 1e-2 * noise).float()
    _, var = mean_and_variance(latent_moments(z))
    torch.testing.assert_close(var, z.double().var((0, 2, 3), correction=1), rtol=1e-4, atol=0)


def test_a_constant_latent_has_variance_zero_and_stays_finite():
    statistics, z = LatentStatistics(4), torch.full((2, 4, 3, 3), 7.1)
    statistics.update(latent_moments(z), momentum=1.0)
    assert statistics.var.abs().max() < 1e-9
    assert statistics.normalize(z).abs().max() < 1e-3


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), -float("inf")])
def test_a_batch_that_is_not_finite_changes_nothing(poison):
    statistics, z = loaded_statistics(), latents(7)
    z[2, 1, 0, 0] = poison  # one channel of four
    before = {name: tensor.clone() for name, tensor in statistics.state_dict().items()}
    statistics.update(latent_moments(z), momentum=0.1)
    assert all(torch.equal(before[name], tensor) for name, tensor in statistics.state_dict().items())


def test_gradient_is_a_plain_scaling():
    statistics, z = loaded_statistics(), latents(8).requires_grad_()
    upstream = torch.randn(z.shape, generator=torch.Generator().manual_seed(9))
    statistics.normalize(z).backward(upstream)
    std = torch.tensor([0.05, 1.0, 3.0, 40.0]).view(1, 4, 1, 1)
    torch.testing.assert_close(z.grad, upstream / std, rtol=1e-6, atol=0)


def test_moments_carry_no_gradient():
    assert not latent_moments(latents(10).requires_grad_()).requires_grad


def test_statistics_are_saved_and_never_trained():
    statistics = LatentStatistics(4)
    assert list(statistics.parameters()) == []
    assert {"mean", "var"} <= set(statistics.state_dict())


def test_one_process_sums_to_itself():
    moments = latent_moments(latents(11))
    torch.testing.assert_close(sum_over_processes(moments.clone()), moments, rtol=0, atol=0)
