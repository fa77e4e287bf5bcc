"""256 and 512 px, 4 to 64 latent channels: grids double, and everything fits together from the VAE to the samples.

Real sizes on the meta device; the whole pipeline with slim copies of the architectures at 32 and 64 px, whose default
grids (resolution / 16) are to each other as those of 256 and 512 px.
"""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import cache_latents
import generate
import train_ldm
import train_sendvae
from dataset.latents import LatentDataset
from dataset.loader import ImageBatch
from dataset.toy import main as make_toy
from diffusion.draws import Draws
from loss.alignment import TokenGrid
from loss.alignment.mapper import MapperAlignment
from loss.alignment.repa import REPA
from models.denoisers.config import SiTConfig
from models.denoisers.sit import SiT
from models.encoders import build_encoder
from models.mapper import Mapper
from models.tokenizers import build_tokenizer
from preprocessing import main as preprocess
from runtime.cli import run
from tests import ldm_trainings, sendvae_runs
from tests.latent_caches import flags as cache_flags
from training.sendvae import AlignedTokenizer

VAES = {"f8d4": (8, 4), "f16d16": (16, 16), "f16d32": (16, 32), "f16d64": (16, 64)}  # downsampling, channels


def architecture(name: str) -> dict:
    return json.loads(Path(f"configs/vae/{name}.json").read_text())


@pytest.mark.parametrize("resolution", [256, 512])
@pytest.mark.parametrize("vae", VAES)
def test_a_step_of_the_real_networks_fits_together(vae, resolution):
    downsampling, channels = VAES[vae]
    grid, side = resolution // 16, resolution // downsampling
    with torch.device("meta"):
        encoder = build_encoder("dinov2-vit-b", grid, random_weights=True)
        tokenizer = build_tokenizer(architecture(vae))
        mapper = Mapper(channels, side, grid, encoder.embed_dim)
        alignment = MapperAlignment([mapper], [TokenGrid(encoder.name, grid, encoder.embed_dim)], 1.0, "linear")
        model = AlignedTokenizer(tokenizer, alignment)
        images = torch.empty(2, 3, resolution, resolution, dtype=torch.uint8)
        latent, one_each = torch.empty(2, channels, side, side), torch.empty(2)
    assert tokenizer.latent_shape(resolution) == (channels, side, side)
    assert (mapper.patch_size, encoder.input_size) == (16 // downsampling, 14 * grid)
    features = encoder(images)
    assert mapper(latent).shape == features.shape == (2, grid**2, 768)
    batch, draws = ImageBatch(images, one_each), Draws(latent, latent, one_each, one_each)
    output = model(batch, [features], draws)
    assert output.reconstruction.shape == images.shape
    (output.reconstruction.mean() + output.alignment["alignment"]).backward()
    assert all(parameter.grad.shape == parameter.shape for parameter in model.parameters())


@pytest.mark.parametrize("resolution", [256, 512])
@pytest.mark.parametrize(("vae", "model"), [("f8d4", "SiT-XL/2"), ("f16d16", "SiT-XL/1"), ("f16d64", "SiT-XL/1")])
def test_a_real_sit_has_the_grid_of_the_vfm(vae, model, resolution):
    downsampling, channels = VAES[vae]
    config = SiTConfig(model, channels, resolution // downsampling, 1000)
    with torch.device("meta"):
        shape = (2, channels, config.latent_size, config.latent_size)
        sit = SiT(config)
        repa = REPA(sit, [TokenGrid(str(width), sit.grid, width) for width in (768, 1024)], 8, 2048, 0.5)
        inputs = torch.empty(shape), torch.empty(2), torch.empty(2, dtype=torch.int64)
        velocity, states = sit(*inputs, taps=repa.taps)
        tokens = repa.predict(states)
    assert sit.grid == resolution // 16
    assert velocity.shape == shape
    assert [part.shape for part in tokens] == [(2, sit.grid**2, 768), (2, sit.grid**2, 1024)]


# --- the whole pipeline, slim -----------------------------------------------------------------------------------------


def toy_set(folder: Path, resolution: int) -> Path:
    """A packed toy set."""
    size = ["--resolution", str(resolution)]
    make_toy(["--output", str(folder / "images"), "--num-images", "8", *size])
    preprocess(["--imagenet-path", str(folder / "images"), "--output-path", str(folder / "set"), *size])
    return folder / "set"


def slim(name: str, folder: Path) -> Path:
    """A published architecture with 16 channels a level and one residual block, random weights."""
    config = architecture(name)
    widths = [16] * len(config["block_out_channels"])
    config |= {"block_out_channels": widths, "norm_num_groups": 8, "layers_per_block": 1}
    torch.manual_seed(0)
    build_tokenizer(config).save(folder / "slim")
    return folder / "slim"


@pytest.mark.parametrize(
    ("vae", "model", "resolution"),
    [("f8d4", "SiT-Ti/2", 64), ("f16d16", "SiT-Ti/1", 32), ("f16d16", "SiT-Ti/1", 64), ("f16d64", "SiT-Ti/1", 64)],
)
def test_from_images_to_samples(vae, model, resolution, tmp_path):
    packed = toy_set(tmp_path, resolution)
    downsampling, channels = VAES[vae]
    side, grid = resolution // downsampling, resolution // 16
    options = {"resolution": None, "vae": slim(vae, tmp_path), "vae_ckpt": None, "max_train_steps": 1}
    assert run(train_sendvae.main, sendvae_runs.flags(packed, tmp_path, "vae", **options)) == 0
    state = load_file(tmp_path / "vae" / "checkpoints" / "0000001" / "alignment.safetensors")
    assert state["mappers.0.patch_embed.weight"].shape == (112, channels, 16 // downsampling, 16 // downsampling)

    cache = cache_flags(packed, tmp_path / "vae" / "vae", vae, cache_features=True, enc_type="efficientnet-lite0")
    assert run(cache_latents.main, cache) == 0
    dataset = LatentDataset(packed / vae, features=["efficientnet-lite0"])
    assert dataset.latent_shape == (channels, side, side)
    assert dataset.feature_shapes == ((grid**2, 112),)

    options = {"vae_latents_name": vae, "model": model, "max_train_steps": 1}
    assert run(train_ldm.main, ldm_trainings.flags(packed, tmp_path, "ldm", **options)) == 0
    args = json.loads((tmp_path / "ldm" / "args.json").read_text())["args"]
    assert (args["denoiser"]["latent_size"], args["repa_source"]) == (side, "features")

    sampling = ["--exp-path", str(tmp_path / "ldm"), "--num-fid-samples", "2", "--num-steps", "2"]
    assert run(generate.main, [*sampling, "--sample-dir", str(tmp_path / "samples")]) == 0
    images = np.load(tmp_path / "samples" / "samples.npz", allow_pickle=False)["arr_0"]
    assert (images.shape, images.dtype) == ((2, resolution, resolution, 3), np.uint8)
