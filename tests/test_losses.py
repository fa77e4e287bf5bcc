"""Every term of the VAE objective against an independent float64 derivation, its weights, and who is trained by it."""

import math
import pickle
from pathlib import Path

import lpips
import pytest
import torch
import torch.nn.functional as F
import torchvision

from errors import UserError
from formats.vae import load_tokenizer
from loss.adversarial import LeCam, adaptive_weight, generator_loss, hinge_discriminator_loss
from loss.perceptual import DisjointMaxPool, build_lpips
from loss.reconstruction import reconstruction_loss
from loss.total import joined, total
from loss.vae_objective import VAELossConfig, VAEObjective, gradient_at, load_loss_config
from models.discriminator import DiscriminatorPair, PatchDiscriminator
from models.mapper import Mapper
from models.pixels import to_signed
from models.tokenizers.posterior import Posterior

CONFIGS = Path(__file__).resolve().parent.parent / "configs"


def normal(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# --- pixels and KL ----------------------------------------------------------------------------------------------------


def test_l1_and_l2_are_means_over_all_elements():
    x, y = normal(0, 2, 3, 4, 5), normal(1, 2, 3, 4, 5)
    differences = [a - b for a, b in zip(x.flatten().tolist(), y.flatten().tolist(), strict=True)]
    l1, l2 = sum(abs(d) for d in differences) / 120, sum(d * d for d in differences) / 120
    assert reconstruction_loss(x, y).item() == pytest.approx(l1, rel=1e-6)  # the default
    assert reconstruction_loss(x, y, "l1").item() == pytest.approx(l1, rel=1e-6)
    assert reconstruction_loss(x, y, "l2").item() == pytest.approx(l2, rel=1e-6)


def test_kl_is_the_divergence_from_a_standard_normal_summed_over_the_latent():
    mean, logvar = normal(2, 3, 4, 2, 2), normal(3, 3, 4, 2, 2)
    posterior = torch.distributions.Normal(mean, (logvar / 2).exp())
    expected = torch.distributions.kl_divergence(posterior, torch.distributions.Normal(0.0, 1.0)).sum() / 3
    assert Posterior(mean, logvar).regulariser().keys() == {"kl"}
    assert Posterior(mean, logvar).regulariser()["kl"].item() == pytest.approx(expected.item(), rel=1e-6)
    ones, zeros = torch.ones(2, 4, 3, 3), torch.zeros(2, 4, 3, 3)
    assert Posterior(zeros, zeros).regulariser()["kl"].item() == 0.0
    assert Posterior(ones, zeros).regulariser()["kl"].item() == pytest.approx(0.5 * 36)


# --- GAN --------------------------------------------------------------------------------------------------------------


def test_generator_loss_is_minus_the_mean_logit():
    logits = normal(4, 2, 1, 3, 3)
    assert generator_loss(logits).item() == pytest.approx(-sum(logits.flatten().tolist()) / 18, rel=1e-5)


def test_hinge_loss():
    real, fake = normal(5, 2, 1, 3, 3) * 2, normal(6, 2, 1, 5, 5) * 2  # means are taken apart
    expected = sum(max(0, 1 - r) for r in real.flatten().tolist()) / 18
    expected = 0.5 * (expected + sum(max(0, 1 + f) for f in fake.flatten().tolist()) / 50)
    assert hinge_discriminator_loss(real, fake).item() == pytest.approx(expected, rel=1e-6)


def test_hinge_loss_at_its_corners():
    one, zero = torch.ones(1), torch.zeros(1)
    assert hinge_discriminator_loss(one, -one).item() == 0.0
    assert hinge_discriminator_loss(5 * one, -5 * one).item() == 0.0
    assert hinge_discriminator_loss(zero, zero).item() == 1.0
    assert hinge_discriminator_loss(-one, zero).item() == 1.5


def test_lecam_holds_logits_to_the_running_means_of_the_other_kind():
    lecam = LeCam(decay=0.9)
    real, fake = normal(7, 4, 1, 2, 2) + 1, normal(8, 4, 1, 2, 2) - 1
    m_real = m_fake = 0.0
    for step in range(3):
        r, f = (real + step).flatten().tolist(), (fake - step).flatten().tolist()
        above = sum(max(0, x - m_fake) ** 2 for x in r) / 16
        below = sum(max(0, m_real - x) ** 2 for x in f) / 16
        assert lecam(real + step, fake - step).item() == pytest.approx(above + below, rel=1e-5)
        lecam.update((real + step).mean(), (fake - step).mean())
        m_real, m_fake = 0.9 * m_real + 0.1 * sum(r) / 16, 0.9 * m_fake + 0.1 * sum(f) / 16
    assert (lecam.real_mean.item(), lecam.fake_mean.item()) == pytest.approx((m_real, m_fake), rel=1e-5)


def test_lecam_anchors_ignore_what_is_not_finite_and_are_saved():
    lecam = LeCam(decay=0.5)
    lecam.update(torch.tensor(2.0), torch.tensor(-4.0))
    lecam.update(torch.tensor(float("nan")), torch.tensor(float("inf")))
    assert (lecam.real_mean.item(), lecam.fake_mean.item()) == (1.0, -2.0)
    assert set(lecam.state_dict()) == {"real_mean", "fake_mean"}


def test_lecam_forward_moves_no_anchor():
    lecam = LeCam()
    lecam(torch.ones(2), torch.ones(2))
    assert lecam.real_mean.item() == lecam.fake_mean.item() == 0.0


@pytest.mark.parametrize(("numerator", "denominator"), [(3.0, 2.0), (0.0, 2.0), (3.0, 0.0), (1.0, 1e-5)])
def test_adaptive_weight_is_the_ratio_of_norms_up_to_1e4(numerator, denominator):
    a, b = torch.tensor([numerator, 0.0, 0.0]), torch.tensor([0.0, -denominator])
    expected = min(numerator / (denominator + 1e-4), 1e4)
    assert adaptive_weight(a, b).item() == pytest.approx(expected, rel=1e-5)


# --- LPIPS ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def lpips_network():
    torch.manual_seed(9)
    return build_lpips(random_weights=True)


def lpips_by_hand(network: torch.nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Zhang et al., equation 1, from VGG16's thirteen convolutions and five linear heads, in float64."""
    state = {k: v.double() for k, v in network.state_dict().items()}
    weights = [v for k, v in state.items() if k.startswith("net.") and k.endswith("weight")]
    biases = [v for k, v in state.items() if k.startswith("net.") and k.endswith("bias")]
    heads = [state[f"lin{i}.model.1.weight"].flatten() for i in range(5)]
    shift = torch.tensor([-0.030, -0.088, -0.188]).float().double().view(3, 1, 1)
    scale = torch.tensor([0.458, 0.448, 0.450]).float().double().view(3, 1, 1)
    assert len(weights) == len(biases) == 13
    a, b, distance, layer = (x - shift) / scale, (y - shift) / scale, 0.0, 0
    for level, convolutions in enumerate((2, 2, 3, 3, 3)):
        if level:
            a, b = F.max_pool2d(a, 2), F.max_pool2d(b, 2)
        for _ in range(convolutions):
            a, b = (F.conv2d(v, weights[layer], biases[layer], padding=1).clamp_min(0) for v in (a, b))
            layer += 1
        u, v = (f / (f.square().sum(1, keepdim=True).sqrt() + 1e-10) for f in (a, b))
        distance = distance + ((u - v).square() * heads[level].view(1, -1, 1, 1)).sum(1).mean((1, 2))
    return distance


def test_lpips_is_its_definition(lpips_network):
    x, y = normal(10, 2, 3, 32, 48).clamp(-1, 1), normal(11, 2, 3, 32, 48).clamp(-1, 1)
    expected = lpips_by_hand(lpips_network, x, y)
    with torch.no_grad():
        distance = lpips_network(x.float(), y.float())
    assert distance.shape == (2, 1, 1, 1)
    assert expected.min() > 1e-3
    torch.testing.assert_close(distance.flatten().double(), expected, rtol=1e-4, atol=1e-7)


def test_lpips_has_trained_heads_is_frozen_and_passes_gradient(lpips_network):
    heads = torch.cat([lpips_network.state_dict()[f"lin{i}.model.1.weight"].flatten() for i in range(5)])
    assert heads.numel() == 64 + 128 + 256 + 512 + 512
    assert heads.min() >= 0  # v0.1's are trained to be non-negative; PyTorch's start is not
    assert not any(p.requires_grad for p in lpips_network.parameters())
    assert not any(m.training for m in lpips_network.modules())
    x = normal(12, 1, 3, 32, 32).float().requires_grad_()
    lpips_network(normal(13, 1, 3, 32, 32).float(), x).sum().backward()
    assert x.grad.isfinite().all()
    assert x.grad.abs().max() > 0


@pytest.fixture(scope="module")
def vgg16_state():
    """A state dict in the layout of torchvision's VGG16, random, its classifier cut short."""
    layers = torchvision.models.vgg.make_layers(torchvision.models.vgg.cfgs["D"])
    state = {f"features.{k}": v for k, v in layers.state_dict().items()}
    assert len(state) == 26
    return state | {"classifier.6.bias": torch.zeros(1000)}


def test_a_torchvision_file_becomes_the_trunk(vgg16_state, tmp_path):
    torch.save(vgg16_state, tmp_path / "vgg16.pth")
    network = build_lpips(checkpoint=str(tmp_path / "vgg16.pth"))
    trunk = list(network.net.parameters())
    assert len(trunk) == 26
    for i, tensor in enumerate(list(vgg16_state.values())[:26]):
        assert torch.equal(trunk[i], tensor)
    x, y = normal(14, 1, 3, 32, 32), normal(15, 1, 3, 32, 32)
    torch.testing.assert_close(
        network(x.float(), y.float()).flatten().double(), lpips_by_hand(network, x, y), rtol=1e-4, atol=1e-7
    )


class Opens:
    """Unpickling this creates a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


BAD_VGG_FILES = {
    "no such file": lambda path, state: None,
    "text": lambda path, state: path.write_text("not weights\n"),
    "empty": lambda path, state: path.write_bytes(b""),
    "list": lambda path, state: torch.save([1], path),
    "tensor": lambda path, state: torch.save(torch.zeros(3), path),
    "number": lambda path, state: torch.save(7, path),
    "numbers under the right names": lambda path, state: torch.save(dict.fromkeys(state, 1), path),
    "another network": lambda path, state: torch.save({"weight": torch.zeros(2)}, path),
    "another shape": lambda path, state: torch.save(state | {"features.28.weight": torch.zeros(2)}, path),
    "code": lambda path, state: path.write_bytes(pickle.dumps(Opens(path.parent / "was_run"), protocol=2)),
}


@pytest.mark.parametrize("kind", BAD_VGG_FILES)
def test_a_file_that_is_not_vgg16_is_a_one_line_error(kind, vgg16_state, lpips_network, tmp_path, monkeypatch):
    monkeypatch.setattr(lpips, "LPIPS", lambda **_: lpips_network)  # building it anew takes seconds
    path = tmp_path / "vgg16.pth"
    BAD_VGG_FILES[kind](path, vgg16_state)
    with pytest.raises(UserError) as error:
        build_lpips(checkpoint=str(path))
    assert "\n" not in str(error.value)
    assert f"--lpips-ckpt {path}" in str(error.value)
    assert not (tmp_path / "was_run").exists()


def test_without_vgg16_the_error_says_how_to_get_it_or_do_without(lpips_network, tmp_path, monkeypatch):
    def no_network(*_, **__):
        raise OSError("Name or service not known")

    monkeypatch.setattr(lpips, "LPIPS", lambda **_: lpips_network)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", no_network)
    with pytest.raises(UserError) as error:
        build_lpips()
    assert "\n" not in str(error.value)
    for words in ("--lpips-ckpt", "perceptual_weight: 0", "vgg16-397923af.pth", str(tmp_path)):
        assert words in str(error.value)


# --- configuration ----------------------------------------------------------------------------------------------------


def test_the_default_configuration_is_the_methods():
    config = load_loss_config(CONFIGS / "l1_lpips_kl_gan.yaml")
    assert config == VAELossConfig()
    assert (config.reconstruction_loss, config.reconstruction_weight, config.perceptual_weight) == ("l1", 1.0, 1.0)
    assert (config.kl_weight, config.discriminator_weight, config.discriminator_start) == (1e-6, 0.1, 0)
    assert (config.adaptive_discriminator_weight, config.lecam_regularization_weight) == (False, 0.0)


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("l[12]_*.yaml")), ids=lambda path: path.stem)
def test_every_loss_configuration_keeps_the_promise_of_its_name(path):
    config = load_loss_config(path)
    assert config.reconstruction_loss == path.stem.split("_")[0]
    assert (config.perceptual_weight > 0) == ("lpips" in path.stem)
    assert config.uses_gan == ("gan" in path.stem)
    assert config.kl_weight == (1e-6 if "kl" in path.stem else 0)
    assert (config.vfm_of_discriminator is not None) == ("dino" in path.stem)


def test_repa_es_file_is_read(tmp_path):
    path = tmp_path / "loss.yaml"
    path.write_text(
        "model:\n  vq_model:\n    quantize_mode: vae\n"
        "losses:\n  discriminator_start: 5\n  quantizer_weight: 1.0\n  perceptual_loss: lpips\n"
        "  perceptual_weight: 0.5\n  reconstruction_loss: l2\n  kl_weight: 1e-5\n  logvar_init: 0.0\n"
        "  lecam_regularization_weight: 0.001\n  discriminator_factor: 2.0\n"
    )
    assert load_loss_config(path) == VAELossConfig(
        discriminator_start=5,
        perceptual_weight=0.5,
        reconstruction_loss="l2",
        kl_weight=1e-5,
        lecam_regularization_weight=0.001,
        discriminator_factor=2.0,
    )


def test_overrides_win_over_the_file():
    config = load_loss_config(
        CONFIGS / "l1_lpips_kl_gan.yaml",
        ["perceptual_weight=0", "kl_weight=1e-7", "adaptive_discriminator_weight=true", "reconstruction_loss=l2"],
    )
    assert config == VAELossConfig(
        perceptual_weight=0.0, kl_weight=1e-7, adaptive_discriminator_weight=True, reconstruction_loss="l2"
    )


def test_an_empty_file_means_the_defaults(tmp_path):
    (tmp_path / "loss.yaml").write_text("# nothing\n")
    assert load_loss_config(tmp_path / "loss.yaml") == VAELossConfig()


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("kl_wieght: 1", "kl_wieght"),
        ("1: 2", "1"),
        ("kl_weight: much", "kl_weight"),
        ("kl_weight: [1]", "kl_weight"),
        ("kl_weight:", "kl_weight"),
        ("kl_weight: true", "kl_weight"),
        ("kl_weight: -1", "kl_weight"),
        ("kl_weight: .nan", "kl_weight"),
        ("kl_weight: .inf", "kl_weight"),
        ("discriminator_start: 1.5", "discriminator_start"),
        ("discriminator_start: .inf", "discriminator_start"),
        ("discriminator_start: .nan", "discriminator_start"),
        ("discriminator_start: true", "discriminator_start"),
        ("adaptive_discriminator_weight: 1", "adaptive_discriminator_weight"),
        ("adaptive_discriminator_weight: 'yes'", "adaptive_discriminator_weight"),
        ("reconstruction_loss: l3", "l3"),
        ("reconstruction_loss: [l1]", "reconstruction_loss"),
        ("perceptual_loss: dists", "dists"),
        ("just words", "loss.yaml"),
        ("- a list", "loss.yaml"),
        ("losses:", "loss.yaml"),
        ("losses: 3", "loss.yaml"),
        ("a: [", "loss.yaml"),
        ("\x00", "loss.yaml"),
    ],
)
def test_a_bad_configuration_is_a_one_line_error(tmp_path, text, word):
    (tmp_path / "loss.yaml").write_text(text + "\n")
    with pytest.raises(UserError) as error:
        load_loss_config(tmp_path / "loss.yaml")
    assert "\n" not in str(error.value)
    assert word in str(error.value)


@pytest.mark.parametrize("override", ["kl_weight", "kl_weight=[", "kl_wieght=1", "kl_weight=a\nb", "=1"])
def test_a_bad_override_is_a_one_line_error(override):
    with pytest.raises(UserError) as error:
        load_loss_config(CONFIGS / "l1_kl.yaml", [override])
    assert "\n" not in str(error.value)
    assert "loss" in str(error.value)


def test_a_missing_or_binary_configuration_is_a_one_line_error(tmp_path):
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\xfa")
    for path in (tmp_path / "none.yaml", tmp_path, tmp_path / "binary.yaml"):
        with pytest.raises(UserError, match="--loss-cfg-path"):
            load_loss_config(path)


# --- the objective ----------------------------------------------------------------------------------------------------


class Parts:
    """A tiny VAE, mapper and discriminator, one batch and its forward pass."""

    def __init__(self, seed: int = 20):
        torch.manual_seed(seed)
        self.vae = load_tokenizer("f4d4-tiny", "none")[0].train()
        self.discriminator = PatchDiscriminator(width=8)
        self.mapper = Mapper(4, 8, 4, 16, projector_width=32)
        images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
        self.images = to_signed(images)
        self.posterior = self.vae.encode(images)
        self.reconstruction = self.vae.decode(self.posterior.sample(torch.randn(2, 4, 8, 8)))

    def terms(self, objective: VAEObjective, gan: bool = True) -> dict[str, torch.Tensor]:
        self.discriminator.requires_grad_(False)
        discriminator = self.discriminator if gan else None
        return objective.generator_terms(self.images, self.reconstruction, self.posterior.regulariser(), discriminator)

    def weights(self, objective: VAEObjective, terms: dict[str, torch.Tensor]) -> dict[str, float | torch.Tensor]:
        """As one process calls it."""
        return objective.generator_weights(terms, self.vae.network.decoder.conv_out.weight, gradient_at)

    def trained(self) -> set[str]:
        """Which parts hold a gradient other than zero."""
        network = self.vae.network
        parts = {
            "encoder": [*network.encoder.parameters(), *network.quant_conv.parameters()],
            "decoder": [*network.decoder.parameters(), *network.post_quant_conv.parameters()],
            "mapper": self.mapper.parameters(),
            "discriminator": self.discriminator.parameters(),
            "statistics": self.vae.statistics.buffers(),
        }
        return {k for k, v in parts.items() if any(t.grad is not None and t.grad.abs().max() > 0 for t in v)}


def mean_distance(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Stands in for LPIPS, with its shape."""
    return (x - y).square().mean((1, 2, 3), keepdim=True)


mean_distance_module = torch.nn.Module()
mean_distance_module.forward = mean_distance


def test_the_terms_are_unweighted_and_the_weights_applied_once():
    config = VAELossConfig(
        reconstruction_weight=2.0,
        perceptual_weight=3.0,
        kl_weight=0.5,
        discriminator_weight=0.7,
        discriminator_factor=0.4,
    )
    parts, objective = Parts(), VAEObjective(config, mean_distance_module)
    terms = parts.terms(objective)
    weights = parts.weights(objective, terms)
    assert set(terms) == {"reconstruction", "perceptual", "kl", "gan"}
    x, y = parts.images.double(), parts.reconstruction.detach().double()
    mean, logvar = parts.posterior.mean.detach().double(), parts.posterior.logvar.detach().double()
    by_hand = {
        "reconstruction": (x - y).abs().mean().item(),
        "perceptual": (x - y).square().mean().item(),
        "kl": 0.5 * (mean**2 + logvar.exp() - 1 - logvar).sum().item() / 2,
        "gan": -parts.discriminator.double()(y).mean().item(),
    }
    for name, value in by_hand.items():
        assert terms[name].shape == ()
        assert terms[name].item() == pytest.approx(value, rel=1e-4), name
    expected = 2 * by_hand["reconstruction"] + 3 * by_hand["perceptual"] + 0.5 * by_hand["kl"] + 0.28 * by_hand["gan"]
    assert total(terms, weights).item() == pytest.approx(expected, rel=1e-5)


def test_terms_without_a_part_in_the_loss_are_left_out():
    parts, objective = Parts(), VAEObjective(VAELossConfig(perceptual_weight=0.0), None)
    terms = parts.terms(objective, gan=False)
    assert set(terms) == {"reconstruction", "kl"}
    assert parts.weights(objective, terms) == {"reconstruction": 1.0, "kl": 1e-6}


def test_what_a_tokenizer_has_beside_kl_counts_once():
    parts, objective = Parts(), VAEObjective(VAELossConfig(perceptual_weight=0.0), None)
    terms = objective.generator_terms(parts.images, parts.reconstruction, {"commitment": torch.tensor(3.0)})
    assert set(terms) == {"reconstruction", "commitment"}
    assert parts.weights(objective, terms) == {"reconstruction": 1.0, "commitment": 1.0}


def test_fidelity_is_the_weighted_pixel_terms():
    terms = {"reconstruction": torch.tensor(2.0), "perceptual": torch.tensor(5.0), "kl": torch.tensor(7.0)}
    config = VAELossConfig(reconstruction_weight=0.5, perceptual_weight=3.0)
    assert VAEObjective(config, mean_distance_module).fidelity(terms).item() == 0.5 * 2 + 3 * 5
    del terms["perceptual"]
    assert VAEObjective(VAELossConfig(perceptual_weight=0.0), None).fidelity(terms).item() == 2.0


def test_a_term_without_a_weight_is_an_error():
    with pytest.raises(ValueError, match="no weight for new; there are weights for old"):
        total({"new": torch.ones(())}, {"old": 1.0})


def test_a_term_s_name_is_its_own():
    """An alignment that calls its term as another part does would replace it."""
    assert joined({"denoise": 1}, {"repa": 2}) == {"denoise": 1, "repa": 2}
    with pytest.raises(ValueError, match="two parts of the loss have a term repa"):
        joined({"denoise": 1, "repa": 2}, {"repa": 3})


def test_lpips_must_be_there_where_it_is_weighted_and_is_not_run_where_not(lpips_network):
    with pytest.raises(ValueError, match="perceptual"):
        VAEObjective(VAELossConfig(), None)
    assert VAEObjective(VAELossConfig(perceptual_weight=0.0), lpips_network).perceptual is None


def test_the_perceptual_term_is_lpips_over_the_batch(lpips_network):
    parts, objective = Parts(), VAEObjective(VAELossConfig(discriminator_weight=0.0), lpips_network)
    expected = lpips_by_hand(lpips_network, parts.images.double(), parts.reconstruction.detach().double()).mean()
    assert parts.terms(objective, gan=False)["perceptual"].item() == pytest.approx(expected.item(), rel=1e-4)


@pytest.mark.parametrize(
    ("config", "step", "active"),
    [
        (VAELossConfig(), 0, True),
        (VAELossConfig(discriminator_start=10), 9, False),
        (VAELossConfig(discriminator_start=10), 10, True),
        (VAELossConfig(discriminator_weight=0.0), 10, False),
        (VAELossConfig(discriminator_factor=0.0), 10, False),
    ],
)
def test_the_gan_starts_at_its_step(config, step, active):
    assert VAEObjective(config, mean_distance_module).gan_active(step) == active


def test_the_adaptive_weight_compares_gradients_at_the_decoders_last_layer():
    config = VAELossConfig(perceptual_weight=3.0, adaptive_discriminator_weight=True, discriminator_weight=0.1)
    parts, objective = Parts(), VAEObjective(config, mean_distance_module)
    terms = parts.terms(objective)
    weight = parts.weights(objective, terms)["gan"]
    layer = parts.vae.network.decoder.conv_out.weight
    assert parts.vae.decoder_last_layer is layer
    fidelity = torch.autograd.grad(terms["reconstruction"] + 3 * terms["perceptual"], layer, retain_graph=True)[0]
    gan = torch.autograd.grad(terms["gan"], layer, retain_graph=True)[0]
    expected = 0.1 * fidelity.double().norm() / (gan.double().norm() + 1e-4)
    assert weight.item() == pytest.approx(expected.item(), rel=1e-5)
    assert not weight.requires_grad
    total(terms, parts.weights(objective, terms)).backward()  # the graph is still there
    assert parts.trained() == {"encoder", "decoder"}


def test_the_adaptive_weight_is_of_the_reduced_gradients():
    config = VAELossConfig(perceptual_weight=0.0, adaptive_discriminator_weight=True, discriminator_weight=1.0)
    parts, objective = Parts(), VAEObjective(config, None)
    terms = parts.terms(objective)
    layer = parts.vae.decoder_last_layer
    reduced, asked = iter([torch.full((3,), 2.0), torch.full((3,), 0.5)]), []

    def gradient(loss: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
        asked.append((loss.item(), parameter is layer))
        return next(reduced)

    weight = objective.generator_weights(terms, layer, gradient)["gan"]
    assert asked == [(terms["reconstruction"].item(), True), (terms["gan"].item(), True)]
    assert weight.item() == pytest.approx(2 * math.sqrt(3) / (0.5 * math.sqrt(3) + 1e-4), rel=1e-6)


def test_a_gradient_at_a_layer_keeps_the_graph_and_is_that_of_the_unscaled_loss():
    layer = torch.nn.Parameter(torch.tensor([2.0, -3.0]))
    loss = layer.pow(3).sum()
    for scaler in (None, torch.amp.GradScaler("cpu", init_scale=2.0**10)):
        assert gradient_at(loss, layer, scaler).tolist() == [12.0, 27.0]
    assert layer.grad is None
    small = layer.half().float().sum() * 2.0**-30  # its gradient passes through float16, where that is 0
    assert gradient_at(small, layer).tolist() == [0.0, 0.0]
    assert gradient_at(small, layer, torch.amp.GradScaler("cpu", init_scale=2.0**16)).tolist() == [2.0**-30] * 2
    loss.backward()
    assert layer.grad.tolist() == [12.0, 27.0]


def test_the_judges_of_a_reconstruction_are_gone_through_backwards_once():
    """LPIPS and discriminator: value and gradients of the plain sum, whoever asks for them and how often."""
    config = VAELossConfig(perceptual_weight=3.0, discriminator_weight=0.1, adaptive_discriminator_weight=True)
    objective, passes, results = VAEObjective(config, build_lpips(random_weights=True, net="alex")), [], []
    for plainly in (True, False):
        parts = Parts()
        images = F.interpolate(parts.images, scale_factor=2)
        reconstruction = F.interpolate(parts.reconstruction, scale_factor=2)
        parts.discriminator.requires_grad_(False)
        if plainly:
            terms = {
                "reconstruction": (images - reconstruction).abs().mean(),
                "perceptual": objective.perceptual(images, reconstruction).mean(),
                "gan": -parts.discriminator(reconstruction).mean(),
            }
        else:
            for network in (objective.perceptual, parts.discriminator):
                network.register_forward_hook(lambda _, __, output: output.register_hook(passes.append) and None)
            terms = objective.generator_terms(images, reconstruction, {}, parts.discriminator)
        weights = parts.weights(objective, terms)
        total(terms, weights).backward()
        gradients = [parameter.grad for parameter in parts.vae.network.parameters()]
        results.append([*terms.values(), weights["gan"], *gradients])
    assert len(passes) == 2
    for plain, other in zip(*results, strict=True):
        torch.testing.assert_close(other, plain, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize(
    ("term", "trained"),
    [
        ("reconstruction", {"encoder", "decoder"}),
        ("perceptual", {"encoder", "decoder"}),
        ("kl", {"encoder"}),
        ("gan", {"encoder", "decoder"}),
    ],
)
def test_which_parts_each_generator_term_trains(term, trained):
    parts, objective = Parts(), VAEObjective(VAELossConfig(), mean_distance_module)
    parts.terms(objective)[term].backward()
    assert parts.trained() == trained


def test_the_perceptual_network_gets_no_gradient(lpips_network):
    parts, objective = Parts(), VAEObjective(VAELossConfig(), lpips_network)
    parts.terms(objective)["perceptual"].backward()
    assert parts.trained() == {"encoder", "decoder"}
    assert all(p.grad is None for p in lpips_network.parameters())


def test_the_discriminators_loss_trains_the_discriminator_alone():
    parts = Parts()
    objective = VAEObjective(VAELossConfig(lecam_regularization_weight=0.1), mean_distance_module)
    logits = DiscriminatorPair(parts.discriminator)(parts.images, parts.reconstruction.detach())
    total(objective.discriminator_terms(*logits), objective.discriminator_weights()).backward()
    assert parts.trained() == {"discriminator"}
    assert all(p.grad is not None for p in parts.discriminator.parameters())


def test_the_discriminators_total_is_hinge_times_factor_plus_weighted_lecam():
    config = VAELossConfig(discriminator_factor=2.0, lecam_regularization_weight=0.3, discriminator_weight=0.1)
    objective = VAEObjective(config, mean_distance_module)
    objective.lecam.real_mean.fill_(0.5)
    objective.lecam.fake_mean.fill_(-0.25)
    real, fake = normal(21, 2, 1, 3, 3), normal(22, 2, 1, 3, 3)
    hinge = 0.5 * ((1 - real).clamp_min(0).mean() + (1 + fake).clamp_min(0).mean())
    lecam = (real + 0.25).clamp_min(0).square().mean() + (0.5 - fake).clamp_min(0).square().mean()
    terms = objective.discriminator_terms(real, fake)
    assert total(terms, objective.discriminator_weights()).item() == pytest.approx(
        (2 * hinge + 0.3 * lecam).item(), rel=1e-5
    )


def test_without_lecam_there_is_one_discriminator_term_and_no_state():
    objective = VAEObjective(VAELossConfig(), mean_distance_module)
    assert set(objective.discriminator_terms(torch.ones(2), torch.ones(2))) == {"discriminator"}
    assert objective.discriminator_weights() == {"discriminator": 1.0}
    assert objective.lecam is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_terms_of_half_precision_inputs_are_float32(dtype):
    real, fake = normal(23, 4).to(dtype), normal(24, 4).to(dtype)
    images = normal(25, 1, 3, 4, 4).to(dtype)
    for value in (
        hinge_discriminator_loss(real, fake),
        generator_loss(fake),
        LeCam()(real, fake),
        reconstruction_loss(images, -images),
    ):
        assert value.dtype == torch.float32
        assert value.isfinite()


@pytest.mark.parametrize("shape", [(2, 3, 8, 8), (1, 2, 7, 9)])
def test_deterministic_pooling_is_max_pooling(shape):
    """Values and gradients bit for bit, also where several values are the largest."""
    x = torch.randint(-2, 3, shape, generator=torch.Generator().manual_seed(0)).float()
    results = []
    for pool in (DisjointMaxPool(), torch.nn.MaxPool2d(2)):
        given = x.clone().requires_grad_()
        pooled = pool(given)
        (gradient,) = torch.autograd.grad((pooled * torch.arange(pooled.numel()).view_as(pooled)).sum(), given)
        results.append((pooled, gradient))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])


def test_lpips_pools_deterministically_where_that_is_asked_for():
    """The same distance and gradient; torch refuses its own max pooling on CUDA then."""
    x, y = torch.rand(2, 1, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    results = []
    for strict in (False, True):
        torch.manual_seed(0)
        torch.use_deterministic_algorithms(strict)
        try:
            network = build_lpips(random_weights=True)
        finally:
            torch.use_deterministic_algorithms(False)
        assert any(isinstance(module, torch.nn.MaxPool2d) for module in network.modules()) != strict
        given = x.clone().requires_grad_()
        distance = network(given, y)
        results.append((distance, *torch.autograd.grad(distance.sum(), given)))
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))
