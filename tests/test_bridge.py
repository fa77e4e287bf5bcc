"""docs/bridge.md: its Python, and each code's arithmetic on an exported VAE, against our normalisation."""

import re
import shutil
from pathlib import Path

import diffusers
import pytest
import torch

import export_vae
from formats.statistics import read_statistics
from formats.vae import load_tokenizer
from models.pixels import to_signed
from models.tokenizers import Tokenizer
from runtime.cli import run
from tests.latent_caches import save_vae
from tests.public_vae import TINY, PublicVAE

PAGE = Path(__file__).resolve().parents[1] / "docs" / "bridge.md"
MEAN, STD = torch.tensor([0.5, -1.0, 2.0, 0.0]), torch.tensor([0.5, 1.0, 2.0, 4.0])
IMAGES = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(11))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A run's VAE whose channels differ, and the page's three exports of it."""
    path = tmp_path_factory.mktemp("bridge")
    save_vae(path / "exps" / "sendvae", change=lambda tokenizer: tokenizer.statistics.load(MEAN, STD))
    source, plain = path / "exps" / "sendvae" / "vae", path / "pretrained" / "sendvae"
    for out, *words in (
        (plain, "--format", "diffusers"),
        (plain.with_name("sendvae-unit"), "--format", "diffusers", "--fold-statistics"),
        (plain.with_name("sendvae.pt"), "--format", "ldm"),
        (plain.with_name("unit.pt"), "--format", "ldm", "--fold-statistics"),
    ):
        assert export_vae.main([str(source), str(out), *words]) == 0
    return path


@pytest.fixture(scope="module")
def ours(folder) -> Tokenizer:
    return load_tokenizer(str(folder / "exps" / "sendvae" / "vae"))[0]


@pytest.fixture(scope="module")
def page(folder) -> dict:
    """Names of the page's Python, once it has run in the folder."""
    names = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for block in re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL):
            exec(compile(block, str(PAGE), "exec"), names)  # noqa: S102
    return names


def per_channel(values) -> torch.Tensor:
    return torch.as_tensor(values, dtype=torch.float64).view(1, -1, 1, 1)


@torch.no_grad()
def test_the_folded_vae_encodes_to_normalised_latents_and_decodes_them(folder, ours, page):
    """Of another draw than the mean too; our own code reads it as a VAE of mean 0 and std 1."""
    theirs = page["vae"].double()
    config = theirs.config
    assert (config.scaling_factor, config.shift_factor) == (pytest.approx(1), 0)
    assert config.latents_mean is None and config.latents_std is None
    code, exact = theirs.encode(to_signed(IMAGES).double()).latent_dist, ours.encode(IMAGES)
    mean, std = per_channel(MEAN), per_channel(STD)
    torch.testing.assert_close(code.mean, (exact.mean.double() - mean) / std, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(code.std, torch.exp(exact.logvar.double() / 2) / std, rtol=1e-5, atol=1e-6)
    z = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    images = ours.decode((z.double() * std + mean).float()).double()
    assert images.std() > 0.05
    torch.testing.assert_close(theirs.decode(z.double()).sample, images, rtol=0, atol=1e-5)
    again, source = load_tokenizer(str(folder / "pretrained" / "sendvae-unit"))
    assert source is not None
    torch.testing.assert_close(again.statistics.std, torch.ones(4), rtol=1e-6, atol=0)
    torch.testing.assert_close(again.decode(again.statistics.denormalize(z)).double(), images, rtol=0, atol=1e-5)


def test_a_dit_pipeline_decodes_with_the_folded_vae_as_this_code_does(folder, ours, tmp_path):
    """Also where channels differ, of which DiTPipeline knows nothing."""
    torch.manual_seed(0)
    sizes = {"num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 1, "sample_size": 8, "patch_size": 2}
    transformer = diffusers.DiTTransformer2DModel(in_channels=4, out_channels=4, norm_num_groups=1, **sizes)
    diffusers.DiTPipeline(transformer, ours.network, diffusers.DDIMScheduler()).save_pretrained(tmp_path)
    shutil.rmtree(tmp_path / "vae")
    shutil.copytree(folder / "pretrained" / "sendvae-unit", tmp_path / "vae")
    pipeline = diffusers.DiTPipeline.from_pretrained(tmp_path)
    pipeline.set_progress_bar_config(disable=True)
    latents, step = [], pipeline.scheduler.step

    def remember(*args, **kwargs):
        latents.append(step(*args, **kwargs).prev_sample)
        return step(*args, **kwargs)

    pipeline.scheduler.step = remember
    settings = {"guidance_scale": 1.0, "num_inference_steps": 3, "output_type": "pt"}
    images = pipeline([1, 7], generator=torch.Generator().manual_seed(3), **settings).images
    with torch.no_grad():
        expected = ours.decode(ours.statistics.denormalize(latents[-1])) / 2 + 0.5
    assert expected.std() > 0.05
    assert (images - expected.clamp(0, 1)).abs().max() < 1e-5


@torch.no_grad()
def test_diffusion_bench_normalises_the_folded_vae_as_this_code_does(folder, ours):
    """(z − shift) · scale: per channel from latents_mean and 1 / latents_std, else shift_factor and scaling_factor."""

    def normalised(name: str) -> torch.Tensor:
        vae = diffusers.AutoencoderKL.from_pretrained(folder / "pretrained" / name, subfolder="")
        z = vae.encode(IMAGES / 255 * 2 - 1).latent_dist.mode().double()
        config = vae.config
        shift = config.shift_factor if config.latents_mean is None else per_channel(config.latents_mean)
        scale = config.scaling_factor if config.latents_std is None else 1 / per_channel(config.latents_std)
        return (z - shift) * scale

    expected = ours.statistics.normalize(ours.encode(IMAGES).mean).double()
    torch.testing.assert_close(normalised("sendvae-unit"), expected, rtol=1e-4, atol=1e-5)
    spread = (STD.double().square().mean() + MEAN.double().var(unbiased=False)).sqrt()
    torch.testing.assert_close(normalised("sendvae"), expected * spread, rtol=1e-4, atol=1e-4)  # as the page warns
    assert spread > 2


@torch.no_grad()
def test_lightningdit_reads_weights_and_statistics_as_this_code_has_them(folder, ours, page):
    """Names of latent-diffusion's layout, none left over; (z − mean) / std there, z · std + mean back."""
    public = PublicVAE(**TINY)
    public.load_state_dict(torch.load(folder / "pretrained" / "sendvae.pt", weights_only=True))  # strict
    found = torch.load(folder / "latents_stats.pt", weights_only=True)
    assert {name: tuple(tensor.shape) for name, tensor in found.items()} == dict.fromkeys(("mean", "std"), (1, 4, 1, 1))
    z = ours.encode(IMAGES).mean
    there = (z - found["mean"]) / found["std"]
    torch.testing.assert_close(there, ours.statistics.normalize(z), rtol=1e-6, atol=1e-6)
    images = public.decode(there * found["std"] + found["mean"])
    torch.testing.assert_close(images, ours.decode(z), rtol=0, atol=1e-5)
    assert torch.equal(read_statistics(folder / "latents_stats.pt").mean.flatten(), MEAN)
    folded = PublicVAE(**TINY)
    folded.load_state_dict(torch.load(folder / "pretrained" / "unit.pt", weights_only=True))
    torch.testing.assert_close(folded.decode(there), ours.decode(z), rtol=0, atol=1e-5)


@pytest.mark.parametrize("case", ["repa-e", "none", "no convolutions"])
def test_statistics_that_cannot_be_folded_are_refused(case, folder, tmp_path, capsys):
    source, out, layout = folder / "exps" / "sendvae" / "vae", tmp_path / "out.pt", "ldm"
    if case == "repa-e":
        layout, reason = "repa-e", "--format repa-e has a file for the statistics"
    elif case == "none":
        source, reason = folder / "pretrained" / "sendvae.pt", "has no latent statistics; give --vae-latents-stats"
    else:
        network = diffusers.AutoencoderKL(norm_num_groups=8, block_out_channels=(16,), use_quant_conv=False)
        network.save_pretrained(tmp_path / "vae")
        shutil.copy(source / "latents_stats.safetensors", tmp_path / "vae")
        source, reason = tmp_path / "vae", "no 1×1 convolutions"
    argv = [str(source), str(out), "--format", layout, "--fold-statistics"]
    try:
        code = run(export_vae.main, argv)
    except SystemExit as left:
        code = left.code
    error = capsys.readouterr().err
    assert code == 2 and reason in error and "--fold-statistics" in error and not out.exists()
