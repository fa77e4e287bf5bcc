"""One step of LDM training against a derivation in the test, its draws, and two processes against one."""

import math

import pytest
import torch
from safetensors.torch import load_file

from diffusion.flow import add_noise, velocity
from loss.alignment import TokenGrid
from loss.denoising import direction_error
from models.encoders import build_encoder
from tests.distributed_ldm_step import BATCH, STEP, batch_draws, config_of
from tests.ldm_steps import accumulate, networks, part_of, random_batch, tiny_trainer
from tests.sendvae_runs import gradients
from tests.stages import run_stage
from training.method import train_step


@pytest.mark.parametrize("path_type", ["linear", "cosine"])
@pytest.mark.parametrize("weighting", ["uniform", "lognormal"])
@pytest.mark.parametrize("shift", [1.0, 2.5])
def test_terms_equal_a_derivation_in_float64(path_type, weighting, shift):
    trainer = tiny_trainer(path_type=path_type, weighting=weighting, time_shift=shift)
    batch, draws = random_batch(BATCH), batch_draws(weighting)
    metrics = accumulate(trainer, batch, draws)

    mean, std = batch.stored[:, :4].double(), batch.stored[:, 4:].double()
    centre = torch.tensor([0.5, -0.2, 0.1, 0.0], dtype=torch.float64)[:, None, None]
    scale = torch.tensor([1.5, 0.7, 1.0, 2.0], dtype=torch.float64)[:, None, None]
    x = (mean + std * draws.posterior.double() - centre) / scale
    t = draws.times.double()
    if weighting == "lognormal":
        ratio = t.exp()
        t = ratio / (1 + ratio) if path_type == "linear" else 2 / math.pi * ratio.atan()
    if path_type == "linear":
        t = shift * t / (1 + (shift - 1) * t)
    else:
        t = 2 / math.pi * (shift * (math.pi / 2 * t).tan()).atan()
    angle = t[:, None, None, None] * math.pi / 2
    noise = draws.noise.double()
    if path_type == "linear":
        noisy, target = (1 - t[:, None, None, None]) * x + t[:, None, None, None] * noise, noise - x
    else:
        noisy = angle.cos() * x + angle.sin() * noise
        target = math.pi / 2 * (angle.cos() * noise - angle.sin() * x)
    predicted, (state,) = trainer.denoiser.double()(noisy, t, batch.labels, taps=(4,))
    tokens = trainer.alignment["repa"].double().projectors[0](state)
    denoise = ((predicted - target) ** 2).mean()
    features = batch.features[0].double()
    cosine = (tokens * features).sum(-1) / (tokens.norm(dim=-1) * features.norm(dim=-1))
    assert metrics["denoise"].item() == pytest.approx(denoise.item(), rel=1e-5)
    assert metrics["repa"].item() == pytest.approx(1 - cosine.mean().item(), rel=1e-5)
    assert metrics["loss"].item() == pytest.approx((denoise + 0.5 * (1 - cosine.mean())).item(), rel=1e-5)


def test_gradients_are_those_of_denoise_plus_half_repa():
    trainer = tiny_trainer()
    batch, draws = random_batch(BATCH), batch_draws()
    accumulate(trainer, batch, draws)
    both = gradients(networks(trainer))
    parts = []
    for coeff in (0.0, 1.0):
        single = tiny_trainer(proj_coeff=coeff)
        accumulate(single, batch, draws)
        parts.append(gradients(networks(single)))
    for name, gradient in both.items():
        expected = 0.5 * (parts[0][name] + parts[1][name])
        torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-6)
    assert not any(g.any() for name, g in parts[0].items() if name.startswith("alignment.repa.projectors"))
    late_parts = ("denoiser.blocks.4", "denoiser.blocks.5", "denoiser.final_layer")
    late = [name for name in both if name.startswith(late_parts)]
    assert late
    assert all(torch.allclose(parts[0][name], parts[1][name], rtol=1e-4, atol=1e-6) for name in late)


def test_without_repa_there_are_no_projectors():
    trainer = tiny_trainer(align=())
    assert not list(trainer.alignment.parameters())
    metrics = train_step(trainer, 0, [random_batch(4)])
    assert "repa" not in metrics
    assert metrics["loss"].item() == metrics["denoise"].item()


def test_images_go_through_the_frozen_encoder():
    encoder = build_encoder("efficientnet-lite0", 4)
    features = [TokenGrid("efficientnet-lite0", 4, encoder.embed_dim)]
    trainer = tiny_trainer(features=features)
    trainer.encoders = [encoder]
    images = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    batch, draws = random_batch(4)._replace(images=images, features=None), part_of(batch_draws(), slice(0, 4))
    from_images = accumulate(trainer, batch, draws)
    assert all(parameter.grad is None for parameter in encoder.parameters())
    trainer.encoders = None
    cached = accumulate(trainer, batch._replace(features=(encoder(images),)), draws)
    assert torch.equal(from_images["repa"], cached["repa"])


def test_labels_are_dropped_with_the_probability_given():
    trainer = tiny_trainer(cfg_prob=0.3)
    batch, seen = random_batch(2000), []

    def network(noisy, step, taught):
        seen.append(step.labels)
        return noisy * trainer.denoiser.x_embedder.proj.bias.sum(), None, {}

    trainer.networks = network
    accumulate(trainer, batch, trainer.draws(0, 0, batch))
    dropped = seen[0] == trainer.denoiser.null_class
    assert torch.equal(seen[0][~dropped], batch.labels[~dropped])
    # binomial: standard deviation sqrt(0.3·0.7/2000) = 0.0102; four of them
    assert dropped.double().mean().item() == pytest.approx(0.3, abs=0.041)


def test_draws_depend_on_seed_step_micro_step_and_kind():
    trainer, other = tiny_trainer(seed=0), tiny_trainer(seed=1)
    batch = random_batch(4)
    base = trainer.draws(3, 1, batch)
    assert all(torch.equal(a, b) for a, b in zip(base[:4], trainer.draws(3, 1, batch)[:4], strict=True))
    for changed in (trainer.draws(4, 1, batch), trainer.draws(3, 0, batch), other.draws(3, 1, batch)):
        assert not any(torch.equal(a, b) for a, b in zip(base[:4], changed[:4], strict=True))
    assert not torch.equal(base.posterior, base.noise)
    times = tiny_trainer(weighting="lognormal").draws(0, 0, random_batch(64)).times
    assert times.min() < 0  # standard normal, not uniform


def test_accumulated_micro_batches_are_the_whole_batch():
    batch, draws = random_batch(BATCH), batch_draws()
    whole, parts = tiny_trainer(), tiny_trainer()
    accumulate(whole, batch, draws)
    for part in (slice(0, 4), slice(4, 8)):
        accumulate(parts, part_of(batch, part), part_of(draws, part), share=0.5)
    expected, found = gradients(networks(whole)), gradients(networks(parts))
    assert max((found[name] - expected[name]).abs().max().item() for name in expected) < 1e-6


def test_step_moves_the_weights_and_the_average_follows():
    """Projectors move too, and are not averaged."""
    trainer = tiny_trainer(ema_decay=0.9)
    before = {name: p.clone() for name, p in networks(trainer).named_parameters()}
    metrics = train_step(trainer, 0, [random_batch(4)])
    after = dict(networks(trainer).named_parameters())
    assert all(not torch.equal(before[name], after[name]) for name in before if "y_embedder" not in name)
    average = {f"denoiser.{name}": parameter for name, parameter in trainer.ema.module.named_parameters()}
    assert average.keys() == {name for name in before if not name.startswith("alignment.repa.projectors.")}
    for name in average:
        torch.testing.assert_close(average[name], 0.9 * before[name] + 0.1 * after[name], rtol=1e-5, atol=1e-7)
    assert metrics["skipped"].item() == 0


def test_the_loss_falls():
    trainer = tiny_trainer(learning_rate=2e-3)
    batch = random_batch(16)
    losses = [train_step(trainer, step, [batch])["denoise"].item() for step in range(60)]
    assert sum(losses[-10:]) < 0.8 * sum(losses[:10])


@pytest.mark.parametrize("path_type", ["linear", "cosine"])
def test_the_direction_of_a_velocity(path_type):
    """1 − cos of the channels at each position, weighted; of a zero velocity 1, and its gradient is bounded."""
    trainer = tiny_trainer(path_type=path_type, velocity_cosine_coeff=0.25, align=())
    batch, draws = random_batch(BATCH), batch_draws()
    metrics = accumulate(trainer, batch, draws)
    x = trainer.normalised(batch, draws)
    with torch.no_grad():
        noisy = add_noise(x, draws.times, draws.noise, path_type)
        predicted = trainer.denoiser(noisy, draws.times, batch.labels)[0].double()
    target = velocity(x, draws.times, draws.noise, path_type).double()
    cosine = (predicted * target).sum(1) / (predicted.norm(dim=1) * target.norm(dim=1))
    assert metrics["velocity_cosine"].item() == pytest.approx(1 - cosine.mean().item(), rel=1e-5)
    assert metrics["loss"].item() == pytest.approx((metrics["denoise"] + 0.25 * (1 - cosine.mean())).item(), rel=1e-5)
    zero = torch.zeros(2, 4, 8, 8, requires_grad=True)
    error = direction_error(zero, torch.randn(2, 4, 8, 8))
    assert torch.equal(error, torch.ones(2))
    (gradient,) = torch.autograd.grad(error.sum(), zero)
    assert gradient.norm(dim=1).max().item() * 64 == pytest.approx(10, rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "token", "align"),
    [("SiT-Ti/2", 0, "repa"), ("SiT-Ti/2", 12, "repa+sra"), ("LightningDiT-Ti/2", 0, "repa")],
)
def test_two_processes_equal_one_with_the_doubled_batch(tmp_path, model, token, align):
    run_stage("tests/distributed_ldm_step.py", tmp_path / "gradients", model, token, align, processes=2)
    ranks = [load_file(tmp_path / f"gradients-{rank}.safetensors") for rank in (0, 1)]
    config = config_of(model, token)
    trainer = tiny_trainer(config=config, align=align.split("+"), **STEP)
    accumulate(trainer, random_batch(BATCH, config=config), batch_draws(class_token_width=token))
    expected = gradients(networks(trainer))
    assert ranks[0].keys() == expected.keys()
    assert max((ranks[0][name] - expected[name]).abs().max().item() for name in expected) < 1e-5
    assert all(torch.equal(ranks[0][name], ranks[1][name]) for name in expected)
