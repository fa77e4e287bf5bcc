"""One REPA-E step against a derivation with torch alone; who gets gradient from which term; two processes."""

import copy

import pytest
import torch
from safetensors.torch import load_file

from models.denoisers.sit import SiTConfig
from tests.ldm_steps import part_of
from tests.repae_steps import CONFIG, RATES, PlainRepae, batch_draws, random_batch, state_of, tiny_trainer
from tests.sendvae_runs import gradients
from tests.test_distributed import torchrun

BATCH = 6


def fixed_draws(trainer, draws):
    """Let a trainer draw these for its first, second … micro-step, whatever the step."""
    trainer.draws_for = lambda images, step, micro_step: draws[micro_step]


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
        found = {name: value.item() for name, value in trainer.step(number, [batch], RATES).items()}
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
    assert moved == {"vae", "discriminator", "sit", "ema", "statistics", "statistics_ema"}


def test_the_average_s_statistics_lag_behind_and_go_with_the_tuned_vae(two_steps):
    trainer, plain, _, _ = two_steps
    tuned = trainer.tuned_vae
    assert tuned.network is trainer.vae.model.tokenizer.network
    torch.testing.assert_close(tuned.statistics.mean, plain.ema_bn.running_mean, rtol=1e-5, atol=1e-6)
    assert (tuned.statistics.mean - trainer.statistics.mean).abs().max() > 1e-3


def test_gradients_equal_the_derivation():
    trainer, batch, draws = tiny_trainer(), random_batch(BATCH), batch_draws(BATCH)
    plain = PlainRepae(trainer)
    _, encoded = trainer.accumulate_vae(batch, draws, step=0, share=1.0)
    trainer.accumulate_sit(encoded, batch_moments(encoded.latent), share=1.0)
    terms, kept = plain.vae_terms(batch, draws)
    check_gradients(trainer.vae.model.tokenizer.network, plain.vae, plain.vae_loss(terms))
    judged = plain.discriminator_term(kept["x"], kept["x_hat"])
    check_gradients(trainer.vae.discriminator, plain.discriminator, judged)
    # only now, because the backward pass above reads the statistics that this moves
    sit_terms = plain.sit_terms(kept["z"], kept["features"], batch.labels, draws)
    check_gradients(trainer.sit.model, plain.sit, sit_terms["denoise"] + 0.5 * sit_terms["repa"])


def check_gradients(ours: torch.nn.Module, plain: torch.nn.Module, loss: torch.Tensor) -> None:
    names, parameters = zip(*plain.named_parameters(), strict=True)
    expected = dict(zip(names, torch.autograd.grad(loss, parameters, retain_graph=True), strict=True))
    assert largest_difference(gradients(ours), expected) < 1e-5


def batch_moments(z: torch.Tensor) -> torch.Tensor:
    z = z.double()
    return torch.cat([z.sum((0, 2, 3)), (z**2).sum((0, 2, 3)), torch.tensor([z.numel() / z.shape[1]])])


# Which parts of which network a term moves; what is not named gets no gradient. The discriminator's own loss and the
# SiT's terms start from detached tensors.
PATHS = {
    "reconstruction": {"vae.encoder", "vae.decoder"},
    "kl": {"vae.encoder"},
    "gan": {"vae.encoder", "vae.decoder"},
    "alignment": {"vae.encoder"},
    "discriminator": {"discriminator"},
    "denoise": {"sit.early", "sit.late"},
    "repa": {"sit.early", "sit.projectors"},
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
    if network == "sit":
        if parameter.startswith("projectors"):
            return "sit.projectors"
        late = [f"blocks.{number}." for number in range(CONFIG.encoder_depth, CONFIG.size.depth)]
        return "sit.late" if parameter.startswith((*late, "final_layer")) else "sit.early"
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
    if term == "denoise":
        trainer.sit.proj_coeff = 0.0
    networks = {"vae": trainer.vae.model.tokenizer.network, "sit": trainer.sit.model}
    if trainer.vae.discriminator is not None:
        networks["discriminator"] = trainer.vae.discriminator
    batch, draws = random_batch(BATCH), batch_draws(BATCH)
    statistics = copy.deepcopy(trainer.statistics.state_dict())
    _, encoded = trainer.accumulate_vae(batch, draws, step=0, share=1.0)
    assert not encoded.latent.requires_grad
    if term in ("denoise", "repa"):
        assert parts_with_gradient(networks) == set()
        with_both = trainer.accumulate_sit(encoded, batch_moments(encoded.latent), share=1.0)
        if term == "repa":  # the denoising term cannot be switched off: its own gradient is taken away
            alone = tiny_trainer(vae_align_coeff=0.0, proj_coeff=0.0, gan=False, **loss)
            _, again = alone.accumulate_vae(batch, draws, step=0, share=1.0)
            alone.accumulate_sit(again, batch_moments(again.latent), share=1.0)
            assert with_both["repa"] > 0
            for ours, other in zip(trainer.sit.model.parameters(), alone.sit.model.parameters(), strict=True):
                ours.grad = torch.where((ours.grad - other.grad).abs() > 1e-7, ours.grad - other.grad, 0.0)
    found = parts_with_gradient(networks)
    expected = PATHS[term] | ({"discriminator"} if term == "gan" else set())  # which plays whenever the generator does
    if term == "discriminator":
        expected = PATHS["gan"] | {"discriminator"}
    assert found == expected
    assert all(torch.equal(statistics[name], tensor) for name, tensor in trainer.statistics.state_dict().items())
    assert all(not p.requires_grad and p.grad is None for p in trainer.sit.encoders[0].parameters())


def test_the_generator_s_and_the_alignment_s_passes_leave_the_frozen_networks_alone():
    """The gradients of discriminator and SiT are those of their own losses, to the bit of a step without the others."""
    batch, draws = random_batch(BATCH), batch_draws(BATCH)
    both, without = tiny_trainer(), tiny_trainer(vae_align_coeff=0.0)
    for trainer in (both, without):
        _, encoded = trainer.accumulate_vae(batch, draws, step=0, share=1.0)
        assert all(parameter.grad is None for parameter in trainer.sit.model.parameters())
        assert all(parameter.requires_grad for parameter in trainer.sit.model.parameters())
        trainer.accumulate_sit(encoded, batch_moments(encoded.latent), share=1.0)
    for name in ("sit.model", "vae.discriminator"):
        half, network = name.split(".")
        ours, theirs = (gradients(getattr(getattr(trainer, half), network)) for trainer in (both, without))
        assert largest_difference(ours, theirs) < 1e-7
    networks = [trainer.vae.model.tokenizer.network.encoder for trainer in (both, without)]
    assert largest_difference(*map(gradients, networks)) > 1e-4


def test_micro_batches_are_the_whole_batch():
    """Statistics of the whole batch normalise every micro-batch. PatchGAN's BatchNorm sees micro-batches: left out."""
    batch, draws = random_batch(BATCH), batch_draws(BATCH)
    whole, parts = tiny_trainer(gan=False), tiny_trainer(gan=False)
    fixed_draws(whole, [draws])
    halves = (slice(0, 3), slice(3, 6))
    fixed_draws(parts, [part_of(draws, half) for half in halves])
    said = whole.step(0, [batch], RATES), parts.step(0, [part_of(batch, half) for half in halves], RATES)
    assert largest_difference(state_of(parts), state_of(whole)) < 1e-5
    assert said[0]["denoise"].item() == pytest.approx(said[1]["denoise"].item(), rel=1e-5)


def test_checkpointed_activations_change_no_gradient():
    batch, draws = random_batch(BATCH), batch_draws(BATCH)
    plain, recomputed = tiny_trainer(), tiny_trainer()
    recomputed.sit.model.gradient_checkpointing = True
    recomputed.vae.model.tokenizer.network.enable_gradient_checkpointing()
    for trainer in (plain, recomputed):
        fixed_draws(trainer, [draws])
        trainer.step(0, [batch], RATES)
    assert largest_difference(state_of(recomputed), state_of(plain)) < 1e-6


@pytest.mark.parametrize(("weighting", "path_type"), [("lognormal", "linear"), ("lognormal", "cosine")])
def test_both_halves_see_the_same_times_and_noise(weighting, path_type):
    trainer = tiny_trainer(weighting=weighting, path_type=path_type)
    seen = []
    trainer.sit.model.register_forward_pre_hook(lambda module, args: seen.append((args[0].detach(), args[1])))
    trainer.step(3, [random_batch(BATCH)], RATES)
    (noisy_vae, t_vae), (noisy_sit, t_sit) = seen
    assert torch.equal(t_vae, t_sit)
    assert 0 < t_sit.min() < t_sit.max() < 1
    draws = trainer.draws_for(random_batch(BATCH).images, 3, 0)
    ratio = draws.times.exp()
    t = ratio / (1 + ratio) if path_type == "linear" else 2 / torch.pi * ratio.atan()
    torch.testing.assert_close(t_sit, t)
    # the two inputs differ by the normalisation alone: an affine map of each channel, on what is left without noise
    shape = (-1, 1, 1, 1)
    alpha, sigma = (1 - t, t) if path_type == "linear" else (torch.cos(t * torch.pi / 2), torch.sin(t * torch.pi / 2))
    clean = [(noisy - sigma.view(shape) * draws.noise) / alpha.view(shape) for noisy in (noisy_vae, noisy_sit)]
    for channel in range(4):
        a, b = (part[:, channel].flatten().double() for part in clean)
        slope = ((a - a.mean()) * (b - b.mean())).sum() / ((a - a.mean()) ** 2).sum()
        assert (b - b.mean() - slope * (a - a.mean())).abs().max() < 1e-3
        assert b.mean().abs() < 1e-3  # the batch's own moments
        assert b.std(unbiased=False) == pytest.approx(1, abs=1e-2)


def test_without_any_alignment_there_is_no_vfm():
    config = SiTConfig(**(CONFIG.to_dict() | {"feature_dims": ()}))
    trainer = tiny_trainer(config=config, proj_coeff=0.0, vae_align_coeff=0.0)
    metrics = trainer.step(0, [random_batch(2)], RATES)
    assert "repa" not in metrics
    assert "alignment" not in metrics
    assert metrics["loss"] == metrics["denoise"]


def test_a_non_finite_step_changes_no_weights_and_is_counted():
    trainer = tiny_trainer()
    trainer.step(0, [random_batch(2)], RATES)
    kept = copy.deepcopy(state_of(trainer))
    with torch.no_grad():
        trainer.vae.model.tokenizer.network.encoder.conv_in.weight[0, 0, 0, 0] = float("nan")
    metrics = trainer.step(1, [random_batch(2)], RATES)
    assert metrics["skipped"] == metrics["vae_skipped"] == metrics["disc_skipped"] == 1
    after = state_of(trainer)
    buffers = ("running_mean", "running_var", "num_batches_tracked")  # PatchGAN's own BatchNorm has seen the batch
    current = [name for name in kept if name.split(".")[0] in ("vae", "discriminator", "sit", "statistics")]
    same = [name for name in current if not name.endswith(buffers) and "encoder.conv_in.weight" not in name]
    assert len(same) > 100
    assert all(torch.equal(kept[name], after[name]) for name in same)
    assert all(tensor.isfinite().all() for name, tensor in after.items() if "ema" in name)


def test_losses_fall():
    trainer, batch = tiny_trainer(), random_batch(4)
    said = [trainer.step(number, [batch], RATES) for number in range(30)]
    for name in ("denoise", "repa", "alignment"):
        first, last = (sum(metrics[name].item() for metrics in part) for part in (said[:6], said[-6:]))
        assert last < 0.9 * first, name


@pytest.mark.slow
def test_two_processes_equal_one_with_the_doubled_batch(tmp_path):
    torchrun("tests/distributed_repae_step.py", str(tmp_path / "state"))
    ranks = [load_file(tmp_path / f"state-{rank}.safetensors") for rank in (0, 1)]
    trainer = tiny_trainer(gan=False)
    for number in (0, 1):
        fixed_draws(trainer, [batch_draws(8, seed=number)])
        trainer.step(number, [random_batch(8, seed=number)], RATES)
    expected = state_of(trainer)
    assert all(torch.equal(ranks[0][name], ranks[1][name]) for name in expected)
    assert largest_difference(ranks[0], expected) < 1e-5
