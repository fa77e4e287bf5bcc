"""Patch-wise cosine alignment, its baseline and the noise that is injected: values and where the gradient goes."""

import argparse
import math
from typing import ClassVar

import pytest
import torch

import train_sendvae
from diffusion.flow import PATH_TYPES, add_noise, interpolant
from errors import UserError
from formats.vae import load_tokenizer
from loss.alignment import DENOISER_ALIGNMENTS, TOKENIZER_ALIGNMENTS, settle_arguments
from loss.alignment.cosine import constant_predictor_cosine, patch_cosine, patch_cosine_loss
from loss.alignment.flags import TokenizerAlignmentFlags
from models.encoders import build_encoder
from models.latent_statistics import latent_moments
from models.mapper import Mapper
from models.tokenizers.posterior import Posterior
from tests.sendvae_runs import LATENT, draws_for, tiny_trainer


def normal(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# --- the loss ---------------------------------------------------------------------------------------------------------


def test_alignment_is_the_mean_of_one_minus_cosine_over_batch_and_patches():
    tokens, features = normal(0, 3, 5, 7), normal(1, 3, 5, 7)
    cosines = [
        sum(a * b for a, b in zip(u, v, strict=True)) / math.sqrt(sum(a * a for a in u) * sum(b * b for b in v))
        for u, v in zip(tokens.reshape(-1, 7).tolist(), features.reshape(-1, 7).tolist(), strict=True)
    ]
    assert patch_cosine_loss(tokens, features).item() == pytest.approx(1 - sum(cosines) / 15, abs=1e-6)
    torch.testing.assert_close(
        patch_cosine(tokens, features).double(), torch.tensor(cosines).double().view(3, 5), rtol=0, atol=1e-6
    )


def test_alignment_ignores_lengths_and_spans_zero_to_two():
    features = normal(2, 2, 4, 8)
    assert patch_cosine_loss(3.7 * features, features).item() == pytest.approx(0.0, abs=1e-6)
    assert patch_cosine_loss(-0.2 * features, features).item() == pytest.approx(2.0, abs=1e-6)
    across = torch.cat([features[..., 4:], -features[..., :4]], dim=-1)
    assert patch_cosine_loss(across, features).item() == pytest.approx(1.0, abs=1e-6)


def test_alignment_is_computed_in_float32():
    tokens, features = normal(3, 1, 4, 512).mul(300).half(), normal(4, 1, 4, 512).mul(300).half()
    loss = patch_cosine_loss(tokens, features)  # the squared lengths exceed float16's maximum
    assert loss.dtype == torch.float32
    expected = 1 - torch.nn.functional.cosine_similarity(tokens.double(), features.double(), dim=-1).mean()
    assert loss.item() == pytest.approx(expected.item(), abs=1e-6)


def test_gradient_of_the_alignment_is_the_cosines_own():
    tokens, features = normal(5, 2, 3, 6).requires_grad_(), normal(6, 2, 3, 6)
    patch_cosine_loss(tokens, features).backward()
    u = tokens.detach()
    length, unit = u.norm(dim=-1, keepdim=True), features / features.norm(dim=-1, keepdim=True)
    cosine = (u / length * unit).sum(-1, keepdim=True)
    torch.testing.assert_close(tokens.grad, -(unit - cosine * u / length) / length / 6, rtol=1e-4, atol=1e-6)


def test_constant_predictor_cosine_is_what_gradient_ascent_reaches():
    features = normal(7, 20, 3, 5) + normal(8, 1, 3, 5)
    unit = features / features.norm(dim=-1, keepdim=True)
    claimed = constant_predictor_cosine(unit.sum(0), len(unit)).item()
    constant = normal(9, 3, 5).requires_grad_()
    optimizer = torch.optim.Adam([constant], lr=0.05)
    for _ in range(500):
        optimizer.zero_grad()
        mean_cosine = torch.nn.functional.cosine_similarity(constant[None], unit, dim=-1).mean()
        (-mean_cosine).backward()
        optimizer.step()
    assert mean_cosine.item() == pytest.approx(claimed, abs=1e-6)
    perturbed = constant.detach() + 0.1 * normal(10, 100, 1, 3, 5)
    assert torch.nn.functional.cosine_similarity(perturbed, unit, dim=-1).mean((1, 2)).max() <= claimed


# --- noise ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path_type", PATH_TYPES)
def test_interpolants(path_type):
    t = torch.linspace(0, 1, 101, dtype=torch.float64)
    alpha, sigma = interpolant(t, path_type)
    for i, time in enumerate(t.tolist()):
        angle = math.pi * time / 2
        expected = (1 - time, time) if path_type == "linear" else (math.cos(angle), math.sin(angle))
        assert (alpha[i].item(), sigma[i].item()) == pytest.approx(expected, abs=1e-15)


def test_the_cosine_path_preserves_variance():
    alpha, sigma = interpolant(torch.linspace(0, 1, 1001, dtype=torch.float64), "cosine")
    assert (alpha.square() + sigma.square() - 1).abs().max() < 1e-15


def test_an_unknown_path_is_refused():
    with pytest.raises(ValueError, match="spiral"):
        interpolant(torch.zeros(1), "spiral")


@pytest.mark.parametrize("path_type", PATH_TYPES)
@pytest.mark.parametrize("shape", [(4, 2, 3, 3), (4, 7), (4,)])
def test_each_sample_has_its_own_time(path_type, shape):
    x, noise = normal(11, *shape), normal(12, *shape)
    t = torch.tensor([0.0, 0.25, 0.5, 1.0], dtype=torch.float64)
    noisy = add_noise(x, t, noise, path_type)
    for i in range(4):
        alpha, sigma = interpolant(t[i], path_type)
        torch.testing.assert_close(noisy[i], alpha * x[i] + sigma * noise[i], rtol=1e-14, atol=1e-14)
    torch.testing.assert_close(noisy[0], x[0], rtol=0, atol=0)
    torch.testing.assert_close(noisy[3], noise[3], rtol=0, atol=1e-15)


# --- where the gradient goes ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("depth", [0, 1])
def test_alignment_trains_the_vae_encoder_and_the_mapper_and_nothing_else(depth):
    torch.manual_seed(13)
    vae = load_tokenizer("f4d4-tiny", "none")[0].train()
    vfm = build_encoder("efficientnet-lite0", 2, random_weights=True)
    mapper = Mapper(4, 8, 2, vfm.embed_dim, depth=depth, projector_width=32)
    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    posterior = vae.encode(images)
    z = posterior.sample(torch.randn_like(posterior.mean))
    vae.statistics.update(latent_moments(z), momentum=0.1)
    noisy = add_noise(vae.statistics.normalize(z), torch.rand(2), torch.randn_like(z))
    patch_cosine_loss(mapper(noisy), vfm(images)).backward()
    for name, parameter in vae.network.named_parameters():
        trained = name.startswith(("encoder.", "quant_conv."))
        assert (parameter.grad is not None) == trained, name
        assert not trained or parameter.grad.abs().max() > 0 or is_shift_before_norm_or_softmax(name), name
    assert all(parameter.grad.abs().max() > 0 for name, parameter in mapper.named_parameters() if "bias" not in name)
    assert all(parameter.grad is None for parameter in vfm.parameters())
    assert all(not buffer.requires_grad for buffer in vae.statistics.buffers())


def is_shift_before_norm_or_softmax(name: str) -> bool:
    """The key's bias cancels in the softmax."""
    return name.endswith("to_k.bias")


def test_without_noise_the_gradient_on_z_is_the_normalised_ones_over_std():
    torch.manual_seed(14)
    vae = load_tokenizer("f4d4-tiny", "none")[0]
    vae.statistics.load(torch.zeros(4), torch.tensor([0.5, 1.0, 2.0, 4.0]))
    mapper, features = Mapper(4, 8, 4, 16, projector_width=32), torch.randn(2, 16, 16)
    z = torch.randn(2, 4, 8, 8, requires_grad=True)
    normalised = vae.statistics.normalize(z)
    normalised.retain_grad()
    patch_cosine_loss(mapper(normalised), features).backward()
    expected = normalised.grad / torch.tensor([0.5, 1.0, 2.0, 4.0]).view(1, 4, 1, 1)
    torch.testing.assert_close(z.grad, expected, rtol=1e-6, atol=0)


# --- what is measured on held-out images ------------------------------------------------------------------------------


@pytest.mark.parametrize("align_loss", ["cosine", "vf"])
def test_scores_are_the_mean_cosines_of_each_image_as_in_training_and_clean(align_loss):
    trainer = tiny_trainer(gan=False, align_loss=align_loss)
    trainer.statistics.load(torch.tensor([0.3, -0.2, 0.1, 0.0]), torch.tensor([1.5, 0.7, 1.0, 2.0]))
    mean, logvar = normal(15, 3, *LATENT).float(), normal(16, 3, *LATENT).float()
    (vfm,), (mapper,), draws = trainer.alignment.features, trainer.alignment.mappers, draws_for(3)
    features = normal(17, 3, vfm.grid**2, vfm.width).float()
    with torch.no_grad():
        scores = trainer.alignment.scores(Posterior(mean, logvar), trainer.statistics, [features], draws)
        z = mean + torch.exp(logvar / 2) * draws.posterior
        if align_loss == "cosine":
            mean, z = (
                (v - trainer.statistics.mean.view(4, 1, 1)) / trainer.statistics.std.view(4, 1, 1) for v in (mean, z)
            )
            t = draws.times.view(3, 1, 1, 1)
            z = (1 - t) * z + t * draws.noise
        tokens = {"align_cosine": mapper(z).double(), "align_cosine_clean": mapper(mean).double()}
    assert scores.keys() == tokens.keys() == set(trainer.alignment.score_names)
    for name, predicted in tokens.items():
        cosine = (predicted * features).sum(-1) / predicted.norm(dim=-1) / features.double().norm(dim=-1)
        (score,) = scores[name]
        torch.testing.assert_close(score.double(), cosine.mean(1), rtol=0, atol=1e-6)


@pytest.mark.parametrize("by_batch", [False, True])
def test_what_a_larger_latent_gains_under_noise(by_batch):
    """With running statistics a finer prediction: the loss falls with the scale. With the batch's own, nothing."""
    trainer = tiny_trainer()
    alignment = trainer.alignment.train()
    alignment.by_batch = by_batch
    (vfm,), draws = alignment.features, draws_for(3)
    latent, features = normal(15, 3, *LATENT).float(), [normal(17, 3, vfm.grid**2, vfm.width).float()]
    scale = torch.ones((), requires_grad=True)
    seen = alignment.noisy(scale * latent, trainer.statistics, draws)
    signal = ((seen * latent).sum() / latent.norm()).abs()
    (of_signal,) = torch.autograd.grad(signal, scale, retain_graph=True)
    loss = alignment(scale * latent, trainer.statistics, features, torch.zeros(3), draws)["alignment"]
    (of_loss,) = torch.autograd.grad(loss, scale)
    if by_batch:
        t = draws.times.view(3, 1, 1, 1)
        mean, var = (
            latent.double().mean((0, 2, 3), keepdim=True),
            latent.double().var((0, 2, 3), keepdim=True, correction=0),
        )
        expected = (1 - t) * (latent - mean) / (var + 1e-4).sqrt() + t * draws.noise
        torch.testing.assert_close(seen.double(), expected.double(), rtol=0, atol=1e-5)
        assert abs(of_signal) < 1e-2 * signal
        assert abs(of_loss) < 1e-4
        running = trainer.statistics.normalize(latent)
        alignment.eval()  # validation goes by what a denoiser will be given
        t = draws.times.view(3, 1, 1, 1)
        expected = (1 - t) * running + t * draws.noise
        torch.testing.assert_close(alignment.noisy(latent, trainer.statistics, draws), expected)
    else:
        assert of_signal > 0.1 * signal
        assert abs(of_loss) > 1e-4


# --- its flags --------------------------------------------------------------------------------------------------------


def settled(**given) -> argparse.Namespace:
    """Flags of the mapper after ``--align-loss cosine`` or another one was chosen."""
    flags = {name: None for kind in TOKENIZER_ALIGNMENTS.values() for name in kind.DEFAULTS}
    args = argparse.Namespace(**flags | given)
    settle_arguments(args, [args.align_loss], TOKENIZER_ALIGNMENTS, "--align-loss")
    return args


def test_flags_of_the_chosen_alignment_get_their_defaults_and_those_of_another_are_refused():
    args = settled(align_loss="cosine")
    assert (args.mapper_depth, args.mapper_width, args.noise_injection) == (1, 2048, True)
    args = settled(align_loss="cosine", mapper_depth=0, noise_injection=False)
    assert (args.mapper_depth, args.noise_injection) == (0, False)
    for flag, value in (("mapper_depth", 0), ("mapper_depth", 2), ("mapper_head", "conv"), ("noise_max", 0.5)):
        with pytest.raises(
            UserError, match=rf"--{flag.replace('_', '-')} belongs to --align-loss cosine, not to .* vf"
        ):
            settled(align_loss="vf", **{flag: value})
    assert settled(align_loss="vf", noise_injection=False).mapper_depth is None  # a switch that is off asks for nothing
    for flag in ("vf_weight", "vf_cosine_margin", "vf_distance_margin"):
        with pytest.raises(UserError, match=f"--{flag.replace('_', '-')} belongs to --align-loss vf, not to .* cosine"):
            settled(align_loss="cosine", **{flag: 0.2})


def test_a_weight_of_0_of_another_alignment_asks_for_nothing():
    flags = {name: None for kind in DENOISER_ALIGNMENTS.values() for name in kind.DEFAULTS}
    settle_arguments(argparse.Namespace(**flags | {"proj_coeff": 0.0}), [], DENOISER_ALIGNMENTS, "--align")
    shared = argparse.Namespace(**flags | {"encoder_depth": 3})
    settle_arguments(shared, ["irepa"], DENOISER_ALIGNMENTS, "--align")
    assert (shared.encoder_depth, shared.projector_width) == (3, None)
    for flag, chosen in (("encoder_depth", "vae"), ("projector_width", "irepa")):
        with pytest.raises(UserError, match=f"--{flag.replace('_', '-')} belongs to --align repa, not to .* {chosen}"):
            settle_arguments(argparse.Namespace(**flags | {flag: 4}), [chosen], DENOISER_ALIGNMENTS, "--align")
    with pytest.raises(UserError, match="--proj-coeff belongs to --align repa, not to --align none"):
        settle_arguments(argparse.Namespace(**flags | {"proj_coeff": 0.1}), [], DENOISER_ALIGNMENTS, "--align")


def test_a_flag_whose_default_is_the_parser_s_is_not_taken_for_given(monkeypatch):
    """A method of one's own need not know that its flags should default to None."""

    class Own(TokenizerAlignmentFlags):
        DEFAULTS: ClassVar = {"own_weight": 0.3}

        @classmethod
        def add_arguments(cls, group):
            group.add_argument("--own-weight", type=float, default=0.3)

    monkeypatch.setitem(TOKENIZER_ALIGNMENTS, "own", Own)
    assert train_sendvae.parse_arguments(["--dry-run"]).align_loss == "cosine"
    assert train_sendvae.parse_arguments(["--dry-run", "--align-loss", "own"]).own_weight == 0.3
    with pytest.raises(UserError, match="--own-weight belongs to --align-loss own, not to --align-loss cosine"):
        train_sendvae.parse_arguments(["--dry-run", "--own-weight", "0.4"])
