"""One Send-VAE step: who gets gradient, accumulation, frozen parts, what a non-finite batch does."""

import copy
import math
from types import SimpleNamespace

import pytest
import torch

from models.latent_statistics import latent_moments
from models.pixels import to_signed
from tests.ldm_steps import part_of
from tests.sendvae_runs import draws_for, gradients, image_batch, networks, tiny_trainer
from training.method import train_step

MEAN, STD = [0.3, -0.2, 0.1, 0.0], [1.5, 0.7, 1.0, 2.0]


def largest_difference(a: dict, b: dict) -> float:
    assert a.keys() == b.keys()
    assert a
    return max((a[name] - b[name]).abs().max().item() for name in a)


@pytest.mark.parametrize(
    ("flags", "frozen_vae"),
    [
        ({}, False),
        ({"path_type": "cosine", "align_coeff": 0.4, "mapper_depth": 0}, False),
        ({"noise_injection": False}, False),
        ({"freeze_vae": True}, True),
    ],
)
def test_gradients_equal_a_plain_autograd_calculation(flags, frozen_vae):
    trainer = tiny_trainer(gan=not frozen_vae, **flags)
    trainer.statistics.load(torch.tensor(MEAN), torch.tensor(STD))
    plain = copy.deepcopy(networks(trainer))
    discriminator = copy.deepcopy(trainer.discriminator)
    batch, draws = image_batch(4), draws_for(4)
    metrics, latent = trainer.backward(0, batch, draws, share=1.0, synchronise=True)

    network, mapper = plain.tokenizer.network, plain.alignment.mappers[0]
    x = batch.images.float() / 127.5 - 1
    mean, logvar = network.encode(x).latent_dist.parameters.chunk(2, 1)
    logvar = logvar.clamp(-30, 20)
    z = mean + torch.exp(logvar / 2) * draws.posterior
    x_hat = network.decode(z).sample
    noisy = (z - torch.tensor(MEAN).view(4, 1, 1)) / torch.tensor(STD).view(4, 1, 1)
    t = draws.times[:, None, None, None]
    if flags.get("noise_injection", True):
        alpha, sigma = (1 - t, t)
        if flags.get("path_type") == "cosine":
            alpha, sigma = torch.cos(t * math.pi / 2), torch.sin(t * math.pi / 2)
        noisy = alpha * noisy + sigma * draws.noise
    tokens, features = mapper(noisy), trainer.encoders[0](batch.images)
    cosine = (tokens * features).sum(-1) / tokens.norm(dim=-1) / features.norm(dim=-1)
    loss = flags.get("align_coeff", 1.0) * (1 - cosine).mean()
    if not frozen_vae:
        kl = 0.5 * (mean**2 + logvar.exp() - 1 - logvar).sum() / 4
        loss = loss + (x - x_hat).abs().mean() + 1e-6 * kl + 0.1 * -discriminator(x_hat).mean()
    assert metrics["loss"].item() == pytest.approx(loss.item(), rel=1e-6)
    assert metrics["alignment"].item() == pytest.approx((1 - cosine).mean().item(), rel=1e-6)
    torch.testing.assert_close(latent, z.detach(), rtol=1e-6, atol=1e-6)
    trained = {name: p for name, p in plain.named_parameters() if not (frozen_vae and name.startswith("tokenizer"))}
    expected = dict(zip(trained, torch.autograd.grad(loss, trained.values()), strict=True))
    assert largest_difference(gradients(networks(trainer)), expected) < 1e-5

    if not frozen_vae:
        real, fake = discriminator(x), discriminator(x_hat.detach())
        hinge = 0.5 * (torch.relu(1 - real).mean() + torch.relu(1 + fake).mean())
        names = dict(discriminator.named_parameters())
        expected = dict(zip(names, torch.autograd.grad(hinge, names.values()), strict=True))
        assert largest_difference(gradients(trainer.discriminator), expected) < 1e-6


def test_statistics_are_constants_in_the_gradient_and_follow_the_latents_afterwards():
    trainer = tiny_trainer(gan=False)
    batch = image_batch(4)
    draws = trainer.draws(0, 0, batch)
    with torch.no_grad():
        z = trainer.tokenizer.encode(batch.images).sample(draws.posterior)
    train_step(trainer, 0, [batch])
    expected = torch.nn.BatchNorm2d(4, eps=1e-4, momentum=0.1, affine=False)
    expected.train()(z)
    torch.testing.assert_close(trainer.statistics.mean, expected.running_mean, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(trainer.statistics.var, expected.running_var, rtol=1e-5, atol=1e-6)


def test_accumulating_two_micro_batches_equals_the_doubled_batch():
    batch, draws = image_batch(8), draws_for(8)
    whole, halves = tiny_trainer(gan=False), tiny_trainer(gan=False)
    _, latent = whole.backward(0, batch, draws, 1.0, synchronise=True)
    parts = [
        halves.backward(0, part_of(batch, part), part_of(draws, part), 0.5, synchronise=True)[1]
        for part in (slice(0, 4), slice(4, 8))
    ]
    assert largest_difference(gradients(networks(whole)), gradients(networks(halves))) < 1e-5
    torch.testing.assert_close(sum(map(latent_moments, parts)), latent_moments(latent), rtol=1e-6, atol=1e-4)


def test_a_step_of_two_micro_batches_is_one_of_the_doubled_batch():
    """Through the loop's own step, with the draws of its micro-steps."""
    batch = image_batch(8)
    micro_batches = [part_of(batch, part) for part in (slice(0, 4), slice(4, 8))]
    # A large epsilon, because AdamW's first step is otherwise the sign of gradients that may be rounding errors.
    whole, halves = (tiny_trainer(gan=False, adam_epsilon=1e-3) for _ in range(2))
    draws = [halves.draws(0, number, part) for number, part in enumerate(micro_batches)]
    whole.draws = lambda step, micro_step, batch: type(draws[0])(
        *map(torch.cat, zip(*(each[:4] for each in draws), strict=True))
    )
    before = {name: p.detach().clone() for name, p in networks(whole).named_parameters()}
    metrics = [train_step(whole, 0, [batch]), train_step(halves, 0, micro_batches)]
    for name in ("loss", "reconstruction", "kl", "alignment", "grad_norm"):
        assert metrics[1][name].item() == pytest.approx(metrics[0][name].item(), rel=1e-5), name
    after = [{name: p.detach() for name, p in networks(trainer).named_parameters()} for trainer in (whole, halves)]
    assert largest_difference(before, after[0]) > 1e-4
    assert largest_difference(after[0], after[1]) < 1e-6
    torch.testing.assert_close(halves.statistics.mean, whole.statistics.mean, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(halves.statistics.var, whole.statistics.var, rtol=1e-5, atol=1e-7)


def test_discriminator_is_updated_and_the_generator_leaves_its_gradients_alone():
    trainer = tiny_trainer(vae_learning_rate=0.0)
    before = copy.deepcopy(trainer.discriminator.state_dict())
    train_step(trainer, 0, [image_batch(4)])
    after = trainer.discriminator.state_dict()
    assert all((before[name] != after[name]).any() for name in before if name.endswith("weight"))

    alone = tiny_trainer()
    alone.objective.discriminator_weights = lambda: {"discriminator": 0.0}  # what is left is the generator's
    metrics, _ = alone.backward(0, image_batch(4), draws_for(4), 1.0, synchronise=True)
    assert metrics["gan"] != 0
    left = gradients(alone.discriminator)
    assert left.keys() == dict(alone.discriminator.named_parameters()).keys()
    assert all((gradient == 0).all() for gradient in left.values())
    assert all(parameter.requires_grad for parameter in alone.discriminator.parameters())


def test_discriminator_waits_for_its_start_step():
    trainer = tiny_trainer(loss={"discriminator_start": 3})
    before = copy.deepcopy(trainer.discriminator.state_dict())
    metrics = train_step(trainer, 2, [image_batch(2)])
    assert "gan" not in metrics
    assert all(torch.equal(before[name], tensor) for name, tensor in trainer.discriminator.state_dict().items())
    metrics = train_step(trainer, 3, [image_batch(2)])
    assert {"gan", "discriminator", "disc_grad_norm"} <= metrics.keys()


@pytest.mark.parametrize("align_coeff", [0.0, 1.0])
def test_alignment_reaches_the_encoder_and_never_the_decoder(align_coeff):
    weights = {"reconstruction_weight": 0.0, "kl_weight": 0.0}
    trainer = tiny_trainer(gan=False, align_coeff=align_coeff, loss=weights)
    trainer.backward(0, image_batch(2), draws_for(2), 1.0, synchronise=True)
    grads = gradients(networks(trainer))
    touched = {name.split(".")[2] for name, g in grads.items() if name.startswith("tokenizer") and g.abs().max() > 0}
    assert touched == ({"encoder", "quant_conv"} if align_coeff else set())
    if align_coeff:
        assert all(p.grad is None and not p.requires_grad for p in trainer.encoders[0].parameters())
        assert all(
            g.abs().max() > 0 for name, g in grads.items() if name.startswith("alignment") and "qkv.bias" not in name
        )


def test_frozen_vae_trains_the_mapper_alone():
    trainer = tiny_trainer(gan=False, freeze_vae=True)
    before = copy.deepcopy(networks(trainer).state_dict())
    metrics = train_step(trainer, 0, [image_batch(4)])
    after = networks(trainer).state_dict()
    changed = {name.split(".")[0] for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"alignment"}
    assert "reconstruction" not in metrics


def test_non_finite_step_changes_nothing_and_is_counted():
    trainer = tiny_trainer(ema_decay=0.5, loss={"lecam_regularization_weight": 0.1})
    train_step(trainer, 0, [image_batch(4)])
    parameters = {n: p.detach().clone() for n, p in networks(trainer).named_parameters()}
    state = copy.deepcopy(trainer.optimizer.state_dict()["state"])
    statistics = copy.deepcopy(trainer.statistics.state_dict())
    with torch.no_grad():
        weight = trainer.tokenizer.network.encoder.conv_in.weight
        kept = weight[0, 0, 0, 0].item()
        weight[0, 0, 0, 0] = float("nan")
    metrics = train_step(trainer, 1, [image_batch(4)])
    with torch.no_grad():
        weight[0, 0, 0, 0] = kept
    assert metrics["skipped"] == 1
    assert metrics["disc_skipped"] == 1
    assert all(torch.equal(parameters[n], p) for n, p in networks(trainer).named_parameters())
    for index, entry in trainer.optimizer.state_dict()["state"].items():
        assert all(torch.equal(entry[key], state[index][key]) for key in entry)
    assert all(torch.equal(statistics[n], t) for n, t in trainer.statistics.state_dict().items())
    assert trainer.objective.lecam.real_mean.isfinite()


def test_draws_depend_on_seed_step_micro_step_and_rank():
    trainer = tiny_trainer(gan=False)
    batch = image_batch(2)
    draws = [trainer.draws(*counters, batch) for counters in ((0, 0), (0, 1), (1, 0))]
    trainer.args.seed = 1
    draws.append(trainer.draws(0, 0, batch))
    trainer.args.seed = 0
    trainer.accelerator = SimpleNamespace(process_index=1)
    draws.append(trainer.draws(0, 0, batch))
    trainer.accelerator = SimpleNamespace(process_index=0)
    for part in draws[0]._fields[:4]:
        assert len({getattr(draw, part).numpy().tobytes() for draw in draws}) == 5, part
        assert torch.equal(getattr(trainer.draws(0, 0, batch), part), getattr(draws[0], part))
    assert not torch.equal(draws[0].posterior, draws[0].noise)


def test_adaptive_weight_is_the_ratio_of_gradient_norms_at_the_last_layer():
    trainer, plain = (tiny_trainer(loss={"adaptive_discriminator_weight": True}) for _ in range(2))
    batch, draws = image_batch(4), draws_for(4)
    metrics, _ = trainer.backward(0, batch, draws, 1.0, synchronise=True)
    x_hat = plain.tokenizer.decode(plain.tokenizer.encode(batch.images).sample(draws.posterior))
    last = plain.tokenizer.network.decoder.conv_out.weight
    l1 = (to_signed(batch.images) - x_hat).abs().mean()
    reconstruction = torch.autograd.grad(l1, last, retain_graph=True)[0].norm()
    gan = torch.autograd.grad(-plain.discriminator(x_hat).mean(), last)[0].norm()
    torch.testing.assert_close(metrics["gan_weight"], 0.1 * reconstruction / (gan + 1e-4), rtol=1e-4, atol=0)
