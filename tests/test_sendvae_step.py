"""One Send-VAE step: who gets gradient, accumulation, frozen parts, what a non-finite batch does."""

import copy

import pytest
import torch

from models.latent_statistics import latent_moments
from models.pixels import to_signed
from tests.sendvae_runs import gradients, random_images, tiny_trainer
from training.sendvae import draw_noise


def noise_for(images: torch.Tensor, seed: int = 2):
    return draw_noise((len(images), 4, 8, 8), torch.device("cpu"), torch.Generator().manual_seed(seed))


def rows(noise, start: int, stop: int):
    return type(noise)(*(tensor[start:stop] for tensor in noise))


def largest_difference(a: dict, b: dict) -> float:
    assert a.keys() == b.keys()
    assert a
    return max((a[name] - b[name]).abs().max().item() for name in a)


def test_gradients_equal_a_plain_autograd_calculation():
    trainer = tiny_trainer()
    plain = copy.deepcopy(trainer.model)
    discriminator = copy.deepcopy(trainer.discriminator)
    images, noise = random_images(4), noise_for(random_images(4))
    trainer.accumulate(images, noise, step=0, share=1.0)

    x = images.float() / 127.5 - 1
    moments = plain.tokenizer.network.encode(x).latent_dist.parameters
    mean, logvar = moments.chunk(2, 1)
    logvar = logvar.clamp(-30, 20)
    z = mean + torch.exp(logvar / 2) * noise.posterior
    x_hat = plain.tokenizer.network.decode(z).sample
    t = noise.t[:, None, None, None]
    normalised = (z - 0.0) / (1.0 + 1e-4) ** 0.5  # fresh statistics: mean 0, variance 1
    tokens = plain.mapper((1 - t) * normalised + t * noise.path)
    features = trainer.encoders[0](images)
    cosine = (tokens * features).sum(-1) / tokens.norm(dim=-1) / features.norm(dim=-1)
    kl = 0.5 * (mean**2 + logvar.exp() - 1 - logvar).sum() / 4
    logits = discriminator(x_hat)
    loss = (x - x_hat).abs().mean() + 1e-6 * kl + 0.1 * -logits.mean() + (1 - cosine).mean()
    parameters = dict(plain.named_parameters())
    expected = dict(zip(parameters, torch.autograd.grad(loss, parameters.values()), strict=True))
    assert largest_difference(gradients(trainer.model), expected) < 1e-5

    real, fake = discriminator(x), discriminator(x_hat.detach())
    hinge = 0.5 * (torch.relu(1 - real).mean() + torch.relu(1 + fake).mean())
    names = dict(discriminator.named_parameters())
    expected = dict(zip(names, torch.autograd.grad(hinge, names.values()), strict=True))
    assert largest_difference(gradients(trainer.discriminator), expected) < 1e-6


def test_statistics_are_constants_in_the_gradient_and_follow_the_latents_afterwards():
    trainer = tiny_trainer(gan=False)
    images = random_images(4)
    noise = trainer.noise_for(images, step=0, micro_step=0)
    with torch.no_grad():
        z = trainer.model(images, noise).latent
    trainer.step(0, [images], 1e-3, 1e-3)
    expected = torch.nn.BatchNorm2d(4, eps=1e-4, momentum=0.1, affine=False)
    expected.train()(z)
    torch.testing.assert_close(trainer.statistics.mean, expected.running_mean, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(trainer.statistics.var, expected.running_var, rtol=1e-5, atol=1e-6)


def test_accumulating_two_micro_batches_equals_the_doubled_batch():
    images = random_images(8)
    noise = noise_for(images)
    whole, halves = tiny_trainer(gan=False), tiny_trainer(gan=False)
    _, latent = whole.accumulate(images, noise, 0, 1.0)
    parts = [halves.accumulate(images[i : i + 4], rows(noise, i, i + 4), 0, 0.5)[1] for i in (0, 4)]
    assert largest_difference(gradients(whole.model), gradients(halves.model)) < 1e-5
    torch.testing.assert_close(sum(map(latent_moments, parts)), latent_moments(latent), rtol=1e-6, atol=1e-4)


def test_discriminator_is_updated_and_the_generator_leaves_its_gradients_alone():
    trainer = tiny_trainer()
    before = copy.deepcopy(trainer.discriminator.state_dict())
    trainer.step(0, [random_images(4)], 0.0, 1e-3)
    after = trainer.discriminator.state_dict()
    assert all((before[name] != after[name]).any() for name in before if name.endswith("weight"))

    alone = tiny_trainer()
    images, noise = random_images(4), noise_for(random_images(4))
    output = alone.model(images, noise)
    terms, weights = alone._generator_loss(images, output, plays=True)
    (weights["gan"] * terms["gan"]).backward()
    assert not gradients(alone.discriminator)
    assert all(parameter.requires_grad for parameter in alone.discriminator.parameters())


def test_discriminator_waits_for_its_start_step():
    trainer = tiny_trainer(discriminator_start=3)
    before = copy.deepcopy(trainer.discriminator.state_dict())
    metrics = trainer.step(2, [random_images(2)], 1e-3, 1e-3)
    assert "gan" not in metrics
    assert all(torch.equal(before[name], tensor) for name, tensor in trainer.discriminator.state_dict().items())
    metrics = trainer.step(3, [random_images(2)], 1e-3, 1e-3)
    assert {"gan", "discriminator", "disc_grad_norm"} <= metrics.keys()


@pytest.mark.parametrize("align_coeff", [0.0, 1.0])
def test_alignment_reaches_the_encoder_and_never_the_decoder(align_coeff):
    trainer = tiny_trainer(gan=False, align_coeff=align_coeff, reconstruction_weight=0.0, kl_weight=0.0)
    trainer.accumulate(random_images(2), noise_for(random_images(2)), 0, 1.0)
    grads = gradients(trainer.model)
    touched = {name.split(".")[2] for name, g in grads.items() if name.startswith("tokenizer") and g.abs().max() > 0}
    assert touched == ({"encoder", "quant_conv"} if align_coeff else set())
    if align_coeff:
        assert all(p.grad is None and not p.requires_grad for p in trainer.encoders[0].parameters())
        assert all(
            g.abs().max() > 0 for name, g in grads.items() if name.startswith("mapper") and "qkv.bias" not in name
        )


def test_frozen_vae_trains_the_mapper_alone():
    trainer = tiny_trainer(gan=False, freeze_vae=True, bn_momentum=0.0)
    before = copy.deepcopy(trainer.model.state_dict())
    metrics = trainer.step(0, [random_images(4)], 1e-3, 0.0)
    after = trainer.model.state_dict()
    changed = {name.split(".")[0] for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"mapper"}
    assert "reconstruction" not in metrics


def test_non_finite_step_changes_nothing_and_is_counted():
    trainer = tiny_trainer(ema_decay=0.5, lecam_regularization_weight=0.1)
    trainer.step(0, [random_images(4)], 1e-3, 1e-3)
    parameters = {n: p.detach().clone() for n, p in trainer.model.named_parameters()}
    state = copy.deepcopy(trainer.optimizer.state_dict()["state"])
    statistics = copy.deepcopy(trainer.statistics.state_dict())
    with torch.no_grad():
        weight = trainer.model.tokenizer.network.encoder.conv_in.weight
        kept = weight[0, 0, 0, 0].item()
        weight[0, 0, 0, 0] = float("nan")
    metrics = trainer.step(1, [random_images(4)], 1e-3, 1e-3)
    with torch.no_grad():
        weight[0, 0, 0, 0] = kept
    assert metrics["skipped"] == 1
    assert metrics["disc_skipped"] == 1
    assert all(torch.equal(parameters[n], p) for n, p in trainer.model.named_parameters())
    for index, entry in trainer.optimizer.state_dict()["state"].items():
        assert all(torch.equal(entry[key], state[index][key]) for key in entry)
    assert all(torch.equal(statistics[n], t) for n, t in trainer.statistics.state_dict().items())
    assert trainer.objective.lecam.real_mean.isfinite()


def test_noise_depends_on_seed_step_micro_step_and_rank():
    trainer = tiny_trainer(gan=False)
    images = random_images(2)
    draws = [trainer.noise_for(images, *counters).posterior for counters in ((0, 0), (0, 1), (1, 0))]
    trainer.seed = 1
    draws.append(trainer.noise_for(images, 0, 0).posterior)
    assert len({draw.numpy().tobytes() for draw in draws}) == 4
    trainer.seed = 0
    assert torch.equal(trainer.noise_for(images, 0, 0).posterior, draws[0])


def test_adaptive_weight_is_the_ratio_of_gradient_norms_at_the_last_layer():
    trainer = tiny_trainer(adaptive_discriminator_weight=True)
    images, noise = random_images(4), noise_for(random_images(4))
    metrics, _ = trainer.accumulate(images, noise, 0, 1.0)
    model = tiny_trainer(adaptive_discriminator_weight=True)
    x_hat = model.model(images, noise).reconstruction
    last = model.model.tokenizer.last_layer
    reconstruction = torch.autograd.grad((to_signed(images) - x_hat).abs().mean(), last, retain_graph=True)[0].norm()
    gan = torch.autograd.grad(-model.discriminator(x_hat).mean(), last)[0].norm()
    torch.testing.assert_close(metrics["gan_weight"], 0.1 * reconstruction / (gan + 1e-4), rtol=1e-4, atol=0)
