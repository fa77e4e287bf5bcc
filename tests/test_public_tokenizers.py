"""Frozen public tokenizers of diffusers that are no AutoencoderKL: Qwen-Image's, FLUX.2's and RAE's, random weights.

What diffusers' classes and pipelines compute is written out here; folders are written by diffusers, as on the hub.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import cache_latents
import evaluate
import export_vae
import generate
import probe
import train_ldm
import train_repae
import train_sendvae
from dataset.images import open_images
from dataset.toy import main as make_toy
from errors import UserError
from formats.vae import load_tokenizer, load_vae
from models.tokenizers import tokenizer_kind
from runtime.cli import EXIT_USER_ERROR, run
from tests.command_line import argv_of
from tests.public_vae import randomised

QWEN, FLUX2, RAE = "AutoencoderKLQwenImage", "AutoencoderKLFlux2", "AutoencoderRAE"
DOWN, UP = "DownEncoderBlock2D", "UpDecoderBlock2D"

# config.json of Qwen/Qwen-Image, black-forest-labs/FLUX.2-dev, and RAE's DINOv2-B with a ViT-XL decoder
REAL = {
    QWEN: {
        "base_dim": 96,
        "z_dim": 16,
        "dim_mult": [1, 2, 4, 4],
        "num_res_blocks": 2,
        "attn_scales": [],
        "temperal_downsample": [False, True, True],
        "dropout": 0.0,
    },
    FLUX2: {
        "in_channels": 3,
        "out_channels": 3,
        "down_block_types": [DOWN] * 4,
        "up_block_types": [UP] * 4,
        "block_out_channels": [128, 256, 512, 512],
        "layers_per_block": 2,
        "latent_channels": 32,
        "norm_num_groups": 32,
        "sample_size": 1024,
        "use_quant_conv": True,
        "use_post_quant_conv": True,
        "mid_block_add_attention": True,
        "batch_norm_eps": 1e-4,
        "batch_norm_momentum": 0.1,
        "patch_size": [2, 2],
    },
    RAE: {
        "encoder_type": "dinov2",
        "encoder_hidden_size": 768,
        "encoder_patch_size": 14,
        "encoder_num_hidden_layers": 12,
        "encoder_input_size": 224,
        "decoder_hidden_size": 1152,
        "decoder_num_hidden_layers": 28,
        "decoder_num_attention_heads": 16,
        "decoder_intermediate_size": 4096,
        "patch_size": 16,
    },
}
SMALL = {
    QWEN: {
        "base_dim": 8,
        "z_dim": 4,
        "dim_mult": [1, 2, 2],
        "num_res_blocks": 1,
        "temperal_downsample": [False, True],
        "latents_mean": [0.3, -0.2, 0.0, 1.5],
        "latents_std": [0.5, 2.5, 1.0, 0.07],
    },
    FLUX2: {
        "down_block_types": [DOWN] * 2,
        "up_block_types": [UP] * 2,
        "block_out_channels": [16, 32],
        "layers_per_block": 1,
        "latent_channels": 4,
        "norm_num_groups": 8,
        "sample_size": 32,
    },
    RAE: {
        "encoder_type": "dinov2",
        "encoder_hidden_size": 64,
        "encoder_patch_size": 7,
        "encoder_num_hidden_layers": 2,
        "encoder_input_size": 28,
        "decoder_hidden_size": 32,
        "decoder_num_hidden_layers": 1,
        "decoder_num_attention_heads": 2,
        "decoder_intermediate_size": 64,
        "patch_size": 8,
        "noise_tau": 0.8,
        "scaling_factor": 0.5,
        "latents_mean": torch.randn(64, 4, 4, generator=torch.Generator().manual_seed(1)).tolist(),
        "latents_std": (0.5 + torch.rand(64, 4, 4, generator=torch.Generator().manual_seed(2))).tolist(),
    },
}
IMAGES = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(3))


def needs_its_packages(kind: str) -> str:
    if kind == RAE:
        pytest.importorskip("transformers", reason="AutoencoderRAE's VFM is a class of transformers")
    return kind


@pytest.fixture(params=[QWEN, FLUX2, RAE])
def kind(request) -> str:
    return needs_its_packages(request.param)


def network_of(kind: str, seed: int = 4, **changes) -> torch.nn.Module:
    """diffusers' class, every tensor random; its running statistics too."""
    network = randomised(getattr(diffusers, kind)(**SMALL[kind] | changes), seed).eval()
    if kind == FLUX2:
        generator = torch.Generator().manual_seed(seed)
        network.bn.running_mean.copy_(torch.randn(16, generator=generator))
        network.bn.running_var.copy_(0.2 + torch.rand(16, generator=generator))
    return network


def folder_of(path: Path, kind: str, seed: int = 4, **changes) -> Path:
    network_of(kind, seed, **changes).save_pretrained(path)
    return path


@dataclass(frozen=True)
class Expected:
    """Of images: un-normalised mean and std (None: no randomness), normalised mean; and how a latent is decoded."""

    mean: torch.Tensor
    std: torch.Tensor | None
    normalised: torch.Tensor


@torch.no_grad()
def expected(kind: str, network: torch.nn.Module, images: torch.Tensor) -> Expected:
    """By diffusers' class, and its pipeline's arithmetic."""
    signed = images.double().div(127.5).sub(1).float()
    if kind == QWEN:  # QwenImageImg2ImgPipeline
        posterior = network.encode(signed[:, :, None]).latent_dist
        mean = torch.tensor(network.config.latents_mean).view(1, -1, 1, 1, 1)
        inverse_std = 1.0 / torch.tensor(network.config.latents_std).view(1, -1, 1, 1, 1)
        normalised = (posterior.mode() - mean) * inverse_std
        return Expected(posterior.mode()[:, :, 0], posterior.std[:, :, 0], normalised[:, :, 0])
    if kind == FLUX2:  # Flux2Pipeline
        posterior = network.encode(signed).latent_dist
        z = patchified(posterior.mode())
        bn_mean = network.bn.running_mean.view(1, -1, 1, 1)
        bn_std = torch.sqrt(network.bn.running_var.view(1, -1, 1, 1) + network.config.batch_norm_eps)
        return Expected(z, patchified(posterior.std), (z - bn_mean) / bn_std)
    z = network.encode(images.double().div(255).float()).latent
    return Expected(z, None, z)


@torch.no_grad()
def expected_images(kind: str, network: torch.nn.Module, normalised: torch.Tensor) -> torch.Tensor:
    """The pipeline's images in [-1, 1], clamped, from what its denoiser works with."""
    if kind == QWEN:
        mean = torch.tensor(network.config.latents_mean).view(1, -1, 1, 1, 1)
        inverse_std = 1.0 / torch.tensor(network.config.latents_std).view(1, -1, 1, 1, 1)
        return network.decode(normalised[:, :, None] / inverse_std + mean).sample[:, :, 0].clamp(-1, 1)
    if kind == FLUX2:
        bn_mean = network.bn.running_mean.view(1, -1, 1, 1)
        bn_std = torch.sqrt(network.bn.running_var.view(1, -1, 1, 1) + network.config.batch_norm_eps)
        z = normalised * bn_std + bn_mean
        batch, channels, rows, columns = z.shape
        z = z.reshape(batch, channels // 4, 2, 2, rows, columns).permute(0, 1, 4, 2, 5, 3)
        return network.decode(z.reshape(batch, channels // 4, 2 * rows, 2 * columns)).sample.clamp(-1, 1)
    return (network.decode(normalised).sample * 2 - 1).clamp(-1, 1)


def patchified(z: torch.Tensor) -> torch.Tensor:
    """As Flux2Pipeline does it: ``[B, C, h, w]`` → ``[B, 4C, h/2, w/2]``."""
    batch, channels, rows, columns = z.shape
    z = z.view(batch, channels, rows // 2, 2, columns // 2, 2).permute(0, 1, 3, 5, 2, 4)
    return z.reshape(batch, channels * 4, rows // 2, columns // 2)


# --- what it is ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "downsampling", "shape", "stored", "parameters"),
    [
        (QWEN, 8, (16, 32, 32), (32, 32, 32), 126_892_531),
        (FLUX2, 16, (128, 16, 16), (256, 16, 16), 84_046_115),
        (RAE, 16, (768, 16, 16), (768, 16, 16), 501_638_656),
    ],
)
def test_real_configurations_at_256_pixels(kind, downsampling, shape, stored, parameters):
    """On the meta device: what is cached and decoded, by names and shapes of diffusers' own class."""
    needs_its_packages(kind)
    with torch.device("meta"):
        tokenizer = tokenizer_kind(kind).from_architecture(REAL[kind])
        theirs = getattr(diffusers, kind)(**REAL[kind])
        code = tokenizer.encode(torch.empty(2, 3, 256, 256, dtype=torch.uint8))
        decoded = tokenizer.decode(code.mode)
    assert {k: v.shape for k, v in tokenizer.network.state_dict().items()} == {
        k: v.shape for k, v in theirs.state_dict().items()
    }
    assert sum(parameter.numel() for parameter in tokenizer.parameters()) == parameters
    assert (tokenizer.downsampling, tokenizer.latent_channels, tokenizer.latent_shape(256)) == (
        *(downsampling, shape[0], shape),
    )
    assert code.mode.shape == (2, *shape)
    assert code.stored().shape == (2, *stored)
    assert tokenizer.stored_shape(256) == stored
    assert tokenizer.latent_shape_of(stored, tokenizer.architecture) == shape
    assert decoded.shape == (2, 3, 256, 256)


def test_kinds_are_named_and_random(kind):
    """``--vae KIND --vae-ckpt none`` is diffusers' default configuration: Qwen-Image's and FLUX.2's own."""
    with torch.device("meta"):
        ours = tokenizer_kind(kind).from_architecture({}).architecture
    assert ours["_class_name"] == kind
    if kind != RAE:
        assert {key: ours[key] for key in REAL[kind]} == REAL[kind]


# --- values ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [1, 3])
def test_latents_are_those_of_the_pipeline(tmp_path, kind, batch):
    network, images = network_of(kind), IMAGES[:batch]
    tokenizer, source = load_tokenizer(str(folder_of(tmp_path / "vae", kind)))
    assert source.startswith("bn." if kind == FLUX2 else "latents_mean") and str(tmp_path) in source
    theirs = expected(kind, network, images)
    with torch.no_grad():
        code = tokenizer.encode(images)
    assert theirs.mean.std() > 0.01
    torch.testing.assert_close(code.mode, theirs.mean, rtol=1e-5, atol=1e-5)
    normalised = tokenizer.statistics.normalize(code.mode)
    torch.testing.assert_close(normalised, theirs.normalised, rtol=1e-5, atol=1e-5 * theirs.normalised.abs().max())
    noise = torch.randn(theirs.mean.shape, generator=torch.Generator().manual_seed(5))
    sample = theirs.mean if theirs.std is None else theirs.mean + theirs.std * noise
    torch.testing.assert_close(tokenizer.sample(code.stored(), noise), sample, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(code.sample(noise), sample, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(tokenizer.statistics.denormalize(normalised), code.mode, rtol=1e-6, atol=1e-6)


def test_images_are_those_of_the_pipeline(tmp_path, kind):
    network = network_of(kind)
    tokenizer, _ = load_tokenizer(str(folder_of(tmp_path / "vae", kind)))
    shape = tokenizer.latent_shape(32)
    normalised = torch.randn(2, *shape, generator=torch.Generator().manual_seed(6))
    with torch.no_grad():
        ours = tokenizer.decode(tokenizer.statistics.denormalize(normalised))
    theirs = expected_images(kind, network, normalised)
    assert theirs.std() > 0.01
    torch.testing.assert_close(ours.clamp(-1, 1), theirs, rtol=1e-4, atol=1e-5)


def test_statistics_of_a_batch_norm_with_another_epsilon(tmp_path):
    network = network_of(FLUX2, batch_norm_eps=1e-2)
    network.save_pretrained(tmp_path / "vae")
    tokenizer, _ = load_tokenizer(str(tmp_path / "vae"))
    expected_std = (network.bn.running_var.double() + 1e-2).sqrt()
    torch.testing.assert_close(tokenizer.statistics.std.double(), expected_std, rtol=1e-6, atol=0)
    tokenizer.save(tmp_path / "again", with_statistics=False)
    tensors = load_file(tmp_path / "again/diffusion_pytorch_model.safetensors")
    torch.testing.assert_close(tensors["bn.running_var"], network.bn.running_var, rtol=1e-6, atol=0)


def test_a_batch_norm_that_was_never_measured_is_no_statistics(tmp_path):
    diffusers.AutoencoderKLFlux2(**SMALL[FLUX2]).save_pretrained(tmp_path / "vae")
    assert load_tokenizer(str(tmp_path / "vae"))[1] is None


def test_rae_gives_the_same_latent_always_and_in_training_mode(tmp_path):
    """Neither sampling nor the noise of its decoder's training."""
    needs_its_packages(RAE)
    tokenizer, _ = load_tokenizer(str(folder_of(tmp_path / "vae", RAE)))
    with torch.no_grad():
        first, second = tokenizer.encode(IMAGES), tokenizer.train().encode(IMAGES)
    noise = torch.randn(first.mode.shape)
    assert torch.equal(first.mode, second.mode) and torch.equal(first.sample(noise), first.mode)
    assert torch.equal(tokenizer.sample(first.stored(), noise), first.mode)
    assert torch.equal(tokenizer.statistics.normalize(first.mode), first.mode)
    assert tokenizer.architecture["noise_tau"] == 0.8  # of its training, and kept
    assert not any(parameter.requires_grad for parameter in tokenizer.network.encoder.parameters())


# --- on disk ---------------------------------------------------------------------------------------------------------


def test_saved_and_loaded_bits_are_the_same(tmp_path, kind):
    """By us and by diffusers; the checksum says which tokenizer it is, and nothing of its statistics."""
    tokenizer, _ = load_tokenizer(str(folder_of(tmp_path / "vae", kind)))
    checksum = tokenizer.checksum()
    tokenizer.to(memory_format=torch.channels_last).save(tmp_path / "ours")
    again, source = load_tokenizer(str(tmp_path / "ours"))
    assert source == str(tmp_path / "ours" / "latents_stats.safetensors")
    assert again.checksum() == checksum
    architectures = (again.architecture, tokenizer.architecture)
    ours, before = ({k: v for k, v in said.items() if kind != QWEN or "latents" not in k} for said in architectures)
    assert ours == before
    assert again.statistics.checksum() == tokenizer.statistics.checksum()
    with torch.no_grad():
        assert torch.equal(
            again.encode(IMAGES).stored(), load_tokenizer(str(tmp_path / "vae"))[0].encode(IMAGES).stored()
        )
    theirs = getattr(diffusers, kind).from_pretrained(tmp_path / "ours").eval()
    original = network_of(kind).state_dict()
    assert all(torch.equal(tensor, original[name]) for name, tensor in theirs.state_dict().items())
    if kind == QWEN:
        assert theirs.config.latents_std == pytest.approx(SMALL[QWEN]["latents_std"], rel=1e-6)

    again.statistics.mean += 1
    assert again.checksum() == checksum
    with torch.no_grad():
        next(iter(again.network.decoder.parameters()))[0] += 1
    assert again.checksum() != checksum


def test_other_statistics_reach_diffusers(tmp_path):
    """Those of a fine-tuned or newly measured VAE: where its pipelines look."""
    for kind in (QWEN, FLUX2):
        tokenizer, _ = load_tokenizer(str(folder_of(tmp_path / kind, kind)))
        mean, std = torch.rand(tokenizer.latent_channels), 0.5 + torch.rand(tokenizer.latent_channels)
        tokenizer.statistics.load(mean, std)
        tokenizer.save(tmp_path / f"{kind}-new")
        assert load_tokenizer(str(tmp_path / f"{kind}-new"))[0].checksum() == tokenizer.checksum()
        written = getattr(diffusers, kind).from_pretrained(tmp_path / f"{kind}-new").eval()
        theirs = expected(kind, written, IMAGES)
        torch.testing.assert_close(theirs.normalised, (theirs.mean - mean[:, None, None]) / std[:, None, None],
                                   rtol=1e-5, atol=1e-5)  # fmt: skip


def test_rae_reads_the_names_of_transformers_4(tmp_path):
    """And is the same tokenizer under them."""
    needs_its_packages(RAE)
    tokenizer, _ = load_tokenizer(str(folder_of(tmp_path / "vae", RAE)))
    file = tmp_path / "vae/diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    old = {}
    for name, tensor in tensors.items():
        if name.startswith("encoder."):
            name = name.replace("encoder.layers.", "encoder.encoder.layer.")
            for new, word in (("q_proj", "query"), ("k_proj", "key"), ("v_proj", "value")):
                name = name.replace(f".attention.{new}.", f".attention.attention.{word}.")
            name = name.replace(".attention.o_proj.", ".attention.output.dense.")
        old[name] = tensor
    assert any(".attention.attention.query." in name for name in old)
    save_file(old | {"decoder.decoder_pos_embed": torch.zeros(1, 17, 32)}, file)
    again, _ = load_tokenizer(str(tmp_path / "vae"))
    assert again.checksum() == tokenizer.checksum()


def test_a_name_on_the_hub(tmp_path, monkeypatch):
    """Of the VAE, or of a pipeline with one in vae/."""
    folder_of(tmp_path / "pipeline" / "vae", QWEN)
    monkeypatch.setattr("formats.hub._cached", lambda repository, inside: tmp_path / "pipeline" / inside)
    loaded = load_vae("Qwen/Qwen-Image")
    assert loaded.layout == f"folder of the kind {QWEN}"
    assert load_vae("Qwen/Qwen-Image:vae").tokenizer.checksum() == loaded.tokenizer.checksum()


# --- refusals --------------------------------------------------------------------------------------------------------


def message(call) -> str:
    with pytest.raises(UserError) as error:
        call()
    assert "\n" not in str(error.value)
    return str(error.value)


def test_what_does_not_load_is_one_line(tmp_path):
    folder = folder_of(tmp_path / "vae", QWEN)
    file, config = folder / "diffusion_pytorch_model.safetensors", folder / "config.json"
    said = config.read_text()
    for changes, part in (
        ({"latents_mean": [0.0] * 5}, "not numbers of 4 channels"),
        ({"input_channels": 4}, "its images have 4 channels, not 3"),
        ({"base_dim": 16}, "size mismatch"),
        ({"dim_mult": "x"}, "is built from this configuration"),
    ):
        config.write_text(json.dumps(json.loads(said) | changes))
        assert part in message(lambda: load_tokenizer(str(folder)))
    config.write_text(said)
    assert f"not --vae {FLUX2}" in message(lambda: load_tokenizer(FLUX2, str(folder)))
    assert "not --vae f8d4" in message(lambda: load_tokenizer("f8d4", str(folder)))
    file.write_bytes(file.read_bytes()[:-1000])
    assert f"no {QWEN} loads from it" in message(lambda: load_tokenizer(str(folder)))
    file.unlink()
    assert f"no {QWEN} loads from it" in message(lambda: load_tokenizer(str(folder)))
    assert "not square" in message(
        lambda: load_tokenizer(str(folder_of(tmp_path / "flux2", FLUX2, patch_size=(2, 1), latent_channels=8)))
    )


def test_packages_that_are_missing_are_named(monkeypatch):
    monkeypatch.setattr("models.tokenizers.rae.find_spec", lambda name: None)
    assert "pip install transformers" in message(lambda: load_tokenizer(RAE, "none"))
    monkeypatch.delattr(diffusers, FLUX2)
    monkeypatch.setattr(diffusers, "__getattr__", lambda name: None, raising=False)
    assert f"has no {FLUX2}: pip install --upgrade diffusers" in message(lambda: load_tokenizer(FLUX2, "none"))


def test_rae_has_one_resolution_and_is_not_trained(tmp_path, capsys):
    needs_its_packages(RAE)
    folder = folder_of(tmp_path / "vae", RAE)
    assert "decodes to 32 px only" in message(lambda: load_tokenizer(str(folder))[0].latent_shape(64))
    make_toy(["--output", str(tmp_path / "images"), "--num-images", "8", "--resolution", "32"])
    flags = {"data_dir": tmp_path / "images", "resolution": 32, "vae": folder, "output_dir": tmp_path, "exp_name": "x"}
    flags |= {"enc_type": "efficientnet-lite0", "batch_size": 4, "loss_cfg_path": "configs/l1_kl.yaml"}
    for script, more in ((train_sendvae, {}), (train_repae, {"model": "SiT-Ti/1"})):
        capsys.readouterr()
        assert run(script.main, argv_of(flags | more)) == EXIT_USER_ERROR
        error = capsys.readouterr().err.splitlines()
        assert "its encoder is a frozen VFM" in error[-1] and sum("error:" in line for line in error) == 1


@pytest.mark.parametrize("kind", [QWEN, FLUX2, RAE])
def test_its_decoder_is_trained_alone(kind, tmp_path):
    """With noise; its latents stay to the bit, through the training and through the folder that is left."""
    needs_its_packages(kind)
    folder = folder_of(tmp_path / "vae", kind)
    make_toy(["--output", str(tmp_path / "images"), "--num-images", "8", "--resolution", "32"])
    options = {
        "data_dir": tmp_path / "images",
        "resolution": 32,
        "vae": folder,
        "output_dir": tmp_path,
        "exp_name": "x",
    }
    options |= {"freeze_encoder": True, "align_coeff": 0, "latent_noise": 0.8, "batch_size": 4, "num_workers": 1}
    options |= {"max_train_steps": 2, "loss_cfg_path": "configs/l1_kl_gan.yaml"}
    assert run(train_sendvae.main, argv_of(options)) == 0
    before, after = (load_tokenizer(str(each))[0] for each in (folder, tmp_path / "x" / "vae"))
    codes = [tokenizer.encode(IMAGES) for tokenizer in (before, after)]
    assert torch.equal(codes[0].stored(), codes[1].stored())
    z = codes[0].mode
    assert not torch.equal(before.decode(z), after.decode(z))


def test_export_says_what_to_do_instead(tmp_path, capsys):
    folder = folder_of(tmp_path / "vae", FLUX2)
    for layout in ("diffusers", "ldm", "repa-e"):
        assert run(export_vae.main, [str(folder), str(tmp_path / "out.pt"), "--format", layout]) == EXIT_USER_ERROR
        error = capsys.readouterr().err
        assert "diffusers reads its folder as it is" in error and error.count("\n") == 1
        assert not (tmp_path / "out.pt").exists()


# --- through the scripts ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    path = tmp_path_factory.mktemp("images") / "toy"
    assert make_toy(["--output", str(path), "--num-images", "20", "--resolution", "32"]) == 0
    return path


def pixels_of(folder: Path) -> torch.Tensor:
    """All images of a folder, uint8 ``[N, 3, 32, 32]``."""
    opened = open_images(folder, 32)
    pixels = np.empty((len(opened), 3, 32, 32), np.uint8)
    opened.read_into(range(len(opened)), pixels)
    return torch.from_numpy(pixels)


def script(main, **flags) -> None:
    assert run(main, argv_of(flags)) == 0


def test_cached_trained_on_sampled_and_evaluated(tmp_path, images, kind):
    vae, cache = folder_of(tmp_path / "vae", kind), tmp_path / "latents"
    script(cache_latents.main, data_dir=images, resolution=32, vae=vae, vae_latents_name=cache, num_workers=0,
           hflip=True, dtype="float32", pproc_batch_size=8)  # fmt: skip
    tokenizer, _ = load_tokenizer(str(vae))
    pixels = pixels_of(images)
    with torch.no_grad():
        for folder, batch in ((cache, pixels), (cache / "flipped", pixels.flip(3))):
            cached = np.concatenate([np.load(path) for path in sorted(folder.glob("latents-*.npy"))])
            assert cached.shape == (20, *tokenizer.stored_shape(32))
            np.testing.assert_allclose(cached, tokenizer.encode(batch).stored().numpy(), rtol=1e-4, atol=2e-4)
    assert load_tokenizer(str(cache / "vae"))[0].statistics.checksum() == tokenizer.statistics.checksum()

    flags = {"data_dir": images, "resolution": 32, "vae_latents_name": cache, "model": "SiT-Ti/1", "align": "none"}
    flags |= {"output_dir": tmp_path, "exp_name": "ldm", "batch_size": 4, "num_workers": 0, "max_train_steps": 2}
    script(train_ldm.main, **flags, hflip=True, grid_steps=2, sampling_steps=2, checkpointing_steps=2, log_steps=1)
    sampling = {"num_fid_samples": 5, "num_steps": 2, "mode": "ode", "preview": 0, "sample_dir": tmp_path / "samples"}
    script(generate.main, exp_path=tmp_path / "ldm", **sampling)
    evaluation = tmp_path / "evaluation"
    measured = {"data": images, "resolution": 32, "vae": vae, "metrics": "psnr,ssim", "output_dir": evaluation}
    assert run(evaluate.main, ["reconstruction", *argv_of(measured)]) == 0
    (record,) = (evaluation / "metrics").glob("*.json")
    assert json.loads(record.read_text())["values"]["PSNR"] > 0
    probed = {"data": images, "resolution": 32, "vae": vae, "output_dir": tmp_path / "probed"}
    assert run(probe.main, ["diffusability", *argv_of(probed)]) == 0
    values = json.loads((tmp_path / "probed" / "metrics" / "probe-diffusability.json").read_text())["values"]
    assert (values["diffusability/scale-error"] is None) == (kind == RAE)
    assert values["diffusability/flip-error"] > 0


@pytest.mark.parametrize("kind", [QWEN, FLUX2])
def test_every_trained_weight_has_a_gradient(tmp_path, kind):
    """Else DDP waits for it: the second step of several processes would fail."""
    tokenizer, _ = load_tokenizer(str(folder_of(tmp_path / "vae", kind)))
    code = tokenizer.encode(IMAGES)
    tokenizer.decode(code.sample(torch.randn_like(code.mean))).square().mean().backward()
    assert [name for name, p in tokenizer.named_parameters() if p.requires_grad and p.grad is None] == []


@pytest.mark.parametrize("kind", [QWEN, FLUX2])
def test_convolutional_ones_train_too(tmp_path, images, kind):
    """A step with discriminator and alignment, from the folder of diffusers; what comes out, diffusers reads."""
    vae = folder_of(tmp_path / "vae", kind)
    flags = {"data_dir": images, "resolution": 32, "vae": vae, "loss_cfg_path": "configs/l1_kl_gan.yaml"}
    flags |= {"enc_type": "efficientnet-lite0", "batch_size": 4, "num_workers": 0, "max_train_steps": 1}
    script(train_sendvae.main, **flags, output_dir=tmp_path, exp_name="vae-run", mapper_grid=2)
    trained, source = load_tokenizer(str(tmp_path / "vae-run"))
    assert source.endswith("latents_stats.safetensors")
    assert trained.checksum() != load_tokenizer(str(vae))[0].checksum()
    written = getattr(diffusers, kind).from_pretrained(tmp_path / "vae-run/vae").eval()
    theirs = expected(kind, written, IMAGES)
    with torch.no_grad():
        ours = trained.statistics.normalize(trained.encode(IMAGES).mode)
    torch.testing.assert_close(ours, theirs.normalised, rtol=1e-4, atol=1e-4)
