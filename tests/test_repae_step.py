"""One REPA-E step against a derivation with torch alone; who gets gradient from which term; two processes."""

import copy

import pytest
import torch
from safetensors.torch import load_file

from tests.ldm_steps import part_of
from tests.repae_steps import (
    CONFIG,
    DEPTH,
    PlainRepae,
    accumulate_denoiser,
    accumulate_vae,
    batch_draws,
    fixed_draws,
    networks_of,
    random_batch,
    state_of,
    tiny_trainer,
)
from tests.sendvae_runs import gradients
from tests.stages import run_stage
from training.method import train_step

BATCH = 6


def largest_difference(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    assert found.keys() == expected.keys()
    return max((found[name].double() - expected[name].double()).abs().max().item() for name in expected)


@pytest.fixture(scope="module")
def two_steps():
    """The trainer and the derivation after two steps each, with what they said of them."""
    trainer = tiny_trainer()
    before, plain, said = copy.deepcopy(state_of(trainer)), PlainRepae(trainer), []
    for number in (0, 1):
        batch, draws = random_batch(BATCH, seed=10 + number), batch_draws(BATCH, seed=20 + number)
        fixed_draws(trainer, [draws])
        found = {name: value.item() for name, value in train_step(trainer, number, [batch]).items()}
        said.append((found, plain.step(batch, draws)))
    return trainer, plain, said, before


def test_losses_and_gradient_norms_equal_the_derivation(two_steps):
    for found, expected in two_steps[2]:
        for name, value in expected.items():
            assert found[name] == pytest.approx(value, rel=1e-5, abs=1e-5), name
        assert found["skipped"] == found["vae_skipped"] == found["disc_skipped"] == 0
        assert found["vae_grad_norm"] > 0.7  # clipped
    assert two_steps[2][0][0]["loss"] != two_steps[2][1][0]["loss"]


def test_weights_statistics_and_averages_equal_the_derivation(two_steps):
    trainer, plain, _, before = two_steps
    found, expected = state_of(trainer), plain.state()
    assert largest_difference(found, expected) < 1e-5
    moved = {name.split(".")[0] for name in before if (found[name] - before[name]).abs().max() > 1e-4}
    assert moved == {"vae", "discriminator", "denoiser", "projectors", "ema", "statistics", "statistics_ema"}


def test_the_average_s_statistics_lag_behind_and_go_with_the_tuned_vae(two_steps):
    trainer, plain, _, _ = two_steps
    tuned = trainer.tuned_vae
    assert tuned.network is trainer.vae.tokenizer.network
    torch.testing.assert_close(tuned.statistics.mean, plain.ema_bn.running_mean, rtol=1e-5, atol=1e-6)
    assert (tuned.statistics.mean - trainer.vae.statistics.mean).abs().max() > 1e-3


def test_gradients_equal_the_derivation():
    trainer, batch, draws = tiny_trainer(), random_batch(BATCH), batch_draws(BATCH)
    plain = PlainRepae(trainer)
    _, encoded = accumulate_vae(trainer, batch, draws)
    accumulate_denoiser(trainer, encoded)
    terms, kept = plain.vae_terms(batch, draws)
    check_gradients(trainer.vae.tokenizer.network, plain.vae, plain.vae_loss(terms))
    judged = plain.discriminator_term(kept["x"], kept["x_hat"])
    check_gradients(trainer.vae.discriminator, plain.discriminator, judged)
    # only now, because the backward pass above reads the statistics that this moves
    terms = plain.denoiser_terms(kept["z"], kept["features"], batch.labels, draws)
    loss = terms["denoise"] + 0.5 * terms["repa"]
    check_gradients(trainer.ldm.denoiser, plain.denoiser, loss)
    check_gradients(trainer.ldm.alignment["repa"].projectors, plain.projectors, loss)


def check_gradients(ours: torch.nn.Module, plain: torch.nn.Module, loss: torch.Tensor) -> None:
    names, parameters = zip(*plain.named_parameters(), strict=True)
    expected = dict(zip(names, torch.autograd.grad(loss, parameters, retain_graph=True), strict=True))
    assert largest_difference(gradients(ours), expected) < 1e-5


# Which parts of which network a term moves; what is not named gets no gradient. The discriminator's own loss and the
# denoiser's terms start from detached tensors.
PATHS = {
    "reconstruction": {"vae.encoder", "vae.decoder"},
    "kl": {"vae.encoder"},
    "gan": {"vae.encoder", "vae.decoder"},
    "alignment": {"vae.encoder"},
    "discriminator": {"discriminator"},
    "denoise": {"denoiser.early", "denoiser.late"},
    "repa": {"denoiser.early", "projectors"},
}


def parts_with_gradient(networks: dict) -> set[str]:
    parts = set()
    for network, module in networks.items():
        for name, parameter in module.named_parameters():
            if parameter.grad is not None and parameter.grad.abs().max() > 0:
                parts.add(part_name(network, name))
    return parts


def part_name(network: str, parameter: str) -> str:
    if network == "vae":
        return "vae.decoder" if parameter.startswith(("decoder", "post_quant")) else "vae.encoder"
    if network == "denoiser":
        late = [f"blocks.{number}." for number in range(DEPTH, CONFIG.size.depth)]
        return "denoiser.late" if parameter.startswith((*late, "final_layer")) else "denoiser.early"
    return network


@pytest.mark.parametrize("term", PATHS)
def test_which_parameters_get_gradient_from_which_term(term):
    """Each term alone (all other weights 0), and its gradient is that of a plain autograd calculation."""
    own = {"reconstruction": "reconstruction_weight", "kl": "kl_weight"}
    loss = dict.fromkeys(own.values(), 0.0) | ({own[term]: 1.0} if term in own else {})
    trainer = tiny_trainer(
        vae_align_coeff=1.0 if term == "alignment" else 0.0,
        proj_coeff=1.0 if term == "repa" else 0.0,
        gan=term in ("gan", "discriminator"),
        **loss,
    )
    networks = networks_of(trainer)
    batch, draws = random_batch(BATCH), batch_draws(BATCH)
    statistics = copy.deepcopy(trainer.vae.statistics.state_dict())
    _, encoded = accumulate_vae(trainer, batch, draws)
    assert not encoded.latent.requires_grad
    if term in ("denoise", "repa"):
        assert parts_with_gradient(networks) == set()
        with_both = accumulate_denoiser(trainer, encoded)
        if term == "repa":  # the denoising term cannot be switched off: its own gradient is taken away
            alone = tiny_trainer(vae_align_coeff=0.0, proj_coeff=0.0, gan=False, **loss)
            _, again = accumulate_vae(alone, batch, draws)
            accumulate_denoiser(alone, again)
            assert with_both["repa"] > 0
            pairs = zip(trainer.ldm.denoiser.parameters(), alone.ldm.denoiser.parameters(), strict=True)
            for ours, other in pairs:
                ours.grad = torch.where((ours.grad - other.grad).abs() > 1e-7, ours.grad - other.grad, 0.0)
    found = parts_with_gradient(networks)
    expected = PATHS[term] | ({"discriminator"} if term == "gan" else set())  # which plays whenever the generator does
    if term == "discriminator":
        expected = PATHS["gan"] | {"discriminator"}
    assert found == expected
    assert all(torch.equal(statistics[name], tensor) for name, tensor in trainer.vae.statistics.state_dict().items())
    assert all(not p.requires_grad and p.grad is None for p in trainer.vae.encoders[0].parameters())


def test_the_generator_s_and_the_alignment_s_passes_leave_the_frozen_networks_alone():
    """Discriminator and denoiser get the gradients of their own losses alone, as in a step without the others."""
    batch, draws = random_batch(BATCH), batch_draws(BATCH)
    both, without = tiny_trainer(), tiny_trainer(vae_align_coeff=0.0)
    for trainer in (both, without):
        _, encoded = accumulate_vae(trainer, batch, draws)
        for network in (trainer.ldm.denoiser, trainer.ldm.alignment):
            assert all(parameter.grad is None for parameter in network.parameters())
            assert all(parameter.requires_grad for parameter in network.parameters())
        accumulate_denoiser(trainer, encoded)
    for name in ("denoiser", "projectors", "discriminator"):
        ours, theirs = (gradients(networks_of(trainer)[name]) for trainer in (both, without))
        assert ours
        assert largest_difference(ours, theirs) < 1e-7
    networks = [trainer.vae.tokenizer.network.encoder for trainer in (both, without)]
    assert largest_difference(*map(gradients, networks)) > 1e-4


def test_micro_batches_are_the_whole_batch():
    """Statistics of the whole batch normalise every micro-batch. PatchGAN's BatchNorm sees micro-batches: left out."""
    batch, draws = random_batch(BATCH), batch_draws(BATCH)
    whole, parts = tiny_trainer(gan=False), tiny_trainer(gan=False)
    fixed_draws(whole, [draws])
    halves = (slice(0, 3), slice(3, 6))
    fixed_draws(parts, [part_of(draws, half) for half in halves])
    said = train_step(whole, 0, [batch]), train_step(parts, 0, [part_of(batch, half) for half in halves])
    assert largest_difference(state_of(parts), state_of(whole)) < 1e-5
    assert said[0]["denoise"].item() == pytest.approx(said[1]["denoise"].item(), rel=1e-5)


def test_checkpointed_activations_change_no_gradient():
    batch, draws = random_batch(BATCH), batch_draws(BATCH)
    plain, recomputed = tiny_trainer(), tiny_trainer()
    recomputed.ldm.denoiser.gradient_checkpointing = True
    recomputed.vae.tokenizer.enable_gradient_checkpointing()
    for trainer in (plain, recomputed):
        fixed_draws(trainer, [draws])
        train_step(trainer, 0, [batch])
    assert largest_difference(state_of(recomputed), state_of(plain)) < 1e-6


@pytest.mark.parametrize(("weighting", "path_type"), [("lognormal", "linear"), ("lognormal", "cosine")])
def test_both_halves_see_the_same_times_and_noise(weighting, path_type):
    trainer = tiny_trainer(weighting=weighting, path_type=path_type)
    noisy, times = [], []
    trainer.ldm.denoiser.x_embedder.register_forward_pre_hook(lambda module, args: noisy.append(args[0].detach()))
    trainer.ldm.denoiser.t_embedder.register_forward_pre_hook(lambda module, args: times.append(args[0]))
    train_step(trainer, 3, [random_batch(BATCH)])
    assert len(noisy) == 2
    t_vae, t_denoiser = times
    assert torch.equal(t_vae, t_denoiser)
    assert 0 < t_denoiser.min() < t_denoiser.max() < 1
    draws = trainer.vae.draws(3, 0, random_batch(BATCH))
    ratio = draws.times.exp()
    t = ratio / (1 + ratio) if path_type == "linear" else 2 / torch.pi * ratio.atan()
    torch.testing.assert_close(t_denoiser, t)
    # the two inputs differ by the normalisation alone: an affine map of each channel, on what is left without noise
    shape = (-1, 1, 1, 1)
    alpha, sigma = (1 - t, t) if path_type == "linear" else (torch.cos(t * torch.pi / 2), torch.sin(t * torch.pi / 2))
    clean = [(x - sigma.view(shape) * draws.noise) / alpha.view(shape) for x in noisy]
    for channel in range(4):
        a, b = (part[:, channel].flatten().double() for part in clean)
        slope = ((a - a.mean()) * (b - b.mean())).sum() / ((a - a.mean()) ** 2).sum()
        assert (b - b.mean() - slope * (a - a.mean())).abs().max() < 1e-3
        assert b.mean().abs() < 1e-3  # the batch's own moments
        assert b.std(unbiased=False) == pytest.approx(1, abs=1e-2)


def test_without_any_alignment_there_is_no_vfm():
    trainer = tiny_trainer(align=False)
    metrics = train_step(trainer, 0, [random_batch(2)])
    assert "repa" not in metrics
    assert "alignment" not in metrics
    assert metrics["loss"] == metrics["denoise"]


def test_a_non_finite_step_changes_no_weights_and_is_counted():
    trainer = tiny_trainer()
    train_step(trainer, 0, [random_batch(2)])
    kept = copy.deepcopy(state_of(trainer))
    with torch.no_grad():
        trainer.vae.tokenizer.network.encoder.conv_in.weight[0, 0, 0, 0] = float("nan")
    metrics = train_step(trainer, 1, [random_batch(2)])
    assert metrics["skipped"] == metrics["vae_skipped"] == metrics["disc_skipped"] == 1
    after = state_of(trainer)
    buffers = ("running_mean", "running_var", "num_batches_tracked")  # PatchGAN's own BatchNorm has seen the batch
    networks = ("vae", "discriminator", "denoiser", "projectors", "statistics")
    current = [name for name in kept if name.split(".")[0] in networks]
    same = [name for name in current if not name.endswith(buffers) and "encoder.conv_in.weight" not in name]
    assert len(same) > 100
    assert all(torch.equal(kept[name], after[name]) for name in same)
    assert all(tensor.isfinite().all() for name, tensor in after.items() if "ema" in name)


def test_losses_fall():
    trainer, batch = tiny_trainer(), random_batch(4)
    said = [train_step(trainer, number, [batch]) for number in range(30)]
    for name in ("denoise", "repa", "alignment"):
        first, last = (sum(metrics[name].item() for metrics in part) for part in (said[:6], said[-6:]))
        assert last < 0.9 * first, name


@pytest.mark.slow
def test_two_processes_equal_one_with_the_doubled_batch(tmp_path):
    run_stage("tests/distributed_repae_step.py", tmp_path / "state", processes=2)
    ranks = [load_file(tmp_path / f"state-{rank}.safetensors") for rank in (0, 1)]
    trainer = tiny_trainer(gan=False)
    for number in (0, 1):
        fixed_draws(trainer, [batch_draws(8, seed=number)])
        train_step(trainer, number, [random_batch(8, seed=number)])
    expected = state_of(trainer)
    assert all(torch.equal(ranks[0][name], ranks[1][name]) for name in expected)
    assert largest_difference(ranks[0], expected) < 1e-5
